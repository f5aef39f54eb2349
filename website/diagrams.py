"""The diagrams of docs/method.md, drawn with matplotlib.

python -m website.diagrams docs/figures

Points and scores in them are made up, from a fixed seed, to show an idea; no figure of them is a measurement.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch
from numpy.typing import NDArray

Vectors = NDArray[np.float64]
Point = tuple[float, float]

INK, FROZEN, CHOICE, MODULE, STRANGER = "#263238", "#90a4ae", "#00897b", "#fb8c00", "#d81b60"
_CLASS_COLOURS = (CHOICE, MODULE, "#5e35b1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    draw_all(parser.parse_args().folder)


def draw_all(folder: Path) -> None:
    """Write FOLDER/method-NAME.svg for every diagram; no date, no random ids: always the same bytes."""
    with matplotlib.rc_context({"svg.hashsalt": "tosca", "font.size": 9, "font.family": "DejaVu Sans"}):
        for name, draw in DIAGRAMS.items():
            draw().savefig(folder / f"method-{name}.svg", metadata={"Date": None})


# -- from picture to answer, and inside LuCA -------------------------------------------------------------


def flow() -> Figure:
    """Where a picture goes: the backbone once, the choice of the task, the modules that can still win."""
    figure, axes = _canvas(9.3, 3.4)
    _box(axes, (0.7, 1.7), "picture", "white")
    _box(axes, (2.5, 1.7), "frozen backbone\n(ViT), once", FROZEN, width=1.5)
    _box(axes, (4.2, 1.7), "CLS vector\nx, 768 numbers", "white", width=1.3)
    _box(axes, (6.0, 2.7), "which task?\nwhitened cosine to all\nclasses of all tasks", CHOICE, width=1.9)
    _box(axes, (6.0, 0.6), "which class?\nmodules, in the order\nof P(task | x)", MODULE, width=1.9)
    _box(
        axes,
        (8.3, 1.7),
        "P(task | x) ·\nP(class | task, x)\nbest pair, p-value,\nreceipt",
        "white",
        width=1.5,
    )
    for start, end in (
        ((1.2, 1.7), (1.75, 1.7)),
        ((3.25, 1.7), (3.55, 1.7)),
        ((4.85, 1.85), (5.05, 2.5)),
        ((4.85, 1.55), (5.05, 0.8)),
        ((6.95, 2.6), (7.55, 2.0)),
        ((6.95, 0.7), (7.55, 1.4)),
        ((6.0, 2.25), (6.0, 1.05)),
    ):
        _arrow(axes, start, end)
    axes.text(6.1, 1.65, "stop when no other\ntask can win", fontsize=7.5, color=INK, va="center")
    return figure


def luca() -> Figure:
    """The two halves of LuCA on the CLS vector, and the head."""
    figure, axes = _canvas(9.0, 2.3)
    _box(axes, (0.7, 1.1), "z", "white", width=0.6)
    _box(axes, (2.6, 1.1), "adapter\nz + W2·GELU(W1·z + b1) + b2", MODULE, width=2.6)
    _box(axes, (4.9, 1.1), "LayerNorm", MODULE, width=1.1)
    _box(axes, (6.6, 1.8), "calibrator\nsigmoid(V2·ReLU(V1·a))", MODULE, width=2.0)
    _box(axes, (6.6, 0.5), "a", "white", width=0.6)
    _box(axes, (8.3, 1.1), "a ⊙ g\ncosine head", "white", width=1.1)
    for start, end in (
        ((1.0, 1.1), (1.3, 1.1)),
        ((3.9, 1.1), (4.35, 1.1)),
        ((5.45, 1.2), (5.6, 1.7)),
        ((5.45, 1.0), (6.3, 0.5)),
        ((7.6, 1.7), (7.8, 1.35)),
        ((6.9, 0.5), (7.75, 0.9)),
    ):
        _arrow(axes, start, end)
    axes.text(7.72, 1.72, "g", fontsize=9, color=INK)
    return figure


def _canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose axes count inches, without a frame."""
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.set(xlim=(0.0, width), ylim=(0.0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: Axes, centre: Point, text: str, colour: str, width: float = 1.0, height: float = 0.8) -> None:
    corner = (centre[0] - width / 2, centre[1] - height / 2)
    style = "round,pad=0.0,rounding_size=0.08"
    axes.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, facecolor=colour, edgecolor=INK))
    ink = "white" if colour == CHOICE else INK
    axes.text(*centre, text, ha="center", va="center", fontsize=8, color=ink)


