"""This service against a plain FastAPI handler, LitServe, Ray Serve and BentoML: throughput and latency.

All have the same backbone in the same runtime and precision, the same bank, decoding, threads and pictures,
one after another in every round; LitServe runs twice, with one worker of all threads and a worker a thread.
Load comes from a second process, in closed loops of 1 and 64 clients and an open loop at 70 % of what both
this service and the best peer can do. The limit is the backbone alone at its best batch in one process: with
one pass at a time, and with as many side by side as tuning found best. No picture repeats, and this
service's CLS cache is off, so every answer costs a pass.

TOSCA_BENCH_SECONDS sets the seconds of a measurement (20), TOSCA_BENCH_ROUNDS the rounds (3), and
TOSCA_BENCH_SCENARIOS which scenarios run, by the beginning of their names (ViT-B/16, ViT-Tiny).
"""

import contextlib
import io
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
from PIL import Image

from benchmarks.decoding import large_jpeg, photographs_at_hand
from benchmarks.machine import machine
from model_store.backbone_loading import load_backbone
from model_store.backbone_sources import from_timm
from model_store.measuring import Plan, time_side_by_side, tune
from model_store.parity import read_labelled
from model_store.store import ModelStore
from training.trainer import train_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from synthetic import make_features

DEMO = Path(".tosca")
PEERS = DEMO / "peers" / "bin" / "python"
RESULT = Path(__file__).parent / "results" / "serving.json"
SECONDS = float(os.environ.get("TOSCA_BENCH_SECONDS", "20"))
WANTED = os.environ.get("TOSCA_BENCH_SCENARIOS", "")  # separated by semicolons; all
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "3"))
MAX_BATCH_SIZE = 8
CLIENTS = (1, 64)
OPEN_LOOP_SHARE = 0.7
START_TIMEOUT_S = 180.0
TINY = "vit_tiny_patch16_224"
SMALL = "ViT-B/16, 256-pixel JPEGs"
LARGE = "ViT-B/16, 12-megapixel JPEGs"
TINY_SMALL = "ViT-Tiny, 256-pixel JPEGs"
SERVERS = ("tosca", "plain_fastapi", "lit_serve", "lit_serve_workers", "ray_serve", "bento_ml")


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
            results[scenario.name] = measure(scenario, threads)
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
    small, large = folder / "small", folder / "large"
    small.mkdir()
    large.mkdir()
    for i, photograph in enumerate(photographs_at_hand()):
        if LARGE in wanted:
            (large / f"{i:03d}.jpg").write_bytes(large_jpeg(photograph, seed=i))
        photograph.thumbnail((256, 256), Image.Resampling.LANCZOS)
        file = io.BytesIO()
        photograph.save(file, "JPEG", quality=90)
        (small / f"{i:03d}.jpg").write_bytes(file.getvalue())
    clip = str(DEMO / "store")
    pictures = {SMALL: small, LARGE: large, TINY_SMALL: small}
    stores = {name: tiny_store(folder / "store") if name == TINY_SMALL else clip for name in wanted}
    return [Scenario(name, stores[name], pictures[name]) for name in wanted]


def tiny_store(folder: Path) -> str:
    """An untrained ViT-Tiny at 224 pixels, tuned here, with two tasks."""
    artefact = from_timm(TINY, pretrained=False)
    store = ModelStore(folder)
    store.publish_first(store.put_backbone(artefact))
    pictures = read_labelled(
        {"textiles": DEMO / "demo" / "textiles" / "test"}, artefact.manifest.preprocessing, 16
    )
    candidates = ("torch-float32", "openvino-float32", "openvino-bfloat16")
    tuned = tune(artefact, pictures, Plan(candidates, batch_sizes=(MAX_BATCH_SIZE,)))
    store.put_tuning(tuned.tuning, tuned.export)
    revision = store.require_head()
    for seed, task in enumerate(("birds", "cars")):
        features = make_features(task, seed=seed, feature_dim=artefact.manifest.feature_dim)
        sha256 = store.put_module(train_task(task, features, artefact.manifest, seed=seed).data)
        revision = store.publish(lambda head, t=task, s=sha256: {**head.tasks, t: s}, f"add {task}")
    assert len(revision.tasks) == 2, "both tasks are published"
    return str(folder)


