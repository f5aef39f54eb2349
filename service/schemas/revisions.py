"""The log of revisions."""

from datetime import datetime

from pydantic import Field

from model_store.revision import Revision
from service.schemas.strict import EXAMPLE_SHA256, Strict


class RevisionOut(Strict):
    number: int = Field(examples=[7])
    parent: int | None = Field(examples=[6])
    backbone_fingerprint: str = Field(examples=[EXAMPLE_SHA256])
    tasks: dict[str, str] = Field(examples=[{"textiles": EXAMPLE_SHA256}])
    reason: str = Field(examples=["add textiles"])
    author: str = Field(examples=["ops@host"])
    created_at: datetime

    @classmethod
    def of(cls, revision: Revision) -> "RevisionOut":
        return cls.model_validate(revision, from_attributes=True, extra="ignore")
