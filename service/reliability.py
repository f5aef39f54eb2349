"""Accuracy and expected calibration error of labelled answers, one at a time and in constant memory."""

import math

from model_store.calibration import NUM_BINS


class Reliability:
    """Running sums of confidence and correctness by bins of confidence.

    The ECE is that of `model_store.calibration.expected_calibration_error` over the same answers.
    """

    def __init__(self) -> None:
        self._gap_of_bin = [0.0] * NUM_BINS  # sum of correctness − confidence
        self._num_correct = 0
        self.num_labels = 0

    def add(self, confidence: float, *, is_correct: bool) -> None:
        """Take in one answer with `confidence` in [0, 1] whose true label is known."""
        bin_ = min(max(math.ceil(confidence * NUM_BINS), 1), NUM_BINS) - 1
        self._gap_of_bin[bin_] += is_correct - confidence
        self._num_correct += is_correct
        self.num_labels += 1

    @property
    def accuracy(self) -> float | None:
        """Share of right answers in [0, 1]; None without labels."""
        return self._num_correct / self.num_labels if self.num_labels else None

    @property
    def ece(self) -> float | None:
        """Expected calibration error in [0, 1]; None without labels."""
        return sum(map(abs, self._gap_of_bin)) / self.num_labels if self.num_labels else None
