"""The loader thread leaves the processors to answers."""

import os
import sys
import threading

import pytest

from service.loader import give_back_memory, make_loader


def niceness() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux alone")
def test_the_loader_yields_and_nobody_else_does() -> None:
    before = niceness()
    with make_loader(before + 3) as loader:
        assert loader.submit(niceness).result() == before + 3
    assert niceness() == before


def test_memory_is_given_back_without_a_word() -> None:
    give_back_memory()
