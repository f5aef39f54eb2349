"""A quick look at the classes of very many tasks: cosines from directions rounded to a byte a number.

The exact scores of every class cost a pass over K·D numbers of eight bytes for each picture, which a hundred
thousand classes turn into tens of milliseconds. The screen reads one byte a number, and says how far from the
exact cosines its own may be, which tells where exact scores are needed.
"""
# B batch, K classes, C classes of a block, D features, R any vectors

import platform
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812

from model_store.class_means import ClassMeans
from model_store.compute_threads import side_by_side

# Integers where torch multiplies them with the processor's own instructions; elsewhere two bytes a number.
_HAS_INTEGER_PRODUCTS = platform.machine() in {"x86_64", "AMD64"}
# For what rounding the directions does not explain: whitening in float32, and products rounded to bfloat16.
_COMPUTING_ERROR = 2 * 2.0**-9
_BLOCKS_A_PART = 4  # some 8,000 classes, which one thread looks at in one go


@dataclass(frozen=True, slots=True)
class Rounded:
    """Unit vectors as numbers · scale, each no further from itself than its error."""

    number_RD: Tensor  # int8 or bfloat16
    scale_R: Tensor
    error_R: Tensor

    @classmethod
    def of(cls, unit_RD: Tensor) -> "Rounded":
        if _HAS_INTEGER_PRODUCTS:
            scale_R = unit_RD.abs().amax(dim=1).clamp_min(1e-30) / 127.0
            number_RD = (unit_RD / scale_R[:, None]).round_().to(torch.int8)
        else:
            scale_R = unit_RD.new_ones(len(unit_RD))
            number_RD = unit_RD.bfloat16()
        off_RD = unit_RD - number_RD.float() * scale_R[:, None]
        return cls(number_RD, scale_R, off_RD.norm(dim=1))

    def products(self, other: "Rounded") -> Tensor:
        """[R, R of the other] float32 scalar products, by this thread alone."""
        if self.number_RD.dtype == torch.int8:
            product_RR = torch._int_mm(self.number_RD, other.number_RD.T).float()
        else:
            product_RR = (self.number_RD @ other.number_RD.T).float()
        return product_RR.mul_(self.scale_R[:, None]).mul_(other.scale_R)


@dataclass(frozen=True, slots=True)
class ScreenBlock:
    """Some tasks' classes: whitened unit directions, and float64 squared whitened norms."""

    direction: Rounded
    norm_C: Tensor
    max_error: float


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
        whiten_DD = torch.linalg.solve_triangular(root_DD, eye_DD, upper=False).T.float()
        return cls(centre_D, whiten_DD @ _turning(len(root_DD)), {}).over(means)

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
        direction = Rounded.of(F.normalize(whitened_CD, dim=1))
        return ScreenBlock(direction, norm_C, float(direction.error_R.max()))

    @property
    def norm_K(self) -> Tensor:  # noqa: N802
        return torch.cat([block.norm_C for block in self.blocks.values()])

    def rounded(self, shifted_BD: Tensor) -> Rounded:
        """The whitened unit directions of [B, D] vectors x − c."""
        return Rounded.of(F.normalize(shifted_BD.float() @ self.whiten_DD, dim=1))

    def error(self, picture: Rounded) -> Tensor:
        """[B] bounds: no cosine of the screen is further from the exact one.

        û·v̂ − u·v = û·(v̂ − v) + (û − u)·v, and u and v have length 1.
        """
        class_error = max(block.max_error for block in self.blocks.values())
        return picture.error_R + (1.0 + picture.error_R) * class_error + _COMPUTING_ERROR

    def cosines(self, picture: Rounded) -> Tensor:
        """[B, K] float32 whitened cosines, each within `error`."""
        blocks = list(self.blocks.values())

        def cosines_of(start: int) -> Tensor:
            some = blocks[start : start + _BLOCKS_A_PART]
            return torch.cat([picture.products(block.direction) for block in some], dim=1)

        return torch.cat(side_by_side(cosines_of, range(0, len(blocks), _BLOCKS_A_PART)), dim=1)


@cache
def _turning(feature_dim: int) -> Tensor:
    """[D, D] a rotation at random, always the same. Cosines do not change, but no direction has a few large
    numbers that its others would be rounded by."""
    generator = torch.Generator().manual_seed(0)
    normal_DD = torch.randn(feature_dim, feature_dim, dtype=torch.float64, generator=generator)
    turning_DD: Tensor = torch.linalg.qr(normal_DD).Q.float()
    return turning_DD
