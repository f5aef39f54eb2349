"""Answers by the thousand, as a folder of Parquet files that a run may be resumed into.

FOLDER/run.json              what is asked of which revision; a second run must ask the same
FOLDER/part-000017.parquet   the answers of one part, there whole or not at all
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
from pydantic import BaseModel, ConfigDict, ValidationError

from model_store.answers import Answer
from model_store.errors import Conflict, InvalidImage
from model_store.offline import OfflinePredictor
from model_store.picture_parts import Part
from model_store.selection import Selection

FORMAT = 1
_CHOICES = pyarrow.list_(
    pyarrow.struct(
        [("task", pyarrow.string()), ("label", pyarrow.string()), ("probability", pyarrow.float64())]
    )
)
SCHEMA = pyarrow.schema(
    [
        pyarrow.field("picture", pyarrow.string(), nullable=False),
        ("task", pyarrow.string()),
        ("label", pyarrow.string()),
        ("confidence", pyarrow.float64()),
        ("task_probability", pyarrow.float64()),
        ("alternatives", _CHOICES),
        ("p_value", pyarrow.float64()),
        ("abstained", pyarrow.bool_()),
        ("prediction_set", _CHOICES),
        ("revision", pyarrow.int64()),
        ("module_sha256", pyarrow.string()),
        ("backbone_fingerprint", pyarrow.string()),
        ("fault", pyarrow.string()),  # why a picture has no answer
    ]
)


class Run(BaseModel):
    """Everything that decides the answers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: int = FORMAT
    store: str
    revision: int
    pictures_sha256: str
    num_pictures: int
    part_size: int
    selection: Selection
    task: str | None
    top_k: int
    coverage: float | None
    abstain_level: float


class AnswerFolder:
    """Where a run's parts go."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def previous(self) -> Run | None:
        """The run that was begun here, if any. Raises Conflict when what lies here cannot be read."""
        try:
            return Run.model_validate_json((self._folder / "run.json").read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            raise Conflict(f"{self._folder}/run.json is not a run of this version: {error}") from error

    def begin(self, run: Run) -> None:
        """Start a run, or go on with the one that was begun. Raises Conflict when that was another one."""
        previous = self.previous()
        if previous is not None and previous != run:
            changed = [name for name in Run.model_fields if getattr(previous, name) != getattr(run, name)]
            raise Conflict(
                f"{self._folder} holds a run with another {', '.join(changed)}: take another folder"
            )
        self._folder.mkdir(parents=True, exist_ok=True)
        _put(self._folder / "run.json", lambda path: path.write_text(run.model_dump_json(indent=2) + "\n"))

    def missing(self, parts: Sequence[Part]) -> list[Part]:
        return [one for one in parts if not self._path(one.number).exists()]

    def put(self, number: int, answers: pyarrow.Table) -> None:
        _put(self._path(number), lambda path: pyarrow.parquet.write_table(answers, path))

    def read(self) -> pyarrow.Table:
        """All answers, in the order of the pictures."""
        paths = sorted(self._folder.glob("part-*.parquet"))
        return pyarrow.concat_tables([pyarrow.parquet.read_table(one, schema=SCHEMA) for one in paths])

    def num_faults(self) -> int:
        """Pictures without an answer, of all parts that are there."""
        columns = (
            pyarrow.parquet.read_table(one, columns=["fault"]) for one in self._folder.glob("part-*.parquet")
        )
        return sum(len(one) - one.column("fault").null_count for one in columns)

    def _path(self, number: int) -> Path:
        return self._folder / f"part-{number:06d}.parquet"


def answer_part(predictor: OfflinePredictor, part: Part, run: Run) -> pyarrow.Table:
    """The answers for a part, or why there is none, a row a picture."""
    answers = predictor.answer_each(
        part.read(),
        selection=run.selection,
        task=run.task,
        top_k=run.top_k,
        coverage=run.coverage,
        abstain_level=run.abstain_level,
    )
    rows = [_row(name, one) for name, one in zip(part.names, answers, strict=True)]
    return pyarrow.Table.from_pylist(rows, schema=SCHEMA)


def _row(name: str, answer: Answer | InvalidImage) -> dict[str, Any]:
    if isinstance(answer, InvalidImage):
        return {"picture": name, "fault": str(answer)}
    return {
        "picture": name,
        "task": answer.task,
        "label": answer.label,
        "confidence": answer.confidence,
        "task_probability": answer.task_probability,
        "alternatives": _choices(answer.alternatives),
        "p_value": answer.p_value,
        "abstained": answer.abstained,
        "prediction_set": None if answer.prediction_set is None else _choices(answer.prediction_set),
        "revision": answer.receipt.revision,
        "module_sha256": answer.receipt.module_sha256,
        "backbone_fingerprint": answer.receipt.backbone_fingerprint,
    }


def _choices(choices: Sequence[Any]) -> list[dict[str, Any]]:
    return [{"task": one.task, "label": one.label, "probability": one.probability} for one in choices]


def _put(path: Path, write: Any) -> None:
    """Write a file under another name and move it: there whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.replace(path)
