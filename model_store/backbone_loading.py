"""A store's backbone on this machine, in the runtime that was measured to be fastest here."""

import logging

import torch

from model_store.backbone import Backbone, resolve_device
from model_store.errors import InvalidBackbone
from model_store.runtimes.runtime import default_runtime, runtime_kind
from model_store.store import ModelStore
from model_store.tuning import Tuning, hardware_name

log = logging.getLogger("tosca.backbone")


def load_backbone(
    store: ModelStore,
    fingerprint: str | None = None,
    *,
    device: str = "auto",
    runtime: str = "auto",
    num_threads: int = 0,
    num_streams: int = 0,
) -> Backbone:
    """The backbone of `store` (the one in use unless named) on a device.

    `runtime` "auto" is what `tosca backbone tune` chose on this kind of hardware, and torch where it never
    ran. A runtime asked for by name must not have failed the gate there. `num_streams` 0 are as many as were
    measured to be best there, in proportion to the threads. Raises InvalidBackbone.
    """
    fingerprint = fingerprint or store.require_head().backbone_fingerprint
    chosen = resolve_device(device)
    tuning = store.tuning(fingerprint, hardware_name(chosen))
    name = _choose(tuning, chosen) if runtime == "auto" else runtime
    kind = runtime_kind(name)
    measured = tuning.measurement(name) if tuning else None
    if measured is not None and measured.refused is not None:
        raise InvalidBackbone(f"runtime {name} was refused when it was measured here: {measured.refused}")
    export = None
    if kind.export is not None and kind.unavailable_on(chosen) is None:
        if tuning is None or measured is None or measured.export_sha256 is None or tuning.chosen != name:
            raise InvalidBackbone(
                f"runtime {name} has no exported form for this hardware: run "
                f"`tosca backbone tune --runtime {name}`"
            )
        export = store.export(fingerprint, measured.export_sha256)
    num_threads = num_threads or torch.get_num_threads()
    if num_streams == 0 and tuning is not None:
        num_streams = tuning.streams_on(num_threads)
    return Backbone.load(
        store.backbone(fingerprint),
        device,
        name,
        export=export,
        num_threads=num_threads,
        num_streams=max(1, min(num_streams, num_threads)),
    )


def _choose(tuning: Tuning | None, device: torch.device) -> str:
    """The tuned runtime; torch where nothing was tuned, or what was chosen is not installed here."""
    if tuning is None:
        return default_runtime(device)
    reason = runtime_kind(tuning.chosen).unavailable_on(device)
    if reason is None:
        return tuning.chosen
    log.warning("the tuned runtime %s is passed over: %s", tuning.chosen, reason)
    return default_runtime(device)
