"""Batches of pictures to their CLS vectors, with the next batches on their way while one is embedded.

Two places where the backbone may run: this process (`LocalEmbedding`) and a Ray cluster (`ray_embedding`).
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from model_store.backbone import Backbone
from model_store.compute_threads import use_one_compute_thread
from model_store.decoding import ImageLimits
from model_store.errors import InvalidImage
from model_store.preprocess import load_pixels, stack_pixels
from training.pictures import PicturePath

BATCH_SIZE = 16  # on the CPU, where larger batches gain nothing
CUDA_BATCH_SIZE = 128
# Batches being decoded while one is embedded: a run of large pictures then starves no pass.
_BATCHES_AHEAD = 2

Item = tuple[str, PicturePath]  # SHA-256 of a picture, and where it lies
Embedded = dict[str, Tensor | str]  # by SHA-256: a CLS vector, or why there is none


class HasItems(Protocol):
    @property
    def items(self) -> list[Item]:
        """What is to be embedded together; may be empty."""


Batch = TypeVar("Batch", bound=HasItems)


class Embedding(Protocol):
    @property
    def batch_size(self) -> int:
        """Pictures a pass."""

    def embed_ahead(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Embedded]]:
        """Every batch with its vectors, in order. Takes a bounded number of batches in advance."""


def batch_size_on(device: torch.device) -> int:
    return CUDA_BATCH_SIZE if device.type == "cuda" else BATCH_SIZE


def embed_batch(backbone: Backbone, pixels: Iterable[tuple[str, Tensor | str]]) -> Embedded:
    """The vectors of decoded pictures, in one pass; faults are handed through."""
    decoded = dict(pixels)
    good = {sha256: one for sha256, one in decoded.items() if isinstance(one, Tensor)}
    if not good:
        return {**decoded}
    cls_BD = backbone.embed(stack_pixels(list(good.values()))).cpu()
    return {**decoded, **dict(zip(good, cls_BD, strict=True))}


class LocalEmbedding:
    """In this process: a pool of threads decodes, the caller's thread embeds."""

    def __init__(self, backbone: Backbone, limits: ImageLimits, num_threads: int) -> None:
        self._backbone = backbone
        self._limits = limits
        self._num_threads = num_threads
        self.batch_size = batch_size_on(backbone.device)

    def embed_ahead(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Embedded]]:
        ahead: deque[tuple[Batch, list[Future[tuple[str, Tensor | str]]]]] = deque()
        with ThreadPoolExecutor(self._num_threads, "decode", use_one_compute_thread) as pool:
            for batch in batches:
                ahead.append((batch, [pool.submit(self._decode, item) for item in batch.items]))
                if len(ahead) > _BATCHES_AHEAD:
                    yield self._embed(*ahead.popleft())
            while ahead:
                yield self._embed(*ahead.popleft())

    def _embed(
        self, batch: Batch, pictures: list[Future[tuple[str, Tensor | str]]]
    ) -> tuple[Batch, Embedded]:
        return batch, embed_batch(self._backbone, (one.result() for one in pictures))

    def _decode(self, item: Item) -> tuple[str, Tensor | str]:
        sha256, path = item
        try:
            return sha256, load_pixels(path.read_bytes(), self._backbone.preprocessing, self._limits)
        except (InvalidImage, OSError) as error:
            return sha256, str(error)
