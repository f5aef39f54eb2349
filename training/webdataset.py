"""WebDataset shards: plain tar files of samples, read where they lie.

A sample is the files of one name up to its first dot, one after another: a picture and its label, either as
text in NAME.cls or as `label` in NAME.json.

    000017.jpg  000017.cls

A folder of shards tells splits by their names: train-000.tar (or training-), val-000.tar (or valid-,
validation-), test-000.tar (or testing-). Others are of training pictures.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path, PurePosixPath

from model_store.decoding import IMAGE_SUFFIXES
from model_store.errors import InvalidDataset, InvalidImage
from training.pictures import SPLITS, LabelledPicture, Split

_MAX_LABEL_BYTES = 2**20
_SPLIT = re.compile(r"(?:(train)(?:ing|val)?|(val)(?:id|idation)?|(test)(?:ing)?)(?![a-zA-Z])")
_LIKE_A_SPLIT = re.compile(
    r"(train(ing|set|val)?|val(id|idation|set)?|test(ing|s|set)?|dev(set)?|eval(uation)?)(?![a-z])",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class TarMember:
    """A file inside an uncompressed tar file."""

    tar: Path
    name: str
    offset: int
    size_bytes: int

    def read_bytes(self) -> bytes:
        with self.tar.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.size_bytes)
        if len(data) != self.size_bytes:
            raise InvalidImage(f"the tar file ends after {len(data)} of its {self.size_bytes} bytes")
        return data

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"


def shards_of(folder: Path) -> list[Path]:
    """The tar files of a folder, sorted by name."""
    return sorted(one for one in folder.glob("*.tar") if not one.name.startswith("."))


def read_shards(shards: list[Path]) -> list[LabelledPicture]:
    """The pictures of shards in the order they lie in. Raises InvalidDataset, which names the sample."""
    pictures = []
    for tar in shards:
        split = _split_of(tar)
        if split is None and len(shards) > 1 and _LIKE_A_SPLIT.match(tar.name):
            raise InvalidDataset(f"{tar} looks like a split; expected train-*.tar, val-*.tar or test-*.tar")
        for key, members in groupby(_members(tar), key=_key):
            if key is not None:
                pictures.append(_sample(tar, key, list(members), split or "train"))
    return pictures


def _members(tar: Path) -> Iterator[TarMember]:
    try:
        with tarfile.open(tar, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members.clear()  # type: ignore[attr-defined]  # else it remembers every header
                if member.isreg():
                    yield TarMember(tar, member.name, member.offset_data, member.size)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InvalidDataset(
            f"{tar} is no readable tar file: {error}. A compressed one must be decompressed first"
        ) from error


def _key(member: TarMember) -> str | None:
    """What the files of a sample have in common; None for those that belong to none."""
    path = PurePosixPath(member.name)
    stem = path.name.split(".", 1)[0]
    return str(path.with_name(stem)) if stem and "." in path.name else None


def _sample(tar: Path, key: str, members: list[TarMember], split: Split) -> LabelledPicture:
    suffixes = {member.name[len(key) :].lower(): member for member in members}
    pictures = [member for suffix, member in suffixes.items() if suffix in IMAGE_SUFFIXES]
    if len(pictures) != 1 or len(suffixes) != len(members):
        found = ", ".join(PurePosixPath(member.name).name for member in members)
        raise InvalidDataset(f"{tar}: sample {key!r} needs one picture, it has {found}")
    label = None
    if ".cls" in suffixes:
        label = _text(suffixes[".cls"]).strip()
    elif ".json" in suffixes:
        label = _label_of_json(suffixes[".json"])
    if not label:
        raise InvalidDataset(
            f"{tar}: sample {key!r} has no label: expected {key}.cls, or label in {key}.json"
        )
    return LabelledPicture(pictures[0], label, split)


def _label_of_json(member: TarMember) -> str | None:
    try:
        value = json.loads(_text(member))
    except ValueError as error:
        raise InvalidDataset(f"{member} is no JSON: {error}") from error
    label = value.get("label") if isinstance(value, dict) else None
    if label is not None and not isinstance(label, str | int):
        raise InvalidDataset(f"{member}: label is {type(label).__name__}, expected text or a number")
    return None if label is None else str(label).strip()


def _text(member: TarMember) -> str:
    if member.size_bytes > _MAX_LABEL_BYTES:
        raise InvalidDataset(f"{member} has {member.size_bytes} bytes, too many for a label")
    try:
        return member.read_bytes().decode()
    except (UnicodeDecodeError, InvalidImage) as error:
        raise InvalidDataset(f"{member}: {error}") from error


def _split_of(tar: Path) -> Split | None:
    """The split that a shard's name begins with, if any."""
    found = _SPLIT.match(tar.name)
    return next(split for split in SPLITS if split in found.groups()) if found else None
