"""The test for drift: exact under exchangeability, watched as often as one likes, and quick to see a change."""
# M known vectors, N pictures

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from model_store.conformal import conformal_p_values
from service.drift import DriftWatch, Gambler

ALARM_RATE = 0.05
WINDOW = 200
NUM_TASKS = 400


def p_values(known_M: np.ndarray, score_N: np.ndarray) -> list[float]:
    sorted_M = torch.from_numpy(np.sort(known_M))
    return conformal_p_values(torch.from_numpy(score_N), sorted_M).tolist()


def alarms(watch: DriftWatch, values: Sequence[float]) -> bool:
    """Whether a watch that is looked at after every picture ever alarms."""
    alarmed = False
    for one in values:
        watch.add(one)
        drift = watch.judge()
        assert drift is not None
        alarmed |= drift.is_drifting
    return alarmed


def share_of_alarms(
    num_known: int, *, shift: float = 0.0, keep: float = 1.0, num_tasks: int = NUM_TASKS
) -> float:
    """Of tasks with known scores ~ N(0, 1), the share that alarms within one window of pictures ~ N(-shift, 1),
    of which the `keep` most typical are chosen for the task."""
    generator = np.random.default_rng(7)
    num_alarms = 0
    for _ in range(num_tasks):
        score_N = generator.normal(-shift, 1.0, size=round(WINDOW / keep))
        score_N = generator.permutation(np.sort(score_N)[-WINDOW:])
        watch = DriftWatch(num_known, WINDOW, ALARM_RATE)
        num_alarms += alarms(watch, p_values(generator.normal(size=num_known), score_N))
    return num_alarms / num_tasks


def test_wealth_is_one_on_average_over_every_sequence_of_the_urn() -> None:
    num_known, num_pictures = 2, 5
    mean, total = 0.0, 0.0
    for cells in itertools.product(range(num_known + 1), repeat=num_pictures):
        gambler, count, probability = Gambler(num_known), [1] * (num_known + 1), 1.0
        for cell in cells:
            probability *= count[cell] / sum(count)
            count[cell] += 1
            gambler.bet(cell)
        total += probability
        mean += probability * math.exp(gambler.log_wealth)
    assert total == pytest.approx(1.0)
    assert mean == pytest.approx(1.0)


@pytest.mark.parametrize("num_known", [8, 128])
def test_exchangeable_pictures_alarm_no_more_often_than_stated_however_often_one_looks(
    num_known: int,
) -> None:
    margin = 3.0 * math.sqrt(ALARM_RATE * (1.0 - ALARM_RATE) / NUM_TASKS)
    assert share_of_alarms(num_known) <= ALARM_RATE + margin


def test_uniform_p_values_would_be_the_wrong_reference() -> None:
    """The largest gap to the uniform distribution passes its own critical value far more often than stated,
    because a few known vectors are not the distribution they were drawn from."""
    generator = np.random.default_rng(7)
    grid = np.arange(1, 129) / 129.0
    critical = math.sqrt(math.log(1.0 / ALARM_RATE) / (2.0 * WINDOW))  # one-sided Kolmogorov–Smirnov
    num_alarms = 0
    for _ in range(NUM_TASKS):
        values = np.array(p_values(generator.normal(size=128), generator.normal(size=WINDOW)))
        num_alarms += (np.mean(values[:, None] <= grid, axis=0) - grid).max() > critical
    assert num_alarms / NUM_TASKS > 3.0 * ALARM_RATE


def test_losing_the_least_typical_pictures_to_other_tasks_is_no_drift() -> None:
    assert share_of_alarms(128, keep=0.9) <= share_of_alarms(128)


def test_pictures_one_standard_deviation_less_typical_are_noticed() -> None:
    assert share_of_alarms(128, shift=1.0, num_tasks=50) == 1.0


def test_an_alarm_lasts_until_a_whole_window_is_sound_again() -> None:
    generator = np.random.default_rng(3)
    known_M = generator.normal(size=128)
    watch = DriftWatch(128, WINDOW, 1e-3)
    sound = p_values(known_M, generator.normal(size=2 * WINDOW))
    assert alarms(watch, p_values(known_M, generator.normal(-2.0, 1.0, size=WINDOW)))
    assert alarms(watch, sound[:WINDOW])
    assert not alarms(watch, sound[WINDOW:])


def test_judgement_is_about_the_last_two_windows() -> None:
    watch = DriftWatch(9, 4, 1e-3)
    for p_value in [0.1] * 4 + [0.5] * 4 + [0.9] * 2:
        watch.add(p_value)
    drift = watch.judge()
    assert drift is not None
    assert drift.num_pictures == 6
    assert drift.mean_p_value == pytest.approx((4 * 0.5 + 2 * 0.9) / 6)
    assert drift.p_value == pytest.approx(10.0**-drift.log10_wealth)


def test_without_known_vectors_or_pictures_there_is_no_judgement() -> None:
    assert DriftWatch(9, 4, 1e-3).judge() is None
    blind = DriftWatch(0, 4, 1e-3)
    blind.add(1.0)
    assert blind.judge() is None


def test_endless_drift_does_not_overflow() -> None:
    watch = DriftWatch(128, 100_000, 1e-3)
    for _ in range(5000):
        watch.add(1.0 / 129.0)
    drift = watch.judge()
    assert drift is not None
    assert math.isfinite(drift.log10_wealth)
    assert 0.0 <= drift.p_value < 1e-30
