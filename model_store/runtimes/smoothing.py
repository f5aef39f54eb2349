"""A ViT whose layers' inputs are of like size, feature by feature: the way it is exported for int8.

Products in int8 quantise their input while it passes. Features that share a scale lose what the largest of
them takes, and the fewer share one, the longer a product takes. Behind a layer norm a feature's size moves
into the next layer's weights (SmoothQuant, https://arxiv.org/abs/2211.10438, with half of it moved). In the
MLP, where no norm stands between, hidden features change places: those of like size share a scale. Both
leave the CLS vector as it is but for rounding (docs/decisions/0013-shared-scales.md).
"""
# B batch, N pictures, I inputs of a layer

import math
from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from model_store.preprocess import Preprocessing
from model_store.runtimes.runtime import PLAIN_GROUP
from model_store.runtimes.split_attention import plain_blocks
from model_store.runtimes.torch_runtime import Embedding
from model_store.timm_import import load_timm

MAX_GROUP = 192  # over all 768 CLIP's mean cosine would be 0.998 instead of 0.999
_MAX_RATIO = 1e3  # of sizes: a feature that the pictures never showed may still come
_BATCH = 16


def activation_group(model: nn.Module) -> int:
    """How many features of a token may share a scale in int8 once `smooth` was there: as many as divide
    every layer's inputs, up to MAX_GROUP."""
    blocks = _smoothable(model)
    common = math.gcd(*(one.in_features for block in blocks for one in _products(block)))
    groups = range(PLAIN_GROUP, MAX_GROUP + 1, PLAIN_GROUP)
    return max((one for one in groups if blocks and common % one == 0), default=PLAIN_GROUP)


def smooth(model: nn.Module, preprocessing: Preprocessing, pixels_NCHW: Tensor) -> nn.Module:
    """The model, the inputs of its layers of like size, which are measured on `pixels_NCHW`, [N, 3, H, W]
    uint8, of real pictures. A model whose blocks are not all plain ones stays as it is."""
    blocks = _smoothable(model)
    measured = [one for block in blocks for one in (block.attn.qkv, block.mlp.fc1, block.mlp.fc2)]
    size_I = _input_sizes(Embedding(model, preprocessing), measured, pixels_NCHW)
    for block in blocks:
        _move_into_weights(block.norm1, block.attn.qkv, size_I[block.attn.qkv])
        _move_into_weights(block.norm2, block.mlp.fc1, size_I[block.mlp.fc1])
        _sort_hidden(block.mlp, size_I[block.mlp.fc2])
    return model


def _smoothable(model: nn.Module) -> list[Any]:
    """All blocks, or none."""
    blocks = plain_blocks(model)
    mlp = load_timm().layers.Mlp
    is_plain = all(
        type(block.mlp) is mlp
        and isinstance(block.mlp.norm, nn.Identity)
        and all(isinstance(one, nn.Linear) for one in _products(block))
        and all(
            isinstance(one, nn.LayerNorm) and one.elementwise_affine for one in (block.norm1, block.norm2)
        )
        for block in blocks
    )
    return blocks if blocks and is_plain and len(blocks) == len(cast(Any, model).blocks) else []


def _products(block: Any) -> tuple[Any, ...]:
    return block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2


@torch.inference_mode()
def _input_sizes(
    embedding: Embedding, layers: Iterable[nn.Module], pixels_NCHW: Tensor
) -> dict[nn.Module, Tensor]:
    """[I] the greatest absolute value of each layer's inputs, over all tokens of the pictures."""
    found: dict[nn.Module, Tensor] = {}

    def watch(layer: nn.Module) -> RemovableHandle:
        def see(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            size_I = given[0].abs().flatten(0, -2).amax(dim=0)
            found[layer] = torch.maximum(size_I, found.get(layer, size_I))

        return layer.register_forward_pre_hook(see)

    watching = [watch(layer) for layer in layers]
    if watching:
        embedding.eval()
        for pixels_BCHW in pixels_NCHW.split(_BATCH):
            embedding(embedding.prepare(pixels_BCHW))
    for one in watching:
        one.remove()
    return found


def _move_into_weights(norm: nn.LayerNorm, layer: nn.Linear, size_I: Tensor) -> None:
    """Divide what a norm makes by factors, and multiply the layer's weights by them."""
    factor_I = (_within_ratio(size_I) / _within_ratio(layer.weight.detach().abs().amax(dim=0))).sqrt()
    norm.weight = _fixed(norm.weight / factor_I)
    if norm.bias is not None:
        norm.bias = _fixed(norm.bias / factor_I)
    layer.weight = _fixed(layer.weight * factor_I)


def _sort_hidden(mlp: Any, size_I: Tensor) -> None:
    """Put the hidden features of an MLP in the order of their size."""
    order_I = size_I.argsort()
    mlp.fc1.weight = _fixed(mlp.fc1.weight[order_I])
    if mlp.fc1.bias is not None:
        mlp.fc1.bias = _fixed(mlp.fc1.bias[order_I])
    mlp.fc2.weight = _fixed(mlp.fc2.weight[:, order_I])


def _within_ratio(size_I: Tensor) -> Tensor:
    """Sizes of which none is less than the greatest over _MAX_RATIO, nor zero."""
    return size_I.clamp_min(max(float(size_I.max()) / _MAX_RATIO, torch.finfo(torch.float32).tiny))


def _fixed(value: Tensor) -> nn.Parameter:
    return nn.Parameter(value.detach().contiguous(), requires_grad=False)
