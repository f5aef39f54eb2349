"""Many tasks in one run give what each alone gives, whatever happens to the others."""

import dataclasses
import shutil
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path

import killed_training
import pytest
import torch
from pictures import encoded, noise, write_classes, write_splits

from model_store.backbone import Backbone
from model_store.errors import InvalidDataset, ToscaError
from model_store.module_file import read_module
from model_store.store import ModelStore
from training.destinations import Destination, FolderDestination, StoreDestination
from training.feature_cache import FeatureCache
from training.features import HashedSource, LabelledFeatures, extract_each, extract_features, hash_source
from training.many import TaskOutcome, train_many
from training.plans import MAX_SEED, TaskPlan, read_plans
from training.sources import open_source
from training.trainer import train_task
from training.workers import Workers

LIKE = TaskPlan("", "")


def cache_of(folder: Path, backbone: Backbone) -> FeatureCache:
    return FeatureCache(folder, backbone.fingerprint, backbone.variant, backbone.feature_dim)


def write_tasks(folder: Path, *tasks: str) -> Path:
    """FOLDER/TASK/{train,test}/CLASS: different pictures, and different numbers of them, for every task."""
    for i, task in enumerate(tasks):
        for split, num, seed in (("train", 7 + i, 1000 * i), ("test", 3, 1000 * i + 500)):
            write_classes(folder / task / split, num, seed=seed)
    return folder


def train_folder(
    folder: Path, backbone: Backbone, destination: Destination, cache: Path, workers: Workers | None = None
) -> dict[str, TaskOutcome]:
    with workers or Workers(2) as pool:
        outcomes = train_many(
            read_plans(folder, LIKE),
            backbone.manifest,
            destination,
            hash_source=hash_source,
            extract_each=partial(
                extract_each, backbone=backbone, cache=cache_of(cache, backbone), show_progress=False
            ),
            report_folder=cache / "reports",
            workers=pool,
        )
        return {one.task: one for one in outcomes}


def train_alone(task: str, data: Path, backbone: Backbone, cache: Path) -> bytes:
    features = extract_features(open_source(data), backbone, cache_of(cache, backbone), show_progress=False)
    return train_task(task, features, backbone.manifest).data


def statuses(outcomes: dict[str, TaskOutcome]) -> dict[str, str]:
    return {task: one.status for task, one in outcomes.items()}


# -- one pass of the backbone ------------------------------------------------------------------------


class RecordingBackbone:
    """The tiny backbone, which remembers its batches."""

    def __init__(self, backbone: Backbone) -> None:
        self._backbone = backbone
        self.batch_sizes: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self._backbone, name)

    def embed(self, pixels_BCHW: torch.Tensor) -> torch.Tensor:
        self.batch_sizes.append(len(pixels_BCHW))
        return self._backbone.embed(pixels_BCHW)


def extract_folder(folder: Path, backbone: Backbone, cache: Path) -> list[LabelledFeatures | InvalidDataset]:
    sources = [open_source(one, min_images_per_class=1) for one in sorted(folder.iterdir())]
    opened = cache_of(cache, backbone)
    return list(extract_each(map(hash_source, sources), backbone, opened, show_progress=False))


def test_one_pass_gives_every_source_the_bits_of_reading_it_alone(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "b", "c")
    together = extract_folder(folder, tiny_backbone, tmp_path / "cache")
    for task, one in zip("abc", together, strict=True):
        alone = extract_features(
            open_source(folder / task), tiny_backbone, cache_of(tmp_path / task, tiny_backbone)
        )
        assert isinstance(one, LabelledFeatures)
        assert torch.equal(one.cls_ND, alone.cls_ND) and torch.equal(one.label_N, alone.label_N)
        assert (one.data_sha256, one.num_computed) == (alone.data_sha256, alone.num_computed)


def test_no_batch_mixes_sources_and_none_is_embedded_twice(tmp_path: Path, tiny_backbone: Backbone) -> None:
    recording = RecordingBackbone(tiny_backbone)
    folder = write_tasks(tmp_path / "tasks", "a", "b")  # 30 and 33 pictures
    shutil.copytree(folder / "b", folder / "c")
    write_classes(folder / "c" / "train", 1, seed=9000)
    first, second, third = extract_folder(folder, recording, tmp_path / "cache")  # type: ignore[arg-type]
    assert recording.batch_sizes == [16, 14, 16, 16, 1, 3]
    assert isinstance(second, LabelledFeatures) and isinstance(third, LabelledFeatures)
    assert (second.num_computed, third.num_computed) == (33, 3)
    assert {tuple(row) for row in second.cls_ND[3:].tolist()} & {tuple(row) for row in third.cls_ND.tolist()}
    again = extract_folder(folder, recording, tmp_path / "cache")  # type: ignore[arg-type]
    assert len(recording.batch_sizes) == 6
    assert all(
        torch.equal(one.cls_ND, other.cls_ND)  # type: ignore[union-attr]
        for one, other in zip((first, second, third), again, strict=True)
    )


