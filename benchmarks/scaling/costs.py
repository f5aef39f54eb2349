"""What was measured: every cost the model starts from, read from the committed results, typed in nowhere."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"
SCENARIO = "ViT-B/16, 256-pixel JPEGs"
LIGHT_SCENARIO = "ViT-Tiny, 256-pixel JPEGs"
INPUTS = (
    "serving",
    "runtimes",
    "request_path",
    "request_threads",
    "decoding",
    "tasks",
    "bank_batches",
    "registration",
    "overload",
    "store_operations",
)
OPERATIONS = ("look", "follow", "register", "remove", "roll back", "start")


@dataclass(frozen=True, slots=True)
class Curve:
    """A quantity measured at a few numbers of tasks: straight lines between them.

    Beyond the largest number the last line goes on if it rises, else the last value holds.
    """

    points: tuple[tuple[float, float], ...]  # (tasks, value), ascending

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]]) -> "Curve":
        return cls(tuple(sorted(points)))

    def __call__(self, tasks: float) -> float:
        if tasks <= self.points[0][0]:
            return self.points[0][1]
        for (left, low), (right, high) in pairwise(self.points):
            if tasks <= right:
                return low + (high - low) * (tasks - left) / (right - left)
        if len(self.points) == 1:
            return self.points[0][1]
        (left, low), (right, high) = self.points[-2:]
        return high + max(0.0, high - low) * (tasks - right) / (right - left)


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of a backbone pass of B pictures: `base_s` + B · `each_s`."""

    base_s: float
    each_s: float

    @classmethod
    def through(cls, one_s: float, many_s: float, many: int) -> "Pass":
        """From the seconds of one picture and of `many`; what is left for the base is never negative."""
        each_s = (many_s - one_s) / (many - 1)
        return cls(max(0.0, one_s - each_s), each_s if one_s >= each_s else many_s / many)

    def __call__(self, num_pictures: int) -> float:
        return self.base_s + num_pictures * self.each_s


@dataclass(frozen=True, slots=True)
class Picture:
    """A kind of picture that clients send."""

    long_side: int
    size_bytes: float
    decode_s: float  # of one core, to the pixels of the backbone


@dataclass(frozen=True, slots=True)
class Requests:
    """What an operation asks of the store: numbers of requests and the bytes they carry."""

    get: int
    put: int
    list: int
    bytes_in: int
    bytes_out: int


@dataclass(frozen=True, slots=True)
class Costs:
    """All measured inputs of the model."""

    cores: int  # of the machine they were measured on
    backbone_pass: Pass
    request_s: float  # processor time of a request beside decoding and the pass
    loop_share: float  # of it that the event loop's thread does
    pictures: tuple[Picture, ...]  # small to large
    bank_alone_s: Curve  # processor time of a bank's answer to one picture
    bank_in_batch_s: Curve  # of its answer to a picture of `bank_batch_size`
    bank_batch_size: int
    resident_bytes_a_task: float
    file_bytes: float
    registration_s: float  # of `POST /tasks` beside clients, among `registration_tasks`
    registration_tasks: int
    operation_s: Mapping[str, Curve]  # processor time, which other work on the machine hardly touches
    requests: Mapping[str, tuple[tuple[int, Requests], ...]]  # by operation: (tasks, requests), ascending
    revision_bytes: Curve  # of what a registration publishes

    def serial_s(self, lock_share: float) -> float:
        """Of a request's processor time, what no two requests of a process can have at once: the time of the
        event loop, and that of other threads while they hold the interpreter lock.

        The answer of a bank with few tasks is not part of it: the inference thread gives it.
        """
        loop_s = self.loop_share * self.request_s
        return loop_s + lock_share * max(0.0, self.request_s - loop_s - self.bank_alone_s(1))

    def bank_pass(self, num_tasks: int, share: float) -> Pass:
        """A bank's answers to a batch, where `share` of the measured processor time is left."""
        alone_s, in_batch_s = self.bank_alone_s(num_tasks), self.bank_in_batch_s(num_tasks)
        batch_s = self.bank_batch_size * in_batch_s
        return Pass.through(share * alone_s, share * batch_s, self.bank_batch_size)

    def requests_of(self, operation: str, num_tasks: int) -> Requests:
        """As counted with the most tasks; those of a start are taken to grow with their number."""
        counted_tasks, counted = self.requests[operation][-1]
        if operation != "start" or num_tasks == counted_tasks:
            return counted
        scale = num_tasks / counted_tasks
        return Requests(
            round(counted.get * scale), counted.put, counted.list, round(counted.bytes_in * scale), 0
        )


def read_results(folder: Path = RESULTS) -> dict[str, Any]:
    """The committed results that the model reads, by name. Raises FileNotFoundError where one is missing."""
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in INPUTS}


def costs_of(results: Mapping[str, Any]) -> Costs:
    """The costs that a set of results tells."""
    tasks, operations = results["tasks"], results["store_operations"]["operations"]
    answers = results["bank_batches"]["answers"]
    rows = {name: [one for one in operations if one["operation"] == name] for name in OPERATIONS}
    return Costs(
        cores=results["runtimes"]["machine"]["cores"],
        backbone_pass=chosen_pass(results["runtimes"]["tuning"]),
        request_s=1e-3 * results["request_path"]["cpu_ms_a_request"]["tosca"],
        loop_share=results["request_threads"]["event_loop_share"],
        pictures=tuple(
            Picture(one["long_side"], one["bytes"], 1e-3 * one["cpu_ms"])
            for one in results["decoding"]["as_served"]
        ),
        bank_alone_s=Curve.through(
            (one["tasks"], 1e-3 * one["cpu_ms_a_picture"]) for one in answers if one["batch_size"] == 1
        ),
        bank_in_batch_s=Curve.through(
            (one["tasks"], 1e-3 * one["cpu_ms_a_picture"]) for one in answers if one["batch_size"] > 1
        ),
        bank_batch_size=max(one["batch_size"] for one in answers),
        resident_bytes_a_task=tasks["memory"]["bytes_a_task"],
        file_bytes=tasks["memory"]["file_bytes"],
        registration_s=tasks["registration"]["median_s"],
        registration_tasks=tasks["registration"]["active_tasks"],
        operation_s={
            name: Curve.through((one["tasks"], one["cpu_seconds"]) for one in rows[name])
            for name in OPERATIONS
        },
        requests={
            name: tuple(
                (
                    one["tasks"],
                    Requests(*(one[kind] for kind in ("get", "put", "list", "bytes_in", "bytes_out"))),
                )
                for one in sorted(rows[name], key=lambda one: one["tasks"])
            )
            for name in OPERATIONS
        },
        revision_bytes=Curve.through((one["tasks"], one["revision_bytes"]) for one in rows["register"]),
    )


def chosen_pass(tuning: Mapping[str, Any]) -> Pass:
    """The pass of the runtime that tuning chose."""
    [row] = [one for one in tuning["table"] if one["runtime"] == tuning["chosen"]]
    largest = max(row["latency_ms"], key=int)
    return Pass.through(1e-3 * row["latency_ms"]["1"], 1e-3 * row["latency_ms"][largest], int(largest))
