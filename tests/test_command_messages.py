"""What `tosca` says of wrong options, in its help, and of texts that strangers wrote."""

import pytest
from tosca_command import TINY, Tosca, assert_fault, assert_usage

# -- options -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (("fly",), "No such command 'fly'"),
        (("train", "--data", "x"), "expected --task with --data, or --many"),
        (("train", "--task", "t", "--data", "x", "--recipe", "magic"), "expected one of default, reference"),
        (
            ("train", "--task", "t", "--data", "x", "--flow", "magic"),
            "expected one of tosca, tosca_r, adapter",
        ),
        (("train", "--task", "t", "--data", "x", "--max-corrupt", "2"), "Invalid value for '--max-corrupt'"),
        (("train", "--task", "t", "--data", "x", "--seed", "-1"), "Invalid value for '--seed'"),
        (("train", "--task", "t", "--data", "x", "--seed", "9" * 20), "Invalid value for '--seed'"),
        (("evaluate", "--data", "colours"), "expected TASK=SOURCE"),
        (("evaluate", "--data", "=x"), "expected TASK=SOURCE"),
        (("evaluate", "--data", "t=x", "--data", "t=y"), "task 't' is named twice"),
        (("evaluate", "--data", "t=x", "--selection", "luck"), "expected one of lda, entropy"),
        (("predict", "x.png", "--selection", "luck"), "expected one of lda, entropy"),
        (("predict", "nowhere.png"), "nowhere.png: No such file"),
        (("predict",), "Missing argument"),
        (("predict", "x.png", "--top-k", "0"), "Invalid value for '--top-k'"),
        (("publish", "nowhere.safetensors"), "nowhere.safetensors: No such file"),
        (("revisions", "rollback", "two"), "Invalid value for 'number'"),
        (("revisions", "list", "--limit", "0"), "Invalid value for '--limit'"),
        (("tasks", "remove", "colours", "--reason", "x" * 1001), "at most 1000 characters"),
        (("revisions", "rollback", "2", "--reason", "x" * 1001), "at most 1000 characters"),
        (("revisions", "begin-epoch", "--reason", "x" * 1001), "at most 1000 characters"),
        (("publish", "x.safetensors", "--reason", "x" * 1001), "at most 1000 characters"),
        (("publish", "x.safetensors", "--margin", "nan"), "Invalid value for '--margin'"),
        (("backbone", "add", "--wheel", "nowhere.whl"), "Invalid value for '--wheel'"),
        (("backbone", "add", "--wheel", "."), "Invalid value for '--wheel'"),
        (
            ("backbone", "add", TINY, "--random-weights", "--image-size", "0"),
            "Invalid value for '--image-size'",
        ),
        (
            ("backbone", "add", TINY, "--random-weights", "--image-size", "5000"),
            "Invalid value for '--image-size'",
        ),
        (("serve", "--port", "999999"), "port [TOSCA_PORT]: Input should be less than or equal to 65535"),
        (("serve", "--runtime", "magic"), "'magic': expected one of auto, torch-float32"),
    ],
)
def test_wrong_options_say_what_was_expected(arguments: tuple[str, ...], fault: str, trained: Tosca) -> None:
    assert_usage(trained(*arguments), fault)


def test_a_variable_that_cannot_be_read_is_named(trained: Tosca, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOSCA_PORT", "abc")
    assert_usage(trained("serve"), "port [TOSCA_PORT]: Input should be a valid integer")


def test_help_names_every_command(tosca: Tosca) -> None:
    shown = tosca("--help").out
    for name in ("backbone", "train", "publish", "evaluate", "tasks", "revisions", "predict", "serve"):
        assert name in shown


# -- printing what strangers wrote -------------------------------------------------------------------


def test_a_fault_with_brackets_is_printed_as_it_is(tosca: Tosca) -> None:
    tosca("backbone", "add", TINY, "--random-weights", "--image-size", 32)
    assert_fault(tosca("train", "--task", "t", "--data", "data [/old]"), "data [/old] does not exist")


def test_a_reason_with_brackets_is_printed_as_it_is(trained: Tosca) -> None:
    trained("tasks", "remove", "colours", "--reason", "[new] cleaning up")
    assert "[new] cleaning up" in trained("revisions", "list").out


def test_a_reason_cannot_break_the_list_of_revisions(trained: Tosca) -> None:
    trained("tasks", "remove", "colours", "--reason", "done [/b]")
    assert trained("revisions", "list").code == 0
