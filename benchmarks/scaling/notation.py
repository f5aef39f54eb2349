"""How docs/scaling.md writes numbers, ranges and tables."""

from collections.abc import Callable, Iterable, Mapping


def number(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 123, 1,230."""
    if value == 0:
        return "0"
    rounded = float(f"{value:.3g}")
    return f"{rounded:,.0f}" if abs(rounded) >= 100 else f"{rounded:.3g}"


def size(value: float) -> str:
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= scale:
            return f"{number(value / scale)} {unit}"
    return f"{number(value)} B"


def percent(share: float) -> str:
    return f"{number(100 * share)} %"


def duration(seconds: float) -> str:
    if seconds < 0.1:
        return f"{number(1e3 * seconds)} ms"
    if seconds < 180.0:
        return f"{number(seconds)} s"
    return f"{number(seconds / 60)} min" if seconds < 7200.0 else f"{number(seconds / 3600)} h"


def in_range(values: Mapping[str, float], show: Callable[[float], str] = number) -> str:
    """The central case, and the range where there is one."""
    ends = sorted(values[case] for case in ("pessimistic", "optimistic"))
    central = show(values["central"])
    low, high = map(show, ends)
    return f"**{central}**" if low == high == central else f"**{central}** ({low} – {high})"


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def link(name: str) -> str:
    """To a committed result, from a page under docs/."""
    return f"[{name}.json](../benchmarks/results/{name}.json)"


def plain(value: float) -> str:
    """A value as it was put in: powers of a thousand above a million, all its digits below."""
    if value == 0:
        return "0"
    if value < 1e6:
        return f"{value:,g}" if value >= 1e-3 else f"{value:.1e}"
    exponent = (len(f"{value:.0f}") - 1) // 3 * 3
    raised = str(exponent).translate(str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹"))
    return f"{value / 10**exponent:g}·10{raised}"
