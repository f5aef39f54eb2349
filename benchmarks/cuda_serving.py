"""This service and its peers on a CUDA device, which one process of Python cannot keep busy.

The demo's store, 256-pixel JPEGs, bank and number format are the same for all, and the peers are as their
users write them (benchmarks/serving.py): the whole timm model, and one worker of all threads or several that
share them. This service runs as one process and as several. Every picture takes a pass: caches are off.

Servers run one after another in every round. Load comes from another process: closed loops of few and many
clients, an open loop at 70 % of what this service and the best peer can both do, and for this service, whose
requests may hold several pictures, 16 clients that send 16 each.

Two limits are measured without a server, each at its best batch: the pass as this project captures it, and
the ordinary one.

TOSCA_BENCH_SECONDS sets the seconds of a measurement (20), TOSCA_BENCH_ROUNDS the rounds (3), and
TOSCA_BENCH_WORKERS the processes or workers of a server that has several (8).

Example: python -m benchmarks.cuda_serving
"""

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.agreement import cosine_with_ours, share_of_same_answers
from benchmarks.machine import machine
from benchmarks.peers.ordinary import ordinary_stack
from benchmarks.servers import OURS, OURS_PROCESSES, PEERS, WITH_WORKERS, Served, answers, load, running
from benchmarks.serving import (
    DEMO,
    OPEN_LOOP_SHARE,
    ROUNDS,
    SECONDS,
    load_ordinary,
    median,
    p99_over_best,
    pass_alone,
    summarise,
    write_small,
)
from model_store.backbone_loading import load_backbone
from model_store.store import ModelStore

RESULT = Path(__file__).parent / "results" / "cuda_serving.json"
WORKERS = int(os.environ.get("TOSCA_BENCH_WORKERS", "8"))
MAX_BATCH_SIZE = 64
BATCH_SIZES = (1, 8, 32, 64, 128)
CLIENTS = (1, 64, 256)
FORMS = {"clients": 16, "pictures_a_request": 16}
PEERS_HERE = {name: peer for name, peer in PEERS.items() if name != "ray_serve"} | WITH_WORKERS
SERVERS = (OURS, OURS_PROCESSES, *PEERS_HERE)


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA device")
    about = machine()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(write_small(Path(temporary) / "small"))
    document = {"machine": about, "seconds": SECONDS, "rounds": ROUNDS, "workers": WORKERS, **result}
    RESULT.write_text(json.dumps(document, indent=2) + "\n")
    print(json.dumps(result["summary"]))


def measure(pictures: Path) -> dict[str, Any]:
    store = DEMO / "store"
    ours = load_backbone(ModelStore(store))
    alone = pass_alone(ours, batch_sizes=BATCH_SIZES)
    threads = os.cpu_count() or 1
    served = Served(str(store), ours.runtime_name, None, threads, WORKERS, MAX_BATCH_SIZE)
    ordinary = pass_alone(load_ordinary(served), ordinary_stack, BATCH_SIZES)
    cosine = cosine_with_ours(served, load_ordinary(served), pictures)
    closed: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {str(clients): [] for clients in CLIENTS} for name in SERVERS
    }
    forms: dict[str, list[dict[str, float]]] = {OURS: [], OURS_PROCESSES: []}
    opened: dict[str, list[dict[str, float]]] = {name: [] for name in SERVERS}
    expected: list[dict[str, Any]] = []
    same_answers = {}
    for _ in range(ROUNDS):
        for name in SERVERS:
            with running(name, served, pictures) as url:
                given = answers(url, pictures)
                expected = given if name == OURS else expected
                same_answers[name] = share_of_same_answers(name, given, expected)
                for clients in CLIENTS:
                    closed[name][str(clients)].append(
                        told(name, load(url, pictures, SECONDS, clients=clients))
                    )
                if name in forms:
                    forms[name].append(told(f"{name}, forms", load(url, pictures, SECONDS, **FORMS)))
    saturated = {
        name: max(median(runs, "images_per_s") for runs in by_clients.values())
        for name, by_clients in closed.items()
    }
    best_peer = max(saturated[name] for name in PEERS_HERE)
    rate = OPEN_LOOP_SHARE * min(max(saturated[OURS], saturated[OURS_PROCESSES]), best_peer)
    for _ in range(ROUNDS):
        for name in SERVERS:
            with running(name, served, pictures) as url:
                opened[name].append(told(name, load(url, pictures, SECONDS, rate=rate)))
    p99, refused = summarise(opened)
    return {
        "summary": {
            "backbone_alone_images_per_s": alone["images_per_s"],
            "ordinary_pass_images_per_s": ordinary["images_per_s"],
            "saturated_images_per_s": saturated,
            "forms_images_per_s": {name: median(runs, "images_per_s") for name, runs in forms.items()},
            "saturated_over_best_peer": saturated[OURS] / best_peer,
            "processes_over_best_peer": saturated[OURS_PROCESSES] / best_peer,
            "one_client_p50_ms": {name: median(closed[name]["1"], "p50_ms") for name in SERVERS},
            "open_loop_images_per_s": rate,
            "open_loop_p99_ms": p99,
            "open_loop_refused": refused,
            "p99_over_best_peer": p99_over_best(p99, refused, PEERS_HERE),
            "processes_p99_over_best_peer": p99_over_best(p99, refused, PEERS_HERE, OURS_PROCESSES),
        },
        "alone": alone,
        "ordinary": ordinary,
        "agreement": cosine | {"same_answers": same_answers},
        "closed_loop": closed,
        "forms": {**FORMS, "runs": forms},
        "open_loop": opened,
    }


def told(name: str, found: dict[str, float]) -> dict[str, float]:
    """Answers alone count; a server may refuse some requests, which its figures keep (`num_failed`)."""
    print(name, json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    main()
