"""Choosing a runtime: by measurement, behind a gate, kept in the store and used by everybody."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import write_splits
from pydantic import ValidationError
from torch import Tensor

from model_store import measuring
from model_store.backbone import Backbone, BackboneArtefact
from model_store.backbone_loading import load_backbone
from model_store.bank import ModuleBank
from model_store.errors import CorruptStore, InvalidBackbone, InvalidDataset
from model_store.measuring import Plan, Tuned, tune
from model_store.module_file import read_module
from model_store.parity import LabelledPixels, bank_answers, class_mean_answers, compare, read_labelled
from model_store.runtimes.runtime import REFERENCE
from model_store.store import ModelStore
from model_store.tuning import (
    Gate,
    Measurement,
    Parity,
    StreamsMeasurement,
    Tuning,
    best_streams,
    contenders,
    fastest,
    hardware_name,
    streams_gain,
)

CPU = torch.device("cpu")
ONNX = "onnxruntime-float32"


def quick(*runtimes: str) -> Plan:
    return Plan(runtimes, device="cpu", batch_sizes=(1, 2), num_rounds=1)


def parity(**changes: float) -> Parity:
    sound = {
        "num_pictures": 1000,
        "mean_cosine": 0.999,
        "min_cosine": 0.99,
        "task_flips": 0.0,
        "label_flips": 0.01,
        "accuracy": 0.9,
        "reference_accuracy": 0.9,
    }
    return Parity.model_validate(sound | changes)


def measurement(name: str, speedup: float, refused: str | None = None) -> Measurement:
    return Measurement(runtime=name, refused=refused, speedup={1: 9.0, 8: speedup})


def streams(num_streams: int, *images_per_s: float) -> StreamsMeasurement:
    return StreamsMeasurement(
        num_streams=num_streams,
        images_per_s=dict(zip((1, 8), images_per_s, strict=True)),
        latency_ms={1: 1.0, 8: 8.0},
    )


# -- the gate ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, None),
        ({"mean_cosine": 0.9949}, "mean cosine 0.9949 is below 0.995"),
        ({"min_cosine": 0.96}, "the worst cosine 0.9600 is below 0.97"),
        ({"task_flips": 0.005}, None),
        ({"task_flips": 0.006}, "0.60% of the pictures get another task"),
        ({"accuracy": 0.89}, None),
        ({"accuracy": 0.888}, "accuracy falls by 1.20%"),
        ({"accuracy": 0.95}, None),
        ({"num_pictures": 20, "task_flips": 0.05}, None),
        ({"num_pictures": 20, "task_flips": 0.1}, "10.00% of the pictures get another task"),
    ],
)
def test_the_gate_refuses_what_answers_otherwise(changes: dict[str, float], fault: str | None) -> None:
    found = parity(**changes).fault(Gate())
    assert (found is None) if fault is None else (found or "").startswith(fault)


@pytest.mark.parametrize("name", ["mean_cosine", "min_cosine", "task_flips", "accuracy"])
def test_what_is_no_number_passes_no_gate_and_is_kept_in_no_record(name: str) -> None:
    assert parity().model_copy(update={name: math.nan}).fault(Gate())
    with pytest.raises(ValidationError, match=name):
        parity(**{name: math.nan})


def test_the_fastest_at_the_largest_batch_is_chosen_among_those_that_passed() -> None:
    table = (measurement("a", 2.0), measurement("b", 5.0, refused="too rough"), measurement("c", 3.0))
    chosen = fastest(table)
    assert chosen is not None and chosen.runtime == "c"
    assert fastest((measurement("b", 5.0, refused="too rough"),)) is None


def test_what_gains_more_side_by_side_is_faster_as_it_is_served() -> None:
    table = (measurement("a", 3.0), measurement("b", 2.8).model_copy(update={"streams_gain": 1.2}))
    chosen = fastest(table)
    assert chosen is not None and chosen.runtime == "b"
    assert (chosen.best_speedup, chosen.served_speedup) == (2.8, pytest.approx(3.36))


def test_turns_of_the_contenders_decide() -> None:
    table = [
        measurement(name, speedup).model_copy(update={"served_images_per_s": served})
        for name, speedup, served in (("a", 4.0, 17.0), ("b", 3.7, 19.0), ("c", 2.0, None))
    ]
    chosen = fastest(table)
    assert chosen is not None and chosen.runtime == "b"


def test_contenders_are_those_that_are_nearly_the_fastest_and_passed() -> None:
    table = [measurement(name, speedup) for name, speedup in (("a", 4.0), ("b", 2.9), ("c", 2.7))]
    refused = measurement("d", 9.0, refused="too rough")
    assert [one.runtime for one in contenders([*table, refused])] == ["a", "b"]
    assert contenders([refused]) == []


@pytest.mark.parametrize(
    ("measured", "gain"),
    [([], 1.0), ([streams(1, 20.0, 28.0)], 1.0), ([streams(1, 20.0, 20.0), streams(2, 32.0, 30.0)], 1.5)],
)
def test_the_gain_of_streams_is_that_of_the_best_number(
    measured: list[StreamsMeasurement], gain: float
) -> None:
    assert streams_gain(measured) == gain


def test_runtimes_are_compared_as_they_would_be_served(
    tiny_artefact: BackboneArtefact, labelled_pixels: LabelledPixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower of two with one pass at a time gains by two, and is chosen with its streams when they take
    turns. One that comes near neither takes none."""
    pytest.importorskip("openvino")
    speedup = {ONNX: 3.0, "openvino-float32": 2.5, REFERENCE: 1.0}
    gains = {ONNX: 10.0, "openvino-float32": 20.0}

    def turn(own: Backbone, pixels_BCHW: Tensor, _: int) -> float:
        return own.num_streams * len(pixels_BCHW) / gains[own.runtime_name]

    monkeypatch.setattr(measuring, "time_side_by_side", turn)
    monkeypatch.setattr(measuring, "paired_seconds", lambda own, *_: (1.0, speedup[own.runtime_name]))
    monkeypatch.setattr(
        measuring,
        "_measure_streams",
        lambda _, runtime, *__: (streams(1, 10.0, 10.0), streams(2, gains[runtime], gains[runtime])),
    )
    found = tune(tiny_artefact, labelled_pixels, replace(quick(*speedup), num_threads=2)).tuning
    assert (found.chosen, found.streams_on(2)) == ("openvino-float32", 2)
    assert [one.streams_gain for one in found.table] == [1.0, 2.0, 1.0]
    assert [one.served_images_per_s for one in found.table] == [10.0, 20.0, None]


