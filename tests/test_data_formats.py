"""The same real pictures in every format give the same training, and faults are named by row or sample."""

import hashlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from synthetic import DEMO_PICTURES

from model_store.backbone import Backbone
from model_store.errors import InvalidDataset, InvalidImage
from training.feature_cache import FeatureCache
from training.features import LabelledFeatures, extract_features
from training.parquet import ParquetImages
from training.pictures import SPLITS
from training.sources import open_source

LABELS = ("0", "1", "7")
HF_SPLITS = {"train": "train", "val": "validation", "test": "test"}


class Sample(NamedTuple):
    data: bytes
    label: str
    split: str
    name: str


@pytest.fixture(scope="session")
def samples() -> list[Sample]:
    """Thirty of the demo's digits in three splits, shuffled."""
    found = []
    for label in LABELS:
        files = sorted((DEMO_PICTURES / "digits" / "train" / label).iterdir())[:10]
        for i, file in enumerate(files):
            split = "train" if i < 6 else SPLITS[i % 3]
            found.append(Sample(file.read_bytes(), label, split, f"{label}-{i:03d}{file.suffix}"))
    order = np.random.default_rng(0).permutation(len(found))
    return [found[i] for i in order]


@pytest.fixture(autouse=True)
def _cache_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf-cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


# -- writers -----------------------------------------------------------------------------------------


def write_folder(folder: Path, samples: list[Sample]) -> Path:
    for one in samples:
        path = folder / "digits" / one.split / one.label / one.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one.data)
    return folder / "digits"


def write_csv(folder: Path, samples: list[Sample]) -> Path:
    write_folder(folder, samples)
    rows = [f"digits/{one.split}/{one.label}/{one.name},{one.label},{one.split}" for one in samples]
    (folder / "digits.csv").write_text("\n".join(["path,label,split", *rows]))
    return folder / "digits.csv"


def write_parquet(folder: Path, samples: list[Sample], **options: Any) -> Path:
    columns = {"image": [s.data for s in samples], "label": [s.label for s in samples]}
    table = pyarrow.table(columns | {"split": [s.split for s in samples]})
    pyarrow.parquet.write_table(table, folder / "digits.parquet", **options)
    return folder / "digits.parquet"


def write_small_row_groups(folder: Path, samples: list[Sample]) -> Path:
    return write_parquet(folder, samples, row_group_size=4)


def write_shards(folder: Path, samples: list[Sample]) -> Path:
    """Two shards for training and one for each other split; every second label is in a .json file."""
    (folder / "shards").mkdir()
    for split in SPLITS:
        of_split = [one for one in samples if one.split == split]
        for i in range(2 if split == "train" else 1):
            part = of_split[i::2] if split == "train" else of_split
            write_tar(
                folder / "shards" / f"{split}-{i:06d}.tar",
                [
                    entry
                    for j, one in enumerate(part)
                    for entry in (
                        (f"s/{i}{j:04d}.{one.name.split('.')[1]}", one.data),
                        (f"s/{i}{j:04d}.cls", one.label.encode())
                        if j % 2
                        else (f"s/{i}{j:04d}.json", json.dumps({"label": int(one.label)}).encode()),
                    )
                ],
            )
    return folder / "shards"


def write_tar(path: Path, entries: list[tuple[str, bytes]], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, data in entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path


def dataset_of(samples: list[Sample]) -> datasets.DatasetDict:
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list(LABELS))}
    )
    return datasets.DatasetDict(
        {
            HF_SPLITS[split]: datasets.Dataset.from_dict(
                {
                    "image": [{"bytes": s.data, "path": None} for s in samples if s.split == split],
                    "label": [s.label for s in samples if s.split == split],
                },
                features=features,
            )
            for split in SPLITS
        }
    )


def write_saved(folder: Path, samples: list[Sample]) -> Path:
    dataset_of(samples).save_to_disk(folder / "saved")
    return folder / "saved"


def write_builder_folder(folder: Path, samples: list[Sample]) -> str:
    """A folder that `datasets` builds a data set from, as it does from one of its hub."""
    for one in samples:
        path = folder / "built" / HF_SPLITS[one.split] / one.label / one.name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(one.data)
    return f"hf:{folder / 'built'}"


