"""What watching the service costs: processor time of recording an answered picture, a request and a pass,
with and without traces, and of a scrape by the number of tasks that are told apart.

Recording is measured on the thread that does it in the service, without the service around it: the figures
are what is added to a request of one picture, whatever the backbone takes.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF

from benchmarks.machine import machine
from model_store.bank import ModuleBank
from service.exposition import gather, render
from service.feedback import RecentAnswers
from service.settings import Settings
from service.telemetry import Telemetry
from service.timings import Interval, Timings
from service.traffic import Traffic

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from random_modules import FEATURE_DIM, random_module

RESULT = Path(__file__).parent / "results" / "telemetry.json"
NUM_CALIBRATION = 128  # the most a task has: the dearest test for drift
NUM_PICTURES = 2000
ROUNDS = 15
QUEUE_SIZE = 10 * ROUNDS * NUM_PICTURES  # so that no span is dropped, which would be cheaper
NUM_TASKS = (1, 10, 100)
TIMINGS = Timings(
    Interval(0.0, 0.004),
    Interval(0.004, 0.005),
    Interval(0.005, 0.4),
    Interval(0.4, 0.402),
    Interval(0.401, 0.402),
    1,
)


class Nowhere(SpanExporter):
    def export(self, _: object) -> SpanExportResult:
        return SpanExportResult.SUCCESS


def main() -> None:
    about = machine()
    torch.set_num_threads(1)
    bank = build_bank(2)
    answers = bank.answer(torch.randn(NUM_PICTURES, FEATURE_DIM, generator=torch.Generator().manual_seed(0)))
    sha256 = {task: bank.module(task).sha256 for task in ("task-0", "task-1")}
    telemetry, traffic, recent = Telemetry(), Traffic(100, 1000, 1e-3), RecentAnswers(10_000)
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(Nowhere(), max_queue_size=QUEUE_SIZE))
    traced = Telemetry(tracer=provider.get_tracer("bench"))
    unsampled = Telemetry(tracer=TracerProvider(sampler=ALWAYS_OFF).get_tracer("bench"))

    def trace(told: Telemetry) -> None:
        with told.tracer.start_as_current_span("POST /predict"):
            told.tell_picture(TIMINGS, 2)

    steps: dict[str, Callable[[int], object]] = {
        "metrics of a picture": lambda _: telemetry.tell_picture(TIMINGS, 2),
        "traffic and drift of a picture": lambda i: traffic.record(bank, answers[i], is_new=True),
        "remembering an answer for feedback": lambda i: recent.remember(
            f"{i:032x}", 0, answers[i], sha256[answers[i].task]
        ),
        "metrics of a request": lambda _: telemetry.metrics.count_request("POST", "/predict", 200, 0.4, None),
        "metrics of a pass": lambda _: (
            telemetry.metrics.time_pass(TIMINGS.decode, 8),
            telemetry.metrics.time_answers(TIMINGS.selection, TIMINGS.modules),
        ),
        "metrics and spans of a request and its picture, sampled": lambda _: trace(traced),
        "the same, not sampled": lambda _: trace(unsampled),
    }
    microseconds = {name: measure(step) for name, step in steps.items()}
    plain = ("picture", "feedback", "request", "pass")
    total = sum(value for name, value in microseconds.items() if name.endswith(plain))
    scrapes = [measure_scrape(num) for num in NUM_TASKS]
    for name, value in microseconds.items():
        print(f"{value:8.1f} µs  {name}")
    print(f"{total:8.1f} µs  a request of one picture, without traces")
    for scrape in scrapes:
        print(scrape)
    result = {
        "machine": about,
        "calibration_vectors": NUM_CALIBRATION,
        "rounds": ROUNDS,
        "pictures_a_round": NUM_PICTURES,
        "cpu_us": microseconds,
        "cpu_us_of_a_request_with_one_picture": total,
        "scrapes": scrapes,
    }
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


def build_bank(num_tasks: int) -> ModuleBank:
    modules = [random_module(f"task-{i}", i, num_calibration=NUM_CALIBRATION) for i in range(num_tasks)]
    return ModuleBank.build(modules, revision=1, backbone_fingerprint="0" * 64, feature_dim=FEATURE_DIM)


def measure(step: Callable[[int], object]) -> float:
    """Median over the rounds of the processor microseconds a call."""
    rounds = []
    for _ in range(ROUNDS):
        started = time.thread_time()
        for i in range(NUM_PICTURES):
            step(i)
        rounds.append(1e6 * (time.thread_time() - started) / NUM_PICTURES)
    return statistics.median(rounds)


def measure_scrape(num_tasks: int) -> dict[str, object]:
    """Milliseconds that a scrape holds the event loop for, and another thread after that."""
    bank, telemetry, traffic = build_bank(num_tasks), Telemetry(), Traffic(100, 1000, 1e-3)
    for task in (module.task for module in bank.modules):
        cls_BD = torch.randn(20, FEATURE_DIM, generator=torch.Generator().manual_seed(0))
        for answer in bank.answer(cls_BD, task=task):
            traffic.record(bank, answer, is_new=True)
            telemetry.tell_picture(TIMINGS, 2)
    backbone = SimpleNamespace(
        manifest=SimpleNamespace(architecture="none"), fingerprint="0" * 64, runtime_name="none", device="cpu"
    )
    cache = SimpleNamespace(statistics=SimpleNamespace(num_hits=0, num_misses=0, num_entries=0, size_bytes=0))
    engine = SimpleNamespace(
        backbone=backbone, cache=cache, traffic=traffic, is_alive=True, num_admitted=0, num_queued=0
    )
    active = SimpleNamespace(bank=bank, files=bank.modules, revision=SimpleNamespace(number=1))
    registry = SimpleNamespace(active=active, staleness_s=0.0, fault=None)
    state = SimpleNamespace(engine=engine, registry=registry, settings=Settings(), is_ready=True)
    gathering, rendering = [], []
    text = b""
    for _ in range(ROUNDS):
        started = time.thread_time()
        families = gather(state)
        gathered = time.thread_time()
        text = render(telemetry.metrics, families)
        gathering.append(1e3 * (gathered - started))
        rendering.append(1e3 * (time.thread_time() - gathered))
    return {
        "tasks": num_tasks,
        "gather_cpu_ms": statistics.median(gathering),
        "render_cpu_ms": statistics.median(rendering),
        "bytes": len(text),
    }


if __name__ == "__main__":
    main()
