"""The loader thread leaves the processors to answers."""

import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from model_store.freed_memory import give_back_memory
from service.loader import make_loader


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


def test_the_loader_computes_by_itself_and_nobody_else_does() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with make_loader(0) as loader, ThreadPoolExecutor(1) as later:
            assert loader.submit(torch.get_num_threads).result() == 1
            assert torch.get_num_threads() == 2
            assert later.submit(torch.get_num_threads).result() == 2
            assert loader.submit(torch.get_num_threads).result() == 1
    finally:
        torch.set_num_threads(before)
