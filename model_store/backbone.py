"""The frozen backbone: pixels in, CLS tokens after the final norm out."""
# B batch, C channels, H height, W width, D features

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field
from safetensors import SafetensorError
from torch import Tensor, nn

from model_store.errors import CorruptStore, InvalidBackbone
from model_store.preprocess import Preprocessing
from model_store.runtimes.loading import load_export
from model_store.runtimes.runtime import Runtime, default_runtime, runtime_kind
from model_store.runtimes.torch_runtime import Embedding, TorchRuntime, load_torch
from model_store.timm_import import load_timm


class BackboneManifest(BaseModel):
    """What the weights are and how they want their pictures; stored beside them as JSON."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[2] = 2
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

    def model(self) -> nn.Module:
        """The timm model with these weights, in float32 on the CPU. Raises CorruptStore."""
        preprocessing = self.manifest.preprocessing
        model = build_model(self.manifest.architecture, (preprocessing.height, preprocessing.width))
        try:
            model.load_state_dict(safetensors.torch.load(self.weights))
        except (RuntimeError, SafetensorError) as error:
            raise CorruptStore(
                f"backbone weights do not fit {self.manifest.architecture!r}: {error}"
            ) from error
        return model


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


def check_pass(model: nn.Module, manifest: BackboneManifest) -> None:
    """Let a model embed a black picture. Raises InvalidBackbone unless that gives what the manifest says."""
    preprocessing = manifest.preprocessing
    size = preprocessing.height, preprocessing.width
    runtime = TorchRuntime(Embedding(model, preprocessing), torch.device("cpu"))
    try:
        cls_BD = runtime.embed(torch.zeros(1, 3, *size, dtype=torch.uint8))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise InvalidBackbone(
            f"{manifest.architecture!r} cannot embed pictures of {size[0]}×{size[1]} pixels: {error}"
        ) from error
    if cls_BD.shape[1] != manifest.feature_dim:
        raise InvalidBackbone(
            f"{manifest.architecture!r} gives vectors of {cls_BD.shape[1]} numbers, the manifest says "
            f"{manifest.feature_dim}"
        )
    if not cls_BD.isfinite().all():
        raise InvalidBackbone(f"{manifest.architecture!r} makes of a black picture what is no number")


class Backbone:
    """A backbone held on one device by one runtime.

    `embed` uses the whole device, from one thread at a time. Where `num_streams` is more than one, passes of
    `embed_on` may run side by side instead, one a stream, each on its share of the processor's threads. A
    picture's vector is the same in all of them.
    """

    def __init__(
        self,
        manifest: BackboneManifest,
        runtime: Runtime,
        name: str,
        export_sha256: str = "",
        streams: Sequence[Runtime] = (),
    ) -> None:
        """`name` is the runtime's; `export_sha256` that of the exported form it runs, if it runs one;
        `streams` are runtimes of the same kind that may run side by side."""
        self.manifest = manifest
        self.fingerprint = manifest.fingerprint
        self.runtime_name = name
        # Two backbones of one fingerprint give close vectors; with equal variants, the same ones.
        self.device = runtime.device
        device = "cuda" if self.device.type == "cuda" else ""
        self.variant = "-".join(filter(None, (runtime_kind(name).variant, device, export_sha256[:12])))
        self.batch_buckets = runtime.batch_buckets
        self.num_streams = len(streams) or 1
        self._runtime = runtime
        self._streams = streams or (runtime,)
        self._beside = ThreadPoolExecutor(len(streams), "stream") if streams else None

    @classmethod
    def load(
        cls,
        artefact: BackboneArtefact,
        device: str = "auto",
        runtime: str = "auto",
        *,
        export: bytes | None = None,
        num_threads: int = 0,
        num_streams: int = 1,
    ) -> "Backbone":
        """Verify the artefact and put it on `device` ("auto": CUDA when there, else CPU).

        `runtime` "auto" is torch in bfloat16 on CUDA and in float32 on the CPU; `backbone_loading` knows
        what was measured to be faster. A runtime of an engine other than torch needs its `export`.
        `num_threads` (0: as many as torch has) and `num_streams`, which share them, count for these engines;
        torch's own threads are global, and its passes run one after another.

        Raises CorruptStore and InvalidBackbone.
        """
        artefact.verify()
        chosen = resolve_device(device)
        kind = runtime_kind(default_runtime(chosen) if runtime == "auto" else runtime)
        if (reason := kind.unavailable_on(chosen)) is not None:
            raise InvalidBackbone(f"runtime {kind.name} is not available: {reason}")
        if kind.export is None:
            preprocessing = artefact.manifest.preprocessing
            loaded: Runtime = load_torch(artefact.model(), preprocessing, kind.precision, chosen)
            return cls(artefact.manifest, loaded, kind.name)
        if export is None:
            raise InvalidBackbone(f"runtime {kind.name} needs an exported form: run `tosca backbone tune`")
        num_threads = num_threads or torch.get_num_threads()
        (whole,) = load_export(kind, export, chosen, num_threads)
        streams = load_export(kind, export, chosen, num_threads, num_streams) if num_streams > 1 else ()
        sha256 = hashlib.sha256(export).hexdigest()
        return cls(artefact.manifest, whole, kind.name, sha256, streams)

    @property
    def preprocessing(self) -> Preprocessing:
        return self.manifest.preprocessing

    @property
    def feature_dim(self) -> int:
        return self.manifest.feature_dim

    @property
    def precision(self) -> str:
        """The number format of the matrix products."""
        return runtime_kind(self.runtime_name).precision

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        """[B, D] float32 CLS vectors, after the final norm, of [B, 3, H, W] uint8 pixels."""
        if self._beside is None or len(pixels_BCHW) == 1:
            return self._runtime.embed(pixels_BCHW)
        parts = pixels_BCHW.tensor_split(min(self.num_streams, len(pixels_BCHW)))
        return torch.cat(list(self._beside.map(self.embed_on, range(len(parts)), parts)))

    def embed_on(self, stream: int, pixels_BCHW: Tensor) -> Tensor:
        """The same on one stream, beside whatever the others do; from one thread at a time."""
        return self._streams[stream].embed(pixels_BCHW)


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
