"""A service that takes few pictures and small bodies, and a picture for it."""

import io

import numpy as np
import pytest
from PIL import Image

from model_store.store import ModelStore
from service.settings import Settings


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0, max_images_per_request=8, max_body_bytes=2**20)


def picture(seed: int = 0, size: tuple[int, int] = (40, 48), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()
