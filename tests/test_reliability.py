"""Running accuracy and ECE equal those over all answers at once."""

import pytest
import torch

from model_store.calibration import expected_calibration_error
from service.reliability import Reliability


def test_equals_the_error_over_all_answers_at_once() -> None:
    generator = torch.Generator().manual_seed(0)
    confidence_N = torch.rand(500, generator=generator, dtype=torch.float64)
    confidence_N[:3] = torch.tensor([0.0, 1.0, 0.2])  # ends and an edge of the bins
    correct_N = torch.rand(500, generator=generator) < confidence_N**2
    reliability = Reliability()
    for confidence, is_correct in zip(confidence_N.tolist(), correct_N.tolist(), strict=True):
        reliability.add(confidence, is_correct=is_correct)
    assert reliability.num_labels == 500
    assert reliability.accuracy == pytest.approx(float(correct_N.double().mean()))
    assert reliability.ece == pytest.approx(expected_calibration_error(confidence_N, correct_N))


def test_without_labels_nothing_is_claimed() -> None:
    assert Reliability().accuracy is None
    assert Reliability().ece is None
