"""Training from pictures to module file with features computed once, against the backbone in every epoch.

Both read the same pictures of the demo's digits in the same runtime. "Every epoch" is one measured epoch of
decoding and backbone passes, times the epochs of the authors' schedule; what it would spend on the module
itself is left out, in its favour. A second figure runs it in torch float32, as the authors do.
"""

import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import machine
from model_store.backbone import Backbone
from model_store.backbone_loading import load_backbone
from model_store.decoding import ImageLimits
from model_store.preprocess import load_pixels
from model_store.runtimes.runtime import REFERENCE
from model_store.store import ModelStore
from training.feature_cache import FeatureCache
from training.features import BATCH_SIZE, extract_features
from training.pictures import PictureSource
from training.sources import open_source
from training.trainer import train_task

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "features.json"
EPOCHS = 20
ROUNDS = int(os.environ.get("TOSCA_BENCH_ROUNDS", "3"))


def main() -> None:
    about = machine()
    store = ModelStore(DEMO / "store")
    tuned, reference = load_backbone(store), load_backbone(store, runtime=REFERENCE)
    whole = open_source(DEMO / "demo" / "digits")
    source = PictureSource(
        whole.name, tuple(one for one in whole.pictures if one.split == "train"), whole.labels
    )
    ours, training, epoch, epoch_float32 = [], [], [], []
    for _ in range(ROUNDS):  # alternating, so that other work on the machine strikes all alike
        total_s, training_s = from_pictures(source, tuned)
        ours.append(total_s)
        training.append(training_s)
        epoch.append(one_epoch(source, tuned))
        epoch_float32.append(one_epoch(source, reference))
    result = {
        "machine": about,
        "pictures": len(source.pictures),
        "rounds": ROUNDS,
        "runtime": tuned.runtime_name,
        "from_pictures_median_s": statistics.median(ours),
        "of_which_training_median_s": statistics.median(training),
        "one_epoch_median_s": statistics.median(epoch),
        "one_epoch_float32_median_s": statistics.median(epoch_float32),
        "epochs": EPOCHS,
        "speedup": statistics.median(EPOCHS * b / a for a, b in zip(ours, epoch, strict=True)),
        "speedup_over_float32": statistics.median(
            EPOCHS * b / a for a, b in zip(ours, epoch_float32, strict=True)
        ),
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def from_pictures(source: PictureSource, backbone: Backbone) -> tuple[float, float]:
    """Seconds from pictures to the bytes of a module file with nothing cached, and those of the training."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        cache = FeatureCache(Path(folder), backbone.fingerprint, backbone.variant, backbone.feature_dim)
        features = extract_features(source, backbone, cache, show_progress=False)
        extracted = time.perf_counter()
        train_task(source.name, features, backbone.manifest)
        ended = time.perf_counter()
    return ended - started, ended - extracted


def one_epoch(source: PictureSource, backbone: Backbone) -> float:
    """Seconds to decode and embed every picture once, as a data loader feeding the frozen backbone does."""
    started = time.perf_counter()
    pictures = source.pictures
    for start in range(0, len(pictures), BATCH_SIZE):
        batch = [
            load_pixels(one.path.read_bytes(), backbone.preprocessing, ImageLimits())
            for one in pictures[start : start + BATCH_SIZE]
        ]
        backbone.embed(torch.stack(batch))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
