"""The simulations against our own measurements: each check has a tolerance, and may fail."""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import simpy

from benchmarks.scaling.costs import LIGHT_SCENARIO, SCENARIO, Costs, Pass
from benchmarks.scaling.processor import Processor
from benchmarks.scaling.replica import Replica, ReplicaCosts, Steps, closed_loop, open_loop, poisson
from benchmarks.scaling.revision_log import LogCosts, saturated_writers
from benchmarks.scaling.store_model import attempts_a_publication

RATE, MEDIAN, TAIL = 0.15, 0.25, 0.35  # largest errors that count as agreement
SIMULATED_S = 60.0
LOAD_SEED = 0  # of benchmarks/load.py, whose arrivals are repeated one by one
WRITERS_S = 120.0


@dataclass(frozen=True, slots=True)
class Check:
    """A measured quantity and what the simulation makes of it."""

    name: str
    unit: str
    measured: float
    simulated: float
    tolerance: float
    source: str  # the result that holds the measurement

    @property
    def error(self) -> float:
        return self.simulated / self.measured - 1.0

    @property
    def holds(self) -> bool:
        return abs(self.error) <= self.tolerance

    def as_json(self) -> dict[str, Any]:
        return asdict(self) | {"error": self.error, "holds": self.holds}


def run_checks(results: Mapping[str, Any], costs: Costs, assumed: Mapping[str, float]) -> list[Check]:
    return [
        *check_serving(results, SCENARIO, this_machine(costs, assumed, costs.backbone_pass)),
        *check_light_backbone(results, costs, assumed),
        *check_overload(results, costs, assumed),
        check_lone_registration(results, costs),
        check_registration(results, costs, assumed),
        *check_writers(results),
    ]


def this_machine(costs: Costs, assumed: Mapping[str, float], backbone_pass: Pass) -> ReplicaCosts:
    """A process as the benchmarks run it: the load generator and the passes share its few cores."""
    return ReplicaCosts(
        loop_s=costs.serial_s(assumed["lock_share"]),
        beside_loop_s=costs.request_s - costs.serial_s(assumed["lock_share"]),
        decode_s=costs.pictures[0].decode_s,
        backbone_pass=backbone_pass,
        pass_threads=costs.cores,
        client_s=assumed["client_s"],
        decode_threads=costs.cores,
    )


def check_serving(results: Mapping[str, Any], scenario: str, replica: ReplicaCosts) -> list[Check]:
    """One client, 64 clients, and arrivals at 70 % of saturation: the very ones of benchmarks/load.py."""
    serving = results["serving"]
    measured, cores = serving["scenarios"][scenario], replica.pass_threads
    closed, opened = measured["closed_loop"]["tosca"], measured["open_loop"]["tosca"]
    name = scenario.split(",")[0]
    _, alone = closed_loop(replica, cores, 1, SIMULATED_S, 2.0)
    rate, many = closed_loop(replica, cores, 64, SIMULATED_S, 10.0)
    arrivals = poisson(measured["summary"]["open_loop_images_per_s"], LOAD_SEED)
    _, outcomes = open_loop(replica, cores, arrivals, serving["seconds"], 0.0)

    def check(
        what: str, unit: str, runs: list[dict[str, float]], key: str, simulated: float, tolerance: float
    ) -> Check:
        value = statistics.median(one[key] for one in runs)
        return Check(f"{name}: {what}", unit, value, simulated, tolerance, "serving")

    return [
        check("one client, median", "ms", closed["1"], "p50_ms", 1e3 * alone.quantile_s(0.5), MEDIAN),
        check("64 clients, saturation", "images/s", closed["64"], "images_per_s", rate, RATE),
        check("64 clients, median", "ms", closed["64"], "p50_ms", 1e3 * many.quantile_s(0.5), MEDIAN),
        check("70 % load, median", "ms", opened, "p50_ms", 1e3 * outcomes.quantile_s(0.5), MEDIAN),
        check("70 % load, p99", "ms", opened, "p99_ms", 1e3 * outcomes.quantile_s(0.99), TAIL),
    ]


def check_light_backbone(
    results: Mapping[str, Any], costs: Costs, assumed: Mapping[str, float]
) -> list[Check]:
    """ViT-Tiny, where a request costs as much as its pass, as on a GPU. Its pass is fitted to one client and
    to full batches as the server runs them, so that one client is no check."""
    if LIGHT_SCENARIO not in results["serving"]["scenarios"]:
        return []
    measured = results["serving"]["scenarios"][LIGHT_SCENARIO]
    replica = this_machine(costs, assumed, costs.backbone_pass)
    beside_s = replica.loop_s + replica.beside_loop_s + replica.decode_s + replica.client_s
    one_s = 1e-3 * measured["summary"]["one_client_p50_ms"]["tosca"] - beside_s
    full = measured["side_by_side"]
    fitted = Pass.through(one_s, full["batch_size"] / full["images_per_s"], full["batch_size"])
    return check_serving(results, LIGHT_SCENARIO, replace(replica, backbone_pass=fitted))[1:]


