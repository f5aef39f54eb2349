"""The servers that benchmarks compare this one with compute what it computes, the ordinary way."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pictures import encoded, noise
from PIL import ImageFilter
from torch import Tensor

from benchmarks.agreement import share_of_same_answers
from benchmarks.peers.answering import Answering
from benchmarks.peers.arguments import Arguments, Engine
from benchmarks.peers.ordinary import ordinary_backbone, ordinary_export, ordinary_pixels
from benchmarks.serving import p99_over_best
from model_store.backbone import Backbone, BackboneArtefact
from model_store.decoding import ImageLimits, decode_image
from model_store.measuring import Tuned
from model_store.parity import LabelledPixels
from model_store.store import ModelStore
from model_store.timm_import import load_timm

RUNTIMES = ("torch-float32", "openvino-float32", "openvino-int8")  # without an export, and two forms of it
MIN_COSINE = 0.998  # of the coarsest number format


def timm_pixels(artefact: BackboneArtefact, data: bytes) -> Tensor:
    """By timm's own evaluation transform, before it normalises."""
    load_timm()
    from timm.data import create_transform

    wanted = artefact.manifest.preprocessing
    transform = create_transform(
        input_size=(3, wanted.height, wanted.width),
        interpolation=wanted.interpolation,
        crop_pct=wanted.crop_fraction,
        normalize=False,
    )
    pixels: Tensor = transform(decode_image(data, ImageLimits()))
    return pixels


@pytest.mark.parametrize("size", [(32, 32), (90, 61), (61, 90), (201, 40), (7, 9)])
def test_ordinary_pixels_are_those_of_timm(size: tuple[int, int], tiny_artefact: BackboneArtefact) -> None:
    data = encoded(noise(seed=size[0], size=size, spread=120).filter(ImageFilter.GaussianBlur(1.0)))
    pixels = ordinary_pixels(data, tiny_artefact.manifest.preprocessing, ImageLimits())
    assert torch.equal(pixels, timm_pixels(tiny_artefact, data))


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_ordinary_backbone_agrees_with_torch(
    runtime: str,
    tiny_artefact: BackboneArtefact,
    tiny_backbone: Backbone,
    labelled_pixels: LabelledPixels,
) -> None:
    pixels_BCHW = labelled_pixels.pixels_NCHW
    export = ordinary_export(tiny_artefact, runtime, pixels_BCHW)
    backbone = ordinary_backbone(tiny_artefact, runtime, export, num_threads=2)
    assert backbone.runtime_name == runtime
    cosine_B = torch.cosine_similarity(backbone.embed(pixels_BCHW), tiny_backbone.embed(pixels_BCHW))
    assert float(cosine_B.min()) > MIN_COSINE


def test_both_engines_answer_alike(
    tmp_path: Path,
    tiny_store: ModelStore,
    tiny_artefact: BackboneArtefact,
    tiny_tuned: Tuned,
    make_module: Callable[..., bytes],
) -> None:
    tiny_store.put_tuning(tiny_tuned.tuning, tiny_tuned.export)
    modules = {task: tiny_store.put_module(make_module(task, seed=i)) for i, task in enumerate("ab")}
    tiny_store.publish(lambda head: {**head.tasks, **modules}, "two tasks")
    runtime = tiny_tuned.tuning.chosen
    export = ordinary_export(tiny_artefact, runtime, torch.zeros((1, 3, 32, 32), dtype=torch.uint8))
    assert export is not None
    path = tmp_path / "ordinary.onnx"
    path.write_bytes(export)
    pictures = [encoded(noise(colour, size=(40, 40))) for colour in range(5)]

    def answers(engine: Engine) -> list[dict[str, Any]]:
        arguments = Arguments(
            store=str(tmp_path / "store"),
            port=0,
            threads=1,
            workers=1,
            max_batch_size=2,
            engine=engine,
            runtime=runtime,
            export=str(path),
        )
        answering = Answering(arguments, num_threads=1, max_batch_size=2)
        return answering.answer([answering.decode(picture) for picture in pictures])

    ours, ordinary = answers("ours"), answers("ordinary")
    assert [one["confidence"] for one in ordinary] == pytest.approx([one["confidence"] for one in ours], 1e-2)
    assert [(one["task"], one["label"]) for one in ordinary] == [(one["task"], one["label"]) for one in ours]


def answer(label: str, confidence: float) -> dict[str, Any]:
    return {"task": "birds", "label": label, "confidence": confidence}


def test_a_peer_that_answers_otherwise_where_this_service_is_sure_is_no_comparison() -> None:
    expected = [answer("owl", 0.95), answer("owl", 0.5)]
    assert share_of_same_answers("peer", [answer("owl", 0.9), answer("jay", 0.6)], expected) == 0.5
    with pytest.raises(AssertionError, match="peer answers"):
        share_of_same_answers("peer", [answer("jay", 0.9), answer("owl", 0.6)], expected)
    with pytest.raises(AssertionError, match="no picture is clear enough"):
        share_of_same_answers("peer", expected[1:], expected[1:])


def test_a_peer_that_refused_some_is_no_match_for_the_p99() -> None:
    p99 = {"tosca": 100.0, "fast": 10.0, "slow": 200.0}
    assert p99_over_best(p99, {"fast": 1, "slow": 0}, ["fast", "slow"]) == 0.5
    assert p99_over_best(p99, {"fast": 1, "slow": 2}, ["fast", "slow"]) is None
