"""Split-conformal statements: how unusual a picture is for its task, and which labels cannot be ruled out.

Both hold for pictures that are exchangeable with the calibration vectors, whatever the scores are worth;
better scores make the statements sharper, not truer. Source: Vovk, Gammerman, Shafer, "Algorithmic Learning
in a Random World" (2005).
"""
# B batch, N and M calibration vectors

import math

import torch
from torch import Tensor

from model_store.errors import InvalidRequest


def conformal_p_values(score_B: Tensor, sorted_score_M: Tensor) -> Tensor:
    """[B] float64 p-values (1 + #{known scores ≤ score}) / (M + 1), in (0, 1]; 1 without known scores.

    For a picture like the M known ones P(p ≤ α) ≤ α. `sorted_score_M` ascends; low scores are unusual.
    """
    not_above_B = torch.searchsorted(sorted_score_M, score_B.contiguous(), right=True)
    return (1.0 + not_above_B.double()) / (len(sorted_score_M) + 1)


def coverage_threshold(sorted_probability_N: Tensor, coverage: float) -> float:
    """The least probability a label may have and still belong to the prediction set.

    The set of all labels at least that probable contains the truth with probability ≥ `coverage`, in
    (0, 1): the least ambiguous sets of Sadinle, Lei, Wasserman (JASA 2019, arXiv 1609.00451).
    `sorted_probability_N` are the probabilities that known pictures gave their true labels, ascending.
    Raises InvalidRequest when there are too few of them for such a coverage.
    """
    if not 0.0 < coverage < 1.0:
        raise InvalidRequest(f"coverage is {coverage:g}, expected more than 0 and less than 1")
    num_known = len(sorted_probability_N)
    rank = math.floor((1.0 - coverage) * (num_known + 1) + 1e-9)
    if rank < 1:
        needed = math.ceil(1.0 / (1.0 - coverage) - 1e-9) - 1
        raise InvalidRequest(
            f"coverage {coverage:g} needs at least {needed} calibration vectors, there are {num_known}"
        )
    return float(sorted_probability_N[rank - 1])
