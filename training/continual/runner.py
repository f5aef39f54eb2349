"""Learning a stream with every method and seed, and measuring after every task."""
# N test pictures so far

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from model_store.backbone import BackboneManifest
from training.continual.caution import leave_tasks_out, measure_coverage
from training.continual.method import CautiousMethod, Method, Predictions
from training.continual.metrics import (
    measure_calibration,
    reliability,
    share,
    summarise_stream,
)
from training.continual.registry import METHODS, Workshop
from training.continual.results import (
    BenchmarkResults,
    CoverageResult,
    RunResult,
    StepResult,
    Steps,
    UnrelatedResult,
)
from training.continual.streams import Stream
from training.continual.tasks import ContinualTask, arrange, renumber
from training.features import LabelledFeatures

Result = TypeVar("Result")


@dataclass(frozen=True)
class Plan:
    """What to run; `done` hears of every finished (method, seed).

    `unrelated` are streams whose tasks are learnt after those of the stream; `images_per_class` limits the
    training pictures of all; `leave_out` also measures how pictures of unknown tasks are told.
    """

    stream: Stream
    features: Sequence[LabelledFeatures]
    backbone: BackboneManifest
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    steps: Steps
    ranpac_width: int
    done: Callable[[str, int, RunResult], None] = lambda *_: None
    unrelated: Sequence[tuple[Stream, Sequence[LabelledFeatures]]] = ()
    images_per_class: int | None = None
    leave_out: bool = False

    def tasks(self, seed: int) -> tuple[ContinualTask, ...]:
        return arrange(self.stream, self.features, seed, self.images_per_class)

    def unrelated_tasks(self, seed: int, first_label: int) -> tuple[ContinualTask, ...]:
        """Those of all unrelated streams, with labels of their own from `first_label` on."""
        tasks: tuple[ContinualTask, ...] = ()
        for stream, features in self.unrelated:
            arranged = arrange(stream, features, seed, self.images_per_class)
            tasks += renumber(arranged, first_label)
            first_label = 1 + max(int(task.label_K.max()) for task in tasks)
        return tasks


def run_benchmark(plan: Plan, results: BenchmarkResults, path: Path | None) -> BenchmarkResults:
    """Add the runs that `results` lacks, writing the file after each."""
    for seed in plan.seeds:
        missing = [name for name in plan.methods if not results.has(name, seed)]
        if not missing:
            continue
        tasks = plan.tasks(seed)
        unrelated = plan.unrelated_tasks(seed, 1 + max(int(task.label_K.max()) for task in tasks))
        workshop = Workshop.open(plan.backbone, plan.ranpac_width)
        for name in missing:
            entry = METHODS[name]
            method = entry.make(workshop, seed)
            run = run_method(method, tasks, told_task=entry.told_task, every_step=plan.steps == "all")
            if unrelated:
                found = ask_again(method, tasks, unrelated, told_task=entry.told_task)
                run = run.model_copy(update={"unrelated": found})
            if plan.leave_out and not entry.told_task:
                rejection = leave_tasks_out(partial(entry.make, workshop, seed), tasks)
                run = run.model_copy(update={"rejection": rejection})
            results = results.with_run(name, seed, run)
            if path is not None:
                results.write(path)
            plan.done(name, seed, run)
    return results


