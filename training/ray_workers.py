"""Training on a Ray cluster: what `workers` does with processes of this machine, with those of many."""

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import ray
import ray.exceptions
import torch

from training.ray_embedding import CPUS_OF_A_WORKER
from training.workers import FinishedJob, TrainingJob, run_job

_ATTEMPTS_AFTER_LOSS = 1


class RayWorkers:
    """To be used inside `ray_session`. A job whose process or node is lost is run once more elsewhere."""

    def __init__(self, num_workers: int, run: Callable[[TrainingJob], FinishedJob] = run_job) -> None:
        self.num_workers = num_workers
        self._run: Any = ray.remote(_with_one_thread).options(
            num_cpus=CPUS_OF_A_WORKER, max_retries=_ATTEMPTS_AFTER_LOSS
        )
        self._job = run

    def submit(self, job: TrainingJob) -> Future[FinishedJob]:
        future: Future[FinishedJob] = self._run.remote(self._job, job).future()
        return future

    def result(self, job: TrainingJob, future: Future[FinishedJob]) -> FinishedJob:
        """Wait for a job.

        Raises what training raised, and BrokenProcessPool when every process it ran in has ended.
        """
        try:
            return future.result()
        except ray.exceptions.RayTaskError as error:
            raise error.cause from error
        except ray.exceptions.WorkerCrashedError as error:
            raise BrokenProcessPool(f"training of {job.plan.task} ended its process") from error


def _with_one_thread(run: Callable[[TrainingJob], FinishedJob], job: TrainingJob) -> FinishedJob:
    torch.set_num_threads(1)
    return run(job)
