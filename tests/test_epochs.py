"""Epochs: what a few tasks say together serves many, exactly alike on every replica and after a restart."""
# B batch, D features, K classes

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from random_modules import FEATURE_DIM, backbone_manifest, build_bank, module_bytes, random_cls, random_module
from torch import Tensor
from typer.testing import CliRunner

import model_store.impact
import model_store.publishing
import model_store.revision_reader
from model_store import commands
from model_store.answers import Answer
from model_store.backbone import BackboneArtefact
from model_store.bank import ModuleBank
from model_store.deferred import DeferredModule, ListedFile, ModuleCache
from model_store.deferred import module_bytes as bytes_in_memory
from model_store.epoch import Epoch
from model_store.errors import Conflict, CorruptStore, InvalidRequest, StoreUnavailable, UnknownModule
from model_store.impact import compare_banks, measure_health
from model_store.known_vectors import unseen_scores
from model_store.publishing import Publisher
from model_store.revision import EpochRef, Revision
from model_store.revision_reader import ActiveSet
from model_store.selection import WhitenedCosine
from model_store.signatures import Trust
from model_store.store import ModelStore
from model_store.task_descriptions import describe_module, describe_tasks
from model_store.task_module import TaskModule

NUM_TASKS = 12


@pytest.fixture(autouse=True, params=["screened", "dense"])
def classes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Epochs begin with very many classes; here with few, screened as many are or not as on a GPU."""
    monkeypatch.setattr(
        "model_store.bank.MAX_DENSE_CLASSES", FEATURE_DIM if request.param == "screened" else 10_000
    )
    monkeypatch.setattr(model_store.publishing, "EPOCH_CLASSES", 20)
    monkeypatch.setattr(model_store.revision_reader, "WORTH_LISTINGS", 3)
    monkeypatch.setattr("model_store.class_means.BLOCK_CLASSES", 6)
    monkeypatch.setattr("model_store.screen._BLOCKS_A_PART", 2)
    monkeypatch.setattr("model_store.epoch_file.LISTED_TASKS", 5)
    return str(request.param)


def tasks(num: int = NUM_TASKS, seed: int = 0, **options: object) -> list[TaskModule]:
    return [random_module(f"task{t:02}", seed=100 * seed + t, **options) for t in range(num)]  # type: ignore[arg-type]


def in_epoch(modules: Sequence[TaskModule], epoch: Epoch, previous: ModuleBank | None = None) -> ModuleBank:
    return ModuleBank.build(
        modules,
        revision=7,
        backbone_fingerprint="b" * 64,
        feature_dim=modules[0].mean_KD.shape[1],
        epoch=epoch,
        previous=previous,
    )


def answers(bank: ModuleBank, coverage: float | None = 0.8) -> list[Answer]:
    return bank.answer(2.0 * random_cls(30), top_k=3, coverage=coverage)


# -- banks -------------------------------------------------------------------------------------------


def test_the_tasks_that_begin_an_epoch_answer_as_they_did() -> None:
    own = build_bank(tasks())
    assert answers(in_epoch(tasks(), own.begin_epoch())) == answers(own)


@pytest.mark.parametrize("num_tasks", [3, NUM_TASKS])  # fewer classes than features, and more
def test_a_bank_built_from_the_one_before_equals_one_built_from_nothing(num_tasks: int) -> None:
    epoch = build_bank(tasks(num_tasks)).begin_epoch()
    new = [random_module(f"new{t}", seed=900 + t) for t in range(3)]
    bank = in_epoch(tasks(), epoch)
    answers(bank)  # so that it knows what it may hand on
    for modules in ([*tasks(), new[0]], [*tasks()[2:], *new], [*tasks()[5:], new[1]]):
        bank = in_epoch(modules, epoch, previous=bank)
        assert set(bank._known_vectors) <= {module.sha256 for module in modules}
        assert answers(bank) == answers(in_epoch(modules, epoch))


def known_scores(bank: ModuleBank, task: str) -> Tensor:
    """What calibration vectors of a task get as if unseen, in this bank."""
    bank.prepare(task)
    return bank._known_vectors[bank.module(task).sha256].best_score_M


def test_known_vectors_are_not_handed_on_where_the_span_of_few_classes_changes() -> None:
    few = tasks(4, feature_dim=64, num_calibration=12, per_class=8)
    epoch = build_bank(few).begin_epoch()
    before = in_epoch(few, epoch)
    earlier = known_scores(before, "task01")
    more = [*few, random_module("new", seed=77, feature_dim=64)]
    after, restarted = in_epoch(more, epoch, previous=before), in_epoch(more, epoch)
    assert not torch.equal(known_scores(restarted, "task01"), earlier)
    assert torch.equal(known_scores(after, "task01"), known_scores(restarted, "task01"))
    x_BD = 1.5 * random_cls(200, feature_dim=64)
    assert after.answer(x_BD) == restarted.answer(x_BD)


def test_known_vectors_are_not_handed_on_when_classes_begin_to_be_screened(
    classes: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    epoch = build_bank(tasks()).begin_epoch()
    before = in_epoch(tasks(), epoch)
    earlier = known_scores(before, "task01")
    assert known_scores(in_epoch(tasks(), epoch, previous=before), "task01") is earlier
    monkeypatch.setattr(
        "model_store.bank.MAX_DENSE_CLASSES", 10_000 if classes == "screened" else FEATURE_DIM
    )
    after, restarted = in_epoch(tasks(), epoch, previous=before), in_epoch(tasks(), epoch)
    assert not torch.equal(known_scores(restarted, "task01"), earlier)
    assert torch.equal(known_scores(after, "task01"), known_scores(restarted, "task01"))


def test_a_further_task_leaves_the_blocks_of_others_alone(classes: str) -> None:
    before = in_epoch(tasks(), build_bank(tasks()).begin_epoch())
    assert before.epoch is not None and before.selector is not None
    after = in_epoch([*tasks(), random_module("task05x", seed=5)], before.epoch, previous=before)
    assert after.selector is not None and after.selector.metric is before.selector.metric
    if classes == "dense":
        assert after.selector.screen is None
        return
    assert before.selector.screen is not None and after.selector.screen is not None
    old = {id(block) for block in before.selector.screen.blocks.values()}
    fresh = [block for block in after.selector.screen.blocks.values() if id(block) not in old]
    assert len(old) >= 4 and 1 <= len(fresh) <= 2


def test_a_task_that_comes_and_goes_leaves_no_trace() -> None:
    before = in_epoch(tasks(), build_bank(tasks()).begin_epoch())
    assert before.epoch is not None
    after = in_epoch([*tasks(), random_module("new", seed=77)], before.epoch, previous=before)
    assert answers(after) != answers(before)
    assert answers(in_epoch(tasks(), before.epoch, previous=after)) == answers(before)


def test_leaving_an_epoch_gives_the_bank_of_those_tasks_alone() -> None:
    modules = tasks()
    bank = in_epoch(modules, build_bank(modules).begin_epoch())
    assert bank.epoch is not None
    bank = in_epoch([*modules[2:], random_module("new", seed=77)], bank.epoch, previous=bank)
    wanted = [*modules[3:], random_module("new", seed=77), random_module("newer", seed=78)]
    recalled = []

    def recall(sha256: str) -> TaskModule:
        recalled.append(sha256)
        return next(module for module in modules if module.sha256 == sha256)

    left = ModuleBank.build(
        wanted,
        revision=7,
        backbone_fingerprint="b" * 64,
        feature_dim=FEATURE_DIM,
        previous=bank,
        recall=recall,
    )
    own = build_bank(wanted)
    assert sorted(recalled) == sorted(module.sha256 for module in modules[:2])
    assert torch.equal(left.pooled.scatter_P, own.pooled.scatter_P) and left.blend == own.blend
    assert answers(left) == answers(own)


@pytest.mark.parametrize("num_tasks", [3, NUM_TASKS])
def test_calibration_vectors_of_a_later_task_are_left_out_of_its_means_alone(num_tasks: int) -> None:
    """Against the same metric with class means computed anew."""
    later = random_module("later", seed=55, spread=0.5, num_classes=2)
    bank = in_epoch([*tasks(num_tasks), later], build_bank(tasks(num_tasks)).begin_epoch())
    assert bank.selector is not None
    t = [module.task for module in bank.modules].index("later")
    known_MC = unseen_scores(bank.selector, later, t, own_classes=True)
    statistics, calibration = later.statistics, later.calibration
    for m, (x_D, k) in enumerate(zip(calibration.cls_MD.double(), calibration.label_M.tolist(), strict=True)):
        mean_KD, count = statistics.mean_KD.double(), int(statistics.count_K[k])
        mean_KD[k] -= (x_D - mean_KD[k]) / (count - 1)
        without = dataclasses.replace(
            later, statistics=dataclasses.replace(statistics, mean_KD=mean_KD.float())
        )
        assert bank.epoch is not None
        left_out = in_epoch([*tasks(num_tasks), without], bank.epoch).selector
        assert left_out is not None
        torch.testing.assert_close(known_MC[m], _own_scores(left_out, x_D, t), rtol=1e-5, atol=1e-6)


def _own_scores(selector: WhitenedCosine, x_D: Tensor, t: int) -> Tensor:
    return selector.scores(x_D[None], [t])[0]


def test_a_report_among_the_tasks_around_a_change_finds_what_one_among_all_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(model_store.impact, "MAX_TASKS", 4)
    modules = tasks(40)
    epoch = build_bank(modules).begin_epoch()
    twin = dataclasses.replace(modules[7], task="twin", sha256="f" * 64)
    before, after = in_epoch(modules, epoch), in_epoch([*modules, twin], epoch)
    monkeypatch.setattr(model_store.impact, "AROUND", 1000)
    among_all = compare_banks(before, after)
    monkeypatch.setattr(model_store.impact, "AROUND", 10)
    around = compare_banks(before, after)
    assert [one.task for one in around.tasks] == [one.task for one in among_all.tasks]
    assert around.num_unmeasured == among_all.num_unmeasured == 37
    for one, other in zip(around.tasks, among_all.tasks, strict=True):
        assert one.accuracy_loss == pytest.approx(other.accuracy_loss, abs=1e-9), one.task
    worst = around.worst_loss(ignoring="twin")
    assert worst is not None and worst.task == "task07" and worst.accuracy_loss > 0.3


def test_a_report_of_fewer_classes_than_features_is_of_what_really_happens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A further task moves the scores of all others: among a few of them it would be others that it moves."""
    modules = tasks(40, feature_dim=256, num_calibration=9, per_class=5, spread=3.0)
    epoch = build_bank(modules).begin_epoch()
    new = random_module("new", seed=500, feature_dim=256, num_calibration=9, per_class=5, spread=3.0)
    before, after = in_epoch(modules, epoch), in_epoch([*modules, new], epoch)
    monkeypatch.setattr(model_store.impact, "MAX_TASKS", 4)
    monkeypatch.setattr(model_store.impact, "AROUND", 10)
    for one in compare_banks(before, after).tasks:
        assert one.before == (measure_health(before, one.task) if one.task in before else None)
        assert one.after == measure_health(after, one.task)


