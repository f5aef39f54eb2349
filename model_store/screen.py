"""A quick look at the classes of very many tasks: cosines from half-precision directions.

The exact scores of every class cost a pass over K·D numbers of eight bytes for each picture, which a hundred
thousand classes turn into tens of milliseconds. The screen reads two bytes a number, and says within
SCREEN_ERROR where exact scores are needed.
"""
# B batch, K classes, D features

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.class_means import ClassMeans

# No cosine of the screen is further from the exact one. Both unit vectors and the result are rounded to
# bfloat16, each by at most 2^-9 of itself, and Σ |u_i v_i| ≤ 1; a fourth share covers float32 whitening.
SCREEN_ERROR = 4 * 2.0**-9


@dataclass(frozen=True, slots=True)
class ClassScreen:
    """Whitened unit directions of all classes."""

    whiten_DD: Tensor  # float32; x − c becomes (x − c) @ whiten
    direction_KD: Tensor  # bfloat16, unit rows

    @classmethod
    def fit(cls, means: ClassMeans, centre_D: Tensor, root_DD: Tensor) -> "tuple[ClassScreen, Tensor]":
        """The screen for means, their centre and the Cholesky root of the covariance, and the [K] float64
        squared whitened norms of the classes."""
        eye_DD = torch.eye(len(root_DD), dtype=root_DD.dtype)
        whiten_DD = torch.linalg.solve_triangular(root_DD, eye_DD, upper=False).T.float().contiguous()
        direction_KD = torch.empty(len(means), len(root_DD), dtype=torch.bfloat16)
        norm_K = torch.empty(len(means), dtype=torch.float64)
        start = 0
        for mean_CD in means.chunks():
            stop = start + len(mean_CD)
            whitened_CD = (mean_CD.float() - centre_D.float()) @ whiten_DD
            norm_K[start:stop] = (whitened_CD**2).sum(dim=1)
            direction_KD[start:stop] = F.normalize(whitened_CD, dim=1)
            start = stop
        return cls(whiten_DD, direction_KD), norm_K

    def cosines(self, shifted_BD: Tensor) -> Tensor:
        """[B, K] float32 whitened cosines of [B, D] vectors x − c, each within SCREEN_ERROR."""
        unit_BD = F.normalize(shifted_BD.float() @ self.whiten_DD, dim=1)
        return (unit_BD.bfloat16() @ self.direction_KD.T).float()
