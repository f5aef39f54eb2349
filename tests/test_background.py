"""`make stop` ends the server that `make serve` started, and no other process."""

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from service.background import PID_FILE, stop

Start = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    """A process that sleeps, whose first word is a script's name, and whose number is in the file."""
    monkeypatch.chdir(tmp_path)
    started = []

    def run(script: str, *words: str) -> "subprocess.Popen[bytes]":
        Path(script).write_text("import time; print(flush=True); time.sleep(60)")
        process = subprocess.Popen([sys.executable, script, *words], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None
        process.stdout.readline()
        PID_FILE.parent.mkdir(exist_ok=True)
        PID_FILE.write_text(str(process.pid))
        return process

    yield run
    for one in started:
        one.kill()
        one.communicate()


def test_the_server_is_ended(start: Start) -> None:
    process = start("tosca", "serve", "--port", "8000")
    reaper = threading.Thread(target=process.wait)
    reaper.start()
    stop()
    reaper.join(60)
    assert process.returncode == -15
    assert not PID_FILE.exists()


@pytest.mark.parametrize("words", [("editor", "serve"), ("tosca", "train")])
def test_a_process_that_has_the_number_by_chance_is_left_alone(words: tuple[str, ...], start: Start) -> None:
    process = start(*words)
    stop()
    assert process.poll() is None
    assert not PID_FILE.exists()


def test_a_number_that_nobody_has_is_forgotten(start: Start) -> None:
    process = start("tosca", "serve")
    process.kill()
    process.wait()
    stop()
    assert not PID_FILE.exists()
