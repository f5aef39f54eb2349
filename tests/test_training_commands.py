"""`tosca train` and `tosca publish` from pictures to a published task, for one task and for many."""

import io
import shutil
import tarfile
from pathlib import Path

import pytest
from pictures import encoded, noise, write_classes, write_splits
from tosca_command import TINY, Tosca, assert_fault, assert_usage

from model_store.module_file import read_module
from model_store.store import ModelStore

# -- training and publishing -------------------------------------------------------------------------


def test_training_publishes_a_task_with_a_report(trained: Tosca, tmp_path: Path) -> None:
    write_splits(tmp_path / "more", train=5, test=2)
    result = trained("train", "--task", "more", "--data", "more", "--report", "reports", "--force", "--json")
    assert result.code == 0
    summary = result.json
    assert (summary["task"], summary["revision"], summary["pictures"]) == ("more", 4, 21)
    assert summary["skipped"] == [] and 0.0 <= summary["metrics"]["accuracy"] <= 1.0
    assert (tmp_path / "reports/more.md").is_file() and (tmp_path / "reports/more-confusion.png").is_file()
    assert "more" in ModelStore(tmp_path / ".tosca/store").require_head().tasks


def test_training_again_computes_no_feature(trained: Tosca) -> None:
    result = trained("train", "--task", "colours", "--data", "colours", "--seed", 1, "--json")
    assert (result.code, result.json["features_computed"], result.json["pictures"]) == (0, 0, 27)


def test_training_speaks_to_people(trained: Tosca) -> None:
    result = trained("train", "--task", "colours", "--data", "colours", "--recipe", "reference")
    assert result.code == 0
    assert "colours: 3 classes, 27 pictures (0 new features)" in result.out
    assert "published as revision 4" in result.out
    same = trained("train", "--task", "colours", "--data", "colours", "--recipe", "reference")
    assert same.out.splitlines()[-1] == "nothing published; the store stays at revision 4"


def test_a_file_can_be_trained_first_and_published_later(trained: Tosca, tmp_path: Path) -> None:
    trained("tasks", "remove", "shades")
    result = trained(
        "train", "--task", "shades", "--data", "shades", "--output", "new/shades.safetensors", "--json"
    )
    assert (result.code, result.json["output"]) == (0, "new/shades.safetensors")
    assert (tmp_path / "new/shades.safetensors").stat().st_size == result.json["size_bytes"]
    assert ModelStore(tmp_path / ".tosca/store").head_number() == 4

    tried = trained("publish", "new/shades.safetensors", "--dry-run", "--json")
    assert (tried.json["published"], tried.json["revision"]) == (False, 4)
    assert {one["task"] for one in tried.json["impact"]} == {"colours", "shades"}
    done = trained("publish", "new/shades.safetensors", "--reason", "a reason", "--json")
    assert (done.json["published"], done.json["revision"], done.json["replaced"]) == (True, 5, None)
    again = trained("publish", "new/shades.safetensors")
    assert again.code == 0 and "the store stays at revision 5" in again.out
    assert ModelStore(tmp_path / ".tosca/store").require_head().reason == "a reason"


def test_corrupt_pictures_are_listed_and_skipped(trained: Tosca, tmp_path: Path) -> None:
    write_classes(tmp_path / "data", 10)
    (tmp_path / "data/red/003.png").write_bytes(b"no picture")
    result = trained("train", "--task", "t", "--data", "data", "--output", "t.safetensors", "--json")
    assert result.code == 0
    assert result.json["skipped"][0].startswith("data/red/003.png: not a picture")
    assert "skipped data/red/003.png" in " ".join(result.err.split())
    strict = trained("train", "--task", "t", "--data", "data", "--max-corrupt", 0.01)
    assert_fault(strict, "1 of 30 pictures cannot be read, more than the 1% allowed")


def test_repeats_are_told_in_one_line_and_in_the_report(trained: Tosca, tmp_path: Path) -> None:
    write_classes(tmp_path / "data", 5)
    for i in range(9):
        shutil.copy(tmp_path / "data/red/000.png", tmp_path / f"data/red/copy{i}.png")
    result = trained("train", "--task", "t", "--data", "data", "--output", "t.safetensors", "--json")
    line = "9 picture(s) repeated; first: data/red/copy0.png is data/red/000.png"
    assert (result.code, result.json["pictures"], result.json["skipped"]) == (0, 15, [line])
    assert result.err.splitlines() == [f"skipped {line}"]
    assert f"- {line}" in (tmp_path / ".tosca/reports/t.md").read_text(encoding="utf-8")
    shutil.copy(tmp_path / "data/red/000.png", tmp_path / "data/blue/x.png")
    assert_fault(trained("train", "--task", "t", "--data", "data"), "picture(s) have two labels")


