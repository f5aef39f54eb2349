"""The `tosca` command from end to end, on generated pictures and a tiny untrained backbone."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pictures import encoded, noise, write_classes, write_splits
from PIL import Image

from model_store import commands
from model_store.module_file import read_module
from model_store.store import ModelStore

TINY = "vit_tiny_patch16_224"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Tosca = Callable[..., Result]


@pytest.fixture
def tosca(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Tosca]:
    """Run `tosca ARGS` in this process, in an empty folder; faults other than its own come through."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TOSCA_DEVICE", "cpu")
    for name in ("TOSCA_STORE", "TOSCA_SERVER", "TOSCA_CACHE", "TOSCA_RUNTIME"):
        monkeypatch.delenv(name, raising=False)
    registered = list(commands.app.registered_commands)
    groups = list(commands.app.registered_groups)

    def run(*arguments: object) -> Result:
        monkeypatch.setattr("sys.argv", ["tosca", *(str(one) for one in arguments)])
        capsys.readouterr()
        code: object = 0
        try:
            commands.main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            commands.app.registered_commands[:] = registered
            commands.app.registered_groups[:] = groups
        captured = capsys.readouterr()
        assert isinstance(code, int)
        return Result(code, captured.out, captured.err)

    yield run
    commands.app.registered_commands[:] = registered


