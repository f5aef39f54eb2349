"""The frozen backbone: pixels in, CLS tokens after the final norm out."""
# B batch, C channels, H height, W width, N tokens, D features

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from model_store.errors import CorruptStore, InvalidBackbone
from model_store.preprocess import Preprocessing
from model_store.timm_import import load_timm

Precision = Literal["float32", "bfloat16"]
_DTYPE = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class BackboneManifest(BaseModel):
    """What the weights are and how they want their pictures; stored beside them as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    architecture: str = Field(min_length=1, max_length=200)  # a timm model name
    feature_dim: int = Field(gt=0, le=65536)
    preprocessing: Preprocessing
    weights_sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    source: str = Field(max_length=1000)  # where the weights came from, for people

    @property
    def fingerprint(self) -> str:
        """SHA-256 over everything that decides the CLS vector of a picture: architecture, weights,
        preprocessing. Module files name it; two backbones with one fingerprint are interchangeable."""
        identity = self.model_dump(mode="json", include={"architecture", "weights_sha256", "preprocessing"})
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class BackboneArtefact:
    """A manifest with the safetensors bytes it describes."""

    manifest: BackboneManifest
    weights: bytes

    def verify(self) -> None:
        """Raises CorruptStore when the weights are not those the manifest names."""
        digest = hashlib.sha256(self.weights).hexdigest()
        if digest != self.manifest.weights_sha256:
            raise CorruptStore(
                f"backbone weights have SHA-256 {digest}, the manifest says {self.manifest.weights_sha256}"
            )


def build_model(architecture: str, image_size: tuple[int, int] | None = None, **kwargs: Any) -> nn.Module:
    """A timm model without its classifier that keeps the CLS token through the final norm.

    `image_size` (height, width) where it is not the model's own; position embeddings are resampled.

    Raises InvalidBackbone for an unknown name and for a model without a CLS token.
    """
    timm = load_timm()
    if not timm.is_model(architecture):
        raise InvalidBackbone(f"timm knows no model named {architecture!r}")
    if "." in architecture and architecture not in timm.list_pretrained(architecture):
        raise InvalidBackbone(f"timm knows no weights {architecture!r}")
    native_size = timm.get_pretrained_cfg(architecture).input_size[1:]
    if image_size is not None and image_size != native_size:
        kwargs["img_size"] = image_size
    try:
        model: nn.Module = timm.create_model(architecture, num_classes=0, global_pool="token", **kwargs)
    except (TypeError, AssertionError, ValueError) as error:
        raise InvalidBackbone(
            f"{architecture!r} has no CLS token to put a module on: {error or type(error).__name__}"
        ) from error
    if getattr(model, "cls_token", None) is None or getattr(model, "num_prefix_tokens", 0) < 1:
        raise InvalidBackbone(f"{architecture!r} has no CLS token to put a module on")
    return model.eval().requires_grad_(False)


class Backbone:
    """A backbone held on one device. `embed` is deterministic for a batch and safe on one thread."""

    def __init__(
        self, manifest: BackboneManifest, model: nn.Module, device: torch.device, precision: Precision
    ) -> None:
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.device = device
        self.precision = precision
        dtype = _DTYPE[precision]
        model.to(device, dtype)
        # timm's models share this method, but torch's types know nothing of it.
        self._forward_features: Callable[[Tensor], Tensor] = cast(Any, model).forward_features
        scale_C11 = 1.0 / (255.0 * torch.tensor(manifest.preprocessing.std, dtype=torch.float32))
        shift_C11 = torch.tensor(manifest.preprocessing.mean) / torch.tensor(manifest.preprocessing.std)
        self._scale_C11 = scale_C11.view(-1, 1, 1).to(device)
        self._shift_C11 = shift_C11.view(-1, 1, 1).to(device)
        self._dtype = dtype

    @classmethod
    def load(cls, artefact: BackboneArtefact, device: str = "auto", precision: str = "auto") -> "Backbone":
        """Verify the artefact and put it on `device` ("auto": CUDA when there, else CPU).

        `precision` "auto" is bfloat16 on CUDA and float32 on the CPU.
        """
        artefact.verify()
        manifest = artefact.manifest
        size = (manifest.preprocessing.height, manifest.preprocessing.width)
        model = build_model(manifest.architecture, size)
        state = safetensors.torch.load(artefact.weights)
        try:
            model.load_state_dict(state)
        except RuntimeError as error:
            raise CorruptStore(f"backbone weights do not fit {manifest.architecture!r}: {error}") from error
        chosen = resolve_device(device)
        return cls(manifest, model, chosen, resolve_precision(precision, chosen))

    @property
    def preprocessing(self) -> Preprocessing:
        return self.manifest.preprocessing

    @property
    def feature_dim(self) -> int:
        return self.manifest.feature_dim

    @torch.inference_mode()
    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] float32 CLS vectors, after the final norm, of [B, 3, H, W] uint8 pixels."""
        pixels_BCHW = pixels_BCHW.to(self.device, non_blocking=True).float()
        pixels_BCHW = pixels_BCHW * self._scale_C11 - self._shift_C11
        tokens_BND = self._forward_features(pixels_BCHW.to(self._dtype))
        return tokens_BND[:, 0].float()


def resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise InvalidBackbone(f"unknown device {device!r}: expected auto, cpu, cuda or cuda:N") from error
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise InvalidBackbone(f"device {device!r} was asked for, but torch sees no CUDA device")
    return chosen


def resolve_precision(precision: str, device: torch.device) -> Precision:
    if precision == "auto":
        return "bfloat16" if device.type == "cuda" else "float32"
    if precision not in ("float32", "bfloat16"):
        raise InvalidBackbone(f"unknown precision {precision!r}: expected auto, float32 or bfloat16")
    return cast(Precision, precision)
