"""What uvicorn leaves unbounded on a connection: size and time of the headers, what comes around the bytes of
a body, the time of what nobody waits for, and how many connections."""

import asyncio
import json
import logging
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from httptools import HttpParserError, HttpParserUpgrade, HttpRequestParser
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from service.settings import Settings

log = logging.getLogger("tosca.http")


def bounded_protocol(
    settings: Settings, on_refusal: Callable[[str], None] = lambda _: None
) -> type[HttpToolsProtocol]:
    """uvicorn's HTTP protocol with the limits of `settings` on every connection; `on_refusal` is told the
    kind of every refusal made before there is a request."""

    class BoundedProtocol(HttpToolsProtocol):
        _head_bytes = 0
        _read_bytes = 0  # of the read at hand, while they can only be of the head that begins in it
        _is_in_head = True
        _is_in_body = False
        _body_bytes = 0  # of the read at hand
        _framing_bytes = 0  # chunk sizes and trailers, less a byte for each that came of the body itself
        _timer: asyncio.TimerHandle | None = None  # of a head, or of what comes after an answer
        _begun: RequestResponseCycle | None = None  # the request that the application has
        _write_timer: asyncio.TimerHandle | None = None  # of what the client does not take

        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._pieces: list[bytes] = []  # of a body, of the read at hand

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            if len(self.connections) > settings.max_connections:
                self._refuse(503, "overloaded", f"more than {settings.max_connections} connections are open")
                return
            self._watch()

        def connection_lost(self, exc: Exception | None) -> None:
            self._stop_timer()
            self._stop_write_timer()
            self._unset_keepalive_if_required()  # uvicorn leaves it behind when a connection was reset
            if self._begun is not None:  # uvicorn tells the newest of pipelined requests alone
                self._begun.disconnected = True
                self._begun.message_event.set()
            super().connection_lost(exc)

        def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
            self._begun = cycle
            super()._start_asgi_task(cycle, app)

        def data_received(self, data: bytes) -> None:
            if self.transport.is_closing():
                return
            self._unset_keepalive_if_required()
            self._head_bytes += len(data)
            self._read_bytes = len(data)
            self._body_bytes = 0
            cycle = self.cycle
            try:
                self._parse(data)
            except HttpParserError:
                self._refuse(400, "malformed-request", "no valid HTTP request")
            self._hand_on_body()
            # One read may hold the whole head and the beginning of a body, so only what is left open counts.
            if self._is_in_head and self._head_bytes > settings.max_header_bytes:
                self._refuse_head()
            elif self._is_in_body and self.cycle is cycle:  # the read that ends the head does not count
                self._count_framing(len(data) - self._body_bytes)
            self._watch()

        def _parse(self, data: bytes) -> None:
            """A wish to upgrade is ignored (RFC 9110, 7.8): uvicorn would take the body that comes with it
            for the next request."""
            rest = memoryview(data)
            while not self.transport.is_closing():
                try:
                    self.parser.feed_data(rest)
                    return
                except HttpParserUpgrade as wish:
                    if self.parser.get_method() == b"CONNECT":
                        self._refuse(400, "malformed-request", "this is no proxy")
                        return
                    self._parse_again_without_wish()
                    rest = rest[wish.args[0] :]

        def _parse_again_without_wish(self) -> None:
            """The parser skips the body of such a request, so another one gets the same head without it."""
            version = self.parser.get_http_version().encode()
            lines = [b"%b %b HTTP/%b" % (self.parser.get_method(), self.url, version)]
            lines += [b"%b: %b" % one for one in self.headers if one[0] != b"upgrade"]
            self.parser = HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it
            self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

        def on_message_begin(self) -> None:
            super().on_message_begin()
            self._head_bytes = self._read_bytes
            if not self._is_in_head:
                self._stop_timer()
                self._is_in_head = True

        def on_header(self, name: bytes, value: bytes) -> None:
            if self._is_in_head:  # uvicorn would keep trailers, which nobody reads
                super().on_header(name, value)

        def on_headers_complete(self) -> None:
            self._stop_timer()
            if self.parser.should_upgrade() or self.transport.is_closing():
                return
            self._is_in_head = False
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > settings.max_header_bytes:
                self._refuse_head()
                return
            super().on_headers_complete()
            self._is_in_body = True
            self._framing_bytes = 0

        def on_body(self, body: bytes) -> None:
            self._body_bytes += len(body)
            self._pieces.append(body)

        def _hand_on_body(self) -> None:
            """One piece a read, however many chunks it held."""
            pieces = b"".join(self._pieces)
            self._pieces.clear()
            if pieces and not self.transport.is_closing():
                super().on_body(pieces)

        def on_message_complete(self) -> None:
            if self.parser.should_upgrade():
                return
            self._stop_timer()
            self._read_bytes = 0
            self._is_in_body = False
            self._hand_on_body()
            if not self.transport.is_closing():
                super().on_message_complete()

        def _count_framing(self, size: int) -> None:
            """A read of a body held `size` bytes around those of the body, each of which pays for one."""
            self._framing_bytes = max(0, self._framing_bytes + size - self._body_bytes)
            if self._framing_bytes > settings.max_header_bytes:
                detail = f"chunk sizes and trailers have {settings.max_header_bytes} bytes more than the body"
                self._refuse(431, "headers-too-large", detail)

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.transport.is_closing():
                self._watch_writing()
            elif self._is_in_head or self._is_in_body:
                self._watch()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._watch_writing()

        def resume_writing(self) -> None:
            super().resume_writing()
            if not self.transport.is_closing():
                self._stop_write_timer()

        def timeout_keep_alive_handler(self) -> None:
            self._close()

        def _watch(self) -> None:
            """Bound the time of what the client owes: a head, the rest of a body, another request."""
            is_answered = self.cycle is None or self.cycle.response_complete
            if self._timer is not None or self.transport.is_closing() or not is_answered:
                return  # an answer has the bounds of the application, and what comes next waits for it
            if self._is_in_head:
                self._timer = self.loop.call_later(settings.header_timeout_s, self._give_up)
            else:
                time_s = settings.body_timeout_s if self._is_in_body else settings.keep_alive_s
                self._timer = self.loop.call_later(time_s, self._close)

        def _stop_timer(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

        def _watch_writing(self) -> None:
            if self._write_timer is None:
                self._write_timer = self.loop.call_later(settings.body_timeout_s, self.transport.abort)

        def _stop_write_timer(self) -> None:
            if self._write_timer is not None:
                self._write_timer.cancel()
                self._write_timer = None

        def _close(self) -> None:
            """Once the client has taken what was written, for which it has its time."""
            self.transport.close()
            self._watch_writing()

        def _give_up(self) -> None:
            log.info("closing a connection whose headers did not arrive")
            self._refuse(408, "header-timeout", f"no headers within {settings.header_timeout_s:g} s")

        def _refuse_head(self) -> None:
            detail = f"request line and headers have more than {settings.max_header_bytes} bytes"
            self._refuse(431, "headers-too-large", detail)

        def _is_next(self) -> bool:
            """Whether the client takes what is written now for the answer to what it is sending."""
            if self._is_in_body:
                return not self.cycle.response_started and not self.pipeline
            return self.cycle is None or self.cycle.response_complete

        def _refuse(self, status: int, kind: str, detail: str) -> None:
            if not self.transport.is_closing():
                on_refusal(kind)
                if self._is_next():
                    self.transport.write(_problem(status, kind, detail))
                self._close()

    return BoundedProtocol


def _problem(status: int, kind: str, detail: str) -> bytes:
    """A whole response with a problem document, for refusals before there is a request."""
    phrase = HTTPStatus(status).phrase
    fields: dict[str, Any] = {"type": f"urn:tosca:problem:{kind}", "title": phrase, "status": status}
    body = json.dumps(fields | {"detail": detail, "instance": ""}).encode()
    lines = [
        f"HTTP/1.1 {status} {phrase}",
        "content-type: application/problem+json",
        f"content-length: {len(body)}",
        "connection: close",
        *(["retry-after: 1"] if status == 503 else []),
    ]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body
