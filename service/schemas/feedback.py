"""True labels that come back, and how the answers compare."""

from pydantic import Field

from model_store.manifest import Label, TaskName
from service.schemas.strict import Strict


class FeedbackRequest(Strict):
    """What a picture really showed."""

    request_id: str = Field(
        description="The `x-request-id` of the answer.",
        pattern=r"^[A-Za-z0-9._-]{1,128}$",
        examples=["4bf92f3577b34da6a3ce929d0e0e4736"],
    )
    index: int = Field(0, ge=0, description="Which picture of the request, from 0.")
    label: Label = Field(description="The true label.", examples=["nominal"])
    task: TaskName | None = Field(
        None,
        description="Its task; without, the label alone must match.",
        examples=["textiles"],
    )


class FeedbackOut(Strict):
    """The answer that was judged, and whether it was right."""

    task: str = Field(examples=["textiles"])
    label: str = Field(description="The label answered.", examples=["local"])
    confidence: float = Field(examples=[0.95])
    correct: bool
    counted: bool = Field(description="False when told before, or when its module is not active any more.")
