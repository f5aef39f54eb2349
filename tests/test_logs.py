"""Request ids, log lines and the audit log."""

import contextlib
import errno
import json
import logging
import os
from pathlib import Path

import pytest
from starlette.datastructures import Headers

from model_store.errors import UnknownTask
from service.audit import AuditLog
from service.errors import AuditUnavailable
from service.logs import JsonFormatter, TextFormatter
from service.request_context import RequestContext, context_of, current_request

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"


def test_an_id_that_came_along_is_kept() -> None:
    assert context_of(Headers({"x-request-id": "Order_1.2-3"})).request_id == "Order_1.2-3"


@pytest.mark.parametrize("given", ["", "a b", "a\nb", 'a"b', "x" * 129, "ä", "../x", "a\x00"])
def test_a_hostile_id_is_replaced(given: str) -> None:
    made = context_of(Headers({"x-request-id": given})).request_id
    assert len(made) == 32
    assert made.isalnum()


def test_ids_made_here_differ() -> None:
    assert len({context_of(Headers()).request_id for _ in range(100)}) == 100


@pytest.mark.parametrize(
    ("traceparent", "trace_id"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-01", TRACE),
        (f"cc-{TRACE}-00f067aa0ba902b7-01-what-the-future-is-like", TRACE),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-00f067aa0ba902b7", None),
        ("", None),
        ("x" * 10_000, None),
    ],
)
def test_a_trace_is_joined_as_w3c_says(traceparent: str, trace_id: str | None) -> None:
    assert context_of(Headers({"traceparent": traceparent})).trace_id == trace_id


def record(message: str, **fields: object) -> logging.LogRecord:
    made = logging.LogRecord("tosca.test", logging.INFO, "file", 1, message, (), None)
    made.fields = fields
    return made


def test_a_log_line_is_one_json_object_whatever_is_in_it() -> None:
    line = JsonFormatter().format(record('two\nlines and "quotes" \x00', status=200, path=Path("/x")))
    assert "\n" not in line
    parsed = json.loads(line)
    assert parsed["message"] == 'two\nlines and "quotes" \x00'
    assert (parsed["status"], parsed["path"], parsed["level"]) == (200, "/x", "info")


def test_log_lines_carry_the_ids_of_their_request() -> None:
    assert "request_id" not in json.loads(JsonFormatter().format(record("outside")))
    token = current_request.set(RequestContext("order-66", TRACE))
    try:
        parsed = json.loads(JsonFormatter().format(record("inside")))
        text = TextFormatter("%(message)s").format(record("inside"))
    finally:
        current_request.reset(token)
    assert (parsed["request_id"], parsed["trace_id"]) == ("order-66", TRACE)
    assert text == "inside [order-66]"


def test_a_path_cannot_forge_a_line() -> None:
    text = TextFormatter("%(levelname)s %(message)s").format(record("GET /x\nWARNING \x1b[2J/ä\u2028y"))
    assert text == "INFO GET /x\\nWARNING \\x1b[2J/ä\\u2028y"


# -- the audit log ---------------------------------------------------------------------------------------


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(one) for one in path.read_text().splitlines()]


def test_a_change_is_asked_for_before_it_happens_and_done_after(tmp_path: Path) -> None:
    path = tmp_path / "new" / "audit.jsonl"
    with AuditLog(path) as audit, audit.change("remove", author="ops", task="birds") as tell:
        assert [one["event"] for one in lines(path)] == ["asked"]
        tell(revision=7)
    asked, done = lines(path)
    assert asked.items() >= {"event": "asked", "action": "remove", "author": "ops", "task": "birds"}.items()
    assert done.items() >= {"event": "done", "action": "remove", "author": "ops", "revision": 7}.items()
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_refused_change_leaves_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with AuditLog(path) as audit, pytest.raises(UnknownTask), audit.change("remove", task="x"):
        raise UnknownTask("task 'x' is not active")
    assert lines(path)[1].items() >= {"event": "refused", "fault": "UnknownTask"}.items()


def test_the_log_is_only_ever_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    for i in range(3):
        with AuditLog(path) as audit, audit.change("remove", task=f"t{i}"):
            pass
    assert [one["task"] for one in lines(path)] == ["t0", "t0", "t1", "t1", "t2", "t2"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")  # noqa: PTH110
def test_nothing_is_changed_that_cannot_be_logged() -> None:
    happened = []
    full = pytest.raises(AuditUnavailable, match="No space")
    with AuditLog(Path("/dev/full")) as audit, full, audit.change("remove", task="x"):
        happened.append("changed")
    assert happened == []


@pytest.mark.parametrize("fault", [None, UnknownTask("task 'x' is not active")])
def test_how_a_change_ended_is_told_though_it_cannot_be_logged(
    fault: Exception | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "audit.jsonl"
    expected = contextlib.nullcontext() if fault is None else pytest.raises(UnknownTask)
    with AuditLog(path) as audit, expected, audit.change("remove", task="x"):
        monkeypatch.setattr("service.audit.os.write", full)
        if fault is not None:
            raise fault
    assert [one["event"] for one in lines(path)] == ["asked"]
    assert [one.levelname for one in caplog.records if "is missing in the audit log" in one.message] == [
        "CRITICAL"
    ]


def test_a_log_that_cannot_be_opened_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(AuditUnavailable, match="Is a directory"):
        AuditLog(tmp_path)
