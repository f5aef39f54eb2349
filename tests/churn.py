"""The oracle under churn: clients ask while tasks come and go, and every answer is computed again offline."""

import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import torch

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.decoding import ImageLimits
from model_store.preprocess import load_pixels
from model_store.publishing import Publisher
from model_store.replay import GivenAnswer, Replayed, differences
from model_store.store import ModelStore
from service.settings import DEFAULT_ABSTAIN_LEVEL


@dataclass
class ChurnResult:
    """What clients got, and what was done meanwhile."""

    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # (picture, prediction)
    failures: list[str] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    num_registered: int = 0
    num_removed: int = 0
    registration_s: list[float] = field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        revisions = {answer["receipt"]["revision"] for _, answer in self.answers}
        return {
            "answers": len(self.answers),
            "failures": len(self.failures),
            "registered": self.num_registered,
            "removed": self.num_removed,
            "revisions_seen": len(revisions),
            "latency_median_s": round(statistics.median(self.latencies_s), 4) if self.latencies_s else None,
            "registration_median_s": round(statistics.median(self.registration_s), 4)
            if self.registration_s
            else None,
        }


def churn(
    url: str,
    pictures: Sequence[bytes],
    modules: dict[str, bytes],
    *,
    num_clients: int,
    num_changes: int,
    duration_s: float,
) -> ChurnResult:
    """Ask without pause from `num_clients` threads while `num_changes` registrations and removals happen,
    spread over at least `duration_s`. `modules` are added and removed in turn."""
    result = ChurnResult()
    stop = threading.Event()
    lock = threading.Lock()

    def ask(offset: int) -> None:
        with httpx.Client(base_url=url, timeout=120.0) as client:
            i = offset
            while not stop.is_set():
                index = i % len(pictures)
                started = time.monotonic()
                try:
                    response = client.post("/predict", content=pictures[index], params={"top_k": 1})
                except httpx.HTTPError as error:
                    with lock:
                        result.failures.append(repr(error))
                    continue
                with lock:
                    result.latencies_s.append(time.monotonic() - started)
                    if response.is_success:
                        result.answers.append((index, response.json()["predictions"][0]))
                    else:
                        result.failures.append(f"{response.status_code} {response.text}")
                i += num_clients

    clients = [threading.Thread(target=ask, args=(i,)) for i in range(num_clients)]
    for one in clients:
        one.start()
    try:
        _change(url, modules, num_changes, duration_s, result)
    finally:
        stop.set()
        for one in clients:
            one.join()
    return result


def _change(
    url: str, modules: dict[str, bytes], num_changes: int, duration_s: float, result: ChurnResult
) -> None:
    started = time.monotonic()
    names = list(modules)
    active: set[str] = set()
    with httpx.Client(base_url=url, timeout=120.0) as client:
        for i in range(num_changes):
            time.sleep(max(0.0, started + duration_s * i / num_changes - time.monotonic()))
            name = names[(i // 2) % len(names)] if i % 4 != 3 else names[((i - 2) // 2) % len(names)]
            began = time.monotonic()
            if name in active:
                response = client.delete(f"/tasks/{name}")
                active.discard(name)
                result.num_removed += 1
            else:
                response = client.post("/tasks", content=modules[name], params={"force": True})
                active.add(name)
                result.num_registered += 1
                result.registration_s.append(time.monotonic() - began)
            if not response.is_success:
                result.failures.append(f"change {name}: {response.status_code} {response.text}")
    time.sleep(max(0.0, started + duration_s - time.monotonic()))


def find_mismatches(
    store: ModelStore,
    backbone: Backbone,
    pictures: Sequence[bytes],
    answers: Sequence[tuple[int, dict[str, Any]]],
) -> list[str]:
    """Answers (picture, prediction) that differ from the offline result for the revision in their receipt.

    Revisions with the same tasks share an offline bank, which is built from the store's files alone.
    """
    cls = [
        backbone.embed(load_pixels(one, backbone.preprocessing, ImageLimits()).unsqueeze(0))
        for one in pictures
    ]
    given_by_revision: dict[int, list[tuple[int, GivenAnswer]]] = {}
    for index, answer in answers:
        given = GivenAnswer.model_validate(answer)
        given_by_revision.setdefault(given.receipt.revision, []).append((index, given))
    mismatches = []
    bank_of_set: dict[frozenset[tuple[str, str]], ModuleBank] = {}
    for revision, asked in sorted(given_by_revision.items()):
        tasks = frozenset(store.revision(revision).tasks.items())
        if tasks not in bank_of_set:
            bank_of_set[tasks] = Publisher(store, revision=revision).active.bank
        bank = bank_of_set[tasks]
        ordered = sorted({index for index, _ in asked})
        question = {"top_k": 2, "abstain_level": DEFAULT_ABSTAIN_LEVEL}
        offline = bank.answer(torch.cat([cls[i] for i in ordered]), **question)
        replayed = (Replayed.of(one, bank, **question) for one in offline)
        expected = dict(zip(ordered, replayed, strict=True))
        for index, given in asked:
            found = differences(given, expected[index])
            mismatches += [f"picture {index}, revision {revision}: {one}" for one in found]
    return mismatches
