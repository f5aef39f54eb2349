"""The active tasks, and how one is named that lies in the store."""

from typing import Any

from pydantic import Field

from model_store.revision_reader import ActiveFile
from service.schemas.strict import EXAMPLE_SHA256, Strict


class StoredModule(Strict):
    """A reference to a module that lies in the store already."""

    module_sha256: str = Field(pattern=r"^[0-9a-f]{64}$", examples=[EXAMPLE_SHA256])


class TaskOut(Strict):
    """One active task and what its module file says about it."""

    task: str = Field(examples=["textiles"])
    labels: list[str] = Field(examples=[["global", "local", "nominal"]])
    label_space: str | None = Field(None, description="Tasks that share it answer together.")
    abstain_level: float | None = Field(None, description="Its own level, if not the server's.")
    module_sha256: str = Field(examples=[EXAMPLE_SHA256])
    size_bytes: int = Field(examples=[2_023_604])
    flow: str = Field(examples=["tosca"])
    metrics: dict[str, float] = Field(examples=[{"accuracy": 0.98, "ece": 0.02}])
    training: dict[str, Any]
    provenance: dict[str, str]
    signer: str | None = Field(None, description="The trusted signer of the module file.", examples=["ci"])

    @classmethod
    def of(cls, file: ActiveFile, signer: str | None) -> "TaskOut":
        manifest = file.manifest
        return cls(
            task=manifest.task,
            labels=list(manifest.labels),
            label_space=manifest.label_space,
            abstain_level=manifest.abstain_level,
            module_sha256=file.sha256,
            size_bytes=file.size_bytes,
            flow=manifest.flow,
            metrics=manifest.metrics,
            training=manifest.training,
            provenance=manifest.provenance,
            signer=signer,
        )


class TasksOut(Strict):
    revision: int = Field(examples=[7])
    backbone_fingerprint: str = Field(examples=[EXAMPLE_SHA256])
    tasks: list[TaskOut]