# -- the store ---------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path: Path) -> ModelStore:
    store = ModelStore(tmp_path / "store")
    store.publish_first(store.put_backbone(BackboneArtefact(backbone_manifest(), WEIGHTS)))
    files = {module.task: store.put_module(module_bytes(module)) for module in tasks()}
    store.publish(lambda _: files, "a dozen tasks")
    return store


WEIGHTS = b"weights that nobody loads"


@pytest.fixture(autouse=True)
def _real_fingerprint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A backbone artefact whose weights nobody checks."""
    monkeypatch.setattr(BackboneArtefact, "verify", lambda _: None)
    yield


def begun(store: ModelStore) -> Publisher:
    publisher = Publisher(store)
    assert publisher.epoch_is_due
    publisher.begin_epoch()
    return publisher


def register(publisher: Publisher, task: str, seed: int) -> ActiveSet:
    return publisher.register(module_bytes(random_module(task, seed=seed)), force=True).active


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


# -- modules that are read when needed ---------------------------------------------------------------


def test_a_replica_that_starts_reads_listings_and_no_module(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(begun(store).active.bank)
    read: list[str] = []
    module = ModelStore.module
    monkeypatch.setattr(
        ModelStore, "module", lambda self, sha256: read.append(sha256) or module(self, sha256)
    )
    active = Publisher(ModelStore(store.url)).active
    assert read == []
    assert all(isinstance(file, ListedFile) and file.size_bytes > 1000 for file in active.files.values())
    assert active.files["task03"].manifest.labels == ("task03-0", "task03-1", "task03-2")
    assert answers(active.bank) == expected
    assert 0 < len(read) == len(set(read))
    assert set(read) >= {one.receipt.module_sha256 for one in expected}


def test_tasks_are_listed_without_reading_the_modules_that_their_epoch_lists(
    store: ModelStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = begun(store)
    publisher.remove("task02")
    later = {
        register(publisher, task, seed).files[task].sha256 for task, seed in (("new", 900), ("task07", 901))
    }
    revision = publisher.active.revision
    expected = [describe_module(store, sha256) for sha256 in revision.tasks.values()]
    read: list[str] = []
    module = ModelStore.module
    monkeypatch.setattr(
        ModelStore, "module", lambda self, sha256: read.append(sha256) or module(self, sha256)
    )
    opened = ModelStore(store.url)
    assert list(describe_tasks(opened, opened.revision(revision.number))) == expected
    assert sorted(read) == sorted(later)
    listed = CliRunner().invoke(commands.app, ["tasks", "list", "--store", store.url])
    assert [line.split("\t")[0] for line in listed.output.splitlines()] == ["task", *revision.tasks]
    assert len(read) == 4
    before = opened.revision(revision.epoch.number - 1)  # type: ignore[union-attr]
    assert len(list(describe_tasks(opened, before))) == NUM_TASKS
    assert len(read) == 4 + NUM_TASKS


def test_signed_modules_are_read_since_nobody_signs_listings(store: ModelStore) -> None:
    active = begun(store).active
    careful = Publisher(ModelStore(store.url), trust=Trust({"someone": b"0" * 32}, is_required=False))  # type: ignore[arg-type]
    assert careful._reader.modules.memory.num_modules == len(active.files)
    assert careful._reader.modules.memory.num_reads == 0
    assert answers(careful.active.bank) == answers(active.bank)


def test_modules_make_room_for_others_and_come_back(store: ModelStore) -> None:
    expected = answers(begun(store).active.bank)
    size = bytes_in_memory(tasks()[0])
    publisher = Publisher(ModelStore(store.url), module_memory_bytes=2 * size + size // 2)
    for _ in range(2):
        assert answers(publisher.active.bank) == expected
        memory = publisher._reader.modules.memory
        assert memory.num_modules <= 2 and memory.size_bytes <= 2.5 * size
    nothing_fits = Publisher(ModelStore(store.url), module_memory_bytes=0)
    assert answers(nothing_fits.active.bank) == expected


def test_modules_that_do_not_fit_together_are_read_when_needed_in_no_epoch_too(store: ModelStore) -> None:
    whole = Publisher(store).active.bank
    few = Publisher(ModelStore(store.url), module_memory_bytes=30_000)
    assert all(isinstance(module, DeferredModule) for module in few.active.bank.modules)
    assert all(isinstance(module, TaskModule) for module in whole.modules)
    assert torch.equal(few.active.bank.pooled.scatter_P, whole.pooled.scatter_P)
    assert answers(few.active.bank) == answers(whole)
    register(few, "new", 900)
    assert answers(few.active.bank) == answers(Publisher(ModelStore(store.url)).active.bank)


def test_a_module_that_cannot_be_read_fails_its_own_task_alone(store: ModelStore, tmp_path: Path) -> None:
    active = begun(store).active
    module = random_module("task04", seed=4)
    (tmp_path / f"store/modules/{active.files['task04'].sha256}.safetensors").unlink()
    bank = Publisher(ModelStore(store.url)).active.bank
    x_BD = module.calibration.cls_MD.float()
    with pytest.raises(UnknownModule):
        bank.answer(x_BD, task="task04")
    assert bank.answer(x_BD, task="task05") == active.bank.answer(x_BD, task="task05")


def test_a_listing_that_lies_about_class_means_is_found_out(store: ModelStore, tmp_path: Path) -> None:
    active = begun(store).active
    bank = Publisher(ModelStore(store.url)).active.bank
    t = list(active.files).index("task04")
    listed = bank.modules[t]
    lying = dataclasses.replace(listed, mean_KD=listed.mean_KD + 1e-3)  # type: ignore[type-var]
    with pytest.raises(CorruptStore, match="listed class means"):
        lying.whole()


@pytest.mark.parametrize("folder", ["epochs", "listings"])
def test_a_damaged_epoch_is_refused(store: ModelStore, tmp_path: Path, folder: str) -> None:
    begun(store)
    file = next((tmp_path / "store" / folder).iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptStore, match="reads back with SHA-256"):
        Publisher(ModelStore(store.url))
    with pytest.raises(CorruptStore, match="reads back with SHA-256"):
        list(describe_tasks(store, store.require_head()))
    file.unlink()
    with pytest.raises(CorruptStore, match=f"has no {folder}/"):
        Publisher(ModelStore(store.url))


# -- the cache ---------------------------------------------------------------------------------------


def test_a_fault_reaches_whoever_asked_and_the_next_may_try_again() -> None:
    module = random_module("birds")
    faults = [StoreUnavailable("for a moment")]

    def load(_: str) -> TaskModule:
        if faults:
            raise faults.pop()
        return module

    cache = ModuleCache(load)
    with pytest.raises(StoreUnavailable):
        cache.get(module.sha256)
    assert cache.get(module.sha256) is module
    assert cache.get(module.sha256) is module
    assert (cache.memory.num_reads, cache.memory.num_hits) == (2, 1)


def _apart_from_receipts(bank: ModuleBank) -> list[Answer]:
    return [
        dataclasses.replace(one, receipt=dataclasses.replace(one.receipt, revision=0))
        for one in answers(bank)
    ]
