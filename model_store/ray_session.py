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


def num_workers(num_gpus_each: float) -> int:
    """Workers that the cluster has room for: one a GPU, or without GPUs one a processor."""
    import ray

    resources = ray.cluster_resources()  # type: ignore[no-untyped-call]
    available = resources.get("GPU", 0) / num_gpus_each if num_gpus_each else resources.get("CPU", 1)
    return max(1, int(available))
