"""`tosca backbone tune`."""

from pathlib import Path
from typing import Annotated

import typer

from model_store.backbone import resolve_device
from model_store.console import (
    DEFAULT_STORE,
    DeviceOption,
    JsonOption,
    StoreOption,
    err,
    out,
    print_json,
    print_table,
)
from model_store.errors import InvalidBackbone, InvalidDataset
from model_store.measuring import Plan, Tuned, tune
from model_store.parity import LabelledPixels, read_labelled
from model_store.publishing import Publisher
from model_store.runtimes.runtime import RUNTIMES
from model_store.store import ModelStore
from model_store.tuning import Tuning, contenders

_FEW_PICTURES = 24  # fewer are told of; the demo tunes with so many


def backbone_tune(
    data: Annotated[
        list[str], typer.Option(help="Real pictures, FOLDER or TASK=FOLDER with CLASS/* below; repeated.")
    ],
    runtime: Annotated[
        list[str] | None,
        typer.Option(help=f"Measure this one alone; repeated. Without it all: {', '.join(RUNTIMES)}."),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Batch size to time; repeated. 1 and 8, on CUDA 1 and 64.")
    ] = None,
    pictures: Annotated[int, typer.Option(min=1, help="Most pictures for the parity.")] = 128,
    rounds: Annotated[int, typer.Option(min=1, help="Timed passes a batch size.")] = 5,
    threads: Annotated[int, typer.Option(min=0, help="Threads of a pass; 0: as torch chooses.")] = 0,
    device: DeviceOption = "auto",
    store: StoreOption = DEFAULT_STORE,
    json: JsonOption = False,
) -> None:
    """Measure every runtime of the store's backbone here and keep the fastest that answers as torch does.

    Example: tosca backbone tune --data pictures/birds --data parts=pictures/machine-parts
    """
    opened = ModelStore(store)
    head = opened.require_head()
    artefact = opened.backbone(head.backbone_fingerprint)
    labelled = read_labelled(_folders(data), artefact.manifest.preprocessing, pictures)
    _judge(labelled)
    tuned = tune(
        artefact,
        labelled,
        Plan(
            runtimes=tuple(runtime or RUNTIMES),
            device=device,
            batch_sizes=tuple(sorted(set(batch or _batch_sizes(device)))),
            num_rounds=rounds,
            num_threads=threads,
        ),
        bank=Publisher(opened).active.bank if head.tasks else None,
        on_measured=lambda one: err.print(f"measured {one.runtime}"),
    )
    if runtime:
        _require(tuned)
    opened.put_tuning(tuned.tuning, tuned.export)
    if json:
        print_json(tuned.tuning.model_dump(mode="json"))
        return
    print_measurements(tuned.tuning)
    out.print(f"{tuned.tuning.chosen} is now the runtime of this backbone on {tuned.tuning.hardware}")


def print_measurements(tuning: Tuning) -> None:
    """The speed and parity of every runtime, and the speed of the chosen one by streams, for people."""
    table = tuning.table
    contending = {one.runtime for one in contenders(table)}
    print_table(
        ["runtime", "images/s", "× float32", "× streams", "mean cosine", "worst", "task flips", "accuracy"],
        (
            (
                one.runtime,
                f"{one.images_per_s[max(one.images_per_s)]:.1f}" if one.images_per_s else "–",
                f"{one.best_speedup:.2f}" if one.speedup else "–",
                f"{one.streams_gain:.2f}" if one.runtime in contending else "–",
                *(
                    (
                        f"{one.parity.mean_cosine:.4f}",
                        f"{one.parity.min_cosine:.4f}",
                        f"{one.parity.task_flips:.2%}",
                        f"{one.parity.reference_accuracy:.3f} → {one.parity.accuracy:.3f}",
                    )
                    if one.parity
                    else ("–",) * 4
                ),
            )
            for one in table
        ),
    )
    for one in table:
        if one.refused is not None:
            out.print(f"{one.runtime} is refused: {one.refused}")
    for one in table:
        if one.served_images_per_s is not None:
            out.print(f"{one.runtime}, in turns with the others: {one.served_images_per_s:.1f} images/s")
    for streams in tuning.streams:
        lone, full = min(streams.images_per_s), max(streams.images_per_s)
        out.print(
            f"{streams.num_streams} at a time: {streams.images_per_s[lone]:.1f} images/s, "
            f"{streams.images_per_s[full]:.1f} in batches of {full}; "
            f"{streams.latency_ms[lone]:.1f} ms for a picture"
        )


def _batch_sizes(device: str) -> tuple[int, ...]:
    """One picture, and as many as a server passes at once."""
    return (1, 64) if resolve_device(device).type == "cuda" else (1, 8)


def _require(tuned: Tuned) -> None:
    """A runtime that was asked for by name and refused is an error, whatever the others do."""
    for one in tuned.tuning.table:
        if one.refused is not None:
            raise InvalidBackbone(f"runtime {one.runtime} is refused: {one.refused}")


def _judge(labelled: LabelledPixels) -> None:
    """Warn of few pictures. Raises InvalidDataset for those of one class, which no runtime gets wrong."""
    if len(set(labelled.truth)) < 2:
        task, label = labelled.truth[0]
        raise InvalidDataset(f"{task}: all pictures are of class {label!r}, parity needs two classes")
    if len(labelled.truth) < _FEW_PICTURES:
        err.print(
            f"warning: {len(labelled.truth)} pictures say little about parity, "
            f"expected {_FEW_PICTURES} or more",
            style="yellow",
        )


def _folders(data: list[str]) -> dict[str, Path]:
    folders: dict[str, Path] = {}
    for text in data:
        name, separator, path = text.partition("=")
        folder = Path(path if separator else text)
        if not folder.is_dir():
            raise typer.BadParameter(f"{folder} is no folder", param_hint="--data")
        task = name if separator else folder.resolve().name
        if task in folders:
            raise typer.BadParameter(f"{folders[task]} and {folder} are both {task!r}", param_hint="--data")
        folders[task] = folder
    return folders
