"""Fuzz the module reader: any bytes give a module that builds a bank, or InvalidModule.

Half of the inputs are read as they come. The other half are re-sealed first (header length and digest made
right again), because otherwise the digest would stop every mutation at the door.
"""

import json
import random
import struct
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["model_store"]):
    from model_store.errors import InvalidModule
    from model_store.module_file import _content_digest, check_module, read_module

import torch
from random_modules import backbone_manifest, build_bank, module_bytes, random_cls, random_module

BACKBONE = backbone_manifest()


def test_one_input(data: bytes) -> None:
    resealed = seal(data) if data[:1] != b"\x00" else data
    try:
        file = read_module(resealed)
        check_module(file, BACKBONE)
        bank = build_bank([file.module])
    except InvalidModule:
        return
    bank.answer(random_cls(2), top_k=3)


def seal(data: bytes) -> bytes:
    """The input as HEADER NUL PAYLOAD, with its length field and digest made right."""
    header, _, payload = data.partition(b"\x00")
    try:
        entries = json.loads(header)
        metadata = entries.pop("__metadata__")
        text = str(metadata["manifest"])
        body = struct.pack("<Q", 0) + payload  # an empty header, so that the digest is over the payload
        metadata["digest"] = _content_digest(text, entries, body)
        head = json.dumps({"__metadata__": metadata, **entries}).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return data
    return struct.pack("<Q", len(head)) + head + payload


HOSTILE = (None, 0, -1, 2**31, 2**63, 1e308, float("inf"), "", "x" * 300, [], [0], {}, True, "F64", "\ud800")


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change one value of the header or the manifest, or bytes of the tensors alone, or anything at all."""
    choice = random.Random(seed)
    header, separator, payload = data.partition(b"\x00")
    kind = choice.choice(("header", "manifest", "payload", "anything"))
    try:
        if kind == "payload" and payload:
            return header + separator + atheris.Mutate(payload, max(1, max_size - len(header) - 1))
        entries = json.loads(header)
        if kind == "header":
            _change(entries[choice.choice(sorted(entries))], choice)
        elif kind == "manifest":
            manifest = json.loads(entries["__metadata__"]["manifest"])
            _change(manifest, choice)
            entries["__metadata__"]["manifest"] = json.dumps(manifest)
        else:
            return atheris.Mutate(data, max_size)
        return (json.dumps(entries).encode() + separator + payload)[:max_size]
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        return atheris.Mutate(data, max_size)


def _change(value: dict[str, object], choice: random.Random) -> None:
    key = choice.choice(sorted(value))
    inner = value[key]
    if isinstance(inner, list) and inner and choice.random() < 0.7:
        inner[choice.randrange(len(inner))] = choice.choice((*HOSTILE, *inner))
    else:
        value[key] = choice.choice((*HOSTILE, *value.values()))


def unsealed(module: bytes) -> bytes:
    """A module file as the fuzzer mutates it: header, NUL, payload."""
    (length,) = struct.unpack("<Q", module[:8])
    return module[8 : 8 + length].rstrip() + b"\x00" + module[8 + length :]


def seeds() -> list[bytes]:
    modules = [
        module_bytes(random_module("birds", seed=1, num_classes=2, num_calibration=2)),
        module_bytes(random_module("cars", seed=2, num_classes=3, standardised=False)),
    ]
    return [*map(unsealed, modules), *(b"\x00" + one for one in modules)]


if __name__ == "__main__":
    torch.set_num_threads(1)
    corpus = Path(sys.argv[-1])
    for i, seed in enumerate(seeds()):
        (corpus / f"seed-{i}").write_bytes(seed)
    atheris.Setup(sys.argv, test_one_input, custom_mutator=mutate)
    atheris.Fuzz()
