"""Streams: what a file may say, and that every seed's order covers everything once and can be had again."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pictures import encoded, noise, write_splits
from synthetic import make_features

from model_store.errors import InvalidDataset
from training.continual.protocol import DATASETS, SEEDS, paper_stream
from training.continual.sources import open_stream
from training.continual.streams import Alphabets, Split, Stream, TaskEntry, read_stream
from training.continual.tasks import arrange, class_order, restrict
from training.features import LabelledFeatures

STREAMS = Path(__file__).parent.parent / "benchmarks" / "streams"
TWO = (TaskEntry(name="a", folder="a"), TaskEntry(name="b", folder="b"))


def split_stream(size: int, order: str = "shuffled") -> Stream:
    return Stream.model_validate(
        {
            "name": "split",
            "scenario": "class-incremental",
            "order": order,
            "split": {"folder": ".", "classes_per_task": size},
        }
    )


def domains() -> list[LabelledFeatures]:
    parts = [make_features(name, feature_dim=8, seed=i) for i, name in enumerate(("art", "sketch"))]
    return [replace(one, labels=("cat", "dog", "elk")) for one in parts]


# -- files -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(STREAMS.glob("*.toml")), ids=lambda path: path.stem)
def test_the_streams_of_the_project_parse(path: Path) -> None:
    assert read_stream(path).name == path.stem


def test_the_named_streams_are_there() -> None:
    expected = {"mixed", "tiny_imagenet_10x10", "tiny_imagenet_20x5", "omniglot", "pacs_domains"}
    assert expected <= {path.stem for path in STREAMS.glob("*.toml")}


HEAD = 'name = "x"\nscenario = "mixed"\n'
SPLIT = '[split]\nfolder = "x"\nclasses_per_task = 2\n'


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("not toml", "cannot be read"),
        (HEAD, "exactly one of"),
        (HEAD + 'colour = "red"\n' + SPLIT, "colour"),
        (HEAD + SPLIT + "fraction = 0.5\n", "fraction"),
        (HEAD + SPLIT.replace("2", "1"), "classes_per_task"),
        (HEAD.replace("mixed", "mingled") + SPLIT, "scenario"),
        (HEAD.replace("mixed", "domain-incremental") + SPLIT, "domain-incremental"),
        (HEAD + 'tasks = [{name = "a", folder = "a"}]\n', "at least two"),
        (HEAD + 'tasks = [{name = "a"}, {name = "b", folder = "b"}]\n', "either a folder or a builtin"),
        (HEAD + 'tasks = [{name = "a", folder = "a"}, {name = "a", folder = "b"}]\n', "distinct"),
        (HEAD + 'tasks = [{name = "../a", folder = "a"}, {name = "b", folder = "b"}]\n', "name"),
        (HEAD + 'tasks = [{name = "a", builtin = "birds"}, {name = "b", folder = "b"}]\n', "builtin"),
        (
            HEAD + 'tasks = [{name = "a", folder = "a"}, {name = "b", folder = "b"}]\n' + SPLIT,
            "exactly one of",
        ),
        (HEAD + "[alphabets]\nfolders = []\ntrain_per_class = 15\n", "folders"),
    ],
)
def test_junk_is_refused_with_its_place(tmp_path: Path, text: str, fault: str) -> None:
    path = tmp_path / "stream.toml"
    path.write_text(text)
    with pytest.raises(InvalidDataset, match=fault):
        read_stream(path)


def test_a_missing_stream_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match=r"nowhere\.toml"):
        read_stream(tmp_path / "nowhere.toml")


# -- orders ------------------------------------------------------------------------------------------


def test_class_orders_are_pilots() -> None:
    # numpy's legacy generator is frozen by numpy's own promise, so these numbers never change.
    assert class_order(100, 1993)[:10] == [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dataset", DATASETS)
def test_published_orders_cover_every_class_once(dataset: str, seed: int) -> None:
    published = DATASETS[dataset]
    order = class_order(published.num_classes, seed)
    assert sorted(order) == list(range(published.num_classes))
    assert order == class_order(published.num_classes, seed) != class_order(published.num_classes, seed + 1)
    assert published.num_classes % published.increment == 0


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_split_covers_classes_and_pictures_once(size: int) -> None:
    whole = make_features("all", num_classes=10, per_class=4, num_test=2, feature_dim=8)
    for order in ("shuffled", "fixed"):
        tasks = arrange(split_stream(size, order), [whole], seed=3)
        labels = [label for task in tasks for label in task.train.labels]
        assert sorted(labels) == sorted(whole.labels)
        assert (labels == list(whole.labels)) == (order == "fixed")
        assert [len(task.label_K) for task in tasks] == [size] * (10 // size) + [10 % size] * bool(10 % size)
        assert torch.cat([task.label_K for task in tasks]).tolist() == list(range(10))
        assert sum(len(task.train.label_N) for task in tasks) == 40
        assert sum(len(task.test_label_U) for task in tasks) == 20


def test_seeds_give_reproducible_and_different_orders() -> None:
    whole = make_features("all", num_classes=12, feature_dim=8)
    names = [[task.train.labels for task in arrange(split_stream(3), [whole], seed)] for seed in (0, 0, 1)]
    assert names[0] == names[1] != names[2]
    many = [make_features(name, feature_dim=8) for name in "abcdef"]
    stream = Stream(name="x", scenario="mixed", tasks=TWO)
    orders = [[task.name for task in arrange(stream, many, seed)] for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list("abcdef")


def test_tasks_hold_their_own_rows_and_never_train_on_a_test_picture() -> None:
    whole = make_features("all", num_classes=6, per_class=4, num_test=3, feature_dim=8)
    for task in arrange(split_stream(2), [whole], seed=1):
        assert set(task.train.splits) == {"train"}
        for rows_ND, label_N, split in (
            (task.train.cls_ND, task.train.label_N, "train"),
            (task.test_cls_UD, task.test_label_U - int(task.label_K[0]), "test"),
        ):
            for x_D, k in zip(rows_ND, label_N.tolist(), strict=True):
                (row,) = (whole.cls_ND == x_D).all(dim=1).nonzero().squeeze(1).tolist()
                assert whole.splits[row] == split
                assert whole.labels[int(whole.label_N[row])] == task.train.labels[k]
        assert torch.equal(task.test_label_U, task.test_label_U.sort().values), (
            "sorted by class, as published"
        )


def test_restricting_to_all_classes_changes_nothing() -> None:
    whole = make_features("all", num_classes=4, feature_dim=8)
    same = restrict(whole, range(4), "all")
    assert torch.equal(same.cls_ND, whole.cls_ND) and torch.equal(same.label_N, whole.label_N)
    assert same.labels == whole.labels and same.splits == whole.splits


def test_domains_share_labels_and_other_streams_do_not() -> None:
    shared = arrange(Stream(name="x", scenario="domain-incremental", order="fixed", tasks=TWO), domains(), 0)
    assert [task.label_K.tolist() for task in shared] == [[0, 1, 2], [0, 1, 2]]
    apart = arrange(Stream(name="x", scenario="mixed", order="fixed", tasks=TWO), domains(), 0)
    assert [task.label_K.tolist() for task in apart] == [[0, 1, 2], [3, 4, 5]]


def test_a_split_into_a_single_task_is_refused() -> None:
    with pytest.raises(InvalidDataset, match="single task"):
        arrange(split_stream(10), [make_features("all", num_classes=4, feature_dim=8)], 0)


# -- pictures ----------------------------------------------------------------------------------------


def test_tasks_are_opened_by_name_and_need_a_test_split(tmp_path: Path) -> None:
    for name in "ab":
        write_splits(tmp_path / name, train=3, test=1)
    stream = Stream(name="x", scenario="mixed", tasks=(TWO[0], TaskEntry(name="other", folder="b")))
    assert [source.name for source in open_stream(stream, tmp_path)] == ["a", "other"]
    write_splits(tmp_path / "c", train=3)
    bad = Stream(name="x", scenario="mixed", tasks=(TWO[0], TaskEntry(name="c", folder="c")))
    with pytest.raises(InvalidDataset, match="no test split"):
        open_stream(bad, tmp_path)


def test_published_layouts_are_read(tmp_path: Path) -> None:
    write_splits(tmp_path, train=3, test=2)
    stream = paper_stream("cifar100", increment=2)
    (source,) = open_stream(stream, tmp_path)
    assert source.labels == ("blue", "green", "red") and len(source.pictures) == 15
    assert stream.split == Split(folder=".", classes_per_task=2) and stream.order == "shuffled"


def write_alphabets(folder: Path, alphabets: tuple[str, ...], num_pictures: int = 4) -> None:
    for alphabet in alphabets:
        for character in ("one", "two"):
            target = folder / alphabet / character
            target.mkdir(parents=True)
            for i in range(num_pictures):
                (target / f"{i:02d}.png").write_bytes(encoded(noise(i, seed=len(alphabet))))


def test_alphabets_split_each_character_by_a_fixed_rule(tmp_path: Path) -> None:
    write_alphabets(tmp_path / "first", ("Greek", "Latin_(old)"))
    write_alphabets(tmp_path / "second", ("Greek", "Tagalog"))
    stream = Stream(
        name="x",
        scenario="class-incremental",
        alphabets=Alphabets(folders=("first", "second"), train_per_class=3),
    )
    sources = open_stream(stream, tmp_path)
    assert [source.name for source in sources] == ["Greek", "Latin_old", "Tagalog"]
    for source in sources:
        assert source.labels == ("one", "two")
        assert [one.path.name for one in source.pictures if one.split == "test"] == ["03.png"] * 2
    assert all("first" in one.path.parts for one in sources[0].pictures), (
        "of two equal names the first counts"
    )


def test_an_alphabet_without_pictures_to_test_is_refused(tmp_path: Path) -> None:
    write_alphabets(tmp_path / "first", ("Greek", "Latin"), num_pictures=3)
    rule = Alphabets(folders=("first",), train_per_class=3)
    with pytest.raises(InvalidDataset, match="3 train and the rest tests"):
        open_stream(Stream(name="x", scenario="class-incremental", alphabets=rule), tmp_path)
    missing = Alphabets(folders=("nowhere",), train_per_class=3)
    with pytest.raises(InvalidDataset, match="no folder of alphabets"):
        open_stream(Stream(name="x", scenario="class-incremental", alphabets=missing), tmp_path)
