"""The simulation where nothing was measured: one replica on a device, and fleets that follow one log."""

import statistics
from collections.abc import Mapping
from typing import Any

from benchmarks.scaling.capacity import Limits, Workload, device_pass, in_order, replica_images_s
from benchmarks.scaling.costs import Costs
from benchmarks.scaling.forecast import HOSTS, NUM_TASKS
from benchmarks.scaling.replica import Outcomes, ReplicaCosts, bursts, open_loop, poisson
from benchmarks.scaling.revision_log import offered_registrations, spread
from benchmarks.scaling.store_model import log_costs, registrations_s, served_after_s

SHARES = (0.5, 0.7, 0.9, 1.1)  # of what the analytic model allows
BURST = 32
REPLICA_S = 10.0
REVISIONS = 6
WRITERS = 8
OFFERED = (0.25, 0.5, 0.75, 1.0)  # of what one writer could publish
LOG_S = 1500.0


def on_a_device(
    costs: Costs, assumed: Mapping[str, float], limits: Limits, workload: Workload
) -> list[dict[str, Any]]:
    """A replica under Poisson arrivals and under bursts. Balanced at random, every replica of any fleet sees
    the same: arrivals that are split at random stay what they were."""
    capacity = in_order(replica_images_s(costs, assumed, limits, workload))[0][1]
    speed = assumed["core_speed"]
    request_s, serial_s = costs.request_s / speed, costs.serial_s(assumed["lock_share"]) / speed
    replica = ReplicaCosts(
        loop_s=serial_s,
        beside_loop_s=request_s - serial_s - costs.bank_alone_s(1) / speed,
        decode_s=workload.picture.decode_s / speed,
        backbone_pass=device_pass(assumed),
        pass_threads=0,
        bank_pass=costs.bank_pass(workload.num_tasks, assumed["bank_share"] / speed),
        refusal_s=0.25 * request_s,
        decode_threads=limits.decode_threads,
        max_batch_size=limits.max_batch_size,
        max_queued_images=limits.max_queued_images,
        max_connections=limits.max_connections,
    )
    cores = assumed["processors"] / assumed["devices"]
    rows = []
    for share in SHARES:
        for arrivals, gaps_s in (
            ("Poisson", poisson(share * capacity, seed=1)),
            (f"bursts of {BURST}", bursts(share * capacity, BURST, seed=1)),
        ):
            rate, outcomes = open_loop(replica, cores, gaps_s, REPLICA_S, 1.0)
            rows.append({"share": share, "arrivals": arrivals} | _summary(rate, outcomes))
    return rows


def _summary(rate: float, outcomes: Outcomes) -> dict[str, float]:
    num_refused = len(outcomes.refused_s)
    return {
        "offered_s": (len(outcomes.answered_s) + num_refused + outcomes.num_cut) / REPLICA_S,
        "answered_s": rate,
        "p50_ms": 1e3 * outcomes.quantile_s(0.5),
        "p99_ms": 1e3 * outcomes.quantile_s(0.99),
        "refused": num_refused,
        "cut": outcomes.num_cut,
        "mean_batch": statistics.mean(outcomes.batch_sizes),
    }


def following(costs: Costs, assumed: Mapping[str, float], limits: Limits) -> list[dict[str, float]]:
    """How a change spreads over all replicas of each fleet, beside what the formula says."""
    log = log_costs(costs, assumed, NUM_TASKS)
    mean_s, latest_s = served_after_s(log, limits.poll_s, limits.poll_jitter)
    rows = []
    for hosts in HOSTS:
        replicas = round(hosts * assumed["devices"])
        taken = spread(
            log,
            replicas,
            limits.poll_s,
            gap_s=limits.poll_s,
            revisions=REVISIONS,
            jitter=limits.poll_jitter,
        )
        every = sorted(seconds for revision in taken for seconds in revision)
        rows.append(
            {
                "hosts": hosts,
                "replicas": replicas,
                "mean_s": statistics.mean(every),
                "p99_s": every[int(0.99 * len(every))],
                "last_s": statistics.median(max(revision) for revision in taken),
                "formula_mean_s": mean_s,
                "formula_latest_s": latest_s,
            }
        )
    return rows


def writing(costs: Costs, assumed: Mapping[str, float]) -> list[dict[str, float]]:
    """Registrations offered to one writer, and to eight: what is published, when, and what is given up."""
    log = log_costs(costs, assumed, NUM_TASKS)
    capacity = registrations_s(log)
    rows = []
    for writers in (1, WRITERS):
        for share in OFFERED:
            published = offered_registrations(log, writers, share * capacity, LOG_S)
            seconds = sorted(published.seconds)
            done = len(seconds)
            rows.append(
                {
                    "writers": writers,
                    "offered_s": share * capacity,
                    "published_s": done / LOG_S,
                    "attempts": published.num_attempts / max(1, done),
                    "median_s": statistics.median(seconds),
                    "p99_s": seconds[int(0.99 * done)],
                    "given_up": published.num_given_up / max(1, done + published.num_given_up),
                }
            )
    return rows
