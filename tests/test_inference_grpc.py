"""The Open Inference Protocol over gRPC: the same answers, limits and keys as over HTTP."""

import asyncio
import gc
import json
import socket
import subprocess
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from pictures import encoded, noise
from synthetic import make_features

from model_store.backbone import Backbone
from model_store.joint import MIN_ALTERNATIVE_PROBABILITY
from model_store.store import ModelStore, with_task
from service.app import create_app
from service.errors import CannotListen
from service.feedback import Truth
from service.keys import Scope, change_keys, make_key, now_utc
from service.open_inference import inference_pb2 as pb
from service.open_inference.grpc_guard import CODE_OF
from service.open_inference.grpc_server import serving_grpc
from service.open_inference.grpc_service import SERVICE
from service.open_inference.messages import MAX_INPUTS, MAX_PARAMETERS
from service.open_inference.tensors import MAX_SIDES
from service.problems import STATUS_OF
from service.routes.state import ServiceState
from service.settings import Settings

MakeModule = Callable[..., bytes]
PICTURES = [encoded(noise(colour, seed=colour)) for colour in range(3)]
METHODS = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods_by_name
Code = grpc.StatusCode
HEALTH = {"ServerLive", "ServerReady"}  # answered without a key


class Client:
    """Calls by name over one channel; a refused call raises grpc.aio.AioRpcError."""

    def __init__(self, channel: grpc.aio.Channel, state: ServiceState) -> None:
        self.state = state
        self.channel = channel

    async def __call__(self, name: str, request: Any = None, **options: Any) -> Any:
        asked, answered = (getattr(pb, one.name) for one in _types(name))
        call = self.channel.unary_unary(
            f"/{SERVICE}/{name}",
            request_serializer=asked.SerializeToString,
            response_deserializer=answered.FromString,
        )
        return await call(asked() if request is None else request, timeout=30.0, **options)

    async def refused(self, name: str, request: Any = None, **options: Any) -> grpc.aio.AioRpcError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await self(name, request, **options)
        return caught.value


def _types(name: str) -> tuple[Any, Any]:
    return METHODS[name].input_type, METHODS[name].output_type


@pytest.fixture
def settings(tiny_store: ModelStore, make_module: MakeModule) -> Settings:
    for task, seed in (("birds", 1), ("cars", 2)):
        sha256 = tiny_store.put_module(make_module(task, seed=seed))
        tiny_store.publish(with_task(task, sha256), f"add {task}")
    return Settings(store=tiny_store.url, store_poll_s=0.0, max_images_per_request=4, grpc_port=0)


@asynccontextmanager
async def running(settings: Settings, backbone: Backbone) -> AsyncIterator[Client]:
    """The whole service with a gRPC port of its own."""
    app = create_app(settings.model_copy(update={"grpc_port": None}), backbone)
    async with app.router.lifespan_context(app):
        state = app.state.service
        state.settings = settings
        async with serving_grpc(state) as port, grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            yield Client(channel, state)


@pytest.fixture
async def client(settings: Settings, tiny_backbone: Backbone) -> AsyncIterator[Client]:
    async with running(settings, tiny_backbone) as client:
        yield client


def asking(model: str = "tosca", pictures: list[bytes] = PICTURES, **fields: Any) -> pb.ModelInferRequest:
    contents = pb.InferTensorContents(bytes_contents=pictures)
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="image", datatype="BYTES", shape=[len(pictures)], contents=contents
    )
    return pb.ModelInferRequest(model_name=model, inputs=[tensor], **fields)


def raw_output(response: pb.ModelInferResponse, name: str) -> bytes:
    place = [one.name for one in response.outputs].index(name)
    return bytes(response.raw_output_contents[place])


def texts(response: pb.ModelInferResponse, name: str) -> list[str]:
    raw, found = raw_output(response, name), []
    while raw:
        end = 4 + int.from_bytes(raw[:4], "little")
        found.append(raw[4:end].decode())
        raw = raw[end:]
    return found


