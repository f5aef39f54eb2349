"""The module file: what is written is what is read, and a file that does not fit its backbone is told so."""

import dataclasses
import hashlib
import json
import re
import struct

import pytest
import safetensors.torch
import torch
from random_modules import (
    FEATURE_DIM,
    backbone_manifest,
    build_bank,
    module_bytes,
    random_cls,
    random_module,
    with_calibration,
)

from model_store.errors import FingerprintMismatch, GoldenCheckFailed, InvalidModule
from model_store.luca import FLOWS, Flow
from model_store.module_file import (
    GOLDEN_TOLERANCE,
    ModuleManifest,
    check_module,
    read_module,
    round_weights,
)
from model_store.task_module import TaskModule


def assert_same_module(one: TaskModule, other: TaskModule) -> None:
    assert (one.task, one.labels) == (other.task, other.labels)
    assert (one.luca_weight, one.ridge_weight) == (other.luca_weight, other.ridge_weight)
    assert (one.standardisation is None) == (other.standardisation is None)
    for ours, theirs in ((one.luca, other.luca), (one.head, other.head)):
        mine, read = ours.state_dict(), theirs.state_dict()
        assert mine.keys() == read.keys()
        assert all(torch.equal(mine[name], read[name]) for name in mine)
    parts = ["statistics", "calibration"] + ["standardisation", "ridge"] * (one.standardisation is not None)
    for name in parts:
        ours, theirs = getattr(one, name), getattr(other, name)
        for field in dataclasses.fields(ours):
            written, read_back = getattr(ours, field.name), getattr(theirs, field.name)
            assert torch.equal(written, read_back), field.name
            assert written.dtype == read_back.dtype or name == "ridge", field.name


@pytest.mark.parametrize("flow", FLOWS)
@pytest.mark.parametrize("num_calibration", [0, 1, 6])
@pytest.mark.parametrize("standardised", [True, False])
def test_reading_restores_what_was_written(flow: Flow, num_calibration: int, standardised: bool) -> None:
    module = random_module(
        "birds", flow=flow, num_calibration=num_calibration, luca_weight=0.3, standardised=standardised
    )
    data = module_bytes(module)
    file = read_module(data)
    assert_same_module(file.module, module)
    assert file.sha256 == hashlib.sha256(data).hexdigest()
    assert file.size_bytes == len(data)


def test_the_manifest_is_read_as_written() -> None:
    fields = {
        "training": {"seed": 3, "recipe": "default", "l1": 0.5, "identity": True, "nothing": None},
        "metrics": {"accuracy": 0.75},
        "provenance": {"data": "Vögel – „ünïcode“"},
        "labels": ("Äpfel", "日本", "a|b"),
    }
    manifest = read_module(module_bytes(random_module("birds"), **fields)).manifest
    assert manifest.model_dump(include=set(fields)) == fields
    assert manifest == ModuleManifest.model_validate_json(manifest.model_dump_json())


def test_equal_content_gives_equal_bytes() -> None:
    written = {module_bytes(random_module("birds", seed=4)) for _ in range(40)}
    assert len(written) == 1


def test_other_content_gives_other_bytes() -> None:
    module = random_module("birds")
    assert module_bytes(module) != module_bytes(module, metrics={"accuracy": 0.5})
    assert module_bytes(module) != module_bytes(random_module("birds", seed=1))


