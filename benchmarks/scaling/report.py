"""The whole: read, predict, simulate, compare, write."""

import hashlib
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.scaling.assumptions import ASSUMPTIONS, values
from benchmarks.scaling.capacity import Limits, Workload
from benchmarks.scaling.checks import run_checks
from benchmarks.scaling.costs import INPUTS, RESULTS, costs_of, read_results
from benchmarks.scaling.experiments import following, on_a_device, writing
from benchmarks.scaling.figures import draw_all
from benchmarks.scaling.forecast import NUM_TASKS, PICTURE, forecast
from benchmarks.scaling.page import PAGE, with_tables
from service.pacing import JITTER
from service.settings import Settings

RESULT = RESULTS / "scaling.json"
FIGURES = Path(__file__).parents[2] / "docs" / "figures"


def main() -> None:
    started = time.perf_counter()
    result = compute()
    RESULT.write_text(json.dumps(result, indent=2) + "\n")
    PAGE.write_text(with_tables(PAGE.read_text(), result))
    draw_all(FIGURES, result)
    for check in result["checks"]:
        verdict = "agrees" if check["holds"] else "DISAGREES"
        print(
            f"{check['name']}: measured {check['measured']:g}, simulated {check['simulated']:.4g}: {verdict}"
        )
    held = sum(check["holds"] for check in result["checks"])
    device = result["forecast"]["device"]["central"]["parts"][0]
    print(
        json.dumps(
            {
                "checks": len(result["checks"]),
                "held": held,
                "first_bottleneck": device[0],
                "images_s_of_a_device": round(device[1]),
                "seconds": round(time.perf_counter() - started, 1),
            }
        )
    )


def compute() -> dict[str, Any]:
    """Everything that scaling.json holds; the same inputs give the same result."""
    results = read_results()
    costs, assumed, limits = costs_of(results), values(), limits_of_service()
    return {
        "inputs": digests(),
        "costs": asdict(costs),
        "assumptions": [asdict(one) for one in ASSUMPTIONS],
        "forecast": forecast(costs, limits),
        "checks": [one.as_json() for one in run_checks(results, costs, assumed)],
        "on_a_device": on_a_device(costs, assumed, limits, Workload(NUM_TASKS, costs.pictures[PICTURE])),
        "following": following(costs, assumed, limits),
        "writing": writing(costs, assumed),
    }


def digests() -> dict[str, str]:
    """SHA-256 of every input, by which a test knows that the page is of these results."""
    return {name: hashlib.sha256((RESULTS / f"{name}.json").read_bytes()).hexdigest() for name in INPUTS}


def limits_of_service() -> Limits:
    """The service's defaults, as they bound a process on CUDA."""
    fields = Settings.model_fields
    return Limits(
        max_queued_images=fields["max_queued_images"].default,
        max_connections=fields["max_connections"].default,
        poll_s=fields["store_poll_s"].default,
        poll_jitter=JITTER,
    )
