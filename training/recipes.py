"""The two ways to fit one LuCA module on cached CLS features: `reference` (the paper's) and `default`."""
# N pictures, B batch, K classes, D features

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from model_store.luca import CosineHead, Flow, LuCA, matrix_names

RecipeName = Literal["default", "reference"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyper-parameters of one fit; the two published instances are REFERENCE and DEFAULT."""

    name: RecipeName
    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    weight_decay: float
    epochs: int
    batch_size: int
    l1: float  # λ of λ·Σ|p| over the module's parameters, by its gradient: no exact zeros
    proximal_l1: float  # μ: after every step the matrices' entries shrink towards zero by learning rate · μ
    initial_scale: float  # σ of the cosine head
    identity_start: bool  # W2 = V2 = 0 and the head at the class means
    standardise: bool  # LuCA reads standardised vectors, and the landmark ridge stands beside it


# METHOD: SGD with momentum 0.9, lr 0.025, cosine schedule, 20 epochs, batches of 48, L1 of 5e-4 over all
# module parameters. One departure: the published zero-initialised head has no defined direction.
REFERENCE = Recipe(
    "reference", "sgd", 0.025, 0.0, 20, 48, 5e-4, 0.0, 10.0, identity_start=False, standardise=False
)
DEFAULT = Recipe(
    "default", "adamw", 1e-3, 1e-2, 30, 48, 0.0, 0.3, 10.0, identity_start=True, standardise=True
)
BY_NAME: dict[RecipeName, Recipe] = {"reference": REFERENCE, "default": DEFAULT}


def fit_module(
    x_ND: Tensor,
    label_N: Tensor,
    num_classes: int,
    recipe: Recipe,
    generator: torch.Generator,
    flow: Flow = "tosca",
) -> tuple[LuCA, CosineHead]:
    """Fit a module and its head on [N, D] vectors; the same generator state gives the same weights."""
    feature_dim = x_ND.shape[1]
    luca = LuCA(feature_dim, flow=flow)
    luca.initialise(generator, identity=recipe.identity_start)
    head = CosineHead(feature_dim, num_classes, recipe.initial_scale)
    if recipe.identity_start:
        set_head_to_class_means(luca, head, x_ND, label_N)
        with torch.no_grad():  # only directions matter; a common length makes weight decay fair
            head.weight_KD.copy_(F.normalize(head.weight_KD, dim=-1) * feature_dim**0.5 / 2.0)
    else:
        with torch.no_grad():
            head.weight_KD.normal_(std=feature_dim**-0.5, generator=generator)
    optimiser = _optimiser(recipe, luca, head)
    matrices = [getattr(luca, name) for name in matrix_names(flow)]
    num_steps = recipe.epochs * -(-len(label_N) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_steps)
    for _ in range(recipe.epochs):
        for rows in torch.randperm(len(label_N), generator=generator).split(recipe.batch_size):
            loss = F.cross_entropy(head(luca(x_ND[rows])), label_N[rows])
            if recipe.l1 > 0.0:
                loss = loss + recipe.l1 * torch.stack([p.abs().sum() for p in luca.parameters()]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if recipe.proximal_l1 > 0.0:
                soft_threshold(matrices, float(schedule.get_last_lr()[0]) * recipe.proximal_l1)
            schedule.step()
    if recipe.name == "reference":
        set_head_to_class_means(luca, head, x_ND, label_N)
    return luca.requires_grad_(False), head.requires_grad_(False)


@torch.no_grad()
def soft_threshold(parameters: list[nn.Parameter], step: float) -> None:
    """Shrink every entry towards zero by `step`, to exactly zero where it is smaller: the proximal operator
    of step·‖·‖₁ (Parikh, Boyd, "Proximal algorithms", 2014, section 6.5.2)."""
    for parameter in parameters:
        parameter.copy_(parameter.sign() * (parameter.abs() - step).clamp_min(0.0))


@torch.no_grad()
def set_head_to_class_means(luca: LuCA, head: CosineHead, x_ND: Tensor, label_N: Tensor) -> None:
    """Replace each head row by the mean module output of its class."""
    out_ND = luca(x_ND)
    sums_KD = torch.zeros_like(head.weight_KD).index_add_(0, label_N, out_ND)
    count_K = torch.bincount(label_N, minlength=sums_KD.shape[0]).clamp_min(1)
    head.weight_KD.copy_(sums_KD / count_K[:, None])


def _optimiser(recipe: Recipe, luca: LuCA, head: CosineHead) -> torch.optim.Optimizer:
    weights = [*luca.parameters(), head.weight_KD]
    if recipe.optimiser == "sgd":
        return torch.optim.SGD([*weights, head.scale], lr=recipe.learning_rate, momentum=0.9)
    groups = [
        {"params": weights, "weight_decay": recipe.weight_decay},
        {"params": [head.scale], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, fused=True)
