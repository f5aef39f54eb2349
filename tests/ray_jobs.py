"""A program that runs training jobs on Ray which fail, end their process once or always, or succeed.

Prints what became of each as JSON. Example: PYTHONPATH=tests python tests/ray_jobs.py FOLDER
"""

import json
import os
import sys
from pathlib import Path

import numpy as np

from model_store.backbone import BackboneManifest
from model_store.errors import InvalidDataset
from model_store.ray_session import ray_session
from training.plans import TaskPlan
from training.ray_workers import RayWorkers
from training.workers import FinishedJob, TrainingJob


def run(job: TrainingJob) -> FinishedJob:
    task, was_here = job.plan.task, job.report_folder / job.plan.task
    if task == "wrong":
        raise InvalidDataset("no such class")
    if task == "dies" or (task == "dies-once" and not was_here.exists()):
        was_here.touch()
        os._exit(1)
    manifest: BackboneManifest = job.backbone
    return FinishedJob(manifest, task.encode(), was_here, 0.0)  # type: ignore[arg-type]


def main() -> None:
    empty = np.zeros((0, 1), np.float32), np.zeros(0, np.int64)
    outcomes = {}
    with ray_session():
        workers = RayWorkers(2, run)
        for task in ("fine", "wrong", "dies", "dies-once"):
            plan, none = TaskPlan(task, ""), None
            job = TrainingJob(plan, none, Path(sys.argv[1]), "", (), *empty, (), "", (), 0)  # type: ignore[arg-type]
            try:
                outcomes[task] = workers.result(job, workers.submit(job)).data.decode()
            except Exception as error:
                outcomes[task] = f"{type(error).__name__}: {error}"
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
