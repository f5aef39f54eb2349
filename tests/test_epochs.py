"""Epochs of a store: begun, ended and rolled back, exactly alike on every replica and after a restart."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from epochs import WEIGHTS, _real_fingerprint, answers, begun, classes, register, store
from random_modules import backbone_manifest, module_bytes, random_module

import model_store.impact
from model_store.answers import Answer
from model_store.backbone import BackboneArtefact
from model_store.bank import ModuleBank
from model_store.errors import Conflict, CorruptStore, InvalidRequest
from model_store.publishing import Publisher
from model_store.revision import EpochRef, Revision
from model_store.store import ModelStore

__all__ = ["_real_fingerprint", "classes", "store"]  # fixtures


def test_a_store_begins_an_epoch_without_a_change_of_tasks_or_answers(store: ModelStore) -> None:
    before = Publisher(store).active
    publisher = begun(store)
    after = publisher.active
    assert after.revision.number == before.revision.number + 1
    assert after.revision.tasks == before.revision.tasks
    assert after.revision.epoch is not None and after.revision.epoch.number == after.revision.number
    assert after.revision.reason == "begin an epoch with 12 tasks"
    assert _apart_from_receipts(after.bank) == _apart_from_receipts(before.bank)
    assert not publisher.epoch_is_due


def test_a_revision_in_an_epoch_is_kept_as_its_changes(store: ModelStore, tmp_path: Path) -> None:
    publisher = begun(store)
    register(publisher, "new", 900)
    register(publisher, "task03", 901)
    publisher.remove("task07")
    head = publisher.active.revision
    file = json.loads((tmp_path / f"store/revisions/{head.number:012}.json").read_text())
    assert file["changes"].keys() == {"new", "task03", "task07"} and file["changes"]["task07"] is None
    assert "tasks" not in file
    for opened in (store, ModelStore(store.url)):
        assert opened.revision(head.number) == head
        assert opened.head() == head
        assert list(opened.revision(head.number).tasks) == sorted(head.tasks)


def test_every_replica_and_a_restart_give_the_same_answers_to_the_last_bit(store: ModelStore) -> None:
    writer, follower = begun(store), Publisher(store)
    for step in range(3):
        register(writer, f"new{step}", 900 + step)
        if step == 1:
            follower.refresh()
    writer.remove("task02")
    restarted = Publisher(ModelStore(store.url))
    assert answers(follower.refresh().bank) == answers(writer.active.bank) == answers(restarted.active.bank)


def test_a_rollback_restores_answers_across_epochs(store: ModelStore) -> None:
    before = Publisher(store).active
    publisher = begun(store)
    in_first = register(publisher, "new", 900)
    publisher.remove("task00")
    publisher.begin_epoch()
    register(publisher, "newer", 901)
    for old in (in_first, before):
        active = publisher.rollback(old.revision.number).active
        assert active.revision.tasks == old.revision.tasks and active.revision.epoch == old.revision.epoch
        assert _apart_from_receipts(active.bank) == _apart_from_receipts(old.bank)
        assert answers(Publisher(ModelStore(store.url)).active.bank) == answers(active.bank)


def test_a_rollback_to_the_same_tasks_in_another_epoch_restores_its_answers(store: ModelStore) -> None:
    before = Publisher(store).active
    publisher = begun(store)
    in_first = register(publisher, "new", 900)
    publisher.begin_epoch()
    assert _apart_from_receipts(publisher.active.bank) != _apart_from_receipts(in_first.bank)
    outcome = publisher.rollback(in_first.revision.number)
    assert outcome.published and outcome.active.revision.epoch == in_first.revision.epoch
    assert _apart_from_receipts(outcome.active.bank) == _apart_from_receipts(in_first.bank)
    assert not publisher.rollback(in_first.revision.number).published
    publisher.remove("new")
    assert publisher.rollback(before.revision.number).published
    assert publisher.active.revision.epoch is None
    assert _apart_from_receipts(publisher.active.bank) == _apart_from_receipts(before.bank)


def test_health_measured_among_a_few_tasks_is_not_taken_for_that_among_all(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_store.impact, "AROUND", 4)
    publisher = begun(store)
    for step in range(3):
        register(publisher, f"new{step}", 900 + step)
    last = module_bytes(random_module("new3", seed=903))  # ends the epoch: reported among all
    fresh = Publisher(ModelStore(store.url))
    assert publisher.register(last, dry_run=True).impact == fresh.register(last, dry_run=True).impact


def test_an_epoch_ends_when_too_many_of_its_tasks_have_changed(store: ModelStore) -> None:
    publisher = begun(store)
    for step in range(3):
        assert register(publisher, f"new{step}", 900 + step).revision.epoch is not None
    assert publisher.epoch_is_due, "15 tasks, of which it began with 12"
    active = register(publisher, "new3", 903)
    assert active.revision.epoch is None and active.bank.epoch is None
    assert answers(Publisher(ModelStore(store.url)).active.bank) == answers(active.bank)
    assert publisher.epoch_is_due


def test_a_thread_that_reads_another_epoch_meanwhile_changes_no_revision(store: ModelStore) -> None:
    publisher = begun(store)
    first = publisher.active.revision
    publisher.remove("task03")
    publisher.begin_epoch()
    publisher.remove("task04")
    opened = ModelStore(store.url)

    class Overtaken(EpochRef):
        """While this is compared, another thread reads a revision of the other epoch."""

        def __ne__(self, other: object) -> bool:
            opened.revision(publisher.active.revision.number)
            return self.model_dump() != other.model_dump()  # type: ignore[attr-defined]

    assert first.epoch is not None
    opened.revision(first.number + 1)
    assert opened._tasks_that_began(Overtaken(**first.epoch.model_dump())) == first.tasks


def test_an_epoch_of_nothing_is_refused(tmp_path: Path) -> None:
    store = ModelStore(tmp_path)
    store.publish_first(store.put_backbone(BackboneArtefact(backbone_manifest(), WEIGHTS)))
    publisher = Publisher(store)
    assert not publisher.epoch_is_due
    with pytest.raises(InvalidRequest, match="no task is active"):
        publisher.begin_epoch()


def test_of_two_that_begin_an_epoch_one_gives_way(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    publisher, other = Publisher(store), Publisher(ModelStore(store.url))
    put_epoch = store.put_epoch

    def overtaken(data: bytes) -> str:
        other.begin_epoch(reason="faster")
        return put_epoch(data)

    monkeypatch.setattr(store, "put_epoch", overtaken)
    with pytest.raises(Conflict, match="by another writer"):
        publisher.begin_epoch()
    assert publisher.refresh().revision.reason == "faster"
    assert answers(publisher.active.bank) == answers(other.active.bank)


def test_a_change_that_lost_the_race_to_an_epoch_is_in_it(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher, other = Publisher(store), Publisher(ModelStore(store.url))
    publish_after = store.publish_after

    def overtaken(*args: Any) -> Revision:
        monkeypatch.setattr(store, "publish_after", publish_after)
        other.begin_epoch()
        return publish_after(*args)

    monkeypatch.setattr(store, "publish_after", overtaken)
    active = register(publisher, "new", 900)
    assert active.revision.number == other.active.revision.number + 1
    assert active.revision.epoch == other.active.revision.epoch is not None
    assert answers(active.bank) == answers(other.refresh().bank)


@pytest.mark.parametrize("with_digest", [True, False])
def test_a_flipped_bit_brings_no_removed_task_back(store: ModelStore, with_digest: bool) -> None:
    publisher = begun(store)
    publisher.remove("task03")
    path = Path(store.url) / f"revisions/{publisher.active.revision.number:012}.json"
    data = path.read_bytes() if with_digest else without_digest(path)
    path.write_bytes(data.replace(b'"task03": null', b'"task23": null'))
    fault = "does not match its own digest" if with_digest else "removes 'task23', which did not begin"
    with pytest.raises(CorruptStore, match=fault):
        Publisher(ModelStore(store.url))


@pytest.mark.parametrize("later", [0, 1])
def test_an_epoch_does_not_begin_with_a_revision_in_it(store: ModelStore, later: int) -> None:
    publisher = begun(store)
    publisher.remove("task03")
    number = publisher.active.revision.number
    path = Path(store.url) / f"revisions/{number:012}.json"
    path.write_bytes(
        without_digest(path).replace(b'"number": %d,' % (number - 1), b'"number": %d,' % (number + later))
    )
    with pytest.raises(CorruptStore, match=f"revision {number} cannot be in an epoch that began with"):
        ModelStore(store.url).revision(number)


def test_an_epoch_begins_with_all_its_tasks(store: ModelStore) -> None:
    """Else revisions could lead from one to the one before without end."""
    publisher = begun(store)
    publisher.remove("task03")
    publisher.remove("task04")
    number = publisher.active.revision.number
    path = Path(store.url) / f"revisions/{number:012}.json"
    path.write_bytes(
        without_digest(path).replace(b'"number": %d,' % (number - 2), b'"number": %d,' % (number - 1))
    )
    with pytest.raises(CorruptStore, match=f"revision {number - 1} did not begin epoch"):
        ModelStore(store.url).revision(number)


def without_digest(path: Path) -> bytes:
    """A revision's file as it was before there were digests."""
    content = json.loads(path.read_bytes())
    del content["digest"]
    return json.dumps(content).encode()


def _apart_from_receipts(bank: ModuleBank) -> list[Answer]:
    return [
        dataclasses.replace(one, receipt=dataclasses.replace(one.receipt, revision=0))
        for one in answers(bank)
    ]
