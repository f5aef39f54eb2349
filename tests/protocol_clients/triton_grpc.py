"""NVIDIA's gRPC client, unmodified: every call of it that the service answers."""

import asyncio
import json
import os
import queue

import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from conftest import assert_is_native
from google.protobuf import descriptor_pb2
from tritonclient.grpc import service_pb2 as standard
from tritonclient.utils import InferenceServerException


@pytest.fixture
def client(grpc_address):
    with triton.InferenceServerClient(grpc_address) as client:
        yield client


def image_input(images):
    given = triton.InferInput("image", list(images.shape), "BYTES")
    given.set_data_from_numpy(images)
    return given


def test_health(client, headers):
    assert client.is_server_live() and client.is_server_ready()
    assert client.is_model_ready("tosca", headers=headers)
    assert client.is_model_ready("birds", headers=headers)
    assert not client.is_model_ready("ghost", headers=headers)


def test_metadata(client, headers, birds):
    assert client.get_server_metadata(headers).name == "tosca-serving"
    assert client.get_model_metadata("birds", headers=headers).versions == [birds["module_sha256"]]
    listed = client.get_model_metadata("birds", headers=headers, as_json=True)
    assert {one["name"] for one in listed["inputs"]} == {"image", "pixels", "cls"}


def test_a_batch(client, headers, images, native):
    wanted = [triton.InferRequestedOutput(name) for name in ("label", "confidence", "abstained")]
    result = client.infer("tosca", [image_input(images)], outputs=wanted, headers=headers, request_id="7")
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))
    assert result.as_numpy("abstained").dtype == np.bool_
    assert result.get_response().id == "7"


def test_all_outputs_of_a_named_task(client, headers, images, birds):
    result = client.infer(
        "birds",
        [image_input(images)],
        model_version=birds["module_sha256"],
        headers=headers,
        parameters={"coverage": 0.5, "top_k": 2},
    )
    labels, probability = list(result.as_numpy("labels")), result.as_numpy("probability")
    assert [one.decode() for one in labels] == birds["labels"]
    assert [labels[k] for k in probability.argmax(axis=1)] == list(result.as_numpy("label"))
    assert {json.loads(one)["module_sha256"] for one in result.as_numpy("receipt")} == {
        birds["module_sha256"]
    }
    assert all(isinstance(json.loads(one), list) for one in result.as_numpy("prediction_set"))


def test_cls_vectors(client, headers, native):
    vectors = np.array([one["cls"][0] for one in native], dtype=np.float32)
    given = triton.InferInput("cls", list(vectors.shape), "FP32")
    given.set_data_from_numpy(vectors)
    parameters = {"backbone_fingerprint": native[0]["backbone_fingerprint"]}
    result = client.infer("tosca", [given], headers=headers, parameters=parameters)
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))


def test_pixels(client, headers):
    pixels = np.zeros((2, 3, 32, 32), dtype=np.float32)
    given = triton.InferInput("pixels", list(pixels.shape), "FP32")
    given.set_data_from_numpy(pixels)
    assert client.infer("tosca", [given], headers=headers).as_numpy("label").shape == (2,)


def test_asynchronous_calls(client, headers, images, native):
    answered = queue.Queue()
    client.async_infer(
        "tosca", [image_input(images)], lambda result, error: answered.put((result, error)), headers=headers
    )
    result, error = answered.get(timeout=60.0)
    assert error is None
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))


def test_the_client_for_asyncio(grpc_address, headers, images, native):
    async def ask():
        async with triton_aio.InferenceServerClient(grpc_address) as client:
            assert await client.is_server_ready()
            return await client.infer("tosca", [image_input(images)], headers=headers)

    result = asyncio.run(ask())
    assert_is_native(native, result.as_numpy("label"), result.as_numpy("confidence"))


def test_unloading_and_loading(client, headers):
    def states():
        return {one.name: one.state for one in client.get_model_repository_index(headers).models}

    assert states() == {"tosca": "READY", "birds": "READY", "cars": "READY"}
    client.unload_model("cars", headers)
    assert states()["cars"] == "UNAVAILABLE" and not client.is_model_ready("cars", headers=headers)
    client.load_model("cars", headers)
    assert states()["cars"] == "READY" and client.is_model_ready("cars", headers=headers)


def test_faults(client, headers, images):
    for call, code, fault in (
        (lambda: client.infer("ghost", [image_input(images)], headers=headers), "NOT_FOUND", "'ghost'"),
        (lambda: client.infer("tosca", [image_input(images)]), "UNAUTHENTICATED", "API key"),
        (lambda: client.get_model_metadata("ghost", headers=headers), "NOT_FOUND", "'ghost'"),
        (lambda: client.load_model("ghost", headers), "NOT_FOUND", "no task 'ghost'"),
        (lambda: client.unload_model("tosca", headers), "INVALID_ARGUMENT", "the service itself"),
        (lambda: client.get_inference_statistics(headers=headers), "UNIMPLEMENTED", ""),
        (
            lambda: client.infer("tosca", [image_input(images)], headers=headers, sequence_id=7),
            "INVALID_ARGUMENT",
            "sequence_",
        ),
        (
            lambda: client.infer("tosca", [image_input(images)], headers=headers, timeout=1),
            "DEADLINE_EXCEEDED",
            "",
        ),
    ):
        with pytest.raises(InferenceServerException) as caught:
            call()
        assert caught.value.status() == f"StatusCode.{code}" and fault in caught.value.message()


def test_the_messages_have_the_numbers_of_the_standard():
    """Against NVIDIA's own compiled definition: same names, numbers and types, field by field."""
    ours = descriptor_pb2.FileDescriptorProto.FromString(bytes.fromhex(os.environ["TOSCA_TEST_PROTO"]))

    def numbers(message):
        fields = {one.name: (one.number, one.type, one.label, one.type_name) for one in message.field}
        return {message.name: fields} | {
            f"{message.name}.{name}": found
            for nested in message.nested_type
            for name, found in numbers(nested).items()
        }

    theirs = descriptor_pb2.FileDescriptorProto()
    standard.DESCRIPTOR.CopyToProto(theirs)
    known = {k: v for one in theirs.message_type for k, v in numbers(one).items()}
    for message in ours.message_type:
        for name, fields in numbers(message).items():
            assert fields.items() <= known[name].items(), name
    methods = {one.name: (one.input_type, one.output_type) for one in theirs.service[0].method}
    for one in ours.service[0].method:
        assert methods[one.name] == (one.input_type, one.output_type)
