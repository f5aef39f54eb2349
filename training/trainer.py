"""From cached features to one module file: fit, calibrate on unseen vectors, measure, write."""
# N training pictures, M calibration vectors, K classes, D features

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from model_store.backbone import BackboneManifest
from model_store.calibration import (
    CalibrationSet,
    expected_calibration_error,
    fit_temperature,
)
from model_store.errors import InvalidDataset
from model_store.luca import CosineHead, Flow, LuCA
from model_store.module_file import MAX_CALIBRATION_VECTORS, ModuleManifest, write_module
from model_store.statistics import fit_class_statistics
from training.features import LabelledFeatures
from training.recipes import BY_NAME, Recipe, RecipeName, fit_module

MAX_FOLDS = 5


@dataclass(frozen=True, slots=True)
class HeldOutResult:
    """Predictions on pictures the module has not seen: the test split, or cross-fitted training pictures."""

    evidence: str
    label_N: Tensor
    prob_NK: Tensor

    @property
    def predictions(self) -> Tensor:
        return self.prob_NK.argmax(dim=1)

    @property
    def accuracy(self) -> float:
        return float((self.predictions == self.label_N).double().mean())

    @property
    def ece(self) -> float:
        return expected_calibration_error(self.prob_NK.max(dim=1).values, self.predictions == self.label_N)


@dataclass(frozen=True, slots=True)
class TrainedTask:
    """A finished module file and the evidence about it."""

    manifest: ModuleManifest
    data: bytes
    held_out: HeldOutResult
    skipped: tuple[str, ...]


@contextmanager
def _one_thread() -> Iterator[None]:
    """The matrices are small: more threads only wait for each other, and one gives the same bytes
    whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@_one_thread()
def train_task(
    task: str,
    features: LabelledFeatures,
    backbone: BackboneManifest,
    *,
    recipe: RecipeName = "default",
    flow: Flow = "tosca",
    seed: int = 0,
) -> TrainedTask:
    """Train one task and return its module file; equal features, recipe and seed give equal bytes."""
    chosen = BY_NAME[recipe]
    num_classes = len(features.labels)
    train, val, test = (features.rows(split) for split in ("train", "val", "test"))
    cls_ND, label_N = features.cls_ND[train], features.label_N[train]
    for label, count in zip(features.labels, torch.bincount(label_N, minlength=num_classes), strict=True):
        if int(count) < 1:
            raise InvalidDataset(f"{features.name}: no training picture of class {label!r} can be read")

    luca, head = fit_module(cls_ND, label_N, num_classes, chosen, _generator(seed, 0), flow)
    if len(val) > 0:
        unseen_rows, unseen_logits = val, head(luca(features.cls_ND[val]))
    else:
        unseen_rows, unseen_logits = train, cross_fit(cls_ND, label_N, num_classes, chosen, seed, flow)
    known = unseen_logits.isfinite().all(dim=1)
    unseen_rows, unseen_logits = unseen_rows[known], unseen_logits[known]
    temperature = fit_temperature(unseen_logits, features.label_N[unseen_rows])
    calibration = _calibration_set(
        features, unseen_rows, unseen_logits, luca, head, inside=len(val) == 0, seed=seed
    )
    held_out = _held_out(features, test, luca, head, unseen_rows, unseen_logits, temperature)

    manifest = ModuleManifest(
        task=task,
        labels=features.labels,
        backbone_fingerprint=backbone.fingerprint,
        feature_dim=backbone.feature_dim,
        bottleneck_dim=luca.bottleneck_dim,
        flow=flow,
        luca_weight=1.0 / temperature,
        training={**asdict(chosen), "seed": seed, "num_images": len(train)},
        metrics={
            "accuracy": held_out.accuracy,
            "ece": held_out.ece,
            "num_held_out": float(len(held_out.label_N)),
        },
        provenance={
            "data": features.name,
            "data_sha256": features.data_sha256,
            "held_out": held_out.evidence,
            "torch": torch.__version__,
        },
    )
    statistics = fit_class_statistics(cls_ND, label_N, num_classes)
    data = write_module(manifest, luca, head, statistics, calibration)
    return TrainedTask(manifest, data, held_out, features.skipped)


def cross_fit(
    cls_ND: Tensor, label_N: Tensor, num_classes: int, recipe: Recipe, seed: int, flow: Flow
) -> Tensor:
    """[N, K] logits of every training vector from a module that never saw it.

    Stratified folds, at most MAX_FOLDS. The only picture of a class cannot be held out: its row is NaN.
    """
    fold_N = _stratified_folds(label_N, _generator(seed, 1))
    logits_NK = torch.full((len(label_N), num_classes), torch.nan)
    lonely_N = torch.bincount(label_N, minlength=num_classes)[label_N] < 2
    for fold in range(int(fold_N.max()) + 1):
        out = (fold_N == fold) & ~lonely_N
        luca, head = fit_module(
            cls_ND[~out], label_N[~out], num_classes, recipe, _generator(seed, 2 + fold), flow
        )
        logits_NK[out] = head(luca(cls_ND[out]))
    return logits_NK


def _stratified_folds(label_N: Tensor, generator: torch.Generator) -> Tensor:
    fold_N = torch.zeros_like(label_N)
    for k in label_N.unique().tolist():
        rows = (label_N == k).nonzero().squeeze(1)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        fold_N[shuffled] = torch.arange(len(rows)) % MAX_FOLDS
    return fold_N


def _calibration_set(
    features: LabelledFeatures,
    rows: Tensor,
    held_out_logits: Tensor,
    luca: LuCA,
    head: CosineHead,
    *,
    inside: bool,
    seed: int,
) -> CalibrationSet:
    """Up to MAX_CALIBRATION_VECTORS unseen vectors, as evenly over the classes as they come."""
    fold = features.label_N[rows]
    order = torch.randperm(len(rows), generator=_generator(seed, 100))
    rank = torch.zeros(len(rows), dtype=torch.int64)
    for k in fold.unique().tolist():
        members = order[fold[order] == k]
        rank[members] = torch.arange(len(members))
    picked = torch.argsort(rank, stable=True)[:MAX_CALIBRATION_VECTORS].sort().values
    cls_MD = features.cls_ND[rows[picked]].half()
    with torch.inference_mode():
        logits_MK = head(luca(cls_MD.float()))
    return CalibrationSet(
        cls_MD=cls_MD,
        label_M=fold[picked],
        logits_MK=logits_MK.clone(),
        held_out_logits_MK=held_out_logits[picked].clone(),
        in_statistics_M=torch.full((len(picked),), inside),
    )


def _held_out(
    features: LabelledFeatures,
    test: Tensor,
    luca: LuCA,
    head: CosineHead,
    unseen_rows: Tensor,
    unseen_logits: Tensor,
    temperature: float,
) -> HeldOutResult:
    if len(test) > 0:
        evidence, rows, logits = "test split", test, head(luca(features.cls_ND[test]))
    else:
        in_val = features.splits[int(unseen_rows[0])] == "val" if len(unseen_rows) else False
        evidence = "val split" if in_val else "cross-fitted training pictures"
        rows, logits = unseen_rows, unseen_logits
    return HeldOutResult(
        evidence, features.label_N[rows], torch.softmax(logits.double() / temperature, dim=1)
    )


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1000 + stream)
