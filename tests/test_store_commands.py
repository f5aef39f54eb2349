"""`tosca` on a store with trained tasks: they are listed, removed and brought back, and they answer."""

from pathlib import Path

import pytest
from PIL import Image
from tosca_command import Tosca, assert_fault

from model_store.store import ModelStore

# -- tasks and revisions -----------------------------------------------------------------------------


def test_tasks_are_listed_and_shown(trained: Tosca) -> None:
    listed = trained("tasks", "list", "--json").json
    assert listed["revision"] == 3
    assert [one["task"] for one in listed["tasks"]] == ["colours", "shades"]
    shown = trained("tasks", "show", "colours").json
    assert shown == listed["tasks"][0]
    assert shown["labels"] == ["blue", "green", "red"]
    table = trained("tasks", "list").out
    assert "colours" in table and "shades" in table and shown["sha256"][:12] in table


def test_a_task_is_removed_and_brought_back(trained: Tosca) -> None:
    removed = trained("tasks", "remove", "colours", "--reason", "enough")
    assert removed.code == 0 and "revision 4" in removed.out
    assert [one["task"] for one in trained("tasks", "list", "--json").json["tasks"]] == ["shades"]
    back = trained("revisions", "rollback", 3)
    assert back.code == 0 and "revision 5 has the 2 task(s) of revision 3" in back.out
    revisions = trained("revisions", "list", "--json").json
    assert [one["number"] for one in revisions] == [5, 4, 3, 2, 1]
    assert revisions[1]["reason"] == "enough"
    assert revisions[0]["tasks"] == revisions[2]["tasks"]
    assert [one["number"] for one in trained("revisions", "list", "--limit", 2, "--json").json] == [5, 4]
    assert "enough" in trained("revisions", "list").out


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("tasks", "show", "zebras"), "task 'zebras' is not active in revision 3"),
        (("tasks", "remove", "zebras"), "task 'zebras' is not active in revision 3"),
        (("revisions", "rollback", "99"), "has no revision 99"),
        (("tasks", "list", "--store", "fresh"), "has no backbone yet"),
        (("tasks", "list", "--store", "nonsense://x"), "store nonsense://x cannot be opened"),
        (("tasks", "list", "--store", "az://x"), "store az://x cannot be opened"),
        (("serve", "--device", "gpu7"), "unknown device 'gpu7'"),
    ],
)
def test_unknown_things_are_named(arguments: tuple[str, ...], fault: str, trained: Tosca) -> None:
    assert_fault(trained(*arguments), fault)


@pytest.mark.parametrize(
    "arguments",
    [
        ("backbone", "list"),
        ("tasks", "list"),
        ("revisions", "list"),
        ("train", "--task", "t", "--data", "colours"),
        ("evaluate", "--data", "t=colours"),
    ],
)
def test_a_mistyped_store_is_not_created(arguments: tuple[str, ...], trained: Tosca) -> None:
    trained(*arguments, "--store", "mistyped")
    assert not Path("mistyped").exists()


def test_a_damaged_store_is_named(trained: Tosca, tmp_path: Path) -> None:
    (tmp_path / ".tosca/store/revisions/000000000003.json").write_text("{")
    assert_fault(trained("tasks", "list"), "revision 3 cannot be read")


# -- answering ---------------------------------------------------------------------------------------


def test_evaluating_reports_the_decomposition(trained: Tosca) -> None:
    data = ("--data", "colours=colours", "--data", "shades=shades")
    result = trained("evaluate", *data, "--json")
    assert result.code == 0
    report = result.json
    assert (report["revision"], report["selection"]) == (3, "lda")
    assert {task: one["num_pictures"] for task, one in report["tasks"].items()} == {"colours": 9, "shades": 6}
    assert report["overall"]["num_pictures"] == 15
    assert report["overall"]["accuracy"] > 0.8, "coloured noise is easy even for an untrained backbone"
    table = trained("evaluate", *data).out
    assert "colours" in table and "all" in table
    published = trained("evaluate", *data, "--selection", "entropy", "--json").json
    assert published["selection"] == "entropy"
    old = trained("evaluate", "--data", "colours=colours", "--revision", 2, "--json").json
    assert old["revision"] == 2 and old["overall"]["selection_accuracy"] == 1.0


def test_predicting_offline_answers_every_picture(trained: Tosca, tmp_path: Path) -> None:
    pictures = [f"colours/test/{label}/000.png" for label in ("blue", "green", "red")]
    result = trained("predict", *pictures, "--json")
    assert result.code == 0
    assert [one["picture"] for one in result.json] == pictures
    assert [one["task"] for one in result.json] == ["colours"] * 3
    assert [one["label"] for one in result.json] == ["blue", "green", "red"]
    tasks = ModelStore(tmp_path / ".tosca/store").require_head().tasks
    for one in result.json:
        assert 0.0 <= one["confidence"] <= 1.0
        assert one["receipt"]["revision"] == 3
        assert one["receipt"]["module_sha256"] == tasks["colours"]
    named = trained("predict", pictures[0], "--task", "shades", "--top-k", 1, "--json").json
    assert named[0]["task"] == "shades" and named[0]["alternatives"] == []
    table = trained("predict", *pictures).out
    assert "colours" in table and "green" in table


PREDICT_FAULTS = {
    "not a picture": (("notes.txt",), "not a picture in one of the formats"),
    "one that is no picture": (("colours/test/red/000.png", "notes.txt"), "notes.txt: not a picture"),
    "an unknown task": (("colours/test/red/000.png", "--task", "zebras"), "task 'zebras' is not active"),
    "a server that is not there": (
        ("colours/test/red/000.png", "--server", "http://127.0.0.1:9"),
        "server http://127.0.0.1:9 does not answer",
    ),
    "an empty store": (("colours/test/red/000.png", "--store", "fresh"), "has no backbone yet"),
}


@pytest.mark.parametrize("name", PREDICT_FAULTS)
def test_predicting_names_what_is_wrong(name: str, trained: Tosca, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    arguments, fault = PREDICT_FAULTS[name]
    assert_fault(trained("predict", *arguments), fault)


def test_predicting_without_tasks_says_so(trained: Tosca) -> None:
    for task in ("colours", "shades"):
        trained("tasks", "remove", task)
    assert_fault(trained("predict", "colours/test/red/000.png"), "no task is registered yet")


def test_evaluating_names_what_is_wrong(trained: Tosca) -> None:
    assert_fault(trained("evaluate", "--data", "zebras=colours"), "task 'zebras' is not active")
    assert_fault(trained("evaluate", "--data", "shades=colours"), "task 'shades' has no class 'blue'")
    assert_fault(trained("evaluate", "--data", "colours=nowhere"), "nowhere does not exist")


def test_one_picture_in_many_formats_gives_one_answer(trained: Tosca, tmp_path: Path) -> None:
    image = Image.open(tmp_path / "colours/test/green/001.png")
    for suffix, options in (("png", {}), ("bmp", {}), ("webp", {"lossless": True})):
        image.save(tmp_path / f"one.{suffix}", **options)
    answers = trained("predict", "one.png", "one.bmp", "one.webp", "--json").json
    assert {one["label"] for one in answers} == {"green"}
    assert len({round(one["confidence"], 4) for one in answers}) == 1
