"""The tables of docs/scaling.md, made from scaling.json and put between the page's markers.

<!-- begin NAME --> … <!-- end NAME -->: what stands between is written by `python -m benchmarks.scaling`.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from benchmarks.scaling import conclusions, forecast_tables, input_tables, simulation_tables

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
TABLES: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "headline": conclusions.headline,
    "measured": input_tables.measured,
    "assumed": input_tables.assumed,
    "answer": forecast_tables.answer,
    "parts": forecast_tables.parts,
    "by-tasks": forecast_tables.by_tasks,
    "by-picture": forecast_tables.by_picture,
    "starts": forecast_tables.starts,
    "operations": forecast_tables.operations,
    "revisions": forecast_tables.revisions,
    "writers": forecast_tables.writers,
    "sensitivity": forecast_tables.sensitivity,
    "checks": simulation_tables.checks,
    "on-a-device": simulation_tables.on_a_device,
    "following": simulation_tables.following,
    "writing": simulation_tables.writing,
    "change": conclusions.change,
}
_BLOCK = re.compile(r"(<!-- begin ([a-z-]+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)


def with_tables(page: str, result: Mapping[str, Any]) -> str:
    """The page with every block made anew. Raises KeyError for a block that nobody makes."""
    return _BLOCK.sub(lambda block: f"{block[1]}\n{TABLES[block[2]](result)}\n\n{block[3]}", page)


def blocks_of(page: str) -> list[str]:
    """Names of the page's blocks, in order."""
    return [name for _, name, _ in _BLOCK.findall(page)]
