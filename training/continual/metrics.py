"""The figures of continual learning: accuracy after every task, forgetting, transfer, calibration."""
# N pictures, L labels, B steps (tasks learnt)

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from model_store.calibration import (
    NUM_BINS,
    brier_score,
    expected_calibration_error,
    negative_log_likelihood,
)
from training.continual.method import Predictions

_LEAST_PROBABILITY = 1e-12  # a probability of 0 for the truth would cost infinitely many nats


@dataclass(frozen=True, slots=True)
class Calibration:
    """How true stated probabilities are: ECE in [0, 1] over 15 bins, Brier in [0, 2], NLL in nats."""

    ece: float
    brier: float
    nll: float


@dataclass(frozen=True, slots=True)
class StreamScores:
    """Figures of a whole stream. `accuracy_by_step[b][j]` is a_{b,j}, task j after b + 1 tasks."""

    average_accuracy: float
    last_accuracy: float
    forgetting: float
    backward_transfer: float


def summarise_stream(step_accuracy: Sequence[float], matrix: Sequence[Sequence[float]]) -> StreamScores:
    """From A_b, the accuracy over all classes after every task, and the rows a_{b,0} … a_{b,b}.

    Average accuracy is the mean of A_b, last accuracy A_B; forgetting the mean over j < B of
    max_b a_{b,j} − a_{B,j}; backward transfer the mean over j < B of a_{B,j} − a_{j,j}.
    """
    num_steps = len(step_accuracy)
    assert [len(row) for row in matrix] == list(range(1, num_steps + 1)), "one row a step, one entry a task"
    last, earlier = matrix[-1], range(num_steps - 1)
    best = [max(row[j] for row in matrix[j:]) for j in earlier]
    return StreamScores(
        average_accuracy=math.fsum(step_accuracy) / num_steps,
        last_accuracy=step_accuracy[-1],
        forgetting=_mean([best[j] - last[j] for j in earlier]),
        backward_transfer=_mean([last[j] - matrix[j][j] for j in earlier]),
    )


def measure_calibration(predictions: Predictions, label_N: Tensor) -> Calibration | None:
    """None for a method without probabilities."""
    if predictions.prob_NL is None or predictions.confidence_N is None:
        return None
    log_prob_NL = predictions.prob_NL.double().clamp_min(_LEAST_PROBABILITY).log()
    return Calibration(
        ece=expected_calibration_error(predictions.confidence_N, predictions.label_N == label_N),
        brier=brier_score(predictions.prob_NL.double(), label_N),
        nll=negative_log_likelihood(log_prob_NL, label_N),
    )


def reliability(confidence_N: Tensor, correct_N: Tensor) -> list[tuple[int, float, float]]:
    """(count, mean confidence, accuracy) of each of the 15 bins that the ECE is taken over."""
    bin_N = (confidence_N.double() * NUM_BINS).ceil().long().clamp(1, NUM_BINS) - 1
    rows = []
    for k in range(NUM_BINS):
        inside_N = bin_N == k
        count = int(inside_N.sum())
        mean = float(confidence_N[inside_N].double().mean()) if count else 0.0
        rows.append((count, mean, float(correct_N[inside_N].double().mean()) if count else 0.0))
    return rows


def area_under_roc(known_N: Tensor, unknown_M: Tensor) -> float:
    """Probability that a known picture scores above an unknown one, ties counting half; in [0, 1]."""
    sorted_M = unknown_M.sort().values
    below_N = torch.searchsorted(sorted_M, known_N.contiguous(), right=False)
    not_above_N = torch.searchsorted(sorted_M, known_N.contiguous(), right=True)
    return float((below_N + not_above_N).double().mean()) / (2.0 * len(unknown_M))


def false_positives_at_95(known_N: Tensor, unknown_M: Tensor) -> float:
    """Share of unknown pictures that pass the highest score which at least 95 % of the known ones reach."""
    level = known_N.sort().values[math.floor(0.05 * len(known_N))]
    return share(unknown_M >= level)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the standard deviation of a sample (n − 1); 0 for a single value."""
    spread = torch.tensor(values, dtype=torch.float64)
    return float(spread.mean()), float(spread.std()) if len(values) > 1 else 0.0


def share(right_N: Tensor) -> float:
    return float(right_N.double().mean())


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0
