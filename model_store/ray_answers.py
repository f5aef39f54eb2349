"""Bulk answers on a Ray cluster: every worker has the backbone and the bank, and takes part after part."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import pyarrow
import pyarrow.compute
import ray.data

from model_store.bulk_answers import Run, answer_part
from model_store.offline import OfflinePredictor
from model_store.picture_parts import Part, Rows
from model_store.store import ModelStore


class AnswerParts:
    """Called by Ray Data in a worker of its own, with one part at a time."""

    def __init__(self, run: dict[str, Any], device: str, runtime: str, num_threads: int) -> None:
        self._run = Run.model_validate(run)
        self._predictor = OfflinePredictor(
            ModelStore(self._run.store),
            revision=self._run.revision,
            device=device,
            runtime=runtime,
            num_threads=num_threads,
        )

    def __call__(self, batch: pyarrow.Table) -> pyarrow.Table:
        (row,) = batch.to_pylist()
        part = part_of(row)
        answers = answer_part(self._predictor, part, self._run)
        return answers.append_column("part", pyarrow.array([part.number] * len(answers), pyarrow.int64()))


def answer_on_ray(
    parts: Sequence[Part],
    run: Run,
    *,
    device: str,
    runtime: str,
    num_workers: int,
    num_gpus_each: float,
    num_threads: int = 1,
) -> Iterator[tuple[int, pyarrow.Table]]:
    """(number, answers) of every part, as they are done. To be used inside `ray_session`.

    A part whose worker is lost is given to another one.
    """
    rows = [row_of(one) for one in parts]
    ray.data.DataContext.get_current().enable_progress_bars = False  # the command has one of its own
    answered = ray.data.from_items(rows, override_num_blocks=len(rows)).map_batches(
        AnswerParts,
        fn_constructor_kwargs={
            "run": run.model_dump(),
            "device": device,
            "runtime": runtime,
            "num_threads": num_threads,
        },
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=min(num_workers, len(parts))),
        num_cpus=num_threads,
        num_gpus=num_gpus_each,
    )
    sizes = {one.number: len(one.pictures) for one in parts}
    arrived: dict[int, list[pyarrow.Table]] = defaultdict(list)
    for block in answered.iter_batches(batch_size=None, batch_format="pyarrow"):
        assert isinstance(block, pyarrow.Table), "the format that was asked for"
        for number in block.column("part").unique().to_pylist():
            of_part = block.filter(pyarrow.compute.equal(block.column("part"), number))
            arrived[number].append(of_part.drop_columns(["part"]))
            if sum(map(len, arrived[number])) == sizes[number]:
                yield number, pyarrow.concat_tables(arrived.pop(number))
    assert not arrived, "every part comes whole"


def row_of(part: Part) -> dict[str, Any]:
    """A part as a row of a data set."""
    if isinstance(part.pictures, Rows):
        return {"number": part.number, "files": None, "rows": asdict(part.pictures)}
    return {"number": part.number, "files": list(part.pictures), "rows": None}


def part_of(row: dict[str, Any]) -> Part:
    rows = row["rows"]
    return Part(row["number"], tuple(row["files"]) if rows is None else Rows(**rows))
