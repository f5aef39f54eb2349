"""Module files with a manifest made to do harm: each is refused, with a message that names the fault."""

from collections.abc import Callable

import pytest
from forged_modules import with_manifest, with_manifest_text

from model_store.errors import InvalidModule
from model_store.manifest import MAX_CLASSES
from model_store.module_file import read_module

MANIFESTS: dict[str, tuple[Callable[[], bytes], str]] = {
    "not JSON": (lambda: with_manifest_text("hello"), "module manifest"),
    "empty": (lambda: with_manifest_text(""), "module manifest"),
    "a list": (lambda: with_manifest_text("[]"), "module manifest"),
    "a number": (lambda: with_manifest_text(5), ""),
    "null": (lambda: with_manifest_text(None), ""),
    "nested too deep": (lambda: with_manifest_text("[" * 100_000), "module manifest"),
    "a lone surrogate": (lambda: with_manifest_text("\ud800"), ""),
    "a lone surrogate in a label": (lambda: with_manifest_text('{"labels": ["\ud800"]}'), ""),
    "format version 1": (lambda: with_manifest(format_version=1), "format_version"),
    "an unknown field": (
        lambda: with_manifest(pickle="cos\nsystem"),
        "pickle: Extra inputs are not permitted",
    ),
    "a field missing": (lambda: with_manifest_text('{"task": "birds"}'), "labels: Field required"),
    "an unknown flow": (lambda: with_manifest(flow="lora"), "flow"),
    "no labels": (lambda: with_manifest(labels=[]), "labels"),
    "labels not a list": (lambda: with_manifest(labels="abc"), "labels"),
    "one label too few": (lambda: with_manifest(labels=["a", "b"]), r"head\.weight is \[3, 16\]"),
    "duplicate labels": (lambda: with_manifest(labels=["a", "b", "a"]), "labels must be distinct"),
    "too many labels": (
        lambda: with_manifest(labels=[f"c{k}" for k in range(MAX_CLASSES + 1)]),
        "labels: .*at most 10000",
    ),
    "a million labels": (
        lambda: with_manifest(labels=[f"c{k}" for k in range(1_000_000)]),
        "header claims",
    ),
    "fingerprint not hex": (lambda: with_manifest(backbone_fingerprint="z" * 64), "backbone_fingerprint"),
    "fingerprint too short": (lambda: with_manifest(backbone_fingerprint="a" * 63), "backbone_fingerprint"),
    "fingerprint with a newline": (
        lambda: with_manifest(backbone_fingerprint="a" * 64 + "\n"),
        "backbone_fingerprint",
    ),
    "no features": (lambda: with_manifest(feature_dim=0), "feature_dim"),
    "negative features": (lambda: with_manifest(feature_dim=-16), "feature_dim"),
    "fractional features": (lambda: with_manifest(feature_dim=16.5), "feature_dim"),
    "gigantic features": (lambda: with_manifest(feature_dim=2**60), "feature_dim"),
    "other features": (lambda: with_manifest(feature_dim=32), "expected"),
    "gigantic bottleneck": (lambda: with_manifest(bottleneck_dim=2**60), "bottleneck_dim"),
    "other bottleneck": (lambda: with_manifest(bottleneck_dim=2), "expected"),
    "NaN weight": (lambda: with_manifest(luca_weight=float("nan")), "luca_weight"),
    "infinite weight": (lambda: with_manifest(luca_weight=float("inf")), "luca_weight"),
    "negative weight": (lambda: with_manifest(luca_weight=-1.0), "luca_weight"),
    "metric not a number": (lambda: with_manifest(metrics={"accuracy": "high"}), "metrics.accuracy"),
    "metric NaN": (lambda: with_manifest(metrics={"accuracy": float("nan")}), "metrics.accuracy"),
    "too many metrics": (lambda: with_manifest(metrics={f"m{i}": 0.0 for i in range(65)}), "metrics"),
    "nested provenance": (lambda: with_manifest(provenance={"a": {"b": "c"}}), "provenance.a"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_hostile_manifest_is_refused(name: str) -> None:
    make, fault = MANIFESTS[name]
    with pytest.raises(InvalidModule, match=fault or None) as refusal:
        read_module(make())
    assert len(str(refusal.value)) < 1000


TASK_NAMES = [
    "",
    ".",
    "..",
    ".hidden",
    "-rf",
    "_x",
    "a/b",
    "../../etc/passwd",
    "a\\b",
    "C:evil",
    "a b",
    " a",
    "a ",
    "a\n",
    "a\r\nSet-Cookie: x",
    "a\x00b",
    "a\x1b[31m",
    "vögel",
    "鳥",
    "a\u202egnp.exe",
    "%2e%2e",
    "a?b",
    "a#b",
    "x" * 65,
]


@pytest.mark.parametrize("name", TASK_NAMES)
def test_a_hostile_task_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidModule, match="module manifest: task: "):
        read_module(with_manifest(task=name))


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "x" * 64, "7"])
def test_a_decent_task_name_is_accepted(name: str) -> None:
    assert read_module(with_manifest(task=name)).manifest.task == name


LABELS = [
    "",
    " ",
    "\t",
    " cat",
    "cat ",
    "a\nb",
    "a\x00b",
    "a\x1b[31m",
    "a\u200bb",
    "a\u202eb",
    "\ufeffcat",
    "x" * 257,
]


@pytest.mark.parametrize("label", LABELS)
def test_a_hostile_label_is_refused(label: str) -> None:
    with pytest.raises(InvalidModule, match=r"module manifest: labels\.1"):
        read_module(with_manifest(labels=["a", label, "c"]))


@pytest.mark.parametrize("label", ["x" * 256, "cat, black", "猫", "a/b", "<b>", "../x"])
def test_a_decent_label_is_accepted(label: str) -> None:
    assert label in read_module(with_manifest(labels=["a", label, "c"])).manifest.labels
