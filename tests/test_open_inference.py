"""The Open Inference Protocol over HTTP: the answers of /predict in the form that standard clients read."""

import base64
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pictures import encoded, noise
from starlette.testclient import TestClient
from synthetic import make_features

from model_store.backbone import Backbone
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY
from model_store.preprocess import load_pixels
from model_store.store import ModelStore
from service.settings import Settings

MakeModule = Callable[..., bytes]
PICTURES = [encoded(noise(colour, seed=colour)) for colour in range(3)]


@pytest.fixture
def settings(tiny_store: ModelStore) -> Settings:
    return Settings(store=tiny_store.url, store_poll_s=0.0, max_images_per_request=4, max_json_bytes=2**20)


def as_json(pictures: list[bytes], **more: Any) -> dict[str, Any]:
    data = [base64.b64encode(one).decode() for one in pictures]
    return {"inputs": [{"name": "image", "shape": [len(data)], "datatype": "BYTES", "data": data}], **more}


def as_binary(
    name: str, datatype: str, shape: list[int], raw: bytes, **more: Any
) -> tuple[bytes, dict[str, str]]:
    """A body with one binary tensor, and its headers."""
    tensor = {"name": name, "shape": shape, "datatype": datatype}
    head = json.dumps({"inputs": [tensor | {"parameters": {"binary_data_size": len(raw)}}], **more}).encode()
    return head + raw, {"inference-header-content-length": str(len(head))}


def raw_elements(elements: list[bytes]) -> bytes:
    return b"".join(struct.pack("<I", len(one)) + one for one in elements)


def values_of(response: Any) -> dict[str, list[Any]]:
    assert response.status_code == 200, response.text
    return {one["name"]: one["data"] for one in response.json()["outputs"]}


def predicted(client: TestClient, pictures: list[bytes], **query: Any) -> list[dict[str, Any]]:
    files = [("image", one) for one in pictures]
    return client.post("/predict", files=files, params=query).json()["predictions"]


def assert_same_choices(given: list[dict[str, Any]], native: list[dict[str, Any]]) -> None:
    """Equal but for what the batch does to the last digits."""
    assert [(one["task"], one["label"]) for one in given] == [(one["task"], one["label"]) for one in native]
    assert [one["probability"] for one in given] == pytest.approx([one["probability"] for one in native])


def test_the_service_answers_as_predict_does(client: TestClient) -> None:
    native = predicted(client, PICTURES)
    given = values_of(client.post("/v2/models/tosca/infer", json=as_json(PICTURES)))
    assert given["task"] == [one["task"] for one in native]
    assert given["label"] == [one["label"] for one in native]
    assert given["confidence"] == pytest.approx([one["confidence"] for one in native], abs=1e-6)
    assert given["p_value"] == pytest.approx([one["p_value"] for one in native], abs=1e-6)
    assert given["abstained"] == [one["abstained"] for one in native]
    receipts = [json.loads(one) for one in given["receipt"]]
    assert [{k: v for k, v in one.items() if v is not None} for one in receipts] == [
        one["receipt"] for one in native
    ]
    for text, one in zip(given["alternatives"], native, strict=True):
        assert_same_choices(json.loads(text), one["alternatives"])
    assert "prediction_set" not in given


def test_a_task_gives_a_probability_for_each_of_its_labels(client: TestClient) -> None:
    response = client.post("/v2/models/birds/infer", json=as_json(PICTURES, id="order-66"))
    given = values_of(response)
    labels = client.get("/tasks/birds").json()["labels"]
    assert given["labels"] == labels
    probabilities = np.reshape(given["probability"], (3, len(labels)))
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    assert [labels[k] for k in probabilities.argmax(axis=1)] == given["label"]
    np.testing.assert_allclose(probabilities.max(axis=1), given["confidence"], atol=1e-6)
    assert set(given["task"]) == {"birds"}
    assert response.json()["id"] == "order-66"
    assert response.json()["model_version"] == client.get("/tasks/birds").json()["module_sha256"]


