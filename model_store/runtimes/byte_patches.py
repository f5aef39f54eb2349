"""A ViT's first layer reading bytes less 128: the way it is exported, and run in bfloat16.

timm normalises the pixels and convolves them. A plain ViT's patches do not overlap, so that the convolution
is a product of each patch's numbers, and the normalisation goes into its weights and biases: what the layer
reads are the bytes of the picture. A byte is exact in bfloat16, a normalised pixel is not, and that rounding
alone was most of what bfloat16 took from CLIP's vectors. Less 128 bytes are near zero in the mean, as
normalised pixels are: what the rounding of the weights does would count for the mean, too
(docs/decisions/0012-byte-patches.md).
"""
# B batch, C channels, H height, W width, S side of a patch, N patches, P bytes of a patch, D features

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from model_store.preprocess import Preprocessing
from model_store.timm_import import load_timm

_CENTRE = 128  # what is taken off a byte: the sign of int8


class BytePatches(nn.Module):
    """[B, N, P] patches of bytes less 128 to the [B, N, D] tokens that a timm `PatchEmbed` makes of a
    normalised picture."""

    def __init__(self, patch_embed: nn.Module, preprocessing: Preprocessing) -> None:
        super().__init__()
        parts = cast(Any, patch_embed)  # timm's modules have attributes that torch's types do not know
        weight_DCSS = parts.proj.weight.detach().double()
        mean_C11 = torch.tensor(preprocessing.mean, dtype=torch.float64).view(-1, 1, 1)
        std_C11 = torch.tensor(preprocessing.std, dtype=torch.float64).view(-1, 1, 1)
        bias_D = (weight_DCSS * ((_CENTRE / 255.0 - mean_C11) / std_C11)).sum(dim=(1, 2, 3))
        if parts.proj.bias is not None:
            bias_D = bias_D + parts.proj.bias.detach().double()
        weight_DP = (weight_DCSS / (255.0 * std_C11)).permute(0, 2, 3, 1).flatten(1)
        self.product = nn.Linear(weight_DP.shape[1], weight_DP.shape[0], device="meta")
        self.product.weight = nn.Parameter(weight_DP.float(), requires_grad=False)
        self.product.bias = nn.Parameter(bias_D.float(), requires_grad=False)
        self.norm = parts.norm

    @property
    def num_bytes(self) -> int:
        """P, the bytes of a patch."""
        return self.product.in_features

    def forward(self, patches_BNP: Tensor) -> Tensor:
        tokens_BND: Tensor = self.norm(self.product(patches_BNP))
        return tokens_BND


def byte_patches(model: nn.Module, preprocessing: Preprocessing) -> nn.Module:
    """The model, its first layer now `BytePatches` where that cuts the whole picture into squares; any other
    model stays as it is."""
    timm = load_timm()
    if type(model) is timm.models.vision_transformer.VisionTransformer:
        parts = cast(Any, model)
        if _cuts_squares(parts.patch_embed, (preprocessing.height, preprocessing.width)):
            parts.patch_embed = BytePatches(parts.patch_embed, preprocessing)
    return model


def _cuts_squares(patch_embed: Any, image_size: tuple[int, int]) -> bool:
    if type(patch_embed) is not load_timm().layers.PatchEmbed or not patch_embed.flatten:
        return False
    layer = patch_embed.proj
    height, width = layer.kernel_size
    is_plain = layer.stride == layer.kernel_size and layer.padding == (0, 0)
    is_plain = is_plain and (layer.dilation, layer.groups) == ((1, 1), 1)
    return is_plain and height == width and all(size % height == 0 for size in image_size)


def as_graph_reads(pixels_BCHW: Tensor, shape: Sequence[Any]) -> Tensor:
    """[B, C, H, W] uint8 pixels as a graph with an input of this shape reads them: channel by channel, or in
    patches [B, N, P] less 128."""
    return pixels_BCHW.contiguous() if len(shape) == 4 else cut_patches(pixels_BCHW, shape[2])


def cut_patches(pixels_BCHW: Tensor, num_bytes: int) -> Tensor:
    """[B, N, P] int8 patches of `num_bytes`, less 128, from the top left to the bottom right, each line by
    line and pixel by pixel, as pictures lie in memory (`stack_pixels`)."""
    side = math.isqrt(num_bytes // pixels_BCHW.shape[1])
    cut_BHSWSC = pixels_BCHW.permute(0, 2, 3, 1).unflatten(2, (-1, side)).unflatten(1, (-1, side))
    patches_BHWSSC = cut_BHSWSC.transpose(2, 3).clone(memory_format=torch.contiguous_format)
    centred_BHWSSC: Tensor = patches_BHWSSC.bitwise_xor_(_CENTRE).view(torch.int8)  # bits of a byte less 128
    return centred_BHWSSC.flatten(3).flatten(1, 2)
