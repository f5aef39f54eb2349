"""`tosca backbone`: backbones are added, listed, tuned on real pictures, or refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
from pictures import write_classes
from tosca_command import TINY, Tosca, assert_fault, assert_usage


def test_a_backbone_is_added_and_listed(tosca: Tosca) -> None:
    added = tosca("backbone", "add", TINY, "--random-weights", "--image-size", 32, "--json")
    assert added.code == 0
    assert (added.json["architecture"], added.json["feature_dim"], added.json["revision"]) == (TINY, 192, 1)
    again = tosca("backbone", "add", TINY, "--random-weights", "--image-size", 32)
    assert again.code == 0 and added.json["fingerprint"] in again.out
    listed = tosca("backbone", "list", "--json")
    assert [one["fingerprint"] for one in listed.json] == [added.json["fingerprint"]]
    assert listed.json[0]["active"] is True
    table = tosca("backbone", "list").out
    assert TINY in table and "32x32" in table and "*" in table


def test_an_empty_store_lists_nothing(tosca: Tosca) -> None:
    assert tosca("backbone", "list", "--json").json == []


def test_a_checkpoint_becomes_a_backbone(tosca: Tosca, tmp_path: Path, tiny_artefact: Any) -> None:
    (tmp_path / "weights.safetensors").write_bytes(tiny_artefact.weights)
    added = tosca(
        "backbone", "add", TINY, "--checkpoint", "weights.safetensors", "--image-size", 32, "--json"
    )
    assert added.json["fingerprint"] == tiny_artefact.manifest.fingerprint


def test_a_second_backbone_waits_until_no_task_is_active(trained: Tosca) -> None:
    other = ("backbone", "add", TINY, "--random-weights", "--image-size", 48)
    assert_fault(trained(*other), "the 2 active tasks of .tosca/store belong to backbone")
    for task in ("colours", "shades"):
        assert trained("tasks", "remove", task).code == 0
    assert trained(*other).code == 0
    assert [one["active"] for one in trained("backbone", "list", "--json").json].count(True) == 1


BACKBONE_FAULTS = {
    "no CLS token": (("resnet18", "--random-weights"), "'resnet18' has no CLS token"),
    "unknown name": (("vit_nonsense", "--random-weights"), "timm knows no model named 'vit_nonsense'"),
    "missing checkpoint": ((TINY, "--checkpoint", "nowhere.pth"), "nowhere.pth is not a file"),
    "options without a name": (("--random-weights",), "name the timm architecture"),
    "pictures smaller than a patch": (
        (TINY, "--random-weights", "--image-size", 8),
        "'vit_tiny_patch16_224' cannot embed pictures of 8×8 pixels",
    ),
}


@pytest.mark.parametrize("name", BACKBONE_FAULTS)
def test_a_backbone_that_cannot_serve_is_refused(name: str, tosca: Tosca) -> None:
    arguments, fault = BACKBONE_FAULTS[name]
    assert_fault(tosca("backbone", "add", *arguments), fault)
    assert tosca("backbone", "list", "--json").json == []


TUNE = ("backbone", "tune", "--data", "colours", "--rounds", 1, "--batch", 2, "--pictures", 6)


def test_a_backbone_is_tuned_on_real_pictures(trained: Tosca) -> None:
    tuned = trained(*TUNE, "--runtime", "torch-bfloat16", "--runtime", "torch-float32", "--json")
    assert tuned.code == 0, tuned.err
    assert tuned.json["chosen"] in ("torch-bfloat16", "torch-float32")
    assert {one["runtime"] for one in tuned.json["table"]} == {"torch-bfloat16", "torch-float32"}
    assert all(one["parity"]["num_pictures"] == 6 for one in tuned.json["table"])
    only = trained(*TUNE, "--runtime", "torch-bfloat16")
    assert "torch-bfloat16 is now the runtime of this backbone" in " ".join(only.out.split())
    again = trained("train", "--task", "colours", "--data", "colours", "--seed", 2, "--force", "--json")
    assert again.json["features_computed"] == 27, "features of another runtime are not mixed in"


def test_tuning_on_one_class_is_refused_and_on_few_pictures_told_of(trained: Tosca, tmp_path: Path) -> None:
    write_classes(tmp_path / "red", 30, labels=("red",))
    tune = ("backbone", "tune", "--rounds", 1, "--batch", 1, "--runtime", "torch-float32", "--data")
    assert_fault(trained(*tune, "red"), "red: all pictures are of class 'red', parity needs two classes")
    assert not list(tmp_path.glob(".tosca/store/backbones/*/tunings/*"))
    few = trained(*tune, "colours", "--pictures", 6)
    assert few.code == 0
    assert "warning: 6 pictures say little about parity, expected 24 or more" in few.err.splitlines()
    assert "warning" not in trained(*tune, "colours").err
    assert_usage(trained(*tune, "x=colours", "--data", "x=red"), "colours and red are both 'x'")


def test_a_runtime_asked_for_and_refused_changes_nothing(
    trained: Tosca, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("model_store.runtimes.runtime.find_spec", lambda name: name == "torch" or None)
    asked = trained(*TUNE, "--runtime", "torch-float32", "--runtime", "onnxruntime-float32")
    assert_fault(asked, "runtime onnxruntime-float32 is refused: the package onnxruntime is not installed")
    assert not list(tmp_path.glob(".tosca/store/backbones/*/tunings/*"))


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--data", "nowhere"), "nowhere is no folder"),
        (("--data", "colours", "--rounds", "0"), "'--rounds'"),
        ((), "Missing option '--data'"),
    ],
)
def test_tuning_says_what_was_expected(arguments: tuple[str, ...], fault: str, trained: Tosca) -> None:
    assert_usage(trained("backbone", "tune", *arguments), fault)


def test_an_unknown_runtime_cannot_be_tuned(trained: Tosca) -> None:
    assert_fault(trained(*TUNE, "--runtime", "abacus"), "unknown runtime 'abacus'")
