"""The test for drift on real pictures: false alarms of tasks trained on a random part of the demo's pictures
and watched on the rest, and how soon pictures are noticed that are spoilt, or of something else.

Random parts are exchangeable. The demo's own split need not be: it trains on the first pictures of each
class, and scikit-learn's digits are in the order in which they were collected.
"""

import io
import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image, ImageEnhance, ImageFilter
from torch import Tensor

from benchmarks.machine import machine
from model_store.backbone import Backbone
from model_store.backbone_loading import load_backbone
from model_store.bank import ModuleBank
from model_store.decoding import ImageLimits
from model_store.measuring import embed_all
from model_store.module_file import read_module
from model_store.preprocess import load_pixels
from model_store.store import ModelStore
from service.drift import DriftWatch
from service.settings import Settings
from training.demo import write_demo_pictures
from training.features import LabelledFeatures
from training.trainer import train_task

DEMO = Path(".tosca")
RESULT = Path(__file__).parent / "results" / "drift.json"
NUM_TRAIN = 20  # pictures a class, as `tosca demo` has it
NUM_WATCHED = {"digits": 10, "textiles": 30}
NUM_SPOILT = 30
NUM_SPLITS = 10
NUM_ORDERS = 100
SPOILERS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "half as bright": lambda image: ImageEnhance.Brightness(image).enhance(0.5),
    "blurred, 2 pixels": lambda image: image.filter(ImageFilter.GaussianBlur(2)),
}


def main() -> None:
    about = machine()
    alarm_rate = Settings().drift_alarm_rate
    backbone = load_backbone(ModelStore(DEMO / "store"))
    files = {task: find_files(task) for task in NUM_WATCHED}
    features = {task: embed(backbone, task, pictures) for task, pictures in files.items()}
    rows = []
    for task, given in features.items():
        outcomes = []
        for seed in range(NUM_SPLITS):
            bank = train(backbone, split_again(given, seed), seed)
            watched_ND = shuffled(given_rows(split_again(given, seed)), seed)
            outcomes.append(watch(bank, watched_ND, alarm_rate))
        rows.append({"task": task, "pictures": "not drawn for training", **summary(outcomes)})
        bank = train(backbone, given, 0)
        series = {"of the demo's test split": given_rows(given)}
        chosen = files[task]["test"][:: len(files[task]["test"]) // NUM_SPOILT]
        for name, spoil in SPOILERS.items():
            series[name] = embed_files(backbone, chosen, spoil)
        [other] = (one for one in features if one != task)
        series[f"of {other}"] = given_rows(features[other])
        for name, cls_ND in series.items():
            outcomes = [watch(bank, shuffled(cls_ND, seed), alarm_rate) for seed in range(NUM_ORDERS)]
            rows.append({"task": task, "pictures": name, **summary(outcomes)})
    for row in rows:
        print(row)
    result = {
        "machine": about,
        "alarm_rate": alarm_rate,
        "splits": NUM_SPLITS,
        "orders": NUM_ORDERS,
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def find_files(task: str) -> dict[str, list[tuple[str, bytes]]]:
    """The demo's pictures of a task with their classes, by split."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_demo_pictures(Path(folder), NUM_TRAIN, NUM_WATCHED[task])[task]
        return {
            split: [(one.parent.name, one.read_bytes()) for one in sorted((path / split).rglob("*.*"))]
            for split in ("train", "test")
        }


def embed(backbone: Backbone, task: str, files: dict[str, list[tuple[str, bytes]]]) -> LabelledFeatures:
    pictures = files["train"] + files["test"]
    labels = tuple(sorted({label for label, _ in pictures}))
    return LabelledFeatures(
        name=task,
        labels=labels,
        cls_ND=embed_files(backbone, pictures),
        label_N=torch.tensor([labels.index(label) for label, _ in pictures]),
        splits=("train",) * len(files["train"]) + ("test",) * len(files["test"]),
        data_sha256="0" * 64,
        skipped=(),
        num_computed=len(pictures),
    )


def embed_files(
    backbone: Backbone,
    pictures: Sequence[tuple[str, bytes]],
    spoil: Callable[[Image.Image], Image.Image] = lambda image: image,
) -> Tensor:
    pixels = []
    for _, data in pictures:
        file = io.BytesIO()
        spoil(Image.open(io.BytesIO(data)).convert("RGB")).save(file, "PNG")
        pixels.append(load_pixels(file.getvalue(), backbone.preprocessing, ImageLimits()))
    return embed_all(backbone, torch.stack(pixels))


def split_again(features: LabelledFeatures, seed: int) -> LabelledFeatures:
    """The same pictures with `NUM_TRAIN` of each class at random for training."""
    generator = torch.Generator().manual_seed(seed)
    splits = ["test"] * len(features.splits)
    for label in range(len(features.labels)):
        rows = (features.label_N == label).nonzero().squeeze(1)
        for row in rows[torch.randperm(len(rows), generator=generator)[:NUM_TRAIN]].tolist():
            splits[row] = "train"
    return replace(features, splits=tuple(splits))


def given_rows(features: LabelledFeatures) -> Tensor:
    return features.cls_ND[features.rows("test")]


def shuffled(cls_ND: Tensor, seed: int) -> Tensor:
    return cls_ND[torch.randperm(len(cls_ND), generator=torch.Generator().manual_seed(seed))]


def train(backbone: Backbone, features: LabelledFeatures, seed: int) -> ModuleBank:
    """A bank of this one task."""
    file = read_module(train_task(features.name, features, backbone.manifest, seed=seed).data, "cpu")
    return ModuleBank.build(
        [file.module],
        revision=1,
        backbone_fingerprint=backbone.fingerprint,
        feature_dim=backbone.feature_dim,
    )


def watch(bank: ModuleBank, cls_ND: Tensor, alarm_rate: float) -> dict[str, float | None]:
    """The mean p-value, and the picture that raises the alarm; the window holds all."""
    [module] = bank.modules
    p_values = [one.p_value for one in bank.answer(cls_ND, top_k=1)]
    watched = DriftWatch(len(module.calibration), len(p_values), alarm_rate)
    alarm_at = None
    for i, p_value in enumerate(p_values, start=1):
        watched.add(p_value)
        if alarm_at is None and (drift := watched.judge()) is not None and drift.is_drifting:
            alarm_at = i
    return {"num": len(p_values), "mean": statistics.mean(p_values), "alarm_at": alarm_at}


def summary(outcomes: Sequence[dict[str, float | None]]) -> dict[str, object]:
    alarms = [one["alarm_at"] for one in outcomes if one["alarm_at"] is not None]
    return {
        "num_watched": outcomes[0]["num"],
        "mean_p_value": statistics.mean(one["mean"] or 0.0 for one in outcomes),
        "runs": len(outcomes),
        "alarms": len(alarms),
        "median_pictures_until_alarm": statistics.median(alarms) if alarms else None,
    }


if __name__ == "__main__":
    main()