def test_an_unreadable_source_takes_its_place_and_the_next_is_read(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "b", "c")
    for file in (folder / "b").rglob("*.png"):
        file.write_bytes(b"no picture")
    first, second, third = extract_folder(folder, tiny_backbone, tmp_path / "cache")
    assert isinstance(first, LabelledFeatures) and isinstance(third, LabelledFeatures)
    assert isinstance(second, InvalidDataset) and "b: 33 of 33 pictures cannot be read" in str(second)


def test_a_broken_picture_that_two_sources_hold_is_named_in_both(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    folder = tmp_path / "tasks"
    for task in ("a", "b"):
        write_classes(folder / task, 9)
        (folder / task / "red" / "x.png").write_bytes(b"no picture")
    for features in extract_folder(folder, tiny_backbone, tmp_path / "cache"):
        assert isinstance(features, LabelledFeatures)
        (line,) = features.skipped
        assert line.endswith("red/x.png: not a picture in one of the formats JPEG, PNG, WEBP, BMP, GIF, TIFF")


# -- the same bytes ----------------------------------------------------------------------------------


def test_tasks_trained_together_have_the_bytes_of_training_each_alone(
    tmp_path: Path, tiny_backbone: Backbone
) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "b", "c", "d")
    outcomes = train_folder(
        folder, tiny_backbone, FolderDestination(tmp_path / "out"), tmp_path / "cache", Workers(3)
    )
    assert list(outcomes) == ["a", "b", "c", "d"]
    for task, outcome in outcomes.items():
        assert outcome.status == "trained"
        alone = train_alone(task, folder / task, tiny_backbone, tmp_path / f"cache-{task}")
        assert (tmp_path / "out" / f"{task}.safetensors").read_bytes() == alone
        assert (tmp_path / "cache/reports" / f"{task}.md").is_file()


def test_revisions_of_a_store_come_in_the_order_of_the_tasks(
    tmp_path: Path, tiny_backbone: Backbone, tiny_store: ModelStore
) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "b", "c")
    destination = StoreDestination(tiny_store, force=True)
    outcomes = train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    assert [one.kept for one in outcomes.values()] == [
        {"revision": number, "published": True} for number in (2, 3, 4)
    ]
    for task, sha256 in tiny_store.require_head().tasks.items():
        alone = train_alone(task, folder / task, tiny_backbone, tmp_path / f"cache-{task}")
        assert tiny_store.module(sha256) == alone


# -- faults ------------------------------------------------------------------------------------------


def test_a_task_that_fails_does_not_take_the_others_with_it(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "bug", "corrupt", "dies", "e", "f", "g")
    (folder / "empty" / "cat").mkdir(parents=True)
    write_splits(folder / "not a name", train=3)
    for file in (folder / "corrupt").rglob("*.png"):
        file.write_bytes(b"no picture")
    workers = Workers(2, killed_training.run)
    destination = FolderDestination(tmp_path / "out")
    outcomes = train_folder(folder, tiny_backbone, destination, tmp_path / "cache", workers)
    faults = {task: one.fault for task, one in outcomes.items() if one.status == "failed"}
    assert list(outcomes) == sorted(outcomes)
    assert faults.keys() == {"bug", "corrupt", "dies", "empty", "not a name"}
    assert faults["bug"] == "ZeroDivisionError: division by zero"
    assert "36 of 36 pictures cannot be read" in str(faults["corrupt"])
    assert "process was killed" in str(faults["dies"])
    assert "holds no pictures" in str(faults["empty"])
    assert "a task name is" in str(faults["not a name"])
    for task in ("a", "e", "f", "g"):
        assert outcomes[task].status == "trained"
        alone = train_alone(task, folder / task, tiny_backbone, tmp_path / "cache")
        assert (tmp_path / "out" / f"{task}.safetensors").read_bytes() == alone


