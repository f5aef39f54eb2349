"""Models written for their graphs give the vectors of the models that timm makes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_store.backbone import BackboneArtefact, build_model
from model_store.preprocess import Preprocessing
from model_store.runtimes.cls_block import ClsBlock, for_cls_alone
from model_store.runtimes.split_attention import SplitAttention, split_attention
from model_store.runtimes.torch_runtime import Embedding
from model_store.timm_import import load_timm

SIDE = 32
PLAIN = "vit_tiny_patch16_224"
OPTIONS: dict[str, dict[str, Any]] = {
    "as it is": {},
    "without biases of query, key and value": {"qkv_bias": False},
    "normed queries and keys": {"qk_norm": True},
    "normed attention": {"scale_attn_norm": True},
    "layer scale": {"init_values": 0.1},
    "register tokens": {"reg_tokens": 4},
    "a norm before the blocks": {"pre_norm": True},
    "dropout that only training has": {"drop_path_rate": 0.5, "proj_drop_rate": 0.5, "attn_drop_rate": 0.5},
}


def model_of(architecture: str, **options: Any) -> Any:
    """With random weights everywhere: some are zero or one before training, where a mistake would not show."""
    model = build_model(architecture, (SIDE, SIDE), **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def embed(model: Any) -> Tensor:
    pixels_BCHW = torch.randint(
        0, 256, (3, 3, SIDE, SIDE), generator=torch.Generator().manual_seed(2), dtype=torch.uint8
    )
    geometry = Preprocessing(
        height=SIDE,
        width=SIDE,
        crop_fraction=1.0,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    with torch.inference_mode():
        cls_BD: Tensor = Embedding(model, geometry).eval()(pixels_BCHW)
    return cls_BD


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_cls_vector_is_that_of_the_whole_block(options: dict[str, Any]) -> None:
    model = model_of(PLAIN, **options)
    whole_BD = embed(model)
    assert for_cls_alone(model) is model
    assert isinstance(model.blocks[-1], ClsBlock)
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_attention_written_out_gives_the_same_vector(options: dict[str, Any]) -> None:
    model = model_of(PLAIN, **options)
    whole_BD = embed(model)
    assert split_attention(for_cls_alone(model)) is model
    is_split = [isinstance(block.attn, SplitAttention) for block in model.blocks[:-1]]
    assert set(is_split) == {not options.get("qk_norm", False)}
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)


def test_the_other_tokens_are_not_computed() -> None:
    model = model_of(PLAIN)
    for_cls_alone(model)
    tokens_BND = model.forward_features(torch.zeros((2, 3, SIDE, SIDE)))
    assert tokens_BND.shape == (2, 1, 192)


def test_no_weight_is_lost_or_kept_twice(tiny_artefact: BackboneArtefact) -> None:
    model = tiny_artefact.model()
    before = sum(one.numel() for one in model.parameters())
    written = split_attention(for_cls_alone(model))
    assert sum(one.numel() for one in written.parameters()) == before


@pytest.mark.parametrize(
    "architecture",
    ["deit_tiny_distilled_patch16_224", "vit_small_patch16_18x2_224", "eva02_tiny_patch14_224"],
)
def test_another_architecture_stays_as_it_is(architecture: str) -> None:
    """Other blocks, or another use of the tokens behind them."""
    model = load_timm().create_model(architecture, num_classes=0)
    parts = [(block, getattr(block, "attn", None)) for block in model.blocks]
    split_attention(for_cls_alone(model))
    assert [(block, getattr(block, "attn", None)) for block in model.blocks] == parts
