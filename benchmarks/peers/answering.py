"""What every peer does with a picture: the project's own decoding, backbone and bank, and the same answer."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from model_store.backbone import Backbone
from model_store.backbone_loading import load_backbone
from model_store.bank import ModuleBank
from model_store.decoding import ImageLimits
from model_store.preprocess import load_pixels
from model_store.publishing import Publisher
from model_store.runtimes.runtime import runtime_kind
from model_store.store import ModelStore

LIMITS = ImageLimits()


class Answering:
    """Backbone and bank of a store, for one thread."""

    def __init__(self, store_url: str, num_threads: int, max_batch_size: int) -> None:
        torch.set_num_threads(num_threads)
        store = ModelStore(store_url)
        self._backbone: Backbone = load_backbone(store, num_threads=num_threads)
        if runtime_kind(self._backbone.runtime_name).engine != "torch":
            torch.set_num_threads(1)  # beside the threads of another engine they cost more than they do
        self._bank: ModuleBank = Publisher(store).active.bank
        side = self._backbone.preprocessing.height
        for batch_size in range(1, max_batch_size + 1):
            self._backbone.embed(torch.zeros((batch_size, 3, side, side), dtype=torch.uint8))

    def decode(self, data: bytes) -> Tensor:
        return load_pixels(data, self._backbone.preprocessing, LIMITS)

    def answer(self, pixels: Sequence[Tensor]) -> list[dict[str, Any]]:
        cls_BD = self._backbone.embed(torch.stack(list(pixels)))
        return [asdict(one) for one in self._bank.answer(cls_BD)]
