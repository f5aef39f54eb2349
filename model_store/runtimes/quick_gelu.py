"""QuickGELU as the SiLU of scaled layers: the way a ViT runs on CUDA.

CLIP's activation, x · sigmoid(1.702 x), is three kernels that each read and write the largest tensors of a
pass; SiLU, y · sigmoid(y), is one. With y = 1.702 x the first is SiLU(y) / 1.702: the factor goes into the
weights of the layer before, its inverse into those of the layer after. Engines that compile a graph fuse
either (docs/decisions/0015-cuda.md).
"""

from torch import nn

from model_store.runtimes.split_attention import plain_blocks
from model_store.timm_import import load_timm

_FACTOR = 1.702


def silu_for_quick_gelu(model: nn.Module) -> nn.Module:
    """The model, SiLU in the place of QuickGELU in its plain blocks; the vectors are the same but for
    rounding."""
    layers = load_timm().layers
    for block in plain_blocks(model):
        mlp = block.mlp
        is_plain = type(mlp) is layers.Mlp and isinstance(mlp.norm, nn.Identity)
        if is_plain and type(mlp.act) is layers.activations.QuickGELU:
            mlp.act = nn.SiLU()
            for one in (mlp.fc1.weight, mlp.fc1.bias):
                if one is not None:
                    one.data.mul_(_FACTOR)
            mlp.fc2.weight.data.div_(_FACTOR)
    return model
