"""Calling `tosca` in this process: what it gave, and what it must have said."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from model_store import commands

TINY = "vit_tiny_patch16_224"


@dataclass(frozen=True)
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Tosca = Callable[..., Result]


def call_tosca(*arguments: object) -> int:
    """The exit status of `tosca ARGS`, which leaves no command registered; faults other than its own come
    through."""
    registered = list(commands.app.registered_commands), list(commands.app.registered_groups)
    code: object = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["tosca", *(str(one) for one in arguments)])
        try:
            commands.main()
        except SystemExit as stop:
            code = stop.code or 0
        finally:
            commands.app.registered_commands[:], commands.app.registered_groups[:] = registered
    assert isinstance(code, int)
    return code


def assert_fault(result: Result, fault: str) -> None:
    """One line that names the fault, status 1, no stack trace."""
    assert result.code == 1
    assert "error: " in result.err and fault in " ".join(result.err.split())
    assert "Traceback" not in result.err and result.out == ""


def assert_usage(result: Result, fault: str) -> None:
    """Wrong options: status 2 and what was expected."""
    assert result.code == 2
    assert fault in " ".join(result.err.replace("│", " ").split())
    assert "Traceback" not in result.err