FORMATS: dict[str, Callable[[Path, list[Sample]], Path | str]] = {
    "folder": write_folder,
    "csv": write_csv,
    "parquet": write_parquet,
    "parquet in small row groups": write_small_row_groups,
    "shards": write_shards,
    "saved data set": write_saved,
    "data set by name": write_builder_folder,
}


# -- the same in every format ------------------------------------------------------------------------


def extract(data: Path | str, backbone: Backbone, folder: Path, **options: Any) -> LabelledFeatures:
    cache = FeatureCache(folder, backbone.fingerprint, backbone.variant, backbone.feature_dim)
    return extract_features(open_source(data), backbone, cache, show_progress=False, **options)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_bytes_labels_and_splits(
    name: str, tmp_path: Path, samples: list[Sample]
) -> None:
    data = FORMATS[name](tmp_path, samples)
    source = open_source(data)
    found = [(one.path.read_bytes(), one.label, one.split) for one in source.pictures]
    assert sorted(found) == sorted((s.data, s.label, s.split) for s in samples)
    assert source.labels == LABELS
    again = open_source(data)
    assert [str(one.path) for one in again.pictures] == [str(one.path) for one in source.pictures]
    assert len({str(one.path) for one in source.pictures}) == len(samples), "every picture can be told apart"


@pytest.mark.parametrize("name", [one for one in FORMATS if one != "folder"])
def test_every_format_gives_the_features_of_the_folder(
    name: str, tmp_path: Path, samples: list[Sample], tiny_backbone: Backbone
) -> None:
    def by_picture(data: Path | str) -> dict[str, tuple[str, str, torch.Tensor]]:
        features = extract(data, tiny_backbone, tmp_path / "cache", num_threads=3)
        digests = [hashlib.sha256(one.path.read_bytes()).hexdigest() for one in open_source(data).pictures]
        return {
            digest: (features.labels[int(features.label_N[i])], features.splits[i], features.cls_ND[i])
            for i, digest in enumerate(digests)
        }

    (tmp_path / "plain").mkdir()
    expected = by_picture(write_folder(tmp_path / "plain", samples))
    found = by_picture(FORMATS[name](tmp_path, samples))
    assert found.keys() == expected.keys()
    for digest, (label, split, cls_D) in found.items():
        assert (label, split) == expected[digest][:2]
        assert torch.equal(cls_D, expected[digest][2])


def test_a_data_set_written_as_parquet_keeps_its_class_names(tmp_path: Path, samples: list[Sample]) -> None:
    dataset_of(samples)["train"].to_parquet(tmp_path / "train.parquet")
    source = open_source(tmp_path / "train.parquet")
    expected = [(s.data, s.label) for s in samples if s.split == "train"]
    assert [(one.path.read_bytes(), one.label) for one in source.pictures] == expected


# -- bounds ------------------------------------------------------------------------------------------


def test_one_large_row_group_is_not_held_in_memory(tmp_path: Path) -> None:
    rows = [np.random.default_rng(i).bytes(10_000) for i in range(6000)]
    table = pyarrow.table({"image": rows, "label": ["a", "b"] * 3000})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet", row_group_size=len(rows))
    del table
    images = ParquetImages(tmp_path / "x.parquet")
    before, most = pyarrow.total_allocated_bytes(), 0
    for i, row in enumerate(rows):
        assert images.read(i) == row
        most = max(most, pyarrow.total_allocated_bytes() - before)
    assert most < 0.5 * sum(map(len, rows))


