"""Where the server is, pictures to ask about, and what /predict says of them."""

import io
import json
import os
import urllib.request

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def http_address() -> str:
    return os.environ["TOSCA_TEST_HTTP"]


@pytest.fixture(scope="session")
def grpc_address() -> str:
    return os.environ["TOSCA_TEST_GRPC"]


@pytest.fixture(scope="session")
def key() -> str:
    return os.environ["TOSCA_TEST_KEY"]


@pytest.fixture
def headers(key: str) -> dict[str, str]:
    """Of one call: clients add their own to them."""
    return {"authorization": f"Bearer {key}"}


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="session")
def pictures() -> "list[bytes]":
    return [picture(seed) for seed in range(3)]


@pytest.fixture(scope="session")
def images(pictures: "list[bytes]") -> np.ndarray:
    return np.array(pictures, dtype=np.object_)


def ask(address: str, path: str, key: str, body: "bytes | None" = None) -> dict:
    request = urllib.request.Request(f"http://{address}{path}", data=body)
    request.add_header("authorization", f"Bearer {key}")
    request.add_header("content-type", "application/octet-stream")
    with urllib.request.urlopen(request) as response:
        return json.load(response)


@pytest.fixture(scope="session")
def native(http_address: str, key: str, pictures: "list[bytes]") -> "list[dict]":
    """What POST /predict answers, picture by picture."""
    return [ask(http_address, "/predict?return_cls=true", key, one) for one in pictures]


@pytest.fixture(scope="session")
def birds(http_address: str, key: str) -> dict:
    return ask(http_address, "/tasks/birds", key)


def assert_is_native(native: "list[dict]", labels: np.ndarray, confidences: np.ndarray) -> None:
    expected = [one["predictions"][0] for one in native]
    assert [one.decode() if isinstance(one, bytes) else one for one in labels] == [
        one["label"] for one in expected
    ]
    np.testing.assert_allclose(confidences, [one["confidence"] for one in expected], atol=1e-5)
