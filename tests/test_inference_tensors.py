"""Tensors of the Open Inference Protocol: what is written is read back, and nothing else is read."""

import asyncio
import json
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from starlette.datastructures import Headers

from model_store.errors import InvalidRequest, ToscaError
from service.open_inference.http_bodies import HEADER_LENGTH, read_infer_body
from service.open_inference.tensors import InputTensor, OutputTensor, read_elements, read_floats
from service.settings import Settings

SETTINGS = Settings.model_construct()
TEXTS = st.lists(st.text(max_size=20), max_size=8)


@given(TEXTS)
def test_texts_survive_the_wire(texts: list[str]) -> None:
    written = OutputTensor.of_texts("label", texts)
    read = read_elements(InputTensor("label", "BYTES", written.shape, written.raw))
    assert [one.decode() for one in read] == texts == written.listed


@given(arrays.arrays(np.float32, arrays.array_shapes(min_dims=1, max_dims=3), elements=st.floats(width=32)))
def test_numbers_survive_the_wire_bit_for_bit(values: np.ndarray) -> None:
    written = OutputTensor.of_numbers("cls", values)
    read = read_floats(InputTensor("cls", "FP32", written.shape, written.raw), values.shape[1:])
    np.testing.assert_array_equal(read, values)


@given(st.binary(max_size=60))
def test_raw_elements_are_read_whole_or_not_at_all(raw: bytes) -> None:
    for num in range(4):
        try:
            elements = read_elements(InputTensor("image", "BYTES", (num,), raw))
        except InvalidRequest:
            continue
        assert b"".join(len(one).to_bytes(4, "little") + one for one in elements) == raw
        assert len(elements) == num


def test_raw_numbers_are_little_endian_and_flags_one_byte() -> None:
    assert OutputTensor.of_numbers("p_value", [1.0, -2.0]).raw == b"\x00\x00\x80\x3f\x00\x00\x00\xc0"
    assert OutputTensor.of_flags("abstained", [True, False]).raw == b"\x01\x00"


@pytest.mark.parametrize(
    "data",
    [b"\0" * 7, [1.0], [[1.0, 2.0], [3.0]], ["1", "x"], [None, 1.0], [10**400, 1], [True, 1.0], [{}, 1.0]],
)
def test_what_is_no_row_of_two_numbers_is_refused(data: bytes | list[object]) -> None:
    with pytest.raises(InvalidRequest, match="input 'cls' holds"):
        read_floats(InputTensor("cls", "FP32", (1, 2), data), (2,))


def test_texts_among_numbers_take_no_memory() -> None:
    """Of texts NumPy makes an array in which each is as wide as the longest: here 64 MiB."""
    tensor = InputTensor("cls", "FP32", (1, 2), ["x" * 2**14, *[""] * 2**10])
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest, match="holds what is no number"):
            read_floats(tensor, (2,))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200), st.one_of(st.none(), st.integers(-5, 250).map(str), st.text(max_size=5)))
def test_any_body_is_read_or_refused(body: bytes, length: str | None) -> None:
    sound = json.dumps(
        {
            "inputs": [
                {
                    "name": "image",
                    "shape": [1],
                    "datatype": "BYTES",
                    "parameters": {"binary_data_size": len(body)},
                }
            ]
        }
    ).encode()
    for whole, header in ((body, length), (sound + body, str(len(sound)))):
        encoded = [] if header is None else [(HEADER_LENGTH.encode(), header.encode("latin-1", "replace"))]
        try:
            request, _ = asyncio.run(read_infer_body(whole, Headers(raw=encoded), SETTINGS, 100))
        except ToscaError:
            continue
        assert request.inputs
