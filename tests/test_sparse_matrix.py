"""The stored form of sparse matrices: exact bytes, and nothing lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model_store.sparse_matrix import pack_sparse, packed_mask_size, unpack_sparse


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 1000), st.floats(0.0, 1.0))
def test_packing_loses_nothing_that_float16_holds(rows: int, columns: int, seed: int, density: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    present = torch.rand(rows, columns, generator=generator) < density
    matrix = (torch.randn(rows, columns, generator=generator) * present).half().float()
    mask, values = pack_sparse(matrix)
    assert len(mask) == packed_mask_size(rows * columns) and len(values) == int((matrix != 0).sum())
    assert torch.equal(unpack_sparse(mask, values, (rows, columns)), matrix)


def test_the_first_entry_is_the_highest_bit() -> None:
    mask, values = pack_sparse(torch.tensor([[1.5, 0.0, 0.0], [0.0, -2.0, 0.0], [0.0, 0.0, 3.0]]))
    assert mask.tolist() == [0b10001000, 0b10000000]
    assert values.tolist() == [1.5, -2.0, 3.0] and values.dtype == torch.float16


def test_mask_and_values_must_belong_together() -> None:
    mask, values = pack_sparse(torch.eye(3))
    with pytest.raises(ValueError, match="marks 3 entries, 2 values follow"):
        unpack_sparse(mask, values[:2], (3, 3))
    mask[1] |= 1  # a bit beyond the last entry
    with pytest.raises(ValueError, match="marks 4 entries"):
        unpack_sparse(mask, torch.ones(4), (3, 3))
