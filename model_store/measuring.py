"""`tosca backbone tune`: export, measure speed and parity of every runtime, choose the fastest that passes
and how its passes share the processor.

Passes of a runtime alternate with passes of the reference, and speed-ups are medians of the paired ratios,
so that whatever else the machine does meanwhile strikes both. Those that are nearly the fastest are measured
as they would be served, too, since runtimes do not gain alike from passes side by side, and in the end they
take turns with one another.
"""
# B batch, N pictures, D features

import contextlib
import hashlib
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import Tensor

from model_store.backbone import Backbone, BackboneArtefact, resolve_device
from model_store.bank import ModuleBank
from model_store.errors import InvalidBackbone
from model_store.parity import Answering, LabelledPixels, bank_answers, class_mean_answers, compare
from model_store.runtimes.loading import make_export
from model_store.runtimes.rewriting import rewritten
from model_store.runtimes.runtime import REFERENCE, RUNTIMES, ExportForm, RuntimeKind, runtime_kind
from model_store.runtimes.smoothing import activation_group, smooth
from model_store.runtimes.torch_runtime import Embedding
from model_store.tuning import (
    Gate,
    Measurement,
    StreamsMeasurement,
    Tuning,
    best_streams,
    contenders,
    fastest,
    hardware_name,
    streams_gain,
)

