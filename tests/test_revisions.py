"""Revisions of a store, on a local folder and on an S3 server: one after another, whoever writes at once."""

import datetime
import itertools
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from faulty_files import WatchedFiles, watch
from stores import SHA, s3_credentials, s3_endpoint, store, url

from model_store.backbone import BackboneArtefact
from model_store.errors import Conflict, UnknownRevision, UnknownTask
from model_store.object_files import ObjectFiles
from model_store.revision import Revision
from model_store.store import ModelStore, with_task, without_task

__all__ = ["s3_credentials", "s3_endpoint", "store", "url"]  # fixtures


def test_the_first_revision_has_a_backbone_and_no_tasks(
    store: ModelStore, tiny_artefact: BackboneArtefact
) -> None:
    head = store.require_head()
    assert (head.number, head.parent, dict(head.tasks)) == (1, None, {})
    assert head.backbone_fingerprint == tiny_artefact.manifest.fingerprint
    assert head.author == "tests"
    assert head.created_at.tzinfo is not None
    assert head.created_at <= datetime.datetime.now(datetime.UTC)


def test_publishing_adds_the_next_revision(store: ModelStore) -> None:
    second = store.publish(with_task("birds", SHA), "a reason")
    assert (second.number, second.parent, dict(second.tasks)) == (2, 1, {"birds": SHA})
    assert second.reason == "a reason"
    assert store.head() == second == store.revision(2)
    third = store.publish(with_task("ants", SHA), "another")
    assert list(third.tasks) == ["ants", "birds"]
    assert store.revision(2) == second


def test_another_process_sees_the_same_revisions(store: ModelStore) -> None:
    store.publish(with_task("birds", SHA), "")
    assert ModelStore(store.url).revisions() == store.revisions()


def test_revisions_are_listed_newest_first_without_gaps(store: ModelStore) -> None:
    for i in range(6):
        store.publish(with_task(f"task{i}", SHA), f"{i}")
    assert [one.number for one in store.revisions()] == [7, 6, 5, 4, 3, 2, 1]
    assert [one.number for one in store.revisions(limit=3)] == [7, 6, 5]


def test_the_head_is_found_from_any_known_number(store: ModelStore) -> None:
    for i in range(12):
        store.publish(with_task(f"task{i}", SHA), "")
    assert {store.head_number(known) for known in range(14)} == {13}


def test_looking_for_something_new_is_one_small_request(tiny_store: ModelStore) -> None:
    """However long the log is; behind it, steps that double and halve find the newest."""
    for number in range(2, 6):
        tiny_store.publish(lambda revision, number=number: {f"task{number}": SHA}, "test")
    files = WatchedFiles(ObjectFiles(tiny_store.url), watch)
    store = ModelStore(tiny_store.url, files=files)
    assert store.head_number(known=5) == 5
    assert files.operations == ["head revisions/000000000006.json"]
    for _ in range(2):
        tiny_store.publish(lambda _: {}, "something new")
    files.operations.clear()
    assert store.head_number(known=5) == 7
    assert files.operations == [f"head revisions/{number:012}.json" for number in (6, 8, 7)]


def test_the_end_of_a_long_log_takes_few_requests(tmp_path: Path) -> None:
    class Long(ObjectFiles):
        num_asked = 0

        def exists(self, path: str) -> bool:
            self.num_asked += 1
            return int(Path(path).stem) <= 123_456

        def names(self, folder: str, after: str | None = None) -> Iterator[str]:
            yield from (f"{number:012}.json" for number in range(1, 1001))
            raise AssertionError("only the first page is listed")

    files = Long(str(tmp_path))
    assert ModelStore(str(tmp_path), files=files).head_number() == 123_456
    assert 0 < files.num_asked < 40


@pytest.mark.parametrize("number", [0, -1, 2, 10**15])
def test_an_unknown_revision_is_named(number: int, store: ModelStore) -> None:
    with pytest.raises(UnknownRevision, match=f"has no revision {number}"):
        store.revision(number)


def test_removing_an_unknown_task_is_refused(store: ModelStore) -> None:
    with pytest.raises(UnknownTask, match="task 'birds' is not active in revision 1"):
        store.publish(without_task("birds"), "")
    assert store.head_number() == 1


def test_a_removed_task_comes_back_with_the_old_set(store: ModelStore) -> None:
    with_birds = store.publish(with_task("birds", SHA), "")
    removed = store.publish(without_task("birds"), "")
    assert dict(removed.tasks) == {}
    back = store.publish(lambda _: with_birds.tasks, "roll back to revision 2")
    assert (back.number, dict(back.tasks)) == (4, {"birds": SHA})


def test_publishing_on_a_stale_parent_is_a_conflict(store: ModelStore) -> None:
    first = store.require_head()
    store.publish(with_task("birds", SHA), "")
    with pytest.raises(Conflict, match="revision 2 was published by another writer meanwhile"):
        store.publish_after(first, {"cars": SHA}, None, "")
    assert dict(store.require_head().tasks) == {"birds": SHA}


def test_a_writer_that_lost_the_race_applies_its_change_to_the_new_head(store: ModelStore) -> None:
    def late(revision: Revision) -> dict[str, str]:
        if revision.number == 1:
            ModelStore(store.url).publish(with_task("birds", SHA), "faster")
        return {**revision.tasks, "cars": SHA}

    assert dict(store.publish(late, "slower").tasks) == {"birds": SHA, "cars": SHA}


def test_a_writer_that_always_loses_gives_up(store: ModelStore) -> None:
    rival = ModelStore(store.url)

    def overtaken(revision: Revision) -> dict[str, str]:
        rival.publish(with_task(f"task{revision.number}", SHA), "")
        return dict(revision.tasks)

    with pytest.raises(Conflict, match="gave up after 3 attempts"):
        store.publish(overtaken, "", attempts=3)


def test_no_change_of_two_racing_writers_is_lost(store: ModelStore) -> None:
    barrier = threading.Barrier(2)

    def write(writer: str) -> None:
        opened = ModelStore(store.url, author=writer)
        barrier.wait()
        for i in range(20):
            opened.publish(with_task(f"{writer}-{i}", SHA), f"{writer} {i}")

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(write, ["a", "b"]))
    revisions = store.revisions()
    assert [one.number for one in revisions] == list(range(41, 0, -1))
    assert set(revisions[0].tasks) == {f"{writer}-{i}" for writer in "ab" for i in range(20)}
    for newer, older in itertools.pairwise(revisions):
        assert len(newer.tasks) == len(older.tasks) + 1 and older.tasks.items() <= newer.tasks.items()
