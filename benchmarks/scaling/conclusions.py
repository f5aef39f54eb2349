"""The answer in a few words, and what to change first."""

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from benchmarks.scaling.assumptions import CASES
from benchmarks.scaling.notation import duration, in_range, number, size, table

Result = Mapping[str, Any]


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
    }
    rows = [
        (
            "any",
            f"{part}: {remedies[part]}",
            f"{number(now)} images/s a device",
            f"{number(after)}, then {then}",
        )
        for (part, now), (then, after) in pairwise(ladder[:4])
    ]
    several = next(row for row in forecast["writers"] if row["writers"] == 8)
    rows.append(
        (
            "10",
            "one writer for the log, or a second attempt that does not build anew",
            f"{number(several['attempts'])} attempts each with eight writers",
            "1",
        )
    )
    large, starts_1000 = forecast["fleets"][-1]["central"], forecast["starts"][2]
    rows += [
        (
            "1,000",
            "modules read once a host, and in few objects",
            f"{duration(starts_1000['as_is']['together_s'])} to start",
            duration(starts_1000["once_a_host"]["together_s"]),
        ),
        (
            "1,000",
            "look for the next revision by its name, not by a list",
            f"$ {number(large['polling_dollars_month'])} a month",
            f"$ {number(large['polling_by_name_dollars_month'])}",
        ),
    ]
    lists = forecast["revisions"]["by_tasks"][-1]
    rows.append(
        (
            "1,000",
            "revisions that list changes",
            f"{size(lists['whole_list_bytes_to_a_thousand_hosts'])} read for a registration among "
            f"{number(lists['tasks'])} tasks",
            size(lists["changes_bytes_to_a_thousand_hosts"]),
        )
    )
    return table(("hosts", "change", "from", "to"), rows)