def test_a_confident_task_gives_a_probability_for_each_of_its_labels_too(
    client: TestClient, make_module: MakeModule
) -> None:
    assert client.post("/tasks", content=make_module("digits", num_classes=10)).status_code == 201
    cls_ND = make_features("digits", num_classes=10).cls_ND[::16].numpy().astype("<f4")
    parameters = {"backbone_fingerprint": client.get("/health/ready").json()["backbone_fingerprint"]}
    body, headers = as_binary("cls", "FP32", [4, 192], cls_ND[:4].tobytes(), parameters=parameters)
    given = values_of(client.post("/v2/models/digits/infer", content=body, headers=headers))
    probabilities = np.reshape(given["probability"], (4, 10))
    assert (probabilities < MIN_ALTERNATIVE_PROBABILITY).any(axis=1).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)
    assert [given["labels"][k] for k in probabilities.argmax(axis=1)] == given["label"]
    asked = {"cls": cls_ND[:4].tolist(), "task": "digits", **parameters}
    native = client.post("/predict", json=asked).json()["predictions"]
    for text, one in zip(given["alternatives"], native, strict=True):
        assert_same_choices(json.loads(text), one["alternatives"])


def test_pixels_that_a_client_normalised_answer_as_the_picture(
    client: TestClient, tiny_backbone: Backbone, settings: Settings
) -> None:
    preprocessing = tiny_backbone.preprocessing
    mean, std = (np.array(one).reshape(3, 1, 1) for one in (preprocessing.mean, preprocessing.std))
    pixels = np.stack([load_pixels(one, preprocessing, settings.image_limits).numpy() for one in PICTURES])
    normalised = ((pixels / 255.0 - mean) / std).astype("<f4")
    body, headers = as_binary("pixels", "FP32", list(normalised.shape), normalised.tobytes())
    by_pixels = values_of(client.post("/v2/models/tosca/infer", content=body, headers=headers))
    by_picture = values_of(client.post("/v2/models/tosca/infer", json=as_json(PICTURES)))
    assert by_pixels["label"] == by_picture["label"]
    assert by_pixels["confidence"] == pytest.approx(by_picture["confidence"], abs=1e-5)

    one = normalised[:1].tolist()  # nested, as the protocol allows in JSON
    tensor = {"name": "pixels", "shape": [1, *normalised.shape[1:]], "datatype": "FP32", "data": one}
    by_json = values_of(client.post("/v2/models/tosca/infer", json={"inputs": [tensor]}))
    assert by_json["confidence"] == pytest.approx(by_picture["confidence"][:1], abs=1e-5)


def test_cls_vectors_answer_as_the_picture_they_came_from(client: TestClient) -> None:
    native = client.post(
        "/predict", files=[("image", one) for one in PICTURES], params={"return_cls": True}
    ).json()
    vectors = np.array(native["cls"], dtype="<f4")
    parameters = {"backbone_fingerprint": native["backbone_fingerprint"]}
    body, headers = as_binary("cls", "FP32", list(vectors.shape), vectors.tobytes(), parameters=parameters)
    given = values_of(client.post("/v2/models/tosca/infer", content=body, headers=headers))
    assert given["label"] == [one["label"] for one in native["predictions"]]
    body, headers = as_binary("cls", "FP32", list(vectors.shape), vectors.tobytes())
    refused = client.post("/v2/models/tosca/infer", content=body, headers=headers)
    assert refused.status_code == 409 and "computed by backbone None" in refused.json()["error"]


def test_outputs_come_as_asked_for_in_binary_or_json(client: TestClient) -> None:
    wanted = [{"name": "confidence", "parameters": {"binary_data": True}}, {"name": "label"}]
    wanted.append({"name": "abstained", "parameters": {"binary_data": True}})
    wanted.append({"name": "task", "parameters": {"binary_data": True}})
    body, headers = as_binary(
        "image", "BYTES", [3], raw_elements(PICTURES), outputs=wanted, parameters={"top_k": 2}
    )
    response = client.post("/v2/models/tosca/infer", content=body, headers=headers)
    head_size = int(response.headers["inference-header-content-length"])
    head, tail = json.loads(response.content[:head_size]), response.content[head_size:]
    plain = values_of(client.post("/v2/models/tosca/infer", json=as_json(PICTURES)))
    assert [one["name"] for one in head["outputs"]] == ["confidence", "label", "abstained", "task"]
    assert head["outputs"][1]["data"] == plain["label"]
    confidence, abstained, task = tail[:12], tail[12:15], tail[15:]
    assert np.frombuffer(confidence, "<f4").tolist() == pytest.approx(plain["confidence"], abs=1e-6)
    assert [bool(one) for one in abstained] == plain["abstained"]
    assert task == raw_elements([one.encode() for one in plain["task"]])


