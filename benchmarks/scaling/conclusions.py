"""The answer in a few words, and what to change first."""

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.scaling.assumptions import CASES
from benchmarks.scaling.notation import duration, in_range, number, size, table

Result = Mapping[str, Any]
Part = Sequence[Any]  # its name, and images/s


def headline(result: Result) -> str:
    forecast = result["forecast"]
    one, many = forecast["fleets"][0], forecast["fleets"][-1]
    (first, slowest), *_ = forecast["device"]["central"]["parts"]
    alone = result["costs"]["backbone_pass"]["each_s"]

    def of(key: str) -> str:
        return in_range({case: one[case][key] for case in CASES})

    tasks = in_range({case: forecast["device"][case]["tasks"] for case in CASES})
    started = duration(many["central"]["start_together_s"])
    looks = number(many["central"]["polling_dollars_month"])
    return (
        f"A host of eight H200 would carry {of('images_s')} images/s and {tasks} tasks;\n"
        "each further host as many images again, and the same tasks. All hosts together publish\n"
        f"{of('registrations_s')} registrations/s, however many they are. The {first} of each\n"
        f"process binds first, at {number(slowest)} images/s a device. A thousand hosts would take\n"
        f"{started} to start, and pay $ {looks} a month for looking whether there is a new revision. (In\n"
        "brackets: every assumption at its worst, and at its best. The two cores on which all this was\n"
        f"measured make {number(1.0 / alone)} images/s.)"
    )


def change(result: Result) -> str:
    """What to change first, by what it would bring."""
    forecast = result["forecast"]
    ladder = forecast["device"]["central"]["parts"]
    remedies = {
        "event loop": "several processes a device, or a cheaper request",
        "inference thread": "banks' answers beside the next pass, not after this one",
        "decode pool": "more decode threads than eight (`TOSCA_DECODE_THREADS`), or smaller pictures",
        "processors": "decoding on the device, or hosts with more processors",
        "device": "another runtime; or more devices",
        "network": "smaller pictures",
        "PCIe": "pixels that are decoded on the device",
    }
    rows = []
    for group, then in pairwise(rungs(ladder)):
        parts = ", ".join(part for part, _ in group)
        remedy = "; ".join(remedies[part] for part, _ in group)
        now, (next_part, after) = group[0][1], then[0]
        rows.append(
            (
                "any",
                f"{parts}: {remedy}",
                f"{number(now)} images/s a device",
                f"{number(after)}, then {next_part}",
            )
        )
    several = next(row for row in forecast["writers"] if row["writers"] == 8)
    rows.append(
        (
            "10",
            "one writer for the log, or a second attempt that does not build anew",
            f"{number(several['attempts'])} attempts each with eight writers",
            "1",
        )
    )
    large, starts = forecast["fleets"][-1]["central"], forecast["starts"][2]
    lists = forecast["revisions"]["by_tasks"][-1]
    gains = [
        (
            "modules read once a host",
            duration,
            starts["as_is"]["together_s"],
            starts["once_a_host"]["together_s"],
            "to start",
        ),
        (
            "looking for the next revision by its name, not by a list",
            number,
            large["polling_dollars_month"],
            large["polling_by_name_dollars_month"],
            "$ a month",
        ),
    ]
    if forecast["revisions"]["lists_every_task"]:
        gains.append(
            (
                "revisions that list changes",
                size,
                lists["whole_list_bytes_to_a_thousand_hosts"],
                lists["changes_bytes_to_a_thousand_hosts"],
                f"read for a registration among {number(lists['tasks'])} tasks",
            )
        )
    rows += [
        ("1,000", what, f"{show(now)} {unit}", show(after))
        for what, show, now, after, unit in gains
        if after < 0.9 * now
    ]
    return table(("hosts", "change", "from", "to"), rows)


def rungs(parts: Sequence[Part], share: float = 0.1) -> list[list[Part]]:
    """The four slowest groups of parts: those that are within a share of the first of them bind together."""
    found: list[list[Part]] = []
    for part in parts:
        if found and part[1] <= (1.0 + share) * found[-1][0][1]:
            found[-1].append(part)
        else:
            found.append([part])
    return found[:4]
