"""KServe's REST and gRPC clients, unmodified."""

import asyncio
import json

import httpx
import numpy as np
import pytest
from conftest import assert_is_native
from kserve import InferenceGRPCClient, InferenceRESTClient, InferInput, InferRequest, RESTConfig


def ask(address, call):
    """What `call(client, base_url)` returns with a REST client that lives as long."""

    async def run():
        client = InferenceRESTClient(RESTConfig(protocol="v2", timeout=60))
        try:
            return await call(client, f"http://{address}")
        finally:
            await client.close()

    return asyncio.run(run())


def ask_grpc(address, call):
    async def run():
        async with InferenceGRPCClient(address, timeout=60) as client:
            return await call(client)

    return asyncio.run(run())


def request_for(model, images, binary_data=True, **parameters):
    given = InferInput("image", list(images.shape), "BYTES")
    given.set_data_from_numpy(images, binary_data=binary_data)
    return InferRequest(model, [given], parameters=parameters or None)


def outputs_of(response):
    return {one.name: one.as_numpy() for one in response.outputs}


def test_rest_health(http_address, headers):
    async def call(client, url):
        return (
            await client.is_server_live(url),
            await client.is_server_ready(url),
            await client.is_model_ready(url, "birds", headers=headers),
            await client.is_model_ready(url, "ghost", headers=headers),
        )

    assert ask(http_address, call) == (True, True, True, False)


@pytest.mark.parametrize("binary_output", [True, False])
def test_rest_answers_a_batch_as_predict_does(http_address, headers, images, native, binary_output):
    asked = request_for("tosca", images, binary_data_output=binary_output)

    async def call(client, url):
        return await client.infer(url, asked, model_name="tosca", headers=headers)

    given = outputs_of(ask(http_address, call))
    assert_is_native(native, given["label"], given["confidence"])


def test_rest_answers_a_named_task(http_address, headers, images, birds):
    asked = request_for("birds", images)

    async def call(client, url):
        return await client.infer(url, asked, model_name="birds", headers=headers)

    given = outputs_of(ask(http_address, call))
    assert {json.loads(one)["module_sha256"] for one in given["receipt"]} == {birds["module_sha256"]}
    np.testing.assert_allclose(
        given["probability"].reshape(3, -1).max(axis=1), given["confidence"], atol=1e-6
    )


def test_rest_faults(http_address, headers, images):
    async def unknown(client, url):
        return await client.infer(url, request_for("ghost", images), model_name="ghost", headers=headers)

    async def keyless(client, url):
        return await client.infer(url, request_for("tosca", images), model_name="tosca")

    for call, status in ((unknown, 404), (keyless, 401)):
        with pytest.raises(httpx.HTTPStatusError) as caught:
            ask(http_address, call)
        assert caught.value.response.status_code == status


def test_grpc_health(grpc_address, headers):
    metadata = list(headers.items())

    async def call(client):
        return (
            await client.is_server_live(),
            await client.is_server_ready(),
            await client.is_model_ready("birds", headers=metadata),
            await client.is_model_ready("ghost", headers=metadata),
        )

    assert ask_grpc(grpc_address, call) == (True, True, True, False)


@pytest.mark.parametrize("model", ["tosca", "birds"])
def test_grpc_answers_a_batch(grpc_address, headers, images, native, birds, model):
    async def call(client):
        return await client.infer(request_for(model, images), headers=list(headers.items()))

    response = ask_grpc(grpc_address, call)
    given = outputs_of(response)
    if model == "tosca":
        assert_is_native(native, given["label"], given["confidence"])
    else:
        assert response.model_version == birds["module_sha256"]
        assert given["probability"].reshape(3, -1).shape[1] == len(birds["labels"])
