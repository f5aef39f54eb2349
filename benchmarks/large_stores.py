"""Stores of ten thousand and a hundred thousand tasks: publishing, starting a replica, memory, answers.

Ten thousand tasks are moved copies of the demo's ten-class task (benchmarks/many_tasks.py), for the default
ViT-B/16. A hundred thousand such files would take 80 GB; they are for a ViT-Tiny, whose vectors are a
quarter as long, with tasks of as many classes. Every module file lies in the store, every registration is a
POST to a real server on it, and a replica is a real server that starts from the store alone.

TOSCA_BENCH_STORES (where the stores are built and kept for a further run; a temporary folder otherwise),
TOSCA_BENCH_LARGE (clip:10000,tiny:100000), TOSCA_BENCH_PUBLISHED (20).
"""

import hashlib
import json
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import httpx
import torch

from benchmarks.machine import machine, resident_bytes
from benchmarks.many_tasks import moved_file, task_distance
from benchmarks.serving import TINY
from model_store.backbone import BackboneManifest
from model_store.backbone_sources import from_timm
from model_store.module_file import read_module
from model_store.publishing import Publisher
from model_store.store import ModelStore, with_task
from training.trainer import train_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import running_server
from synthetic import make_features

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "large_stores.json"
CASES = [
    (one.split(":")[0], int(one.split(":")[1]))
    for one in os.environ.get("TOSCA_BENCH_LARGE", "clip:10000,tiny:100000").split(",")
]
PUBLISHED = int(os.environ.get("TOSCA_BENCH_PUBLISHED", "20"))
CLASSES = 10
MODULE_MEMORY_BYTES = 2 * 2**30
ASKED_TASKS = 500
T = TypeVar("T")


def main() -> None:
    result: dict[str, Any] = {"machine": machine(), "classes_a_task": CLASSES, "stores": []}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(os.environ.get("TOSCA_BENCH_STORES", temporary))
        for kind, num_tasks in CASES:
            path = folder / f"{kind}-{num_tasks}"
            if not path.exists():
                build(kind, num_tasks, path)
            one = measure(path)
            print(json.dumps(one), flush=True)
            result["stores"].append(one)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")


# -- stores ------------------------------------------------------------------------------------------


class Maker:
    """Makes module files of many tasks for one backbone, from one that was trained."""

    def __init__(self, backbone: BackboneManifest, template: bytes, distance: float) -> None:
        self.backbone = backbone
        self._module = read_module(template).module
        self._distance = distance

    @classmethod
    def of_store(cls, store: ModelStore) -> "Maker":
        """From the first task of a store, moved as far as the first two lie apart."""
        head = store.require_head()
        one, other = (store.module(sha256) for sha256 in list(head.tasks.values())[:2])
        distance = task_distance(read_module(one).module, read_module(other).module)
        return cls(store.backbone_manifest(head.backbone_fingerprint), one, distance)

    def file(self, number: int) -> tuple[str, bytes]:
        task = f"task{number:06}"
        return task, moved_file(self._module, task, self._distance, number, self.backbone)


def seed_store(kind: str, folder: Path) -> ModelStore:
    """A store with the backbone and two tasks: the demo's, or made-up ones for an untrained ViT-Tiny."""
    if kind == "clip":
        shutil.copytree(DEMO / "store", folder)
        return ModelStore(folder)
    artefact = from_timm(TINY, pretrained=False)
    width = artefact.manifest.feature_dim
    store = ModelStore(folder)
    store.publish_first(store.put_backbone(artefact))
    for seed, task in enumerate(("birds", "cars")):
        features = make_features(task, seed=seed, num_classes=CLASSES, feature_dim=width)
        sha256 = store.put_module(train_task(task, features, artefact.manifest, seed=seed).data)
        store.publish(with_task(task, sha256), f"add {task}")
    return store


_maker: list[Maker] = []  # of a process that makes files


def build(kind: str, num_tasks: int, folder: Path) -> None:
    """A store of many tasks. Files are written as the store would, but without waiting for the disk."""
    store = seed_store(kind, folder)
    maker = Maker.of_store(store)
    context = get_context("fork")
    _maker[:] = [maker]
    with ProcessPoolExecutor(mp_context=context) as pool:
        tasks = dict(pool.map(partial(write_file, folder / "modules"), range(num_tasks), chunksize=50))
    store.publish(lambda _: tasks, f"{num_tasks} tasks")


def write_file(folder: Path, number: int) -> tuple[str, str]:
    torch.set_num_threads(1)
    task, data = _maker[0].file(number)
    sha256 = hashlib.sha256(data).hexdigest()
    (folder / f"{sha256}.safetensors").write_bytes(data)
    return task, sha256


# -- what is measured --------------------------------------------------------------------------------


