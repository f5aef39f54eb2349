"""Temperature and calibration figures against hand computations."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model_store.calibration import (
    NUM_BINS,
    TEMPERATURE_RANGE,
    brier_score,
    expected_calibration_error,
    fit_temperature,
    minimise_over_log_scale,
    negative_log_likelihood,
)


def sampled_labels(prob_NK: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.multinomial(prob_NK, 1, generator=torch.Generator().manual_seed(seed)).squeeze(1)


@pytest.mark.parametrize("temperature", [0.3, 1.0, 4.0, 25.0])
def test_temperature_recovers_the_one_that_made_the_labels(temperature: float) -> None:
    logits_NK = 3.0 * temperature * torch.randn(20_000, 5, generator=torch.Generator().manual_seed(0))
    label_N = sampled_labels(torch.softmax(logits_NK / temperature, dim=1), seed=1)
    assert fit_temperature(logits_NK, label_N) == pytest.approx(temperature, rel=0.04)


@pytest.mark.parametrize("factor", [0.25, 3.0, 8.0])
def test_scaled_logits_need_the_scaled_temperature(factor: float) -> None:
    logits_NK = 2.0 * torch.randn(500, 4, generator=torch.Generator().manual_seed(0))
    label_N = sampled_labels(torch.softmax(logits_NK, dim=1), seed=1)
    expected = factor * fit_temperature(logits_NK, label_N)
    assert fit_temperature(factor * logits_NK, label_N) == pytest.approx(expected, rel=1e-4)


def test_fitted_temperature_has_the_least_loss_of_a_grid() -> None:
    logits_NK = 5.0 * torch.randn(300, 6, generator=torch.Generator().manual_seed(2))
    label_N = sampled_labels(torch.softmax(logits_NK / 2.0, dim=1), seed=3)

    def loss(temperature: float) -> float:
        return negative_log_likelihood(torch.log_softmax(logits_NK.double() / temperature, dim=1), label_N)

    best = min(loss(temperature) for temperature in np.geomspace(*TEMPERATURE_RANGE, 2000))
    assert loss(fit_temperature(logits_NK, label_N)) <= best + 1e-7


def test_separable_logits_stop_at_the_lowest_temperature() -> None:
    logits_NK = torch.eye(3)
    assert fit_temperature(logits_NK, torch.arange(3)) == pytest.approx(TEMPERATURE_RANGE[0], rel=1e-3)


def test_wrong_logits_stop_at_the_highest_temperature() -> None:
    assert fit_temperature(-torch.eye(3), torch.arange(3)) == pytest.approx(TEMPERATURE_RANGE[1], rel=1e-3)


def test_temperature_is_one_without_evidence() -> None:
    assert fit_temperature(torch.empty(0, 3), torch.empty(0, dtype=torch.int64)) == 1.0
    assert fit_temperature(torch.randn(4, 1), torch.zeros(4, dtype=torch.int64)) == 1.0


@given(minimum=st.floats(0.06, 90.0))
@settings(max_examples=40, deadline=None)
def test_golden_section_finds_the_minimum(minimum: float) -> None:
    found = minimise_over_log_scale(lambda x: (math.log(x) - math.log(minimum)) ** 2, 0.05, 100.0)
    assert found == pytest.approx(minimum, rel=1e-4)


@pytest.mark.parametrize(("loss", "end"), [(lambda x: x, 0.05), (lambda x: -x, 100.0)])
def test_golden_section_of_a_slope_goes_to_its_end(loss: object, end: float) -> None:
    assert minimise_over_log_scale(loss, 0.05, 100.0) == pytest.approx(end, rel=1e-4)  # type: ignore[arg-type]


def test_uniform_prediction_has_loss_log_k() -> None:
    log_prob_NK = torch.log_softmax(torch.zeros(4, 9), dim=1)
    assert negative_log_likelihood(log_prob_NK, torch.tensor([0, 3, 8, 1])) == pytest.approx(math.log(9))


def test_ece_equals_a_hand_computation() -> None:
    # Two bins hold predictions: 0.62, 0.64 (one of two right) and 0.91, 0.92, 0.93 (all right).
    confidence_N = torch.tensor([0.62, 0.64, 0.91, 0.92, 0.93])
    correct_N = torch.tensor([True, False, True, True, True])
    expected = 2 / 5 * abs(0.5 - 0.63) + 3 / 5 * abs(1.0 - 0.92)
    assert expected_calibration_error(confidence_N, correct_N) == pytest.approx(expected, abs=1e-6)


def test_ece_equals_a_loop_over_bins() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence_N = torch.rand(400, generator=generator)
    correct_N = torch.rand(400, generator=generator) < confidence_N**2
    c, right = confidence_N.numpy().astype(np.float64), correct_N.numpy()
    expected = 0.0
    for b in range(NUM_BINS):
        members = (c > b / NUM_BINS) & (c <= (b + 1) / NUM_BINS)
        if members.any():
            expected += members.mean() * abs(right[members].mean() - c[members].mean())
    assert expected_calibration_error(confidence_N, correct_N) == pytest.approx(expected, abs=1e-9)


def test_perfect_calibration_has_ece_zero() -> None:
    confidence_N = torch.tensor([0.75] * 4 + [0.5] * 2 + [1.0] * 3)
    correct_N = torch.tensor([True, True, True, False, True, False, True, True, True])
    assert expected_calibration_error(confidence_N, correct_N) == pytest.approx(0.0, abs=1e-12)


def test_certain_and_always_wrong_has_ece_one() -> None:
    assert expected_calibration_error(torch.ones(5), torch.zeros(5, dtype=torch.bool)) == 1.0


def test_ece_of_confidence_zero_belongs_to_the_first_bin() -> None:
    assert expected_calibration_error(torch.zeros(2), torch.tensor([True, True])) == 1.0


def test_ece_of_nothing_is_zero() -> None:
    assert expected_calibration_error(torch.empty(0), torch.empty(0, dtype=torch.bool)) == 0.0


@pytest.mark.parametrize(
    ("prob", "label", "score"),
    [([1.0, 0.0], 0, 0.0), ([1.0, 0.0], 1, 2.0), ([0.25] * 4, 2, 0.75), ([0.8, 0.2], 0, 0.08)],
)
def test_brier_score_equals_a_hand_computation(prob: list[float], label: int, score: float) -> None:
    assert brier_score(torch.tensor([prob]), torch.tensor([label])) == pytest.approx(score, abs=1e-6)


def test_brier_score_is_the_mean_over_predictions() -> None:
    prob_NK = torch.tensor([[1.0, 0.0], [0.5, 0.5]])
    assert brier_score(prob_NK, torch.tensor([1, 0])) == pytest.approx((2.0 + 0.5) / 2)
