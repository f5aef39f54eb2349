"""A quick look at the classes of very many tasks: cosines from half-precision directions.

The exact scores of every class cost a pass over K·D numbers of eight bytes for each picture, which a hundred
thousand classes turn into tens of milliseconds. The screen reads two bytes a number, and says within
SCREEN_ERROR where exact scores are needed.
"""
# B batch, K classes, C classes of a block, D features

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.class_means import ClassMeans
from model_store.compute_threads import side_by_side

# No cosine of the screen is further from the exact one. Both unit vectors and the result are rounded to
# bfloat16, each by at most 2^-9 of itself, and Σ |u_i v_i| ≤ 1; a fourth share covers float32 whitening.
SCREEN_ERROR = 4 * 2.0**-9
_BLOCKS_A_PART = 4  # some 8,000 classes, which one thread looks at in one go


@dataclass(frozen=True, slots=True)
class ScreenBlock:
    """Some tasks' classes: bfloat16 unit directions, and float64 squared whitened norms."""

    direction_CD: Tensor
    norm_C: Tensor


@dataclass(frozen=True, slots=True)
class ClassScreen:
    """Whitened unit directions of all classes, in the blocks of their class means."""

    centre_D: Tensor
    whiten_DD: Tensor  # float32; x − c becomes (x − c) @ whiten
    blocks: dict[tuple[str, ...], ScreenBlock]  # in order, by the digests of their modules

    @classmethod
    def fit(cls, means: ClassMeans, centre_D: Tensor, root_DD: Tensor) -> "ClassScreen":
        """The screen for means, their centre and the Cholesky root of the covariance."""
        eye_DD = torch.eye(len(root_DD), dtype=root_DD.dtype)
        whiten_DD = torch.linalg.solve_triangular(root_DD, eye_DD, upper=False).T.float().contiguous()
        return cls(centre_D, whiten_DD, {}).over(means)

    def over(self, means: ClassMeans) -> "ClassScreen":
        """The screen of other classes in the same metric; blocks that are the same are shared."""
        blocks = {}
        for block in means.blocks():
            known = self.blocks.get(block.sha256s)
            blocks[block.sha256s] = known or self._block(means.of_block(block))
        return ClassScreen(self.centre_D, self.whiten_DD, blocks)

    def _block(self, mean_CD: Tensor) -> ScreenBlock:
        whitened_CD = (mean_CD.float() - self.centre_D.float()) @ self.whiten_DD
        norm_C = (whitened_CD**2).sum(dim=1).double()
        return ScreenBlock(F.normalize(whitened_CD, dim=1).bfloat16(), norm_C)

    @property
    def norm_K(self) -> Tensor:  # noqa: N802
        return torch.cat([block.norm_C for block in self.blocks.values()])

    def cosines(self, shifted_BD: Tensor) -> Tensor:
        """[B, K] float32 whitened cosines of [B, D] vectors x − c, each within SCREEN_ERROR."""
        unit_BD = F.normalize(shifted_BD.float() @ self.whiten_DD, dim=1).bfloat16()
        blocks = list(self.blocks.values())

        def cosines_of(start: int) -> Tensor:
            some = blocks[start : start + _BLOCKS_A_PART]
            return torch.cat([unit_BD @ block.direction_CD.T for block in some], dim=1)

        parts = side_by_side(cosines_of, range(0, len(blocks), _BLOCKS_A_PART))
        return torch.cat(parts, dim=1).float()