# -- streams -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("measured", "best"),
    [
        ([streams(1, 20.0, 28.0), streams(2, 32.0, 31.0)], 2),
        ([streams(1, 29.0, 28.0), streams(2, 32.0, 36.0)], 1),
        ([streams(1, 20.0, 30.0), streams(2, 37.0, 35.0), streams(4, 40.0, 40.0)], 2),
    ],
)
def test_the_fewest_streams_that_are_nearly_the_fastest_in_small_batches_are_best(
    measured: list[StreamsMeasurement], best: int
) -> None:
    assert best_streams(measured) == best


def test_streams_are_measured_up_to_one_a_thread(
    tiny_artefact: BackboneArtefact, labelled_pixels: LabelledPixels
) -> None:
    plan = Plan((ONNX,), "cpu", (1,), num_rounds=1, num_threads=4)
    found = tune(tiny_artefact, labelled_pixels, plan).tuning
    assert [one.num_streams for one in found.streams] == [1, 2, 4]
    for one in found.streams:
        for size, images_per_s in one.images_per_s.items():
            assert images_per_s == pytest.approx(1e3 * one.num_streams * size / one.latency_ms[size])


def test_torch_has_no_streams_to_measure(
    tiny_artefact: BackboneArtefact, labelled_pixels: LabelledPixels
) -> None:
    found = tune(tiny_artefact, labelled_pixels, quick(REFERENCE)).tuning
    assert found.streams == () and found.streams_on(8) == 1


@pytest.mark.parametrize(("num_threads", "num_streams"), [(1, 1), (2, 1), (4, 2), (8, 4), (9, 4)])
def test_a_stream_has_as_many_threads_as_where_it_was_measured(
    num_threads: int, num_streams: int, tiny_tuned: Tuned
) -> None:
    measured = (streams(1, 20.0, 28.0), streams(2, 32.0, 31.0))
    record = tiny_tuned.tuning.model_copy(update={"streams": measured, "num_threads": 4})
    assert record.streams_on(num_threads) == num_streams


# -- parity ------------------------------------------------------------------------------------------


