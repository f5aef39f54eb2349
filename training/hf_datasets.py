"""Data sets of Hugging Face's `datasets` (extra `datasets`): saved on disk, or by name from its hub.

    hf:uoft-cs/cifar10
    hf:uoft-cs/cifar100?label=fine_label&split=train,test
    pictures/saved                 a folder that `save_to_disk` wrote

`config` and `revision` choose what is loaded, `split` which of its splits (default: all), `image` and `label`
its columns (default: those of these names, else its one of pictures and its one of classes). Pictures stay in
the memory-mapped Arrow files as they were encoded and are read one at a time.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from model_store.errors import InvalidDataset, InvalidImage
from training.pictures import LabelledPicture, Split

PREFIX = "hf:"
_OPTIONS = ("config", "revision", "split", "image", "label")
_SPLITS: dict[str, Split] = {
    "train": "train",
    "validation": "val",
    "val": "val",
    "valid": "val",
    "test": "test",
}


@dataclass(frozen=True, slots=True)
class DatasetCell:
    """One picture of a data set."""

    dataset: Any = field(repr=False)
    column: str
    row: int
    split: str

    def read_bytes(self) -> bytes:
        cell = self.dataset[self.row][self.column] or {}
        data = cell.get("bytes")
        if data is None and cell.get("path"):
            return Path(cell["path"]).read_bytes()
        if not isinstance(data, bytes):
            raise InvalidImage("holds no picture")
        return data

    def __str__(self) -> str:
        return f"split {self.split} row {self.row}"


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` wrote a folder."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def read_saved(folder: Path) -> list[LabelledPicture]:
    """The pictures of a folder that `save_to_disk` wrote. Raises InvalidDataset."""
    datasets = _library(str(folder))
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # damaged Arrow files and metadata surface as many types
        raise InvalidDataset(f"{folder} cannot be loaded: {error}") from error
    return _pictures(datasets, str(folder), loaded, {})


def read_named(source: str) -> list[LabelledPicture]:
    """The pictures of `hf:NAME?OPTIONS`; NAME is one of the hub or a local folder. Raises InvalidDataset."""
    name, _, query = source.removeprefix(PREFIX).partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    unknown = [one for one in options if one not in _OPTIONS]
    if not name or unknown or not all(options.values()):
        raise InvalidDataset(
            f"{source}: expected hf:NAME, and after ? any of {', '.join(_OPTIONS)}, as in a URL"
        )
    datasets = _library(source)
    try:
        if is_saved(Path(name)):
            loaded = datasets.load_from_disk(name)
        else:
            loaded = datasets.load_dataset(name, options.get("config"), revision=options.get("revision"))
    except Exception as error:  # hub clients and builders raise their own families of errors
        raise InvalidDataset(f"{source} cannot be loaded: {error}") from error
    return _pictures(datasets, source, loaded, options)


def _library(source: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise InvalidDataset(f"{source} needs datasets: pip install 'tosca-serving[datasets]'") from error
    return datasets


def _pictures(datasets: Any, source: str, loaded: Any, options: Mapping[str, str]) -> list[LabelledPicture]:
    parts = loaded if isinstance(loaded, dict) else {str(loaded.split or "train"): loaded}
    wanted = options["split"].split(",") if "split" in options else list(parts)
    for name in wanted:
        if name not in parts or name not in _SPLITS:
            raise InvalidDataset(
                f"{source} has splits {', '.join(parts)}; {name!r} is none of them that can be trained or "
                f"tested on. Choose with ?split=, from {', '.join(_SPLITS)}"
            )
    return [
        one
        for name in sorted(wanted, key=list(_SPLITS).index)
        for one in _pictures_of_split(datasets, source, parts[name], name, options)
    ]


def _pictures_of_split(
    datasets: Any, source: str, dataset: Any, name: str, options: Mapping[str, str]
) -> Iterator[LabelledPicture]:
    image = _column(dataset, source, "image", options, datasets.Image)
    label = _column(dataset, source, "label", options, datasets.ClassLabel)
    if not isinstance(dataset.features[image], datasets.Image):
        raise InvalidDataset(f"{source}: column {image!r} holds no pictures but {dataset.features[image]}")
    encoded = dataset.select_columns([image]).cast_column(image, datasets.Image(decode=False))
    kind = dataset.features[label]
    for row, value in enumerate(dataset.select_columns([label])[label]):
        if isinstance(kind, datasets.ClassLabel):
            text = kind.names[value] if value is not None and 0 <= value < len(kind.names) else ""
        elif value is None or isinstance(value, str | int):
            text = "" if value is None else str(value)
        else:
            raise InvalidDataset(f"{source}: column {label!r} is {kind}, expected classes, text or numbers")
        if not text.strip():
            raise InvalidDataset(f"{source}: split {name} row {row} has no label")
        yield LabelledPicture(DatasetCell(encoded, image, row, name), text, _SPLITS[name])


def _column(dataset: Any, source: str, role: str, options: Mapping[str, str], kind: type) -> str:
    """The column named in the options, else the one called as its role, else the only one of its kind."""
    features = dataset.features
    of_kind = [name for name, feature in features.items() if isinstance(feature, kind)]
    chosen = options.get(role)
    if chosen is None and role in (features if role == "label" else of_kind):  # labels may be text, too
        chosen = role
    elif chosen is None and len(of_kind) == 1:
        chosen = of_kind[0]
    if chosen is None or chosen not in features:
        raise InvalidDataset(
            f"{source}: which column is the {role}? Name it with ?{role}=, from {', '.join(features)}"
        )
    return chosen