def run_method(
    method: Method, tasks: Sequence[ContinualTask], *, told_task: bool = False, every_step: bool = True
) -> RunResult:
    """Learn the tasks in order and measure after each, or only after the last."""
    steps, learn_s, settle_s = [], [], 0.0
    for b, task in enumerate(tasks):
        saved_s = method.saved_s
        learn_s.append(_timed(partial(method.learn, task))[1])
        learn_s[-1] += method.saved_s - saved_s
        if every_step or b == len(tasks) - 1:
            settle_s = _timed(lambda: method.predict(tasks[0].test_cls_UD[:1]))[1]
            measured = _measure(method, tasks[: b + 1], told_task, with_sets=b == len(tasks) - 1)
            steps.append(measured.step)
    scores = None
    if every_step:
        matrix = [step.accuracy_by_task for step in steps]
        scores = summarise_stream([step.accuracy for step in steps], matrix)
    return RunResult(
        tasks=tuple(task.name for task in tasks),
        steps=tuple(steps),
        average_accuracy=scores.average_accuracy if scores else None,
        last_accuracy=steps[-1].accuracy,
        forgetting=scores.forgetting if scores else None,
        backward_transfer=scores.backward_transfer if scores else None,
        learn_s_by_task=tuple(learn_s),
        settle_s=settle_s,
        answer_s=measured.seconds,
        num_pictures=sum(len(task.test_label_U) for task in tasks),
        size_bytes=method.size_bytes,
        reliability=measured.reliability,
        coverage=measured.coverage,
    )


def ask_again(
    method: Method, tasks: Sequence[ContinualTask], unrelated: Sequence[ContinualTask], *, told_task: bool
) -> UnrelatedResult:
    """The accuracy on the tasks that a method knows after it has learnt unrelated ones."""
    for task in unrelated:
        method.learn(task)
    step = _measure(method, tasks, told_task).step
    return UnrelatedResult(
        num_tasks=len(unrelated), accuracy=step.accuracy, selection_accuracy=step.selection_accuracy
    )


@dataclass(frozen=True, slots=True)
class _Measured:
    step: StepResult
    seconds: float
    reliability: tuple[tuple[int, float, float], ...] | None
    coverage: tuple[CoverageResult, ...] | None


def _measure(
    method: Method, tasks: Sequence[ContinualTask], told_task: bool, with_sets: bool = False
) -> _Measured:
    cls_ND = torch.cat([task.test_cls_UD for task in tasks])
    label_N = torch.cat([task.test_label_U for task in tasks])
    sizes = [len(task.test_label_U) for task in tasks]
    task_N = torch.repeat_interleave(torch.arange(len(tasks)), torch.tensor(sizes))

    def predict_given() -> Predictions:
        return Predictions.join([method.predict_within(task.test_cls_UD, j) for j, task in enumerate(tasks)])

    given, given_s = _timed(predict_given)
    chosen, chosen_s = (given, given_s) if told_task else _timed(lambda: method.predict(cls_ND))
    right_N = chosen.label_N == label_N
    overall = measure_calibration(chosen, label_N)
    by_task = [
        one
        for j in range(len(tasks))
        if (one := measure_calibration(_rows(chosen, task_N == j), label_N[task_N == j])) is not None
    ]
    step = StepResult(
        num_tasks=len(tasks),
        num_classes=len(label_N.unique()),
        accuracy=share(right_N),
        selection_accuracy=share(chosen.task_N == task_N),
        accuracy_given_task=share(given.label_N == label_N),
        accuracy_by_task=tuple(share(one) for one in right_N.split(sizes)),
        ece=overall.ece if overall else None,
        brier=overall.brier if overall else None,
        nll=overall.nll if overall else None,
        worst_task_ece=max((one.ece for one in by_task), default=None),
        worst_task_brier=max((one.brier for one in by_task), default=None),
        worst_task_nll=max((one.nll for one in by_task), default=None),
    )
    bins = coverage = None
    if chosen.confidence_N is not None:
        bins = tuple(reliability(chosen.confidence_N, right_N))
    if with_sets and isinstance(method, CautiousMethod) and not told_task:
        coverage = measure_coverage(method, cls_ND, label_N, chosen)
    return _Measured(step, chosen_s, bins, coverage)


def _rows(predictions: Predictions, rows_N: Tensor) -> Predictions:
    def take(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[rows_N]

    return Predictions(
        predictions.task_N[rows_N],
        predictions.label_N[rows_N],
        take(predictions.confidence_N),
        take(predictions.prob_NL),
    )


def _timed(work: Callable[[], Result]) -> tuple[Result, float]:
    started = time.monotonic()
    result = work()
    return result, time.monotonic() - started
