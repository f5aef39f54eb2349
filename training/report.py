"""The training report: Markdown with a per-class table, and the confusion matrix as a picture."""
# K classes

import warnings
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torch import Tensor

from model_store.errors import ToscaError
from training.trainer import TrainedTask


def confusion_matrix(label_N: Tensor, predicted_N: Tensor, num_classes: int) -> Tensor:
    """[K, K] counts; rows are the true classes, columns the predicted ones."""
    return torch.bincount(label_N * num_classes + predicted_N, minlength=num_classes**2).view(num_classes, -1)


def write_report(trained: TrainedTask, folder: Path) -> Path:
    """Write TASK.md and TASK-confusion.png into `folder`; returns the Markdown file's path.

    Raises ToscaError where they cannot be written.
    """
    manifest, held_out = trained.manifest, trained.held_out
    confusion_KK = confusion_matrix(held_out.label_N, held_out.predictions, len(manifest.labels))
    picture = folder / f"{manifest.task}-confusion.png"
    page = folder / f"{manifest.task}.md"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _plot_confusion(confusion_KK, manifest.labels, manifest.task, picture)
        page.write_text(_markdown(trained, confusion_KK, picture.name), encoding="utf-8")
    except OSError as error:
        raise ToscaError(f"report {page} cannot be written: {error.strerror or error}") from error
    return page


def _markdown(trained: TrainedTask, confusion_KK: Tensor, picture: str) -> str:
    manifest, held_out = trained.manifest, trained.held_out
    rows = []
    for k, label in enumerate(manifest.labels):
        right, true = int(confusion_KK[k, k]), int(confusion_KK[k].sum())
        predicted = int(confusion_KK[:, k].sum())
        recall = f"{right / true:.3f}" if true else "–"
        precision = f"{right / predicted:.3f}" if predicted else "–"
        name = label.replace("|", "\\|")
        rows.append(f"| {name} | {true} | {recall} | {precision} |")
    settings = "\n".join(f"| {name} | {value} |" for name, value in manifest.training.items())
    skipped = "\n".join(f"- {one}" for one in trained.skipped) or "none"
    return f"""# Task {manifest.task}

| | |
|---|---|
| held-out evidence | {held_out.evidence} ({len(held_out.label_N)} pictures) |
| accuracy | {_figure(manifest.metrics.get("accuracy"))} |
| ECE (15 bins) | {_figure(manifest.metrics.get("ece"))} |
| classes | {len(manifest.labels)} |
| module file | {len(trained.data):,} bytes |
| backbone | {manifest.backbone_fingerprint} |

The figures are those of the module with this task given, before any other task competes.

| class | pictures | recall | precision |
|---|---|---|---|
{chr(10).join(rows)}

![Confusion matrix: rows are true classes, columns predicted ones]({picture})

## Training

| setting | value |
|---|---|
{settings}

## Pictures left out

{skipped}
"""


def _figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _plot_confusion(confusion_KK: Tensor, labels: tuple[str, ...], title: str, path: Path) -> None:
    size = max(4.0, min(16.0, 0.35 * len(labels) + 2.5))
    figure = Figure(figsize=(size, size), layout="constrained")
    axes = figure.subplots()
    share_KK = confusion_KK.double() / confusion_KK.sum(dim=1, keepdim=True).clamp_min(1)
    axes.imshow(share_KK.numpy(), cmap="Blues", vmin=0.0, vmax=1.0)
    axes.set(xlabel="predicted", ylabel="true")
    axes.set_title(title, parse_math=False)
    if len(labels) <= 40:
        axes.set_xticks(range(len(labels)), labels, rotation=90, parse_math=False)
        axes.set_yticks(range(len(labels)), labels, parse_math=False)
        for i, row in enumerate(confusion_KK.tolist()):
            for j, count in enumerate(row):
                if count:
                    dark = float(share_KK[i, j]) > 0.5
                    axes.text(j, i, str(count), ha="center", va="center", color="white" if dark else "black")
    with warnings.catch_warnings():  # a script that the font lacks is drawn as boxes; the page has the labels
        warnings.filterwarnings("ignore", r"Glyph \d+|Matplotlib currently does not support", UserWarning)
        figure.savefig(path, dpi=110)
