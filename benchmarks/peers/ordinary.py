"""The backbone and its pictures as the users of other servers would write them, with care.

Weights, engine, precision and threads are those of the store, the inputs of its layers of like size for int8,
too; the graph, its compilation and the resizing are the ordinary ones, and not this project's.
"""
# B batch, C channels, H height, W width, N pictures

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model_store.backbone import Backbone, BackboneArtefact, resolve_device
from model_store.decoding import ImageLimits, open_image
from model_store.preprocess import REDUCING_GAP, Preprocessing
from model_store.runtimes.loading import load_export, make_export
from model_store.runtimes.onnx_export import export_float
from model_store.runtimes.runtime import Runtime, runtime_kind
from model_store.runtimes.smoothing import activation_group, smooth
from model_store.runtimes.torch_runtime import Embedding, TorchRuntime


def ordinary_export(artefact: BackboneArtefact, runtime: str, calibration_NCHW: Tensor) -> bytes | None:
    """The whole timm model as torch exports it, every token in every block, in the form that `runtime` wants;
    None for torch, which runs the model itself."""
    form = runtime_kind(runtime).export
    if form is None:
        return None
    preprocessing = artefact.manifest.preprocessing
    model = smooth(artefact.model(), preprocessing, calibration_NCHW)
    exported = export_float(Embedding(model, preprocessing), activation_group(model))
    return make_export(form, exported, calibration_NCHW)


def ordinary_backbone(
    artefact: BackboneArtefact, runtime: str, export: bytes | None, num_threads: int
) -> Backbone:
    """One stream, a pass at a time on all threads: an engine's default. OpenVINO's threads are not pinned, so
    that worker processes with a thread each do not meet on the first core."""
    kind, device = runtime_kind(runtime), resolve_device("auto")
    loaded: Runtime
    if export is not None:
        (loaded,) = load_export(kind, export, device, num_threads)
    else:
        embedding = Embedding(artefact.model(), artefact.manifest.preprocessing, kind.precision)
        loaded = TorchRuntime(embedding, device)
    return Backbone(artefact.manifest, loaded, kind.name)


def ordinary_pixels(data: bytes, preprocessing: Preprocessing, limits: ImageLimits) -> Tensor:
    """[3, H, W] uint8 pixels by Pillow and timm's evaluation transform, of a backbone for square pictures.

    A large JPEG is decoded reduced as this project does it (`Image.draft`): a careful user would.
    """
    side = preprocessing.resized_side
    image = open_image(data, limits, min_side=REDUCING_GAP * side).decode()
    short = min(image.size)
    width, height = (int(side * length / short) for length in image.size)
    resized = image.resize((width, height), Image.Resampling[preprocessing.interpolation.upper()])
    left = round((width - preprocessing.width) / 2)
    top = round((height - preprocessing.height) / 2)
    crop = resized.crop((left, top, left + preprocessing.width, top + preprocessing.height))
    return torch.from_numpy(np.array(np.asarray(crop).transpose(2, 0, 1), order="C"))


def ordinary_stack(pixels: Sequence[Tensor]) -> Tensor:
    """[B, 3, H, W], channel by channel as the ordinary graph reads them."""
    return torch.stack(list(pixels))
