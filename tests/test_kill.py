"""Promise 4: kill the process at any moment, and every acknowledged registration is there afterwards."""

import hashlib
import itertools
import random
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from serving import running_server

from model_store.publishing import Publisher
from model_store.store import ModelStore

MakeModule = Callable[..., bytes]


def kill_during_changes(store: ModelStore, modules: dict[str, bytes], delay_s: float, log: Path) -> int:
    """Register and remove without pause, kill -9 after `delay_s`, open the store again.

    The store must hold exactly what was acknowledged, or that and the one change under way. Returns how
    many changes were acknowledged.
    """
    digests = {task: hashlib.sha256(data).hexdigest() for task, data in modules.items()}
    acknowledged = dict(store.require_head().tasks)
    num_acknowledged = 0
    with running_server(store.url, log, store_poll_s=0) as server:
        killer = threading.Timer(delay_s, server.process.kill)
        killer.start()
        with httpx.Client(base_url=server.url, timeout=30.0) as client:
            for task in itertools.cycle(modules):
                under_way = {name: sha256 for name, sha256 in acknowledged.items() if name != task}
                if task not in acknowledged:
                    under_way[task] = digests[task]
                try:
                    if task in acknowledged:
                        response = client.delete(f"/tasks/{task}")
                    else:
                        response = client.post("/tasks", content=modules[task], params={"force": True})
                except httpx.TransportError:
                    break
                assert response.is_success, response.text
                acknowledged = under_way
                num_acknowledged += 1
        killer.join()
    active = Publisher(ModelStore(store.url)).active  # reads and checks every file again
    assert dict(active.revision.tasks) in (acknowledged, under_way)
    return num_acknowledged


def _run(store: ModelStore, make_module: MakeModule, tmp_path: Path, num_kills: int) -> None:
    modules = {f"task{i}": make_module(f"task{i}", seed=i) for i in range(4)}
    moments = random.Random(7)
    acknowledged = [
        kill_during_changes(store, modules, moments.uniform(0.05, 1.5), tmp_path / "log")
        for _ in range(num_kills)
    ]
    print(f"{num_kills} kills, acknowledged before each: {acknowledged}")
    assert sum(acknowledged) > 0


def test_acknowledged_registrations_survive_kill_9(
    tiny_store: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    _run(tiny_store, make_module, tmp_path, num_kills=2)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_acknowledged_registrations_survive_twenty_kills(
    tiny_store: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    _run(tiny_store, make_module, tmp_path, num_kills=20)
