"""Training in processes of their own, one thread each.

Fitting a task is many small products that gain nothing from a second thread, so tasks are spread over the
cores instead. What crosses the border between processes is arrays and bytes, never shared memory, which
containers have little of.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import torch
from numpy.typing import NDArray

from model_store.backbone import BackboneManifest
from model_store.errors import ToscaError
from model_store.manifest import ModuleManifest
from training.features import LabelledFeatures
from training.pictures import Split
from training.plans import TaskPlan
from training.trainer import train_task


@dataclass(frozen=True, slots=True)
class TrainingJob:
    """A task to train, fit to be sent to another process."""

    plan: TaskPlan
    backbone: BackboneManifest
    report_folder: Path
    name: str
    labels: tuple[str, ...]
    cls_ND: NDArray[np.float32]
    label_N: NDArray[np.int64]
    splits: tuple[Split, ...]
    data_sha256: str
    skipped: tuple[str, ...]
    num_computed: int

    @classmethod
    def of(
        cls, plan: TaskPlan, features: LabelledFeatures, backbone: BackboneManifest, report_folder: Path
    ) -> Self:
        return cls(
            plan,
            backbone,
            report_folder,
            features.name,
            features.labels,
            features.cls_ND.numpy(),
            features.label_N.numpy(),
            features.splits,
            features.data_sha256,
            features.skipped,
            features.num_computed,
        )

    @property
    def features(self) -> LabelledFeatures:
        return LabelledFeatures(
            name=self.name,
            labels=self.labels,
            cls_ND=torch.from_numpy(self.cls_ND.copy()),
            label_N=torch.from_numpy(self.label_N.copy()),
            splits=self.splits,
            data_sha256=self.data_sha256,
            skipped=self.skipped,
            num_computed=self.num_computed,
        )


@dataclass(frozen=True, slots=True)
class FinishedJob:
    """A module file, its report or why there is none, and how long both took."""

    manifest: ModuleManifest
    data: bytes
    report: Path | str
    seconds: float


def run_job(job: TrainingJob) -> FinishedJob:
    """Train a task and write its report. Raises InvalidDataset."""
    from training.report import write_report  # matplotlib takes a second to import

    started = time.monotonic()
    plan = job.plan
    trained = train_task(
        plan.task,
        job.features,
        job.backbone,
        recipe=plan.recipe,
        flow=plan.flow,
        seed=plan.seed,
        label_space=plan.label_space,
        abstain_level=plan.abstain_level,
    )
    report: Path | str
    try:
        report = write_report(trained, job.report_folder)
    except ToscaError as error:  # the module is none the worse for it
        report = str(error)
    return FinishedJob(trained.manifest, trained.data, report, time.monotonic() - started)


class TrainingPool(Protocol):
    """Where jobs are run."""

    num_workers: int

    def submit(self, job: TrainingJob) -> Future[FinishedJob]: ...

    def result(self, job: TrainingJob, future: Future[FinishedJob]) -> FinishedJob:
        """Wait for a job. Raises what training raised, and BrokenProcessPool when it ended its process."""


class Workers:
    """A pool of training processes. A process that dies takes no other task with it."""

    def __init__(self, num_workers: int, run: Callable[[TrainingJob], FinishedJob] = run_job) -> None:
        """`run` is a function of a module, as processes need it."""
        self.num_workers = num_workers
        self._run = run
        self._pool = _pool(num_workers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(wait=error is None, cancel_futures=True)

    def submit(self, job: TrainingJob) -> Future[FinishedJob]:
        try:
            return self._pool.submit(self._run, job)
        except BrokenProcessPool:  # a task before this one killed its process
            self._pool = _pool(self.num_workers)
            return self._pool.submit(self._run, job)

    def result(self, job: TrainingJob, future: Future[FinishedJob]) -> FinishedJob:
        """Wait for a job. One that was lost with another's process is run again, in one of its own.

        Raises what training raised, and BrokenProcessPool when the job itself ends its process.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            with _pool(1) as alone:
                return alone.submit(self._run, job).result()


def _pool(num_workers: int) -> ProcessPoolExecutor:
    # A fork of this process would inherit the locks of torch's and the decoder's threads, a spawn would
    # import torch once more for every worker; the fork server does neither.
    methods = multiprocessing.get_all_start_methods()
    context = multiprocessing.get_context("forkserver" if "forkserver" in methods else "spawn")
    if "forkserver" in methods:
        context.set_forkserver_preload(["training.workers", "training.report"])
    return ProcessPoolExecutor(num_workers, mp_context=context, initializer=_prepare_worker)


def _prepare_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker has a parent"
    parent.join()
    os._exit(1)
