"""From cached features to one module file: fit, calibrate on unseen vectors, measure, write."""
# N training pictures, U unseen pictures, M calibration vectors, K classes, D features

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.backbone import BackboneManifest
from model_store.calibration import (
    CalibrationSet,
    expected_calibration_error,
    fit_temperature,
    minimise_over_log_scale,
    negative_log_likelihood,
)
from model_store.compute_threads import one_compute_thread
from model_store.errors import InvalidDataset
from model_store.landmarks import RidgeFit, Standardisation, fit_landmark_ridges
from model_store.luca import Flow
from model_store.manifest import ModuleManifest, check_label, check_task_name
from model_store.module_file import (
    MAX_CALIBRATION_VECTORS,
    check_module,
    read_module,
    round_weights,
    write_module,
)
from model_store.statistics import fit_class_statistics
from model_store.task_module import TaskModule
from training.features import LabelledFeatures
from training.recipes import BY_NAME, Recipe, RecipeName, fit_module

NUM_FOLDS = 5
MIN_IMAGES_FOR_LUCA = 5  # in every class, before LuCA may speak beside the ridge
MIN_EVIDENCE = 10  # unseen vectors, before weights are fitted at all
LUCA_MARGIN = 0.005  # nats
DEFAULT_RIDGE_WEIGHT = 8.0
DEFAULT_PENALTY = 0.5
RIDGE_WEIGHT_RANGE = (1.0, 50.0)
_LUCA_WEIGHTS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
_RIDGE_SHARES = (0.0, 0.3, 0.5, 0.7, 0.85, 1.0)


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

    @property
    def metrics(self) -> dict[str, float]:
        """What goes into the module file; nothing where no picture could be left out."""
        if len(self.label_N) == 0:
            return {}
        return {"accuracy": self.accuracy, "ece": self.ece, "num_held_out": float(len(self.label_N))}


@dataclass(frozen=True, slots=True)
class TrainedTask:
    """A finished module file and the evidence about it."""

    manifest: ModuleManifest
    data: bytes
    held_out: HeldOutResult
    skipped: tuple[str, ...]


