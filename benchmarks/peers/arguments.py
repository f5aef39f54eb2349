"""The command line that all peers share."""

import argparse
from dataclasses import dataclass
from typing import Literal

from model_store.runtimes.runtime import REFERENCE, RUNTIMES

Engine = Literal["ordinary", "ours"]


@dataclass(frozen=True)
class Arguments:
    store: str
    port: int
    threads: int  # of all workers together
    workers: int  # where the peer can have several
    max_batch_size: int
    engine: Engine
    runtime: str  # of the ordinary engine
    export: str  # what the ordinary engine compiles; empty for torch


def parse() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument(
        "--engine",
        choices=("ordinary", "ours"),
        default="ordinary",
        help="graph, compilation and resizing as users of the peer write them, or this project's own",
    )
    parser.add_argument("--runtime", choices=RUNTIMES, default=REFERENCE, help="of the ordinary engine")
    parser.add_argument("--export", default="", help="file that the ordinary engine compiles, not for torch")
    return Arguments(**vars(parser.parse_args()))
