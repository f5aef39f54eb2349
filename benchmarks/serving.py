"""This service against a plain FastAPI handler, LitServe, Ray Serve and BentoML: throughput and latency.

**The same for all**: pictures, weights, the engine and precision that tuning chose, threads, the bank, the
load, and the largest batch but for the plain handler, which runs a picture a pass. No server writes a line
for every request.

**Peers as their users write them** are the comparison. They run the whole timm model as torch exports it, one
pass at a time on all threads of a worker, read pictures with Pillow, large JPEGs reduced (`Image.draft`), and
resize with Pillow as timm does. This service runs its own graph, as many passes side by side as tuning found
best, and its own decoding: what it gains by them is part of what is compared. LitServe runs twice, with one
worker of all threads and a worker a thread, whose passes are side by side too.

**Peers with our engine** are handed this project's graph, streams and decoding, which their users do not
have: LitServe, again with one worker and with several. What is left between them and this service is HTTP,
queues and batching.

Servers run one after another in every round. Load comes from a second process, in closed loops of 1 and 64
clients and an open loop at 70 % of what both this service and the best ordinary peer can do. No picture
repeats, and this service's CLS cache is off, so every answer costs a pass. Before its load every server is
asked about the same pictures, and where this service is sure of one, the others must say the same.

Three limits are measured in one process without a server, each at its best batch: this project's pass alone,
as many side by side as tuning found best, and the ordinary export's pass, one at a time.

TOSCA_BENCH_SECONDS sets the seconds of a measurement (20; an open loop goes on for 300 pictures, because the
p99 of few is the slowest of them), TOSCA_BENCH_ROUNDS the rounds (3), and TOSCA_BENCH_SCENARIOS which
scenarios run, by the beginning of their names (ViT-B/16, ViT-Tiny).

Example: python -m benchmarks.serving
"""

import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.agreement import cosine_with_ours, decoded, share_of_same_answers
from benchmarks.decoding import large_jpeg, photographs_at_hand
from benchmarks.machine import machine
from benchmarks.peers.ordinary import ordinary_backbone, ordinary_export, ordinary_stack
from benchmarks.servers import (
    MAX_BATCH_SIZE,
    OURS,
    PEERS,
    SERVERS,
    WITH_OUR_ENGINE,
    Served,
    answers,
    load,
    running,
)
from model_store.backbone import Backbone, BackboneArtefact
from model_store.backbone_loading import load_backbone
from model_store.backbone_sources import from_timm
from model_store.measuring import Plan, time_side_by_side, tune
from model_store.parity import read_labelled
from model_store.preprocess import stack_pixels
from model_store.store import ModelStore
from training.trainer import train_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from synthetic import make_features

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "serving.json"
SECONDS = float(os.environ.get("TOSCA_BENCH_SECONDS", "20"))
WANTED = os.environ.get("TOSCA_BENCH_SCENARIOS", "")  # separated by semicolons; all
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "3"))
CLIENTS = (1, 64)
OPEN_LOOP_SHARE = 0.7
OPEN_LOOP_PICTURES = 300  # at least
TINY = "vit_tiny_patch16_224"
SMALL = "ViT-B/16, 256-pixel JPEGs"
LARGE = "ViT-B/16, 12-megapixel JPEGs"
TINY_SMALL = "ViT-Tiny, 256-pixel JPEGs"
BATCH_SIZES = (1, 2, 4, 8, 16)


@dataclass(frozen=True)
class Scenario:
    """A backbone and the pictures it is asked about."""

    name: str
    store: str
    pictures: Path


def main() -> None:
    about = machine()
    threads = os.cpu_count() or 1
    results = {}
    with tempfile.TemporaryDirectory() as temporary:
        for scenario in scenarios(Path(temporary)):
            results[scenario.name] = measure(scenario, threads, Path(temporary))
            print(scenario.name, json.dumps(results[scenario.name]["summary"]))
    document = {
        "machine": about,
        "seconds": SECONDS,
        "rounds": ROUNDS,
        "threads": threads,
        "max_batch_size": MAX_BATCH_SIZE,
        "scenarios": results,
    }
    RESULT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps({name: one["summary"] for name, one in results.items()}))


# -- what is measured --------------------------------------------------------------------------------


