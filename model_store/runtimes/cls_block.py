"""A ViT's last block computed for the CLS token alone.

Nothing but the CLS token leaves the backbone, so in the last block every token is a key and a value, but
only one asks; the block's other projections and its MLP are for that one token. That is nearly a whole block
of work less, and the CLS vector is the same but for rounding (docs/decisions/0008-cls-only-last-block.md).
"""
# B batch, N tokens, Q tokens that ask (one), P key and value (2), D features, H heads, F features of a head

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from model_store.runtimes.split_attention import plain_blocks, split_outputs


class ClsBlock(nn.Module):
    """[B, N, D] tokens to the [B, 1, D] CLS token that a timm `Block` makes of them."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        parts = cast(Any, block)  # timm's blocks have these attributes, of which torch's types know nothing
        attention = parts.attn
        self._head_shape: tuple[int, int] = (attention.num_heads, attention.head_dim)
        sizes = [attention.attn_dim, 2 * attention.attn_dim]
        self.query, self.key_value = split_outputs(attention.qkv, sizes)
        self.query_norm, self.key_norm = attention.q_norm, attention.k_norm
        self.project = nn.Sequential(attention.norm, attention.proj, parts.ls1)
        self.before_attention, self.before_mlp = parts.norm1, parts.norm2
        self.mlp = nn.Sequential(parts.mlp, parts.ls2)
        self.first: Callable[[Tensor], Tensor] = _first

    def forward(self, tokens_BND: Tensor) -> Tensor:
        normed_BND = self.before_attention(tokens_BND)
        query_BHQF = self.query(normed_BND[:, :1]).unflatten(2, self._head_shape).transpose(1, 2)
        pairs_BNPHF = self.key_value(normed_BND).unflatten(2, (2, *self._head_shape))
        key_BHNF, value_BHNF = pairs_BNPHF.permute(2, 0, 3, 1, 4).unbind(0)
        seen_BHQF = scaled_dot_product_attention(
            self.query_norm(query_BHQF), self.key_norm(key_BHNF), value_BHNF
        )
        cls_BQD = self.first(tokens_BND) + self.project(seen_BHQF.transpose(1, 2).flatten(2))
        after_BQD: Tensor = cls_BQD + self.mlp(self.before_mlp(cls_BQD))
        return after_BQD


def _first(tokens_BND: Tensor) -> Tensor:
    return tokens_BND[:, :1]


def for_cls_alone(model: nn.Module) -> nn.Module:
    """The model, its last block now for the CLS token alone where that is a plain one.

    Any other model, or one that uses the other tokens after its blocks, stays as it is.
    """
    if plain := plain_blocks(model):
        blocks = cast(Any, model).blocks
        if plain[-1] is blocks[-1]:
            blocks[-1] = ClsBlock(blocks[-1])
    return model
