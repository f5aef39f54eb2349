"""Module files made to do harm: each is refused as InvalidModule, with a message that names the fault."""

import contextlib
import hashlib
import io
import json
import pickle
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_modules import (
    FEATURE_DIM,
    backbone_manifest,
    build_bank,
    module_bytes,
    random_module,
    without_calibration,
)

from model_store.errors import InvalidModule
from model_store.manifest import MAX_CLASSES
from model_store.module_file import MAX_HEADER_BYTES, check_module, read_module

GOOD = module_bytes(random_module("birds"))
Header = dict[str, Any]


def split(data: bytes = GOOD) -> tuple[Header, bytes]:
    (header_bytes,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + header_bytes]), data[8 + header_bytes :]


def raw(header: bytes, payload: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + payload


def sealed(header: Header, payload: bytes) -> bytes:
    """A file whose digest is right for its content, as a hostile trainer would write it."""
    metadata = header["__metadata__"]
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    layout = json.dumps(entries, separators=(",", ":"), sort_keys=True)
    digest = hashlib.sha256(metadata["manifest"].encode("utf-8", "surrogatepass"))
    digest.update(layout.encode() + payload)
    metadata["digest"] = digest.hexdigest()
    return raw(json.dumps(header).encode(), payload)


def test_tensors_that_trade_places_are_noticed() -> None:
    """Equal shapes, other offsets: only the digest over the header's entries can tell."""
    header, payload = split()
    one, other = "luca.w1.values", "luca.v1.values"
    header[one], header[other] = header[other], header[one]
    with pytest.raises(InvalidModule, match="does not match its own digest"):
        read_module(raw(json.dumps(header).encode(), payload))


def with_header(change: Callable[[Header], object]) -> bytes:
    header, payload = split()
    change(header)
    return sealed(header, payload)


def with_manifest_text(text: object) -> bytes:
    header, payload = split()
    header["__metadata__"]["manifest"] = text
    return sealed(header, payload) if isinstance(text, str) else raw(json.dumps(header).encode(), payload)


def with_manifest(**fields: object) -> bytes:
    manifest = json.loads(split()[0]["__metadata__"]["manifest"])
    return with_manifest_text(json.dumps(manifest | fields))


def with_tensors(**tensors: torch.Tensor | None) -> bytes:
    """Tensors replaced, added or (None) left out; `__` stands for the dot of a tensor's name."""
    content = safetensors.torch.load(GOOD)
    for name, value in tensors.items():
        content.pop(name.replace("__", "."), None)
        if value is not None:
            content[name.replace("__", ".")] = value
    data = safetensors.torch.save(content, metadata=split()[0]["__metadata__"])
    return sealed(*split(data))


def tensor(name: str) -> torch.Tensor:
    return safetensors.torch.load(GOOD)[name].clone()


def with_entry(name: str, value: float) -> bytes:
    changed = tensor(name)
    changed.view(-1)[0] = value
    return with_tensors(**{name: changed})


def with_calibration(size: int) -> bytes:
    kinds = {
        "cls": torch.zeros(size, FEATURE_DIM, dtype=torch.float16),
        "label": torch.zeros(size, dtype=torch.int64),
        "logits": torch.zeros(size, 3),
        "held_out_logits": torch.zeros(size, 3),
        "in_statistics": torch.zeros(size, dtype=torch.bool),
    }
    tensors = {f"calibration.{name}": value for name, value in kinds.items()}
    return with_tensors(**tensors, ridge__kernel=torch.zeros(size, 3, dtype=torch.float16))


TENSORS = sorted(safetensors.torch.load(GOOD))
FLOATS = [name for name, value in safetensors.torch.load(GOOD).items() if value.is_floating_point()]


def test_the_unharmed_file_is_accepted() -> None:
    """Otherwise every refusal below could have another reason than the one meant."""
    read_module(GOOD)
    read_module(with_header(lambda header: None))
    read_module(with_manifest())
    read_module(with_tensors())
    read_module(with_calibration(128))
    check_module(read_module(with_tensors()), backbone_manifest())


def test_the_files_cover_every_kind_of_tensor() -> None:
    assert len(TENSORS) == 27 and len(FLOATS) == 19


# -- the container -----------------------------------------------------------------------------------

HEADER_END = 8 + struct.unpack("<Q", GOOD[:8])[0]
OFFSETS = sorted(
    {*range(13), *range(13, len(GOOD), 97), HEADER_END - 1, HEADER_END, HEADER_END + 1, len(GOOD) - 1}
)


@pytest.mark.parametrize("length", OFFSETS)
def test_a_truncated_file_is_refused(length: int) -> None:
    with pytest.raises(InvalidModule):
        read_module(GOOD[:length])


def test_every_flipped_bit_of_the_header_is_refused() -> None:
    accepted = []
    for position in range(HEADER_END):
        damaged = bytearray(GOOD)
        damaged[position] ^= 1 << (position % 8)
        try:
            read_module(bytes(damaged))
        except InvalidModule:
            continue
        accepted.append(position)
    assert accepted == []


@given(position=st.integers(0, len(GOOD) - 1), bit=st.integers(0, 7))
@settings(max_examples=200, deadline=None)
def test_a_flipped_bit_anywhere_is_refused(position: int, bit: int) -> None:
    damaged = bytearray(GOOD)
    damaged[position] ^= 1 << bit
    with pytest.raises(InvalidModule):
        read_module(bytes(damaged))


def _png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def _zip() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.pkl", b"x" * 100)
    return file.getvalue()


class _Payload:
    """Writes a file when it is unpickled."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (Path("unpickled"), "harm")


def _torch_file() -> bytes:
    file = io.BytesIO()
    torch.save({"w1": torch.zeros(3)}, file)
    return file.getvalue()


CONTAINERS: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty": (lambda: b"", "0 bytes are fewer than its length field"),
    "seven bytes": (lambda: b"\x00" * 7, "7 bytes are fewer"),
    "length only": (lambda: struct.pack("<Q", 0), "not a safetensors file"),
    "length lies by one": (lambda: struct.pack("<Q", len(GOOD) - 7) + GOOD[8:], "header claims"),
    "length cuts the header": (lambda: struct.pack("<Q", HEADER_END - 20) + GOOD[8:], "header is no JSON"),
    "header of 2^63 bytes": (
        lambda: struct.pack("<Q", 2**63) + GOOD[8:],
        "header claims 9223372036854775808",
    ),
    "header of 2^64 - 1 bytes": (lambda: b"\xff" * 8 + GOOD[8:], "header claims 18446744073709551615"),
    "header beyond the limit": (
        lambda: raw(b" " * (MAX_HEADER_BYTES + 1)),
        f"{MAX_HEADER_BYTES} are allowed",
    ),
    "header not JSON": (lambda: raw(b"hello, world"), "header is no JSON"),
    "header not UTF-8": (lambda: raw(b'{"\xff\xfe": 1}'), "header is no JSON"),
    "header with a gigantic number": (lambda: raw(b'{"a": ' + b"9" * 5000 + b"}"), "header is no JSON"),
    "arrays nested too deep": (lambda: raw(b"[" * 200_000), "nested too deep"),
    "closed arrays nested too deep": (lambda: raw(b"[" * 100_000 + b"]" * 100_000), "nested too deep"),
    "objects nested too deep": (lambda: raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deep"),
    "header is a list": (lambda: raw(b"[1, 2, 3]"), "metadata lacks format 'tosca-module'"),
    "header is null": (lambda: raw(b"null"), "metadata lacks format"),
    "no metadata": (lambda: safetensors.torch.save({"a": torch.zeros(2)}), "metadata lacks format"),
    "metadata of another format": (
        lambda: safetensors.torch.save({"a": torch.zeros(2)}, metadata={"format": "pt"}),
        "metadata lacks format",
    ),
    "metadata is a list": (lambda: raw(b'{"__metadata__": ["format"]}'), "metadata lacks format"),
    "metadata without manifest": (
        lambda: raw(b'{"__metadata__": {"format": "tosca-module"}}'),
        "metadata lacks",
    ),
    "pickle": (lambda: pickle.dumps(_Payload()), "not a (whole )?safetensors file"),
    "torch file": (_torch_file, "not a (whole )?safetensors file"),
    "zip": (_zip, "not a (whole )?safetensors file"),
    "PNG": (_png, "not a (whole )?safetensors file"),
    "text": (lambda: b"#!/bin/sh\nrm -rf /\n", "not a (whole )?safetensors file"),
    "wrong digest": (
        lambda: raw(
            json.dumps(
                split()[0] | {"__metadata__": split()[0]["__metadata__"] | {"digest": "0" * 64}}
            ).encode(),
            split()[1],
        ),
        "does not match its own digest",
    ),
    "bytes behind the end": (lambda: GOOD + b"\x00", "damaged|not a whole safetensors file"),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_a_hostile_container_is_refused(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    make, fault = CONTAINERS[name]
    with pytest.raises(InvalidModule, match=fault or None):
        read_module(make())
    assert list(tmp_path.iterdir()) == [], "nothing in a file is ever executed"


NESTED: dict[str, Callable[[str], bytes]] = {
    "entry": lambda deep: with_header_entry("x", deep),
    "shape": lambda deep: with_header_entry("head.weight", f'{{"dtype":"F16","shape":{deep}}}'),
    "manifest": lambda deep: raw(
        f'{{"__metadata__":{{"format":"tosca-module","manifest":{deep}}}}}'.encode()
    ),
}


def with_header_entry(name: str, value: str) -> bytes:
    """The good file with one more entry of the header, or another, and a digest that is right for it."""
    header, payload = split()
    metadata = header.pop("__metadata__")
    header[name] = "here"
    layout = json.dumps(header, separators=(",", ":"), sort_keys=True).replace('"here"', value)
    digest = hashlib.sha256(metadata["manifest"].encode() + layout.encode() + payload).hexdigest()
    return raw(f'{{"__metadata__":{json.dumps(metadata | {"digest": digest})},{layout[1:]}'.encode(), payload)


@pytest.mark.parametrize("where", NESTED)
def test_a_header_nested_to_just_about_any_depth_is_refused(where: str) -> None:
    """What the JSON reader still takes may be too deep for whoever writes it again."""
    for depth in range(sys.getrecursionlimit() - 150, sys.getrecursionlimit()):
        with pytest.raises(InvalidModule):
            read_module(NESTED[where]("[" * depth + "0" + "]" * depth))


@given(data=st.binary(max_size=400))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidModule):
        read_module(data)


@given(header=st.binary(max_size=200), payload=st.binary(max_size=50))
@settings(max_examples=200, deadline=None)
def test_random_bytes_behind_a_true_length_are_refused(header: bytes, payload: bytes) -> None:
    with pytest.raises(InvalidModule):
        read_module(raw(header, payload))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: (
        st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=10), children, max_size=3)
    ),
    max_leaves=8,
)


@given(name=st.sampled_from([*TENSORS, "__metadata__"]), value=json_values)
@settings(max_examples=200, deadline=None)
def test_random_json_in_place_of_a_header_entry_is_refused(name: str, value: object) -> None:
    header, payload = split()
    header[name] = value
    with pytest.raises(InvalidModule):
        read_module(raw(json.dumps(header).encode(), payload))


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


# -- the manifest ------------------------------------------------------------------------------------

MANIFESTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "not JSON": (lambda: with_manifest_text("hello"), "module manifest"),
    "empty": (lambda: with_manifest_text(""), "module manifest"),
    "a list": (lambda: with_manifest_text("[]"), "module manifest"),
    "a number": (lambda: with_manifest_text(5), ""),
    "null": (lambda: with_manifest_text(None), ""),
    "nested too deep": (lambda: with_manifest_text("[" * 100_000), "module manifest"),
    "a lone surrogate": (lambda: with_manifest_text("\ud800"), ""),
    "a lone surrogate in a label": (lambda: with_manifest_text('{"labels": ["\ud800"]}'), ""),
    "format version 1": (lambda: with_manifest(format_version=1), "format_version"),
    "an unknown field": (
        lambda: with_manifest(pickle="cos\nsystem"),
        "pickle: Extra inputs are not permitted",
    ),
    "a field missing": (lambda: with_manifest_text('{"task": "birds"}'), "labels: Field required"),
    "an unknown flow": (lambda: with_manifest(flow="lora"), "flow"),
    "no labels": (lambda: with_manifest(labels=[]), "labels"),
    "labels not a list": (lambda: with_manifest(labels="abc"), "labels"),
    "one label too few": (lambda: with_manifest(labels=["a", "b"]), r"head\.weight is \[3, 16\]"),
    "duplicate labels": (lambda: with_manifest(labels=["a", "b", "a"]), "labels must be distinct"),
    "too many labels": (
        lambda: with_manifest(labels=[f"c{k}" for k in range(MAX_CLASSES + 1)]),
        "labels: .*at most 10000",
    ),
    "a million labels": (
        lambda: with_manifest(labels=[f"c{k}" for k in range(1_000_000)]),
        "header claims",
    ),
    "fingerprint not hex": (lambda: with_manifest(backbone_fingerprint="z" * 64), "backbone_fingerprint"),
    "fingerprint too short": (lambda: with_manifest(backbone_fingerprint="a" * 63), "backbone_fingerprint"),
    "fingerprint with a newline": (
        lambda: with_manifest(backbone_fingerprint="a" * 64 + "\n"),
        "backbone_fingerprint",
    ),
    "no features": (lambda: with_manifest(feature_dim=0), "feature_dim"),
    "negative features": (lambda: with_manifest(feature_dim=-16), "feature_dim"),
    "fractional features": (lambda: with_manifest(feature_dim=16.5), "feature_dim"),
    "gigantic features": (lambda: with_manifest(feature_dim=2**60), "feature_dim"),
    "other features": (lambda: with_manifest(feature_dim=32), "expected"),
    "gigantic bottleneck": (lambda: with_manifest(bottleneck_dim=2**60), "bottleneck_dim"),
    "other bottleneck": (lambda: with_manifest(bottleneck_dim=2), "expected"),
    "NaN weight": (lambda: with_manifest(luca_weight=float("nan")), "luca_weight"),
    "infinite weight": (lambda: with_manifest(luca_weight=float("inf")), "luca_weight"),
    "negative weight": (lambda: with_manifest(luca_weight=-1.0), "luca_weight"),
    "metric not a number": (lambda: with_manifest(metrics={"accuracy": "high"}), "metrics.accuracy"),
    "metric NaN": (lambda: with_manifest(metrics={"accuracy": float("nan")}), "metrics.accuracy"),
    "too many metrics": (lambda: with_manifest(metrics={f"m{i}": 0.0 for i in range(65)}), "metrics"),
    "nested provenance": (lambda: with_manifest(provenance={"a": {"b": "c"}}), "provenance.a"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(name: str) -> None:
    make, fault = MANIFESTS[name]
    with pytest.raises(InvalidModule, match=fault or None) as refusal:
        read_module(make())
    assert len(str(refusal.value)) < 1000


TASK_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "_x",
    "a/b",
    "../../etc/passwd",
    "a\\b",
    "C:evil",
    "a b",
    " a",
    "a ",
    "a\n",
    "a\r\nSet-Cookie: x",
    "a\x00b",
    "a\x1b[31m",
    "vögel",
    "鳥",
    "a\u202egnp.exe",
    "%2e%2e",
    "a?b",
    "a#b",
    "x" * 65,
]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_hostile_task_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidModule, match="module manifest: task: "):
        read_module(with_manifest(task=name))


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "x" * 64, "7"])
def test_a_decent_task_name_is_accepted(name: str) -> None:
    assert read_module(with_manifest(task=name)).manifest.task == name


LABELS = [
    "",
    " ",
    "\t",
    " cat",
    "cat ",
    "a\nb",
    "a\x00b",
    "a\x1b[31m",
    "a\u200bb",
    "a\u202eb",
    "\ufeffcat",
    "x" * 257,
]


@pytest.mark.parametrize("label", LABELS)
def test_a_hostile_label_is_refused(label: str) -> None:
    with pytest.raises(InvalidModule, match=r"module manifest: labels\.1"):
        read_module(with_manifest(labels=["a", label, "c"]))


@pytest.mark.parametrize("label", ["x" * 256, "cat, black", "猫", "a/b", "<b>", "../x"])
def test_a_decent_label_is_accepted(label: str) -> None:
    assert label in read_module(with_manifest(labels=["a", label, "c"])).manifest.labels


# -- files that are well-formed and still harmful ----------------------------------------------------


@contextlib.contextmanager
def memory_limit(more_bytes: int) -> Iterator[None]:
    """Let this process take at most `more_bytes` of address space on top of what it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")
@pytest.mark.parametrize("bottleneck_dim", [4096, 65536])
def test_a_small_file_cannot_claim_gigabytes(bottleneck_dim: int) -> None:
    data = with_manifest(feature_dim=65536, bottleneck_dim=bottleneck_dim)
    with memory_limit(2**29), pytest.raises(InvalidModule):
        read_module(data)


def indefinite() -> bytes:
    """Every pair of features wholly and negatively correlated: no covariance of anything."""
    correlation = torch.full_like(tensor("statistics.correlation"), -127)
    return with_tensors(statistics__correlation=correlation)


def test_a_scatter_that_is_no_covariance_builds_no_bank() -> None:
    module = read_module(indefinite()).module
    for others in ([], [random_module("cars", per_class=3)]):
        with pytest.raises(InvalidModule, match="scatter is no covariance"):
            build_bank([module, *others])


def test_a_scatter_that_is_no_covariance_cannot_hide_behind_others() -> None:
    """Otherwise removing the others later would fail."""
    hiding = [random_module(f"task{i}", i, per_class=300, spread=3.0) for i in range(5)]
    with pytest.raises(InvalidModule, match="scatter is no covariance"):
        file = read_module(indefinite())
        check_module(file, backbone_manifest())
        build_bank([file.module, *hiding])


@pytest.mark.parametrize("weight", ["input scale", "head scale"])
def test_weights_that_overflow_are_refused_without_a_calibration_set_too(weight: str) -> None:
    """No golden outputs tell on them, and NaN would beat every other task's answer."""
    module = without_calibration(random_module("birds", luca_weight=3.0))
    assert module.standardisation is not None
    (module.standardisation.scale_D if weight == "input scale" else module.head.scale).fill_(3e38)
    assert not module.logits(module.statistics.mean_KD).isfinite().all()
    with pytest.raises(InvalidModule):
        check_module(read_module(module_bytes(module)), backbone_manifest())
