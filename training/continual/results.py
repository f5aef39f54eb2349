"""The results file: written after every run, read again to resume."""

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from model_store.errors import InvalidRequest
from training.continual.metrics import mean_and_deviation

Steps = Literal["all", "last"]
FIGURES = (
    "average_accuracy",
    "last_accuracy",
    "selection_accuracy",
    "accuracy_given_task",
    "forgetting",
    "backward_transfer",
    "ece",
    "worst_task_ece",
    "brier",
    "nll",
    "bytes_per_task",
    "learn_s_per_task",
    "unrelated_accuracy",
    "auroc",
    "fpr95",
)


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class StepResult(_Table):
    """After `num_tasks` tasks: accuracies in [0, 1]; calibration is None without probabilities."""

    num_tasks: int
    num_classes: int
    accuracy: float
    selection_accuracy: float
    accuracy_given_task: float
    accuracy_by_task: tuple[float, ...]
    ece: float | None
    brier: float | None
    nll: float | None
    worst_task_ece: float | None
    worst_task_brier: float | None
    worst_task_nll: float | None


class CoverageResult(_Table):
    """Prediction sets after the last task at a `nominal` coverage: how often they hold the truth, their mean
    size, and the length of the list of most probable labels that holds the truth as often."""

    nominal: float
    coverage: float
    mean_size: float
    equal_top_k: int


class RejectionResult(_Table):
    """A task left out: how well p-values tell its pictures from those of the tasks that were learnt.

    `fpr95` is the share of its pictures accepted at the level that accepts 95 % of the others';
    `abstained_known` and `abstained_unknown` are the shares with p ≤ 0.05.
    """

    task: str
    auroc: float
    fpr95: float
    abstained_known: float
    abstained_unknown: float


class UnrelatedResult(_Table):
    """The stream's pictures asked again after `num_tasks` tasks that have nothing to do with them."""

    num_tasks: int
    accuracy: float
    selection_accuracy: float


class RunResult(_Table):
    """One method on one seed. Stream figures are None unless every step was measured.

    `settle_s` is what the first answer after the last task waits for (solving, building the bank);
    `answer_s` is for all `num_pictures` test pictures after that. `coverage` and `rejection` are there for
    methods that state prediction sets and p-values.
    """

    tasks: tuple[str, ...]
    steps: tuple[StepResult, ...]
    average_accuracy: float | None
    last_accuracy: float
    forgetting: float | None
    backward_transfer: float | None
    learn_s_by_task: tuple[float, ...]
    settle_s: float
    answer_s: float
    num_pictures: int
    size_bytes: int
    reliability: tuple[tuple[int, float, float], ...] | None
    coverage: tuple[CoverageResult, ...] | None = None
    rejection: tuple[RejectionResult, ...] | None = None
    unrelated: UnrelatedResult | None = None

    def figure(self, name: str) -> float | None:
        """One of FIGURES; those of a step are the last step's."""
        if name == "bytes_per_task":
            return self.size_bytes / len(self.tasks)
        if name == "learn_s_per_task":
            return sum(self.learn_s_by_task) / len(self.tasks)
        if name == "unrelated_accuracy":
            return self.unrelated.accuracy if self.unrelated else None
        if name in ("auroc", "fpr95"):
            values = [getattr(one, name) for one in self.rejection or ()]
            return sum(values) / len(values) if values else None
        value: float | None = getattr(self if hasattr(self, name) else self.steps[-1], name)
        return value


class Figure(_Table):
    mean: float
    deviation: float
    num_seeds: int


class BenchmarkResults(_Table):
    """`config` says what was measured: runs of another configuration never share a file."""

    format_version: Literal[2] = 2
    config: dict[str, Any]
    versions: dict[str, str] = Field(default_factory=dict)
    runs: dict[str, dict[str, RunResult]] = Field(default_factory=dict)
    summary: dict[str, dict[str, Figure]] = Field(default_factory=dict)

    def has(self, method: str, seed: int) -> bool:
        return str(seed) in self.runs.get(method, {})

    def with_run(self, method: str, seed: int, run: RunResult) -> "BenchmarkResults":
        of_method = {**self.runs.get(method, {}), str(seed): run}
        runs = {**self.runs, method: of_method}
        return self.model_copy(
            update={"runs": runs, "summary": {**self.summary, method: _summarise(of_method)}}
        )

    def without(self, methods: Iterable[str]) -> "BenchmarkResults":
        dropped = set(methods)
        return self.model_copy(
            update={
                "runs": {name: runs for name, runs in self.runs.items() if name not in dropped},
                "summary": {name: one for name, one in self.summary.items() if name not in dropped},
            }
        )

    def write(self, path: Path) -> None:
        """Whole or not at all, so that an interrupted run can resume."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        partial.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def open_results(path: Path | None, config: dict[str, Any]) -> BenchmarkResults:
    """The results to go on from, or empty ones.

    Raises InvalidRequest when the file is something else or of another configuration.
    """
    fresh = BenchmarkResults(config=config, versions=_versions())
    if path is None or not path.exists():
        return fresh
    try:
        found = BenchmarkResults.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise InvalidRequest(f"{path} is no results file of this benchmark") from error
    different = [key for key in {*config, *found.config} if config.get(key) != found.config.get(key)]
    if different:
        raise InvalidRequest(
            f"{path} holds results of another configuration ({', '.join(sorted(different))} differ): "
            "choose another file or delete it"
        )
    return found


def _summarise(runs: dict[str, RunResult]) -> dict[str, Figure]:
    summary = {}
    for name in FIGURES:
        values = [value for run in runs.values() if (value := run.figure(name)) is not None]
        if values:
            mean, deviation = mean_and_deviation(values)
            summary[name] = Figure(mean=mean, deviation=deviation, num_seeds=len(values))
    return summary


def _versions() -> dict[str, str]:
    packages = ("tosca-serving", "torch", "timm", "numpy", "pillow")
    cores = str(os.cpu_count() or 1)
    return {"python": platform.python_version(), "cores": cores, **{name: version(name) for name in packages}}
