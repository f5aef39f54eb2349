"""Labelled pictures: where they come from, found and judged before anything is computed.

Accepted sources:

- `FOLDER/CLASS/*.jpg`                      (all pictures train; the held-out figures are cross-fitted)
- `FOLDER/{train,val,test}/CLASS/*.jpg`     (`train` required; `val` and `test` optional)
- a `.csv` file of paths: `manifests`; a `.parquet` file of paths or of pictures: `parquet`
- a WebDataset `.tar` file, or a folder of them: `webdataset`
- a folder that `datasets` saved, or `hf:NAME`: `hf_datasets`
"""

import unicodedata
from pathlib import Path

from model_store.decoding import IMAGE_SUFFIXES
from model_store.errors import InvalidDataset
from training import hf_datasets, webdataset
from training.manifests import read_csv
from training.pictures import SPLITS, LabelledPicture, PictureSource, Split, check_counts, in_order

SourceName = str | Path  # as `tosca train --data` takes it
FILE_SUFFIXES = (".csv", ".parquet", ".tar")
_NAMES_OF_SPLITS = {*SPLITS, "training", "valid", "validation", "dev", "testing"}  # in any case


def locate(name: str, folder: Path) -> SourceName:
    """A source as a file in `folder` names it."""
    return name if name.startswith(hf_datasets.PREFIX) else folder / name


def open_source(name: SourceName, *, min_images_per_class: int = 2, to_train: bool = True) -> PictureSource:
    """Find the pictures of a source and judge its labels. Raises InvalidDataset.

    With `to_train` off, a source may have any split and any number of classes and pictures.
    """
    path = Path(name)
    if str(name).startswith(hf_datasets.PREFIX):
        pictures = hf_datasets.read_named(str(name))
    elif path.is_dir():
        pictures = _read_folder(path)
    elif path.suffix.lower() in FILE_SUFFIXES and path.is_file():
        pictures = _read_file(path)
    elif path.exists():
        raise InvalidDataset(
            f"{path}: expected a folder of class folders, or a {', '.join(FILE_SUFFIXES)} file"
        )
    else:
        raise InvalidDataset(f"{path} does not exist")
    if not pictures:
        raise InvalidDataset(
            f"{path} holds no pictures: expected CLASS/*.jpg or {{train,val,test}}/CLASS/*.jpg "
            f"with suffixes {', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    labels = tuple(sorted({one.label for one in pictures}))
    _check_spelling(path, labels)
    if to_train:
        check_counts(path, pictures, labels, min_images_per_class)
    return PictureSource(_name_of(name), tuple(pictures), labels)


def _name_of(name: SourceName) -> str:
    path = Path(name)
    if str(name).startswith(hf_datasets.PREFIX):
        return str(name)
    return path.stem if path.is_file() else path.resolve().name


def _read_folder(path: Path) -> list[LabelledPicture]:
    if hf_datasets.is_saved(path):
        return hf_datasets.read_saved(path)
    if shards := webdataset.shards_of(path):
        return webdataset.read_shards(shards)
    return in_order(_scan_folder(path))


def _read_file(path: Path) -> list[LabelledPicture]:
    if path.suffix.lower() == ".tar":
        return webdataset.read_shards([path])
    if path.suffix.lower() == ".csv":
        return read_csv(path)
    from training.parquet import read_parquet  # pyarrow takes a moment to import

    return read_parquet(path)


def _scan_folder(root: Path) -> list[LabelledPicture]:
    folders = sorted(child for child in root.iterdir() if child.is_dir() and not child.name.startswith("."))
    names = {folder.name for folder in folders}
    if names and {name.casefold() for name in names} <= _NAMES_OF_SPLITS and not names <= {*SPLITS}:
        raise InvalidDataset(
            f"{root}: {', '.join(sorted(names))} look like splits; expected {', '.join(SPLITS)}"
        )
    if any(folder.name in SPLITS for folder in folders):
        strangers = [folder.name for folder in folders if folder.name not in SPLITS]
        if strangers:
            raise InvalidDataset(f"{root} mixes split folders with others: {', '.join(strangers[:5])}")
        splits: list[tuple[Split, Path]] = [
            (split, root / split) for split in SPLITS if (root / split).is_dir()
        ]
    else:
        splits = [("train", root)]
    pictures = []
    for split, folder in splits:
        for class_folder in sorted(child for child in folder.iterdir() if child.is_dir()):
            if class_folder.name.startswith("."):
                continue
            found = [
                LabelledPicture(file, class_folder.name, split)
                for file in sorted(class_folder.rglob("*"))
                if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()
            ]
            if not found and split == "train":
                raise InvalidDataset(f"class folder {class_folder} holds no pictures")
            pictures += found
    return pictures


def _check_spelling(path: Path, labels: tuple[str, ...]) -> None:
    seen: dict[str, str] = {}
    for label in labels:
        folded = unicodedata.normalize("NFKC", label).strip().casefold()
        if folded in seen:
            raise InvalidDataset(
                f"{path}: class names {seen[folded]!r} and {label!r} are the same but for spelling"
            )
        seen[folded] = label