def scenarios(folder: Path) -> list[Scenario]:
    """ViT-B/16 with small and 12-megapixel JPEGs, and a ViT-Tiny, where what a server adds shows most."""
    wanted = [name for name in (SMALL, LARGE, TINY_SMALL) if name.startswith(tuple(WANTED.split(";")))]
    small, large = write_small(folder / "small"), folder / "large"
    large.mkdir()
    if LARGE in wanted:
        for i, photograph in enumerate(photographs_at_hand()):
            (large / f"{i:03d}.jpg").write_bytes(large_jpeg(photograph, seed=i))
    clip = str(DEMO / "store")
    pictures = {SMALL: small, LARGE: large, TINY_SMALL: small}
    stores = {name: tiny_store(folder / "store") if name == TINY_SMALL else clip for name in wanted}
    return [Scenario(name, stores[name], pictures[name]) for name in wanted]


def write_small(folder: Path) -> Path:
    """Photographs as JPEGs of 256 pixels."""
    folder.mkdir()
    for i, photograph in enumerate(photographs_at_hand()):
        photograph.thumbnail((256, 256), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        photograph.save(file, "JPEG", quality=90)
        (folder / f"{i:03d}.jpg").write_bytes(file.getvalue())
    return folder


def tiny_store(folder: Path) -> str:
    """An untrained ViT-Tiny at 224 pixels, tuned here, with two tasks."""
    artefact = from_timm(TINY, pretrained=False)
    store = ModelStore(folder)
    store.publish_first(store.put_backbone(artefact))
    pictures = read_labelled(
        {"textiles": DEMO / "demo" / "textiles" / "test"}, artefact.manifest.preprocessing, 16
    )
    tuned = tune(artefact, pictures, Plan(batch_sizes=(MAX_BATCH_SIZE,)))
    store.put_tuning(tuned.tuning, tuned.export)
    revision = store.require_head()
    for seed, task in enumerate(("birds", "cars")):
        features = make_features(task, seed=seed, feature_dim=artefact.manifest.feature_dim)
        sha256 = store.put_module(train_task(task, features, artefact.manifest, seed=seed).data)
        revision = store.publish(lambda head, t=task, s=sha256: {**head.tasks, t: s}, f"add {task}")
    assert len(revision.tasks) == 2, "both tasks are published"
    return str(folder)


def measure(scenario: Scenario, threads: int, folder: Path) -> dict[str, Any]:
    torch.set_num_threads(threads)
    store = ModelStore(scenario.store)
    alone = pass_alone(load_backbone(store, num_threads=threads, num_streams=1))
    side_by_side = pass_alone(load_backbone(store, num_threads=threads))
    served = export_ordinarily(scenario, str(alone["runtime"]), threads, folder)
    ordinary = pass_alone(load_ordinary(served), ordinary_stack)
    cosine = cosine_with_ours(served, load_ordinary(served), scenario.pictures)
    expected: list[dict[str, Any]] = []
    same_answers: dict[str, float] = {}
    closed: dict[str, dict[str, list[dict[str, float]]]] = {
        server: {str(clients): [] for clients in CLIENTS} for server in SERVERS
    }
    for _ in range(ROUNDS):
        for server in SERVERS:
            with running(server, served, scenario.pictures) as url:
                given = answers(url, scenario.pictures)
                expected = given if server == OURS else expected
                same_answers[server] = share_of_same_answers(server, given, expected)
                for clients in CLIENTS:
                    found = load(url, scenario.pictures, SECONDS, clients=clients)
                    closed[server][str(clients)].append(check(server, found))
    saturated = {server: median(closed[server][str(CLIENTS[-1])], "images_per_s") for server in SERVERS}
    rate = OPEN_LOOP_SHARE * min(saturated[OURS], max(saturated[one] for one in PEERS))
    open_s = max(SECONDS, OPEN_LOOP_PICTURES / rate)
    opened: dict[str, list[dict[str, float]]] = {server: [] for server in SERVERS}
    for _ in range(ROUNDS):
        for server in SERVERS:
            with running(server, served, scenario.pictures) as url:
                opened[server].append(check(server, load(url, scenario.pictures, open_s, rate=rate)))
    p99, refused = summarise(opened)
    return {
        "summary": {
            "backbone_alone_images_per_s": alone["images_per_s"],
            "backbone_side_by_side_images_per_s": side_by_side["images_per_s"],
            "ordinary_pass_images_per_s": ordinary["images_per_s"],
            "saturated_images_per_s": saturated,
            "saturated_over_alone": saturated[OURS] / alone["images_per_s"],
            "saturated_over_side_by_side": saturated[OURS] / side_by_side["images_per_s"],
            "saturated_over_best_peer": over_best(saturated, PEERS),
            "saturated_over_best_with_our_engine": over_best(saturated, WITH_OUR_ENGINE),
            "one_client_p50_ms": {one: median(closed[one]["1"], "p50_ms") for one in SERVERS},
            "open_loop_images_per_s": rate,
            "open_loop_p99_ms": p99,
            "open_loop_refused": refused,
            "p99_over_best_peer": p99_over_best(p99, refused, PEERS),
            "p99_over_best_with_our_engine": p99_over_best(p99, refused, WITH_OUR_ENGINE),
        },
        "alone": alone,
        "side_by_side": side_by_side,
        "ordinary": ordinary,
        "agreement": cosine | {"same_answers": same_answers},
        "closed_loop": closed,
        "open_loop": opened,
    }


def summarise(opened: Mapping[str, list[dict[str, float]]]) -> tuple[dict[str, float], dict[str, float]]:
    """The p99 in milliseconds of each server, and how many requests it refused."""
    p99 = {server: median(runs, "p99_ms") for server, runs in opened.items()}
    refused = {server: sum(run["num_failed"] for run in runs) for server, runs in opened.items()}
    return p99, refused


def check(server: str, result: dict[str, float]) -> dict[str, float]:
    """Answers alone count; a peer may refuse some requests, which its figures keep (`num_failed`)."""
    print(server, json.dumps(result), flush=True)
    assert server != OURS or result["num_failed"] == 0, f"{result['num_failed']} requests failed"
    return result


def over_best(saturated: Mapping[str, float], others: Iterable[str]) -> float:
    return saturated[OURS] / max(saturated[one] for one in others)


def p99_over_best(
    p99: Mapping[str, float], refused: Mapping[str, float], others: Iterable[str], ours: str = OURS
) -> float | None:
    """This service's p99 over the best of those that answered all (fast answers to some are no match); None
    where each refused some."""
    best = min((p99[one] for one in others if refused[one] == 0), default=None)
    return None if best is None else p99[ours] / best


def median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in runs)


