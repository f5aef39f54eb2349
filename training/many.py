"""Many tasks in one run: one pass of the backbone over all their pictures, training spread over the cores.

A task that fails is reported and the others go on; a task whose module is already there, made from the same
pictures in the same way, is left as it is.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from model_store.backbone import BackboneManifest
from model_store.errors import InvalidDataset, ToscaError
from model_store.manifest import ModuleManifest
from training.destinations import Destination
from training.features import HashedSource, LabelledFeatures
from training.pictures import PictureSource
from training.plans import TaskPlan
from training.sources import open_source
from training.trainer import check_names
from training.workers import FinishedJob, TrainingJob, TrainingPool

Hash = Callable[[PictureSource], HashedSource]
ExtractEach = Callable[[Iterator[HashedSource]], Iterator[LabelledFeatures | InvalidDataset]]


@dataclass(frozen=True, slots=True)
class TaskOutcome:
    """What became of one task."""

    task: str
    status: Literal["trained", "unchanged", "failed"]
    fault: str | None = None
    manifest: ModuleManifest | None = None
    num_pictures: int = 0
    num_computed: int = 0
    skipped: tuple[str, ...] = ()
    seconds: float = 0.0  # of training and report
    report: Path | str | None = None  # or why there is none
    kept: dict[str, Any] = field(default_factory=dict)  # what the destination says


@dataclass(frozen=True, slots=True)
class _InTraining:
    job: TrainingJob
    future: "Future[FinishedJob]"


def train_many(
    plans: Sequence[TaskPlan],
    backbone: BackboneManifest,
    destination: Destination,
    *,
    hash_source: Hash,
    extract_each: ExtractEach,
    report_folder: Path,
    workers: TrainingPool,
) -> Iterator[TaskOutcome]:
    """Train tasks and keep their module files, in the order of `plans`; one outcome each, as they are kept.

    A task's file has the bytes of training it alone from the same feature cache. Tasks wait for their
    turn to be kept, at most two for each worker, so the memory needed is bounded by the workers and the
    revisions of a store are those of training one after another.
    """
    settled: deque[TaskOutcome | _InTraining] = deque()
    sources: deque[TaskPlan | TaskOutcome] = deque()
    max_waiting = 2 * workers.num_workers

    def needed() -> Iterator[HashedSource]:
        """Sources that features are wanted of; all others leave their outcome in `sources`."""
        for plan in plans:
            hashed = _look_at(plan, backbone, destination, hash_source)
            if isinstance(hashed, TaskOutcome):
                sources.append(hashed)
                continue
            sources.append(plan)
            yield hashed

    def settle(most: int) -> Iterator[TaskOutcome]:
        while len(settled) > most:
            first = settled.popleft()
            yield first if isinstance(first, TaskOutcome) else _keep(first, workers, destination)

    for features in extract_each(needed()):
        plan = _next_plan(sources, settled)
        settled.append(_start(plan, features, backbone, destination, report_folder, workers))
        yield from settle(max_waiting)
    settled += [one for one in sources if isinstance(one, TaskOutcome)]
    yield from settle(0)


def _look_at(
    plan: TaskPlan, backbone: BackboneManifest, destination: Destination, hash_source: Hash
) -> HashedSource | TaskOutcome:
    """Find a task's pictures, and whether its module is there already."""
    try:
        source = open_source(plan.data, min_images_per_class=plan.min_images)
        check_names(plan.task, source.labels, plan.label_space)
    except ToscaError as error:
        return TaskOutcome(plan.task, "failed", str(error))
    hashed = replace(hash_source(source), min_images_per_class=plan.min_images)
    present = _present(plan, backbone, destination, hashed.data_sha256)
    return hashed if present is None else TaskOutcome(plan.task, "unchanged", manifest=present)


def _present(
    plan: TaskPlan, backbone: BackboneManifest, destination: Destination, data_sha256: str
) -> ModuleManifest | None:
    manifest = destination.manifest(plan.task)
    is_same = manifest is not None and plan.is_made_by(manifest, backbone.fingerprint, data_sha256)
    return manifest if is_same else None


def _next_plan(
    sources: "deque[TaskPlan | TaskOutcome]", settled: "deque[TaskOutcome | _InTraining]"
) -> TaskPlan:
    """The plan whose features have come; outcomes that were clear before it are settled in their place."""
    while True:
        one = sources.popleft()
        if isinstance(one, TaskPlan):
            return one
        settled.append(one)


def _start(
    plan: TaskPlan,
    features: LabelledFeatures | InvalidDataset,
    backbone: BackboneManifest,
    destination: Destination,
    report_folder: Path,
    workers: TrainingPool,
) -> TaskOutcome | _InTraining:
    if isinstance(features, InvalidDataset):
        return TaskOutcome(plan.task, "failed", str(features))
    # With unreadable or repeated pictures, only now is it known which pictures the module is made of.
    present = _present(plan, backbone, destination, features.data_sha256)
    if present is not None:
        return TaskOutcome(plan.task, "unchanged", manifest=present, skipped=features.skipped)
    job = TrainingJob.of(plan, features, backbone, report_folder)
    return _InTraining(job, workers.submit(job))


def _keep(training: _InTraining, workers: TrainingPool, destination: Destination) -> TaskOutcome:
    job = training.job
    try:
        finished = workers.result(job, training.future)
        kept = destination.keep(job.plan.task, finished.data)
    except ToscaError as error:
        fault = str(error)
    except BrokenProcessPool:
        fault = "its training process was killed; out of memory?"
    except Exception as error:  # one task's fault, of whatever kind, is its outcome and not the others'
        fault = f"{type(error).__name__}: {error}"
    else:
        return TaskOutcome(
            job.plan.task,
            "trained",
            manifest=finished.manifest,
            num_pictures=len(job.label_N),
            num_computed=job.num_computed,
            skipped=job.skipped,
            seconds=finished.seconds,
            report=finished.report,
            kept=kept,
        )
    return TaskOutcome(job.plan.task, "failed", fault, skipped=job.skipped)
