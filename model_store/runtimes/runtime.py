"""What every runtime is, and the list of those there are."""
# B batch, C channels, H height, W width, D features

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Literal, Protocol

import torch
from torch import Tensor

from model_store.errors import InvalidBackbone

Engine = Literal["torch", "onnxruntime", "openvino"]
# What an engine is given: "float" the weights as they are, "weight8" int8 weights with one scale an output
# channel, "static8" int8 weights and activations with ranges calibrated on pictures.
ExportForm = Literal["float", "weight8", "static8"]
# A graph's property: how many features of a token share a scale where products quantise what they read.
ACTIVATION_GROUP = "activation_group"
PLAIN_GROUP = 64  # where it says nothing


class Runtime(Protocol):
    """Pixels to CLS vectors on one device. Used from one thread; a picture's vector is its own."""

    device: torch.device
    # Sizes that a pass is padded to, ascending; empty where every size runs as it is.
    batch_buckets: tuple[int, ...]

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] float32 CLS vectors, after the final norm, of [B, 3, H, W] uint8 pixels."""
        ...


@dataclass(frozen=True, slots=True)
class RuntimeKind:
    """A runtime that can be asked for by name."""

    name: str
    engine: Engine
    precision: str  # of the matrix products
    export: ExportForm | None  # None: runs the weights themselves
    device_types: tuple[str, ...] = ("cpu",)
    form: int = 1  # raised where the same weights give other vectors than before

    @property
    def variant(self) -> str:
        """Tells its vectors apart from those of others, and from its own of earlier forms."""
        return self.name if self.form == 1 else f"{self.name}-{self.form}"

    def unavailable_on(self, device: torch.device) -> str | None:
        """Why this runtime cannot run here, or None when it can."""
        if device.type not in self.device_types:
            return f"runs on {', '.join(self.device_types)} and not on {device.type}"
        if find_spec(self.engine) is None:
            return f"the package {self.engine} is not installed: pip install 'tosca-serving[{self.engine}]'"
        if self.engine == "onnxruntime" and device.type == "cuda":
            from model_store.runtimes.onnx_runtime import has_cuda

            if not has_cuda():
                return "CUDA needs the package onnxruntime-gpu in the place of onnxruntime"
        if self.engine == "openvino" and "bfloat16" in self.precision:
            from model_store.runtimes.openvino_runtime import has_bfloat16

            if not has_bfloat16():
                return "this processor has no bfloat16 instructions"
        return None


KINDS = (
    RuntimeKind("torch-float32", "torch", "float32", None, ("cpu", "cuda")),
    RuntimeKind("torch-bfloat16", "torch", "bfloat16", None, ("cpu", "cuda"), form=2),
    RuntimeKind("onnxruntime-float32", "onnxruntime", "float32", "float", ("cpu", "cuda")),
    RuntimeKind("onnxruntime-int8", "onnxruntime", "int8", "static8"),
    RuntimeKind("openvino-float32", "openvino", "float32", "float"),
    RuntimeKind("openvino-bfloat16", "openvino", "bfloat16", "float"),
    RuntimeKind("openvino-int8", "openvino", "int8", "weight8"),
    RuntimeKind("openvino-int8-bfloat16", "openvino", "int8-bfloat16", "weight8"),
)
RUNTIMES = tuple(kind.name for kind in KINDS)
REFERENCE = "torch-float32"  # what the parity of all others is measured against


def runtime_kind(name: str) -> RuntimeKind:
    """The kind of a name. Raises InvalidBackbone."""
    for kind in KINDS:
        if kind.name == name:
            return kind
    raise InvalidBackbone(f"unknown runtime {name!r}: expected auto or one of {', '.join(RUNTIMES)}")


def default_runtime(device: torch.device) -> str:
    """What runs where nothing was measured."""
    return "torch-bfloat16" if device.type == "cuda" else REFERENCE