# -- without a server --------------------------------------------------------------------------------


def pass_alone(
    backbone: Backbone,
    stack: Callable[[Sequence[torch.Tensor]], torch.Tensor] = stack_pixels,
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> dict[str, Any]:
    """Images per second of a backbone on decoded pixels, in batches that `stack` makes, at the best of the
    batch sizes, with all its streams side by side."""
    side = backbone.preprocessing.height
    best: dict[str, Any] = {"images_per_s": 0.0}
    for batch_size in batch_sizes:
        pixels = stack([torch.randint(0, 256, (3, side, side), dtype=torch.uint8) for _ in range(batch_size)])
        time_side_by_side(backbone, pixels)
        passes, started = [], time.perf_counter()
        while time.perf_counter() - started < SECONDS / 5:
            passes.append(time_side_by_side(backbone, pixels))
        images_per_s = backbone.num_streams * batch_size / statistics.median(passes)
        if images_per_s > best["images_per_s"]:
            best = {"images_per_s": images_per_s, "batch_size": batch_size}
    return best | {"streams": backbone.num_streams, "runtime": backbone.runtime_name}


def export_ordinarily(scenario: Scenario, runtime: str, threads: int, folder: Path) -> Served:
    """What the servers are given, the ordinary export written into `folder`."""
    artefact = _artefact(scenario.store)
    export = ordinary_export(artefact, runtime, decoded(artefact, scenario.pictures))
    path = None
    if export is not None:
        path = folder / "ordinary.onnx"
        path.write_bytes(export)
    return Served(scenario.store, runtime, path, threads, workers=threads)


def load_ordinary(served: Served) -> Backbone:
    export = served.export.read_bytes() if served.export else None
    return ordinary_backbone(_artefact(served.store), served.runtime, export, served.threads)


def _artefact(store_url: str) -> BackboneArtefact:
    store = ModelStore(store_url)
    return store.backbone(store.require_head().backbone_fingerprint)


if __name__ == "__main__":
    main()