def test_a_parquet_file_is_read_once_by_several_threads(
    tmp_path: Path, samples: list[Sample], tiny_backbone: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[int] = []
    begin = ParquetImages._begin
    monkeypatch.setattr(ParquetImages, "_begin", lambda self: (begun.append(1), begin(self))[1])
    extract(write_parquet(tmp_path, samples * 20), tiny_backbone, tmp_path / "cache", num_threads=8)
    assert len(begun) <= 2, "once to hash, once to decode"


def test_rows_may_be_read_in_any_order(tmp_path: Path, samples: list[Sample]) -> None:
    images = ParquetImages(write_parquet(tmp_path, samples * 20))
    for row in (599, 0, 300, 299, 12):
        assert images.read(row) == samples[row % len(samples)].data
    with pytest.raises(InvalidImage):
        images.read(600)


# -- faults of Parquet files -------------------------------------------------------------------------


def parquet_of(path: Path, **columns: list[Any]) -> Path:
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


PARQUET_FAULTS = {
    "no label": ({"image": [b"x"]}, "column 'label' is missing; it has image"),
    "no picture": ({"label": ["a"]}, "column 'path' is missing; it has label"),
    "a null label": ({"image": [b"x", b"y"], "label": ["a", None]}, "row 2 needs a label"),
    "a blank label": ({"image": [b"x"], "label": [" "]}, "row 1 needs a label"),
    "an unknown split": (
        {"image": [b"x"], "label": ["a"], "split": ["dev"]},
        "row 1 has split 'dev', expected train, val, test",
    ),
    "pictures as numbers": (
        {"image": [1], "label": ["a"]},
        "column 'image' is int64; expected the bytes of encoded pictures",
    ),
    "pictures as text": ({"image": ["a.png"], "label": ["a"]}, "column 'image' is string"),
}


@pytest.mark.parametrize("name", PARQUET_FAULTS)
def test_an_unusable_parquet_file_is_named(name: str, tmp_path: Path) -> None:
    columns, fault = PARQUET_FAULTS[name]
    with pytest.raises(InvalidDataset, match=fault):
        open_source(parquet_of(tmp_path / "x.parquet", **columns))


def test_rows_without_a_picture_are_skipped_by_number(
    tmp_path: Path, samples: list[Sample], tiny_backbone: Backbone
) -> None:
    data = [s.data for s in samples]
    data[3], data[7] = None, b"no picture"  # type: ignore[call-overload]
    path = parquet_of(tmp_path / "x.parquet", image=data, label=[s.label for s in samples])
    features = extract(path, tiny_backbone, tmp_path / "cache", max_corrupt_fraction=0.1)
    assert features.skipped == (
        f"{path} row 4: holds no picture",
        f"{path} row 8: not a picture in one of the formats JPEG, PNG, WEBP, BMP, GIF, TIFF",
    )


def test_a_parquet_file_cut_short_after_it_was_opened_is_no_crash(
    tmp_path: Path, samples: list[Sample], tiny_backbone: Backbone
) -> None:
    source = open_source(write_parquet(tmp_path, samples))
    (tmp_path / "digits.parquet").write_bytes(b"PAR1")
    cache = FeatureCache(tmp_path / "cache", tiny_backbone.fingerprint, "x", tiny_backbone.feature_dim)
    with pytest.raises(InvalidDataset, match="row 1: cannot be read from the file"):
        extract_features(source, tiny_backbone, cache, show_progress=False)


# -- faults of shards --------------------------------------------------------------------------------

PNG = b"\x89PNG"
TAR_FAULTS: dict[str, tuple[list[tuple[str, bytes]], str]] = {
    "nothing": ([], "holds no pictures"),
    "no label": ([("a/1.png", PNG)], r"sample 'a/1' has no label: expected a/1\.cls"),
    "an empty label": ([("1.png", PNG), ("1.cls", b" \n")], "sample '1' has no label"),
    "no picture": ([("1.cls", b"cat")], r"sample '1' needs one picture, it has 1\.cls"),
    "two pictures": (
        [("1.png", PNG), ("1.jpg", PNG), ("1.cls", b"cat")],
        "needs one picture, it has 1.png, 1.jpg",
    ),
    "the same file twice": ([("1.png", PNG), ("1.png", PNG), ("1.cls", b"cat")], "needs one picture"),
    "no JSON": ([("1.png", PNG), ("1.json", b"{")], r"x\.tar: 1\.json is no JSON"),
    "JSON without a label": ([("1.png", PNG), ("1.json", b'{"class": 3}')], "sample '1' has no label"),
    "JSON that is a list": ([("1.png", PNG), ("1.json", b"[3]")], "sample '1' has no label"),
    "a label that is no text": (
        [("1.png", PNG), ("1.json", b'{"label": [3]}')],
        "label is list, expected text",
    ),
    "a label in another encoding": ([("1.png", PNG), ("1.cls", b"\xff\xfe")], r"1\.cls: .*can't decode"),
    "a gigantic label": (
        [("1.png", PNG), ("1.cls", b"x" * 2_000_000)],
        "2000000 bytes, too many for a label",
    ),
}


@pytest.mark.parametrize("name", TAR_FAULTS)
def test_an_unusable_shard_is_named(name: str, tmp_path: Path) -> None:
    entries, fault = TAR_FAULTS[name]
    with pytest.raises(InvalidDataset, match=fault):
        open_source(write_tar(tmp_path / "x.tar", entries))


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-000", "train"),
        ("training_0", "train"),
        ("val", "val"),
        ("valid-0", "val"),
        ("validation-00000-of-00002", "val"),
        ("test0", "test"),
        ("testing-0", "test"),
        ("trainval-0", "train"),
        ("birds-0", "train"),
    ],
)
def test_a_shard_is_of_the_split_that_its_name_begins_with(name: str, split: str, tmp_path: Path) -> None:
    write_tar(tmp_path / f"{name}.tar", [("1.png", PNG), ("1.cls", b"cat")])
    assert [one.split for one in open_source(tmp_path, to_train=False).pictures] == [split]


