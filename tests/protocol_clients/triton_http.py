"""NVIDIA's HTTP client, unmodified: every call of it that the service answers."""

import base64
import json

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from conftest import assert_is_native
from tritonclient.utils import InferenceServerException


@pytest.fixture
def client(http_address):
    with triton.InferenceServerClient(http_address, concurrency=4) as client:
        yield client


def image_input(images, binary_data=True):
    given = triton.InferInput("image", list(images.shape), "BYTES")
    given.set_data_from_numpy(images, binary_data=binary_data)
    return given


def outputs(*names, binary_data=True):
    return [triton.InferRequestedOutput(name, binary_data=binary_data) for name in names]


def test_health(client, headers):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("tosca", headers=headers)
    assert client.is_model_ready("birds", headers=headers)
    assert not client.is_model_ready("ghost", headers=headers)
    assert not client.is_model_ready("birds", "7", headers=headers)


def test_metadata(client, headers, birds):
    assert client.get_server_metadata(headers)["name"] == "tosca-serving"
    metadata = client.get_model_metadata("birds", headers=headers)
    assert metadata["versions"] == [birds["module_sha256"]]
    assert client.get_model_metadata("birds", birds["module_sha256"], headers=headers) == metadata
    assert {one["name"] for one in metadata["inputs"]} == {"image", "pixels", "cls"}


@pytest.mark.parametrize("binary_outputs", [True, False])
def test_a_batch_in_binary(client, headers, images, native, binary_outputs):
    wanted = outputs("label", "confidence", "abstained", binary_data=binary_outputs)
    result = client.infer("tosca", [image_input(images)], outputs=wanted, headers=headers, request_id="7")
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))
    assert result.as_numpy("abstained").dtype == np.bool_
    assert result.get_response()["id"] == "7"


def test_a_batch_in_json(client, headers, pictures, native):
    encoded = np.array([base64.b64encode(one) for one in pictures], dtype=np.object_)
    given = image_input(encoded, binary_data=False)
    result = client.infer("tosca", [given], outputs=outputs("label", "confidence"), headers=headers)
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))


def test_all_outputs_of_a_named_task(client, headers, images, birds):
    result = client.infer(
        "birds",
        [image_input(images)],
        model_version=birds["module_sha256"],
        headers=headers,
        parameters={"coverage": 0.5, "top_k": 2},
    )
    names = [one["name"] for one in result.get_response()["outputs"]]
    metadata = client.get_model_metadata("birds", headers=headers)
    assert names == [one["name"] for one in metadata["outputs"]]
    probability, labels = result.as_numpy("probability"), [one.decode() for one in result.as_numpy("labels")]
    assert labels == birds["labels"] and probability.shape == (3, len(labels))
    np.testing.assert_allclose(probability.sum(axis=1), 1.0, atol=1e-5)
    assert [labels[k].encode() for k in probability.argmax(axis=1)] == list(result.as_numpy("label"))
    receipts = [json.loads(one) for one in result.as_numpy("receipt")]
    assert {one["module_sha256"] for one in receipts} == {birds["module_sha256"]}
    assert all(isinstance(json.loads(one), list) for one in result.as_numpy("prediction_set"))


def test_cls_vectors(client, headers, native):
    vectors = np.array([one["cls"][0] for one in native], dtype=np.float32)
    given = triton.InferInput("cls", list(vectors.shape), "FP32")
    given.set_data_from_numpy(vectors)
    parameters = {"backbone_fingerprint": native[0]["backbone_fingerprint"]}
    result = client.infer("tosca", [given], headers=headers, parameters=parameters)
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))


@pytest.mark.parametrize("binary_data", [True, False])
def test_pixels(client, headers, binary_data):
    pixels = np.zeros((1, 3, 32, 32), dtype=np.float32)
    given = triton.InferInput("pixels", list(pixels.shape), "FP32")
    given.set_data_from_numpy(pixels, binary_data=binary_data)
    result = client.infer("tosca", [given], headers=headers)
    assert result.as_numpy("confidence").shape == (1,)


def test_asynchronous_calls(client, headers, images, native):
    pending = [
        client.async_infer("tosca", [image_input(images[i : i + 1])], headers=dict(headers)) for i in range(3)
    ]
    results = [one.get_result() for one in pending]
    labels, confidences = (
        np.concatenate([one.as_numpy(name) for one in results]) for name in ("label", "confidence")
    )
    assert_is_native(native, labels, confidences)


def test_prepared_bodies(client, http_address, headers, images, native):
    body, size = triton.InferenceServerClient.generate_request_body([image_input(images)])
    response = client._post(
        "v2/models/tosca/infer",
        request_body=body,
        headers={**headers, "Inference-Header-Content-Length": size},
        query_params=None,
    )
    header_length = int(response.get("Inference-Header-Content-Length"))
    result = triton.InferenceServerClient.parse_response_body(response.read(), header_length=header_length)
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))


def test_the_client_for_asyncio(http_address, headers, images, native):
    import asyncio

    async def ask():
        async with triton_aio.InferenceServerClient(http_address) as client:
            assert await client.is_server_ready()
            return await client.infer("tosca", [image_input(images)], headers=headers)

    result = asyncio.run(ask())
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))


def test_unloading_and_loading(client, headers, images):
    def states():
        return {one["name"]: one["state"] for one in client.get_model_repository_index(headers)}

    assert states() == {"tosca": "READY", "birds": "READY", "cars": "READY"}
    client.unload_model("cars", headers)
    assert states()["cars"] == "UNAVAILABLE" and not client.is_model_ready("cars", headers=headers)
    client.load_model("cars", headers)
    assert states()["cars"] == "READY" and client.is_model_ready("cars", headers=headers)


def test_faults(client, headers, images):
    for call, status, fault in (
        (lambda: client.infer("ghost", [image_input(images)], headers=dict(headers)), "404", "model 'ghost'"),
        (lambda: client.infer("tosca", [image_input(images)]), "401", "API key"),
        (lambda: client.get_model_metadata("ghost", headers=dict(headers)), "404", "model 'ghost'"),
        (lambda: client.load_model("ghost", headers), "404", "no task 'ghost'"),
        (lambda: client.unload_model("tosca", headers), "422", "the service itself"),
        (lambda: client.get_inference_statistics(headers=dict(headers)), "404", "neither"),
        (
            lambda: client.infer(
                "tosca", [image_input(images)], headers=dict(headers), request_compression_algorithm="gzip"
            ),
            "415",
            "gzip",
        ),
        (
            lambda: client.infer("tosca", [image_input(images)], headers=dict(headers), sequence_id=7),
            "422",
            "sequence_",
        ),
    ):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == status and fault in caught.value.message()
