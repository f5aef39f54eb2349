"""What every peer does with a picture: decode it, embed it in one of two engines, ask the project's bank."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.arguments import Arguments
from benchmarks.peers.ordinary import ordinary_backbone, ordinary_pixels, ordinary_stack
from model_store.backbone_loading import load_backbone
from model_store.bank import ModuleBank
from model_store.decoding import ImageLimits
from model_store.preprocess import load_pixels, stack_pixels
from model_store.publishing import Publisher
from model_store.runtimes.runtime import runtime_kind
from model_store.store import ModelStore

LIMITS = ImageLimits()


class Answering:
    """Backbone and bank of a store, for one thread, in the engine that the arguments name."""

    def __init__(self, arguments: Arguments, num_threads: int, max_batch_size: int) -> None:
        torch.set_num_threads(num_threads)
        store = ModelStore(arguments.store)
        if arguments.engine == "ours":
            self._backbone = load_backbone(store, num_threads=num_threads)
            self._to_pixels, self._stack = load_pixels, stack_pixels
        else:
            artefact = store.backbone(store.require_head().backbone_fingerprint)
            export = Path(arguments.export).read_bytes() if arguments.export else None
            self._backbone = ordinary_backbone(artefact, arguments.runtime, export, num_threads)
            self._to_pixels, self._stack = ordinary_pixels, ordinary_stack
        on_cuda = self._backbone.device.type == "cuda"
        if on_cuda or runtime_kind(self._backbone.runtime_name).engine != "torch":
            torch.set_num_threads(1)  # where they compute no passes, they cost more than they do
        self._bank: ModuleBank = Publisher(store).active.bank
        side = self._backbone.preprocessing.height
        for batch_size in range(1, max_batch_size + 1):
            self._backbone.embed(torch.zeros((batch_size, 3, side, side), dtype=torch.uint8))

    def decode(self, data: bytes) -> Tensor:
        return self._to_pixels(data, self._backbone.preprocessing, LIMITS)

    def answer(self, pixels: Sequence[Tensor]) -> list[dict[str, Any]]:
        cls_BD = self._backbone.embed(self._stack(pixels))
        return [asdict(one) for one in self._bank.answer(cls_BD)]