def test_parameters_mean_what_they_mean_to_predict(client: TestClient) -> None:
    asked = {"top_k": 2, "coverage": 0.5, "selection": "lda"}
    [native] = predicted(client, PICTURES[:1], top_k=2, coverage=0.5)
    given = values_of(client.post("/v2/models/tosca/infer", json=as_json(PICTURES[:1], parameters=asked)))
    assert_same_choices(json.loads(given["prediction_set"][0]), native["prediction_set"])
    assert_same_choices(json.loads(given["alternatives"][0]), native["alternatives"])


def test_metadata_describes_the_service_and_each_task(client: TestClient, tiny_backbone: Backbone) -> None:
    server = client.get("/v2").json()
    assert server["name"] == "tosca-serving" and "binary_tensor_data" in server["extensions"]
    service, task = (client.get(f"/v2/models/{name}").json() for name in ("tosca", "birds"))
    assert service["versions"] == [str(client.get("/tasks").json()["revision"])]
    assert task["versions"] == [client.get("/tasks/birds").json()["module_sha256"]]
    shapes = {one["name"]: (one["datatype"], one["shape"]) for one in task["inputs"] + task["outputs"]}
    assert shapes["image"] == ("BYTES", [-1])
    assert shapes["pixels"] == ("FP32", [-1, 3, 32, 32])
    assert shapes["cls"] == ("FP32", [-1, tiny_backbone.feature_dim])
    assert shapes["probability"] == ("FP32", [-1, 3])
    assert "probability" not in {one["name"] for one in service["outputs"]}
    given = values_of(
        client.post("/v2/models/birds/infer", json=as_json(PICTURES, parameters={"coverage": 0.5}))
    )
    assert list(given) == [one["name"] for one in task["outputs"]]


def test_a_version_answers_only_while_it_is_served(client: TestClient, make_module: MakeModule) -> None:
    sha256 = client.get("/tasks/birds").json()["module_sha256"]
    pinned = f"/v2/models/birds/versions/{sha256}"
    assert client.post(f"{pinned}/infer", json=as_json(PICTURES[:1])).status_code == 200
    assert client.get(f"{pinned}/ready").status_code == client.get(pinned).status_code == 200
    assert client.post("/tasks", content=make_module("birds", seed=5)).status_code == 201
    gone = client.post(f"{pinned}/infer", json=as_json(PICTURES[:1]))
    assert gone.status_code == 404 and sha256 in gone.json()["error"]
    assert client.get(f"{pinned}/ready").status_code == client.get(pinned).status_code == 404


def index(client: TestClient, **asked: Any) -> dict[str, tuple[str, str]]:
    listed = client.post("/v2/repository/index", json=asked).json()
    return {one["name"]: (one["state"], one["version"]) for one in listed}


def test_unloading_takes_a_task_out_and_loading_brings_its_latest_module_back(
    client: TestClient, make_module: MakeModule
) -> None:
    latest = make_module("birds", seed=5)
    assert client.post("/tasks", content=latest).status_code == 201
    before = client.get("/tasks/birds").json()
    assert client.post("/v2/repository/models/birds/unload").status_code == 200
    assert client.get("/tasks/birds").status_code == 404
    assert index(client)["birds"] == ("UNAVAILABLE", before["module_sha256"])
    assert set(index(client, ready=True)) == {"tosca", "cars"}
    assert client.post("/v2/repository/models/birds/load", json={}).status_code == 200
    assert client.get("/tasks/birds").json() == before
    assert index(client)["birds"] == ("READY", before["module_sha256"])
    revision = client.get("/tasks").json()["revision"]
    assert client.post("/v2/repository/models/birds/load").status_code == 200  # it is: nothing to publish
    assert client.get("/tasks").json()["revision"] == revision