def test_the_file_is_a_plain_safetensors_file_with_a_readable_header() -> None:
    data = module_bytes(random_module("birds"))
    (header_bytes,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + header_bytes])["__metadata__"]
    assert metadata["format"] == "tosca-module"
    assert json.loads(metadata["manifest"])["task"] == "birds"
    assert safetensors.torch.load(data)["luca.w1.mask"].shape == (FEATURE_DIM // 8,)


def test_a_module_answers_the_same_after_the_round_trip() -> None:
    modules = [random_module("birds", 1), random_module("cars", 2)]
    read = [read_module(module_bytes(module)).module for module in modules]
    named = [
        dataclasses.replace(module, sha256=other.sha256) for module, other in zip(modules, read, strict=True)
    ]
    x_BD = random_cls(10)
    assert build_bank(named).answer(x_BD) == build_bank(read).answer(x_BD)


def test_weights_of_a_read_module_need_no_gradient() -> None:
    module = read_module(module_bytes(random_module("birds"))).module
    assert not any(p.requires_grad for p in [*module.luca.parameters(), *module.head.parameters()])


# -- fitting the backbone ----------------------------------------------------------------------------


@pytest.mark.parametrize("flow", FLOWS)
def test_a_module_passes_on_its_own_backbone(flow: Flow) -> None:
    check_module(read_module(module_bytes(random_module("birds", flow=flow))), backbone_manifest())


def test_a_trained_module_passes_on_its_own_backbone(make_module, tiny_artefact) -> None:  # type: ignore[no-untyped-def]
    check_module(read_module(make_module("birds")), tiny_artefact.manifest)


def test_another_backbone_is_refused_by_fingerprint() -> None:
    ours, theirs = backbone_manifest(weights="a"), backbone_manifest(weights="b")
    file = read_module(module_bytes(random_module("birds"), ours))
    fault = (
        f"task 'birds': module was trained on backbone {ours.fingerprint[:12]}…, "
        f"this store serves {theirs.fingerprint[:12]}…"
    )
    with pytest.raises(FingerprintMismatch, match=re.escape(fault)):
        check_module(file, theirs)


def test_another_width_is_refused_with_both_widths() -> None:
    file = read_module(module_bytes(random_module("birds")))
    with pytest.raises(FingerprintMismatch, match=r"D = 16, backbone vit_tiny_patch16_224 has D = 768"):
        check_module(file, backbone_manifest(feature_dim=768))


@pytest.mark.parametrize("weight", ["w1", "b1", "w2", "b2", "v1", "v2", "norm_weight", "norm_bias"])
def test_one_perturbed_weight_fails_the_golden_check(weight: str) -> None:
    module = random_module("birds")
    with torch.no_grad():
        getattr(module.luca, weight).view(-1)[0] += 20.0
    with pytest.raises(GoldenCheckFailed, match="task 'birds': the module's logits differ by"):
        check_module(read_module(module_bytes(module)), backbone_manifest())


@pytest.mark.parametrize("part", ["head", "ridge", "input"])
def test_a_perturbed_expert_fails_the_golden_check(part: str) -> None:
    module = random_module("birds")
    assert module.standardisation is not None
    with torch.no_grad():
        if part == "head":
            module.head.scale *= 1.05
        elif part == "ridge":
            module.ridge.kernel_weight_MK[0] += 0.5
        else:
            module.standardisation.mean_D[0] += 0.5
    with pytest.raises(GoldenCheckFailed):
        check_module(read_module(module_bytes(module)), backbone_manifest())


def test_rounding_of_another_machine_passes_the_golden_check() -> None:
    module = random_module("birds")
    logits_MK = module.calibration.logits_MK
    shifted = logits_MK + 0.5 * GOLDEN_TOLERANCE * max(1.0, float(logits_MK.abs().max()))
    file = read_module(module_bytes(with_calibration(module, logits_MK=shifted)))
    check_module(file, backbone_manifest())


def test_rounded_weights_are_written_without_loss() -> None:
    module = random_module("birds")
    rounded = round_weights(module.luca, module.head, module.ridge)
    for name in ("kernel_weight_MK", "linear_weight_DK"):
        assert torch.equal(getattr(rounded, name), getattr(module.ridge, name))


def test_a_refused_module_is_an_invalid_module() -> None:
    assert issubclass(FingerprintMismatch, InvalidModule) and issubclass(GoldenCheckFailed, InvalidModule)
