"""The manifest of a module file: everything about a task version that is not a tensor."""

import re
import unicodedata
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from model_store.luca import Flow

MAX_CLASSES = 10_000
TASK_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_task_name(name: str) -> str:
    """The name itself; ValueError when no module file may carry it."""
    if not TASK_NAME.fullmatch(name):
        raise ValueError(
            "a task name is 1 to 64 ASCII letters, digits, '.', '_' or '-', beginning with a letter or digit"
        )
    return name


def check_label(label: str) -> str:
    """The label itself; ValueError when no module file may carry it."""
    if not label.strip() or len(label) > 256 or label != label.strip():
        raise ValueError(f"label {label[:40]!r} must be 1 to 256 characters without blanks around them")
    if any(unicodedata.category(character).startswith("C") for character in label):
        raise ValueError(f"label {label[:40]!r} has control characters")
    return label


TaskName = Annotated[str, AfterValidator(check_task_name)]
Label = Annotated[str, AfterValidator(check_label)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class ModuleManifest(BaseModel):
    """The header of a module file: everything about a task version that is not a tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    format_version: Literal[2] = 2
    task: TaskName
    labels: tuple[Label, ...] = Field(min_length=1, max_length=MAX_CLASSES)
    label_space: TaskName | None = None
    abstain_level: float | None = Field(None, ge=0.0, le=1.0)
    backbone_fingerprint: Sha256
    feature_dim: int = Field(gt=0, le=65536)
    bottleneck_dim: int = Field(gt=0, le=65536)
    flow: Flow = "tosca"
    standardised: bool
    luca_weight: float = Field(ge=0.0, le=1e3)
    ridge_weight: float = Field(ge=0.0, le=1e3)
    training: dict[str, str | int | float | bool | None] = Field(default_factory=dict, max_length=64)
    metrics: dict[str, float] = Field(default_factory=dict, max_length=64)
    provenance: dict[str, str] = Field(default_factory=dict, max_length=64)

    @model_validator(mode="after")
    def _check_whole(self) -> "ModuleManifest":
        if len(set(self.labels)) != len(self.labels):
            raise ValueError("labels must be distinct")
        if self.luca_weight == 0.0 and self.ridge_weight == 0.0:
            raise ValueError("luca_weight and ridge_weight are both 0: the module would answer nothing")
        if self.ridge_weight > 0.0 and not self.standardised:
            raise ValueError("the ridge needs standardised vectors")
        return self