@pytest.mark.parametrize("content", [b"{}", None])
def test_a_revision_that_cannot_be_read_hides_no_other(
    content: bytes | None, client: TestClient, tiny_store: ModelStore, caplog: pytest.LogCaptureFixture
) -> None:
    assert client.post("/v2/repository/models/birds/unload").status_code == 200
    old = Path(tiny_store.url) / "revisions/000000000002.json"
    old.unlink() if content is None else old.write_bytes(content)
    assert index(client)["birds"][0] == "UNAVAILABLE"
    assert "revision 2 is left out of the model repository" in caplog.text
    assert client.post("/v2/repository/models/birds/load").status_code == 200
    assert set(index(client, ready=True)) == {"tosca", "birds", "cars"}


@pytest.mark.parametrize(
    ("path", "body", "status", "fault"),
    [
        ("models/ghost/infer", as_json(PICTURES[:1]), 404, "model 'ghost' is neither"),
        ("models/tosca/infer", {}, 422, "inputs: Field required"),
        ("models/tosca/infer", as_json([]), 422, "input 'image' is empty"),
        ("models/tosca/infer", as_json(PICTURES * 2), 422, "at most 4 are allowed"),
        ("models/tosca/infer", as_json([b"no picture"]), 415, "picture"),
        ("models/tosca/infer", as_json(PICTURES, parameters={"converage": 0.9}), 422, "parameters.converage"),
        ("models/tosca/infer", as_json(PICTURES, parameters={"top_k": 1000}), 422, "top_k is 1000"),
        ("models/tosca/infer", as_json(PICTURES, parameters={"timeout": 10**400}), 422, "parameters.timeout"),
        ("models/tosca/infer", as_json(PICTURES, parameters={"sequence_id": 1}), 422, "sequence_id"),
        ("models/tosca/infer", as_json(PICTURES, outputs=[{"name": "logits"}]), 422, "no output 'logits'"),
        ("models/tosca/infer", as_json(PICTURES, outputs=[{"name": "probability"}]), 422, "no output"),
        ("models/tosca/infer", as_json(PICTURES, outputs=[{"name": "task"}] * 10), 422, "10 outputs of 9"),
        ("models/tosca/infer", as_json(PICTURES, outputs=[{"name": "prediction_set"}]), 422, "coverage"),
        ("repository/models/tosca/load", {}, 422, "the service itself"),
        ("repository/models/tosca/unload", {}, 422, "the service itself"),
        ("repository/models/ghost/load", {}, 404, "no task 'ghost'"),
        ("repository/models/ghost/unload", {}, 404, "'ghost' is not active"),
        ("repository/models/birds/load", {"parameters": {"config": "{}"}}, 422, "not supported"),
        ("nothing", {}, 404, "Not Found"),
    ],
)
def test_a_refusal_is_an_error_of_the_protocol(
    path: str, body: dict[str, Any], status: int, fault: str, client: TestClient
) -> None:
    response = client.post(f"/v2/{path}", json=body)
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"} and fault in response.json()["error"]


def tensor(**fields: Any) -> dict[str, Any]:
    """A request whose one tensor is faulty in some field."""
    sound = {"name": "image", "shape": [1], "datatype": "BYTES", "data": ["aaaa"]}
    return {"inputs": [{k: v for k, v in (sound | fields).items() if v is not None}]}


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        (tensor(name="picture"), "unknown input 'picture'"),
        (tensor(datatype="FP32"), "datatype 'FP32', expected BYTES"),
        (tensor(shape=[2]), "holds 1 elements, its shape says 2"),
        (tensor(shape=[1, 2]), "shape [1, 2], expected [n]"),
        (tensor(shape=[]), "shape []"),
        (tensor(shape=[-1]), "shape [-1]"),
        (tensor(data=[7]), "base64 strings"),
        (tensor(data=["a"]), "is not base64"),
        (tensor(data=None), "neither data nor binary_data_size"),
        (tensor(parameters={"binary_data_size": 4}), "both data and binary_data_size"),
        (tensor(parameters={"classification": 3}), "unknown parameter 'classification'"),
        (tensor(data=None, parameters={"binary_data_size": 4}), "the body has 0 bytes left"),
        (tensor(name="cls", datatype="FP32", shape=[1, 3], data=[1, 2, 3]), "computed by backbone None"),
        (tensor(name="pixels", datatype="FP32", shape=[1, 3], data=[1, 2, 3]), "expected [n, 3, 32, 32]"),
        (
            tensor(name="pixels", datatype="UINT8", shape=[1, 3, 32, 32], data=[1]),
            "datatype 'UINT8', expected FP32",
        ),
        ({"inputs": tensor()["inputs"] * 2}, "2 inputs: give one"),
    ],
)
def test_a_faulty_tensor_is_named(body: dict[str, Any], fault: str, client: TestClient) -> None:
    response = client.post("/v2/models/tosca/infer", json=body)
    assert response.status_code in (409, 422), response.text
    assert fault in response.json()["error"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30, 100.0])