def test_a_shard_of_another_word_is_of_training_pictures(tmp_path: Path) -> None:
    for one in ("a-0", "valley-0", "trains-0", "testudo-0", "devices-0"):
        write_tar(tmp_path / f"{one}.tar", [(f"{one}.png", PNG), (f"{one}.cls", b"cat")])
    assert {one.split for one in open_source(tmp_path, to_train=False).pictures} == {"train"}


@pytest.mark.parametrize("name", ["Test-0", "tests-0", "TRAINING-0", "valset-0", "dev-0"])
def test_a_shard_that_resembles_a_split_is_refused_beside_others(name: str, tmp_path: Path) -> None:
    for one in ("a-0", name):
        path = write_tar(tmp_path / f"{one}.tar", [("1.png", PNG), ("1.cls", b"cat")])
    with pytest.raises(InvalidDataset, match=f"{name}.tar looks like a split; expected train-"):
        open_source(tmp_path, to_train=False)
    assert open_source(path, to_train=False).pictures[0].split == "train"


def test_files_of_no_sample_are_passed_over(tmp_path: Path, samples: list[Sample]) -> None:
    entries = [("README", b"hello"), (".hidden", b"")]
    for i, one in enumerate(samples):
        entries += [(f"{i:04d}.png", one.data), (f"{i:04d}.cls", one.label.encode() + b"\n")]
    source = open_source(write_tar(tmp_path / "x.tar", entries))
    assert [one.label for one in source.pictures] == [s.label for s in samples]
    assert {one.split for one in source.pictures} == {"train"}


def test_a_compressed_or_damaged_shard_is_refused(tmp_path: Path, samples: list[Sample]) -> None:
    entries = [(f"{i}.png", s.data) for i, s in enumerate(samples)]
    packed = write_tar(tmp_path / "x.tar", entries, "w:gz")
    with pytest.raises(InvalidDataset, match=r"is no readable tar file.*must be decompressed"):
        open_source(packed)
    (tmp_path / "y.tar").write_bytes(b"no tar at all" * 100)
    with pytest.raises(InvalidDataset, match="is no readable tar file"):
        open_source(tmp_path / "y.tar")


def test_a_shard_cut_short_is_refused(tmp_path: Path, samples: list[Sample]) -> None:
    entries = [
        entry
        for i, s in enumerate(samples)
        for entry in ((f"{i:03d}.cls", s.label.encode()), (f"{i:03d}.png", s.data))
    ]
    path = write_tar(tmp_path / "x.tar", entries)
    source = open_source(path)
    last = source.pictures[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: last.path.offset + 10])  # type: ignore[attr-defined]
    with pytest.raises(InvalidImage, match="the tar file ends after 10 of its"):
        last.path.read_bytes()


# -- faults of data sets -----------------------------------------------------------------------------


def saved(folder: Path, features: datasets.Features | None = None, **columns: list[Any]) -> str:
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(folder / "saved")
    return f"hf:{folder / 'saved'}"


