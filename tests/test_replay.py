"""Replay: an answer is computed again from its receipt, and any difference is found."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import typer
from pictures import encoded, noise
from typer.testing import CliRunner

from model_store.answers import Answer, Choice, Receipt
from model_store.errors import InvalidRequest, UnknownRevision
from model_store.offline import OfflinePredictor
from model_store.publishing import Publisher
from model_store.replay import GivenAnswer, Replayed, differences, read_given, replay
from model_store.store import ModelStore
from service.replay_command import replay as replay_command

MakeModule = Callable[..., bytes]
SHA, OTHER = "a" * 64, "b" * 64
PICTURE = encoded(noise(colour=1, size=(40, 40)))


def answer(**changes: object) -> Answer:
    made = {
        "task": "birds",
        "label": "owl",
        "confidence": 0.7,
        "task_probability": 0.9,
        "alternatives": (Choice("birds", "jay", 0.2), Choice("cars", "van", 0.1)),
        "p_value": 0.5,
        "abstained": False,
        "prediction_set": None,
        "receipt": Receipt(7, SHA, OTHER),
        "num_modules_evaluated": 1,
        **changes,
    }
    return Answer(**made)


def replayed(one: Answer | None = None, **changes: Any) -> Replayed:
    """Computed again: 20 known vectors, abstaining at 0.02, no pair left out above 0.001."""
    made = Replayed(one or answer(), least_listed=0.001, num_known=20, abstain_level=0.02, threshold=None)
    return replace(made, **changes)


def given(one: Answer) -> GivenAnswer:
    return GivenAnswer.model_validate_json(json.dumps(asdict(one)))


def test_an_answer_does_not_differ_from_itself() -> None:
    assert differences(given(answer()), replayed()) == []


def test_rounding_is_no_difference() -> None:
    rounded = answer(confidence=0.7009, task_probability=0.8991, p_value=0.5 + 1 / 21)
    assert differences(given(rounded), replayed()) == []


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"label": "jay"}, "answered birds/jay"),
        ({"task": "cars"}, "answered cars/owl"),
        ({"confidence": 0.71}, "confidence 0.71"),
        ({"confidence": 0.69}, "confidence 0.69"),
        ({"receipt": Receipt(7, OTHER, OTHER)}, "module bbbbbbbbbbbb"),
        ({"alternatives": (Choice("birds", "jay", 0.25),)}, "birds/jay with 0.25"),
        (
            {"alternatives": (Choice("evil", "thing", 0.0021),)},
            "evil/thing with 0.002100, offline at most 0.0010",
        ),
        ({"alternatives": (Choice("evil", "thing", math.nan),)}, "evil/thing with nan"),
        ({"task_probability": 0.123}, "task probability 0.123000, offline 0.900000"),
        ({"task_probability": math.nan}, "task probability nan"),
        ({"p_value": 0.56}, "p-value 0.560000, offline 0.500000"),
        ({"p_value": math.nan}, "p-value nan"),
        ({"abstained": True}, "abstained with p-value 0.500000 at level 0.02"),
    ],
)
def test_every_difference_is_named(changed: dict[str, object], named: str) -> None:
    found = differences(given(answer(**changed)), replayed())
    assert len(found) == 1
    assert named in found[0]


def test_a_number_that_is_none_is_a_difference() -> None:
    assert differences(given(answer()).model_copy(update={"confidence": float("nan")}), replayed())


def test_pairs_are_left_out_only_where_they_are_less_probable() -> None:
    longer = answer(alternatives=(*answer().alternatives, Choice("cars", "bus", 0.05)))
    assert differences(given(longer), replayed(least_listed=0.1)) == []
    assert differences(given(longer), replayed(least_listed=0.04))


def test_a_picture_at_the_abstain_level_may_be_on_either_side_of_it() -> None:
    ours = replayed(answer(p_value=1 / 21), abstain_level=1 / 21)
    assert differences(given(answer(p_value=1 / 21, abstained=True)), ours) == []
    assert differences(given(answer(p_value=2 / 21, abstained=False)), ours) == []
    assert differences(given(answer(p_value=1 / 21, abstained=False)), ours)
    assert differences(given(answer(p_value=2 / 21, abstained=True)), ours)


OWL, JAY, VAN = Choice("birds", "owl", 0.7), Choice("birds", "jay", 0.2), Choice("cars", "van", 0.1)


@pytest.mark.parametrize(
    ("listed", "threshold", "fault"),
    [
        ((OWL, JAY), 0.15, None),
        ((OWL, JAY), 0.2005, None),
        ((OWL,), 0.1995, None),
        ((), 0.8, None),
        ((OWL,), 0.15, "birds/jay not in the prediction set"),
        ((OWL, JAY, VAN), 0.15, "cars/van in the prediction set"),
        ((OWL, JAY, Choice("evil", "thing", 0.001)), 0.15, "evil/thing in the prediction set"),
        ((OWL, JAY, Choice("evil", "thing", 0.5)), 0.15, "evil/thing with 0.500000, offline at most"),
        ((OWL, replace(JAY, probability=0.3)), 0.15, "birds/jay with 0.300000, offline 0.200000"),
        (None, 0.15, "no prediction set"),
        ((OWL, JAY), None, None),
        ((OWL,), None, None),
        ((), None, None),
        ((OWL, VAN), None, "birds/jay not in the prediction set"),
    ],
)
def test_a_prediction_set_holds_what_is_probable_enough(
    listed: tuple[Choice, ...] | None, threshold: float | None, fault: str | None
) -> None:
    found = differences(given(answer(prediction_set=listed)), replayed(threshold=threshold))
    assert found == [] if fault is None else [one.startswith(fault) for one in found] == [True]


def test_of_two_equally_probable_answers_either_is_right() -> None:
    ours = answer(confidence=0.4, alternatives=(Choice("birds", "jay", 0.3995),))
    other = answer(label="jay", confidence=0.3997, alternatives=(Choice("birds", "owl", 0.3996),))
    assert differences(given(other), replayed(ours)) == []
    clear = answer(confidence=0.4, alternatives=(Choice("birds", "jay", 0.398),))
    assert differences(given(other), replayed(clear)) != []


def test_answers_and_receipts_are_read_in_every_form() -> None:
    one = asdict(answer())
    for text in (json.dumps(one), json.dumps({"predictions": [{"task": "x"}, one]})):
        read = read_given(text, 1)
        assert read.answer == given(answer())
        assert read.receipt.revision == 7
    bare = read_given(json.dumps(one["receipt"]))
    assert bare.answer is None
    assert bare.receipt.module_sha256 == SHA


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", "null", '{"predictions": []}', '{"predictions": 3}', '{"receipt": {}}', "[" * 100_000],
)
def test_what_is_neither_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        read_given(text)


@pytest.fixture
def store(tiny_store: ModelStore, make_module: MakeModule) -> ModelStore:
    """Revision 2 has birds, 3 also cars, 4 only cars."""
    publisher = Publisher(tiny_store)
    publisher.register(make_module("birds", seed=1), force=True)
    publisher.register(make_module("cars", seed=2), force=True)
    publisher.remove("birds")
    return tiny_store


def test_an_old_revision_answers_as_it_did(store: ModelStore) -> None:
    for revision, tasks in ((2, {"birds"}), (3, {"birds", "cars"}), (4, {"cars"})):
        then = OfflinePredictor(store, revision=revision, device="cpu").answer([PICTURE])[0]
        replayed = replay(store, given(then).receipt, PICTURE, device="cpu")
        again = replayed.answer
        assert again == then
        assert differences(given(then), replayed) == []
        assert again.receipt.revision == revision
        assert again.task in tasks


def test_a_receipt_of_another_store_is_refused(store: ModelStore) -> None:
    then = given(OfflinePredictor(store, device="cpu").answer([PICTURE])[0])
    with pytest.raises(UnknownRevision):
        replay(store, then.receipt.model_copy(update={"revision": 99}), PICTURE)
    with pytest.raises(InvalidRequest, match="names backbone"):
        replay(store, then.receipt.model_copy(update={"backbone_fingerprint": SHA}), PICTURE)


# -- the command -----------------------------------------------------------------------------------------


def run(*arguments: object, stdin: str = "") -> tuple[int, str]:
    app = typer.Typer()
    app.command()(replay_command)
    result = CliRunner().invoke(app, [str(one) for one in arguments], input=stdin, catch_exceptions=False)
    return result.exit_code, result.output


def test_the_exit_status_says_whether_the_answer_holds(store: ModelStore, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(PICTURE)
    then = OfflinePredictor(store, device="cpu").answer([PICTURE])[0]
    options = (picture, "--store", store.url, "--device", "cpu")
    right = tmp_path / "right.json"
    right.write_text(json.dumps({"predictions": [asdict(then)]}))
    code, text = run(right, *options)
    assert code == 0
    assert "the answer holds" in text
    wrong = json.dumps(asdict(then) | {"confidence": then.confidence - 0.1})
    code, text = run("-", *options, "--json", stdin=wrong)
    assert code == 1
    assert json.loads(text)["matches"] is False
    code, text = run("-", *options, "--json", stdin=json.dumps(asdict(then.receipt)))
    assert code == 0
    assert json.loads(text)["matches"] is None
    assert json.loads(text)["answer"]["label"] == then.label


def test_what_a_server_was_asked_for_is_asked_for_again(store: ModelStore, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    picture.write_bytes(PICTURE)
    predictor = OfflinePredictor(store, device="cpu")
    options = ("-", picture, "--store", store.url, "--device", "cpu")
    then = predictor.answer([PICTURE], coverage=0.5, abstain_level=1.0)[0]
    assert then.abstained
    assert then.prediction_set == ()
    text = json.dumps(asdict(then))
    assert run(*options, "--coverage", "0.5", "--abstain-level", "1", stdin=text)[0] == 0
    code, output = run(*options, "--abstain-level", "0", stdin=text)
    assert code == 1
    assert "differs: abstained" in output
    wider = replace(then, prediction_set=(Choice(then.task, then.label, then.confidence),))
    text = json.dumps(asdict(wider))
    assert run(*options, "--abstain-level", "1", stdin=text)[0] == 0
    assert run(*options, "--coverage", "0.5", "--abstain-level", "1", stdin=text)[0] == 1
