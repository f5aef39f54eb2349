"""Run every benchmark, or those named: `python -m benchmarks registration`."""

import importlib
import sys

ALL = (
    "registration",
    "propagation",
    "runtimes",
    "decoding",
    "training",
    "request_path",
    "tasks",
    "cycles",
    "serving",
    "ray_serve",
    "telemetry",
    "plots",
)


def main() -> None:
    for name in sys.argv[1:] or ALL:
        importlib.import_module(f"benchmarks.{name}").main()


if __name__ == "__main__":
    main()