def test_parity_counts_flips_and_right_answers() -> None:
    reference_ND = torch.eye(4)
    truth = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    answering = class_mean_answers(reference_ND, truth)
    assert answering(reference_ND) == truth
    swapped_ND = reference_ND[[0, 1, 3, 0]]  # the third changes its label, the fourth its task
    found = compare(swapped_ND, reference_ND, answering, truth)
    assert (found.task_flips, found.label_flips) == (0.25, 0.5)
    assert (found.accuracy, found.reference_accuracy) == (0.5, 1.0)
    assert (found.mean_cosine, found.min_cosine) == (0.5, 0.0)


def test_a_vector_that_is_no_number_fails_the_gate() -> None:
    reference_ND = torch.eye(4)
    truth = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y")]
    broken_ND = reference_ND.clone()
    broken_ND[2, 0] = math.nan
    found = compare(broken_ND, reference_ND, class_mean_answers(reference_ND, truth), truth)
    assert found.min_cosine == -1.0
    assert found.fault(Gate())


def test_the_bank_answers_where_it_holds_the_tasks(
    make_module: Callable[..., bytes], tiny_backbone: Backbone
) -> None:
    bank = ModuleBank.build(
        [read_module(make_module("birds", seed=1)).module],
        revision=1,
        backbone_fingerprint=tiny_backbone.fingerprint,
        feature_dim=tiny_backbone.feature_dim,
    )
    assert {task for task, _ in bank_answers(bank)(torch.randn(3, tiny_backbone.feature_dim))} == {"birds"}


