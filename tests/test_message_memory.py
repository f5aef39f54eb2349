"""Memory for gRPC messages: room is made before one is received, and given back however its call ends."""

import asyncio

import pytest

from model_store.errors import InvalidRequest
from service.errors import DeadlineExceeded, Overloaded
from service.open_inference import inference_pb2 as pb
from service.open_inference.message_memory import Incoming, MessageMemory

LARGEST = 100
NAMED = pb.ModelReadyRequest(name="birds").SerializeToString()


class Sent:
    """A call whose messages are there."""

    def __init__(self, *messages: bytes) -> None:
        self._messages = [*messages]

    async def read(self) -> bytes | None:
        return self._messages.pop(0) if self._messages else None


class Arriving:
    """A call whose message is there when the client wants; whether anybody waits for it."""

    def __init__(self) -> None:
        self.is_read = asyncio.Event()
        self.is_there = asyncio.Event()

    async def read(self) -> bytes:
        self.is_read.set()
        await self.is_there.wait()
        return NAMED


async def receive(memory: MessageMemory, call: Incoming) -> str:
    async with memory.receive(call, pb.ModelReadyRequest) as message:
        return message.name


async def assert_is_empty(memory: MessageMemory, num: int) -> None:
    """Room for `num` messages of the largest kind at once."""
    arriving = [Arriving() for _ in range(num)]
    tasks = [asyncio.create_task(receive(memory, one)) for one in arriving]
    for one in arriving:
        await one.is_read.wait()
        one.is_there.set()
    await asyncio.gather(*tasks)


async def test_a_message_counts_as_the_largest_until_it_is_there() -> None:
    memory = MessageMemory(LARGEST, 2 * LARGEST, 60.0)
    first, second, third = (Arriving() for _ in range(3))
    tasks = [asyncio.create_task(receive(memory, one)) for one in (first, second, third)]
    await first.is_read.wait()
    await second.is_read.wait()
    await asyncio.sleep(0)
    assert not third.is_read.is_set()
    first.is_there.set()
    await third.is_read.wait()
    second.is_there.set()
    third.is_there.set()
    assert await asyncio.gather(*tasks) == ["birds"] * 3
    await assert_is_empty(memory, 2)


async def test_a_message_keeps_its_place_while_its_call_runs() -> None:
    memory = MessageMemory(LARGEST, LARGEST, 60.0)
    waiting = Arriving()
    async with memory.receive(Sent(NAMED), pb.ModelReadyRequest):
        task = asyncio.create_task(receive(memory, waiting))
        await asyncio.sleep(0)
        assert not waiting.is_read.is_set()
    await waiting.is_read.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await assert_is_empty(memory, 1)


async def test_a_call_waits_neither_for_room_nor_for_its_message_for_ever() -> None:
    memory = MessageMemory(LARGEST, LARGEST, 0.01)
    with pytest.raises(DeadlineExceeded, match=r"did not arrive within 0\.01 s"):
        await receive(memory, Arriving())
    async with memory.receive(Sent(NAMED), pb.ModelReadyRequest):
        with pytest.raises(Overloaded, match=r"no room for a message within 0\.01 s"):
            await receive(memory, Sent(NAMED))
    await assert_is_empty(memory, 1)


@pytest.mark.parametrize(
    ("messages", "fault"), [((), "has no message"), ((b"\xff",), "is no ModelReadyRequest")]
)
async def test_a_call_without_a_sound_message_is_refused(messages: tuple[bytes, ...], fault: str) -> None:
    memory = MessageMemory(LARGEST, LARGEST, 60.0)
    with pytest.raises(InvalidRequest, match=fault):
        await receive(memory, Sent(*messages))
    await assert_is_empty(memory, 1)