def _arrow(axes: Axes, start: Point, end: Point) -> None:
    axes.annotate("", xy=end, xytext=start, arrowprops={"arrowstyle": "-|>", "color": INK, "lw": 1.2})


# -- whitened cosine ----------------------------------------------------------------------------------------


def whitening() -> Figure:
    """Three classes that share a stretched covariance, before and after whitening, and one new picture."""
    generator = np.random.default_rng(5)
    covariance_22 = np.array([[2.2, 1.9], [1.9, 2.2]])
    mean_K2 = np.array([[-1.6, 1.4], [1.5, -1.3], [2.6, 2.9]])
    points = [generator.multivariate_normal(mean_2, covariance_22, 60) for mean_2 in mean_K2]
    new_2 = np.array([0.2, 3.2])
    centre_2 = mean_K2.mean(axis=0)
    whitener_22 = np.linalg.inv(np.linalg.cholesky(covariance_22))

    figure = Figure(figsize=(9.0, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    _scatter(left, points, mean_K2, new_2)
    left.set_title("CLS vectors: the nearest mean misleads")
    nearest = int(np.linalg.norm(mean_K2 - new_2, axis=1).argmin())
    left.plot(*zip(new_2, mean_K2[nearest], strict=True), color=STRANGER, linestyle="--")

    def whitened(vectors: Vectors) -> Vectors:
        return np.asarray((vectors - centre_2) @ whitener_22.T)

    means_K2, moved_2 = whitened(mean_K2), whitened(new_2)
    _scatter(right, [whitened(one) for one in points], means_K2, moved_2)
    right.set_title("whitened: the smallest angle decides")
    for k, mean_2 in enumerate(means_K2):
        right.plot(*zip((0.0, 0.0), 1.2 * mean_2, strict=True), color=_CLASS_COLOURS[k], linewidth=1.5)
    right.plot(*zip((0.0, 0.0), moved_2, strict=True), color=STRANGER, linestyle="--")
    right.plot(0.0, 0.0, marker="+", color=INK, markersize=10)
    return figure


def _scatter(axes: Axes, points: list[Vectors], mean_K2: Vectors, new_2: Vectors) -> None:
    for k, class_N2 in enumerate(points):
        axes.scatter(class_N2[:, 0], class_N2[:, 1], s=7, color=_CLASS_COLOURS[k], alpha=0.45, linewidths=0)
        axes.plot(*mean_K2[k], marker="o", color=_CLASS_COLOURS[k], markeredgecolor=INK, markersize=9)
    axes.plot(*new_2, marker="*", color=STRANGER, markeredgecolor=INK, markersize=15)
    axes.set(aspect="equal", xticks=[], yticks=[])


# -- p-value ------------------------------------------------------------------------------------------------


def p_value() -> Figure:
    """The scores of a task's known pictures, a picture like them and a stranger."""
    known = np.sort(np.random.default_rng(3).beta(9.0, 3.0, 100))
    figure = Figure(figsize=(9.0, 3.0), layout="constrained")
    axes = figure.subplots()
    axes.hist(known, bins=np.linspace(0.2, 1.0, 33).tolist(), color=FROZEN, edgecolor="white")
    for score, colour, name, height in (
        (0.70, CHOICE, "a picture like them", 9.0),
        (0.30, STRANGER, "a stranger", 5.0),
    ):
        p = (1 + int((known <= score).sum())) / (len(known) + 1)
        axes.axvline(score, color=colour, linewidth=2)
        axes.text(score - 0.006, height, f"{name}\np = {p:.2f}", color=colour, ha="right", va="center")
    axes.set(
        xlabel="how well a picture fits the task (whitened cosine)", ylabel="known pictures", xlim=(0.2, 1.0)
    )
    axes.spines[["top", "right"]].set_visible(False)
    return figure


DIAGRAMS: dict[str, Callable[[], Figure]] = {
    "flow": flow,
    "luca": luca,
    "whitening": whitening,
    "p-value": p_value,
}

if __name__ == "__main__":
    main()