def test_a_task_that_would_harm_another_is_refused_and_the_next_published(
    tmp_path: Path, tiny_backbone: Backbone, tiny_store: ModelStore
) -> None:
    folder = write_tasks(tmp_path / "tasks", "a")
    shutil.copytree(folder / "a", folder / "twin")
    for i, label in enumerate(("dark", "light")):
        for j in range(8):
            path = folder / "z" / label / f"{j}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            grey = noise(0, 50 * i + j).convert("L").point(lambda v, i=i: v // 4 + 190 * i).convert("RGB")
            path.write_bytes(encoded(grey))
    outcomes = train_folder(
        folder, tiny_backbone, StoreDestination(tiny_store, force=False), tmp_path / "cache"
    )
    assert statuses(outcomes) == {"a": "trained", "twin": "failed", "z": "trained"}
    assert "would lower the accuracy of task 'a'" in str(outcomes["twin"].fault)
    assert set(tiny_store.require_head().tasks) == {"a", "z"}


def test_a_file_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "t.safetensors").mkdir()
    with pytest.raises(ToscaError, match=r"t\.safetensors cannot be written: Is a directory"):
        FolderDestination(tmp_path).keep("t", b"data")
    assert [one.name for one in tmp_path.iterdir()] == ["t.safetensors"]


# -- again -------------------------------------------------------------------------------------------


def test_a_second_run_trains_only_what_changed(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "b", "c", "d")
    destination = FolderDestination(tmp_path / "out")
    train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    again = train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    assert set(statuses(again).values()) == {"unchanged"}
    (folder / "a/train/red/000.png").write_bytes(encoded(noise(1, 4711)))
    (folder / "b/train/red/000.png").rename(folder / "b/train/blue/moved.png")
    (tmp_path / "out/c.safetensors").write_bytes(b"half a file")
    third = train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    assert statuses(third) == {"a": "trained", "b": "trained", "c": "trained", "d": "unchanged"}
    assert (third["a"].num_computed, third["b"].num_computed) == (1, 0)


def test_what_is_unchanged_needs_no_backbone(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "b")
    recording = RecordingBackbone(tiny_backbone)
    destination = FolderDestination(tmp_path / "out")
    train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    again = train_folder(folder, recording, destination, tmp_path / "new-cache")  # type: ignore[arg-type]
    assert set(statuses(again).values()) == {"unchanged"} and recording.batch_sizes == []


