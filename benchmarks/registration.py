"""How long a task takes to appear: from `POST /tasks` to the first answer by the new module, and the seconds
to train a 10-class task from cached features.

The server runs the default backbone in its own process. The baseline is a prediction by a task that was
there before, in the same run: what lies above it is the registration.
"""

import json
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import httpx
import torch

from model_store.backbone import Backbone
from model_store.store import ModelStore
from training.feature_cache import FeatureCache
from training.features import LabelledFeatures, extract_features
from training.sources import open_source
from training.trainer import train_task

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from serving import running_server

ROUNDS = 20
DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "registration.json"


def main() -> None:
    source = ModelStore(DEMO / "store")
    backbone = Backbone.load(source.backbone(source.require_head().backbone_fingerprint))
    features = _features(backbone)
    training_s = []
    modules = []
    for seed in range(ROUNDS):
        started = time.perf_counter()
        trained = train_task(f"new{seed}", features, backbone.manifest, seed=seed)
        training_s.append(time.perf_counter() - started)
        modules.append(trained.data)
    picture = next((DEMO / "demo" / "digits" / "test" / "0").iterdir()).read_bytes()
    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder) / "store"
        shutil.copytree(DEMO / "store", store)
        with running_server(str(store), Path(folder) / "log") as server:
            result = _measure(server.url, picture, modules)
    result |= {
        "training_median_s": statistics.median(training_s),
        "training_pictures": len(features.rows("train")),
        "rounds": ROUNDS,
        "machine": {
            "cores": torch.get_num_threads(),
            "processor": platform.machine(),
            "torch": torch.__version__,
        },
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def _features(backbone: Backbone) -> LabelledFeatures:
    cache = FeatureCache(DEMO / "cache", backbone.fingerprint, backbone.variant, backbone.feature_dim)
    features = extract_features(open_source(DEMO / "demo" / "digits"), backbone, cache)
    return replace(features, labels=tuple(f"new {label}" for label in features.labels))


def _measure(url: str, picture: bytes, modules: list[bytes]) -> dict[str, float]:
    registered_s, first_answer_s, baseline_s = [], [], []
    with httpx.Client(base_url=url, timeout=60.0) as client:
        for i, module in enumerate(modules):
            started = time.perf_counter()
            client.post("/predict", content=picture, params={"task": "digits"}).raise_for_status()
            baseline_s.append(time.perf_counter() - started)
            started = time.perf_counter()
            # Forced: these tasks look alike on purpose, so the impact report would refuse them.
            client.post("/tasks", content=module, params={"force": True}).raise_for_status()
            registered_s.append(time.perf_counter() - started)
            answer = client.post("/predict", content=picture, params={"task": f"new{i}"})
            first_answer_s.append(time.perf_counter() - started)
            assert answer.raise_for_status().json()["predictions"][0]["task"] == f"new{i}"
    return {
        "post_tasks_median_s": statistics.median(registered_s),
        "first_answer_median_s": statistics.median(first_answer_s),
        "first_answer_max_s": max(first_answer_s),
        "baseline_prediction_median_s": statistics.median(baseline_s),
    }


if __name__ == "__main__":
    main()
