"""Making confidences true, and measuring how true they are."""
# M calibration vectors, N predictions, K classes, D features

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

TEMPERATURE_RANGE = (0.05, 100.0)
NUM_BINS = 15


@dataclass(frozen=True, slots=True)
class CalibrationSet:
    """A few CLS vectors of one task, kept to calibrate and to test the module wherever it is loaded.

    `cls_MD` float16 vectors, `label_M` their classes, `logits_MK` the finished module's logits on them
    (the golden outputs), `held_out_logits_MK` logits of a module that never saw the vector, and
    `in_statistics_M` whether the vector is also part of the class statistics.
    """

    cls_MD: Tensor
    label_M: Tensor
    logits_MK: Tensor
    held_out_logits_MK: Tensor
    in_statistics_M: Tensor

    def __len__(self) -> int:
        return self.label_M.shape[0]


def minimise_over_log_scale(
    loss: Callable[[float], float], low: float, high: float, steps: int = 30
) -> float:
    """Golden-section search of a unimodal loss over [low, high] on a log scale; deterministic."""
    a, b = math.log(low), math.log(high)
    ratio = (math.sqrt(5.0) - 1.0) / 2.0
    c, d = b - ratio * (b - a), a + ratio * (b - a)
    loss_c, loss_d = loss(math.exp(c)), loss(math.exp(d))
    for _ in range(steps):
        if loss_c <= loss_d:
            b, d, loss_d = d, c, loss_c
            c = b - ratio * (b - a)
            loss_c = loss(math.exp(c))
        else:
            a, c, loss_c = c, d, loss_d
            d = a + ratio * (b - a)
            loss_d = loss(math.exp(d))
    return math.exp((a + b) / 2.0)


def negative_log_likelihood(log_prob_NK: Tensor, label_N: Tensor) -> float:
    """Mean −log p of the true class, nats."""
    return float(-log_prob_NK.gather(1, label_N[:, None]).mean())


def fit_temperature(logits_NK: Tensor, label_N: Tensor) -> float:
    """The T > 0 that minimises the negative log-likelihood of softmax(logits / T) (Guo et al. 2017).

    Bounded by TEMPERATURE_RANGE, because separable data would drive it to zero; 1.0 without data.
    """
    if label_N.numel() == 0 or logits_NK.shape[1] < 2:
        return 1.0
    logits_NK = logits_NK.double()

    def loss(temperature: float) -> float:
        return negative_log_likelihood(torch.log_softmax(logits_NK / temperature, dim=1), label_N)

    return minimise_over_log_scale(loss, *TEMPERATURE_RANGE)


def expected_calibration_error(confidence_N: Tensor, correct_N: Tensor, num_bins: int = NUM_BINS) -> float:
    """ECE in [0, 1]: mean |accuracy − confidence| over equal-width bins, weighted by their counts."""
    if confidence_N.numel() == 0:
        return 0.0
    confidence_N, correct_N = confidence_N.double(), correct_N.double()
    bin_N = (confidence_N * num_bins).ceil().long().clamp(1, num_bins) - 1
    gap = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bin_N, correct_N - confidence_N)
    return float(gap.abs().sum() / confidence_N.numel())


def brier_score(prob_NK: Tensor, label_N: Tensor) -> float:
    """Mean squared distance between the probability vector and the true one-hot vector, in [0, 2]."""
    true_NK = torch.nn.functional.one_hot(label_N, prob_NK.shape[1]).to(prob_NK.dtype)
    return float(((prob_NK - true_NK) ** 2).sum(dim=1).mean())
