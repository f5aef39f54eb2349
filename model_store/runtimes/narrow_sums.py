"""The sums of a narrow ViT's blocks in bfloat16 where its products are: the way it is exported.

OpenVINO keeps what stands between the last product and the output in float32, and goes back over the sums of
all blocks, since they hang together: each is then added in float32, between two changes of number format.
Where the CLS token is cut out of the last sum by a product, the search ends there. In float32 it is the same
number; what it gains in bfloat16, and costs, is in docs/decisions/0016-narrow-sums.md.
"""
# B batch, N tokens, D features

from typing import Any, cast

import torch
from torch import Tensor, nn

from model_store.runtimes.cls_block import ClsBlock

MAX_FEATURES = 384  # of wider models products take nearly all time


class FirstByProduct(nn.Module):
    """[B, N, D] tokens to the first of them, [B, 1, D]."""

    first_1N: Tensor

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.register_buffer("first_1N", torch.eye(1, num_tokens))

    def forward(self, tokens_BND: Tensor) -> Tensor:
        return self.first_1N @ tokens_BND


def narrow_sums(model: nn.Module) -> nn.Module:
    """The model, the CLS token of a narrow one cut out by a product where its last block is a `ClsBlock`.
    Any other model stays as it is."""
    parts = cast(Any, model)  # timm's models have these attributes, which torch's types do not know
    last = parts.blocks[-1] if hasattr(model, "blocks") else None
    if isinstance(last, ClsBlock) and parts.embed_dim <= MAX_FEATURES:
        last.first = FirstByProduct(parts.patch_embed.num_patches + parts.num_prefix_tokens)
    return model
