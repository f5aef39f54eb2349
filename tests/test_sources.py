"""Labelled pictures from folders and manifests: found in a fixed order, and faults named before any work."""

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from pictures import write_classes, write_splits

from model_store.errors import InvalidDataset
from training.pictures import SPLITS, PictureSource
from training.sources import open_source


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def split_of(source: PictureSource, name: str) -> list[str]:
    return [one.label for one in source.pictures if one.split == name]


def write_csv(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# -- folders -----------------------------------------------------------------------------------------


def test_class_folders_are_all_training_pictures(tmp_path: Path) -> None:
    source = open_source(write_classes(tmp_path / "colours", 3))
    assert source.name == "colours"
    assert source.labels == ("blue", "green", "red")
    assert len(source.pictures) == 9
    assert {one.split for one in source.pictures} == {"train"}
    assert all(one.path.parent.name == one.label for one in source.pictures)


def test_split_folders_are_read_as_splits(tmp_path: Path) -> None:
    source = open_source(write_splits(tmp_path, train=4, val=2, test=3))
    assert {split: len(split_of(source, split)) for split in SPLITS} == {"train": 12, "val": 6, "test": 9}
    assert source.labels == ("blue", "green", "red")


def test_pictures_are_ordered_by_split_label_and_path(tmp_path: Path) -> None:
    source = open_source(write_splits(tmp_path, test=2, train=2))
    keys = [(SPLITS.index(one.split), one.label, one.path.as_posix()) for one in source.pictures]
    assert keys == sorted(keys)


def test_every_spelling_of_a_suffix_and_nested_folders_are_found(tmp_path: Path) -> None:
    names = ("a.jpg", "b.JPEG", "c.Png", "d.webp", "e.bmp", "f.gif", "g.tif", "h.TIFF", "deep/er/i.png")
    touch(*(tmp_path / "cat" / name for name in names), tmp_path / "cat" / "notes.txt")
    touch(tmp_path / "dog" / "a.jpg", tmp_path / "dog" / "b.jpg")
    source = open_source(tmp_path)
    assert [one.label for one in source.pictures].count("cat") == len(names)


def test_hidden_folders_and_loose_files_are_passed_over(tmp_path: Path) -> None:
    write_classes(tmp_path, 2)
    touch(tmp_path / ".git" / "a.jpg", tmp_path / "loose.jpg", tmp_path / "README.md")
    assert len(open_source(tmp_path).pictures) == 6


def test_the_current_folder_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(write_classes(tmp_path / "colours", 2))
    assert open_source(Path()).name == "colours"


FOLDERS = {
    "empty": ((), "holds no pictures: expected CLASS/"),
    "pictures without class folders": (("a.jpg", "b.jpg"), "holds no pictures"),
    "only other files": (("cat/a.txt", "dog/b.txt"), "class folder .*/cat holds no pictures"),
    "an empty class": (("cat/a.jpg", "cat/b.jpg", "dog/notes.txt"), "class folder .*/dog holds no pictures"),
    "a single class": (
        ("cat/a.jpg", "cat/b.jpg"),
        "has a single class 'cat': a classification task needs two",
    ),
    "a class with one picture": (
        ("cat/a.jpg", "cat/b.jpg", "dog/a.jpg"),
        r"class 'dog' has 1 training picture\(s\), at least 2 are needed",
    ),
    "classes that differ in case": (
        ("Cat/a.jpg", "Cat/b.jpg", "cat/a.jpg", "cat/b.jpg"),
        "class names 'Cat' and 'cat' are the same but for spelling",
    ),
    "classes that differ in normal form": (
        ("caf\u00e9/a.jpg", "caf\u00e9/b.jpg", "cafe\u0301/a.jpg", "cafe\u0301/b.jpg"),
        "are the same but for spelling",
    ),
    "classes that differ in blanks": (
        ("cat/a.jpg", "cat/b.jpg", "cat /a.jpg", "cat /b.jpg"),
        "are the same but for spelling",
    ),
    "splits mixed with classes": (
        ("train/cat/a.jpg", "train/dog/a.jpg", "birds/a.jpg"),
        "mixes split folders with others: birds",
    ),
    "splits in capitals": (
        ("Train/cat/a.jpg", "Train/dog/a.jpg", "Test/cat/a.jpg", "Test/dog/a.jpg"),
        "Test, Train look like splits; expected train, val, test",
    ),
    "splits by other names": (
        ("train/cat/a.jpg", "train/dog/a.jpg", "validation/cat/a.jpg"),
        "train, validation look like splits; expected train, val, test",
    ),
    "no training split": (("test/cat/a.jpg", "test/dog/a.jpg"), "has no training pictures"),
    "a class only in the test split": (
        ("train/cat/a.jpg", "train/cat/b.jpg", "test/cat/a.jpg", "test/dog/a.jpg"),
        r"class 'dog' has 0 training picture\(s\)",
    ),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_an_unusable_folder_is_named(name: str, tmp_path: Path) -> None:
    files, fault = FOLDERS[name]
    touch(*(tmp_path / file for file in files))
    with pytest.raises(InvalidDataset, match=fault) as refusal:
        open_source(tmp_path)
    assert str(tmp_path) in str(refusal.value)


def test_the_least_number_of_pictures_is_a_choice(tmp_path: Path) -> None:
    write_classes(tmp_path, 1)
    assert len(open_source(tmp_path, min_images_per_class=1).pictures) == 3
    with pytest.raises(InvalidDataset, match="at least 5 are needed"):
        open_source(tmp_path, min_images_per_class=5)


def test_a_source_to_evaluate_may_be_small_and_untrained(tmp_path: Path) -> None:
    touch(tmp_path / "test" / "cat" / "a.jpg")
    source = open_source(tmp_path, to_train=False)
    assert (source.labels, len(source.pictures)) == (("cat",), 1)


def test_a_class_may_be_called_like_a_split_beside_others(tmp_path: Path) -> None:
    assert open_source(write_classes(tmp_path, 2, labels=("Test", "weld"))).labels == ("Test", "weld")


def test_a_missing_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataset, match="nowhere does not exist"):
        open_source(tmp_path / "nowhere")


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    touch(tmp_path / "pictures.zip")
    with pytest.raises(InvalidDataset, match=r"expected a folder of class folders, or a \.csv"):
        open_source(tmp_path / "pictures.zip")


# -- manifests ---------------------------------------------------------------------------------------


def test_a_csv_manifest_names_paths_labels_and_splits(tmp_path: Path) -> None:
    text = "path,label,split,extra\n" + "".join(
        f"pictures/{label}{i}.png,{label},{split},x\n"
        for label in ("cat", "dog")
        for i, split in enumerate(("train", "train", "test", ""))
    )
    source = open_source(write_csv(tmp_path / "pets.csv", text))
    assert source.name == "pets" and source.labels == ("cat", "dog")
    assert len(split_of(source, "train")) == 6, "an empty split means train"
    assert len(split_of(source, "test")) == 2
    assert source.pictures[0].path == tmp_path / "pictures/cat0.png"


def test_absolute_paths_stay_as_they_are(tmp_path: Path) -> None:
    rows = "".join(f"/data/{label}{i}.png,{label}\n" for label in "ab" for i in range(2))
    source = open_source(write_csv(tmp_path / "x.csv", "path,label\n" + rows))
    assert source.pictures[0].path == Path("/data/a0.png")


def test_a_manifest_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    rows = "".join(f"{label}{i}.png,{label}\n" for label in "ab" for i in range(2))
    source = open_source(write_csv(tmp_path / "x.csv", "\ufeffpath,label\n" + rows))
    assert source.labels == ("a", "b")


def test_labels_may_hold_commas_quotes_and_any_script(tmp_path: Path) -> None:
    rows = "".join(f'{i}.png,"{label}"\n' for label in ("black, small", "猫", 'a ""b""') for i in range(2))
    source = open_source(write_csv(tmp_path / "x.csv", "path,label\n" + rows))
    assert set(source.labels) == {"black, small", "猫", 'a "b"'}


def test_a_parquet_manifest_is_read_like_a_csv(tmp_path: Path) -> None:
    table = pyarrow.table(
        {
            "path": [f"{i}.png" for i in range(8)],
            "label": [7, 7, 7, 7, 8, 8, 8, 8],
            "split": ["train", "train", "test", None] * 2,
            "weight": [0.5] * 8,
        }
    )
    pyarrow.parquet.write_table(table, tmp_path / "numbers.parquet")
    source = open_source(tmp_path / "numbers.parquet")
    assert source.labels == ("7", "8")
    assert (len(split_of(source, "train")), len(split_of(source, "test"))) == (6, 2)


MANIFESTS = {
    "empty": ("", "column 'path' is missing; it has none"),
    "only a header": ("path,label\n", "holds no pictures"),
    "no label column": ("path,class\na.png,cat\n", "column 'label' is missing; it has path, class"),
    "no path column": ("file,label\na.png,cat\n", "column 'path' is missing"),
    "a row without label": ("path,label\na.png,cat\nb.png,\n", "row 2 needs a path and a label"),
    "a row without path": ("path,label\n,cat\n", "row 1 needs a path and a label"),
    "a blank label": ("path,label\na.png,cat\nb.png,  \n", "row 2 needs a path and a label"),
    "a short row": ("path,label\na.png\n", "row 1 needs a path and a label"),
    "an unknown split": (
        "path,label,split\na.png,cat,dev\n",
        "row 1 has split 'dev', expected train, val, test",
    ),
    "a single class": ("path,label\na.png,cat\nb.png,cat\n", "single class 'cat'"),
    "a gigantic field": ("path,label\n" + "x" * 200_000 + ",cat\n", "is no readable CSV file"),
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_an_unusable_manifest_is_named(name: str, tmp_path: Path) -> None:
    text, fault = MANIFESTS[name]
    with pytest.raises(InvalidDataset, match=fault):
        open_source(write_csv(tmp_path / "x.csv", text))


def test_a_manifest_that_is_not_text_is_refused(tmp_path: Path) -> None:
    for name, content in (("x.csv", b"\x89PNG\xff\xfe\x00"), ("x.parquet", b"PAR1 but not really")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InvalidDataset, match="is no readable"):
            open_source(tmp_path / name)


def test_a_parquet_file_without_labels_is_refused(tmp_path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a.png"]}), tmp_path / "x.parquet")
    with pytest.raises(InvalidDataset, match="column 'label' is missing; it has path"):
        open_source(tmp_path / "x.parquet")
