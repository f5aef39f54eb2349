"""Module files forged from a good one: its header, manifest or tensors changed, with a digest that is right."""

import hashlib
import json
import struct
from collections.abc import Callable
from typing import Any

import safetensors.torch
import torch
from random_modules import FEATURE_DIM, module_bytes, random_module

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