def check_overload(results: Mapping[str, Any], costs: Costs, assumed: Mapping[str, float]) -> list[Check]:
    """Three times what saturates a short queue; requests come evenly."""
    measured = results["overload"]
    overload = measured["overload"]
    replica = replace(
        this_machine(costs, assumed, costs.backbone_pass),
        max_queued_images=measured["max_queued_images"],
        refusal_s=min(0.25 * costs.request_s, costs.request_s / 2),
    )
    saturation, _ = closed_loop(replica, costs.cores, 8, SIMULATED_S, 3.0)
    gap_s = 1.0 / overload["offered_per_s"]
    goodput, outcomes = open_loop(replica, costs.cores, lambda: gap_s, SIMULATED_S, 3.0)
    answered = overload["answered_s"]
    return [
        Check(
            "overload: saturation, 8 clients",
            "images/s",
            measured["saturation_per_s"],
            saturation,
            RATE,
            "overload",
        ),
        Check("overload: goodput at 3 ×", "images/s", overload["goodput_per_s"], goodput, RATE, "overload"),
        Check(
            "overload: answered, median",
            "s",
            answered["median"],
            outcomes.quantile_s(0.5),
            MEDIAN,
            "overload",
        ),
        Check("overload: answered, p99", "s", answered["p99"], outcomes.quantile_s(0.99), TAIL, "overload"),
    ]


def check_lone_registration(results: Mapping[str, Any], costs: Costs) -> Check:
    """A registration among a few tasks, by a server that has nothing else to do."""
    measured = results["registration"]
    num_tasks = measured["rounds"] / 2  # it begins with the demo's, and each round adds one
    return Check(
        "registration among a few tasks, nothing else",
        "s",
        measured["post_tasks_median_s"],
        costs.operation_s["register"](num_tasks),
        TAIL,
        "registration",
    )


def check_registration(results: Mapping[str, Any], costs: Costs, assumed: Mapping[str, float]) -> Check:
    """A registration among many tasks while clients keep two fifths of what one alone would get: its thread
    has an equal share of the cores here, though the service gives it less."""
    environment = simpy.Environment()
    processor = Processor(environment, costs.cores)
    replica = Replica(environment, processor, this_machine(costs, assumed, costs.backbone_pass))
    gaps_s = poisson(0.4 / (costs.backbone_pass(1) + costs.request_s + costs.pictures[0].decode_s), 1)
    took: list[float] = []

    def clients() -> Steps:
        while True:
            yield environment.timeout(gaps_s())
            environment.process(replica.ask())

    def register() -> Steps:
        for _ in range(20):
            yield environment.timeout(4.0)
            began = environment.now
            yield processor.run(costs.operation_s["register"](costs.registration_tasks))
            took.append(environment.now - began)

    environment.process(clients())
    environment.run(until=environment.process(register()))
    return Check(
        f"registration among {costs.registration_tasks:,} tasks beside clients",
        "s",
        results["tasks"]["registration"]["median_s"],
        statistics.median(took),
        TAIL,
        "tasks",
    )


def check_writers(results: Mapping[str, Any]) -> list[Check]:
    """Writers without pause on a store that takes its time: how many pass, and in how many attempts."""
    store = results["store_operations"]
    rows = {one["writers"]: one for one in store["writers"]}
    delay_s = store["writer_delay_s"]
    look, follow, register = (
        min(
            (one for one in store["operations"] if one["operation"] == operation),
            key=lambda one: one["tasks"],
        )
        for operation in ("look", "follow", "register")
    )

    def requests_of(one: Mapping[str, int]) -> int:
        return one["get"] + one["put"] + one["list"]

    alone_s = requests_of(register) * delay_s
    build_s = max(0.0, 1.0 / rows[1]["published_per_s"] - alone_s)
    log = LogCosts(
        look_s=(delay_s,) * requests_of(look),
        take_over_s=(delay_s,) * (requests_of(follow) - requests_of(look)),
        publish_s=(delay_s,) * (requests_of(register) - requests_of(look)),
        follow_s=build_s / 2,
        build_s=build_s,
        tail=1.05,
    )
    checks = []
    for writers, row in rows.items():
        if writers == 1:
            continue  # its cost was taken from here
        published = saturated_writers(log, writers, WRITERS_S)
        num = len(published.seconds)
        name = f"{writers} writers without pause"
        checks += [
            Check(
                f"{name}: published", "/s", row["published_per_s"], num / WRITERS_S, RATE, "store_operations"
            ),
            Check(
                f"{name}: attempts each",
                "",
                row["attempts_a_publication"],
                published.num_attempts / num,
                RATE,
                "store_operations",
            ),
            Check(
                f"{name}: attempts each, by formula",
                "",
                row["attempts_a_publication"],
                attempts_a_publication(log, writers),
                RATE,
                "store_operations",
            ),
        ]
    return checks
