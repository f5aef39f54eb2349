"""Models written for their graphs give the vectors of the models that timm makes."""

from typing import Any

import pytest
import torch
from torch import Tensor

from model_store.backbone import BackboneArtefact, build_model
from model_store.preprocess import Preprocessing
from model_store.runtimes.byte_patches import BytePatches, byte_patches, cut_patches
from model_store.runtimes.cls_block import ClsBlock, for_cls_alone
from model_store.runtimes.narrow_sums import FirstByProduct, narrow_sums
from model_store.runtimes.quick_gelu import silu_for_quick_gelu
from model_store.runtimes.rewriting import rewritten
from model_store.runtimes.runtime import PLAIN_GROUP
from model_store.runtimes.smoothing import activation_group, smooth
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


def model_of(architecture: str, image_size: tuple[int, int] = (SIDE, SIDE), **options: Any) -> Any:
    """With random weights everywhere: some are zero or one before training, where a mistake would not show."""
    model = build_model(architecture, image_size, **options)
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        parameter.data.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def geometry(height: int = SIDE, width: int = SIDE) -> Preprocessing:
    return Preprocessing(
        height=height,
        width=width,
        crop_fraction=1.0,
        interpolation="bicubic",
        mean=(0.48, 0.46, 0.41),
        std=(0.27, 0.26, 0.28),
    )


def embed(
    model: Any, chosen: Preprocessing | None = None, precision: str = "float32", contrast: int = 256
) -> Tensor:
    """Of three pictures with so many different numbers around 128."""
    chosen = chosen or geometry()
    shape = (3, 3, chosen.height, chosen.width)
    generator = torch.Generator().manual_seed(2)
    least = 128 - contrast // 2
    pixels_BCHW = torch.randint(least, least + contrast, shape, generator=generator, dtype=torch.uint8)
    embedding = Embedding(model, chosen, precision).eval()
    with torch.inference_mode():
        cls_BD: Tensor = embedding(embedding.prepare(pixels_BCHW))
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


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_layer_that_reads_bytes_gives_the_same_vector(options: dict[str, Any]) -> None:
    model = model_of(PLAIN, **options)
    whole_BD = embed(model)
    assert byte_patches(model, geometry()) is model
    assert isinstance(model.patch_embed, BytePatches)
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_cls_token_cut_out_by_a_product_gives_the_same_vector(options: dict[str, Any]) -> None:
    model = model_of(PLAIN, **options)
    whole_BD = embed(model)
    assert narrow_sums(for_cls_alone(model)) is model
    assert isinstance(model.blocks[-1].first, FirstByProduct)
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)
    assert rewritten(model, geometry()) is model
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)


def test_sums_of_wide_and_of_unknown_models_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    unknown = narrow_sums(model_of(PLAIN))
    assert not any(isinstance(one, FirstByProduct) for one in unknown.modules())
    monkeypatch.setattr("model_store.runtimes.narrow_sums.MAX_FEATURES", 191)
    wide = narrow_sums(for_cls_alone(model_of(PLAIN)))
    assert not any(isinstance(one, FirstByProduct) for one in wide.modules())


