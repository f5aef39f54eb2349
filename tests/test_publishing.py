"""Registering, replacing, removing and rolling back: checked before, whole after, and harmless to others."""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from synthetic import make_features

from model_store.backbone import BackboneArtefact, BackboneManifest
from model_store.errors import (
    Conflict,
    CorruptStore,
    FingerprintMismatch,
    HarmsOtherTasks,
    InvalidModule,
    UnknownModule,
    UnknownRevision,
    UnknownTask,
)
from model_store.impact import ImpactReport, TaskHealth, TaskImpact
from model_store.preprocess import Preprocessing
from model_store.publishing import Publisher
from model_store.revision import EpochRef, Revision
from model_store.store import ModelStore, with_task
from training.trainer import train_task

D = 32


def artefact(weights: bytes = b"weights that nobody loads") -> BackboneArtefact:
    preprocessing = Preprocessing(
        height=32,
        width=32,
        crop_fraction=0.9,
        interpolation="bicubic",
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )
    manifest = BackboneManifest(
        architecture="vit_tiny_patch16_224",
        feature_dim=D,
        preprocessing=preprocessing,
        weights_sha256=hashlib.sha256(weights).hexdigest(),
        source="tests",
    )
    return BackboneArtefact(manifest, weights)


@pytest.fixture(scope="module")
def make() -> Callable[..., bytes]:
    """`make("birds")`: a trained module file; equal seeds have equal pictures, whatever the task's name."""
    made: dict[tuple[object, ...], bytes] = {}

    def train(
        task: str, seed: int | None = None, num_classes: int = 3, backbone: BackboneManifest | None = None
    ) -> bytes:
        seed = sum(task.encode()) if seed is None else seed
        key = (task, seed, num_classes, backbone and backbone.fingerprint)
        if key not in made:
            features = make_features(task, seed=seed, num_classes=num_classes, feature_dim=D)
            made[key] = train_task(task, features, backbone or artefact().manifest).data
        return made[key]

    return train


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    store.publish_first(store.put_backbone(artefact()))
    return store


@pytest.fixture
def publisher(store: ModelStore, make: Callable[..., bytes]) -> Publisher:
    """A publisher of a store with two tasks, at revision 3."""
    publisher = Publisher(store)
    publisher.register(make("birds"))
    publisher.register(make("cars"))
    return publisher


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def snapshot(folder: str) -> dict[str, bytes]:
    root = Path(folder)
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*") if file.is_file()}


def queries() -> torch.Tensor:
    return 2.0 * torch.randn(20, D, generator=torch.Generator().manual_seed(0))


def test_registering_adds_the_task_in_a_new_revision(store: ModelStore, make: Callable[..., bytes]) -> None:
    publisher = Publisher(store)
    outcome = publisher.register(make("birds"), reason="first birds")
    assert outcome.published and outcome.replaced_sha256 is None and outcome.harmed == ()
    assert outcome.active is publisher.active
    assert publisher.active.revision == store.require_head()
    assert (store.require_head().number, store.require_head().reason) == (2, "first birds")
    assert dict(store.require_head().tasks) == {"birds": sha256(make("birds"))}
    assert store.module(sha256(make("birds"))) == make("birds")
    [answer] = publisher.active.bank.answer(queries()[:1])
    assert (answer.receipt.revision, answer.receipt.module_sha256) == (2, sha256(make("birds")))
    assert set(publisher.active.files) == {"birds"}


def test_an_empty_store_has_an_empty_bank(store: ModelStore) -> None:
    assert len(Publisher(store).active.bank) == 0


def test_a_store_without_backbone_cannot_be_published_to(tmp_path: Path) -> None:
    with pytest.raises(UnknownRevision, match="tosca backbone add"):
        Publisher(ModelStore(tmp_path))


def test_a_restart_finds_the_same_bank(publisher: Publisher) -> None:
    again = Publisher(ModelStore(publisher.store.url))
    assert again.active.revision == publisher.active.revision
    assert again.active.bank.answer(queries()) == publisher.active.bank.answer(queries())


