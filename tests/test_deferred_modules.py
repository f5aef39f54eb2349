"""Modules that are read when needed: a store in an epoch is served from listings, with the same answers."""
# B batch, D features, K classes

import dataclasses
from pathlib import Path

import pytest
import torch
from epochs import NUM_TASKS, _real_fingerprint, answers, begun, classes, register, store, tasks
from random_modules import random_module
from typer.testing import CliRunner

from model_store import commands
from model_store.deferred import DeferredModule, ListedFile, ModuleCache
from model_store.deferred import module_bytes as bytes_in_memory
from model_store.errors import CorruptStore, StoreUnavailable, UnknownModule
from model_store.publishing import Publisher
from model_store.signatures import Trust
from model_store.store import ModelStore
from model_store.task_descriptions import describe_module, describe_tasks
from model_store.task_module import TaskModule

__all__ = ["_real_fingerprint", "classes", "store"]  # fixtures


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
