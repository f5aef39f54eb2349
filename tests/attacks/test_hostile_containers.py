"""Module files whose bytes or header lie: each is refused as InvalidModule, with a message that names the fault."""

import hashlib
import io
import json
import pickle
import struct
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from forged_modules import GOOD, TENSORS, raw, split
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from model_store.errors import InvalidModule
from model_store.module_file import MAX_HEADER_BYTES, read_module

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


def test_tensors_that_trade_places_are_noticed() -> None:
    """Equal shapes, other offsets: only the digest over the header's entries can tell."""
    header, payload = split()
    one, other = "luca.w1.values", "luca.v1.values"
    header[one], header[other] = header[other], header[one]
    with pytest.raises(InvalidModule, match="does not match its own digest"):
        read_module(raw(json.dumps(header).encode(), payload))
