"""What the soak calls lost, failed or cut short: a judge that cannot condemn would prove nothing."""

import pytest

from benchmarks.soak_record import Acknowledged, Record
from model_store.store import ModelStore, with_task, without_task

SHA = "a" * 64


@pytest.fixture
def store(tiny_store: ModelStore) -> ModelStore:
    """Revision 2 adds birds, 3 removes them."""
    tiny_store.publish(with_task("birds", SHA), "add")
    tiny_store.publish(without_task("birds"), "remove")
    return tiny_store


@pytest.mark.parametrize(
    "kept",
    [
        Acknowledged(2, "register", "birds", SHA),
        Acknowledged(3, "remove", "birds"),
        Acknowledged(3, "roll back", back_to=1),
    ],
)
def test_what_the_history_holds_is_not_lost(kept: Acknowledged, store: ModelStore) -> None:
    assert kept.fault(store) is None


@pytest.mark.parametrize(
    "lost",
    [
        Acknowledged(4, "register", "birds", SHA),
        Acknowledged(2, "register", "birds", "b" * 64),
        Acknowledged(3, "register", "birds", SHA),
        Acknowledged(2, "remove", "birds"),
        Acknowledged(2, "roll back", back_to=1),
    ],
)
def test_what_the_history_does_not_hold_is_lost(lost: Acknowledged, store: ModelStore) -> None:
    assert lost.fault(store) is not None


def test_a_request_without_answer_is_a_failure_unless_its_server_was_killed() -> None:
    record, error = Record(), ConnectionError("reset")
    record.no_answer("prediction", record.life, error)  # before the server was there
    record.begin_life(1)
    first = record.life
    record.no_answer("prediction", first, error)
    assert (len(record.failures), record.num_cut_short["prediction"]) == (1, 1)
    record.end_life()
    record.no_answer("prediction", first, error)  # killed under it
    record.begin_life(2)
    record.no_answer("prediction", first, error)  # killed under it, and started again since
    assert (len(record.failures), record.num_cut_short["prediction"]) == (1, 3)
    record.no_answer("prediction", record.life, error)
    assert len(record.failures) == 2