@one_compute_thread()  # the matrices are small: more threads only wait for each other
def train_task(
    task: str,
    features: LabelledFeatures,
    backbone: BackboneManifest,
    *,
    recipe: RecipeName | Recipe = "default",
    flow: Flow = "tosca",
    seed: int = 0,
    label_space: str | None = None,
    abstain_level: float | None = None,
) -> TrainedTask:
    """Train one task and return its module file; equal features, recipe and seed give equal bytes.

    Statistics and the final experts use every training picture. How they are weighed, calibrated and
    reported rests on predictions for pictures they had not seen: the `val` split where there is one,
    else leave-one-out for the ridge and cross-fitting for LuCA. Raises InvalidDataset, and InvalidModule
    when the file is not what a store takes.
    """
    check_names(task, features.labels, label_space)
    chosen = recipe if isinstance(recipe, Recipe) else BY_NAME[recipe]
    num_classes = len(features.labels)
    train, val, test = (features.rows(split) for split in ("train", "val", "test"))
    cls_ND, label_N = features.cls_ND[train], features.label_N[train]
    count_K = torch.bincount(label_N, minlength=num_classes)
    for label, count in zip(features.labels, count_K.tolist(), strict=True):
        if count < 1:
            raise InvalidDataset(f"{features.name}: no training picture of class {label!r} can be read")

    # The only picture of a class cannot be left out, so it is no evidence.
    seen_twice_N = count_K[label_N] >= 2
    unseen = val if len(val) > 0 else train[seen_twice_N]
    unseen_label_U = features.label_N[unseen]
    picked = _pick_evenly(unseen_label_U, MAX_CALIBRATION_VECTORS, _generator(seed, 100))
    calibration_MD = features.cls_ND[unseen[picked]].half()

    standardisation = Standardisation.fit(cls_ND) if chosen.standardise else None
    reader = _Reader(standardisation)
    luca, head = fit_module(
        reader.luca_input(cls_ND), label_N, num_classes, chosen, _generator(seed, 0), flow
    )
    landmark_MD = reader.unit(calibration_MD.float())
    fits = fit_landmark_ridges(reader.unit(cls_ND), label_N, num_classes, landmark_MD)
    if len(val) > 0:
        luca_UK = head(luca(reader.luca_input(features.cls_ND[val])))
        unit_UD = reader.unit(features.cls_ND[val])
        fits = [replace(fit, left_out_NK=fit.expert.scores(unit_UD, landmark_MD)) for fit in fits]
    else:
        luca_UK = cross_fit(reader.luca_input(cls_ND), label_N, num_classes, chosen, seed, flow)[seen_twice_N]
        fits = [replace(fit, left_out_NK=fit.left_out_NK[seen_twice_N]) for fit in fits]
    fit = choose_ridge(fits, unseen_label_U)
    ridge, ridge_UK = round_weights(luca, head, fit.expert), fit.left_out_NK
    trusted = len(val) > 0 or int(count_K.min()) >= MIN_IMAGES_FOR_LUCA
    luca_weight, ridge_weight = weigh_experts(
        luca_UK, ridge_UK, unseen_label_U, use_ridge=chosen.standardise, trust_luca=trusted
    )
    unseen_UK = luca_weight * luca_UK + ridge_weight * ridge_UK

    module = TaskModule(
        task=task,
        labels=features.labels,
        sha256="",
        standardisation=standardisation,
        luca=luca,
        head=head,
        ridge=ridge,
        luca_weight=luca_weight,
        ridge_weight=ridge_weight,
        statistics=fit_class_statistics(cls_ND, label_N, num_classes),
        calibration=CalibrationSet(
            cls_MD=calibration_MD,
            label_M=unseen_label_U[picked],
            logits_MK=torch.empty(0),
            held_out_logits_MK=unseen_UK[picked].clone(),
            in_statistics_M=torch.full((len(picked),), len(val) == 0),
        ),
        label_space=label_space,
        abstain_level=abstain_level,
    )
    golden_MK = module.logits(calibration_MD.float()).clone()
    module = replace(module, calibration=replace(module.calibration, logits_MK=golden_MK))
    if len(test) > 0:
        held_out = _held_out("test split", module.logits(features.cls_ND[test]), features.label_N[test])
    else:
        evidence = "val split" if len(val) > 0 else "training pictures, each left out"
        held_out = _held_out(evidence, unseen_UK, unseen_label_U)

    manifest = ModuleManifest(
        task=task,
        labels=features.labels,
        label_space=label_space,
        abstain_level=abstain_level,
        backbone_fingerprint=backbone.fingerprint,
        feature_dim=backbone.feature_dim,
        bottleneck_dim=luca.bottleneck_dim,
        flow=flow,
        standardised=standardisation is not None,
        luca_weight=luca_weight,
        ridge_weight=ridge_weight,
        training={**asdict(chosen), "ridge_penalty": fit.penalty, "seed": seed, "num_images": len(train)},
        metrics=held_out.metrics,
        provenance={
            "data": features.name,
            "data_sha256": features.data_sha256,
            "held_out": held_out.evidence,
            "torch": torch.__version__,
        },
    )
    data = write_module(manifest, module)
    check_module(read_module(data), backbone)
    return TrainedTask(manifest, data, held_out, features.skipped)


def check_names(task: str, labels: Sequence[str], label_space: str | None = None) -> None:
    """Raise InvalidDataset unless a module file may carry these names."""
    names = [(check_task_name, task), *((check_label, label) for label in labels)]
    if label_space is not None:
        names.append((check_task_name, label_space))
    for check, name in names:
        try:
            check(name)
        except ValueError as error:
            raise InvalidDataset(f"task {task!r}: {error}") from error


def choose_ridge(fits: Sequence[RidgeFit], label_U: Tensor) -> RidgeFit:
    """The fit whose scores of unseen vectors, in `left_out_NK`, are most truthful at their best weight."""
    if len(label_U) < MIN_EVIDENCE:
        return min(fits, key=lambda fit: abs(fit.penalty - DEFAULT_PENALTY))
    return min(fits, key=lambda fit: _weigh_ridge(fit.left_out_NK, label_U)[1])


