"""What one host, ten and a thousand would carry, in three cases, and which assumption moves it most."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from benchmarks.scaling.assumptions import ASSUMPTIONS, CASES, values
from benchmarks.scaling.capacity import Limits, Workload, in_order, replica_images_s, tasks_in_memory
from benchmarks.scaling.costs import Costs, Requests
from benchmarks.scaling.store_model import (
    GB,
    MONTH_S,
    attempts_a_publication,
    best_epoch,
    changes_bytes,
    dollars,
    finding_s,
    loader_share,
    log_costs,
    polling_dollars_month,
    registration_dollars,
    registrations_s,
    revision_line_bytes,
    served_after_s,
    share_given_up,
    start,
    tasks_that_double_a_registration,
    whole_list_bytes,
)

HOSTS = (1, 10, 1000)
NUM_TASKS = 1000
TASK_COUNTS = (1, 100, 1000, 10_000)
START_COUNTS = (1000, 10_000)
LIST_COUNTS = (100, 1000, 10_000, 100_000)
PICTURE = 1  # of the kinds that were measured: 500 pixels
WRITER_COUNTS = (1, 2, 4, 8, 80)
REGISTRATIONS_A_DAY = 1000  # of which the store's growth is reckoned
HEARTBEAT_S = 10.0  # were every replica to write a record of itself so often
HEARTBEAT = Requests(get=0, put=1, list=0, bytes_in=0, bytes_out=0)
LOOK_BY_NAME = Requests(get=1, put=0, list=0, bytes_in=0, bytes_out=0)  # of the next revision: mostly absent

Assumed = Mapping[str, float]


def forecast(costs: Costs, limits: Limits) -> dict[str, Any]:
    workload = Workload(NUM_TASKS, costs.pictures[PICTURE])
    return {
        "tasks": NUM_TASKS,
        "picture": asdict(workload.picture),
        "limits": asdict(limits),
        "device": {case: device(costs, values(case), limits, workload) for case in CASES},
        "fleets": [fleet(costs, limits, workload, hosts) for hosts in HOSTS],
        "by_tasks": [
            {
                "tasks": count,
                **{
                    case: in_order(
                        replica_images_s(costs, values(case), limits, replace(workload, num_tasks=count))
                    )[0]
                    for case in CASES
                },
            }
            for count in TASK_COUNTS
        ],
        "by_picture": [
            {
                "picture": asdict(picture),
                **{
                    case: in_order(
                        replica_images_s(costs, values(case), limits, replace(workload, picture=picture))
                    )[0]
                    for case in CASES
                },
            }
            for picture in costs.pictures
        ],
        "starts": starts(costs, values()),
        "history": history(costs, values()),
        "writers": writers(costs, values()),
        "revisions": revisions(costs, values()),
        "operations": operations(costs, values()),
        "sensitivity": sensitivity(costs, limits, workload),
    }


def device(costs: Costs, assumed: Assumed, limits: Limits, workload: Workload) -> dict[str, Any]:
    """One process with one device: what each part carries, the bottleneck first, and tasks in its memory."""
    return {
        "parts": in_order(replica_images_s(costs, assumed, limits, workload)),
        "tasks": tasks_in_memory(costs, assumed),
    }


def fleet(costs: Costs, limits: Limits, workload: Workload, hosts: int) -> dict[str, Any]:
    return {
        "hosts": hosts,
        **{case: of_hosts(costs, values(case), limits, workload, hosts) for case in CASES},
    }


def of_hosts(
    costs: Costs, assumed: Assumed, limits: Limits, workload: Workload, hosts: int
) -> dict[str, Any]:
    replicas = round(hosts * assumed["devices"])
    images_s = replicas * in_order(replica_images_s(costs, assumed, limits, workload))[0][1]
    log = log_costs(costs, assumed, workload.num_tasks)
    mean_s, latest_s = served_after_s(log, limits.poll_s, limits.poll_jitter)
    begun = start(costs, assumed, hosts, workload.num_tasks)
    look = costs.requests_of("look", workload.num_tasks)
    return {
        "replicas": replicas,
        "images_s": images_s,
        "registrations_s": registrations_s(log),
        "attempt_store_s": log.lone_attempt_s - log.build_s,
        "attempt_build_s": log.build_s,
        "loader_share": loader_share(log, limits.poll_s),
        "served_after_mean_s": mean_s,
        "served_after_latest_s": latest_s,
        "looks_s": replicas / limits.poll_s,
        "polling_dollars_month": polling_dollars_month(look, assumed, replicas, limits.poll_s),
        "polling_by_name_dollars_month": polling_dollars_month(
            LOOK_BY_NAME, assumed, replicas, limits.poll_s
        ),
        "heartbeat_dollars_month": polling_dollars_month(HEARTBEAT, assumed, replicas, HEARTBEAT_S),
        "dollars_a_thousand_registrations": 1000
        * registration_dollars(costs, assumed, replicas, workload.num_tasks),
        "start_alone_s": begun.alone_s,
        "start_together_s": begun.together_s,
        "start_bound": begun.bound,
        "start_bytes": begun.bytes_read,
        "start_dollars": begun.dollars,
        "hosts_dollars_month": hosts * assumed["host_dollars_h"] * MONTH_S / 3600,
        "dollars_a_million_images": hosts * assumed["host_dollars_h"] / 3600 / images_s * 1e6,
    }


def starts(costs: Costs, assumed: Assumed) -> list[dict[str, Any]]:
    """Whole fleets that start at once, as they do and in two other ways."""
    ways: dict[str, dict[str, Any]] = {
        "as_is": {},
        "once_a_host": {"once_a_host": True},
        "once_a_host_16_prefixes": {"once_a_host": True, "prefixes": 16},
    }
    return [
        {
            "hosts": hosts,
            "tasks": count,
            **{way: asdict(start(costs, assumed, hosts, count, **options)) for way, options in ways.items()},
        }
        for count in START_COUNTS
        for hosts in HOSTS
    ]


def history(costs: Costs, assumed: Assumed) -> dict[str, float]:
    """A year of registrations, and how long a start then looks for the newest."""
    few = 365.25 * REGISTRATIONS_A_DAY
    many = 12 * MONTH_S * registrations_s(log_costs(costs, assumed, NUM_TASKS))
    return {
        "revisions_a_year": few,
        "finding_s": finding_s(assumed, few),
        "most_revisions_a_year": many,
        "most_finding_s": finding_s(assumed, many),
    }


def writers(costs: Costs, assumed: Assumed) -> list[dict[str, float]]:
    """Writers who register without pause: what passes, attempts, and who gives up if winning is chance."""
    log = log_costs(costs, assumed, NUM_TASKS)
    return [
        {
            "writers": number,
            "registrations_s": registrations_s(log),
            "attempts": attempts_a_publication(log, number),
            "given_up_by_chance": share_given_up(number),
        }
        for number in WRITER_COUNTS
    ]


def revisions(costs: Costs, assumed: Assumed) -> dict[str, Any]:
    """Revisions that list every task beside revisions that list changes, and which of them was measured."""
    few, many = costs.revision_bytes.points[0], costs.revision_bytes.points[-1]
    added = (many[1] - few[1]) / (many[0] - few[0])
    gb_months = REGISTRATIONS_A_DAY * 365.25 / 12 / GB
    return {
        "line_bytes": revision_line_bytes(),
        "measured_bytes_a_task": added,
        "lists_every_task": abs(added / revision_line_bytes() - 1.0) < 0.05,
        "doubled_from_tasks": tasks_that_double_a_registration(costs),
        "registrations_a_day": REGISTRATIONS_A_DAY,
        "by_tasks": [
            {
                "tasks": count,
                "whole_list_bytes": whole_list_bytes(count),
                "epoch": best_epoch(count),
                "changes_bytes": changes_bytes(count),
                "whole_list_dollars_month": whole_list_bytes(count) * gb_months * assumed["storage_dollars"],
                "changes_dollars_month": changes_bytes(count) * gb_months * assumed["storage_dollars"],
                "whole_list_bytes_to_a_thousand_hosts": 1000 * assumed["devices"] * whole_list_bytes(count),
                "changes_bytes_to_a_thousand_hosts": 1000 * assumed["devices"] * changes_bytes(count),
            }
            for count in LIST_COUNTS
        ],
        "module_dollars_month": costs.file_bytes * gb_months * assumed["storage_dollars"],
    }


def operations(costs: Costs, assumed: Assumed) -> list[dict[str, Any]]:
    """What each operation asks of the store and costs there, with as many tasks as were measured."""
    rows = []
    for operation, counted in costs.requests.items():
        num_tasks, requests = counted[-1]
        rows.append(
            {
                "operation": operation,
                "tasks": num_tasks,
                **asdict(requests),
                "cpu_s": costs.operation_s[operation](num_tasks),
                "dollars_a_million": 1e6 * dollars(requests, assumed),
            }
        )
    return rows


def sensitivity(costs: Costs, limits: Limits, workload: Workload) -> list[dict[str, Any]]:
    """One assumption at a time at its worst and its best, the others central; what matters, most first."""
    outputs: dict[str, Callable[[Assumed], float]] = {
        "images/s of a device": lambda a: in_order(replica_images_s(costs, a, limits, workload))[0][1],
        "the same, event loop aside": lambda a: min(
            images_s
            for part, images_s in replica_images_s(costs, a, limits, workload).items()
            if part != "event loop"
        ),
        "registrations/s": lambda a: registrations_s(log_costs(costs, a, workload.num_tasks)),
        "tasks on a device": lambda a: tasks_in_memory(costs, a),
        "$ for a million images": lambda a: of_hosts(costs, a, limits, workload, 1)[
            "dollars_a_million_images"
        ],
    }
    rows = []
    for output, of in outputs.items():
        central = of(values())
        for one in ASSUMPTIONS:
            worst, best = (of(values(**{one.name: case})) for case in ("pessimistic", "optimistic"))
            swing = max(worst, best) / min(worst, best)
            if swing > 1.01:
                rows.append(
                    {
                        "output": output,
                        "central": central,
                        "assumption": one.name,
                        "pessimistic": worst,
                        "optimistic": best,
                        "swing": swing,
                    }
                )
    order = list(outputs)
    return sorted(rows, key=lambda row: (order.index(row["output"]), -row["swing"]))
