"""What goes into the model, as tables: measured costs and assumptions."""

from collections.abc import Mapping
from typing import Any

from benchmarks.scaling.notation import duration, link, number, percent, plain, size, table

Result = Mapping[str, Any]


def measured(result: Result) -> str:
    costs = result["costs"]
    each, took = costs["backbone_pass"], costs["operation_s"]

    def by_tasks(curve: Mapping[str, Any]) -> str:
        return ", ".join(f"{number(tasks)}: {duration(seconds)}" for tasks, seconds in curve["points"])

    return table(
        ("cost", "measured", "in"),
        [
            (
                "backbone pass of B pictures, both cores",
                f"{duration(each['base_s'])} + B · {duration(each['each_s'])}",
                link("runtimes"),
            ),
            (
                "a request beside decoding and pass, processor",
                duration(costs["request_s"]),
                link("request_path"),
            ),
            (
                "of it, the event loop's thread",
                percent(costs["loop_share"]),
                link("request_threads"),
            ),
            *(
                (
                    f"decoding a picture of {one['long_side']} pixels ({size(one['size_bytes'])}), processor",
                    duration(one["decode_s"]),
                    link("decoding"),
                )
                for one in costs["pictures"]
            ),
            (
                "a bank's answer to a picture alone, by tasks",
                by_tasks(costs["bank_alone_s"]),
                link("bank_batches"),
            ),
            ("and in a batch of 64, by tasks", by_tasks(costs["bank_in_batch_s"]), link("bank_batches")),
            ("memory of a task", size(costs["resident_bytes_a_task"]), link("tasks")),
            ("its file", size(costs["file_bytes"]), link("tasks")),
            ("registering, processor, by tasks", by_tasks(took["register"]), link("store_operations")),
            ("following one change, processor, by tasks", by_tasks(took["follow"]), link("store_operations")),
            ("starting, processor, by tasks", by_tasks(took["start"]), link("store_operations")),
        ],
    )


def assumed(result: Result) -> str:
    def row(one: Mapping[str, Any]) -> tuple[str, ...]:
        fixed = one["pessimistic"] == one["optimistic"]
        ends = "" if fixed else f"{plain(one['pessimistic'])} – {plain(one['optimistic'])}"
        sources = " ".join(f"[{i}]({url})" for i, url in enumerate(one["sources"], 1))
        name = f"`{one['name']}`" + (f", {one['unit']}" if one["unit"] else "")
        return name, plain(one["central"]), ends, f"{one['reason']} {sources}".strip()

    return table(("assumption", "central", "worst – best", "why"), map(row, result["assumptions"]))