def measure(folder: Path) -> dict[str, Any]:
    store = ModelStore(folder)
    head = store.require_head()
    maker = Maker.of_store(store)
    result: dict[str, Any] = {
        "backbone": maker.backbone.architecture,
        "tasks": len(head.tasks),
        "module_file_bytes": module_file_bytes(store),
    }
    if head.epoch is None:
        result["first_start_s"], publisher = timed(lambda: Publisher(store))
        result["begin_epoch_s"], _ = timed(publisher.begin_epoch)
        del publisher
    with tempfile.TemporaryDirectory() as temporary:
        log = Path(temporary) / "log"
        settings = {"module_memory_bytes": MODULE_MEMORY_BYTES, "cls_cache_bytes": 0, "log_level": "warning"}
        started = time.perf_counter()
        with running_server(str(folder), log, **settings) as server:
            result["replica_start_s"] = round(time.perf_counter() - started, 2)
            result["resident_bytes_started"] = resident_bytes(server.process.pid)
            with httpx.Client(base_url=server.url, timeout=600.0) as client:
                result["registrations"] = register(client, maker)
                result["answers"] = ask_known(client, store)
                fill_module_memory(client, store)
                result["module_memory"] = module_memory(client)
            result["resident_bytes_after"] = resident_bytes(server.process.pid)
    head = store.require_head()
    result["revision_bytes"] = (folder / "revisions" / f"{head.number:012}.json").stat().st_size
    return result


def module_file_bytes(store: ModelStore) -> int:
    head = store.require_head()
    return round(statistics.mean(len(store.module(one)) for one in islice(head.tasks.values(), 50)))


def timed(work: Callable[[], T]) -> tuple[float, T]:
    started = time.perf_counter()
    done = work()
    return round(time.perf_counter() - started, 2), done


def register(client: httpx.Client, maker: Maker) -> dict[str, float]:
    """New tasks, one after another, each from POST to the answer that it serves."""
    took = []
    numbers = random.Random(time.time_ns())  # a store that is kept has those of earlier runs
    for _ in range(PUBLISHED):
        _, data = maker.file(10**6 + numbers.randrange(10**8))
        began = time.perf_counter()
        response = client.post("/tasks", content=data, params={"force": True})
        took.append(time.perf_counter() - began)
        assert response.status_code == 201, response.text
    return {"count": len(took), "median_s": round(statistics.median(took), 3), "max_s": round(max(took), 3)}


def ask_known(client: httpx.Client, store: ModelStore) -> dict[str, float]:
    """CLS vectors of ASKED_TASKS different tasks, each asked twice in a row: the first time its module is
    read from the store, the second time it is in memory."""
    head = store.require_head()
    first, second, num_right = [], [], 0
    for task in random.Random(0).sample(sorted(head.tasks), min(ASKED_TASKS, len(head.tasks))):
        module = read_module(store.module(head.tasks[task])).module
        vector = module.calibration.cls_MD[0].float().tolist()
        body = {"cls": [vector], "backbone_fingerprint": head.backbone_fingerprint}
        for took in (first, second):
            began = time.perf_counter()
            answer = client.post("/predict", json=body).raise_for_status().json()["predictions"][0]
            took.append(time.perf_counter() - began)
        num_right += answer["task"] == task
    return {
        "tasks": len(first),
        "right_share": round(num_right / len(first), 4),
        "first_median_ms": round(1e3 * statistics.median(first), 1),
        "second_median_ms": round(1e3 * statistics.median(second), 1),
    }


def fill_module_memory(client: httpx.Client, store: ModelStore) -> None:
    """Ask tasks by name, a different one each time, until modules have to make room for others."""
    head = store.require_head()
    width = store.backbone_manifest(head.backbone_fingerprint).feature_dim
    body = {"cls": [[0.5] * width], "backbone_fingerprint": head.backbone_fingerprint, "top_k": 1}

    def ask(task: str) -> None:
        client.post("/predict", json={**body, "task": task}).raise_for_status()

    tasks = iter(random.Random(1).sample(sorted(head.tasks), len(head.tasks)))
    with ThreadPoolExecutor(4) as pool:
        while some := list(islice(tasks, 500)):
            list(pool.map(ask, some))
            if module_memory(client)["deferred_modules_bytes"] > 0.98 * MODULE_MEMORY_BYTES:
                return


def module_memory(client: httpx.Client) -> dict[str, int]:
    """What the server says of the modules it holds."""
    metrics = {}
    for line in client.get("/metrics").text.splitlines():
        name, _, value = line.partition(" ")
        if name.startswith("tosca_deferred_modules"):
            metrics[name.removeprefix("tosca_")] = int(float(value))
    return metrics


if __name__ == "__main__":
    main()
