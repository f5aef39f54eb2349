"""A model of scale: from measured costs to one host with eight H200, ten and a thousand (docs/scaling.md).

    costs         what was measured, from benchmarks/results
    assumptions   what was not, with ranges and sources
    capacity      images a second of a process: the least of its parts; tasks in memory
    store_model   the revision log: registrations, followers, starts, growth, dollars
    forecast      the model for each number of hosts, in three cases, and its sensitivity
    processor, replica, revision_log   simulations of cores, of a process, of writers and followers
    checks        the simulations against measurements
    experiments   the simulations where nothing was measured
    page, figures what docs/scaling.md shows

`python -m benchmarks.scaling` writes benchmarks/results/scaling.json, the tables of docs/scaling.md and its
figures, in less than a minute and always the same. It measures nothing.
"""

from benchmarks.scaling.report import main

__all__ = ["main"]
