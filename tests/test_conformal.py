"""Conformal statements hold for every exchangeable sample, so they can be tested without a model."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_store.conformal import conformal_p_values, coverage_threshold
from model_store.errors import InvalidRequest

scores = st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=40)  # few values, so many ties


@given(scores)
def test_p_values_are_the_share_of_known_scores_no_higher(values: list[float]) -> None:
    known_M = torch.tensor(values[1:]).sort().values
    [p_value] = conformal_p_values(torch.tensor(values[:1]), known_M).tolist()
    no_higher = sum(one <= values[0] for one in values[1:])
    assert p_value == pytest.approx((1 + no_higher) / len(values))


@given(scores, st.floats(0.01, 0.99))
def test_of_exchangeable_scores_at_most_a_share_alpha_has_a_p_value_of_alpha(
    values: list[float], alpha: float
) -> None:
    p_values = []
    for i, one in enumerate(values):
        others = torch.tensor(values[:i] + values[i + 1 :]).sort().values
        p_values += conformal_p_values(torch.tensor([one]), others).tolist()
    assert sum(p_value <= alpha for p_value in p_values) <= alpha * len(values) + 1e-9


def test_without_known_scores_nothing_is_unusual() -> None:
    assert conformal_p_values(torch.tensor([-1e9]), torch.empty(0)).tolist() == [1.0]


@given(st.lists(st.floats(0.0, 1.0), min_size=12, max_size=60), st.floats(0.05, 0.9))
def test_sets_of_exchangeable_pictures_hold_the_truth_as_often_as_asked(
    probabilities: list[float], coverage: float
) -> None:
    held = 0
    for i, one in enumerate(probabilities):
        others = torch.tensor(probabilities[:i] + probabilities[i + 1 :], dtype=torch.float64).sort().values
        held += one >= coverage_threshold(others, coverage)
    assert held >= coverage * len(probabilities) - 1e-9


@pytest.mark.parametrize(("coverage", "needed"), [(0.5, 1), (0.9, 9), (0.95, 19), (0.99, 99)])
def test_a_coverage_needs_its_number_of_vectors(coverage: float, needed: int) -> None:
    assert coverage_threshold(torch.linspace(0.1, 1.0, needed), coverage) == pytest.approx(0.1)
    with pytest.raises(
        InvalidRequest, match=f"at least {needed} calibration vectors, there are {needed - 1}"
    ):
        coverage_threshold(torch.linspace(0.1, 1.0, needed - 1), coverage)


@pytest.mark.parametrize("coverage", [0.0, 1.0, -0.5, 1.5, math.nan])
def test_a_coverage_that_is_none_is_refused(coverage: float) -> None:
    with pytest.raises(InvalidRequest, match="expected more than 0 and less than 1"):
        coverage_threshold(torch.ones(1000), coverage)