def test_a_report_that_cannot_be_written_costs_no_module(trained: Tosca, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    warning = "warning: report file/t.md cannot be written: File exists"
    one = trained(
        "train", "--task", "t", "--data", "colours", "--report", "file", "--output", "t.safetensors"
    )
    assert (one.code, one.err.splitlines()) == (0, [warning])
    assert one.out.endswith("wrote t.safetensors\n") and "report" not in one.out
    read_module(Path("t.safetensors").read_bytes())
    (tmp_path / "many").mkdir()
    (tmp_path / "colours").rename(tmp_path / "many/t")
    many = trained(
        "train", "--many", "many", "--report", "file", "--output", "files", "--json", "--workers", 1
    )
    (outcome,) = many.json["tasks"]
    assert (many.code, outcome["status"], outcome["report"]) == (0, "trained", None)
    assert f"{tmp_path}/file/t.md cannot be written: " in many.err
    read_module(Path("files/t.safetensors").read_bytes())


def test_a_damaged_cache_is_named(trained: Tosca, tmp_path: Path) -> None:
    for file in (tmp_path / ".tosca/cache").glob("*"):
        file.write_bytes(b"no database" * 1000)
    fault = "file is not a database. It is only a cache: delete it"
    assert_fault(trained("train", "--task", "colours", "--data", "colours"), fault)
    assert_fault(trained("evaluate", "--data", "colours=colours"), fault)


def test_an_output_of_the_wrong_kind_is_refused_before_training(trained: Tosca, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    one = trained("train", "--task", "t", "--data", "colours", "--output", "colours")
    assert_usage(one, "colours is a folder, expected a file")
    assert_usage(trained("train", "--many", ".", "--output", "file"), "file is a file, expected a folder")


def test_a_harmful_task_is_published_only_by_force(trained: Tosca, tmp_path: Path) -> None:
    twin = ("train", "--task", "twin", "--data", "colours")
    assert_fault(trained(*twin), "registering 'twin' would lower the accuracy of task 'colours'")
    assert ModelStore(tmp_path / ".tosca/store").head_number() == 3
    assert trained(*twin, "--output", "twin.safetensors").code == 0
    assert_fault(trained("publish", "twin.safetensors"), "force it to go ahead")
    assert trained("publish", "twin.safetensors", "--dry-run", "--json").json["harmed"] == ["colours"]
    assert trained("publish", "twin.safetensors", "--force").code == 0


TRAIN_FAULTS: dict[str, tuple[tuple[object, ...], str]] = {
    "a source that is not there": (("--data", "nowhere"), "nowhere does not exist"),
    "a folder without pictures": (("--data", "empty"), "holds no pictures"),
    "a class with too few pictures": (("--data", "colours", "--min-images", 7), "at least 7 are needed"),
    "an unknown device": (("--data", "colours", "--device", "tpu9000"), "unknown device 'tpu9000'"),
    "an unknown runtime": (("--data", "colours", "--runtime", "int8"), "unknown runtime 'int8'"),
    "a store without backbone": (("--data", "colours", "--store", "fresh"), "run `tosca backbone add`"),
}


@pytest.mark.parametrize("name", TRAIN_FAULTS)
def test_training_names_what_is_wrong(name: str, trained: Tosca, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    arguments, fault = TRAIN_FAULTS[name]
    assert_fault(trained("train", "--task", "t", *arguments), fault)


@pytest.mark.parametrize("task", ["../up", "a b", ""])
def test_training_under_a_hostile_name_is_refused(task: str, trained: Tosca, tmp_path: Path) -> None:
    result = trained("train", "--task", task, "--data", "colours", "--output", "t.safetensors")
    assert result.code in (1, 2) and "Traceback" not in result.err
    assert not (tmp_path / "t.safetensors").exists()


PUBLISH_FAULTS = {
    "empty": (b"", "0 bytes are fewer than its length field"),
    "a picture": (encoded(noise()), "not a whole safetensors file"),
}


@pytest.mark.parametrize("name", PUBLISH_FAULTS)
def test_publishing_a_bad_file_names_the_fault(name: str, trained: Tosca, tmp_path: Path) -> None:
    content, fault = PUBLISH_FAULTS[name]
    (tmp_path / "bad.safetensors").write_bytes(content)
    assert_fault(trained("publish", "bad.safetensors"), fault)
    assert ModelStore(tmp_path / ".tosca/store").head_number() == 3


def test_publishing_for_another_backbone_is_refused(trained: Tosca) -> None:
    assert trained("train", "--task", "t", "--data", "colours", "--output", "t.safetensors").code == 0
    trained("backbone", "add", TINY, "--random-weights", "--image-size", 48, "--store", "other")
    assert_fault(trained("publish", "t.safetensors", "--store", "other"), "module was trained on backbone")


def test_pictures_inside_one_file_are_trained_and_evaluated_on(trained: Tosca, tmp_path: Path) -> None:
    for split, num, seed in (("train", 6, 0), ("test", 3, 500)):
        with tarfile.open(tmp_path / f"{split}.tar", "w") as archive:
            for colour, label in enumerate(("blue", "green", "red")):
                for i in range(num):
                    for suffix, data in (("png", encoded(noise(colour, seed + i))), ("cls", label.encode())):
                        info = tarfile.TarInfo(f"{label}{i}.{suffix}")
                        info.size = len(data)
                        archive.addfile(info, io.BytesIO(data))
    result = trained("train", "--task", "packed", "--data", "train.tar", "--force", "--json")
    assert (result.code, result.json["pictures"]) == (0, 18)
    evaluated = trained("evaluate", "--data", "packed=test.tar", "--json")
    assert evaluated.code == 0 and evaluated.json["tasks"]["packed"]["num_pictures"] == 9
    assert_fault(trained("train", "--task", "t", "--data", "hf:"), "expected hf:NAME")


# -- many tasks --------------------------------------------------------------------------------------


def test_many_tasks_are_trained_in_one_run_and_the_next_finds_them_done(
    trained: Tosca, tmp_path: Path
) -> None:
    for i, task in enumerate(("one", "two")):
        write_classes(tmp_path / "many" / task, 5, labels=(f"{task}-a", f"{task}-b"), seed=100 * i)
    (tmp_path / "many" / "empty").mkdir()
    first = trained("train", "--many", "many", "--force", "--json", "--workers", 1)
    assert first.code == 1 and "empty: many/empty holds no pictures" in first.err
    empty, one, two = first.json["tasks"]
    assert (empty["status"], empty["fault"][:10]) == ("failed", "many/empty")
    assert (one["task"], one["status"], one["revision"], one["pictures"]) == ("one", "trained", 4, 10)
    assert (two["task"], two["revision"], set(two["metrics"])) == (
        "two",
        5,
        {"accuracy", "ece", "num_held_out"},
    )
    (tmp_path / "many" / "empty").rmdir()
    again = trained("train", "--many", "many", "--force")
    assert again.code == 0 and "2 tasks in" in again.out and again.out.count("unchanged") == 2
    assert ModelStore(".tosca/store").head_number() == 5


def test_many_tasks_can_be_written_to_a_folder_as_a_list_says(trained: Tosca, tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(
        '[tasks.colours]\ndata = "colours"\nlabel_space = "x"\n[tasks.grey]\ndata = "shades"\n'
    )
    result = trained("train", "--many", "tasks.toml", "--output", "files", "--seed", 3)
    assert result.code == 0
    header, colours, grey = (line.split("\t") for line in result.out.splitlines()[:3])
    assert len(header) == len(colours) == len(grey) == 9
    row = dict(zip(header, grey, strict=True))
    assert (row["pictures"], row["new features"], row["where"]) == ("18", "0", "files/grey.safetensors")
    assert row["accuracy"] == "1.0000" and row["trained in"].endswith(" s")
    files = {one.stem: read_module(one.read_bytes()).manifest for one in Path("files").iterdir()}
    assert {task: one.label_space for task, one in files.items()} == {"colours": "x", "grey": None}
    assert {one.training["seed"] for one in files.values()} == {3}
    assert ModelStore(".tosca/store").head_number() == 3, "nothing is published"


def test_a_task_or_many_must_be_named_but_not_both(trained: Tosca) -> None:
    assert_usage(trained("train"), "expected --task with --data, or --many")
    assert_usage(trained("train", "--data", "colours"), "expected --task with --data, or --many")
    assert_usage(trained("train", "--many", ".", "--task", "x"), "takes the place of --task and --data")
    assert_fault(trained("train", "--many", "nowhere"), "expected a folder of tasks or a .toml file")