def test_a_task_with_an_unreadable_picture_is_unchanged_too(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folder = write_tasks(tmp_path / "tasks", "a")
    (folder / "a/train/red/000.png").write_bytes(b"no picture")
    destination = FolderDestination(tmp_path / "out")
    first = train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    again = train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    assert (first["a"].status, again["a"].status) == ("trained", "unchanged")
    assert first["a"].skipped == again["a"].skipped and len(first["a"].skipped) == 1


def test_repeats_are_left_out_of_each_task(tmp_path: Path, tiny_backbone: Backbone) -> None:
    folder = write_tasks(tmp_path / "tasks", "a", "b")
    alone = train_alone("a", folder / "a", tiny_backbone, tmp_path / "cache")
    shutil.copy(folder / "a/train/red/000.png", folder / "a/test/red/x.png")
    shutil.copy(folder / "b/train/red/000.png", folder / "b/train/blue/x.png")
    destination = FolderDestination(tmp_path / "out")
    outcomes = train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    assert (tmp_path / "out/a.safetensors").read_bytes() == alone
    assert "1 picture(s) of test also in train" in outcomes["a"].skipped[0]
    assert "1 picture(s) have two labels" in str(outcomes["b"].fault)
    again = train_folder(folder, tiny_backbone, destination, tmp_path / "cache")
    assert again["a"].status == "unchanged"


def test_a_module_is_made_anew_for_every_change_of_how_it_is_made(tiny_backbone: Backbone) -> None:
    from synthetic import make_features

    plan = TaskPlan("shapes", "")
    manifest = read_module(train_task("shapes", make_features(), tiny_backbone.manifest).data).manifest
    fingerprint, data = tiny_backbone.fingerprint, "0" * 64
    assert plan.is_made_by(manifest, fingerprint, data)
    changes = (
        {"task": "other"},
        {"recipe": "reference"},
        {"flow": "luca"},
        {"seed": 1},
        {"label_space": "x"},
        {"abstain_level": 0.1},
    )
    for change in changes:
        assert not dataclasses.replace(plan, **change).is_made_by(manifest, fingerprint, data), change
    assert not plan.is_made_by(manifest, "f" * 64, data)
    assert not plan.is_made_by(manifest, fingerprint, "1" * 64)


# -- bounds ------------------------------------------------------------------------------------------


def test_features_wait_for_the_workers(tmp_path: Path, tiny_backbone: Backbone) -> None:
    """At most two tasks for each worker are held in memory, however many there are."""
    folder = write_tasks(tmp_path / "tasks", *"abcdefg")
    extracted: list[str] = []
    kept: list[str] = []
    waiting: list[int] = []

    def extract(sources: Iterable[HashedSource]) -> Iterator[LabelledFeatures | InvalidDataset]:
        opened = cache_of(tmp_path / "cache", tiny_backbone)
        for features in extract_each(sources, tiny_backbone, opened, show_progress=False):
            extracted.append("")
            waiting.append(len(extracted) - len(kept))
            yield features

    class Counting(FolderDestination):
        def keep(self, task: str, data: bytes) -> dict[str, object]:
            kept.append(task)
            return super().keep(task, data)

    with Workers(1) as workers:
        outcomes = list(
            train_many(
                read_plans(folder, LIKE),
                tiny_backbone.manifest,
                Counting(tmp_path / "out"),
                hash_source=hash_source,
                extract_each=extract,
                report_folder=tmp_path / "reports",
                workers=workers,
            )
        )
    assert [one.task for one in outcomes] == kept == list("abcdefg")
    assert max(waiting) == 3


# -- lists of tasks ----------------------------------------------------------------------------------


def test_a_folder_lists_its_subfolders_and_manifests(tmp_path: Path) -> None:
    for name in ("b", "a", ".hidden"):
        (tmp_path / name).mkdir()
    for name in ("c.csv", "d.parquet", "README.md"):
        (tmp_path / name).touch()
    like = dataclasses.replace(LIKE, seed=3)
    assert read_plans(tmp_path, like) == [
        dataclasses.replace(like, task=task, data=tmp_path / name)
        for task, name in (("a", "a"), ("b", "b"), ("c", "c.csv"), ("d", "d.parquet"))
    ]


def test_a_toml_file_says_more_about_its_tasks(tmp_path: Path) -> None:
    (tmp_path / "tasks.toml").write_text(
        '[tasks.birds]\ndata = "pictures/birds"\nlabel_space = "animals"\nseed = 5\n'
        '[tasks.ants]\ndata = "/data/ants"\nabstain_level = 0.1\nrecipe = "reference"\n'
    )
    like = dataclasses.replace(LIKE, seed=3, min_images=4)
    ants, birds = read_plans(tmp_path / "tasks.toml", like)
    assert ants == TaskPlan("ants", Path("/data/ants"), "reference", "tosca", 3, None, 0.1, 4)
    assert birds == TaskPlan("birds", tmp_path / "pictures/birds", "default", "tosca", 5, "animals", None, 4)


LISTS = {
    "no toml": ("[tasks", "is no list of tasks"),
    "nothing": ("", "tasks: Field required"),
    "no task": ("[tasks]\n", "at least 1 item"),
    "no data": ("[tasks.a]\nseed = 1\n", "tasks.a.data: Field required"),
    "an unknown setting": ('[tasks.a]\ndata = "x"\nepochs = 3\n', "tasks.a.epochs: Extra inputs"),
    "an unknown recipe": ('[tasks.a]\ndata = "x"\nrecipe = "best"\n', "tasks.a.recipe: Input should be"),
    "a negative seed": ('[tasks.a]\ndata = "x"\nseed = -1\n', "tasks.a.seed: Input should be greater"),
    "a seed beyond all generators": (
        f'[tasks.a]\ndata = "x"\nseed = {MAX_SEED + 1}\n',
        "tasks.a.seed: Input should be less",
    ),
    "two of one name": ('[tasks.a]\ndata = "x"\n[tasks.a]\ndata = "y"\n', "Cannot declare"),
}


@pytest.mark.parametrize("name", LISTS)
def test_an_unusable_list_is_named(name: str, tmp_path: Path) -> None:
    text, fault = LISTS[name]
    (tmp_path / "tasks.toml").write_text(text)
    with pytest.raises(InvalidDataset, match=fault):
        read_plans(tmp_path / "tasks.toml", LIKE)


def test_a_folder_without_tasks_and_two_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="holds no tasks"):
        read_plans(tmp_path, LIKE)
    (tmp_path / "a").mkdir()
    (tmp_path / "a.csv").touch()
    with pytest.raises(InvalidDataset, match=r"a and a\.csv are both task 'a'"):
        read_plans(tmp_path, LIKE)
    with pytest.raises(InvalidDataset, match="expected a folder of tasks"):
        read_plans(tmp_path / "a.csv", LIKE)
