"""The backbone on a Ray cluster: one in every worker, and batches of pictures go round between them."""

import itertools
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from model_store.backbone_loading import load_backbone
from model_store.decoding import ImageLimits
from model_store.errors import InvalidImage, ToscaError
from model_store.preprocess import load_pixels
from model_store.store import ModelStore
from training.embedding import Batch, Embedded, Item, batch_size_on, embed_batch

# Enough that a worker has the next batch before it has answered this one.
_BATCHES_A_WORKER = 2
_ATTEMPTS_AFTER_LOSS = 3
# Half a processor, and half for a training job: neither has to wait until the other has ended.
CPUS_OF_A_WORKER = 0.5
# What crosses the border between processes is arrays and bytes.
_Sent = list[tuple[str, bytes | str]]  # SHA-256, the encoded picture or why there is none
_Returned = dict[str, NDArray[np.float32] | str]


@dataclass(frozen=True, slots=True)
class EmbeddingKind:
    """What decides the vectors, and so where they are cached; and how many pictures a pass takes."""

    fingerprint: str
    variant: str
    feature_dim: int
    batch_size: int


class RemoteBackbone:
    """In a worker: a backbone, and the decoding before it, on the processors that Ray gave the worker."""

    def __init__(self, store_url: str, device: str, runtime: str, num_threads: int) -> None:
        torch.set_num_threads(num_threads)
        self._backbone = load_backbone(
            ModelStore(store_url), device=device, runtime=runtime, num_threads=num_threads
        )

    def kind(self) -> EmbeddingKind:
        one = self._backbone
        return EmbeddingKind(one.fingerprint, one.variant, one.feature_dim, batch_size_on(one.device))

    def embed(self, pictures: _Sent) -> _Returned:
        embedded = embed_batch(self._backbone, ((sha256, self._decode(one)) for sha256, one in pictures))
        return {sha256: one if isinstance(one, str) else one.numpy() for sha256, one in embedded.items()}

    def _decode(self, picture: bytes | str) -> torch.Tensor | str:
        if isinstance(picture, str):
            return picture
        try:
            return load_pixels(picture, self._backbone.preprocessing, ImageLimits())
        except InvalidImage as error:
            return str(error)


class RayEmbedding:
    """To be used inside `ray_session`. A batch whose worker is lost is embedded again by its successor."""

    def __init__(
        self,
        store_url: str,
        *,
        device: str,
        runtime: str,
        num_workers: int,
        num_gpus_each: float,
        num_threads: int = 1,
    ) -> None:
        """Starts the workers, and waits for the first one. Raises what loading the backbone there does."""
        remote = ray.remote(RemoteBackbone).options(
            num_cpus=CPUS_OF_A_WORKER,
            num_gpus=num_gpus_each,
            max_restarts=_ATTEMPTS_AFTER_LOSS,
            max_task_retries=_ATTEMPTS_AFTER_LOSS,
        )
        self._workers: list[Any] = [
            remote.remote(store_url, device, runtime, num_threads) for _ in range(num_workers)
        ]
        try:
            self.kind: EmbeddingKind = ray.get(self._workers[0].kind.remote())
        except ray.exceptions.RayActorError as error:
            raise ToscaError(f"no worker could load the backbone: {_last_line(error)}") from error
        self.batch_size = self.kind.batch_size

    def embed_ahead(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Embedded]]:
        ahead: deque[tuple[Batch, Any]] = deque()
        for batch, worker in zip(batches, itertools.cycle(self._workers), strict=False):
            ahead.append((batch, worker.embed.remote([_read(one) for one in batch.items])))
            if len(ahead) > _BATCHES_A_WORKER * len(self._workers):
                yield _received(*ahead.popleft())
        while ahead:
            yield _received(*ahead.popleft())


def _received(batch: Batch, answer: Any) -> tuple[Batch, Embedded]:
    returned: _Returned = ray.get(answer)
    return batch, {
        sha256: one if isinstance(one, str) else torch.from_numpy(one.copy())
        for sha256, one in returned.items()
    }


def _read(item: Item) -> tuple[str, bytes | str]:
    """The picture's bytes, read here: workers need no way to where it lies."""
    sha256, path = item
    try:
        return sha256, path.read_bytes()
    except (InvalidImage, OSError) as error:
        return sha256, str(error)


def _last_line(error: Exception) -> str:
    return str(error).strip().splitlines()[-1]
