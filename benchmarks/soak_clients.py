"""Who keeps a soaked server busy: clients with pictures, one who changes tasks, one who takes samples."""

import hashlib
import random
import threading
import time
from typing import Any

import httpx

from benchmarks.machine import resident_bytes
from benchmarks.soak_record import Acknowledged, Action, Record

SECONDS_BETWEEN_CHANGES = 1.5
SECONDS_BETWEEN_SAMPLES = 5.0
SECONDS_BETWEEN_ATTEMPTS = 0.2
_REACH_BACK = 20  # revisions that a roll-back may go back


def ask(url: str, pictures: list[bytes], seed: int, record: Record, stop: threading.Event) -> None:
    """Ask without pause; whatever is not a whole answer that went through the backbone is a failure."""
    choice = random.Random(seed)
    with httpx.Client(base_url=url, timeout=60.0) as client:
        while not stop.is_set():
            index = choice.randrange(len(pictures))
            # Bytes behind the picture's end: the same pixels, and a picture that no cache has seen.
            content = pictures[index] + choice.randbytes(8)
            life, began = record.life, time.monotonic()
            try:
                response = client.post("/predict", content=content, params={"top_k": 1, "timings": True})
            except httpx.TransportError as error:
                record.no_answer("prediction", life, error)
                stop.wait(SECONDS_BETWEEN_ATTEMPTS)
                continue
            if not response.is_success:
                record.fail(f"prediction: {response.status_code} {response.text}")
                continue
            body = response.json()
            with record.lock:
                record.latencies_s.append(time.monotonic() - began)
                record.answers.append((index, body["predictions"][0]))
                if body["timings"][0]["batch_size"] == 0:
                    record.fail("prediction: answered without a pass of the backbone")


def change(url: str, modules: dict[tuple[str, int], bytes], record: Record, stop: threading.Event) -> None:
    """Register, replace, remove and roll back in turn by chance; the other writer may be faster (404)."""
    choice = random.Random(99)
    names = {name for name, _ in modules}
    with httpx.Client(base_url=url, timeout=120.0) as client:
        while not stop.wait(SECONDS_BETWEEN_CHANGES):
            life, began = record.life, time.monotonic()
            try:
                listed = client.get("/tasks").raise_for_status().json()
                action, path, content, then = _choose(choice, listed, names, modules)
                with record.lock:
                    record.change_under_way = action
                    record.is_changing.set()
                method = "DELETE" if action == "remove" else "POST"
                response = client.request(method, path, content=content)
            except httpx.TransportError as error:
                record.no_answer("change", life, error)
                continue
            finally:
                with record.lock:
                    record.change_under_way = None
                    record.is_changing.clear()
            with record.lock:
                if response.is_success:
                    record.changes[action] += 1
                    record.changes_s.append(time.monotonic() - began)
                    record.acknowledged.append(Acknowledged(response.json()["revision"], action, **then))
                elif response.status_code == 404:
                    record.changes[f"{action}: the other writer was first"] += 1
                else:
                    record.fail(f"{action}: {response.status_code} {response.text}")


def _choose(
    choice: random.Random, listed: dict[str, Any], names: set[str], modules: dict[tuple[str, int], bytes]
) -> tuple[Action, str, bytes, dict[str, Any]]:
    """A change by chance: what, where, with which body, and what has to be true once it is acknowledged."""
    active = sorted({one["task"] for one in listed["tasks"]} & names)
    drawn = choice.choice(("register", "register", "remove", "roll back"))
    if drawn == "register":
        task, version = choice.choice(sorted(modules))
        data = modules[task, version]
        then = {"task": task, "module_sha256": hashlib.sha256(data).hexdigest()}
        return "replace" if task in active else "register", "/tasks?force=true", data, then
    if drawn == "remove" and active:
        task = choice.choice(active)
        return "remove", f"/tasks/{task}", b"", {"task": task}
    number = choice.randint(max(3, listed["revision"] - _REACH_BACK), listed["revision"])
    return "roll back", f"/revisions/{number}/rollback", b"", {"back_to": number}


def sample(url: str, record: Record, stop: threading.Event) -> None:
    """Memory of the server, and how long its health check takes."""
    with httpx.Client(base_url=url, timeout=10.0) as client:
        while not stop.wait(SECONDS_BETWEEN_SAMPLES):
            life, began = record.life, time.monotonic()
            if life is None:
                continue
            try:
                response = client.get("/health/live")
                resident_mb = round(resident_bytes(life.pid) / 2**20, 1)
            except (httpx.TransportError, FileNotFoundError) as error:
                record.no_answer("health check", life, error)
                continue
            with record.lock:
                record.health_s.append(time.monotonic() - began)
                life.rss_mb.append(resident_mb)
                if not response.is_success:
                    record.fail(f"liveness: {response.status_code}")
