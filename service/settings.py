"""Every limit and choice of the service, read once from TOSCA_* environment variables."""

import os
from typing import Annotated

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from model_store.console import DEFAULT_STORE
from model_store.decoding import ImageLimits
from model_store.publishing import DEFAULT_MARGIN

DEFAULT_ABSTAIN_LEVEL = 0.01

Bytes = Annotated[int, Field(gt=0)]
Seconds = Annotated[float, Field(ge=0.0)]


class Settings(BaseSettings):
    """Settings of one service process; `TOSCA_STORE` sets `store`, and so on."""

    model_config = SettingsConfigDict(env_prefix="TOSCA_", frozen=True, extra="forbid")

    store: str = Field(DEFAULT_STORE, description="Folder or s3://, gs://, az:// URL of the model store.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    runtime: str = Field("auto", description="auto (the tuned one) or a name of `tosca backbone tune`.")

    max_body_bytes: Bytes = Field(64 * 2**20, description="Largest body of a prediction request.")
    max_module_bytes: Bytes = Field(256 * 2**20, description="Largest module file that may be registered.")
    max_image_bytes: Bytes = Field(32 * 2**20, description="Largest encoded picture.")
    max_image_pixels: int = Field(64_000_000, gt=0, description="Most pixels a picture may declare.")
    max_images_per_request: int = Field(64, gt=0, description="Most pictures in one request.")
    max_queued_images: int = Field(256, gt=0, description="Pictures in the house; more are refused with 503.")
    max_top_k: int = Field(100, gt=0, description="Most alternatives a client may ask for.")
    abstain_level: float = Field(
        DEFAULT_ABSTAIN_LEVEL,
        ge=0.0,
        le=1.0,
        description="Pictures with a p-value this low are abstained on; 0: never.",
    )
    request_timeout_s: float = Field(30.0, gt=0.0, description="A prediction not answered by then gets 504.")

    max_batch_size: int = Field(0, ge=0, description="Pictures a backbone pass; 0: 8 on CPU, 64 on CUDA.")
    max_wait_s: Seconds = Field(0.0, description="How long an idle device waits for a batch to fill.")
    decode_threads: int = Field(0, ge=0, description="Threads decoding pictures; 0: one per core, at most 8.")
    torch_threads: int = Field(0, ge=0, description="Threads of one backbone pass on CPU; 0: all cores.")

    impact_margin: float = Field(
        DEFAULT_MARGIN, ge=0.0, le=1.0, description="Accuracy another task may lose before a 409."
    )
    store_poll_s: Seconds = Field(5.0, description="How often to look for others' revisions; 0: never.")
    shutdown_timeout_s: float = Field(30.0, gt=0.0, description="Longest drain after SIGTERM.")
    stall_after_s: float = Field(
        120.0, gt=0.0, description="A pass longer than this fails the liveness check."
    )

    cls_cache_bytes: int = Field(
        256 * 2**20, ge=0, description="Memory for CLS vectors of pictures seen before; 0 keeps none."
    )

    @property
    def image_limits(self) -> ImageLimits:
        return ImageLimits(self.max_image_bytes, self.max_image_pixels)

    @property
    def num_decode_threads(self) -> int:
        return self.decode_threads or min(8, os.cpu_count() or 1)
