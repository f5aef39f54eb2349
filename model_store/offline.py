"""Answering pictures without a server, through the same bank and the same preprocessing."""

from collections.abc import Sequence

import torch

from model_store.answers import Answer
from model_store.backbone_loading import load_backbone
from model_store.bank import ModuleBank
from model_store.decoding import ImageLimits
from model_store.preprocess import load_pixels
from model_store.publishing import Publisher
from model_store.selection import Selection
from model_store.store import ModelStore

BATCH_SIZE = 16


class OfflinePredictor:
    """The newest revision of a store (or the one asked for) on one device."""

    def __init__(
        self,
        store: ModelStore,
        *,
        revision: int | None = None,
        device: str = "auto",
        runtime: str = "auto",
        limits: ImageLimits | None = None,
    ) -> None:
        head = store.require_head() if revision is None else store.revision(revision)
        self.limits = limits or ImageLimits()
        self.backbone = load_backbone(store, head.backbone_fingerprint, device=device, runtime=runtime)
        self.bank: ModuleBank = Publisher(store, self.backbone.device, revision=revision).active.bank

    def answer(
        self,
        pictures: Sequence[bytes],
        *,
        selection: Selection = "lda",
        task: str | None = None,
        top_k: int = 5,
        coverage: float | None = None,
        abstain_level: float = 0.0,
    ) -> list[Answer]:
        """Answer encoded pictures as `ModuleBank.answer` does. Raises InvalidImage too."""
        answers: list[Answer] = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = pictures[start : start + BATCH_SIZE]
            pixels = [load_pixels(data, self.backbone.preprocessing, self.limits) for data in batch]
            cls_BD = self.backbone.embed(torch.stack(pixels))
            answers += self.bank.answer(
                cls_BD,
                selection=selection,
                task=task,
                top_k=top_k,
                coverage=coverage,
                abstain_level=abstain_level,
            )
        return answers