def _weigh_ridge(ridge_UK: Tensor, label_U: Tensor) -> tuple[float, float]:
    """(weight with the least negative log-likelihood, that likelihood)"""

    def loss(weight: float) -> float:
        return negative_log_likelihood(torch.log_softmax(weight * ridge_UK.double(), dim=1), label_U)

    weight = minimise_over_log_scale(loss, *RIDGE_WEIGHT_RANGE)
    return weight, loss(weight)


def weigh_experts(
    luca_UK: Tensor, ridge_UK: Tensor, label_U: Tensor, *, use_ridge: bool, trust_luca: bool
) -> tuple[float, float]:
    """(luca_weight, ridge_weight) with the least negative log-likelihood on unseen vectors.

    LuCA joins the ridge only when it lowers that by LUCA_MARGIN nats, and only when `trust_luca`: with a
    handful of pictures the evidence itself is noise.
    """
    if not use_ridge:
        return 1.0 / fit_temperature(luca_UK, label_U), 0.0

    def loss(luca_weight: float, ridge_weight: float) -> float:
        logits_UK = luca_weight * luca_UK.double() + ridge_weight * ridge_UK.double()
        return negative_log_likelihood(torch.log_softmax(logits_UK, dim=1), label_U)

    if len(label_U) < MIN_EVIDENCE:
        return 0.0, DEFAULT_RIDGE_WEIGHT
    ridge_alone, loss_alone = _weigh_ridge(ridge_UK, label_U)
    if not trust_luca:
        return 0.0, ridge_alone
    candidates = [(luca, ridge_alone * share) for luca in _LUCA_WEIGHTS for share in _RIDGE_SHARES]
    best = min(candidates, key=lambda pair: loss(*pair))
    return best if loss(*best) < loss_alone - LUCA_MARGIN else (0.0, ridge_alone)


def cross_fit(
    x_ND: Tensor, label_N: Tensor, num_classes: int, recipe: Recipe, seed: int, flow: Flow
) -> Tensor:
    """[N, K] head logits of every training vector from a module that never saw it.

    Stratified folds; the rows of a class with a single picture mean nothing.
    """
    fold_N = _stratified_folds(label_N, _generator(seed, 1))
    logits_NK = torch.zeros(len(label_N), num_classes)
    for fold in range(NUM_FOLDS):
        out = fold_N == fold
        if not bool(out.any()) or bool(out.all()):
            continue
        luca, head = fit_module(
            x_ND[~out], label_N[~out], num_classes, recipe, _generator(seed, 2 + fold), flow
        )
        logits_NK[out] = head(luca(x_ND[out]))
    return logits_NK


@dataclass(frozen=True, slots=True)
class _Reader:
    """How the experts read CLS vectors; see TaskModule."""

    standardisation: Standardisation | None

    def unit(self, cls_BD: Tensor) -> Tensor:
        return F.normalize(cls_BD, dim=-1) if self.standardisation is None else self.standardisation(cls_BD)

    def luca_input(self, cls_BD: Tensor) -> Tensor:
        return cls_BD if self.standardisation is None else self.standardisation.luca_input(cls_BD)


def _stratified_folds(label_N: Tensor, generator: torch.Generator) -> Tensor:
    fold_N = torch.zeros_like(label_N)
    for k in label_N.unique().tolist():
        rows = (label_N == k).nonzero().squeeze(1)
        shuffled = rows[torch.randperm(len(rows), generator=generator)]
        fold_N[shuffled] = (torch.arange(len(rows)) + k) % NUM_FOLDS
    return fold_N


def _pick_evenly(label_N: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Up to `size` row numbers, sorted, as evenly over the classes as they come."""
    order = torch.randperm(len(label_N), generator=generator)
    rank_N = torch.zeros(len(label_N), dtype=torch.int64)
    for k in label_N.unique().tolist():
        members = order[label_N[order] == k]
        rank_N[members] = torch.arange(len(members))
    return torch.argsort(rank_N, stable=True)[:size].sort().values


def _held_out(evidence: str, logits_NK: Tensor, label_N: Tensor) -> HeldOutResult:
    return HeldOutResult(evidence, label_N, torch.softmax(logits_NK.double(), dim=1))


def _generator(seed: int, stream: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed * 1000 + stream)
