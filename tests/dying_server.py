"""A `tosca serve` whose inference thread dies of the first picture: python tests/dying_server.py (TOSCA_* set)."""

import torch
from torch import Tensor

from model_store.backbone import Backbone
from model_store.store import ModelStore
from service.server import serve
from service.settings import Settings


class ThreadDeath(BaseException):
    """What no handler of ordinary faults catches."""


class DyingBackbone:
    """A backbone that survives the warm-up, whose pictures are black, and nothing else."""

    def __init__(self, inner: Backbone) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> object:
        return getattr(self.inner, name)

    def embed(self, pixels_BCHW: Tensor) -> Tensor:
        if bool(torch.any(pixels_BCHW != 0)):
            raise ThreadDeath
        return self.inner.embed(pixels_BCHW)


if __name__ == "__main__":
    settings = Settings()
    store = ModelStore(settings.store)
    artefact = store.backbone(store.require_head().backbone_fingerprint)
    serve(settings, DyingBackbone(Backbone.load(artefact, device="cpu")))
