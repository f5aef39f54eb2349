"""A sparse matrix as a file holds it: a bit for each entry, set where it is not zero, and those values."""
# R rows, C columns, N entries that are not zero, S = ⌈R·C / 8⌉ bytes

import numpy as np
import torch
from torch import Tensor


def pack_sparse(matrix_RC: Tensor) -> tuple[Tensor, Tensor]:
    """(mask [S] uint8, values [N] float16) of a matrix, row by row, the first entry in the highest bit."""
    flat = matrix_RC.detach().cpu().half().flatten()
    present = flat != 0
    return torch.from_numpy(np.packbits(present.numpy())), flat[present]


def unpack_sparse(mask_S: Tensor, value_N: Tensor, shape: tuple[int, int]) -> Tensor:
    """The [R, C] float32 matrix. Raises ValueError when mask and values do not belong together."""
    num_entries = shape[0] * shape[1]
    present = np.unpackbits(mask_S.numpy()).astype(bool)
    if present[num_entries:].any() or int(present.sum()) != len(value_N):
        raise ValueError(f"the mask marks {int(present.sum())} entries, {len(value_N)} values follow")
    matrix = torch.zeros(num_entries)
    matrix[torch.from_numpy(present[:num_entries])] = value_N.float()
    return matrix.view(shape)


def packed_mask_size(num_entries: int) -> int:
    return -(-num_entries // 8)
