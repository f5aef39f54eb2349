"""Tensors as the protocol carries them: raw little-endian bytes, or lists of values."""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from model_store.errors import InvalidRequest

MAX_SIDES = 8  # of a shape; the product of many large ones takes seconds
_LENGTH = struct.Struct("<I")  # before every element of a raw BYTES tensor


@dataclass(frozen=True, slots=True)
class InputTensor:
    """A tensor that a client sends: `data` is raw bytes, or its values as a list, nested or flat."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: bytes | list[Any]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """A tensor of an answer: BYTES as a list, FP32 and BOOL as an array."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: list[bytes] | NDArray[Any]

    @classmethod
    def of_texts(cls, name: str, texts: Sequence[str]) -> "OutputTensor":
        return cls(name, "BYTES", (len(texts),), [one.encode() for one in texts])

    @classmethod
    def of_numbers(cls, name: str, values: Any) -> "OutputTensor":
        array = np.asarray(values, dtype=np.float32)
        return cls(name, "FP32", array.shape, array)

    @classmethod
    def of_flags(cls, name: str, values: Sequence[bool]) -> "OutputTensor":
        return cls(name, "BOOL", (len(values),), np.asarray(values, dtype=np.bool_))

    @property
    def raw(self) -> bytes:
        """Little-endian numbers, flags of one byte, or elements behind their lengths."""
        if isinstance(self.values, list):
            return b"".join(_LENGTH.pack(len(one)) + one for one in self.values)
        little_endian = self.values.dtype.newbyteorder("<")
        return self.values.astype(little_endian, copy=False).tobytes()

    @property
    def listed(self) -> list[Any]:
        """The values in row-major order, texts as such."""
        if isinstance(self.values, list):
            return [one.decode() for one in self.values]
        values: list[Any] = self.values.ravel().tolist()
        return values


def num_elements(tensor: InputTensor) -> int:
    """How many values a tensor says it has. Raises InvalidRequest."""
    if not tensor.shape or any(side < 0 for side in tensor.shape):
        raise InvalidRequest(f"input {tensor.name!r} has shape {list(tensor.shape)}")
    return math.prod(tensor.shape)


def read_elements(tensor: InputTensor) -> list[bytes]:
    """The elements of a BYTES tensor of shape [n] or [n, 1]. Raises InvalidRequest."""
    _check_datatype(tensor, "BYTES")
    num = num_elements(tensor)
    if len(tensor.shape) > 2 or tensor.shape[1:] not in ((), (1,)):
        raise InvalidRequest(f"input {tensor.name!r} has shape {list(tensor.shape)}, expected [n]")
    elements = _split(tensor.name, tensor.data, num) if isinstance(tensor.data, bytes) else tensor.data
    if len(elements) != num:
        raise InvalidRequest(f"input {tensor.name!r} holds {len(elements)} elements, its shape says {num}")
    return elements


def read_floats(tensor: InputTensor, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """[n, *shape] numbers of an FP32 tensor. Raises InvalidRequest."""
    _check_datatype(tensor, "FP32")
    num = num_elements(tensor)
    if tensor.shape[1:] != shape:
        expected = ", ".join(["n", *map(str, shape)])
        raise InvalidRequest(f"input {tensor.name!r} has shape {list(tensor.shape)}, expected [{expected}]")
    values = _numbers(tensor)
    if values.size != num:
        raise InvalidRequest(f"input {tensor.name!r} holds {values.size} numbers, its shape says {num}")
    with np.errstate(over="ignore"):  # what is too large for float32 becomes infinite, and is refused later
        return values.astype(np.float32).reshape(tensor.shape)


def _numbers(tensor: InputTensor) -> NDArray[Any]:
    """The values of an FP32 tensor in any shape and precision."""
    if isinstance(tensor.data, bytes):
        if len(tensor.data) % 4:
            raise InvalidRequest(f"input {tensor.name!r} holds {len(tensor.data)} bytes, no multiple of 4")
        return np.frombuffer(tensor.data, dtype="<f4")
    if not _holds_numbers(tensor.data):  # of texts NumPy makes an array as wide as the longest
        raise InvalidRequest(f"input {tensor.name!r} holds what is no number")
    try:
        values = np.asarray(tensor.data)
    except ValueError as error:
        raise InvalidRequest(f"input {tensor.name!r} holds lists of different lengths") from error
    if values.dtype.kind not in "fiu":
        raise InvalidRequest(f"input {tensor.name!r} holds integers beyond 64 bits")
    return values


def _holds_numbers(values: list[Any]) -> bool:
    return all(_holds_numbers(one) if isinstance(one, list) else type(one) in (int, float) for one in values)


def _check_datatype(tensor: InputTensor, expected: str) -> None:
    if tensor.datatype != expected:
        raise InvalidRequest(
            f"input {tensor.name!r} has datatype {tensor.datatype[:20]!r}, expected {expected}"
        )


def _split(name: str, raw: bytes, num: int) -> list[bytes]:
    """The elements of a raw BYTES tensor, at most `num`: millions of empty ones would take seconds."""
    elements: list[bytes] = []
    start = 0
    while start < len(raw):
        if len(elements) == num:
            raise InvalidRequest(f"input {name!r} holds more elements than the {num} that its shape says")
        if start + _LENGTH.size > len(raw):
            raise InvalidRequest(f"input {name!r} ends within the length of element {len(elements)}")
        (length,) = _LENGTH.unpack_from(raw, start)
        start += _LENGTH.size
        if start + length > len(raw):
            raise InvalidRequest(f"input {name!r} ends within element {len(elements)} of {length} bytes")
        elements.append(raw[start : start + length])
        start += length
    return elements
