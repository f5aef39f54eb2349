"""A ViT's attention with nothing but products: the way it is exported.

timm keeps the weights of query, key and value as one layer, whose output must be cut, turned and scaled
before the products. With a layer each, the scale in the query's weights, and heads that stay where they lie,
OpenVINO reads them inside one kernel, and nothing is copied in between (docs/decisions/0010-attention.md).
"""
# B batch, N tokens, D features, H heads, F features of a head

from typing import Any, cast

from torch import Tensor, nn

from model_store.timm_import import load_timm


class SplitAttention(nn.Module):
    """[B, N, D] tokens to what a timm `Attention` without norms of queries and keys makes of them."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        parts = cast(Any, attention)  # timm's modules have these attributes, which torch's types do not know
        self._head_shape: tuple[int, int] = (parts.num_heads, parts.head_dim)
        self.query, self.key, self.value = split_outputs(parts.qkv, [parts.attn_dim] * 3)
        self.query = _scaled(self.query, parts.scale)
        self.project = nn.Sequential(parts.norm, parts.proj)

    def forward(self, tokens_BND: Tensor, attn_mask: None = None, is_causal: bool = False) -> Tensor:
        assert attn_mask is None and not is_causal, "every token of a picture sees every other"
        query_BHNF = self.query(tokens_BND).unflatten(2, self._head_shape).permute(0, 2, 1, 3)
        key_BHFN = self.key(tokens_BND).unflatten(2, self._head_shape).permute(0, 2, 3, 1)
        value_BHNF = self.value(tokens_BND).unflatten(2, self._head_shape).permute(0, 2, 1, 3)
        seen_BHNF = (query_BHNF @ key_BHFN).softmax(dim=-1) @ value_BHNF
        out_BND: Tensor = self.project(seen_BHNF.permute(0, 2, 1, 3).flatten(2))
        return out_BND


def split_attention(model: nn.Module) -> nn.Module:
    """The model, attention written out in its plain blocks without norms of queries and keys, which are the
    same but for rounding."""
    for block in plain_blocks(model):
        if all(isinstance(one, nn.Identity) for one in (block.attn.q_norm, block.attn.k_norm)):
            block.attn = SplitAttention(block.attn)
    return model


def plain_blocks(model: nn.Module) -> list[Any]:
    """The blocks whose parts are known: those of timm's plain ViTs, exactly these classes; none of another
    model, which may use its tokens otherwise."""
    vision_transformer = load_timm().models.vision_transformer
    if type(model) is not vision_transformer.VisionTransformer:
        return []
    return [
        block
        for block in cast(Any, model).blocks
        if type(block) is vision_transformer.Block
        and type(block.attn) is vision_transformer.Attention
        and getattr(block.attn, "gate", None) is None
    ]


def split_outputs(layer: nn.Linear, sizes: list[int]) -> list[nn.Linear]:
    """Layers that each give so many of the outputs of one."""
    biases = [None] * len(sizes) if layer.bias is None else layer.bias.split(sizes)
    return [_linear(*parts) for parts in zip(layer.weight.split(sizes), biases, strict=True)]


def _scaled(layer: nn.Linear, factor: float) -> nn.Linear:
    return _linear(layer.weight * factor, None if layer.bias is None else layer.bias * factor)


def _linear(weight_OI: Tensor, bias_O: Tensor | None) -> nn.Linear:
    num_outputs, num_inputs = weight_OI.shape
    layer = nn.Linear(num_inputs, num_outputs, bias=bias_O is not None, device="meta")
    layer.weight = nn.Parameter(weight_OI, requires_grad=False)
    if bias_O is not None:
        layer.bias = nn.Parameter(bias_O, requires_grad=False)
    return layer
