"""What goes into the model, as tables: measured costs and assumptions."""

from collections.abc import Mapping
from typing import Any

from benchmarks.scaling.notation import duration, link, number, plain, size, table

Result = Mapping[str, Any]


def measured(result: Result) -> str:
    costs = result["costs"]
    small, web, camera = costs["pictures"]
    extra = dict(costs["bank_extra_s"]["points"])
    register = dict(costs["operation_s"]["register"]["points"])
    follow = dict(costs["operation_s"]["follow"]["points"])
    start = dict(costs["operation_s"]["start"]["points"])
    by_count = lambda curve: ", ".join(f"{number(n)}: {duration(s)}" for n, s in sorted(curve.items()))  # noqa: E731
    each = costs["backbone_pass"]
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
            *(
                (
                    f"decoding a picture of {one['long_side']} pixels ({size(one['size_bytes'])}), processor",
                    duration(one["decode_s"]),
                    link("decoding"),
                )
                for one in (small, web, camera)
            ),
            ("what more tasks add to an answer, by tasks", by_count(extra), link("tasks")),
            ("memory of a task", size(costs["resident_bytes_a_task"]), link("tasks")),
            ("its file", size(costs["file_bytes"]), link("tasks")),
            ("registering, processor, by tasks", by_count(register), link("store_operations")),
            ("following one change, processor, by tasks", by_count(follow), link("store_operations")),
            ("starting, processor, by tasks", by_count(start), link("store_operations")),
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
