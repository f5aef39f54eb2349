"""An epoch: what the tasks of one revision say together, kept for the revisions after it.

The pooled covariance, the centre and the blend depend on all tasks. In an epoch they are those of the tasks
that began it, so that a further task costs what it adds itself, however many there are.
"""
# D features, N calibration vectors

from dataclasses import dataclass

from torch import Tensor

from model_store.blend import Blend
from model_store.statistics import PooledStatistics


@dataclass(frozen=True, slots=True)
class Epoch:
    """What depends on all tasks together, as the modules `sha256s` have it."""

    pooled: PooledStatistics
    centre_D: Tensor  # float64, the mean of their class means
    blend: Blend
    true_probability_N: Tensor  # float64, see ModuleBank
    sha256s: frozenset[str]
