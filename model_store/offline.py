"""Answering pictures without a server, through the same bank and the same preprocessing."""

from collections.abc import Sequence

from torch import Tensor

from model_store.answers import Answer
from model_store.backbone_loading import load_backbone
from model_store.bank import ModuleBank
from model_store.decoding import ImageLimits
from model_store.errors import InvalidImage
from model_store.preprocess import load_pixels, stack_pixels
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
        num_threads: int = 0,
    ) -> None:
        head = store.require_head() if revision is None else store.revision(revision)
        self.limits = limits or ImageLimits()
        self.backbone = load_backbone(
            store, head.backbone_fingerprint, device=device, runtime=runtime, num_threads=num_threads
        )
        self.bank: ModuleBank = Publisher(store, revision=revision).active.bank

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
        answers = self.answer_each(
            pictures,
            selection=selection,
            task=task,
            top_k=top_k,
            coverage=coverage,
            abstain_level=abstain_level,
        )
        good = []
        for one in answers:
            if isinstance(one, InvalidImage):
                raise one
            good.append(one)
        return good

    def answer_each(
        self,
        pictures: Sequence[bytes | InvalidImage],
        *,
        selection: Selection = "lda",
        task: str | None = None,
        top_k: int = 5,
        coverage: float | None = None,
        abstain_level: float = 0.0,
    ) -> list[Answer | InvalidImage]:
        """The same, where a picture that cannot be read, or was not, has its fault in its place."""
        answers: list[Answer | InvalidImage] = []
        for start in range(0, len(pictures), BATCH_SIZE):
            batch = [self._pixels(one) for one in pictures[start : start + BATCH_SIZE]]
            pixels = [one for one in batch if isinstance(one, Tensor)]
            answered = iter(
                self.bank.answer(
                    self.backbone.embed(stack_pixels(pixels)),
                    selection=selection,
                    task=task,
                    top_k=top_k,
                    coverage=coverage,
                    abstain_level=abstain_level,
                )
                if pixels
                else ()
            )
            answers += [next(answered) if isinstance(one, Tensor) else one for one in batch]
        return answers

    def _pixels(self, picture: bytes | InvalidImage) -> Tensor | InvalidImage:
        if isinstance(picture, InvalidImage):
            return picture
        try:
            return load_pixels(picture, self.backbone.preprocessing, self.limits)
        except InvalidImage as error:
            return error
