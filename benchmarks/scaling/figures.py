"""The figures of docs/scaling.md, from scaling.json; the same numbers give the same bytes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

FONT = {"svg.hashsalt": "tosca", "font.size": 9, "font.family": "DejaVu Sans"}


def draw_all(folder: Path, result: Mapping[str, Any]) -> None:
    """Write FOLDER/scaling-NAME.svg for every figure."""
    with matplotlib.rc_context(FONT):
        for name, draw in (("parts", parts), ("store", store)):
            draw(result).savefig(folder / f"scaling-{name}.svg", metadata={"Date": None})


def parts(result: Mapping[str, Any]) -> Figure:
    """What each part of a process could carry: the range, and the central case."""
    devices = {case: dict(one["parts"]) for case, one in result["forecast"]["device"].items()}
    names = [name for name, _ in reversed(result["forecast"]["device"]["central"]["parts"])]
    figure = Figure(figsize=(7.5, 3.0), layout="constrained")
    axes = figure.subplots()
    for row, name in enumerate(names):
        ends = [devices[case].get(name, devices["central"][name]) for case in ("pessimistic", "optimistic")]
        axes.plot(ends, (row, row), color="0.6", linewidth=5, solid_capstyle="butt")
        axes.plot(devices["central"][name], row, marker="o", color="C0")
    axes.set_yticks(range(len(names)), names)
    axes.set(
        xscale="log", xlabel="images/s that this part of one process could carry: range and central case"
    )
    axes.grid(axis="x", color="0.9")
    return figure


def store(result: Mapping[str, Any]) -> Figure:
    """Attempts of concurrent writers, measured, simulated and by formula; and how large revisions become."""
    figure = Figure(figsize=(9.0, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    checks = [one for one in result["checks"] if "writers" in one["name"] and "attempts" in one["name"]]
    for label, key, marked in (("simulated", "simulated", False), ("formula", "simulated", True)):
        chosen = [one for one in checks if one["name"].endswith("by formula") is marked]
        number = [int(one["name"].split()[0]) for one in chosen]
        left.plot(number, [one[key] for one in chosen], marker="x" if marked else "s", label=label)
    measured = [one for one in checks if not one["name"].endswith("by formula")]
    number = [int(one["name"].split()[0]) for one in measured]
    left.plot(number, [one["measured"] for one in measured], marker="o", color="k", label="measured")
    left.set(xlabel="writers without pause", ylabel="attempts for each publication", ylim=(0.0, None))
    left.legend()
    rows = result["forecast"]["revisions"]["by_tasks"]
    tasks = [row["tasks"] for row in rows]
    right.plot(tasks, [row["whole_list_bytes"] for row in rows], marker="o", label="lists every task")
    right.plot(tasks, [row["changes_bytes"] for row in rows], marker="o", label="lists changes, best epoch")
    right.axhline(result["costs"]["file_bytes"], color="0.5", linestyle="--", label="the module itself")
    right.set(xscale="log", yscale="log", xlabel="active tasks", ylabel="bytes of a revision")
    right.legend()
    return figure
