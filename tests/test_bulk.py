"""Bulk answers: pictures found and cut into parts, parts kept whole, runs resumed; and the same answers on Ray."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import typer
from pictures import encoded, noise, write_classes
from ray_cluster import ray_environment
from synthetic import DEMO_PICTURES, DEMO_STORE
from typer.testing import CliRunner

from model_store.bulk_answers import SCHEMA, AnswerFolder, Run, answer_part
from model_store.errors import Conflict, InvalidDataset, InvalidImage
from model_store.offline import OfflinePredictor
from model_store.picture_parts import Part, cut, digest
from model_store.store import ModelStore, with_task
from service.commands import predict

MakeModule = Callable[..., bytes]


def write_table(path: Path, pictures: list[Any], row_group_size: int) -> Path:
    table = pyarrow.table({"image": pictures, "other": list(range(len(pictures)))})
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)
    return path


# -- parts -------------------------------------------------------------------------------------------


def test_every_picture_below_a_folder_is_found_once_in_order(tmp_path: Path) -> None:
    write_classes(tmp_path / "a", 3)
    (tmp_path / "notes.txt").write_text("no picture")
    parts = cut([tmp_path], size=4)
    assert [len(one.pictures) for one in parts] == [4, 4, 1]
    names = [name for one in parts for name in one.names]
    assert names == sorted(str(path) for path in tmp_path.rglob("*.png"))
    assert parts[0].read() == [Path(name).read_bytes() for name in parts[0].names]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_a_manifest_names_pictures_from_its_own_folder(tmp_path: Path, kind: str) -> None:
    write_classes(tmp_path / "a", 1)
    paths = ["a/red/000.png", "a/blue/000.png"]
    manifest = tmp_path / f"list.{kind}"
    if kind == "csv":
        manifest.write_text("path,label\n" + "".join(f"{one},x\n" for one in paths))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"path": paths}), manifest)
    (part,) = cut([manifest], size=10)
    assert part.names == tuple(str(tmp_path / one) for one in paths)


@pytest.mark.parametrize("row_group_size", [2, 3, 100])
def test_rows_of_a_table_are_read_whatever_its_row_groups_are(tmp_path: Path, row_group_size: int) -> None:
    pictures = [encoded(noise(seed=i)) for i in range(7)]
    cells: list[Any] = [{"bytes": one, "path": None} for one in pictures]
    table = write_table(tmp_path / "t.parquet", cells, row_group_size)
    parts = cut([table], size=3)
    assert [data for one in parts for data in one.read()] == pictures
    assert parts[1].names == tuple(f"{table}#{i}" for i in (3, 4, 5))


def test_what_cannot_be_opened_takes_no_other_picture_with_it(tmp_path: Path) -> None:
    good = tmp_path / "good.png"
    good.write_bytes(encoded(noise()))
    gone, read = Part(0, (str(tmp_path / "gone.png"), str(good))).read()
    assert isinstance(gone, InvalidImage) and read == good.read_bytes()
    (part,) = cut([write_table(tmp_path / "t.parquet", [b"x", None], 10)], size=5)
    present, empty = part.read()
    assert present == b"x" and isinstance(empty, InvalidImage)


@pytest.mark.parametrize("fault", ["missing", "empty", "no column"])
def test_sources_without_pictures_are_refused(tmp_path: Path, fault: str) -> None:
    source = tmp_path / "source"
    if fault == "empty":
        source.mkdir()
    if fault == "no column":
        source = source.with_suffix(".csv")
        source.write_text("file\na.png\n")
    with pytest.raises(InvalidDataset, match="source"):
        cut([source], size=5)


# -- a folder of answers -----------------------------------------------------------------------------


def make_run(**changes: Any) -> Run:
    given: dict[str, Any] = {
        "store": "/s",
        "revision": 3,
        "pictures_sha256": "0" * 64,
        "num_pictures": 4,
        "part_size": 2,
        "selection": "lda",
        "task": None,
        "top_k": 5,
        "coverage": None,
        "abstain_level": 0.02,
    }
    return Run(**given | changes)


def test_a_run_goes_on_where_it_ended(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path / "answers")
    parts = [Part(0, ("a", "b")), Part(1, ("c", "d"))]
    folder.begin(make_run())
    assert folder.missing(parts) == parts
    rows = [{"picture": "c"}, {"picture": "d", "fault": "not a picture"}]
    folder.put(1, pyarrow.Table.from_pylist(rows, schema=SCHEMA))
    again = AnswerFolder(tmp_path / "answers")
    again.begin(make_run())
    assert again.missing(parts) == parts[:1]
    assert again.num_faults() == 1


@pytest.mark.parametrize("change", [{"revision": 4}, {"task": "birds"}, {"pictures_sha256": "1" * 64}])
def test_another_run_is_not_mixed_into_a_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = AnswerFolder(tmp_path)
    folder.begin(make_run())
    with pytest.raises(Conflict, match=next(iter(change))):
        folder.begin(make_run(**change))


def test_a_part_that_was_cut_short_is_missing(tmp_path: Path) -> None:
    folder = AnswerFolder(tmp_path)
    folder.begin(make_run())
    (tmp_path / ".part-000000.parquet.partial").write_bytes(b"half")
    assert folder.missing([Part(0, ("a",))])


def test_other_pictures_are_another_digest(tmp_path: Path) -> None:
    write_classes(tmp_path, 2)
    before = digest(cut([tmp_path], 4))
    (tmp_path / "red" / "000.png").rename(tmp_path / "red" / "999.png")
    assert digest(cut([tmp_path], 4)) != before


def test_answers_beside_unreadable_pictures_are_those_without_them(
    tiny_store: ModelStore, make_module: MakeModule, tmp_path: Path
) -> None:
    tiny_store.publish(with_task("birds", tiny_store.put_module(make_module("birds"))), "add birds")
    predictor = OfflinePredictor(tiny_store, device="cpu")
    good = [encoded(noise(seed=i)) for i in range(3)]
    damaged = [good[0], b"no picture", InvalidImage("gone"), *good[1:]]
    first, bad, gone, *rest = predictor.answer_each(damaged)
    assert [first, *rest] == predictor.answer(good)
    assert isinstance(bad, InvalidImage) and str(gone) == "gone"
    with pytest.raises(InvalidImage):
        predictor.answer([good[0], b"no picture"])


def test_a_bulk_run_needs_ray_and_a_folder_to_write_to(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(predict)
    for given in (["--ray"], ["--output", str(tmp_path)]):
        refused = CliRunner().invoke(app, [str(tmp_path), *given])
        assert refused.exit_code == 2 and "--ray and --output go together" in refused.output


# -- on Ray ------------------------------------------------------------------------------------------


def tosca_on_ray(*arguments: object) -> Any:
    pytest.importorskip("ray", reason="the extra `ray` is not installed")
    command = [str(Path(sys.executable).with_name("tosca")), *map(str, arguments), "--json"]
    with ray_environment() as environment:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300.0)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_answers_on_ray_are_bit_for_bit_the_offline_ones_and_a_run_is_resumed(
    demo_store: ModelStore, tmp_path: Path
) -> None:
    """Real pictures, two workers, with a damaged file among them; then a part is lost."""
    pictures = tmp_path / "pictures"
    for task in ("digits", "textiles"):
        for path in sorted((DEMO_PICTURES / task / "test").glob("*/*"))[::9]:
            target = pictures / task / path.parent.name / path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, target)
    (pictures / "damaged.jpg").write_bytes(b"no picture")
    output = tmp_path / "answers"
    command = ["predict", pictures, "--ray", "--output", output, "--store", DEMO_STORE]
    command += ["--part-size", "8", "--workers", "2", "--coverage", "0.9"]
    first = tosca_on_ray(*command)
    answers = AnswerFolder(output).read()
    assert first["pictures"] == len(answers) > 16 and first["unreadable"] == 1
    predictor = OfflinePredictor(ModelStore(DEMO_STORE), num_threads=1)
    run = AnswerFolder(output).previous()
    assert run is not None
    expected = [answer_part(predictor, one, run) for one in cut([pictures], 8)]
    assert answers == pyarrow.concat_tables(expected)
    lost = output / "part-000001.parquet"
    size = len(pyarrow.parquet.read_table(lost))
    lost.unlink()
    again = tosca_on_ray(*command)
    assert again["answered_before"] == first["pictures"] - size
    assert AnswerFolder(output).read() == answers
