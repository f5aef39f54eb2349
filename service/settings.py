"""Every limit and choice of the service, read once from TOSCA_* environment variables."""

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from model_store.console import DEFAULT_STORE
from model_store.decoding import ImageLimits
from model_store.deferred import DEFAULT_MAX_BYTES
from model_store.object_files import folder_of
from model_store.publishing import DEFAULT_MARGIN

# The least p-value of a task with M calibration vectors is 1/(M + 1): below that it never abstains.
DEFAULT_ABSTAIN_LEVEL = 0.02
# Nobody shares a folder unless that was said, as by TOSCA_PROCESSES; an object store is what replicas share.
_HEARTBEAT_S = 10.0

Bytes = Annotated[int, Field(gt=0)]
Plane = Literal["main", "admin"]
Seconds = Annotated[float, Field(ge=0.0)]
Words = Annotated[
    tuple[str, ...],
    NoDecode,
    BeforeValidator(lambda value: tuple(value.split()) if isinstance(value, str) else value),
]


class Settings(BaseSettings):
    """Settings of one service process; `TOSCA_STORE` sets `store`, and so on."""

    model_config = SettingsConfigDict(env_prefix="TOSCA_", env_ignore_empty=True, frozen=True, extra="forbid")

    store: str = Field(DEFAULT_STORE, description="Folder or s3://, gs://, az:// URL of the model store.")
    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    admin_host: str = Field("127.0.0.1", description="Address of the admin port.")
    admin_port: int | None = Field(
        None, ge=0, le=65535, description="Port of its own for changes of the tasks; without: all on one."
    )
    grpc_port: int | None = Field(
        None, ge=0, le=65535, description="Port of the Open Inference Protocol over gRPC; without: none."
    )
    processes: int = Field(
        1,
        ge=1,
        le=64,
        description="Server processes that share the port and the device (Linux); limits are those of each. "
        "The admin port is the first one's, the next one's is one higher, and so on.",
    )
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N.")
    runtime: str = Field("auto", description="auto (the tuned one) or a name of `tosca backbone tune`.")

    tls_certificate: Path | None = Field(None, description="Certificate chain, PEM: serve HTTPS.")
    tls_key: Path | None = Field(None, description="Its private key, PEM, not encrypted.")
    keys_file: Path | None = Field(None, description="API keys, as `tosca keys` writes them.")
    allow_anonymous: Literal["auto", "without-keys", "nothing", "predict", "everything"] = Field(
        "auto",
        description="What needs no key. auto: nothing with a keys file; without one everything, but then "
        "the server listens on loopback only. without-keys: the same on any address.",
    )
    cors_origins: Words = Field((), description="Origins whose pages may call the API, separated by blanks.")
    show_docs: bool = Field(True, description="Serve /docs and /openapi.json.")
    show_console: bool = Field(True, description="Serve the console; with an admin port, there alone.")
    trusted_signers: Path | None = Field(None, description="List of the signers of module files.")
    require_signature: bool = Field(False, description="Refuse modules that no trusted signer has signed.")
    audit_log: Path | None = Field(None, description="Append every change and its author to this file.")
    log_format: Literal["json", "text"] = Field("json", description="json, or text for people.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info")

    max_body_bytes: Bytes = Field(64 * 2**20, description="Largest body of a prediction request.")
    max_json_bytes: Bytes = Field(
        16 * 2**20, description="Largest JSON body: parsing holds up everything else, unlike raw bodies."
    )
    max_feedback_bytes: Bytes = Field(16 * 2**10, description="Largest body of /feedback.")
    max_module_bytes: Bytes = Field(256 * 2**20, description="Largest module file that may be registered.")
    max_buffered_bytes: Bytes = Field(
        2**30, description="Bodies in memory together; more get 503. As much for gRPC messages; more wait."
    )
    max_header_bytes: Bytes = Field(
        32 * 2**10, description="Request line and headers, or trailers; more get 431."
    )
    max_connections: int = Field(1000, gt=0, description="Open connections; further ones are closed.")
    max_image_bytes: Bytes = Field(32 * 2**20, description="Largest encoded picture.")
    max_image_pixels: int = Field(64_000_000, gt=0, description="Most pixels a picture may declare.")
    max_decoded_bytes: Bytes = Field(
        2 * 2**30,
        description="Pixels in memory together, being decoded or waiting; what does not fit waits, what "
        "never will gets 413.",
    )
    max_images_per_request: int = Field(64, gt=0, description="Most pictures in one request.")
    max_queued_images: int = Field(256, gt=0, description="Pictures in the house; more are refused with 503.")
    max_top_k: int = Field(100, gt=0, description="Most alternatives a client may ask for.")
    abstain_level: float = Field(
        DEFAULT_ABSTAIN_LEVEL,
        ge=0.0,
        le=1.0,
        description="Pictures with a p-value this low are abstained on; 0: never.",
    )
    max_requests_per_key: int = Field(64, gt=0, description="Requests of one key under way; more get 429.")
    max_grpc_calls: int = Field(256, gt=0, description="gRPC calls under way; more are refused.")
    max_history: int = Field(
        256, gt=0, description="Revisions searched for tasks that the protocol may load again."
    )
    request_timeout_s: float = Field(30.0, gt=0.0, description="A prediction not answered by then gets 504.")
    max_request_timeout_s: float = Field(
        120.0, gt=0.0, description="Longest that X-Request-Timeout may ask for."
    )
    header_timeout_s: float = Field(10.0, gt=0.0, description="A connection must send its headers by then.")
    body_timeout_s: float = Field(
        60.0,
        gt=0.0,
        description="A body not received by then gets 408; an answer not taken by then is dropped.",
    )
    keep_alive_s: float = Field(15.0, gt=0.0, description="An idle connection is closed after this.")

    max_batch_size: int = Field(0, ge=0, description="Pictures a backbone pass; 0: 8 on CPU, 64 on CUDA.")
    max_wait_s: Seconds = Field(0.0, description="How long an idle device waits for a batch to fill.")
    decode_threads: int = Field(
        0,
        ge=0,
        description="Threads decoding pictures; 0: one per core, at most 8; each process has its share.",
    )
    torch_threads: int = Field(0, ge=0, description="Threads of the backbone's passes on CPU; 0: all cores.")
    streams: int = Field(
        0, ge=0, description="Passes side by side on CPU, which share these threads; 0: as tuned, else 1."
    )

    module_memory_bytes: Bytes = Field(
        DEFAULT_MAX_BYTES,
        description="Memory for modules that are read when needed, which are those of very many tasks.",
    )
    begin_epochs: bool = Field(
        True, description="Begin an epoch after a change, when there are so many tasks that one is due."
    )
    loader_niceness: int = Field(
        10, ge=0, le=19, description="How far registrations leave the processors to answers (Linux)."
    )
    impact_margin: float = Field(
        DEFAULT_MARGIN, ge=0.0, le=1.0, description="Accuracy another task may lose before a 409."
    )
    store_poll_s: Seconds = Field(
        5.0, description="How often to look for others' revisions, give or take a fifth; 0: never."
    )
    store_read_gap_s: Seconds = Field(
        0.05,
        description="Least time between two looks for others' revisions, however many requests ask for newer "
        "ones than are served.",
    )
    stale_after_s: float = Field(
        30.0, gt=0.0, description="Readiness says so when the store was not read for as long."
    )
    catch_up_timeout_s: float = Field(
        5.0, gt=0.0, description="Longest that a request waits for the revision it asks for; then 412."
    )
    replica_heartbeat_s: Seconds | None = Field(
        None,
        le=3600.0,
        description="How often this replica's record in the store is written, give or take a fifth; others "
        "count it as gone after three times as long. 0: never; without: 10 s, but never in a folder that one "
        "process serves.",
    )
    replica_address: str | None = Field(
        None, max_length=300, description="Where others reach this replica; told in its record."
    )
    replica_keep_s: float = Field(
        3600.0, gt=0.0, description="Records of replicas that are gone for as long are removed."
    )
    replica_wait_s: float = Field(
        30.0, gt=0.0, description="Longest that wait=all waits for the other replicas."
    )
    shutdown_grace_s: Seconds = Field(
        2.0, description="After SIGTERM: not ready, but accepting, for load balancers to notice."
    )
    shutdown_timeout_s: float = Field(30.0, gt=0.0, description="Longest drain after SIGTERM.")
    stall_after_s: float = Field(
        120.0, gt=0.0, description="A pass longer than this fails the liveness check."
    )

    cls_cache_bytes: int = Field(
        256 * 2**20, ge=0, description="Memory for CLS vectors of pictures seen before; 0 keeps none."
    )

    metrics_on: Literal["both", "main", "admin", "nothing"] = Field(
        "both", description="Ports that serve /metrics, where the admin port is one of its own."
    )
    metrics_need_key: bool = Field(
        True, description="Whether /metrics needs scope read, where other routes do; they name the tasks."
    )
    otlp_endpoint: str | None = Field(
        None, pattern=r"^https?://", description="Send traces there over OTLP/HTTP, as http://collector:4318."
    )
    trace_ratio: float = Field(
        1.0, ge=0.0, le=1.0, description="Share of requests traced that come without a sampled parent."
    )
    max_recent_answers: int = Field(
        10_000, ge=0, description="Last answers that /feedback may be about, kept without their pictures."
    )
    max_tracked_tasks: int = Field(
        100,
        gt=0,
        description="Tasks with counts of their own in /traffic; further ones are counted together.",
    )
    drift_window: int = Field(
        1000, gt=0, description="Pictures of a task after which its test for drift begins anew."
    )
    drift_alarm_rate: float = Field(
        0.001, gt=0.0, lt=1.0, description="Share of windows without drift that may raise an alarm."
    )

    exit_when_dead: bool = Field(
        True, description="End the process when it can answer no more, for a supervisor to start it again."
    )

    @property
    def heartbeat_s(self) -> float:
        """Seconds between the records of this replica; 0: it writes none."""
        if self.replica_heartbeat_s is not None:
            return self.replica_heartbeat_s
        return 0.0 if folder_of(self.store) and self.processes == 1 else _HEARTBEAT_S

    @property
    def default_wait(self) -> Literal["this", "all"]:
        """Who must serve a change before it is answered. Where processes share a port, the next request may
        reach any of them."""
        return "this" if self.processes == 1 else "all"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Every address that is listened on."""
        return (self.host,) if self.admin_port is None else (self.host, self.admin_host)

    def serves_metrics(self, plane: Plane) -> bool:
        """Without an admin port the main one has them, unless nothing has."""
        if self.admin_port is None:
            return plane == "main" and self.metrics_on != "nothing"
        return self.metrics_on in ("both", plane)

    @property
    def image_limits(self) -> ImageLimits:
        return ImageLimits(self.max_image_bytes, self.max_image_pixels)

    @property
    def num_decode_threads(self) -> int:
        return self.decode_threads or min(8, max(1, (os.cpu_count() or 1) // self.processes))
