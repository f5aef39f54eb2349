"""Run every benchmark, or those named: `python -m benchmarks registration`."""

import importlib
import sys

ALL = (
    "registration",
    "propagation",
    "runtimes",
    "graph_forms",
    "decoding",
    "training",
    "request_path",
    "request_threads",
    "tasks",
    "bank_batches",
    "cycles",
    "store_operations",
    "serving",
    "ray_serve",
    "telemetry",
    "plots",
    "scaling",  # last: it reads the others' results
)


def main() -> None:
    for name in sys.argv[1:] or ALL:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