NUM_CALIBRATION = 32
_PARITY_BATCH = 16
_STREAM_BATCH_SIZES = (1, 8)
_STREAM_ROUNDS = 3
_PASSES_SIDE_BY_SIDE = 3
_TURNS = 5  # of contenders, a pass each


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure, and how long."""

    runtimes: tuple[str, ...] = RUNTIMES
    device: str = "auto"
    batch_sizes: tuple[int, ...] = (1, 8)
    num_rounds: int = 5
    num_threads: int = 0
    gate: Gate = field(default_factory=Gate)


@dataclass(frozen=True, slots=True)
class Tuned:
    """The record to keep, and the exported form that the chosen runtime runs (None for torch)."""

    tuning: Tuning
    export: bytes | None


def tune(
    artefact: BackboneArtefact,
    pictures: LabelledPixels,
    plan: Plan,
    *,
    bank: ModuleBank | None = None,
    on_measured: Callable[[Measurement], None] = lambda _: None,
) -> Tuned:
    """Measure the runtimes of `plan` on this machine and choose one.

    Answers are a bank's where it holds every task of the pictures, else those of the nearest class mean.
    Raises InvalidBackbone when no runtime passes.
    """
    device = resolve_device(plan.device)
    num_threads = plan.num_threads or torch.get_num_threads()
    reference = Backbone.load(artefact, plan.device, REFERENCE)
    reference_ND = embed_all(reference, pictures.pixels_NCHW)
    answering = _answering(bank, pictures, reference_ND)
    exports = _Exports(artefact, pictures.pixels_NCHW)
    table = []
    for name in plan.runtimes:
        kind = runtime_kind(name)
        measured = _unavailable(kind, device)
        if measured is None:
            try:
                export = exports.get(kind.export)
                backbone = Backbone.load(artefact, plan.device, name, export=export, num_threads=num_threads)
                measured = _measure(backbone, reference, pictures, reference_ND, answering, plan)
                measured = measured.model_copy(update={"export_sha256": exports.sha256(kind.export)})
            except InvalidBackbone as error:  # an engine may not know an operation of this model
                measured = Measurement(runtime=name, refused=str(error))
        table.append(measured)
        on_measured(measured)
    streams = {
        one.runtime: _measure_streams(
            artefact, one.runtime, exports.get(runtime_kind(one.runtime).export), pictures, plan, num_threads
        )
        for one in contenders(table)
    }
    served = _take_turns(artefact, streams, exports, pictures, plan, num_threads)
    table = [
        one.model_copy(
            update={
                "streams_gain": streams_gain(streams.get(one.runtime, ())),
                "served_images_per_s": served.get(one.runtime),
            }
        )
        for one in table
    ]
    chosen = fastest(table)
    if chosen is None:
        faults = "; ".join(f"{one.runtime}: {one.refused}" for one in table)
        raise InvalidBackbone(f"no runtime passes: {faults}")
    export = exports.get(runtime_kind(chosen.runtime).export)
    tuning = Tuning(
        backbone_fingerprint=artefact.manifest.fingerprint,
        hardware=hardware_name(device),
        num_threads=num_threads,
        gate=plan.gate,
        chosen=chosen.runtime,
        table=tuple(table),
        streams=streams[chosen.runtime],
        versions=_versions(),
        created_at=datetime.now(UTC),
    )
    return Tuned(tuning, export)


def embed_all(backbone: Backbone, pixels_NCHW: Tensor) -> Tensor:
    """[N, D] CLS vectors on the CPU, in batches."""
    return torch.cat([backbone.embed(one).cpu() for one in pixels_NCHW.split(_PARITY_BATCH)])


def _answering(bank: ModuleBank | None, pictures: LabelledPixels, reference_ND: Tensor) -> Answering:
    if bank is not None and len(bank) and all(task in bank for task, _ in pictures.truth):
        return bank_answers(bank)
    return class_mean_answers(reference_ND, pictures.truth)


def _unavailable(kind: RuntimeKind, device: torch.device) -> Measurement | None:
    reason = kind.unavailable_on(device)
    return None if reason is None else Measurement(runtime=kind.name, refused=reason)


class _Exports:
    """Exported forms, each made when the first runtime wants it."""

    def __init__(self, artefact: BackboneArtefact, pixels_NCHW: Tensor) -> None:
        self._artefact = artefact
        self._calibration_NCHW = pixels_NCHW[:: max(1, len(pixels_NCHW) // NUM_CALIBRATION)]
        self._made: dict[ExportForm, bytes] = {}

    def get(self, form: ExportForm | None) -> bytes | None:
        if form is None:
            return None
        if form not in self._made:
            self._made[form] = make_export(form, self._float(), self._calibration_NCHW)
        return self._made[form]

    def sha256(self, form: ExportForm | None) -> str | None:
        return None if form is None else hashlib.sha256(self._made[form]).hexdigest()

    def _float(self) -> bytes:
        if "float" not in self._made:
            from model_store.runtimes.onnx_export import export_float

            preprocessing = self._artefact.manifest.preprocessing
            model = smooth(self._artefact.model(), preprocessing, self._calibration_NCHW)
            group = activation_group(model)
            self._made["float"] = export_float(
                Embedding(rewritten(model, preprocessing), preprocessing), group
            )
        return self._made["float"]


def _measure_streams(
    artefact: BackboneArtefact,
    runtime: str,
    export: bytes | None,
    pictures: LabelledPixels,
    plan: Plan,
    num_threads: int,
) -> tuple[StreamsMeasurement, ...]:
    """A runtime with one pass at a time on all threads, two side by side on half of them each, and so on;
    nothing for torch and on CUDA, where passes run one after another. They take turns."""
    if export is None or resolve_device(plan.device).type == "cuda":
        return ()
    loaded = [
        Backbone.load(
            artefact, plan.device, runtime, export=export, num_threads=num_threads, num_streams=2**i
        )
        for i in range(num_threads.bit_length())
    ]
    latency_s: list[dict[int, float]] = [{} for _ in loaded]
    for batch_size in _STREAM_BATCH_SIZES:
        pixels_BCHW = _repeat(pictures.pixels_NCHW, batch_size)
        for backbone in loaded:
            time_side_by_side(backbone, pixels_BCHW)  # kernels are chosen and memory is taken
        rounds = [
            [time_side_by_side(backbone, pixels_BCHW) for backbone in loaded]
            for _ in range(min(plan.num_rounds, _STREAM_ROUNDS))
        ]
        for own, seconds in zip(latency_s, zip(*rounds, strict=True), strict=True):
            own[batch_size] = statistics.median(seconds)
    return tuple(
        StreamsMeasurement(
            num_streams=backbone.num_streams,
            images_per_s={size: backbone.num_streams * size / seconds for size, seconds in own.items()},
            latency_ms={size: 1e3 * seconds for size, seconds in own.items()},
        )
        for backbone, own in zip(loaded, latency_s, strict=True)
    )


def _take_turns(
    artefact: BackboneArtefact,
    streams: Mapping[str, Sequence[StreamsMeasurement]],
    exports: _Exports,
    pictures: LabelledPixels,
    plan: Plan,
    num_threads: int,
) -> dict[str, float]:
    """Images a second of contenders, by the name of the runtime, each with the streams that are best for it;
    nothing for one alone."""
    if len(streams) < 2:
        return {}
    loaded = [
        Backbone.load(
            artefact,
            plan.device,
            name,
            export=exports.get(runtime_kind(name).export),
            num_threads=num_threads,
            num_streams=best_streams(measured) if measured else 1,
        )
        for name, measured in streams.items()
    ]
    pixels_BCHW = _repeat(pictures.pixels_NCHW, max(plan.batch_sizes))
    for backbone in loaded:
        time_side_by_side(backbone, pixels_BCHW, 1)  # kernels are chosen and memory is taken
    turns = [[time_side_by_side(one, pixels_BCHW, 1) for one in loaded] for _ in range(_TURNS)]
    return {
        backbone.runtime_name: backbone.num_streams * len(pixels_BCHW) / statistics.median(seconds)
        for backbone, seconds in zip(loaded, zip(*turns, strict=True), strict=True)
    }


def _measure(
    backbone: Backbone,
    reference: Backbone,
    pictures: LabelledPixels,
    reference_ND: Tensor,
    answering: Answering,
    plan: Plan,
) -> Measurement:
    parity = compare(embed_all(backbone, pictures.pixels_NCHW), reference_ND, answering, pictures.truth)
    images_per_s, latency_ms, speedup = {}, {}, {}
    for batch_size in plan.batch_sizes:
        pixels_BCHW = _repeat(pictures.pixels_NCHW, batch_size)
        seconds, ratios = paired_seconds(backbone, reference, pixels_BCHW, plan.num_rounds)
        images_per_s[batch_size] = batch_size / seconds
        latency_ms[batch_size] = 1e3 * seconds
        speedup[batch_size] = ratios
    return Measurement(
        runtime=backbone.runtime_name,
        refused=parity.fault(plan.gate),
        images_per_s=images_per_s,
        latency_ms=latency_ms,
        speedup=speedup,
        parity=parity,
    )


def paired_seconds(
    backbone: Backbone, reference: Backbone, pixels_BCHW: Tensor, num_rounds: int
) -> tuple[float, float]:
    """Median seconds of a pass, and the median of reference seconds over its own, round by round."""
    own, ratios = [], []
    for one in (backbone, reference):
        time_pass(one, pixels_BCHW)  # kernels are chosen and memory is taken at the first pass
    for _ in range(num_rounds):
        seconds = time_pass(backbone, pixels_BCHW)
        own.append(seconds)
        ratios.append(time_pass(reference, pixels_BCHW) / seconds)
    return statistics.median(own), statistics.median(ratios)


def time_pass(backbone: Backbone, pixels_BCHW: Tensor) -> float:
    """Seconds of one pass, until its vectors are on the host."""
    started = time.perf_counter()
    backbone.embed(pixels_BCHW).cpu()
    return time.perf_counter() - started


def time_side_by_side(
    backbone: Backbone, pixels_BCHW: Tensor, num_passes: int = _PASSES_SIDE_BY_SIDE
) -> float:
    """Seconds of a pass while every stream has one, over a few in a row, until vectors are on the host."""

    def run(stream: int) -> None:
        for _ in range(num_passes):
            backbone.embed_on(stream, pixels_BCHW).cpu()

    with ThreadPoolExecutor(backbone.num_streams) as pool:
        started = time.perf_counter()
        list(pool.map(run, range(backbone.num_streams)))
        return (time.perf_counter() - started) / num_passes


def _repeat(pixels_NCHW: Tensor, num: int) -> Tensor:
    """[num, …] pictures, begun again where there are too few."""
    return pixels_NCHW[torch.arange(num) % len(pixels_NCHW)]


def _versions() -> dict[str, str]:
    found = {}
    for package in ("torch", "onnxruntime", "openvino"):
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found
