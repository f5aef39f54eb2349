"""The tutorial holds: its commands are run in its order, in a folder that looks as after a first `make serve`."""

import os
import re
import shlex
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest
from documents import Block, blocks
from synthetic import DEMO_PICTURES, DEMO_STORE

from website.repository_links import ROOT

PAGE = PurePosixPath("docs/tutorial.md")
PORT_OF_THE_PAGE = "8000"
TOLERANCE = 0.1  # of figures with decimals, as the page says
TIMEOUT_S = 280
NUM_DEMO_REVISIONS = 3
_NUMBER = r"-?\d+\.\d+(?:e-?\d+)?|-?\d+e-?\d+"
# Another machine rounds otherwise: what the page shows as 1.0 may be 0.9999999 or 1.
_FIGURE = re.compile(rf"(?P<any>…)|(?P<seconds>\d+\.\d+ s\b)|(?P<figure>{_NUMBER})|(?P<space>\s+)")


def steps() -> Iterator[tuple[Block, str | None]]:
    """The blocks of commands, each with the output that the page shows for it."""
    listed = [block for block in blocks(PAGE) if block.language in ("bash", "text", "json")]
    for i, block in enumerate(listed):
        if block.language == "bash":
            shown = listed[i + 1] if i + 1 < len(listed) and listed[i + 1].language != "bash" else None
            yield block, shown.text if shown else None


def mismatch(shown: str, output: str) -> str | None:
    """Why an output is not what the page shows, or None: see the top of the page for what may differ."""
    pattern, expected, end = "", [], 0
    shown = shown.strip()
    for found in _FIGURE.finditer(shown):
        pattern += re.escape(shown[end : found.start()])
        if found["any"]:
            pattern += r"[\s\S]*?"
        elif found["seconds"]:
            pattern += r"\d+\.\d+ s\b"
        elif found["space"]:
            pattern += r"\s*" if "…" in shown[found.start() - 1 : found.end() + 1] else r"\s+"
        else:
            pattern += rf"({_NUMBER}|\d+)"
            expected.append(float(found["figure"]))
        end = found.end()
    pattern += re.escape(shown[end:])
    match = re.fullmatch(pattern, output.strip())
    if match is None:
        return f"expected\n{shown}\ngot\n{output}"
    for wanted, got in zip(expected, match.groups(), strict=True):
        if abs(wanted - float(got)) > TOLERANCE:
            return f"expected about {wanted:g}, got {got} in\n{output}"
    return None


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A folder like a clone after `make demo`: the environment, the demo's pictures and its first revisions."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / ".venv").mkdir()
    for one in (ROOT / ".venv").iterdir():
        (tmp_path / ".venv" / one.name).symlink_to(one)
    store, source = tmp_path / ".tosca" / "store", (ROOT / DEMO_STORE).resolve()
    (store / "revisions").mkdir(parents=True)
    (store / "backbones").symlink_to(source / "backbones")
    shutil.copytree(source / "modules", store / "modules")
    for revision in sorted((source / "revisions").glob("*.json"))[:NUM_DEMO_REVISIONS]:
        shutil.copy(revision, store / "revisions")
    (tmp_path / ".tosca" / "demo").symlink_to((ROOT / DEMO_PICTURES).resolve())
    installed = tmp_path / ".venv" / ".installed"
    installed.unlink()
    for stamp in (installed, tmp_path / ".tosca" / "demo.done"):  # `make` has nothing left to do
        stamp.touch()
        newer = max(time.time(), (ROOT / "pyproject.toml").stat().st_mtime + 1)
        os.utime(stamp, (newer, newer))
    return tmp_path


@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 60)
def test_every_command_of_the_tutorial_prints_what_the_page_shows(clone: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    pairs = list(steps())
    assert len(pairs) >= 10
    script = ["set -euo pipefail"]
    for i, (block, _) in enumerate(pairs):
        commands = block.text.replace(f":{PORT_OF_THE_PAGE}", f":{port}")
        script.append(f"echo {shlex.quote(f'line {block.line}')} >&2\n{{\n{commands}}} > output.{i}")
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("TOSCA_", "MAKE", "MFLAGS"))
    }
    try:
        result = subprocess.run(
            ["bash", "-c", "\n".join(script)],
            cwd=clone,
            env=kept | {"PORT": port},
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
    finally:
        subprocess.run(["make", "stop"], cwd=clone, env=kept, capture_output=True, timeout=150, check=False)
    assert result.returncode == 0, result.stderr
    for i, (block, shown) in enumerate(pairs):
        output = (clone / f"output.{i}").read_text().replace(f":{port}", f":{PORT_OF_THE_PAGE}")
        print(f"--- {PAGE}:{block.line}\n{block.text}\n{output}")
        if shown is not None:
            fault = mismatch(shown, output)
            assert fault is None, f"{PAGE}:{block.line}: {fault}"


def test_outputs_are_compared_with_their_figures() -> None:
    shown = 'in 1.9 s\n{\n  "p": 0.66,\n  …\n  "task": "a", "sha": "…"\n}'
    assert (
        mismatch(shown, 'in 11.4 s\n{\n  "p": 0.7123,\n  "x": 1,\n  "y": 2,\n  "task": "a", "sha": "ff"\n}')
        is None
    )
    assert mismatch(shown, 'in 1.9 s\n{\n  "p": 0.7123,\n  "task": "a", "sha": ""\n}') is None
    assert "about 0.66" in str(mismatch(shown, 'in 1.9 s\n{\n  "p": 0.5,\n  "task": "a", "sha": ""\n}'))
    assert "expected" in str(mismatch(shown, 'in 1.9 s\n{\n  "p": 0.66,\n  "task": "b", "sha": ""\n}'))
    assert "expected" in str(mismatch(shown, 'in 1.9 s\n{\n  "p": 0.66,\n  "task": "a", "sha": ""\n}\nmore'))
    assert mismatch('"p": 1.0', '"p": 0.9999') is None
    assert mismatch('"revision": 4', '"revision": 5') is not None
