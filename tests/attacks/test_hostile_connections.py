"""Connections that want too much: endless headers, no headers, half bodies, too many of them, no HTTP at all."""

import json
import re
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import httpx
import pytest
from pictures import encoded, noise
from serving import RunningServer, running_server

from model_store.backbone import BackboneArtefact
from model_store.store import ModelStore, with_task

PICTURE = encoded(noise())
MAX_HEADER_BYTES = 8192
MAX_CONNECTIONS = 40
TIMEOUT_S = 1.0


@pytest.fixture(scope="module")
def server(
    tiny_artefact: BackboneArtefact,
    make_module: Callable[..., bytes],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("hostile")
    store = ModelStore(folder / "store")
    store.publish_first(store.put_backbone(tiny_artefact))
    store.publish(with_task("birds", store.put_module(make_module("birds"))), "add birds")
    limits = {
        "keep_alive_s": TIMEOUT_S,
        "max_header_bytes": MAX_HEADER_BYTES,
        "max_connections": MAX_CONNECTIONS,
        "header_timeout_s": TIMEOUT_S,
        "body_timeout_s": TIMEOUT_S,
        "max_body_bytes": 2**20,
    }
    with running_server(store.url, folder / "log", **limits) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_server_lives_on(server: RunningServer) -> Iterator[None]:
    """Whatever a test sent, the next caller is served."""
    yield
    assert httpx.post(f"{server.url}/predict", content=PICTURE, timeout=20.0).status_code == 200
    assert server.process.poll() is None


def connect(server: RunningServer, receive_bytes: int | None = None) -> socket.socket:
    """`receive_bytes`: about how much may wait here to be read, instead of the system's megabytes."""
    url = httpx.URL(server.url)
    connection = socket.socket()
    if receive_bytes is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    connection.settimeout(20.0)
    connection.connect((url.host, url.port))
    return connection


def answer_of(connection: socket.socket) -> tuple[int, dict[str, object]]:
    """Status and problem document of what comes back until the server closes the connection."""
    received = b""
    try:
        while piece := connection.recv(65536):
            received += piece
    except ConnectionResetError:
        pass
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"application/problem+json" in head, received[:300]
    return int(head.split()[1]), json.loads(body)


def exchange(server: RunningServer, data: bytes) -> tuple[int, dict[str, object]]:
    with closing(connect(server)) as connection:
        with suppress(BrokenPipeError, ConnectionResetError):  # refused amid it
            connection.sendall(data)
        return answer_of(connection)


def test_one_huge_header_is_refused(server: RunningServer) -> None:
    head = b"GET /tasks HTTP/1.1\r\nHost: x\r\nX-Huge: " + b"a" * 2 * MAX_HEADER_BYTES + b"\r\n\r\n"
    assert exchange(server, head)[0] == 431


def test_many_small_headers_are_refused(server: RunningServer) -> None:
    lines = b"".join(b"X-%d: a\r\n" % i for i in range(MAX_HEADER_BYTES // 4))
    assert exchange(server, b"GET /tasks HTTP/1.1\r\nHost: x\r\n" + lines + b"\r\n")[0] == 431


def test_a_huge_request_line_is_refused(server: RunningServer) -> None:
    path = b"/" + b"a" * 2 * MAX_HEADER_BYTES
    assert exchange(server, b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")[0] == 431


def test_headers_without_an_end_are_refused_while_they_come(server: RunningServer) -> None:
    """No blank line ever comes: what has come is bounded, long before the time is up (which is a 408)."""
    head = b"GET /tasks HTTP/1.1\r\nHost: x\r\nX-Endless: "
    assert exchange(server, head + b"a" * 2 * MAX_HEADER_BYTES)[0] == 431


def test_headers_of_a_second_request_are_bounded_too(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(b"GET /health/live HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        connection.sendall(
            b"GET /tasks HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2 * MAX_HEADER_BYTES + b"\r\n\r\n"
        )
        assert answer_of(connection)[0] == 431


def test_as_many_header_bytes_as_allowed_are_served(server: RunningServer) -> None:
    headers = {"x-large": "a" * (MAX_HEADER_BYTES - 1000)}
    assert httpx.get(f"{server.url}/tasks", headers=headers).status_code == 200


def test_a_picture_larger_than_the_header_limit_is_served(server: RunningServer) -> None:
    large = encoded(noise(size=(200, 200)))
    assert len(large) > 2 * MAX_HEADER_BYTES
    assert httpx.post(f"{server.url}/predict", content=large).status_code == 200


def test_who_sends_nothing_is_not_waited_for(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        assert answer_of(connection)[0] == 408


def test_who_sends_headers_drop_by_drop_is_not_waited_for(server: RunningServer) -> None:
    with closing(connect(server)) as connection:
        connection.sendall(b"GET /tasks HTTP/1.1\r\nHost: x\r\n")
        assert answer_of(connection)[0] == 408


def test_who_sends_half_a_body_is_not_waited_for(server: RunningServer) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n"
    status, problem = exchange(server, head + b"x" * 500)
    assert status == 408
    assert problem["type"] == "urn:tosca:problem:body-timeout"


@pytest.mark.parametrize(
    "rest",
    [b"x", b"x" * 1000, b"x" * 1000 + b"\r\n", b"x" * 1000 + b"GET"],
    ids=["a byte", "a body", "a line too much", "half a head"],
)
def test_who_is_answered_and_then_stops_sending_is_not_waited_for(rest: bytes, server: RunningServer) -> None:
    """Bytes after an answer are no reason to keep a connection for ever."""
    with closing(connect(server)) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(rest)
        while connection.recv(65536):
            pass


@pytest.mark.parametrize("path", ["/predict", "/v2/models/tosca/infer", "/tasks"])
@pytest.mark.parametrize("media_type", ["application/json", "multipart/form-data; boundary=x"])
def test_who_leaves_amid_a_body_is_no_bug_of_ours(path: str, media_type: str, server: RunningServer) -> None:
    request_id = uuid.uuid4().hex
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nX-Request-Id: {request_id}\r\nContent-Type: {media_type}\r\n"
    with closing(connect(server)) as connection:
        connection.sendall(head.encode() + b"Content-Length: 1000\r\n\r\n--x\r\n")
    deadline = time.monotonic() + 20.0
    while request_id not in server.log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lines = [json.loads(one) for one in server.log.read_text().splitlines() if request_id in one]
    assert [one["status"] for one in lines] == [499]
    assert 'reason="internal"' not in httpx.get(f"{server.url}/metrics").text


def test_a_body_that_announces_too_much_is_refused_before_it_comes(server: RunningServer) -> None:
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999\r\n\r\n"
    assert exchange(server, head)[0] == 413


def test_a_chunked_body_without_an_end_is_refused_while_it_comes(server: RunningServer) -> None:
    chunk = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    head = b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    assert exchange(server, head + chunk * 17)[0] == 413


def send_until_refused(connection: socket.socket, data: bytes, most_bytes: int) -> int:
    """Bytes sent, `data` again and again, until the server took no more of them."""
    sent = 0
    with suppress(BrokenPipeError, ConnectionResetError):
        while sent < most_bytes:
            connection.sendall(data)
            sent += len(data)
    return sent


ENDLESS = {
    "trailers": (b"3\r\nabc\r\n0\r\n", b"X-Trailer: a\r\n" * 5000),
    "one trailer": (b"0\r\nX-Trailer: ", b"a" * 2**16),
    "an extension of a chunk": (b"3;a=", b"a" * 2**16),
    "chunks of a byte": (b"", b"1\r\nx\r\n" * 10_000),
}


@pytest.mark.parametrize("path", ["/predict", "/nowhere"])
@pytest.mark.parametrize("name", ENDLESS)
def test_what_is_around_a_chunked_body_is_bounded(name: str, path: str, server: RunningServer) -> None:
    """Whether the body is awaited or was refused by its head."""
    begin, more = ENDLESS[name]
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    with closing(connect(server)) as connection:
        connection.sendall(head)
        if path == "/nowhere":
            assert connection.recv(65536).startswith(b"HTTP/1.1 404")
        connection.sendall(begin)
        assert send_until_refused(connection, more, most_bytes=2**25) < 2**25


def test_a_body_with_short_trailers_is_served(server: RunningServer) -> None:
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in (PICTURE[:1000], PICTURE[1000:]))
    with closing(connect(server)) as connection:
        connection.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        connection.sendall(chunks + b"0\r\nX-Digest: abc\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "data",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 64,  # a TLS greeting
        b"\x00" * 200,
        b"HELO example.org\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET http://[bad HTTP/1.1\r\nHost: x\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        b"POST /predict HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /tasks HTTP/1.1\r\nHost: x\r\nbad header\r\n\r\n",
    ],
    ids=[
        "TLS",
        "zeros",
        "SMTP",
        "version",
        "URL",
        "negative length",
        "two lengths",
        "smuggling",
        "bad chunk",
        "header without colon",
    ],
)
def test_what_is_no_http_is_refused(data: bytes, server: RunningServer) -> None:
    assert exchange(server, data)[0] == 400


UPGRADE = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n"


def answers_of(connection: socket.socket, data: bytes) -> list[bytes]:
    """The status lines of what comes back for `data` and, to end it, a request that closes the connection."""
    connection.sendall(data + b"GET /health/live HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    received = b""
    while piece := connection.recv(65536):
        received += piece
    return re.findall(rb"HTTP/1\.1 (\d+)", received)


@pytest.mark.parametrize("wish", [UPGRADE, b"Connection: upgrade\r\nUpgrade: websocket\r\n"])
def test_a_wish_to_upgrade_is_ignored(wish: bytes, server: RunningServer) -> None:
    length = b"Content-Length: %d\r\n\r\n" % len(PICTURE)
    post = b"POST /predict HTTP/1.1\r\nHost: x\r\n" + wish + length
    with closing(connect(server)) as connection:
        connection.sendall(post)
        assert answers_of(connection, PICTURE + (post + PICTURE) * 3) == [b"200"] * 5


@pytest.mark.parametrize("method", ["POST", "CONNECT"])
def test_no_body_is_taken_for_a_request(method: str, server: RunningServer) -> None:
    hidden = b"GET /tasks HTTP/1.1\r\nHost: x\r\n\r\n"
    head = f"{method} /predict HTTP/1.1\r\nHost: x\r\nContent-Length: {len(hidden)}\r\n".encode()
    with closing(connect(server)) as connection:
        answers = answers_of(connection, head + UPGRADE + b"\r\n" + hidden)
    assert answers == ([b"415", b"200"] if method == "POST" else [b"400"])


def test_very_many_wishes_in_one_read_are_bounded(server: RunningServer) -> None:
    ask = b"GET /nowhere HTTP/1.1\r\nHost: x\r\n" + UPGRADE + b"\r\n"
    with closing(connect(server)) as connection:
        assert answers_of(connection, ask * 2000) == [b"404"] * 2000 + [b"200"]


def test_websockets_are_not_spoken_here(server: RunningServer) -> None:
    upgrade = {
        "connection": "Upgrade",
        "upgrade": "websocket",
        "sec-websocket-version": "13",
        "sec-websocket-key": "dGhlIHNhbXBsZSBub25jZQ==",
    }
    assert httpx.get(f"{server.url}/predict", headers=upgrade).status_code == 405


def test_more_connections_than_allowed_are_refused_and_those_there_go_on(server: RunningServer) -> None:
    with httpx.Client(base_url=server.url) as client:
        assert client.get("/health/live").status_code == 200
        idle = [connect(server) for _ in range(MAX_CONNECTIONS + 5)]
        try:
            assert client.get("/health/live").status_code == 200
            assert answer_of(idle[-1])[0] == 503
        finally:
            for one in idle:
                one.close()


def test_who_does_not_take_its_answers_is_not_waited_for(server: RunningServer) -> None:
    with ExitStack() as stack:
        for _ in range(MAX_CONNECTIONS):
            deaf = stack.enter_context(closing(connect(server, receive_bytes=2048)))
            deaf.sendall(b"GET /openapi.json HTTP/1.1\r\nHost: x\r\n\r\n" * 40)
        deadline = time.monotonic() + 60.0
        while httpx.get(f"{server.url}/health/live", timeout=20.0).status_code != 200:
            assert time.monotonic() < deadline


def test_paths_and_queries_full_of_control_characters_are_refused(server: RunningServer) -> None:
    for path in (
        "/tasks/%00",
        "/tasks/%0d%0aX-Injected:%201",
        "/tasks/..%2f..%2fetc%2fpasswd",
        "/tasks/" + "a" * 4000,
    ):
        response = httpx.get(f"{server.url}{path}")
        assert response.status_code == 404
        assert response.headers["content-type"] == "application/problem+json"
        assert "x-injected" not in response.headers


def test_the_log_of_all_this_is_one_json_object_a_line(server: RunningServer) -> None:
    log = Path(server.log)
    for line in log.read_text().splitlines():
        json.loads(line)
