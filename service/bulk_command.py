"""`tosca predict --ray`: folders and tables of pictures, answered on a Ray cluster into Parquet files."""

import time
from collections.abc import Sequence
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from model_store.console import err, out, print_json
from model_store.picture_parts import cut, digest
from model_store.ray_session import ray_session, require_ray, room_for_workers
from model_store.selection import Selection
from model_store.store import ModelStore


def predict_in_bulk(
    sources: Sequence[Path],
    output: Path,
    *,
    store: str,
    selection: Selection,
    task: str | None,
    top_k: int,
    coverage: float | None,
    abstain_level: float,
    device: str,
    runtime: str,
    workers: int | None,
    part_size: int,
    as_json: bool,
) -> None:
    """Answer what `output` does not hold yet, with the revision that the first run began with.

    Raises InvalidDataset, Conflict and whatever opening the store does.
    """
    require_ray()
    from model_store.bulk_answers import AnswerFolder, Run

    parts = cut([one.absolute() for one in sources], part_size)
    num_pictures = sum(len(one.pictures) for one in parts)
    folder = AnswerFolder(output)
    previous = folder.previous()
    url = store if "://" in store else str(Path(store).absolute())
    run = Run(
        store=url,
        revision=ModelStore(url).require_head().number if previous is None else previous.revision,
        pictures_sha256=digest(parts),
        num_pictures=num_pictures,
        part_size=part_size,
        selection=selection,
        task=task,
        top_k=top_k,
        coverage=coverage,
        abstain_level=abstain_level,
    )
    folder.begin(run)
    missing = folder.missing(parts)
    num_missing = sum(len(one.pictures) for one in missing)
    started = time.monotonic()
    if missing:
        from model_store.ray_answers import answer_on_ray

        with ray_session(), _progress(num_pictures, num_pictures - num_missing) as progress:
            room, num_gpus_each = room_for_workers(device)
            for number, answers in answer_on_ray(
                missing,
                run,
                device=device,
                runtime=runtime,
                num_workers=workers or room,
                num_gpus_each=num_gpus_each,
            ):
                folder.put(number, answers)
                progress.advance(progress.task_ids[0], len(answers))
    num_unreadable = folder.num_faults()
    report = {
        "output": str(output),
        "revision": run.revision,
        "pictures": num_pictures,
        "answered_before": num_pictures - num_missing,
        "unreadable": num_unreadable,
        "seconds": round(time.monotonic() - started, 3),
    }
    if as_json:
        print_json(report)
    else:
        out.print(
            f"{num_pictures} pictures, {report['answered_before']} of them answered before, {num_unreadable} "
            f"unreadable; revision {run.revision}, {report['seconds']:.1f} s: {output}/part-*.parquet"
        )


def _progress(total: int, done: int) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=err, disable=not err.is_terminal)
    progress.add_task("answers", total=total, completed=done)
    return progress
