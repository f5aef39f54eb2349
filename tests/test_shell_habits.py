"""How `tosca` behaves in a shell: help, pipes, colours, completion, exit statuses."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer
from tosca_command import Result, Tosca, call_tosca

from model_store import commands
from model_store.backbone import BackboneArtefact
from model_store.store import ModelStore
from service.server import DEAD_STATUS

TOSCA = Path(sys.executable).with_name("tosca")
REFERENCE = Path("docs/cli.md").read_text()
ESCAPE = re.compile(r"\x1b\[([\d;]*)m")


def every_command() -> dict[str, Any]:
    """All commands that are no groups, by what is typed after `tosca`."""
    registered = list(commands.app.registered_commands), list(commands.app.registered_groups)
    commands.register_others()
    try:
        root = typer.main.get_command(commands.app)
    finally:
        commands.app.registered_commands[:], commands.app.registered_groups[:] = registered
    found: dict[str, Any] = {}

    def walk(command: Any, path: str) -> None:
        children = getattr(command, "commands", {})
        for name, child in children.items():
            walk(child, f"{path} {name}".strip())
        if not children:
            found[path] = command

    walk(root, "")
    return found


COMMANDS = every_command()


@pytest.fixture
def tosca(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Tosca:
    """`tosca ARGS` in this process, with no terminal in sight."""

    def run(*arguments: str, **environment: str) -> Result:
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            code = call_tosca(*arguments)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


def on_terminal(*arguments: str, **environment: str) -> str:
    """What `tosca` writes to a terminal."""
    ours, theirs = pty.openpty()
    variables = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", **environment}
    process = subprocess.Popen([TOSCA, *arguments], env=variables, stdout=theirs, stderr=theirs, stdin=theirs)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 4096):
            written += part
    except OSError:  # the terminal is closed when the process ends
        pass
    finally:
        os.close(ours)
        process.wait(60)
    return written.decode()


def colours(text: str) -> set[str]:
    """The colour codes in a terminal's text; bold and dim are none."""
    codes = {code for found in ESCAPE.findall(text) for code in found.split(";")}
    return {code for code in codes if code.isdigit() and (30 <= int(code) <= 49 or 90 <= int(code) <= 107)}


@pytest.fixture
def store(tmp_path: Path, tiny_artefact: BackboneArtefact) -> ModelStore:
    """Three revisions, the newest with a reason that would repaint a terminal and break a row."""
    store = ModelStore(tmp_path / "store", author="tester")
    store.publish_first(store.put_backbone(tiny_artefact))
    store.publish(lambda revision: revision.tasks, "a reason of more than eighty characters " * 4)
    store.publish(lambda revision: revision.tasks, "tab\there\nnew line \x1b[31mred\x1b[0m")
    return store


# -- help and reference ------------------------------------------------------------------------------


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_has_an_example_in_its_help(path: str) -> None:
    text = COMMANDS[path].help or ""
    _, found, example = text.partition("Example: ")
    assert found and f"tosca {path}" in example


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_is_in_the_reference(path: str) -> None:
    assert f"`tosca {path}" in REFERENCE


def test_the_reference_names_no_command_that_does_not_exist() -> None:
    named = re.findall(r"^\| `tosca ([a-z -]+?)(?: [A-Z\[-].*?)?` \|", REFERENCE, flags=re.MULTILINE)
    assert set(named) == set(COMMANDS)


def test_help_in_a_pipe_is_plain(tosca: Tosca) -> None:
    piped = tosca("publish", "--help")
    assert "Example: tosca publish birds.safetensors --dry-run" in piped.out
    assert piped.code == 0 and piped.out.isascii() and "\x1b" not in piped.out


# -- pipes and colours -------------------------------------------------------------------------------