def test_numbers_that_are_no_pixels_are_refused(value: float, client: TestClient) -> None:
    pixels = np.zeros((1, 3, 32, 32), "<f4")
    pixels[0, 1, 2, 3] = value
    body, headers = as_binary("pixels", "FP32", [1, 3, 32, 32], pixels.tobytes())
    response = client.post("/v2/models/tosca/infer", content=body, headers=headers)
    assert response.status_code == 422 and "beyond black and white" in response.json()["error"]


@pytest.mark.parametrize(
    ("raw", "fault"),
    [
        (b"\x01\x00\x00\x00", "ends within element 0 of 1 bytes"),
        (b"\xff\xff\xff\xff", "ends within element 0 of 4294967295 bytes"),
        (b"\x00\x00", "ends within the length of element 0"),
        (raw_elements([b"a", b"b"]), "holds more elements than the 1 that its shape says"),
        (b"", "holds 0 elements, its shape says 1"),
    ],
)
def test_broken_binary_elements_are_refused(raw: bytes, fault: str, client: TestClient) -> None:
    body, headers = as_binary("image", "BYTES", [1], raw)
    response = client.post("/v2/models/tosca/infer", content=body, headers=headers)
    assert response.status_code == 422 and fault in response.json()["error"]


@pytest.mark.parametrize("length", ["-1", "x", "", "1e3", "99999999", "0" * 5000, "²"])
def test_a_wrong_header_length_is_refused(length: str, client: TestClient) -> None:
    body, headers = as_binary("image", "BYTES", [3], raw_elements(PICTURES))
    wrong = {**headers, "inference-header-content-length": length.encode()}
    response = client.post("/v2/models/tosca/infer", content=body, headers=wrong)
    assert response.status_code == 422 and "Inference-Header-Content-Length" in response.json()["error"]


def test_binary_data_that_no_input_claims_is_refused(client: TestClient) -> None:
    body, headers = as_binary("image", "BYTES", [3], raw_elements(PICTURES))
    response = client.post("/v2/models/tosca/infer", content=body + b"more", headers=headers)
    assert response.status_code == 422 and "4 bytes of binary data" in response.json()["error"]


def test_bodies_are_bounded_and_read_as_they_are(client: TestClient) -> None:
    long = client.post("/v2/models/tosca/infer", content=b" " * (2**20 + 1))
    assert long.status_code == 413 and "binary tensor data" in long.json()["error"]
    many = as_json(PICTURES[:1])
    many["inputs"][0]["data"] = [""] * 200_000
    crowded = client.post("/v2/models/tosca/infer", json=many)
    assert crowded.status_code == 422 and "elements allowed" in crowded.json()["error"]
    zipped = client.post("/v2/models/tosca/infer", content=b"x", headers={"content-encoding": "gzip"})
    assert zipped.status_code == 415 and "gzip" in zipped.json()["error"]


def test_a_deadline_of_the_client_is_kept(client: TestClient) -> None:
    late = client.post("/v2/models/tosca/infer", json=as_json(PICTURES, parameters={"timeout": 1}))
    assert late.status_code == 504, late.text


def test_a_draining_service_is_live_but_not_ready(client: TestClient) -> None:
    client.app.state.service.is_ready = False
    assert client.get("/v2/health/live").status_code == 200
    for path in ("health/ready", "models/tosca/ready", "models/birds/ready"):
        assert client.get(f"/v2/{path}").status_code == 503