def test_patches_of_a_picture_that_is_no_square_keep_their_places() -> None:
    chosen = geometry(height=48, width=32)
    model = model_of(PLAIN, image_size=(48, 32))
    whole_BD = embed(model, chosen)
    torch.testing.assert_close(embed(byte_patches(model, chosen), chosen), whole_BD, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("side", [SIDE, 16], ids=["patches", "one patch"])
def test_cutting_patches_leaves_the_picture_as_it_is(side: int) -> None:
    pixels_BCHW = torch.randint(0, 256, (1, side, side, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    before_BCHW = pixels_BCHW.clone()
    patches_BNP = cut_patches(pixels_BCHW, 3 * 16 * 16)
    assert (patches_BNP.shape, patches_BNP.dtype) == ((1, (side // 16) ** 2, 768), torch.int8)
    assert torch.equal(pixels_BCHW, before_BCHW)
    assert torch.equal(cut_patches(pixels_BCHW.contiguous(), 3 * 16 * 16), patches_BNP)


def test_bytes_are_exact_in_bfloat16_where_normalised_pixels_are_not() -> None:
    """The first layer's own error, that of its weights apart: they are rounded beforehand."""
    model = model_of(PLAIN)
    read = byte_patches(model_of(PLAIN), geometry())
    for one in (model.patch_embed.proj, read.patch_embed.product):
        one.weight.data = one.weight.data.bfloat16().float()
    pixels_BCHW = torch.randint(0, 256, (4, 3, SIDE, SIDE), dtype=torch.uint8)
    patches_BNP = Embedding(read, geometry()).prepare(pixels_BCHW)
    exact_BND = read.patch_embed(patches_BNP.float())
    assert torch.equal(read.patch_embed(patches_BNP.bfloat16().float()), exact_BND)
    normalised_BCHW = (pixels_BCHW.float() / 255 - 0.5) / 0.3
    rounded_BND = model.patch_embed(normalised_BCHW.bfloat16().float())
    assert not torch.equal(rounded_BND, model.patch_embed(normalised_BCHW))


def test_rounded_weights_do_not_count_for_the_mean_of_all_bytes() -> None:
    """Bytes from 0 to 255 would: the worst vector of these pale pictures falls to 0.9996."""
    chosen = geometry(224, 224)
    torch.manual_seed(0)
    model = build_model(PLAIN, (224, 224))
    exact_BD = embed(model, chosen, contrast=56)
    rounded_BD = embed(byte_patches(model, chosen), chosen, "bfloat16", contrast=56)
    assert float(torch.cosine_similarity(rounded_BD, exact_BD).min()) > 0.9998


# -- inputs of like size -----------------------------------------------------------------------------


def real_pixels(num: int = 20, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)


def inputs_of(model: Any, layer: Any) -> Tensor:
    """[T, I] what a layer reads of all tokens of two pictures."""
    seen: list[Tensor] = []
    watching = layer.register_forward_pre_hook(lambda _, given: seen.append(given[0].detach().flatten(0, -2)))
    embedding = Embedding(model, geometry()).eval()
    embedding(embedding.prepare(real_pixels(2)))
    watching.remove()
    return seen[0]


def with_large_features(model: Any) -> Any:
    """A few features of each layer's input far greater than the others, as pretrained models have them."""
    for block in model.blocks:
        for norm in (block.norm1, block.norm2):
            norm.weight.data[::37] *= 30.0
        block.mlp.fc1.bias.data[::41] += 20.0
    return model


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_inputs_of_like_size_give_the_same_vector(options: dict[str, Any]) -> None:
    model = with_large_features(model_of(PLAIN, **options))
    before_OI = model.blocks[-1].attn.qkv.weight.detach().clone()
    whole_BD = embed(model)
    assert smooth(model, geometry(), real_pixels()) is model
    assert not torch.equal(model.blocks[-1].attn.qkv.weight, before_OI)
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)
    written = rewritten(model, geometry())
    torch.testing.assert_close(embed(written), whole_BD, rtol=1e-4, atol=1e-4)


def test_features_behind_a_norm_come_to_be_of_like_size() -> None:
    def spread(model: Any) -> float:
        sizes_I = [
            inputs_of(model, layer).abs().amax(dim=0)
            for block in model.blocks
            for layer in (block.attn.qkv, block.mlp.fc1)
        ]
        return max(float(size_I.max() / size_I.median()) for size_I in sizes_I)

    model = with_large_features(model_of(PLAIN))
    before = spread(model)
    assert spread(smooth(model, geometry(), real_pixels())) < 0.5 * before


def test_hidden_features_of_like_size_lie_side_by_side() -> None:
    """So that a scale over many of them is not all one large feature's."""

    def loss(model: Any, group: int) -> float:
        """Of rounding to int8 with a scale a group, over what is rounded."""
        lost, all_of_it = 0.0, 0.0
        for block in model.blocks:
            groups_TGI = inputs_of(model, block.mlp.fc2).unflatten(-1, (-1, group))
            scale_TG1 = groups_TGI.abs().amax(dim=-1, keepdim=True).clamp_min(1e-9) / 127.0
            lost += float(((groups_TGI / scale_TG1).round() * scale_TG1 - groups_TGI).square().sum())
            all_of_it += float(groups_TGI.square().sum())
        return lost / all_of_it

    model = with_large_features(model_of(PLAIN))
    before = loss(model, 192)
    assert loss(smooth(model, geometry(), real_pixels()), 192) < 0.7 * before


def test_a_feature_that_no_picture_shows_keeps_a_finite_weight() -> None:
    model = model_of(PLAIN)
    for block in model.blocks:
        block.norm1.weight.data[5], block.norm1.bias.data[5] = 0.0, 0.0
        block.mlp.fc1.weight.data[:, 7] = 0.0
    whole_BD = embed(model)
    smooth(model, geometry(), real_pixels())
    assert all(bool(one.isfinite().all()) for one in model.parameters())
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)


def test_weights_that_another_model_shares_stay_as_they_are() -> None:
    model = model_of(PLAIN)
    shared = dict(model.named_parameters())
    before = {name: value.detach().clone() for name, value in shared.items()}
    smooth(model, geometry(), real_pixels())
    assert all(torch.equal(shared[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("architecture", "group"),
    [
        (PLAIN, 192),
        ("vit_small_patch16_224", 192),
        ("vit_base_patch16_224", 192),
        ("vit_large_patch16_224", 128),
        ("deit_tiny_distilled_patch16_224", PLAIN_GROUP),
        ("eva02_tiny_patch14_224", PLAIN_GROUP),
    ],
)
def test_a_scale_is_shared_by_as_many_features_as_divide_all_inputs(architecture: str, group: int) -> None:
    with torch.device("meta"):
        model = load_timm().create_model(architecture, num_classes=0)
    assert activation_group(model) == group


@pytest.mark.parametrize("options", [{"scale_mlp_norm": True}, {"mlp_layer": load_timm().layers.SwiGLU}])
def test_another_mlp_stays_as_it_is(options: dict[str, Any]) -> None:
    model = model_of(PLAIN, **options)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    smooth(model, geometry(), real_pixels())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert activation_group(model) == PLAIN_GROUP


def test_another_first_layer_stays_as_it_is() -> None:
    for model in (model_of(PLAIN, dynamic_img_size=True), model_of("deit_tiny_distilled_patch16_224")):
        before = model.patch_embed
        assert byte_patches(model, geometry()).patch_embed is before


def test_pictures_that_patches_do_not_fill_are_left_to_timm() -> None:
    model = model_of(PLAIN, image_size=(40, 40))
    before = model.patch_embed
    assert byte_patches(model, geometry(40, 40)).patch_embed is before


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


# -- activations -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_silu_of_scaled_layers_is_quick_gelu(options: dict[str, Any]) -> None:
    model = model_of(PLAIN, act_layer="quick_gelu", **options)
    whole_BD = embed(model)
    assert silu_for_quick_gelu(model) is model
    assert {type(block.mlp.act) for block in model.blocks} == {torch.nn.SiLU}
    torch.testing.assert_close(embed(model), whole_BD, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(embed(for_cls_alone(model)), whole_BD, rtol=1e-4, atol=1e-4)


def test_other_activations_stay() -> None:
    model = model_of(PLAIN)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert {type(block.mlp.act) for block in silu_for_quick_gelu(model).blocks} == {torch.nn.GELU}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_mlp_with_a_norm_between_its_layers_keeps_quick_gelu() -> None:
    """The norm would divide the factor out again."""
    model = model_of(PLAIN, act_layer="quick_gelu", scale_mlp_norm=True)
    whole_BD = embed(model)
    torch.testing.assert_close(embed(silu_for_quick_gelu(model)), whole_BD, rtol=1e-4, atol=1e-4)