def test_a_list_in_a_pipe_is_a_line_a_row_with_tabs_between(tosca: Tosca, store: ModelStore) -> None:
    listed = tosca("revisions", "list", "--store", store.url)
    assert listed.code == 0 and listed.err == ""
    lines = listed.out.splitlines()
    assert lines[0].split("\t") == ["revision", "when", "tasks", "reason", "author"]
    rows = [line.split("\t") for line in lines[1:]]
    assert [row[0] for row in rows] == ["3", "2", "1"]
    assert all(len(row) == 5 for row in rows), "what strangers wrote breaks no row"
    assert rows[1][3] == "a reason of more than eighty characters " * 4, "no row is wrapped or cut"
    assert "\x1b" not in listed.out


def test_a_list_on_a_terminal_is_a_table_that_strangers_cannot_paint(store: ModelStore) -> None:
    shown = on_terminal("revisions", "list", "--store", store.url)
    assert "│" in shown and "tester" in shown
    assert colours(shown) == set() and "[31mred" in shown


def test_a_fault_on_a_terminal_is_red_unless_colours_are_unwanted(tmp_path: Path) -> None:
    command = ("tasks", "list", "--store", str(tmp_path / "empty"))
    assert "31" in colours(on_terminal(*command))
    plain = on_terminal(*command, NO_COLOR="1")
    assert plain.startswith("error: store") and colours(plain) == set()


def test_help_on_a_terminal_is_in_boxes_and_knows_no_color() -> None:
    shown = on_terminal("publish", "--help", NO_COLOR="1")
    assert "─" in shown and colours(shown) == set()


def test_a_fault_in_a_pipe_is_one_plain_line_on_standard_error(tosca: Tosca, tmp_path: Path) -> None:
    fault = tosca("tasks", "list", "--store", str(tmp_path / ("long" * 40)))
    assert fault.out == "" and fault.err.startswith("error: store")
    assert fault.err.count("\n") == 1 and "\x1b" not in fault.err
    for url in ("foo://bar", "s3://", "az://x"):
        assert tosca("tasks", "list", "--store", url).err.count("\n") == 1


def test_a_reader_that_leaves_early_is_no_fault(store: ModelStore) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [TOSCA, "revisions", "list", "--store", store.url]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=120, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


# -- exit statuses -----------------------------------------------------------------------------------


def test_exit_statuses_tell_faults_from_wrong_options(
    tosca: Tosca, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert tosca("--help").code == 0
    assert tosca("tasks", "list", "--store", str(tmp_path / "empty")).code == 1
    assert tosca("tasks", "list", "--nonsense").code == tosca("nonsense").code == 2

    def interrupted(_: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "ModelStore", interrupted)
    assert tosca("tasks", "list").code == 130


def test_the_reference_lists_every_exit_status() -> None:
    listed = re.findall(r"^\| (\d+) \|", REFERENCE, flags=re.MULTILINE)
    assert listed == ["0", "1", "2", str(DEAD_STATUS), "130"]


# -- completion --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_a_shell_is_given_a_script_that_completes(shell: str, tosca: Tosca) -> None:
    script = tosca("--show-completion", shell, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")
    assert script.code == 0 and "_TOSCA_COMPLETE" in script.out


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("tosca re", {"remote", "replay", "revisions"}),
        ("tosca revisions ", {"begin-epoch", "list", "rollback"}),
        ("tosca tasks list --js", {"--json"}),
        ("tosca keys rev", {"revoke"}),
    ],
)
def test_commands_and_options_complete(typed: str, expected: set[str], tosca: Tosca) -> None:
    asked = {"COMP_WORDS": typed, "COMP_CWORD": str(typed.count(" ")), "_TOSCA_COMPLETE": "complete_bash"}
    assert set(tosca(**asked).out.split()) == expected


def test_bash_completes_with_the_script_it_is_given(tosca: Tosca) -> None:
    script = tosca("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1").out
    complete = f"""PATH={TOSCA.parent}:$PATH
{script}
COMP_WORDS=(tosca revisions ro); COMP_CWORD=2
_tosca_completion tosca
printf '%s\\n' "${{COMPREPLY[@]}}"
"""
    offered = subprocess.run(
        ["bash", "-c", complete], capture_output=True, text=True, timeout=120, check=True
    )
    assert offered.stdout.split() == ["rollback"]
