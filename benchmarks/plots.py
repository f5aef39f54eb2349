"""Figures of the README from the committed results: `python -m benchmarks.plots`."""

import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from benchmarks.servers import WITH_OUR_ENGINE

RESULTS = Path(__file__).parent / "results"
FIGURES = Path(__file__).parents[1] / "docs" / "figures"
NAMES = {
    "tosca": "TOSCA Serving",
    "plain_fastapi": "plain FastAPI",
    "lit_serve": "LitServe",
    "lit_serve_workers": "LitServe, a worker a core",
    "ray_serve": "Ray Serve",
    "bento_ml": "BentoML",
    "lit_serve_our_engine": "LitServe, our engine",
    "lit_serve_workers_our_engine": "LitServe, our engine, a worker a core",
}
COLOURS = {"tosca": "C0"} | dict.fromkeys(WITH_OUR_ENGINE, "0.85")


def main() -> None:
    for name, draw in (("tasks", tasks), ("serving", serving)):
        path = RESULTS / f"{name}.json"
        if path.exists():
            figure = draw(json.loads(path.read_text()))
            figure.savefig(FIGURES / f"benchmark-{name}.png", dpi=110)


def tasks(result: dict[str, Any]) -> Figure:
    """The time of an answer by the number of tasks, as a ratio to one task."""
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    curves: dict[str, list[tuple[int, float]]] = {}
    for one in result["answers"]:
        curves.setdefault(one["popularity"], []).append((one["tasks"], one["ratio_to_one_task"]))
    for popularity, points in curves.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=popularity)
    axes.axhline(1.0, color="0.7", linewidth=0.8)
    axes.set(xscale="log", xlabel="active tasks", ylabel="time of an answer / with one task", ylim=(0.0, 1.4))
    axes.legend(title="popularity of tasks")
    return figure


def serving(result: dict[str, Any]) -> Figure:
    """Saturated throughput over the backbone alone, and p99 at 70 % of saturation; lighter: peers that were
    handed this project's engine."""
    scenarios = result["scenarios"]
    num_bars = sum(len(one["summary"]["saturated_images_per_s"]) for one in scenarios.values())
    figure = Figure(figsize=(10, 2.2 + 0.2 * num_bars), layout="constrained")
    throughput, latency = figure.subplots(1, 2, sharey=True)
    labels, position = [], 0.0
    for scenario, measured in scenarios.items():
        summary = measured["summary"]
        for server, images_per_s in summary["saturated_images_per_s"].items():
            colour = COLOURS.get(server, "0.65")
            throughput.barh(position, images_per_s / summary["backbone_alone_images_per_s"], color=colour)
            latency.barh(position, summary["open_loop_p99_ms"][server], color=colour)
            refused = summary["open_loop_refused"][server]
            if refused:
                latency.text(
                    summary["open_loop_p99_ms"][server], position, f" {refused} refused", va="center"
                )
            labels.append((position, f"{NAMES[server]} ({scenario})" if server == "tosca" else NAMES[server]))
            position += 1.0
        position += 0.7
    throughput.set_yticks([where for where, _ in labels], [text for _, text in labels])
    throughput.invert_yaxis()
    throughput.axvline(1.0, color="0.4", linewidth=0.8)
    throughput.set_xlabel("saturated throughput / backbone alone")
    latency.set(xlabel="p99 at 70 % of saturation (ms)", xscale="log")
    latency.set_xticks(ticks := [100, 200, 500, 1000, 2000], [str(tick) for tick in ticks])
    latency.xaxis.set_minor_formatter(NullFormatter())
    return figure


if __name__ == "__main__":
    main()
