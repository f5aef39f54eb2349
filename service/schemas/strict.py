"""What every body has in common."""

from pydantic import BaseModel, ConfigDict

EXAMPLE_SHA256 = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", from_attributes=True)
