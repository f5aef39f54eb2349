"""The demo while its tasks change: what the benchmarks of that begin with, one change after another, and the
judgment of all that was answered and acknowledged.
"""

import contextlib
import hashlib
import itertools
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from benchmarks.soak_record import Acknowledged, Record
from model_store.backbone import Backbone
from model_store.backbone_loading import load_backbone
from model_store.store import ModelStore
from training.feature_cache import FeatureCache
from training.features import extract_features
from training.sources import open_source
from training.trainer import train_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from churn import find_mismatches

DEMO = Path(".tosca")
NAMES = ("digits-1", "digits-2", "textiles-1", "textiles-2")
VERSIONS = 2
SECONDS_BETWEEN_CHANGES = 0.5  # at random, twice as many at most
SECONDS_AFTER_A_FAULT = 0.2
MAX_FAULTS = 100
END_TIMEOUT_S = 120.0
Modules = Mapping[tuple[str, int], bytes]  # by task and version


@dataclass(frozen=True)
class Demo:
    """The demo's backbone, its test pictures, and modules for tasks that come and go."""

    backbone: Backbone
    pictures: list[bytes]
    modules: Modules

    @classmethod
    def load(cls) -> "Demo":
        backbone = load_backbone(ModelStore(DEMO / "store"))
        pictures = [path.read_bytes() for path in sorted((DEMO / "demo").glob("*/test/*/*"))]
        return cls(backbone, pictures, train_variants(backbone))


def train_variants(backbone: Backbone) -> Modules:
    """Two versions of four tasks: the demo's, on shifted features, under other names."""
    cache = FeatureCache(DEMO / "cache", backbone.fingerprint, backbone.variant, backbone.feature_dim)
    modules = {}
    for i, name in enumerate(NAMES):
        source = open_source(DEMO / "demo" / name.split("-")[0])
        features = extract_features(source, backbone, cache, show_progress=False)
        for version in range(VERSIONS):
            generator = torch.Generator().manual_seed(10 * i + version)
            shift = 0.3 * torch.randn(features.cls_ND.shape, generator=generator)
            shifted = replace(features, name=name, cls_ND=features.cls_ND + shift)
            modules[name, version] = train_task(name, shifted, backbone.manifest, seed=version).data
    return modules


# -- while it runs -----------------------------------------------------------------------------------


@contextlib.contextmanager
def at_work(workers: Iterable[Callable[[threading.Event], None]]) -> Iterator[None]:
    """Each worker in a thread of its own while the block runs, until the event that it is given is set."""
    stop = threading.Event()
    threads = [threading.Thread(target=one, args=(stop,)) for one in workers]
    for one in threads:
        one.start()
    try:
        yield
    finally:
        stop.set()
        for one in threads:
            one.join(END_TIMEOUT_S)


@dataclass(frozen=True)
class Change:
    """An acknowledged change: which server was asked, how long it took, when the client had its answer."""

    by: int
    revision: int
    acknowledged_at: float
    took_s: float


def changes(urls: Sequence[str], modules: Modules, record: Record) -> Iterator[Change]:
    """Register each task in one version and then in the other, at a server drawn by chance; yields what was
    acknowledged, without end. RuntimeError after MAX_FAULTS."""
    choice = random.Random(13)
    names = sorted({name for name, _ in modules})
    num_faults = 0
    with contextlib.ExitStack() as stack:
        clients = [stack.enter_context(httpx.Client(base_url=url, timeout=120.0)) for url in urls]
        for i in itertools.count():
            time.sleep(choice.uniform(0.0, 2 * SECONDS_BETWEEN_CHANGES))
            task, version = names[i % len(names)], (i // len(names)) % VERSIONS
            data, by = modules[task, version], choice.randrange(len(clients))
            began = time.monotonic()
            try:
                # Forced: these tasks look alike on purpose, so the impact report would refuse them.
                response = clients[by].post("/tasks", params={"force": True}, content=data)
                told = response.raise_for_status().json()
            except httpx.HTTPError as error:
                record.fail(f"change: {error!r}")
                num_faults += 1
                if num_faults > MAX_FAULTS:
                    raise RuntimeError(f"{num_faults} changes failed, the last one: {error!r}") from error
                time.sleep(SECONDS_AFTER_A_FAULT)
                continue
            now = time.monotonic()
            action = "replace" if told["replaced_sha256"] else "register"
            with record.lock:
                record.changes[action] += 1
                sha256 = hashlib.sha256(data).hexdigest()
                record.acknowledged.append(Acknowledged(told["revision"], action, task, sha256))
            yield Change(by, told["revision"], now, now - began)


# -- afterwards --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Acknowledged changes that the store does not hold, and answers unlike the offline ones."""

    num_answers: int
    lost: list[str]
    mismatches: list[str]

    @property
    def figures(self) -> dict[str, int]:
        return {
            "acknowledged_changes_lost": len(self.lost),
            "replayed": self.num_answers,
            "mismatches": len(self.mismatches),
        }


def judge(demo: Demo, store: ModelStore, *records: Record) -> Verdict:
    """Look every acknowledged change up in the store, and compute every answer again offline."""
    acknowledged = [one for record in records for one in record.acknowledged]
    answers = [one for record in records for one in record.answers]
    print(f"replaying {len(answers)} answers offline …", flush=True)
    return Verdict(
        num_answers=len(answers),
        lost=[fault for one in acknowledged if (fault := one.fault(store))],
        mismatches=find_mismatches(store, demo.backbone, demo.pictures, answers),
    )


def quantiles(values: Sequence[float]) -> dict[str, Any]:
    ordered = sorted(values) or [float("nan")]
    return {
        "num": len(values),
        "p50": round(statistics.median(ordered), 4),
        "p99": round(ordered[int(0.99 * (len(ordered) - 1))], 4),
        "max": round(ordered[-1], 4),
    }
