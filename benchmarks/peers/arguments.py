"""The command line that all peers share."""

import argparse
from dataclasses import dataclass


@dataclass(frozen=True)
class Arguments:
    store: str
    port: int
    threads: int  # of all workers together
    workers: int  # where the peer can have several
    max_batch_size: int


def parse() -> Arguments:
    parser = argparse.ArgumentParser()
    parser.add_argument("--store", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--max-batch-size", type=int, default=8)
    given = parser.parse_args()
    return Arguments(given.store, given.port, given.threads, given.workers, given.max_batch_size)