def test_labels_and_tasks_come_from_the_folders(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folders = {name: write_splits(tmp_path / name, train=2, test=2) for name in ("birds", "cars")}
    found = read_labelled(folders, tiny_backbone.preprocessing, 24)
    assert len(found.truth) == len(found.pixels_NCHW) == 24
    assert {task for task, _ in found.truth} == {"birds", "cars"}
    assert {label for _, label in found.truth} == {"blue", "green", "red"}


def test_pictures_are_spread_over_all_classes(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folder = write_splits(tmp_path / "birds", train=10)
    few = read_labelled({"birds": folder}, tiny_backbone.preprocessing, 6)
    assert sorted(label for _, label in few.truth) == ["blue", "blue", "green", "green", "red", "red"]


def test_a_folder_without_pictures_is_refused(tmp_path: Path, tiny_backbone: Backbone) -> None:
    (tmp_path / "readme.jpg").write_text("no picture")
    with pytest.raises(InvalidDataset, match="holds no readable pictures"):
        read_labelled({"birds": tmp_path}, tiny_backbone.preprocessing, 6)


# -- measuring ---------------------------------------------------------------------------------------


def test_the_table_has_speed_and_parity_of_every_runtime(tiny_tuned: Tuned) -> None:
    table = tiny_tuned.tuning.table
    (one,) = table
    assert one.runtime == tiny_tuned.tuning.chosen == ONNX and one.refused is None
    assert one.parity is not None and one.parity.mean_cosine > 0.99999
    assert one.images_per_s.keys() == one.latency_ms.keys() == one.speedup.keys() == {1, 2}
    assert all(value > 0.0 for value in one.images_per_s.values())
    assert tiny_tuned.tuning.hardware == hardware_name(CPU)


def test_a_runtime_that_fails_the_gate_is_never_chosen(
    tiny_artefact: BackboneArtefact, labelled_pixels: LabelledPixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime whose vectors are noise, however fast, is refused with the figure."""
    sound = measuring.embed_all

    def noisy(backbone: Backbone, pixels_NCHW: torch.Tensor) -> torch.Tensor:
        cls_ND = sound(backbone, pixels_NCHW)
        return cls_ND if backbone.runtime_name == REFERENCE else torch.randn(cls_ND.shape)

    monkeypatch.setattr(measuring, "embed_all", noisy)
    monkeypatch.setattr(measuring, "paired_seconds", lambda *_: (1e-9, 1e9))
    tuned = tune(tiny_artefact, labelled_pixels, quick("torch-bfloat16", REFERENCE))
    assert tuned.tuning.chosen == REFERENCE and tuned.export is None
    refused = tuned.tuning.measurement("torch-bfloat16")
    assert refused is not None and "mean cosine" in (refused.refused or "")
    with pytest.raises(InvalidBackbone, match="no runtime passes: torch-bfloat16: mean cosine"):
        tune(tiny_artefact, labelled_pixels, quick("torch-bfloat16"))


def test_what_is_not_installed_is_left_out(
    tiny_artefact: BackboneArtefact, labelled_pixels: LabelledPixels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model_store.runtimes.runtime.find_spec", lambda name: name == "torch" or None)
    tuned = tune(tiny_artefact, labelled_pixels, quick(ONNX, REFERENCE))
    assert tuned.tuning.chosen == REFERENCE
    assert "not installed" in (tuned.tuning.table[0].refused or "")


# -- keeping and using -------------------------------------------------------------------------------


def test_everybody_uses_the_tuned_runtime(tiny_store: ModelStore, tiny_tuned: Tuned) -> None:
    assert load_backbone(tiny_store, device="cpu").runtime_name == REFERENCE
    tiny_store.put_tuning(tiny_tuned.tuning, tiny_tuned.export)
    loaded = load_backbone(tiny_store, device="cpu")
    assert loaded.runtime_name == "onnxruntime-float32"
    assert loaded.fingerprint == tiny_store.require_head().backbone_fingerprint
    assert load_backbone(tiny_store, device="cpu", runtime="torch-bfloat16").precision == "bfloat16"


def test_everybody_uses_the_streams_that_were_best(tiny_store: ModelStore, tiny_tuned: Tuned) -> None:
    measured = (streams(1, 20.0, 28.0), streams(2, 32.0, 31.0))
    record = tiny_tuned.tuning.model_copy(update={"streams": measured, "num_threads": 2})
    tiny_store.put_tuning(record, tiny_tuned.export)
    assert load_backbone(tiny_store, device="cpu", num_threads=2).num_streams == 2
    assert load_backbone(tiny_store, device="cpu", num_threads=1).num_streams == 1
    assert load_backbone(tiny_store, device="cpu", num_threads=2, num_streams=1).num_streams == 1
    assert load_backbone(tiny_store, device="cpu", num_threads=2, num_streams=9).num_streams == 2
    assert load_backbone(tiny_store, device="cpu", runtime=REFERENCE, num_threads=2).num_streams == 1


def test_a_record_from_before_streams_means_one_pass_at_a_time(tiny_tuned: Tuned) -> None:
    old = tiny_tuned.tuning.model_dump(mode="json", exclude={"streams"}) | {"format_version": 1}
    assert Tuning.model_validate(old).streams_on(8) == 1


def test_a_record_from_before_runtimes_were_compared_in_streams_is_read(tiny_tuned: Tuned) -> None:
    old = tiny_tuned.tuning.model_dump(mode="json") | {"format_version": 3}
    for one in old["table"]:
        del one["streams_gain"], one["served_images_per_s"]
    (read,) = Tuning.model_validate(old).table
    assert read.served_speedup == read.best_speedup


def test_the_newest_tuning_of_this_hardware_counts(tiny_store: ModelStore, tiny_tuned: Tuned) -> None:
    record = tiny_tuned.tuning
    tiny_store.put_tuning(record.model_copy(update={"chosen": REFERENCE}), None)
    tiny_store.put_tuning(record.model_copy(update={"chosen": "torch-bfloat16"}), None)
    assert tiny_store.put_tuning(record.model_copy(update={"hardware": "another"}), None) == 3
    found = tiny_store.tuning(record.backbone_fingerprint, record.hardware)
    assert found is not None and found.chosen == "torch-bfloat16"
    assert tiny_store.tuning(record.backbone_fingerprint, "nowhere") is None
    assert Tuning.model_validate_json(found.model_dump_json()) == found


def test_a_tuning_that_says_less_of_the_processor_counts_where_none_says_all(
    tiny_store: ModelStore, tiny_tuned: Tuned
) -> None:
    """As those of earlier versions do: an upgrade must not fall back to torch."""
    full, brief, fingerprint = "Maker; family 26", "Maker", tiny_tuned.tuning.backbone_fingerprint

    def put(hardware: str, chosen: str) -> None:
        given = {"hardware": hardware, "chosen": chosen}
        tiny_store.put_tuning(tiny_tuned.tuning.model_copy(update=given), None)

    def chosen_on(hardware: str) -> str | None:
        return found.chosen if (found := tiny_store.tuning(fingerprint, hardware)) else None

    put(brief, REFERENCE)
    put(brief, "torch-bfloat16")
    put("Maker; family 25", ONNX)
    assert chosen_on(full) == "torch-bfloat16"
    assert chosen_on("Makers; family 26") is None
    put(full, "openvino-int8")
    put(brief, REFERENCE)
    assert chosen_on(full) == "openvino-int8"


PROCESSORS = {
    "x86, a guest without AMX": (
        "processor\t: 0\nvendor_id\t: GenuineIntel\ncpu family\t: 6\nmodel\t\t: 143\nmodel name\t: Xeon\n"
        "flags\t\t: fpu avx512_vnni avx512_bf16\n\nprocessor\t: 1\nmodel name\t: another\n",
        "Xeon, AVX; cpu family 6, model 143; avx512_bf16 avx512_vnni",
    ),
    "ARM, which has no name": (
        "processor\t: 0\nFeatures\t: fp asimddp i8mm bf16\nCPU implementer\t: 0x41\nCPU part\t: 0xd40\n\n",
        "there, AVX; CPU implementer 0x41, CPU part 0xd40; asimddp bf16 i8mm",
    ),
    "nothing": ("", "there, AVX"),
}


@pytest.mark.parametrize(("cpuinfo", "name"), PROCESSORS.values(), ids=PROCESSORS)
def test_a_processor_is_named_by_what_matters_to_a_tuning(
    cpuinfo: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: cpuinfo)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "there")
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX")
    assert hardware_name(CPU) == name


@pytest.mark.parametrize("written", [b"", b"{}", b"\xff", b'{"created_at": null}'])
def test_an_unreadable_tuning_stands_in_no_other_ones_way(
    written: bytes, tiny_store: ModelStore, tiny_tuned: Tuned, caplog: pytest.LogCaptureFixture
) -> None:
    record = tiny_tuned.tuning
    fingerprint = record.backbone_fingerprint
    tiny_store.put_tuning(record, None)
    folder = Path(tiny_store.url) / "backbones" / fingerprint / "tunings"
    (folder / "000000000002.json").write_bytes(written)
    assert tiny_store.tuning(fingerprint, record.hardware) == record
    assert "000000000002.json is passed over, it is no tuning" in caplog.text
    assert tiny_store.put_tuning(record, None) == 3


def test_a_tuning_leaves_the_backbone_as_it_was(tiny_store: ModelStore, tiny_tuned: Tuned) -> None:
    before = tiny_store.backbones()
    tiny_store.put_tuning(tiny_tuned.tuning, tiny_tuned.export)
    assert tiny_store.backbones() == before
    assert tiny_store.require_head().number == 1


def test_a_refused_runtime_cannot_be_asked_for(tiny_store: ModelStore, tiny_tuned: Tuned) -> None:
    refused = Measurement(runtime="torch-bfloat16", refused="mean cosine 0.5 is below 0.995")
    record = tiny_tuned.tuning.model_copy(update={"chosen": REFERENCE, "table": (refused,)})
    tiny_store.put_tuning(record, None)
    with pytest.raises(InvalidBackbone, match=r"torch-bfloat16 was refused .* mean cosine 0.5"):
        load_backbone(tiny_store, device="cpu", runtime="torch-bfloat16")


def test_a_runtime_that_was_not_chosen_has_no_export(tiny_store: ModelStore, tiny_tuned: Tuned) -> None:
    with pytest.raises(InvalidBackbone, match="run `tosca backbone tune --runtime onnxruntime-float32`"):
        load_backbone(tiny_store, device="cpu", runtime="onnxruntime-float32")
    record = tiny_tuned.tuning.model_copy(update={"chosen": REFERENCE})
    tiny_store.put_tuning(record, None)
    with pytest.raises(InvalidBackbone, match="has no exported form"):
        load_backbone(tiny_store, device="cpu", runtime="onnxruntime-float32")


def test_a_tuned_engine_that_is_missing_here_is_passed_over(
    tiny_store: ModelStore,
    tiny_tuned: Tuned,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    tiny_store.put_tuning(tiny_tuned.tuning, tiny_tuned.export)
    monkeypatch.setattr("model_store.runtimes.runtime.find_spec", lambda name: name == "torch" or None)
    assert load_backbone(tiny_store, device="cpu").runtime_name == REFERENCE
    assert "onnxruntime-float32 is passed over" in caplog.text


def test_a_damaged_export_is_refused_by_its_digest(tiny_store: ModelStore, tiny_tuned: Tuned) -> None:
    tiny_store.put_tuning(tiny_tuned.tuning, tiny_tuned.export)
    (path,) = Path(tiny_store.url).glob("backbones/*/exports/*.onnx")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CorruptStore, match="reads back with SHA-256"):
        load_backbone(tiny_store, device="cpu")
