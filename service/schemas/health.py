"""Whether the service lives and is ready, and with what."""

from pydantic import Field

from service.schemas.strict import EXAMPLE_SHA256, Strict


class Live(Strict):
    status: str = Field(examples=["live"])


class Ready(Strict):
    status: str = Field(examples=["ready"])
    revision: int = Field(examples=[7])
    num_tasks: int = Field(examples=[2])
    backbone: str = Field(examples=["vit_base_patch16_clip_quickgelu_224"])
    backbone_fingerprint: str = Field(examples=[EXAMPLE_SHA256])
    device: str = Field(examples=["cpu"])
    runtime: str = Field(examples=["torch-float32"])
    staleness_s: float = Field(description="Seconds since the store was last read.")
    is_stale: bool = Field(description="Others may have published what is not served here.")
    store_fault: str | None = Field(None, description="Why the store could not be read the last time.")
