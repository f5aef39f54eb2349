"""Banks of random modules, vectors between their classes, and scores of them computed with numpy."""
# B batch, K classes, D features

import numpy as np
import torch
from random_modules import FEATURE_DIM, random_module

from model_store.answers import Answer
from model_store.bank import ModuleBank
from model_store.selection import OUTSIDE_SHARE, PRIOR_IMAGES, SHRINKAGE
from model_store.task_module import TaskModule

TASKS = ("ants", "birds", "cars", "dogs", "elms", "figs")


def random_modules(num_tasks: int, seed: int = 0, **options: object) -> list[TaskModule]:
    return [
        random_module(task, seed=100 * seed + t, num_classes=1 + (seed + t) % 4, **options)  # type: ignore[arg-type]
        for t, task in enumerate(TASKS[:num_tasks])
    ]


def near(bank: ModuleBank, num: int, seed: int = 0) -> torch.Tensor:
    """Vectors between the classes of a bank, so that several tasks are plausible."""
    generator = torch.Generator().manual_seed(seed)
    mean_KD = torch.cat([module.statistics.mean_KD for module in bank.modules])
    first, second = (mean_KD[torch.randint(len(mean_KD), (num,), generator=generator)] for _ in range(2))
    return 0.6 * first + 0.4 * second + 0.3 * torch.randn(num, FEATURE_DIM, generator=generator)


def numpy_scores(bank: ModuleBank, x: np.ndarray) -> np.ndarray:
    """Whitened cosines to every class mean, from the modules' statistics, with explicit roots and inverses."""
    means = np.concatenate([module.statistics.mean_KD.numpy() for module in bank.modules]).astype(np.float64)
    scatter = np.zeros((FEATURE_DIM, FEATURE_DIM))
    for module in bank.modules:
        packed = np.rint(module.statistics.scatter().numpy() * 2**20) / 2**20
        upper = np.zeros_like(scatter)
        upper[np.triu_indices(FEATURE_DIM)] = packed
        scatter += upper + np.triu(upper, 1).T
    freedom = sum(int(module.statistics.count_K.sum()) for module in bank.modules) - len(means)
    weight = (1 - SHRINKAGE) / (freedom + PRIOR_IMAGES)
    variance = np.trace(scatter) / FEATURE_DIM / freedom
    covariance = weight * scatter + (weight * PRIOR_IMAGES + SHRINKAGE) * variance * np.eye(FEATURE_DIM)
    values, vectors = np.linalg.eigh(covariance)
    whiten = vectors @ np.diag(values**-0.5) @ vectors.T
    u, m = (x - means.mean(axis=0)) @ whiten, (means - means.mean(axis=0)) @ whiten
    inside = u @ np.linalg.pinv(m, rcond=1e-9) @ m
    return m @ u / np.linalg.norm(m, axis=1) / np.sqrt(inside @ inside + OUTSIDE_SHARE * u @ u)


def numpy_task_log_probs(bank: ModuleBank, x: np.ndarray) -> np.ndarray:
    """log P(task | x): a softmax over all classes, summed within the tasks."""
    if sum(len(module.labels) for module in bank.modules) == 1:
        return np.zeros(1)
    owner = np.concatenate([[t] * len(module.labels) for t, module in enumerate(bank.modules)])
    score = bank.blend.sharpness * numpy_scores(bank, x)
    weight = np.exp(score - score.max())
    prob = np.array([weight[owner == t].sum() for t in range(len(bank.modules))]) / weight.sum()
    return np.log(np.maximum(prob, 1e-300))


def listed(answer: Answer) -> list[tuple[float, str, str]]:
    return [
        (answer.confidence, answer.task, answer.label),
        *((one.probability, one.task, one.label) for one in answer.alternatives),
    ]