async def test_answers_are_those_of_the_engine(client: Client) -> None:
    response = await client("ModelInfer", asking(id="order-66"))
    receipts = [json.loads(one) for one in texts(response, "receipt")]
    assert {one["revision"] for one in receipts} == {client.state.registry.active.revision.number}
    assert (response.id, response.model_name, len(texts(response, "label"))) == ("order-66", "tosca", 3)

    named = await client("ModelInfer", asking("birds"))
    probabilities = np.frombuffer(raw_output(named, "probability"), "<f4").reshape(3, 3)
    labels = texts(named, "labels")
    assert [labels[k] for k in probabilities.argmax(axis=1)] == texts(named, "label")

    raw = b"".join(len(one).to_bytes(4, "little") + one for one in PICTURES)
    by_raw = asking()
    by_raw.inputs[0].ClearField("contents")
    by_raw.raw_input_contents.append(raw)
    assert texts(await client("ModelInfer", by_raw), "label") == texts(response, "label")


async def test_an_answer_carries_the_id_by_which_feedback_finds_it(client: Client) -> None:
    call = client.channel.unary_unary(
        f"/{SERVICE}/ModelInfer",
        request_serializer=pb.ModelInferRequest.SerializeToString,
        response_deserializer=pb.ModelInferResponse.FromString,
    )(asking(), timeout=30.0)
    label = texts(await call, "label")[2]
    (request_id,) = [value for name, value in await call.trailing_metadata() if name == "x-request-id"]
    given, is_first = client.state.engine.recent.label(request_id, 2, Truth(None, "a bird"))
    assert (given.label, is_first) == (label, True)


async def test_a_probe_does_not_wait_for_pictures_that_are_long_in_coming(
    settings: Settings, tiny_backbone: Backbone
) -> None:
    settings = settings.model_copy(update={"max_buffered_bytes": settings.max_body_bytes})  # room for one
    async with running(settings, tiny_backbone) as client:
        stalled = client.channel.stream_unary(f"/{SERVICE}/ModelInfer")(timeout=60.0)
        await asyncio.sleep(0.2)  # it has begun, and sends nothing
        async with asyncio.timeout(10.0):
            assert (await client("ModelReady", pb.ModelReadyRequest(name="birds"))).ready
        stalled.cancel()


async def test_a_confident_task_gives_a_probability_for_each_of_its_labels(
    settings: Settings, tiny_store: ModelStore, tiny_backbone: Backbone, make_module: MakeModule
) -> None:
    sha256 = tiny_store.put_module(make_module("digits", num_classes=10))
    tiny_store.publish(with_task("digits", sha256), "add digits")
    cls_ND = make_features("digits", num_classes=10).cls_ND[::16].numpy().astype("<f4")
    tensor = pb.ModelInferRequest.InferInputTensor(name="cls", datatype="FP32", shape=[4, 192])
    fingerprint = pb.InferParameter(string_param=tiny_backbone.fingerprint)
    request = pb.ModelInferRequest(
        model_name="digits",
        inputs=[tensor],
        raw_input_contents=[cls_ND[:4].tobytes()],
        parameters={"backbone_fingerprint": fingerprint},
    )
    async with running(settings, tiny_backbone) as client:
        response = await client("ModelInfer", request)
    probabilities = np.frombuffer(raw_output(response, "probability"), "<f4").reshape(4, 10)
    assert (probabilities < MIN_ALTERNATIVE_PROBABILITY).any(axis=1).all()
    np.testing.assert_allclose(probabilities.sum(axis=1), 1.0, atol=1e-5)


async def test_health_and_metadata(client: Client) -> None:
    assert (await client("ServerLive")).live and (await client("ServerReady")).ready
    assert (await client("ServerMetadata")).name == "tosca-serving"
    model = await client("ModelMetadata", pb.ModelMetadataRequest(name="birds"))
    assert list(model.versions) == [client.state.registry.active.files["birds"].sha256]
    for name, is_ready in (("tosca", True), ("birds", True), ("ghost", False)):
        assert (await client("ModelReady", pb.ModelReadyRequest(name=name))).ready is is_ready
    client.state.is_ready = False
    assert not (await client("ServerReady")).ready
    assert not (await client("ModelReady", pb.ModelReadyRequest(name="birds"))).ready


