"""What a call of `tosca` gave, and what it must have said."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
