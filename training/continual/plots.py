"""The benchmark's pictures: accuracy against tasks, accuracy matrix, reliability diagram, coverage."""
# B steps

from pathlib import Path

from matplotlib.figure import Figure

from model_store.calibration import NUM_BINS
from training.continual.results import BenchmarkResults, RunResult

_PANELS = (
    ("accuracy", "end to end"),
    ("selection_accuracy", "right task"),
    ("accuracy_given_task", "right class, task given"),
)
_PANELS_A_ROW = 4


def write_plots(results: BenchmarkResults, folder: Path) -> list[Path]:
    """PNG files of what the results hold: curves and matrices need every step to have been measured."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    curves = {
        name: list(runs.values())
        for name, runs in results.runs.items()
        if all(len(run.steps) > 1 for run in runs.values())
    }
    if curves:
        written.append(_plot_curves(curves, folder / "accuracy.png"))
        for name, runs in curves.items():
            written.append(_plot_matrix(name, runs[0], folder / f"matrix-{name}.png"))
    calibrated = {
        name: [run for run in runs.values() if run.reliability is not None]
        for name, runs in results.runs.items()
    }
    calibrated = {name: runs for name, runs in calibrated.items() if runs}
    if calibrated:
        written.append(_plot_reliability(calibrated, folder / "reliability.png"))
    covered = {
        name: [run for run in runs.values() if run.coverage is not None]
        for name, runs in results.runs.items()
    }
    covered = {name: runs for name, runs in covered.items() if runs}
    if covered:
        written.append(_plot_coverage(covered, folder / "coverage.png"))
    return written


def _plot_curves(curves: dict[str, list[RunResult]], path: Path) -> Path:
    """Mean over the seeds, which are drawn faintly."""
    figure = Figure(figsize=(13, 5.5), layout="constrained")
    for axes, (field, title) in zip(figure.subplots(1, len(_PANELS), sharey=True), _PANELS, strict=True):
        for i, (name, runs) in enumerate(curves.items()):
            lines = [[getattr(step, field) for step in run.steps] for run in runs]
            tasks = range(1, len(lines[0]) + 1)
            mean = [sum(values) / len(values) for values in zip(*lines, strict=True)]
            colour, dashes = f"C{i % 10}", "--" if i >= 10 else "-"
            axes.plot(tasks, mean, dashes, color=colour, label=name)
            for line in lines:
                axes.plot(tasks, line, color=colour, alpha=0.15)
        axes.set(title=title, xlabel="tasks learnt")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("accuracy")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _plot_matrix(name: str, run: RunResult, path: Path) -> Path:
    """a_{b,j}: row b is the state after b + 1 tasks, column j the task asked about."""
    size = len(run.tasks)
    matrix = [[*step.accuracy_by_task, *[float("nan")] * (size - step.num_tasks)] for step in run.steps]
    figure = Figure(figsize=(max(4.0, 0.5 * size + 2.0), max(3.5, 0.5 * size + 1.5)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(matrix, cmap="viridis", vmin=0.0, vmax=1.0)
    axes.set_xticks(range(size), run.tasks, rotation=90)
    axes.set_yticks(range(size), [str(b + 1) for b in range(size)])
    axes.set(title=f"accuracy matrix, {name}", xlabel="task", ylabel="tasks learnt")
    figure.colorbar(image)
    figure.savefig(path, dpi=110)
    return path


def _plot_coverage(covered: dict[str, list[RunResult]], path: Path) -> Path:
    """Coverage of the prediction sets against what was asked for, and their mean size; a line a seed."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    truth, size = figure.subplots(1, 2)
    truth.plot([0.88, 1.0], [0.88, 1.0], color="grey", linewidth=1)
    for i, (name, runs) in enumerate(covered.items()):
        for seed, run in enumerate(runs):
            points = run.coverage or ()
            nominal = [one.nominal for one in points]
            label = name if seed == 0 else None
            truth.plot(nominal, [one.coverage for one in points], "o-", color=f"C{i}", label=label)
            size.plot(nominal, [one.mean_size for one in points], "o-", color=f"C{i}")
    truth.set(xlabel="asked for", ylabel="coverage")
    size.set(xlabel="asked for", ylabel="mean size of the set")
    truth.legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path


def _plot_reliability(calibrated: dict[str, list[RunResult]], path: Path) -> Path:
    """Accuracy against confidence after the last task, the pictures of all seeds together; one panel a
    method, the size of a point tells how many pictures its bin holds."""
    rows = -(-len(calibrated) // _PANELS_A_ROW)
    figure = Figure(figsize=(3.2 * _PANELS_A_ROW, 3.2 * rows), layout="constrained")
    panels = figure.subplots(rows, _PANELS_A_ROW, sharex=True, sharey=True, squeeze=False).flat
    for axes, (name, runs) in zip(panels, calibrated.items(), strict=False):
        axes.plot([0, 1], [0, 1], color="grey", linewidth=1)
        total = sum(run.num_pictures for run in runs)
        for k in range(NUM_BINS):
            bins = [run.reliability[k] for run in runs if run.reliability is not None]
            count = sum(one[0] for one in bins)
            if count:
                confidence, accuracy = (sum(one[0] * one[part] for one in bins) / count for part in (1, 2))
                axes.scatter(confidence, accuracy, s=10.0 + 300.0 * count / total, color="C0", alpha=0.7)
        axes.set_title(name, fontsize="small")
        axes.set(xlim=(0, 1), ylim=(0, 1.02))
    for axes in list(panels):
        axes.set_axis_off()
    figure.supxlabel("confidence")
    figure.supylabel("accuracy")
    figure.savefig(path, dpi=110)
    return path
