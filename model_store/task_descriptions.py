"""What active tasks say about themselves, without their modules in memory."""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from model_store.epoch_file import listing_digests, read_listed_tasks
from model_store.manifest import ModuleManifest
from model_store.module_file import read_module
from model_store.revision import Revision
from model_store.store import ModelStore


@dataclass(frozen=True, slots=True)
class TaskDescription:
    """The manifest of a task, and the module file that it is of."""

    manifest: ModuleManifest
    sha256: str
    size_bytes: int


def describe_tasks(store: ModelStore, revision: Revision) -> Iterator[TaskDescription]:
    """The active tasks of a revision, in its order: as the listings of its epoch have them, where they do.

    Of other tasks the module file is read and checked. Raises CorruptStore, UnknownModule, InvalidModule.
    """
    listed = _listed(store, revision)
    for sha256 in revision.tasks.values():
        yield listed.get(sha256) or describe_module(store, sha256)


def describe_module(store: ModelStore, sha256: str) -> TaskDescription:
    """What a module file says, read and checked. Raises CorruptStore, UnknownModule, InvalidModule."""
    file = read_module(store.module(sha256))
    return TaskDescription(file.manifest, sha256, file.size_bytes)


def _listed(store: ModelStore, revision: Revision) -> Mapping[str, TaskDescription]:
    """What the listings of a revision's epoch say, by digest of the module; nothing in no epoch."""
    if revision.epoch is None:
        return {}
    digests = listing_digests(store.epoch(revision.epoch.sha256))
    with ThreadPoolExecutor(thread_name_prefix="listing") as pool:
        listings = pool.map(lambda one: read_listed_tasks(store.listing(one)), digests)
        return {
            one.sha256: TaskDescription(one.manifest, one.sha256, one.size_bytes)
            for listing in listings
            for one in listing
        }
