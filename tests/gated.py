"""A backbone that waits until a test lets it go on."""

import threading

from torch import Tensor

from model_store.backbone import Backbone


class GatedBackbone:
    """A backbone whose passes wait for `gate`, and fail on a picture whose first pixel is `poison`."""

    def __init__(self, inner: Backbone, poison: int = -1) -> None:
        self.inner = inner
        self.poison = poison
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Semaphore(0)
        self.batch_sizes: list[int] = []

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        self.batch_sizes.append(len(pixels_BCHW))
        self.entered.release()
        assert self.gate.wait(60.0)
        if bool((pixels_BCHW[:, 0, 0, 0] == self.poison).any()):
            raise RuntimeError("poisoned picture")
        return self.inner.embed(pixels_BCHW)
