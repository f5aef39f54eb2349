"""What the Python client asks again: only where that is safe, as often and as late as the server says."""

import httpx
import pytest
from scripted_server import CHANGE, Server, answered, ok, refused

from service.client import ClientError, Retries, ServerRefused, ServerUnreachable


def test_a_refusal_for_now_is_asked_again_when_the_server_says() -> None:
    for ask in ("ask", "ask_async"):
        server = Server(refused(**{"retry-after": "3"}), refused(429, **{"retry-after": "1"}), answered())
        answer = getattr(server, ask)(lambda client: client.predict(b"picture"))
        assert (answer.label, server.waits_s) == ("owl", [3.0, 1.0])
        assert (
            server.requests[0].content.count(b"picture") == server.requests[2].content.count(b"picture") == 1
        )


def test_without_a_word_of_the_server_waits_double_and_differ() -> None:
    server = Server(*(refused() for _ in range(4)), answered())
    server.ask(lambda client: client.predict(b"picture"))
    for wait_s, longest_s in zip(server.waits_s, (0.2, 0.4, 0.8, 1.6), strict=True):
        assert longest_s / 2 <= wait_s <= longest_s
    again = Server(refused(), answered())
    again.ask(lambda client: client.predict(b"picture"))
    assert again.waits_s[0] != server.waits_s[0]


def test_a_date_counts_from_that_of_the_response() -> None:
    dates = {"date": "Fri, 01 Jan 2016 00:00:00 GMT", "retry-after": "Fri, 01 Jan 2016 00:00:07 GMT"}
    server = Server(refused(**dates), answered())
    server.ask(lambda client: client.predict(b"picture"))
    assert server.waits_s == [7.0]


@pytest.mark.parametrize("retry_after", ["Fri, 01 Jan 2016 00:00:00 GMT", "soon", "-1"])
def test_any_retry_after_is_understood_or_left_aside(retry_after: str) -> None:
    server = Server(refused(**{"retry-after": retry_after}), answered())
    server.ask(lambda client: client.predict(b"picture"))
    assert 0.0 <= sum(server.waits_s) <= 0.2


def test_attempts_and_waits_are_bounded() -> None:
    server = Server(*(refused() for _ in range(9)))
    with pytest.raises(ServerRefused, match="256 pictures are waiting"):
        server.ask(lambda client: client.predict(b"picture"), Retries(max_attempts=3))
    assert len(server.requests) == 3
    patient = Server(refused(**{"retry-after": "3600"}))
    with pytest.raises(ServerRefused):
        patient.ask(lambda client: client.predict(b"picture"))
    assert patient.waits_s == []
    once = Server(refused())
    with pytest.raises(ServerRefused):
        once.ask(lambda client: client.predict(b"picture"), Retries.none())


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413, 415, 422, 500, 504])
def test_other_refusals_are_final_and_say_why(status: int) -> None:
    document = {"type": "urn:tosca:problem:unknown-task", "detail": "no such task", "request_id": "order-66"}
    server = Server(httpx.Response(status, json=document))
    with pytest.raises(ServerRefused) as caught:
        server.ask(lambda client: client.task("owls"))
    refusal = caught.value
    assert (refusal.status, refusal.kind, refusal.detail) == (status, "unknown-task", "no such task")
    assert (refusal.request_id, str(refusal)) == ("order-66", f"{status}: no such task")


def test_a_broken_connection_is_tried_again_only_where_that_is_safe() -> None:
    broken = httpx.ReadError("connection reset")
    server = Server(broken, answered())
    assert server.ask(lambda client: client.predict(b"picture")).label == "owl"
    for call in (lambda client: client.remove_task("birds"), lambda client: client.rollback(3)):
        server = Server(broken)
        with pytest.raises(ServerUnreachable, match="connection reset"):
            server.ask(call)
        with pytest.raises(ServerRefused):  # it may have been done
            Server(refused()).ask(call)
        assert Server(httpx.ConnectError("refused"), ok(CHANGE)).ask(call).revision == 8  # nothing was sent
        assert Server(refused(429), ok(CHANGE)).ask(call).revision == 8  # refused before anything was done


@pytest.mark.parametrize("body", [b"<html>", b"[]", b'{"hello": 1}'])
def test_another_servers_answer_is_named_as_such(body: bytes) -> None:
    with pytest.raises(ClientError, match="not TOSCA's"):
        Server(httpx.Response(200, content=body)).ask(lambda client: client.tasks())
    with pytest.raises(ServerRefused, match="502"):
        Server(httpx.Response(502, content=body)).ask(lambda client: client.tasks())