async def test_tasks_are_unloaded_listed_and_loaded(client: Client) -> None:
    unload = pb.RepositoryModelUnloadRequest(model_name="birds")
    await client("RepositoryModelUnload", unload)
    assert "birds" not in client.state.registry.active.files
    listed = {one.name: one.state for one in (await client("RepositoryIndex")).models}
    assert listed == {"tosca": "READY", "cars": "READY", "birds": "UNAVAILABLE"}
    assert (await client.refused("RepositoryModelUnload", unload)).code() == Code.NOT_FOUND
    await client("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="birds"))
    assert "birds" in client.state.registry.active.files


async def test_faults_have_codes_and_say_what_is_wrong(client: Client) -> None:
    unknown = await client.refused("ModelInfer", asking("ghost"))
    assert unknown.code() == Code.NOT_FOUND and "model 'ghost'" in unknown.details()
    version = await client.refused("ModelInfer", asking(model_version="99"))
    assert version.code() == Code.NOT_FOUND and "not '99'" in version.details()
    unreadable = await client.refused("ModelInfer", asking(pictures=[b"no picture"]))
    assert unreadable.code() == Code.INVALID_ARGUMENT
    many = await client.refused("ModelInfer", asking(pictures=PICTURES * 2))
    assert many.code() == Code.INVALID_ARGUMENT and "at most 4" in many.details()
    wrong = asking(parameters={"top_k": pb.InferParameter(string_param="many")})
    refused = await client.refused("ModelInfer", wrong)
    assert refused.code() == Code.INVALID_ARGUMENT and "parameters.top_k" in refused.details()
    empty = await client.refused("ModelInfer", asking(parameters={"top_k": pb.InferParameter()}))
    assert empty.code() == Code.INVALID_ARGUMENT and "has no value" in empty.details()
    listed = pb.InferTensorContents(fp32_contents=[0.0] * 5000)
    tensor = pb.ModelInferRequest.InferInputTensor(
        name="pixels", datatype="FP32", shape=[2, 3, 32, 32], contents=listed
    )
    long = await client.refused("ModelInfer", pb.ModelInferRequest(model_name="tosca", inputs=[tensor]))
    assert long.code() == Code.INVALID_ARGUMENT and "send more than 3072 raw" in long.details()
    both = asking(raw_input_contents=[b"\0\0\0\0"])
    assert "both contents and raw" in (await client.refused("ModelInfer", both)).details()
    two = asking(raw_input_contents=[b"", b""])
    assert "2 raw_input_contents for 1 inputs" in (await client.refused("ModelInfer", two)).details()


async def test_a_message_lists_no_more_than_a_json_body(client: Client) -> None:
    sides, inputs, outputs, parameters = (asking() for _ in range(4))
    sides.inputs[0].shape.extend([1] * MAX_SIDES)
    inputs.inputs.extend([sides.inputs[0]] * MAX_INPUTS)
    outputs.outputs.extend([pb.ModelInferRequest.InferRequestedOutputTensor(name="label")] * 101)
    for i in range(MAX_PARAMETERS + 1):
        parameters.parameters[str(i)].bool_param = True
    for request, fault in (
        (sides, "input 'image' has 9 sides, at most 8"),
        (inputs, "9 inputs and 0 outputs: at most 8 and 100"),
        (outputs, "1 inputs and 101 outputs: at most 8 and 100"),
        (parameters, "101 parameters, at most 100"),
    ):
        refused = await client.refused("ModelInfer", request)
        assert refused.code() == Code.INVALID_ARGUMENT and fault in refused.details(), refused.details()


async def test_a_call_may_ask_for_a_minimum_revision(
    client: Client, tiny_store: ModelStore, make_module: MakeModule
) -> None:
    sha256 = tiny_store.put_module(make_module("trees", seed=3))
    number = tiny_store.publish(with_task("trees", sha256), "by another replica").number
    asked = pb.ModelMetadataRequest(name="trees")
    assert (await client.refused("ModelMetadata", asked)).code() == Code.NOT_FOUND
    answered = await client("ModelMetadata", asked, metadata=[("x-minimum-revision", str(number))])
    assert answered.versions == [sha256]
    for given, code in ((str(number + 1), Code.FAILED_PRECONDITION), ("x", Code.INVALID_ARGUMENT)):
        refused = await client.refused("ModelMetadata", asked, metadata=[("x-minimum-revision", given)])
        assert refused.code() == code
        assert dict(refused.trailing_metadata()).get("x-revision") == (str(number) if given != "x" else None)


def test_every_refusal_of_the_table_has_a_code() -> None:
    ours = {status for status in STATUS_OF.values() if status == 500 or status == 408}  # 408 is HTTP's alone
    assert set(STATUS_OF.values()) - ours == set(CODE_OF)


async def test_limits_hold(settings: Settings, tiny_backbone: Backbone) -> None:
    tight = settings.model_copy(update={"max_body_bytes": 100_000, "max_buffered_bytes": 20_000})
    async with running(tight, tiny_backbone) as client:
        long = await client.refused("ModelInfer", asking(pictures=[b"x" * 200_000]))
        assert long.code() == Code.RESOURCE_EXHAUSTED
        full = await client.refused("ModelInfer", asking(pictures=[b"x" * 30_000]))
        assert full.code() == Code.UNAVAILABLE and "at most 20000 are kept" in full.details()
        assert dict(full.trailing_metadata())["retry-after"] == "1"
        zipped = await client.refused("ModelInfer", asking(), compression=grpc.Compression.Gzip)
        assert zipped.code() == Code.UNIMPLEMENTED
        assert texts(await client("ModelInfer", asking()), "label")  # and nothing is left behind


async def test_a_queue_without_room_refuses(client: Client) -> None:
    drain = client.state.engine._drain
    drain.enter(client.state.settings.max_queued_images)
    refused = await client.refused("ModelInfer", asking())
    assert refused.code() == Code.UNAVAILABLE and "are waiting" in refused.details()
    assert int(dict(refused.trailing_metadata())["retry-after"]) >= 1
    drain.leave(client.state.settings.max_queued_images, is_answered=False)


async def test_a_bug_of_ours_is_internal_and_told_to_the_log_alone(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    async def broken(*_: Any) -> Any:
        raise RuntimeError("secret of the house")

    client.state.engine.answer = broken
    refused = await client.refused("ModelInfer", asking())
    assert refused.code() == Code.INTERNAL and "secret" not in refused.details()
    assert "secret of the house" in caplog.text


async def test_a_call_that_its_client_gives_up_leaves_the_queue(client: Client) -> None:
    started, stopped = asyncio.Event(), asyncio.Event()

    async def endless(*_: Any) -> Any:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    client.state.engine.answer = endless
    call = asyncio.create_task(client("ModelInfer", asking()))
    await started.wait()
    call.cancel()
    await stopped.wait()


async def test_a_deadline_of_microseconds_is_kept(client: Client) -> None:
    late = asking(parameters={"timeout": pb.InferParameter(int64_param=1)})
    assert (await client.refused("ModelInfer", late)).code() == Code.DEADLINE_EXCEEDED


def add_key(path: Path, *scopes: Scope) -> str:
    key, token = make_key("app", scopes, now=now_utc())
    change_keys(path, lambda keys: (*keys, key))
    return token


CALLS: list[tuple[str, Any, Scope]] = [
    ("ServerMetadata", None, "read"),
    ("ModelMetadata", pb.ModelMetadataRequest(name="birds"), "read"),
    ("ModelReady", pb.ModelReadyRequest(name="birds"), "read"),
    ("RepositoryIndex", None, "read"),
    ("ModelInfer", asking(), "predict"),
    ("RepositoryModelLoad", pb.RepositoryModelLoadRequest(model_name="birds"), "admin"),
    ("RepositoryModelUnload", pb.RepositoryModelUnloadRequest(model_name="birds"), "admin"),
]


async def test_every_call_but_health_wants_its_scope(
    settings: Settings, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    keys_file = tmp_path / "keys.json"
    others: dict[Scope, tuple[Scope, ...]] = {
        "read": ("predict", "admin"),
        "predict": ("read", "admin"),
        "admin": ("predict", "read"),
    }
    add_key(keys_file, "read")
    assert {name for name, _, _ in CALLS} == set(METHODS) - HEALTH
    async with running(settings.model_copy(update={"keys_file": keys_file}), tiny_backbone) as client:
        assert (await client("ServerLive")).live and (await client("ServerReady")).ready
        for name, request, scope in CALLS:
            assert (await client.refused(name, request)).code() == Code.UNAUTHENTICATED
            wrong = (("x-api-key", "tosca_000000000000_x"),)
            assert (await client.refused(name, request, metadata=wrong)).code() == Code.UNAUTHENTICATED
            lacking = (("authorization", f"Bearer {add_key(keys_file, *others[scope])}"),)
            refused = await client.refused(name, request, metadata=lacking)
            assert refused.code() == Code.PERMISSION_DENIED, name
            token = add_key(keys_file, scope)
            await client(name, request, metadata=(("authorization", f"Bearer {token}"),))
        token = add_key(keys_file, "predict")
        assert await client("ModelInfer", asking(), metadata=(("x-api-key", token),))


async def never() -> AsyncIterator[bytes]:
    await asyncio.Event().wait()
    yield b""


@pytest.mark.parametrize("name", METHODS)
async def test_no_message_is_received_before_its_caller_is_known(
    name: str, settings: Settings, tiny_backbone: Backbone, tmp_path: Path
) -> None:
    keys_file = tmp_path / "keys.json"
    add_key(keys_file, "read")
    async with running(settings.model_copy(update={"keys_file": keys_file}), tiny_backbone) as client:
        call = client.channel.stream_unary(f"/{SERVICE}/{name}")(never(), timeout=10.0)
        assert await call.code() == (Code.OK if name in HEALTH else Code.UNAUTHENTICATED)


async def test_a_message_that_does_not_come_or_cannot_be_read_is_refused(
    settings: Settings, tiny_backbone: Backbone
) -> None:
    async with running(settings.model_copy(update={"body_timeout_s": 0.1}), tiny_backbone) as client:
        infer = f"/{SERVICE}/ModelInfer"
        late = client.channel.stream_unary(infer)(never(), timeout=10.0)
        assert await late.code() == Code.DEADLINE_EXCEEDED
        assert "the message did not arrive within 0.1 s" in await late.details()
        broken = client.channel.unary_unary(infer)(b"\xff", timeout=10.0)
        assert await broken.code() == Code.INVALID_ARGUMENT


async def test_a_refused_message_is_freed_at_once(settings: Settings, tiny_backbone: Backbone) -> None:
    size, times = 4 * 2**20, 8
    message = asking(pictures=[b"\xff" * size]).SerializeToString()
    async with running(settings, tiny_backbone) as client:
        infer = client.channel.unary_unary(f"/{SERVICE}/ModelInfer")

        async def refuse() -> int:
            """The memory in use after it."""
            assert await infer(message).code() == Code.INVALID_ARGUMENT
            return tracemalloc.get_traced_memory()[0]

        gc.disable()
        tracemalloc.start()
        try:
            before = await refuse()
            after = [await refuse() for _ in range(times)]
        finally:
            tracemalloc.stop()
            gc.enable()
    assert after[-1] - before < 2 * size  # the last call may still be putting its message down


async def test_with_an_admin_port_tasks_are_not_changed_over_grpc(
    settings: Settings, tiny_backbone: Backbone
) -> None:
    async with running(settings.model_copy(update={"admin_port": 9999}), tiny_backbone) as client:
        for name, request, scope in CALLS:
            if scope == "admin":
                refused = await client.refused(name, request)
                assert refused.code() == Code.PERMISSION_DENIED and "admin port" in refused.details()
        assert "birds" in client.state.registry.active.files


async def test_calls_under_way_are_answered_when_the_port_closes(
    settings: Settings, tiny_backbone: Backbone
) -> None:
    app = create_app(settings.model_copy(update={"grpc_port": None}), tiny_backbone)
    async with app.router.lifespan_context(app):
        state = app.state.service
        state.settings = settings
        admitted = asyncio.Event()
        answer = state.engine.answer

        async def told(*arguments: Any) -> Any:
            admitted.set()
            return await answer(*arguments)

        state.engine.answer = told
        async with AsyncExitStack() as open_channel:
            async with serving_grpc(state) as port:
                channel = await open_channel.enter_async_context(
                    grpc.aio.insecure_channel(f"127.0.0.1:{port}")
                )
                under_way = asyncio.create_task(Client(channel, state)("ModelInfer", asking()))
                await admitted.wait()
            response = await under_way
    assert len(texts(response, "label")) == 3


async def test_a_taken_port_is_refused(settings: Settings, tiny_backbone: Backbone) -> None:
    """Even by a server that would share it: each would get half of the calls."""
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        on_it = settings.model_copy(update={"grpc_port": taken.getsockname()[1]})
        with pytest.raises(CannotListen, match="for gRPC"):
            async with running(on_it, tiny_backbone):
                pass


def test_the_compiled_messages_are_those_of_the_definition(tmp_path: Path) -> None:
    """What `make protocol` would write is what lies in the repository."""
    source = "service/open_inference/inference.proto"
    command = [sys.executable, "-m", "grpc_tools.protoc", "--proto_path=.", source]
    subprocess.run([*command, f"--python_out={tmp_path}", f"--pyi_out={tmp_path}"], check=True)
    for name in ("inference_pb2.py", "inference_pb2.pyi"):
        written = tmp_path / "service/open_inference" / name
        assert written.read_text() == (Path("service/open_inference") / name).read_text()
