"""The two ways to fit one LuCA module on cached CLS features: `reference` (the paper's) and `default`."""
# N pictures, B batch, K classes, D features

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.luca import CosineHead, Flow, LuCA

RecipeName = Literal["default", "reference"]
RECIPES: tuple[RecipeName, ...] = get_args(RecipeName)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Hyper-parameters of one fit; the two published instances are REFERENCE and DEFAULT."""

    name: RecipeName
    optimiser: Literal["sgd", "adamw"]
    learning_rate: float
    epochs: int
    batch_size: int
    l1: float
    label_smoothing: float
    initial_scale: float
    identity_start: bool
    weight_decay: float = 0.0


# METHOD: SGD with momentum 0.9, lr 0.025, cosine schedule, 20 epochs, batches of 48, L1 of 5e-4 over all
# module parameters. One departure: the published zero-initialised head has no defined direction.
REFERENCE = Recipe("reference", "sgd", 0.025, 20, 48, 5e-4, 0.0, 10.0, identity_start=False)
DEFAULT = Recipe("default", "adamw", 1e-3, 30, 64, 0.0, 0.05, 16.0, identity_start=True, weight_decay=1e-2)
BY_NAME: dict[RecipeName, Recipe] = {"reference": REFERENCE, "default": DEFAULT}


def fit_module(
    cls_ND: Tensor,
    label_N: Tensor,
    num_classes: int,
    recipe: Recipe,
    generator: torch.Generator,
    flow: Flow = "tosca",
) -> tuple[LuCA, CosineHead]:
    """Fit a module and its head on [N, D] CLS vectors; the same generator state gives the same weights."""
    feature_dim = cls_ND.shape[1]
    luca = LuCA(feature_dim, flow=flow)
    luca.initialise(generator, identity=recipe.identity_start)
    head = CosineHead(feature_dim, num_classes, recipe.initial_scale)
    if recipe.identity_start:
        set_head_to_class_means(luca, head, cls_ND, label_N)
    else:
        with torch.no_grad():
            head.weight_KD.normal_(std=feature_dim**-0.5, generator=generator)
    parameters = [*luca.parameters(), *head.parameters()]
    optimiser: torch.optim.Optimizer
    if recipe.optimiser == "sgd":
        optimiser = torch.optim.SGD(parameters, lr=recipe.learning_rate, momentum=0.9)
    else:
        optimiser = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs)
    for _ in range(recipe.epochs):
        for rows in _shuffled_batches(len(label_N), recipe.batch_size, generator):
            logits_BK = head(luca(cls_ND[rows]))
            loss = F.cross_entropy(logits_BK, label_N[rows], label_smoothing=recipe.label_smoothing)
            if recipe.l1 > 0.0:
                loss = loss + recipe.l1 * torch.stack([p.abs().sum() for p in luca.parameters()]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        schedule.step()
    if recipe.name == "reference":
        set_head_to_class_means(luca, head, cls_ND, label_N)
    return luca.requires_grad_(False), head.requires_grad_(False)


@torch.no_grad()
def set_head_to_class_means(luca: LuCA, head: CosineHead, cls_ND: Tensor, label_N: Tensor) -> None:
    """Replace each head row by the mean module output of its class."""
    out_ND = luca(cls_ND)
    sums_KD = torch.zeros_like(head.weight_KD).index_add_(0, label_N, out_ND)
    count_K = torch.bincount(label_N, minlength=sums_KD.shape[0]).clamp_min(1)
    head.weight_KD.copy_(sums_KD / count_K[:, None])


def _shuffled_batches(size: int, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    yield from torch.randperm(size, generator=generator).split(batch_size)