def test_registering_the_same_file_again_changes_nothing(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    before, active = snapshot(publisher.store.url), publisher.active
    outcome = publisher.register(make("birds"))
    assert not outcome.published and outcome.replaced_sha256 == sha256(make("birds"))
    assert publisher.active is active and snapshot(publisher.store.url) == before


def test_replacing_a_task_names_the_old_file(publisher: Publisher, make: Callable[..., bytes]) -> None:
    new = make("birds", seed=5, num_classes=4)
    outcome = publisher.register(new)
    assert outcome.published and outcome.replaced_sha256 == sha256(make("birds"))
    assert len(publisher.active.bank.module("birds").labels) == 4
    assert publisher.store.require_head().tasks["birds"] == sha256(new)
    assert publisher.store.module(sha256(make("birds"))) == make("birds"), "old files are kept"


def test_removing_a_task_restores_the_answers_from_before(
    store: ModelStore, make: Callable[..., bytes]
) -> None:
    publisher = Publisher(store)
    publisher.register(make("birds"))
    before = publisher.active.bank.answer(queries())
    publisher.register(make("cars"))
    outcome = publisher.remove("cars", reason="no more cars")
    assert outcome.published and "cars" not in publisher.active.bank
    assert store.require_head().reason == "no more cars"

    def unnumbered(answers: list) -> list:  # type: ignore[type-arg]
        return [
            dataclasses.replace(one, receipt=dataclasses.replace(one.receipt, revision=0)) for one in answers
        ]

    assert unnumbered(publisher.active.bank.answer(queries())) == unnumbered(before)


def test_removing_an_unknown_task_changes_nothing(publisher: Publisher) -> None:
    before = snapshot(publisher.store.url)
    with pytest.raises(UnknownTask, match="'zebras' is not active in revision 3"):
        publisher.remove("zebras")
    assert snapshot(publisher.store.url) == before


def test_the_last_task_can_be_removed_and_registered_again(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    publisher.remove("birds")
    publisher.remove("cars")
    assert len(publisher.active.bank) == 0
    assert publisher.register(make("birds")).published


# -- rolling back ------------------------------------------------------------------------------------


def test_rolling_back_publishes_the_old_set_as_a_new_revision(publisher: Publisher) -> None:
    outcome = publisher.rollback(2)
    assert outcome.published and publisher.active.revision.number == 4
    assert publisher.active.revision.tasks == publisher.store.revision(2).tasks
    assert publisher.active.revision.reason == "roll back to revision 2"
    assert set(publisher.active.files) == {"birds"}
    publisher.rollback(3, reason="and forth")
    assert publisher.active.revision.tasks == publisher.store.revision(3).tasks
    assert publisher.active.revision.reason == "and forth"


def test_rolling_back_to_the_same_set_changes_nothing(publisher: Publisher) -> None:
    outcome = publisher.rollback(3)
    assert not outcome.published and publisher.store.head_number() == 3


def test_rolling_back_to_an_unknown_revision_is_refused(publisher: Publisher) -> None:
    with pytest.raises(UnknownRevision, match="has no revision 9"):
        publisher.rollback(9)


def test_rolling_back_to_another_backbone_is_refused(store: ModelStore, make: Callable[..., bytes]) -> None:
    store.publish_first(store.put_backbone(artefact(b"others")))
    publisher = Publisher(store)
    with pytest.raises(Conflict, match="revision 1 belongs to backbone"):
        publisher.rollback(1)


def test_an_old_revision_can_be_looked_at(publisher: Publisher) -> None:
    old = Publisher(publisher.store, revision=2)
    assert set(old.active.files) == {"birds"} and old.active.bank.revision == 2
    with pytest.raises(UnknownRevision):
        Publisher(publisher.store, revision=99)


# -- what must not change anything -------------------------------------------------------------------


def test_a_dry_run_reports_and_changes_nothing(publisher: Publisher, make: Callable[..., bytes]) -> None:
    before, active = snapshot(publisher.store.url), publisher.active
    outcome = publisher.register(make("dogs"), dry_run=True)
    assert not outcome.published and outcome.active is active is publisher.active
    assert snapshot(publisher.store.url) == before
    by_task = {one.task: one for one in outcome.impact.tasks}
    assert set(by_task) == {"birds", "cars", "dogs"}
    assert by_task["dogs"].before is None and by_task["dogs"].after is not None
    assert by_task["birds"].before is not None and by_task["birds"].after is not None


def test_a_dry_run_predicts_the_report_of_the_change(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    predicted = publisher.register(make("dogs"), dry_run=True).impact
    assert publisher.register(make("dogs")).impact == predicted


@pytest.mark.parametrize("fault", ["empty", "truncated", "altered", "not a module"])
def test_a_bad_file_changes_nothing(fault: str, publisher: Publisher, make: Callable[..., bytes]) -> None:
    good = make("dogs")
    bad = {
        "empty": b"",
        "truncated": good[:-1],
        "altered": good[:-8] + bytes([good[-8] ^ 1]) + good[-7:],
        "not a module": b"\x89PNG\r\n" * 50,
    }[fault]
    before, active = snapshot(publisher.store.url), publisher.active
    with pytest.raises(InvalidModule):
        publisher.register(bad, force=True)
    assert publisher.active is active and snapshot(publisher.store.url) == before


def test_a_file_for_another_backbone_changes_nothing(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    before = snapshot(publisher.store.url)
    with pytest.raises(FingerprintMismatch, match="task 'dogs': module was trained on backbone"):
        publisher.register(make("dogs", backbone=artefact(b"others").manifest), force=True)
    assert snapshot(publisher.store.url) == before


def test_a_bank_in_use_outlives_the_next_registration(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    held = publisher.active.bank
    answers = held.answer(queries())
    publisher.register(make("dogs"))
    publisher.remove("birds")
    assert held.answer(queries()) == answers


# -- harm --------------------------------------------------------------------------------------------


@pytest.fixture
def rival(make: Callable[..., bytes]) -> bytes:
    """A task whose pictures are those of `birds` under another name: nothing can tell them apart."""
    return make("eagles", seed=sum(b"birds"))


def test_a_registration_that_harms_another_task_is_refused(publisher: Publisher, rival: bytes) -> None:
    before, active = snapshot(publisher.store.url), publisher.active
    fault = (
        r"registering 'eagles' would lower the accuracy of task 'birds' on its calibration set from "
        r"1\.000 to 0\.\d+, more than the margin of 0\.05; force it to go ahead"
    )
    with pytest.raises(HarmsOtherTasks, match=fault):
        publisher.register(rival)
    assert publisher.active is active and snapshot(publisher.store.url) == before


def test_a_dry_run_names_who_would_be_harmed(publisher: Publisher, rival: bytes) -> None:
    outcome = publisher.register(rival, dry_run=True)
    assert outcome.harmed == ("birds",)
    worst = outcome.impact.worst_loss(ignoring="eagles")
    assert worst is not None and worst.task == "birds" and worst.accuracy_loss > 0.05


def test_a_forced_registration_goes_ahead_and_names_who_was_harmed(
    publisher: Publisher, rival: bytes
) -> None:
    outcome = publisher.register(rival, force=True)
    assert outcome.published and outcome.harmed == ("birds",)
    assert "eagles" in publisher.active.bank


@pytest.mark.parametrize("num_right", [40, 38, 25, 19])
def test_a_loss_of_just_the_margin_is_no_harm(num_right: int) -> None:
    """Two of forty pictures are the margin of 0.05, whatever binary fractions make of it."""

    def health(num: int) -> TaskHealth:
        return TaskHealth(selection_accuracy=1.0, accuracy=num / 40, ece=0.0, num_vectors=40)

    losses = {f"lost{n}": TaskImpact(f"lost{n}", health(num_right), health(num_right - n)) for n in range(5)}
    assert ImpactReport(tuple(losses.values())).harmed(0.05) == ("lost3", "lost4")
    assert ImpactReport(tuple(losses.values())).harmed(0.05, ignoring="lost3") == ("lost4",)


def test_a_wide_margin_lets_harm_pass(store: ModelStore, make: Callable[..., bytes], rival: bytes) -> None:
    publisher = Publisher(store, margin=1.0)
    publisher.register(make("birds"))
    assert publisher.register(rival).published


def test_health_is_that_of_the_active_bank_after_every_change(
    publisher: Publisher, rival: bytes, make: Callable[..., bytes]
) -> None:
    """Health measured for the previous change is reused; the report must not notice."""
    publisher.register(rival, force=True)
    publisher.remove("cars")
    reused = publisher.register(make("dogs"), dry_run=True).impact
    fresh = Publisher(publisher.store).register(make("dogs"), dry_run=True).impact
    assert reused == fresh


def test_health_is_measured_anew_after_others_published(
    publisher: Publisher, rival: bytes, make: Callable[..., bytes]
) -> None:
    Publisher(ModelStore(publisher.store.url)).register(rival, force=True)
    impact = publisher.register(make("dogs"), dry_run=True).impact
    assert impact == Publisher(publisher.store).register(make("dogs"), dry_run=True).impact
    before = {one.task: one.before for one in impact.tasks}["birds"]
    assert before is not None and before.accuracy < 1.0, "the rival must have done harm"


# -- other writers -----------------------------------------------------------------------------------


def test_refresh_takes_over_what_others_published(publisher: Publisher, make: Callable[..., bytes]) -> None:
    other = Publisher(ModelStore(publisher.store.url))
    other.register(make("dogs"))
    other.remove("birds")
    assert set(publisher.active.files) == {"birds", "cars"}
    refreshed = publisher.refresh()
    assert refreshed is publisher.active
    assert set(refreshed.files) == {"cars", "dogs"} and refreshed.revision.number == 5
    assert refreshed.bank.answer(queries()) == other.active.bank.answer(queries())


def test_refresh_without_news_keeps_the_bank(publisher: Publisher) -> None:
    active = publisher.active
    assert publisher.refresh() is active


def test_a_registration_builds_on_what_others_published(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    Publisher(ModelStore(publisher.store.url)).register(make("dogs"))
    assert publisher.register(make("elms")).published
    assert set(publisher.active.files) == {"birds", "cars", "dogs", "elms"}
    assert publisher.active.revision.number == 5


class OvertakenStore(ModelStore):
    """A store where a rival publishes just before our next revision, and which keeps what it was asked."""

    overtake: Callable[[], object] | None = None

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.asked_epoch_of: list[Mapping[str, str]] = []
        self.asked_to_publish: list[Mapping[str, str]] = []

    def next_epoch(self, parent: Revision, tasks: Mapping[str, str]) -> EpochRef | None:
        self.asked_epoch_of.append(tasks)
        return super().next_epoch(parent, tasks)

    def publish_after(self, parent: Revision, tasks: Mapping[str, str], *rest: Any) -> Revision:
        self.asked_to_publish.append(tasks)
        rival, self.overtake = self.overtake, None
        if rival:
            rival()
        return super().publish_after(parent, tasks, *rest)


def test_a_change_and_its_epoch_are_computed_once_for_each_parent(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    store = OvertakenStore(publisher.store.url)
    slow, fast = Publisher(store), Publisher(ModelStore(publisher.store.url))
    slow.register(make("dogs"))
    slow.remove("birds")
    store.overtake = lambda: fast.register(make("elms"))
    slow.register(make("firs"))
    assert [sorted(tasks) for tasks in store.asked_to_publish] == [
        ["birds", "cars", "dogs"],
        ["cars", "dogs"],
        ["cars", "dogs", "firs"],
        ["cars", "dogs", "elms", "firs"],
    ]
    assert len(store.asked_epoch_of) == 4
    for asked, published in zip(store.asked_epoch_of, store.asked_to_publish, strict=True):
        assert asked is published


def test_a_registration_that_lost_the_race_is_judged_again_on_the_new_set(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    store = OvertakenStore(publisher.store.url)
    slow, fast = Publisher(store), Publisher(ModelStore(publisher.store.url))
    store.overtake = lambda: fast.register(make("dogs"))
    outcome = slow.register(make("elms"))
    assert outcome.published and slow.active.revision.number == 5
    assert set(slow.active.files) == {"birds", "cars", "dogs", "elms"}
    assert {one.task for one in outcome.impact.tasks} == {"birds", "cars", "dogs", "elms"}
    again = Publisher(ModelStore(publisher.store.url))
    assert again.active.bank.answer(queries()) == slow.active.bank.answer(queries())


def test_a_registration_that_lost_the_race_to_a_twin_is_refused_for_its_harm(
    publisher: Publisher, make: Callable[..., bytes], rival: bytes
) -> None:
    publisher.remove("birds")
    store = OvertakenStore(publisher.store.url)
    slow, fast = Publisher(store), Publisher(ModelStore(publisher.store.url))
    store.overtake = lambda: fast.register(make("birds"))
    with pytest.raises(HarmsOtherTasks, match="of task 'birds'"):
        slow.register(rival)
    assert "eagles" not in ModelStore(publisher.store.url).require_head().tasks


def test_a_removal_that_lost_the_race_to_a_removal_finds_nothing_left(publisher: Publisher) -> None:
    store = OvertakenStore(publisher.store.url)
    slow, fast = Publisher(store), Publisher(ModelStore(publisher.store.url))
    store.overtake = lambda: fast.remove("birds")
    with pytest.raises(UnknownTask):
        slow.remove("birds")


def test_a_changed_backbone_asks_for_a_restart(store: ModelStore) -> None:
    publisher = Publisher(store)
    store.publish_first(store.put_backbone(artefact(b"others")))
    with pytest.raises(Conflict, match="restart to serve it"):
        publisher.refresh()


def test_a_revision_with_a_missing_module_keeps_the_old_bank(publisher: Publisher) -> None:
    active = publisher.active
    publisher.store.publish(with_task("ghosts", "0" * 64), "by hand")
    with pytest.raises(UnknownModule):
        publisher.refresh()
    assert publisher.active is active


def test_a_revision_with_a_damaged_module_keeps_the_old_bank(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    active, digest = publisher.active, publisher.store.put_module(make("dogs"))
    (Path(publisher.store.url) / f"modules/{digest}.safetensors").write_bytes(make("dogs")[:-1])
    publisher.store.publish(with_task("dogs", digest), "by hand")
    with pytest.raises(CorruptStore):
        publisher.refresh()
    assert publisher.active is active


def test_a_revision_that_gives_a_module_another_name_is_corrupt(
    publisher: Publisher, make: Callable[..., bytes]
) -> None:
    digest = publisher.store.put_module(make("dogs"))
    publisher.store.publish(with_task("cats", digest), "by hand")
    with pytest.raises(CorruptStore):
        publisher.refresh()