def measure(scenario: Scenario, threads: int) -> dict[str, object]:
    alone = backbone_alone(scenario.store, threads, num_streams=1)
    side_by_side = backbone_alone(scenario.store, threads, num_streams=0)
    closed: dict[str, dict[str, list[dict[str, float]]]] = {
        server: {str(clients): [] for clients in CLIENTS} for server in SERVERS
    }
    for _ in range(ROUNDS):
        for server in SERVERS:
            with running(server, scenario, threads) as url:
                for clients in CLIENTS:
                    closed[server][str(clients)].append(load(url, scenario, clients=clients))
                    check(server, closed[server][str(clients)][-1])
    saturated = {server: median(closed[server][str(CLIENTS[-1])], "images_per_s") for server in SERVERS}
    peers = [one for one in SERVERS if one != "tosca"]
    rate = OPEN_LOOP_SHARE * min(saturated["tosca"], max(saturated[one] for one in peers))
    opened: dict[str, list[dict[str, float]]] = {server: [] for server in SERVERS}
    for _ in range(ROUNDS):
        for server in SERVERS:
            with running(server, scenario, threads) as url:
                opened[server].append(load(url, scenario, rate=rate))
                check(server, opened[server][-1])
    p99 = {server: median(opened[server], "p99_ms") for server in SERVERS}
    refused = {server: sum(run["num_failed"] for run in opened[server]) for server in SERVERS}
    whole = [one for one in peers if refused[one] == 0]  # fast answers to some are no match
    summary = {
        "backbone_alone_images_per_s": alone["images_per_s"],
        "saturated_images_per_s": saturated,
        "backbone_side_by_side_images_per_s": side_by_side["images_per_s"],
        "saturated_over_alone": saturated["tosca"] / alone["images_per_s"],
        "saturated_over_side_by_side": saturated["tosca"] / side_by_side["images_per_s"],
        "saturated_over_best_peer": saturated["tosca"] / max(saturated[one] for one in peers),
        "open_loop_images_per_s": rate,
        "open_loop_p99_ms": p99,
        "open_loop_refused": refused,
        "p99_over_best_peer": p99["tosca"] / min(p99[one] for one in whole),
        "one_client_p50_ms": {one: median(closed[one]["1"], "p50_ms") for one in SERVERS},
    }
    return {
        "summary": summary,
        "alone": alone,
        "side_by_side": side_by_side,
        "closed_loop": closed,
        "open_loop": opened,
    }


def check(server: str, result: dict[str, float]) -> None:
    """Answers alone count; a peer may refuse some requests, which its figures keep (`num_failed`)."""
    print(server, json.dumps(result), flush=True)
    assert server != "tosca" or result["num_failed"] == 0, f"{result['num_failed']} requests failed"


def backbone_alone(store: str, threads: int, num_streams: int) -> dict[str, float | str]:
    """Images per second of the backbone on decoded pixels, at the best of the batch sizes, with so many
    passes side by side (0: as many as tuning found best)."""
    torch.set_num_threads(threads)
    backbone = load_backbone(ModelStore(store), num_threads=threads, num_streams=num_streams)
    side = backbone.preprocessing.height
    best: dict[str, float] = {"images_per_s": 0.0}
    for batch_size in (1, 2, 4, 8, 16):
        pixels = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
        time_side_by_side(backbone, pixels)
        passes, started = [], time.perf_counter()
        while time.perf_counter() - started < SECONDS / 5:
            passes.append(time_side_by_side(backbone, pixels))
        images_per_s = backbone.num_streams * batch_size / statistics.median(passes)
        if images_per_s > best["images_per_s"]:
            best = {"images_per_s": images_per_s, "batch_size": batch_size}
    return best | {"streams": backbone.num_streams, "runtime": backbone.runtime_name}


# -- servers and load --------------------------------------------------------------------------------


@contextlib.contextmanager
def running(server: str, scenario: Scenario, threads: int) -> Iterator[str]:
    """One server in its own process, until the block ends."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
    if server == "tosca":
        command = [
            str(Path(sys.executable).with_name("tosca")),
            "serve",
            "--store",
            scenario.store,
            "--port",
            str(port),
        ]
        environment |= {
            "TOSCA_CLS_CACHE_BYTES": "0",
            "TOSCA_MAX_BATCH_SIZE": str(MAX_BATCH_SIZE),
            "TOSCA_TORCH_THREADS": str(threads),
            "TOSCA_DECODE_THREADS": str(threads),
        }
    else:
        python = sys.executable if server == "plain_fastapi" else str(PEERS)
        options = ["--store", scenario.store, "--port", str(port), "--threads", str(threads)]
        options += ["--max-batch-size", str(MAX_BATCH_SIZE)]
        if server == "lit_serve_workers":
            server, options = "lit_serve", [*options, "--workers", str(threads)]
        command = [python, "-m", f"benchmarks.peers.{server}", *options]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        url = f"http://127.0.0.1:{port}"
        try:
            _wait_until_ready(url, server, process, scenario.pictures)
            yield url
        except AssertionError as error:
            log.seek(0)
            raise AssertionError(f"{error}: {log.read().decode(errors='replace')[-2000:]}") from error
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30.0)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # some leave their workers behind
            process.wait()


def _wait_until_ready(url: str, server: str, process: "subprocess.Popen[bytes]", pictures: Path) -> None:
    """Until a first picture is answered."""
    picture = next(pictures.iterdir()).read_bytes()
    headers = {"content-type": "image/jpeg"}
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        assert process.poll() is None, f"{server} ended"
        with contextlib.suppress(httpx.HTTPError):
            if httpx.post(f"{url}/predict", content=picture, headers=headers, timeout=30.0).is_success:
                return
        time.sleep(0.2)
    raise AssertionError(f"{server} was not ready within {START_TIMEOUT_S} s")


def load(url: str, scenario: Scenario, *, clients: int = 0, rate: float = 0.0) -> dict[str, float]:
    """One measurement by the load process."""
    command = [sys.executable, str(Path(__file__).with_name("load.py")), url]
    command += ["--pictures", str(scenario.pictures)]
    command += ["--seconds", str(SECONDS), "--warm-up", str(SECONDS / 5)]
    command += ["--rate", str(rate)] if rate else ["--clients", str(clients)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=SECONDS * 10 + 300)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def median(runs: list[dict[str, float]], name: str) -> float:
    return statistics.median(one[name] for one in runs)


if __name__ == "__main__":
    main()