@pytest.fixture(scope="session")
def trained_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `tosca` has put a backbone, trained `colours` and `shades`; copied for every test."""
    root = tmp_path_factory.mktemp("trained")
    write_splits(root / "colours", train=6, test=3)
    for i, label in enumerate(("dark", "light")):
        for split, seeds in (("train", range(6)), ("test", range(6, 9))):
            (root / "shades" / split / label).mkdir(parents=True)
            for j in seeds:
                grey = noise(0, 50 * i + j).convert("L").point(lambda v, i=i: v // 4 + 190 * i).convert("RGB")
                (root / "shades" / split / label / f"{j}.png").write_bytes(encoded(grey))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("TOSCA_DEVICE", "cpu")
        for arguments in (
            ["backbone", "add", TINY, "--random-weights", "--image-size", "32"],
            ["train", "--task", "colours", "--data", "colours"],
            ["train", "--task", "shades", "--data", "shades"],
        ):
            registered = list(commands.app.registered_commands)
            patch.setattr("sys.argv", ["tosca", *arguments])
            try:
                commands.main()
            except SystemExit as stop:
                assert not stop.code, arguments
            finally:
                commands.app.registered_commands[:] = registered
    return root


@pytest.fixture
def trained(tosca: Tosca, trained_store: Path, tmp_path: Path) -> Tosca:
    """`tosca` in a folder of its own with a trained store: revision 3, tasks colours and shades."""
    shutil.copytree(trained_store, tmp_path, dirs_exist_ok=True)
    return tosca


def assert_fault(result: Result, fault: str) -> None:
    """One line that names the fault, status 1, no stack trace."""
    assert result.code == 1
    assert "error: " in result.err and fault in " ".join(result.err.split())
    assert "Traceback" not in result.err and result.out == ""


def assert_usage(result: Result, fault: str) -> None:
    """Wrong options: status 2 and what was expected."""
    assert result.code == 2
    assert fault in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err


# -- backbones ---------------------------------------------------------------------------------------


def test_a_backbone_is_added_and_listed(tosca: Tosca) -> None:
    added = tosca("backbone", "add", TINY, "--random-weights", "--image-size", 32, "--json")
    assert added.code == 0
    assert (added.json["architecture"], added.json["feature_dim"], added.json["revision"]) == (TINY, 192, 1)
    again = tosca("backbone", "add", TINY, "--random-weights", "--image-size", 32)
    assert again.code == 0 and added.json["fingerprint"] in again.out
    listed = tosca("backbone", "list", "--json")
    assert [one["fingerprint"] for one in listed.json] == [added.json["fingerprint"]]
    assert listed.json[0]["active"] is True
    table = tosca("backbone", "list").out
    assert TINY in table and "32x32" in table and "*" in table


def test_an_empty_store_lists_nothing(tosca: Tosca) -> None:
    assert tosca("backbone", "list", "--json").json == []


def test_a_checkpoint_becomes_a_backbone(tosca: Tosca, tmp_path: Path, tiny_artefact: Any) -> None:
    (tmp_path / "weights.safetensors").write_bytes(tiny_artefact.weights)
    added = tosca(
        "backbone", "add", TINY, "--checkpoint", "weights.safetensors", "--image-size", 32, "--json"
    )
    assert added.json["fingerprint"] == tiny_artefact.manifest.fingerprint


def test_a_second_backbone_waits_until_no_task_is_active(trained: Tosca) -> None:
    other = ("backbone", "add", TINY, "--random-weights", "--image-size", 48)
    assert_fault(trained(*other), "the 2 active tasks of .tosca/store belong to backbone")
    for task in ("colours", "shades"):
        assert trained("tasks", "remove", task).code == 0
    assert trained(*other).code == 0
    assert [one["active"] for one in trained("backbone", "list", "--json").json].count(True) == 1


BACKBONE_FAULTS = {
    "no CLS token": (("resnet18", "--random-weights"), "'resnet18' has no CLS token"),
    "unknown name": (("vit_nonsense", "--random-weights"), "timm knows no model named 'vit_nonsense'"),
    "missing checkpoint": ((TINY, "--checkpoint", "nowhere.pth"), "nowhere.pth is not a file"),
    "options without a name": (("--random-weights",), "name the timm architecture"),
    "pictures smaller than a patch": (
        (TINY, "--random-weights", "--image-size", 8),
        "'vit_tiny_patch16_224' cannot embed pictures of 8×8 pixels",
    ),
}


@pytest.mark.parametrize("name", BACKBONE_FAULTS)
def test_a_backbone_that_cannot_serve_is_refused(name: str, tosca: Tosca) -> None:
    arguments, fault = BACKBONE_FAULTS[name]
    assert_fault(tosca("backbone", "add", *arguments), fault)
    assert tosca("backbone", "list", "--json").json == []


TUNE = ("backbone", "tune", "--data", "colours", "--rounds", 1, "--batch", 2, "--pictures", 6)


def test_a_backbone_is_tuned_on_real_pictures(trained: Tosca) -> None:
    tuned = trained(*TUNE, "--runtime", "torch-bfloat16", "--runtime", "torch-float32", "--json")
    assert tuned.code == 0, tuned.err
    assert tuned.json["chosen"] in ("torch-bfloat16", "torch-float32")
    assert {one["runtime"] for one in tuned.json["table"]} == {"torch-bfloat16", "torch-float32"}
    assert all(one["parity"]["num_pictures"] == 6 for one in tuned.json["table"])
    only = trained(*TUNE, "--runtime", "torch-bfloat16")
    assert "torch-bfloat16 is now the runtime of this backbone" in " ".join(only.out.split())
    again = trained("train", "--task", "colours", "--data", "colours", "--seed", 2, "--force", "--json")
    assert again.json["features_computed"] == 27, "features of another runtime are not mixed in"


def test_tuning_on_one_class_is_refused_and_on_few_pictures_told_of(trained: Tosca, tmp_path: Path) -> None:
    write_classes(tmp_path / "red", 30, labels=("red",))
    tune = ("backbone", "tune", "--rounds", 1, "--batch", 1, "--runtime", "torch-float32", "--data")
    assert_fault(trained(*tune, "red"), "red: all pictures are of class 'red', parity needs two classes")
    assert not list(tmp_path.glob(".tosca/store/backbones/*/tunings/*"))
    few = trained(*tune, "colours", "--pictures", 6)
    assert few.code == 0
    assert "warning: 6 pictures say little about parity, expected 24 or more" in few.err.splitlines()
    assert "warning" not in trained(*tune, "colours").err
    assert_usage(trained(*tune, "x=colours", "--data", "x=red"), "colours and red are both 'x'")


def test_a_runtime_asked_for_and_refused_changes_nothing(
    trained: Tosca, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("model_store.runtimes.runtime.find_spec", lambda name: name == "torch" or None)
    asked = trained(*TUNE, "--runtime", "torch-float32", "--runtime", "onnxruntime-float32")
    assert_fault(asked, "runtime onnxruntime-float32 is refused: the package onnxruntime is not installed")
    assert not list(tmp_path.glob(".tosca/store/backbones/*/tunings/*"))


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("--data", "nowhere"), "nowhere is no folder"),
        (("--data", "colours", "--rounds", "0"), "'--rounds'"),
        ((), "Missing option '--data'"),
    ],
)
def test_tuning_says_what_was_expected(arguments: tuple[str, ...], fault: str, trained: Tosca) -> None:
    assert_usage(trained("backbone", "tune", *arguments), fault)


def test_an_unknown_runtime_cannot_be_tuned(trained: Tosca) -> None:
    assert_fault(trained(*TUNE, "--runtime", "abacus"), "unknown runtime 'abacus'")


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


# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("fly",), "No such command 'fly'"),
        (("train", "--data", "x"), "expected --task with --data, or --many"),
        (("train", "--task", "t", "--data", "x", "--recipe", "magic"), "expected one of default, reference"),
        (
            ("train", "--task", "t", "--data", "x", "--flow", "magic"),
            "expected one of tosca, tosca_r, adapter",
        ),
        (("train", "--task", "t", "--data", "x", "--max-corrupt", "2"), "Invalid value for '--max-corrupt'"),
        (("train", "--task", "t", "--data", "x", "--seed", "-1"), "Invalid value for '--seed'"),
        (("train", "--task", "t", "--data", "x", "--seed", "9" * 20), "Invalid value for '--seed'"),
        (("evaluate", "--data", "colours"), "expected TASK=SOURCE"),
        (("evaluate", "--data", "=x"), "expected TASK=SOURCE"),
        (("evaluate", "--data", "t=x", "--data", "t=y"), "task 't' is named twice"),
        (("evaluate", "--data", "t=x", "--selection", "luck"), "expected one of lda, entropy"),
        (("predict", "x.png", "--selection", "luck"), "expected one of lda, entropy"),
        (("predict", "nowhere.png"), "nowhere.png: No such file"),
        (("predict",), "Missing argument"),
        (("predict", "x.png", "--top-k", "0"), "Invalid value for '--top-k'"),
        (("publish", "nowhere.safetensors"), "nowhere.safetensors: No such file"),
        (("revisions", "rollback", "two"), "Invalid value for 'number'"),
        (("revisions", "list", "--limit", "0"), "Invalid value for '--limit'"),
        (("tasks", "remove", "colours", "--reason", "x" * 1001), "at most 1000 characters"),
        (("revisions", "rollback", "2", "--reason", "x" * 1001), "at most 1000 characters"),
        (("revisions", "begin-epoch", "--reason", "x" * 1001), "at most 1000 characters"),
        (("publish", "x.safetensors", "--reason", "x" * 1001), "at most 1000 characters"),
        (("publish", "x.safetensors", "--margin", "nan"), "Invalid value for '--margin'"),
        (("backbone", "add", "--wheel", "nowhere.whl"), "Invalid value for '--wheel'"),
        (("backbone", "add", "--wheel", "."), "Invalid value for '--wheel'"),
        (
            ("backbone", "add", TINY, "--random-weights", "--image-size", "0"),
            "Invalid value for '--image-size'",
        ),
        (
            ("backbone", "add", TINY, "--random-weights", "--image-size", "5000"),
            "Invalid value for '--image-size'",
        ),
        (("serve", "--port", "999999"), "port [TOSCA_PORT]: Input should be less than or equal to 65535"),
        (("serve", "--runtime", "magic"), "'magic': expected one of auto, torch-float32"),
    ],
)
def test_wrong_options_say_what_was_expected(arguments: tuple[str, ...], fault: str, trained: Tosca) -> None:
    assert_usage(trained(*arguments), fault)


def test_a_variable_that_cannot_be_read_is_named(trained: Tosca, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOSCA_PORT", "abc")
    assert_usage(trained("serve"), "port [TOSCA_PORT]: Input should be a valid integer")


def test_help_names_every_command(tosca: Tosca) -> None:
    shown = tosca("--help").out
    for name in ("backbone", "train", "publish", "evaluate", "tasks", "revisions", "predict", "serve"):
        assert name in shown


# -- printing what strangers wrote -------------------------------------------------------------------


def test_a_fault_with_brackets_is_printed_as_it_is(tosca: Tosca) -> None:
    tosca("backbone", "add", TINY, "--random-weights", "--image-size", 32)
    assert_fault(tosca("train", "--task", "t", "--data", "data [/old]"), "data [/old] does not exist")


def test_a_reason_with_brackets_is_printed_as_it_is(trained: Tosca) -> None:
    trained("tasks", "remove", "colours", "--reason", "[new] cleaning up")
    assert "[new] cleaning up" in trained("revisions", "list").out


def test_a_reason_cannot_break_the_list_of_revisions(trained: Tosca) -> None:
    trained("tasks", "remove", "colours", "--reason", "done [/b]")
    assert trained("revisions", "list").code == 0


def test_one_picture_in_many_formats_gives_one_answer(trained: Tosca, tmp_path: Path) -> None:
    image = Image.open(tmp_path / "colours/test/green/001.png")
    for suffix, options in (("png", {}), ("bmp", {}), ("webp", {"lossless": True})):
        image.save(tmp_path / f"one.{suffix}", **options)
    answers = trained("predict", "one.png", "one.bmp", "one.webp", "--json").json
    assert {one["label"] for one in answers} == {"green"}
    assert len({round(one["confidence"], 4) for one in answers}) == 1
