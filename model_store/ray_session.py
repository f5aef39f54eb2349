"""A connection to Ray for the time of one command: the cluster of RAY_ADDRESS, or one of its own here."""

import contextlib
import importlib.util
import logging
import os
from collections.abc import Iterator

from model_store.errors import InvalidRequest

NEEDS_EXTRA = "Ray is not installed: pip install 'tosca-serving[ray]'"


def require_ray() -> None:
    """Raises InvalidRequest where the extra `ray` is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise InvalidRequest(NEEDS_EXTRA)


@contextlib.contextmanager
def ray_session() -> Iterator[None]:
    """Connected to Ray while the block runs."""
    require_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
    else:
        ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    try:
        yield
    finally:
        ray.shutdown()


def room_for_workers(device: str) -> tuple[int, float]:
    """(how many workers the connected cluster has room for, GPUs of each): one a GPU, unless the device is
    the CPU or there are none, then one a processor."""
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    num_gpus = int(resources.get("GPU", 0))
    if device != "cpu" and num_gpus:
        return num_gpus, 1.0
    return max(1, int(resources.get("CPU", 1))), 0.0
