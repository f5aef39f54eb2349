"""What `tosca doctor` looks at: this machine, what is installed, the backbone's runtime, the store.

Every check only looks. Other packages add theirs through the entry-point group `tosca.checks`: functions of a
store URL that yield findings.
"""

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import torch

from model_store.backbone import resolve_device
from model_store.errors import ToscaError
from model_store.module_file import check_module, read_module
from model_store.revision import Revision
from model_store.runtimes.runtime import KINDS, default_runtime, runtime_kind
from model_store.store import ModelStore
from model_store.tuning import hardware_name

# ok: as it should be; note: worth knowing; warning: works, but not as well as it could; broken: does not work
State = Literal["ok", "note", "warning", "broken"]
STATES: tuple[State, ...] = ("ok", "note", "warning", "broken")

_OPTIONAL = {"openvino": "openvino", "fastapi": "service", "uvicorn": "service"}  # the extra that brings it
_LIBRARIES = (
    "torch",
    "timm",
    "onnxruntime",
    "openvino",
    "safetensors",
    "obstore",
    "pillow",
    "fastapi",
    "uvicorn",
)
# What quickens a pass on a CPU: wide vectors, and products of int8 and bfloat16.
_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimddp",
    "bf16",
    "i8mm",
)
_LOW_DISK_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    area: str
    name: str
    state: State
    detail: str


Check = Callable[[str], Iterable[Finding]]


def examine(store_url: str) -> list[Finding]:
    """Everything there is to find out, of this package and of others that are installed with their extra."""
    findings = [*check_packages(), *check_machine(), *check_store(store_url)]
    for entry in importlib.metadata.entry_points(group="tosca.checks"):
        try:
            check: Check = entry.load()
        except ModuleNotFoundError as error:
            findings.append(Finding("packages", entry.name, "note", f"not installed: no module {error.name}"))
            continue
        findings += check(store_url)
    return findings


def check_packages() -> Iterator[Finding]:
    """Versions of this project and of what decides its answers and its speed."""
    yield Finding("packages", "tosca-serving", "ok", importlib.metadata.version("tosca-serving"))
    yield Finding("packages", "python", "ok", platform.python_version())
    for name in _LIBRARIES:
        try:
            yield Finding("packages", name, "ok", importlib.metadata.version(name))
        except importlib.metadata.PackageNotFoundError:
            extra = _OPTIONAL.get(name)
            if extra is None:
                yield Finding("packages", name, "broken", "not installed, and nothing works without it")
            else:
                yield Finding(
                    "packages", name, "note", f"not installed: pip install 'tosca-serving[{extra}]'"
                )


def check_machine() -> Iterator[Finding]:
    """The processor, its threads, and the device that `auto` takes."""
    device = resolve_device("auto")
    yield Finding("machine", "device", "ok", f"{device}: {hardware_name(device)}")
    features = _processor_features()
    if features is not None:
        has = " ".join(one for one in _FEATURES if one in features) or "none of those that quicken a pass"
        yield Finding("machine", "processor", "ok", has)
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = torch.get_num_threads()
    yield Finding(
        "machine",
        "threads",
        "ok" if threads <= usable else "warning",
        f"{threads} of a pass, {usable} cores usable of {os.cpu_count()}"
        + ("" if threads <= usable else ": they get in each other's way; set TOSCA_TORCH_THREADS"),
    )
    runtimes = [kind.name for kind in KINDS if kind.unavailable_on(device) is None]
    yield Finding("machine", "runtimes", "ok", " ".join(runtimes))


