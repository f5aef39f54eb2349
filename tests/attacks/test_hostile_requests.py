"""Well-formed HTTP with hostile content: every answer is a problem document, and nobody else notices."""

import base64
import io
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from pictures import encoded, noise
from PIL import Image
from starlette.testclient import TestClient

from model_store.backbone import Backbone, BackboneArtefact
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.settings import Settings

PICTURE = encoded(noise())
MAX_BODY_BYTES = 2**21


@pytest.fixture(scope="module")
def client(
    tiny_artefact: BackboneArtefact,
    tiny_backbone: Backbone,
    make_module: Callable[..., bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[TestClient]:
    store = ModelStore(tmp_path_factory.mktemp("requests") / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    store.publish(with_task("birds", store.put_module(make_module("birds"))), "add birds")
    settings = Settings(
        store=store.url,
        store_poll_s=0.0,
        max_body_bytes=MAX_BODY_BYTES,
        max_images_per_request=4,
        max_image_pixels=2**20,
    )
    with TestClient(create_app(settings, tiny_backbone), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(autouse=True)
def _others_are_served(client: TestClient) -> Iterator[None]:
    yield
    assert client.post("/predict", content=PICTURE).status_code == 200
    assert client.get("/tasks").json()["revision"] == 2


def multipart(*parts: bytes, boundary: str = "b") -> dict[str, object]:
    body = b"".join(b"--" + boundary.encode() + b"\r\n" + one + b"\r\n" for one in parts)
    body += b"--" + boundary.encode() + b"--\r\n"
    return {"content": body, "headers": {"content-type": f"multipart/form-data; boundary={boundary}"}}


def part(name: str, data: bytes, filename: str = "a.png", extra: bytes = b"") -> bytes:
    head = f'Content-Disposition: form-data; name="{name}"; filename="{filename}"\r\n'.encode()
    return head + extra + b"\r\n" + data


def typed(content: bytes, media_type: str, **more: str) -> dict[str, object]:
    return {"content": content, "headers": {"content-type": media_type, **more}}


JSON = "application/json"
FORM = "multipart/form-data; boundary=b"
UNENDED = b"--b\r\n" + part("image", PICTURE) + b"\r\n--b\r\n" + part("image", PICTURE)
REFUSED: dict[str, tuple[dict[str, object], int]] = {
    "JSON called a picture": (typed(b'{"images": []}', "image/png"), 415),
    "a picture called JSON": (typed(PICTURE, JSON), 422),
    "a picture called multipart": (typed(PICTURE, "multipart/form-data; boundary=b"), 422),
    "a picture called XML": (typed(PICTURE, "application/xml"), 415),
    "a compressed body": (typed(zlib.compress(PICTURE), "image/png", **{"content-encoding": "deflate"}), 415),
    "a type with a null": (typed(PICTURE, "image\x00/png"), 415),
    "a type of 10,000 characters": (typed(PICTURE, "x" * 10_000), 415),
    "a boundary of 10,000 characters": (multipart(part("image", PICTURE), boundary="b" * 10_000), 422),
    "no closing boundary": (typed(UNENDED, FORM), 422),
    "a picture cut short": (typed(UNENDED[: -len(PICTURE) // 2], FORM), 422),
    "half a closing boundary": (typed(UNENDED + b"\r\n--b-", FORM), 422),
    "a boundary after which nothing comes": (typed(UNENDED + b"\r\n--b\r\n", FORM), 422),
    "another closing boundary": (typed(UNENDED + b"\r\n--c--\r\n", FORM), 422),
    "a charset that decodes nothing": (
        typed(
            b"--b\r\n" + part("image", PICTURE) + b"\r\n--b--\r\n",
            "multipart/form-data; boundary=b; charset=undefined",
        ),
        422,
    ),
    "more parts than allowed": (multipart(*[part("image", PICTURE)] * 5), 422),
    "ten thousand empty parts": (multipart(*[part("image", b"")] * 10_000), 422),
    "text fields in place of files": (
        multipart(b'Content-Disposition: form-data; name="image"\r\n\r\nhello'),
        422,
    ),
    "a part without a name": (multipart(b"\r\n" + PICTURE), 422),
    "a part with endless headers": (
        multipart(part("image", PICTURE, extra=b"X: " + b"a" * 100_000 + b"\r\n")),
        422,
    ),
    "a part with many headers": (
        multipart(part("image", PICTURE, extra=b"".join(b"X-%d: a\r\n" % i for i in range(5000)))),
        422,
    ),
    "multipart within multipart": (
        multipart(part("image", multipart(part("image", PICTURE), boundary="c")["content"])),  # type: ignore[arg-type]
        415,
    ),
    "JSON with NaN": (typed(b'{"images": [NaN]}', JSON), 422),
    "JSON with a number for a picture": (typed(b'{"images": [1e400]}', JSON), 422),
    "JSON with an unknown field": (typed(b'{"images": ["AAAA"], "pickle": "x"}', JSON), 422),
    "JSON with a lone surrogate": (typed(b'{"images": ["\\ud800"]}', JSON), 422),
    "JSON in UTF-16": (typed('{"images": ["AAAA"]}'.encode("utf-16"), JSON), 422),
    "JSON with a picture of nothing": (typed(b'{"images": [""]}', JSON), 422),
    "JSON with top_k beyond all bounds": (
        typed(b'{"images": ["AAAA"], "top_k": 1' + b"0" * 500 + b"}", JSON),
        422,
    ),
    "a body over the limit": (typed(b"x" * (MAX_BODY_BYTES + 1), "image/png"), 413),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_hostile_body_is_refused(name: str, client: TestClient) -> None:
    request, status = REFUSED[name]
    response = client.post("/predict", **request)
    assert response.status_code == status, response.text[:500]
    assert response.headers["content-type"] == "application/problem+json"
    assert len(response.content) < 2500


@pytest.mark.parametrize("begin", [b"", b"\r\n", b"\r\npreamble\r\n"])
@pytest.mark.parametrize("end", [b"--", b"--\r\n", b"-- \t\r\n", b"--\r\nepilogue"])
def test_a_form_may_have_what_its_standard_allows(begin: bytes, end: bytes, client: TestClient) -> None:
    """A preamble, blanks after the boundary, an epilogue or no line end there (RFC 2046, 5.1.1)."""
    response = client.post("/predict", **typed(begin + UNENDED + b"\r\n--b" + end, FORM))
    assert response.status_code == 200
    assert len(response.json()["predictions"]) == 2


@pytest.mark.parametrize(
    "filename", ["../../../etc/passwd", "a\x00.png", "C:\\evil", "ü" * 500, "", "a.png/../b"]
)
def test_the_name_of_an_uploaded_file_means_nothing(filename: str, client: TestClient) -> None:
    response = client.post("/predict", **multipart(part("image", PICTURE, filename)))
    assert response.status_code in (200, 422), response.text


@pytest.mark.parametrize(
    "task", ["../birds", "birds/", "a\nb", "a\x00b", "🐦", "birds' OR 1=1", "${jndi:ldap://x}", "x" * 5000]
)
def test_a_hostile_task_name_is_merely_unknown(task: str, client: TestClient) -> None:
    response = client.post("/predict", params={"task": task}, content=PICTURE)
    assert response.status_code == 404
    assert response.json()["type"] == "urn:tosca:problem:unknown-task"


@pytest.mark.parametrize(
    "query", ["top_k=-1", "top_k=0", "top_k=x", "top_k=1e9", "top_k=101", "selection=pickle", "timings=2"]
)
def test_a_hostile_query_is_refused(query: str, client: TestClient) -> None:
    assert client.post(f"/predict?{query}", content=PICTURE).status_code == 422


@pytest.mark.parametrize("reason", ["x" * 1001, "line\nbreak\x1b[31m"])
def test_a_reason_is_bounded_and_kept_as_data(reason: str, client: TestClient) -> None:
    response = client.delete("/tasks/nobody", params={"reason": reason})
    assert response.status_code == (422 if len(reason) > 1000 else 404)


# -- bombs of every format: few bytes that would become many pixels ---------------------------------------


def _jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encoded(noise(), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def _flat(width: int, height: int, file_format: str, **options: object) -> bytes:
    return encoded(Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)), file_format, **options)


BOMBS: dict[str, Callable[[], bytes]] = {
    "JPEG that claims": lambda: _jpeg_claiming(65_500, 65_500),
    "PNG": lambda: _flat(3000, 3000, "PNG"),
    "GIF": lambda: _flat(3000, 3000, "GIF"),
    "WEBP": lambda: _flat(3000, 3000, "WEBP", lossless=True),
    "TIFF": lambda: _flat(3000, 3000, "TIFF", compression="tiff_lzw"),
    "JPEG": lambda: _flat(3000, 3000, "JPEG"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_decompression_bomb_is_refused_by_its_header(name: str, client: TestClient) -> None:
    data = BOMBS[name]()
    assert len(data) < 2**20
    response = client.post("/predict", content=data)
    assert response.status_code == 413, response.text
    assert response.json()["type"] == "urn:tosca:problem:image-too-large"


def test_one_bomb_among_several_pictures_refuses_its_request_and_names_itself(client: TestClient) -> None:
    bomb = base64.b64encode(BOMBS["PNG"]()).decode()
    good = base64.b64encode(PICTURE).decode()
    response = client.post("/predict", json={"images": [good, bomb]})
    assert response.status_code == 413
    assert "picture 1" in response.json()["detail"]


def test_more_pictures_than_a_request_may_have_are_refused(
    client: TestClient, tiny_backbone: Backbone
) -> None:
    images = client.post("/predict", json={"images": [base64.b64encode(PICTURE).decode()] * 5})
    assert images.status_code == 422
    assert "5 pictures in one request, at most 4 are allowed" in images.json()["detail"]
    vectors = [[0.0] * tiny_backbone.feature_dim] * 5
    cls = client.post("/predict", json={"cls": vectors, "backbone_fingerprint": tiny_backbone.fingerprint})
    assert cls.status_code == 422
    assert client.post("/predict", **multipart(*[part("image", PICTURE)] * 5)).status_code == 422


# -- polyglots: files that are two things; what is read is the picture ------------------------------------


def _with_zip(picture: bytes) -> bytes:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("harm.py", "raise SystemExit")
    return picture + archive.getvalue()


POLYGLOTS: dict[str, Callable[[], bytes]] = {
    "PNG and zip": lambda: _with_zip(PICTURE),
    "JPEG and zip": lambda: _with_zip(encoded(noise(), "JPEG")),
    "GIF and JavaScript": lambda: encoded(noise(), "GIF") + b"*/=1;alert(1)//",
    "PNG and HTML": lambda: PICTURE + b"<script>alert(1)</script>",
    "JPEG with HTML in its comment": lambda: encoded(noise(), "JPEG", comment=b"<script>alert(1)</script>"),
    "BMP and shell": lambda: encoded(noise(), "BMP") + b"\nrm -rf /\n",
}


@pytest.mark.parametrize("name", POLYGLOTS)
def test_of_a_polyglot_nothing_but_the_picture_comes_back(name: str, client: TestClient) -> None:
    response = client.post("/predict", content=POLYGLOTS[name]())
    assert response.status_code == 200
    assert response.headers["content-type"] == "application/json"
    assert response.headers["x-content-type-options"] == "nosniff"
    assert b"script" not in response.content


@pytest.mark.parametrize(
    "data", [PICTURE, b"#!/bin/sh\n", b"PK\x03\x04" + b"\x00" * 100, b"\x80\x04\x95" + b"\x00" * 100]
)
def test_what_is_no_module_is_not_registered(data: bytes, client: TestClient) -> None:
    response = client.post("/tasks", content=data)
    assert response.status_code == 422
    assert response.json()["type"] == "urn:tosca:problem:invalid-module"
