"""What comes out of the model, as tables."""

from collections.abc import Callable, Mapping
from typing import Any

from benchmarks.scaling.assumptions import CASES
from benchmarks.scaling.notation import duration, in_range, number, percent, size, table

Result = Mapping[str, Any]


def answer(result: Result) -> str:
    """The question's table: a row for what is asked, a column for each number of hosts."""
    fleets = result["forecast"]["fleets"]

    def across(key: str, show: Callable[[float], str] = number) -> list[str]:
        return [in_range({case: fleet[case][key] for case in CASES}, show) for fleet in fleets]

    device = result["forecast"]["device"]
    tasks = in_range({case: device[case]["tasks"] for case in CASES})
    (first, _), (second, _) = device["central"]["parts"][:2]
    bounds = [fleet["central"]["start_bound"] for fleet in fleets]
    return table(
        ("", *(f"{number(one['hosts'])} host{'s' * (one['hosts'] > 1)}" for one in fleets)),
        [
            ("replicas, one a device", *(number(one["central"]["replicas"]) for one in fleets)),
            ("images/s", *across("images_s")),
            ("first bottleneck, then the next", *[f"{first}, then {second}"] * len(fleets)),
            ("$ for a million images, hosts", *across("dollars_a_million_images")),
            ("tasks, by memory of a device", *[tasks] * len(fleets)),
            ("registrations/s, all writers together", *across("registrations_s")),
            ("of an attempt: building", *across("attempt_build_s", duration)),
            ("of an attempt: the store", *across("attempt_store_s", duration)),
            ("a replica's loader, busy following", *across("loader_share", percent)),
            ("a change is served after, mean", *across("served_after_mean_s", duration)),
            ("by the last replica", *across("served_after_latest_s", duration)),
            ("$ for a thousand registrations, store", *across("dollars_a_thousand_registrations")),
            ("polling, requests/s", *across("looks_s")),
            ("polling, $/month", *across("polling_dollars_month")),
            ("a record of each in the store every 10 s, $/month", *across("heartbeat_dollars_month")),
            ("all start at once, until the last serves", *across("start_together_s", duration)),
            ("what holds them up", *bounds),
            ("read from the store meanwhile", *across("start_bytes", size)),
            ("hosts, $/month", *across("hosts_dollars_month")),
        ],
    )


def parts(result: Result) -> str:
    device = result["forecast"]["device"]
    by_case = {case: dict(device[case]["parts"]) for case in CASES}
    rows = []
    for name, central in device["central"]["parts"]:
        ends = {case: by_case[case].get(name, central) for case in CASES}
        rows.append((name, in_range(ends)))
    return table(("part of one process", "images/s it could carry"), rows)


def by_tasks(result: Result) -> str:
    rows = [
        (number(row["tasks"]), *(f"{number(row[case][1])} ({row[case][0]})" for case in CASES))
        for row in result["forecast"]["by_tasks"]
    ]
    return table(("tasks", *CASES), rows)


def by_picture(result: Result) -> str:
    rows = [
        (
            f"{row['picture']['long_side']} pixels",
            *(f"{number(row[case][1])} ({row[case][0]})" for case in CASES),
        )
        for row in result["forecast"]["by_picture"]
    ]
    return table(("pictures", *CASES), rows)


def starts(result: Result) -> str:
    def cell(begun: Mapping[str, Any]) -> str:
        return f"{duration(begun['together_s'])} ({begun['bound']})"

    rows = [
        (
            number(row["tasks"]),
            number(row["hosts"]),
            size(row["as_is"]["bytes_read"]),
            *(cell(row[way]) for way in ("as_is", "once_a_host", "once_a_host_16_prefixes")),
        )
        for row in result["forecast"]["starts"]
    ]
    head = (
        "tasks",
        "hosts",
        "read",
        "until the last serves",
        "if one of a host read",
        "and from 16 prefixes",
    )
    history, start = result["forecast"]["history"], _operation(result, "start")
    tasks, requests, read = (
        number(start["tasks"]),
        number(start["get"] + start["list"]),
        size(start["bytes_in"]),
    )
    a_day, finding = number(history["revisions_a_year"] / 365.25), duration(history["finding_s"])
    return (
        f"{table(head, rows)}\n\n"
        f"With {tasks} tasks each process makes {requests} requests for {read}. Before that, each process\n"
        "finds the end of the history, by a list of 1,000 revisions and steps that double: after a year of\n"
        f"{a_day} registrations a day in {finding}, after a year of all that the log takes in\n"
        f"{duration(history['most_finding_s'])}."
    )


def _operation(result: Result, name: str) -> Mapping[str, Any]:
    found: Mapping[str, Any] = next(
        row for row in result["forecast"]["operations"] if row["operation"] == name
    )
    return found


def operations(result: Result) -> str:
    rows = [
        (
            row["operation"],
            *(number(row[kind]) for kind in ("get", "put", "list")),
            size(row["bytes_in"]),
            size(row["bytes_out"]),
            duration(row["cpu_s"]),
            number(row["dollars_a_million"]),
        )
        for row in result["forecast"]["operations"]
    ]
    tasks = number(result["forecast"]["operations"][0]["tasks"])
    head = (f"with {tasks} tasks", "GET", "PUT", "LIST", "read", "written", "processor", "$ for a million")
    price = (
        "A look costs as much as a write, because it lists; asking for the next revision by its name, which\n"
        "is mostly not there, would be a GET."
        if _operation(result, "look")["list"]
        else "A look asks for the next revision by its name, which is mostly not there."
    )
    return f"{table(head, rows)}\n\n{price}"


def revisions(result: Result) -> str:
    found = result["forecast"]["revisions"]
    rows = [
        (
            number(row["tasks"]),
            number(row["epoch"]),
            *(size(row[f"{form}_bytes"]) for form in ("whole_list", "changes")),
            *(number(row[f"{form}_dollars_month"]) for form in ("whole_list", "changes")),
            *(size(row[f"{form}_bytes_to_a_thousand_hosts"]) for form in ("whole_list", "changes")),
        )
        for row in found["by_tasks"]
    ]
    head = (
        "tasks",
        "epoch E",
        "bytes, all listed",
        "changes listed",
        "$/month, all",
        "changes",
        "read by 1,000 hosts, all",
        "changes",
    )
    added = number(found["measured_bytes_a_task"])
    form = f"list every task, {added} bytes each" if found["lists_every_task"] else "do not list every task"
    a_day, modules = number(found["registrations_a_day"]), number(found["module_dollars_month"])
    doubled = number(found["doubled_from_tasks"])
    return (
        f"{table(head, rows)}\n\n"
        f"$/month: what a month of {a_day} registrations a day adds to the bill for storage by its\n"
        f"revisions; its modules add {modules}. The revisions that were measured {form}.\n"
        f"A list of all outgrows the module that is registered at {doubled} tasks."
    )


def writers(result: Result) -> str:
    rows = [
        (
            number(row["writers"]),
            number(row["registrations_s"]),
            number(row["attempts"]),
            f"{100 * row['given_up_by_chance']:.2f} %",
        )
        for row in result["forecast"]["writers"]
    ]
    head = (
        "writers without pause",
        "registrations/s",
        "attempts each",
        "would give up after 20, if winning were chance",
    )
    return table(head, rows)


def sensitivity(result: Result) -> str:
    rows = [
        (
            row["output"],
            number(row["central"]),
            f"`{row['assumption']}`",
            number(row["pessimistic"]),
            number(row["optimistic"]),
        )
        for row in result["forecast"]["sensitivity"]
    ]
    return table(("output", "central", "assumption", "at its worst", "at its best"), rows)
