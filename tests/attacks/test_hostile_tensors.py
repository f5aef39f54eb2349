"""Module files with tensors of a wrong layout or value: each is refused, with a message that names the fault."""

from collections.abc import Callable

import pytest
import torch
from forged_modules import (
    FLOATS,
    TENSORS,
    tensor,
    with_calibration,
    with_entry,
    with_header,
    with_manifest,
    with_tensors,
)

from model_store.errors import InvalidModule
from model_store.module_file import read_module

# -- the layout of tensors ---------------------------------------------------------------------------


def entry(name: str, **fields: object) -> Callable[[], bytes]:
    return lambda: with_header(lambda header: header[name].update(fields))


LAYOUTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "overlapping offsets": (
        lambda: with_header(
            lambda header: header["ridge.linear"].update(data_offsets=header["head.weight"]["data_offsets"])
        ),
        "not a whole safetensors file",
    ),
    "offsets beyond the file": (
        entry("ridge.linear", data_offsets=[0, 2**40]),
        "not a whole safetensors file",
    ),
    "offsets backwards": (entry("ridge.linear", data_offsets=[64, 0]), "not a whole safetensors file"),
    "negative offsets": (entry("ridge.linear", data_offsets=[-64, 0]), "not a whole safetensors file"),
    "one offset": (entry("ridge.linear", data_offsets=[0]), "not a whole safetensors file"),
    "offsets missing": (
        lambda: with_header(lambda header: header["ridge.linear"].pop("data_offsets")),
        "not a whole safetensors file",
    ),
    "gigantic shape": (
        entry("ridge.linear", shape=[2**62, 2**62]),
        r"ridge\.linear is .*, expected \[16, 3\] F16",
    ),
    "shape beyond 64 bits": (
        entry("ridge.linear", shape=[2**70]),
        r"ridge\.linear is .*, expected \[16, 3\] F16",
    ),
    "negative shape": (entry("ridge.linear", shape=[-1, 16]), r"ridge\.linear is .*, expected \[16, 3\] F16"),
    "fractional shape": (
        entry("ridge.linear", shape=[0.5, 32]),
        r"ridge\.linear is .*, expected \[16, 3\] F16",
    ),
    "shape is text": (entry("ridge.linear", shape="1x16"), r"ridge\.linear is .*, expected \[16, 3\] F16"),
    "unknown dtype": (entry("ridge.linear", dtype="F128"), r"ridge\.linear is .*, expected \[16, 3\] F16"),
    "dtype of another size": (
        entry("ridge.linear", dtype="F64"),
        r"ridge\.linear is .*, expected \[16, 3\] F16",
    ),
    "empty tensor of gigantic shape": (
        lambda: with_header(
            lambda header: header.update(bomb={"dtype": "F32", "shape": [0, 2**62], "data_offsets": [0, 0]})
        ),
        "",
    ),
    "empty tensor of a shape beyond int64": (
        lambda: with_header(
            lambda header: header.update(bomb={"dtype": "F32", "shape": [0, 2**63], "data_offsets": [0, 0]})
        ),
        "",
    ),
    "tensor with a thousand dimensions": (entry("ridge.linear", shape=[1] * 1000 + [16]), ""),
    "tensor name of a megabyte": (
        lambda: with_tensors(**{"x" * 2**20: torch.zeros(1)}),
        "tensor 'x{80}' is not part of the format",
    ),
    "metadata value not text": (
        lambda: with_header(lambda header: header["__metadata__"].update(more=5)),
        "not a whole safetensors file",
    ),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_hostile_layout_is_refused(name: str) -> None:
    make, fault = LAYOUTS[name]
    with pytest.raises(InvalidModule, match=fault or None) as refusal:
        read_module(make())
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("name", TENSORS)
def test_a_missing_tensor_is_named(name: str) -> None:
    with pytest.raises(InvalidModule, match=f"task 'birds': tensor '{name}' is missing"):
        read_module(with_tensors(**{name: None}))


def test_an_extra_tensor_is_named() -> None:
    with pytest.raises(InvalidModule, match="tensor 'optimiser' is not part of the format"):
        read_module(with_tensors(optimiser=torch.zeros(3)))


def test_a_tensor_of_another_flow_is_refused() -> None:
    with pytest.raises(InvalidModule, match=r"luca\.v1.* is not part of the format"):
        read_module(with_manifest(flow="adapter"))


@pytest.mark.parametrize("name", TENSORS)
def test_a_wrong_dtype_is_named_with_the_expected_one(name: str) -> None:
    value = tensor(name)
    other = value.double() if value.is_floating_point() else value.to(torch.int32)
    with pytest.raises(InvalidModule, match=f"{name} is .*, expected "):
        read_module(with_tensors(**{name: other}))


@pytest.mark.parametrize("name", TENSORS)
@pytest.mark.parametrize("change", ["longer", "one dimension more"])
def test_a_wrong_shape_is_named_with_the_expected_one(name: str, change: str) -> None:
    value = tensor(name)
    wrong = value[None] if change == "one dimension more" or not value.dim() else torch.cat([value, value])
    with pytest.raises(InvalidModule, match=r", expected \["):
        read_module(with_tensors(**{name: wrong}))


@pytest.mark.parametrize("name", [name for name in TENSORS if tensor(name).dim() == 2])
def test_a_transposed_matrix_is_refused(name: str) -> None:
    with pytest.raises(InvalidModule, match=r", expected \["):
        read_module(with_tensors(**{name: tensor(name).T.contiguous()}))


def test_exotic_dtypes_are_refused() -> None:
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.complex64, torch.uint8, torch.int16):
        with pytest.raises(InvalidModule, match=r"head\.weight is \[3, 16\] .*, expected \[3, 16\] F16"):
            read_module(with_tensors(head__weight=torch.zeros(3, 16).to(dtype)))


# -- values ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", FLOATS)
def test_nan_and_infinity_are_refused_wherever_they_are(name: str, value: float) -> None:
    with pytest.raises(InvalidModule, match=f"task 'birds': {name} holds NaN or infinity"):
        read_module(with_entry(name, value))


VALUES: dict[str, tuple[Callable[[], bytes], str]] = {
    "count of zero": (lambda: with_entry("statistics.count", 0), "class counts must lie in 1"),
    "negative count": (lambda: with_entry("statistics.count", -5), "class counts must lie in 1"),
    "most negative count": (lambda: with_entry("statistics.count", -(2**63)), "class counts must lie in 1"),
    "gigantic count": (lambda: with_entry("statistics.count", 2**41), "class counts must lie in 1"),
    "scatter too large": (lambda: with_entry("statistics.variance", 2.0**30), "diagonal must lie in 0"),
    "negative scatter": (lambda: with_entry("statistics.variance", -1.0), "diagonal must lie in 0"),
    "correlation out of range": (
        lambda: with_entry("statistics.correlation", -128),
        "correlations must lie in -127",
    ),
    "calibration label too large": (lambda: with_entry("calibration.label", 3), r"must lie in 0 … 2"),
    "negative calibration label": (lambda: with_entry("calibration.label", -1), r"must lie in 0 … 2"),
    "129 calibration vectors": (lambda: with_calibration(129), "129 calibration vectors, at most 128"),
    "10,000 calibration vectors": (lambda: with_calibration(10_000), "10000 calibration vectors"),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_hostile_value_is_refused(name: str) -> None:
    make, fault = VALUES[name]
    with pytest.raises(InvalidModule, match=fault or None):
        read_module(make())
