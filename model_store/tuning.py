"""What was measured of a backbone's runtimes on one kind of hardware, and what was chosen by it."""

import platform
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from model_store.manifest import Sha256

SPEED_TOLERANCE = 0.1  # what shorter passes may cost
CONTENDER_SHARE = 0.7  # of the greatest speed with one pass at a time: more than streams make up for
HARDWARE_SEPARATOR = ";"  # before what earlier versions did not say of a processor
_GENERATION = ("cpu family", "model", "CPU implementer", "CPU part")  # x86, ARM
_SHORT_NUMBERS = frozenset(
    [
        "avx_vnni",
        "avx_vnni_int8",
        "avx512_vnni",
        "avx512_bf16",
        "avx512_fp16",
        "amx_int8",
        "amx_bf16",
        "amx_fp16",
        "i8mm",
        "bf16",
        "asimddp",
    ]
)

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Gate(_Record):
    """How far a runtime's answers may be from those of torch in float32 (docs/decisions/0003-runtimes.md)."""

    min_mean_cosine: float = 0.995  # over pictures, of their CLS vectors
    min_cosine: float = 0.97  # of the worst picture
    max_task_flips: Share = 0.005  # share of pictures whose task is chosen otherwise
    max_accuracy_loss: Share = 0.01  # end to end, on labelled pictures


class Parity(_Record):
    """A runtime's answers against the reference's on the same pictures."""

    num_pictures: int
    mean_cosine: float
    min_cosine: float
    task_flips: Share
    label_flips: Share  # told and not judged: between nearly equal classes they go both ways
    accuracy: Share
    reference_accuracy: Share

    def fault(self, gate: Gate) -> str | None:
        """What the gate refuses, NaN too, or None. A flip that one picture alone makes up is let pass."""
        if not self.mean_cosine >= gate.min_mean_cosine:
            return f"mean cosine {self.mean_cosine:.4f} is below {gate.min_mean_cosine:g}"
        if not self.min_cosine >= gate.min_cosine:
            return f"the worst cosine {self.min_cosine:.4f} is below {gate.min_cosine:g}"
        one = 1.0 / self.num_pictures
        if not self.task_flips <= max(gate.max_task_flips, one):
            return (
                f"{self.task_flips:.2%} of the pictures get another task, more than {gate.max_task_flips:.2%}"
            )
        loss = self.reference_accuracy - self.accuracy
        if not loss <= max(gate.max_accuracy_loss, one) + 1e-9:
            return f"accuracy falls by {loss:.2%}, more than {gate.max_accuracy_loss:.2%}"
        return None


class Measurement(_Record):
    """One runtime: its speed by batch size, its parity, and why it is out of the choice if it is."""

    runtime: str
    refused: str | None = None  # not available here, or failed the gate
    images_per_s: Mapping[int, float] = {}  # by batch size, medians
    latency_ms: Mapping[int, float] = {}  # of a whole pass, by batch size, medians
    speedup: Mapping[int, float] = {}  # over the reference by batch size, medians of paired passes
    streams_gain: Annotated[float, Field(gt=0.0)] = 1.0  # in speed, of the best number of passes side by side
    served_images_per_s: float | None = None  # with that number, in turns with the other contenders
    parity: Parity | None = None
    export_sha256: Sha256 | None = None

    @property
    def best_speedup(self) -> float:
        """At the largest batch, one pass at a time."""
        return self.speedup[max(self.speedup)] if self.speedup else 0.0

    @property
    def served_speedup(self) -> float:
        """At the largest batch, as many side by side as are best: what a loaded server and training see."""
        return self.best_speedup * self.streams_gain


class StreamsMeasurement(_Record):
    """A runtime with so many passes side by side, each of them on its share of the threads."""

    num_streams: int
    images_per_s: Mapping[int, float]  # of all streams together, by batch size, medians
    latency_ms: Mapping[int, float]  # of a pass while every stream has one, by batch size, medians


class Tuning(_Record):
    """The table of all runtimes on one kind of hardware, and the fastest that passed the gate.

    Records of format 1 tell of no streams: one pass at a time. Exports of format 3 may read patches of bytes,
    which earlier versions do not give them: these pass such records over. Those of format 4 know what streams
    are worth to other runtimes than the chosen one, those of format 5 how contenders did in turns.
    """

    format_version: Literal[1, 2, 3, 4, 5] = 5
    backbone_fingerprint: Sha256
    hardware: str  # see `hardware_name`
    num_threads: int
    gate: Gate
    chosen: str
    table: tuple[Measurement, ...]
    streams: tuple[StreamsMeasurement, ...] = ()
    versions: Mapping[str, str]
    created_at: datetime

    def measurement(self, runtime: str) -> Measurement | None:
        return next((one for one in self.table if one.runtime == runtime), None)

    def streams_on(self, num_threads: int) -> int:
        """Into how many streams the chosen runtime divides so many threads: each as many as it had here."""
        if not self.streams:
            return 1
        return max(1, best_streams(self.streams) * num_threads // self.num_threads)


def contenders(table: Sequence[Measurement]) -> list[Measurement]:
    """Those not refused that may be the fastest once passes run side by side."""
    passed = _passed(table)
    least = CONTENDER_SHARE * max((one.best_speedup for one in passed), default=0.0)
    return [one for one in passed if one.best_speedup >= least]


def fastest(table: Sequence[Measurement]) -> Measurement | None:
    """The measurement with the greatest speed as it is served among those not refused. Where contenders took
    turns, that decides: what either gained over the reference was measured at another time."""
    return max(
        _passed(table), key=lambda one: (one.served_images_per_s or 0.0, one.served_speedup), default=None
    )


def _passed(table: Sequence[Measurement]) -> list[Measurement]:
    return [one for one in table if one.refused is None]


def best_streams(measured: Sequence[StreamsMeasurement]) -> int:
    """The fewest streams, whose passes are the shortest, of those that have nearly the greatest speed with
    the smallest batches: what a server sees until it is saturated, and streams make large ones needless."""

    def images_per_s(one: StreamsMeasurement) -> float:
        return one.images_per_s[min(one.images_per_s)]

    fast_enough = (1.0 - SPEED_TOLERANCE) * max(map(images_per_s, measured))
    return min(one.num_streams for one in measured if images_per_s(one) >= fast_enough)


def streams_gain(measured: Sequence[StreamsMeasurement]) -> float:
    """The speed at the largest batch with the best number of streams over that with one; 1 where nothing was
    measured."""
    speed = {one.num_streams: one.images_per_s[max(one.images_per_s)] for one in measured}
    return speed[best_streams(measured)] / speed[1] if measured else 1.0


def hardware_name(device: torch.device) -> str:
    """The kind of hardware a tuning holds for: the GPU, or the processor and its vector instructions.

    In a virtual machine a processor may have its maker's name alone, and lack instructions that others of
    its kind have: on Linux its generation and its instructions for short numbers are in the name.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        about = _about_processor(Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:  # not Linux
        about = {}
    name = about.get("model name") or platform.processor() or platform.machine()
    generation = [f"{key} {about[key]}" for key in _GENERATION if key in about]
    able = sorted(_SHORT_NUMBERS.intersection(about.get("flags", about.get("Features", "")).split()))
    parts = f"{name}, {torch.backends.cpu.get_cpu_capability()}", ", ".join(generation), " ".join(able)
    return f"{HARDWARE_SEPARATOR} ".join(part for part in parts if part)


def _about_processor(cpuinfo: str) -> dict[str, str]:
    """What Linux tells of the first processor."""
    pairs = (line.partition(":")[::2] for line in cpuinfo.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, value in pairs}
