"""An engine over a backbone that waits until a test lets it go on, and pictures for it."""

import asyncio
import io
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from gated import GatedBackbone
from PIL import Image

from model_store.backbone import Backbone
from model_store.bank import ModuleBank
from model_store.module_file import read_module
from service.engine import Engine
from service.settings import Settings


def picture(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((32, 32, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def bank(tiny_backbone: Backbone, make_module: Callable[..., bytes]) -> ModuleBank:
    return ModuleBank.build(
        [read_module(make_module(task, seed=seed)).module for task, seed in (("birds", 1), ("cars", 2))],
        revision=3,
        backbone_fingerprint=tiny_backbone.fingerprint,
        feature_dim=tiny_backbone.feature_dim,
    )


@pytest.fixture
def backbone(tiny_backbone: Backbone) -> Iterator[GatedBackbone]:
    gated = GatedBackbone(tiny_backbone)
    yield gated
    gated.gate.set()


def settings(**changes: object) -> Settings:
    return Settings(max_batch_size=4, **changes)


async def entered(backbone: GatedBackbone) -> None:
    """Wait until one more pass has begun."""
    await asyncio.to_thread(backbone.entered.acquire)


def start(engine: Engine) -> None:
    """Forget the warm-up's passes."""
    while engine.backbone.entered.acquire(blocking=False):
        pass
    engine.backbone.batch_sizes.clear()
