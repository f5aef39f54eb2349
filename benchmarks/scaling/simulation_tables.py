"""What the simulations showed, as tables."""

from collections.abc import Mapping
from typing import Any

from benchmarks.scaling.notation import duration, link, number, table

Result = Mapping[str, Any]


def checks(result: Result) -> str:
    rows = [
        (
            one["name"],
            f"{number(one['measured'])} {one['unit']}".strip(),
            number(one["simulated"]),
            f"{100 * one['error']:+.0f} %",
            f"{100 * one['tolerance']:.0f} %",
            "yes" if one["holds"] else "**no**",
            link(one["source"]),
        )
        for one in result["checks"]
    ]
    held = sum(one["holds"] for one in result["checks"])
    head = ("", "measured", "simulated", "error", "allowed", "agrees", "in")
    return f"{held} of {len(rows)} agree.\n\n{table(head, rows)}"


def on_a_device(result: Result) -> str:
    rows = [
        (
            f"{100 * row['share']:.0f} %",
            row["arrivals"],
            number(row["offered_s"]),
            number(row["answered_s"]),
            number(row["p50_ms"]),
            number(row["p99_ms"]),
            number(row["refused"]),
            number(row["mean_batch"]),
        )
        for row in result["on_a_device"]
    ]
    head = (
        "of capacity",
        "arrivals",
        "offered/s",
        "answered/s",
        "median, ms",
        "p99, ms",
        "503",
        "mean batch",
    )
    return table(head, rows)


def following(result: Result) -> str:
    rows = [
        (
            number(row["replicas"]),
            f"{duration(row['mean_s'])} ({duration(row['formula_mean_s'])})",
            duration(row["p99_s"]),
            f"{duration(row['last_s'])} ({duration(row['formula_latest_s'])})",
        )
        for row in result["following"]
    ]
    return table(("replicas", "mean (formula)", "p99", "the last one (formula)"), rows)


def writing(result: Result) -> str:
    rows = [
        (
            number(row["writers"]),
            number(row["offered_s"]),
            number(row["published_s"]),
            number(row["attempts"]),
            duration(row["median_s"]),
            duration(row["p99_s"]),
            f"{100 * row['given_up']:.2g} %",
        )
        for row in result["writing"]
    ]
    return table(("writers", "offered/s", "published/s", "attempts", "median", "p99", "given up"), rows)