def images(samples: list[Sample], num: int = 6) -> list[dict[str, Any]]:
    return [{"bytes": s.data, "path": None} for s in samples[:num]]


def image_features(**others: Any) -> datasets.Features:
    return datasets.Features({"picture": datasets.Image(), **others})


def test_columns_are_found_by_their_kind_or_named(tmp_path: Path, samples: list[Sample]) -> None:
    kinds = image_features(fine=datasets.ClassLabel(names=["x", "y"]), note=datasets.Value("string"))
    columns = {"picture": images(samples), "fine": [0, 1] * 3, "note": ["p", "p", "q"] * 2}
    source = saved(tmp_path, kinds, **columns)
    assert open_source(source).labels == ("x", "y")
    assert open_source(f"{source}?label=note").labels == ("p", "q")
    with pytest.raises(InvalidDataset, match=r"which column is the label\? .* from picture, fine, note"):
        open_source(f"{source}?label=coarse")
    with pytest.raises(InvalidDataset, match="column 'note' holds no pictures"):
        open_source(f"{source}?image=note")


def test_a_column_called_image_that_holds_none_is_passed_over(tmp_path: Path, samples: list[Sample]) -> None:
    kinds = image_features(image=datasets.Value("string"), label=datasets.Value("string"))
    columns = {"picture": images(samples), "image": ["a.png"] * 6, "label": ["x", "y"] * 3}
    source = open_source(saved(tmp_path, kinds, **columns))
    assert [one.path.read_bytes() for one in source.pictures] == [s.data for s in samples[:6]]


def test_rows_without_a_label_are_named(tmp_path: Path, samples: list[Sample]) -> None:
    kinds = image_features(label=datasets.ClassLabel(names=["x", "y"]))
    source = saved(tmp_path, kinds, picture=images(samples), label=[0, 1, 0, 1, -1, 0])
    with pytest.raises(InvalidDataset, match="split train row 4 has no label"):
        open_source(source)


def test_labels_that_are_no_classes_are_refused(tmp_path: Path, samples: list[Sample]) -> None:
    kinds = image_features(label=datasets.Value("float32"))
    with pytest.raises(InvalidDataset, match=r"column 'label' is .*float32.*, expected classes"):
        open_source(saved(tmp_path, kinds, picture=images(samples), label=[0.5] * 6))


def test_rows_without_a_picture_are_skipped(
    tmp_path: Path, samples: list[Sample], tiny_backbone: Backbone
) -> None:
    kinds = image_features(label=datasets.Value("string"))
    pictures = [*images(samples), None]
    source = saved(tmp_path, kinds, picture=pictures, label=["x", "y", "x", "y", "x", "y", "x"])
    features = extract(source, tiny_backbone, tmp_path / "cache", max_corrupt_fraction=0.2)
    assert features.skipped == ("split train row 6: holds no picture",)


def test_splits_are_chosen(tmp_path: Path, samples: list[Sample]) -> None:
    parts = dataset_of(samples)
    parts["unsupervised"] = parts["test"]
    parts.save_to_disk(tmp_path / "saved")
    with pytest.raises(
        InvalidDataset, match=r"has splits train, validation, test, unsupervised; 'unsupervised'"
    ):
        open_source(tmp_path / "saved")
    source = open_source(f"hf:{tmp_path / 'saved'}?split=test,train")
    assert [one.split for one in source.pictures] == ["train"] * 24 + ["test"] * 3
    with pytest.raises(InvalidDataset, match="'dev' is none of them"):
        open_source(f"hf:{tmp_path / 'saved'}?split=dev")


@pytest.mark.parametrize("source", ["hf:", "hf:x?columns=3", "hf:x?label="])
def test_an_unreadable_name_says_what_was_expected(source: str) -> None:
    with pytest.raises(InvalidDataset, match="expected hf:NAME"):
        open_source(source)


def test_a_data_set_that_cannot_be_had_is_named() -> None:
    with pytest.raises(InvalidDataset, match="hf:nobody/nothing cannot be loaded"):
        open_source("hf:nobody/nothing")


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InvalidDataset, match=r"needs datasets: pip install 'tosca-serving\[datasets\]'"):
        open_source("hf:uoft-cs/cifar10")
