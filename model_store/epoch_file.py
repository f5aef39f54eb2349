"""An epoch in the store: one record of what its tasks say together, and listings of what weighs each.

They are derived from the modules, and spare a replica that starts from reading them all.
"""
# K classes of all tasks, C classes of one, D features, P = D(D+1)/2, N calibration vectors

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from model_store.blend import Blend
from model_store.deferred import ListedFile, ModuleCache
from model_store.epoch import Epoch
from model_store.errors import CorruptStore
from model_store.manifest import ModuleManifest, Sha256
from model_store.statistics import PooledStatistics, packed_size

LISTED_TASKS = 1000  # of one listing


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    num_images: int = Field(ge=0)
    num_classes: int = Field(ge=1)
    sharpness: float
    module_weight: float
    score_weight: float
    listings: tuple[Sha256, ...]


class ListedTask(BaseModel):
    """What a listing says of one task, beside its class means."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    sha256: Sha256
    size_bytes: int = Field(ge=0)
    num_known: int = Field(ge=0)
    manifest: ModuleManifest


@dataclass(frozen=True, slots=True)
class EpochRecord:
    """The record of an epoch as it lies in the store, and the digests of its listings."""

    epoch: Epoch
    listings: tuple[str, ...]

    def to_bytes(self) -> bytes:
        """Equal content gives equal bytes."""
        epoch = self.epoch
        record = _Record(
            num_images=epoch.pooled.num_images,
            num_classes=epoch.pooled.num_classes,
            listings=self.listings,
            **asdict(epoch.blend),
        )
        tensors = {
            "scatter": epoch.pooled.scatter_P,
            "centre": epoch.centre_D,
            "true_probability": epoch.true_probability_N,
        }
        return _save(tensors, record.model_dump_json())

    @classmethod
    def from_bytes(cls, data: bytes, feature_dim: int, sha256s: Iterable[str]) -> "EpochRecord":
        """For the modules `sha256s`, of the revision that began the epoch. Raises CorruptStore."""
        tensors, text = _load(data)
        record = _record(text)
        try:
            scatter_P, centre_D, true_probability_N = (
                tensors[name] for name in ("scatter", "centre", "true_probability")
            )
            if scatter_P.shape != (packed_size(feature_dim),) or centre_D.shape != (feature_dim,):
                raise ValueError(f"its tensors are not those of {feature_dim} features")
            types = (scatter_P.dtype, centre_D.dtype, true_probability_N.dtype)
            if types != (torch.int64, torch.float64, torch.float64):
                raise ValueError("its tensors are of other types")
        except (KeyError, ValueError) as error:
            raise CorruptStore(f"the record of an epoch cannot be read: {error}") from error
        epoch = Epoch(
            pooled=PooledStatistics(scatter_P, record.num_images, record.num_classes),
            centre_D=centre_D,
            blend=Blend(record.sharpness, record.module_weight, record.score_weight),
            true_probability_N=true_probability_N,
            sha256s=frozenset(sha256s),
        )
        return cls(epoch, record.listings)


def write_listings(files: Sequence[ListedFile]) -> Iterator[bytes]:
    """Files that list LISTED_TASKS tasks each: class means, and what the bank asks of a module."""
    for start in range(0, len(files), LISTED_TASKS):
        some = files[start : start + LISTED_TASKS]
        listed = [
            ListedTask(
                sha256=file.sha256,
                size_bytes=file.size_bytes,
                num_known=file.module.num_known,
                manifest=file.manifest,
            ).model_dump(mode="json")
            for file in some
        ]
        yield _save({"mean": torch.cat([file.module.mean_KD for file in some])}, json.dumps(listed))


def read_listing(data: bytes, cache: ModuleCache) -> list[ListedFile]:
    """The tasks of a listing, whose modules `cache` reads. Raises CorruptStore."""
    listed, mean_KD = _read_listing(data)
    sizes = [len(one.manifest.labels) for one in listed]
    return [
        ListedFile.of(
            one.manifest,
            sha256=one.sha256,
            mean_KD=mean_CD,
            num_known=one.num_known,
            size_bytes=one.size_bytes,
            cache=cache,
        )
        for one, mean_CD in zip(listed, mean_KD.split(sizes), strict=True)
    ]


def read_listed_tasks(data: bytes) -> list[ListedTask]:
    """The tasks of a listing without what weighs them. Raises CorruptStore."""
    return _read_listing(data)[0]


def listing_digests(data: bytes) -> tuple[str, ...]:
    """The digests of an epoch's listings, of its record. Raises CorruptStore."""
    return _record(_load(data)[1]).listings


def _read_listing(data: bytes) -> tuple[list[ListedTask], Tensor]:
    tensors, text = _load(data)
    try:
        listed = [ListedTask.model_validate(one) for one in json.loads(text)]
        mean_KD = tensors["mean"]
        if mean_KD.dtype != torch.float32 or len(mean_KD) != sum(len(one.manifest.labels) for one in listed):
            raise ValueError("its class means are not those of the tasks")
    except (KeyError, ValueError, ValidationError, TypeError) as error:
        raise CorruptStore(f"a listing of tasks cannot be read: {error}") from error
    return listed, mean_KD


def _record(text: str) -> _Record:
    try:
        return _Record.model_validate_json(text)
    except ValidationError as error:
        raise CorruptStore(f"the record of an epoch cannot be read: {error}") from error


def _save(tensors: dict[str, Tensor], text: str) -> bytes:
    data = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return safetensors.torch.save(data, {"content": text})


def _load(data: bytes) -> tuple[dict[str, Tensor], str]:
    try:
        tensors = safetensors.torch.load(data)
        (header_bytes,) = struct.unpack("<Q", data[:8])
        header: dict[str, Any] = json.loads(data[8 : 8 + header_bytes])
        return tensors, str(header["__metadata__"]["content"])
    except (safetensors.SafetensorError, struct.error, ValueError, KeyError) as error:
        raise CorruptStore(f"no safetensors file with content: {error}") from error