def check_store(url: str) -> Iterator[Finding]:
    """Whether the store can be read, is whole, was tuned for this hardware and has room.

    Reads the backbone and every active module and compares them with their digests.
    """
    local = _local_folder(url)
    if local is not None and not local.is_dir():
        yield Finding(
            "store", "folder", "warning", f"{url} does not exist: `tosca demo` or `tosca backbone add`"
        )
        return
    try:
        store = ModelStore(url)
        head = store.head()
    except ToscaError as error:
        yield Finding("store", "revision", "broken", str(error))
        return
    if local is not None:
        yield _disk(local)
    if head is None:
        yield Finding("store", "revision", "warning", f"{url} has no backbone yet: `tosca backbone add`")
        return
    age_days = (datetime.now(UTC) - head.created_at).days
    when = f"{head.created_at:%Y-%m-%d %H:%M} ({age_days} days ago)"
    yield Finding(
        "store",
        "revision",
        "ok",
        f"{head.number} by {head.author}, {when}: {head.reason}",
    )
    yield _backbone(store, head)
    yield _runtime(store, head)
    yield from _modules(store, head)


def _backbone(store: ModelStore, head: Revision) -> Finding:
    try:
        manifest = store.backbone(head.backbone_fingerprint).manifest
    except ToscaError as error:
        return Finding("store", "backbone", "broken", str(error))
    return Finding("store", "backbone", "ok", f"{manifest.architecture} {manifest.fingerprint[:12]}, whole")


def _runtime(store: ModelStore, head: Revision) -> Finding:
    """Whether `tosca backbone tune` ran on this hardware, and whether what it chose is still to be had."""
    device = resolve_device("auto")
    try:
        tuning = store.tuning(head.backbone_fingerprint, hardware_name(device))
        if tuning is None:
            fallback = default_runtime(device)
            detail = f"not tuned for this hardware, so {fallback} runs: `tosca backbone tune`"
            return Finding("store", "runtime", "warning", detail)
        reason = runtime_kind(tuning.chosen).unavailable_on(device)
        chosen = tuning.measurement(tuning.chosen)
        if reason is None and chosen is not None and chosen.export_sha256 is not None:
            store.export(head.backbone_fingerprint, chosen.export_sha256)
    except ToscaError as error:
        return Finding("store", "runtime", "broken", str(error))
    if reason is not None:
        return Finding("store", "runtime", "warning", f"{tuning.chosen} was tuned, but {reason}")
    return Finding("store", "runtime", "ok", f"{tuning.chosen}, tuned on {tuning.created_at:%Y-%m-%d}")


def _modules(store: ModelStore, head: Revision) -> Iterator[Finding]:
    """One finding for all modules that are whole, and one for each that is not."""
    try:
        backbone = store.backbone_manifest(head.backbone_fingerprint)
    except ToscaError:
        return  # said already
    num_bytes, num_whole = 0, 0
    for task, sha256 in head.tasks.items():
        try:
            file = read_module(store.module(sha256))
            check_module(file, backbone)
        except ToscaError as error:
            yield Finding("store", f"task {task}", "broken", str(error))
        else:
            num_bytes += file.size_bytes
            num_whole += 1
    if num_whole or not head.tasks:
        state: State = "ok" if head.tasks else "warning"
        yield Finding("store", "tasks", state, f"{num_whole} whole, {num_bytes / 1e6:.1f} MB")


def _disk(folder: Path) -> Finding:
    usage = shutil.disk_usage(folder)
    if not os.access(folder, os.W_OK):
        return Finding("store", "disk", "warning", f"{folder} cannot be written: nothing can be published")
    state: State = "ok" if usage.free >= _LOW_DISK_BYTES else "warning"
    return Finding("store", "disk", state, f"{usage.free / 1e9:.1f} GB free of {usage.total / 1e9:.1f}")


def _local_folder(url: str) -> Path | None:
    """The folder that a store URL names, if it names one."""
    if url.startswith("file://"):
        return Path(url.removeprefix("file://"))
    return None if "://" in url else Path(url)


def _processor_features() -> frozenset[str] | None:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux
        return None
    named = (line.partition(":")[2] for line in lines if line.startswith(("flags", "Features")))
    return frozenset(next(named, "").split())
