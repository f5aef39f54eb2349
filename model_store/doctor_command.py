"""`tosca doctor`."""

from dataclasses import asdict

import typer

from model_store.checkup import STATES, State, examine
from model_store.console import DEFAULT_STORE, JsonOption, StoreOption, err, print_json, print_table

_STYLE: dict[State, str] = {"ok": "green", "note": "blue", "warning": "yellow", "broken": "red"}


def doctor(store: StoreOption = DEFAULT_STORE, json: JsonOption = False) -> None:
    """Look at this installation and say what is there, what is missing and what is broken.

    Packages and versions, processor and threads, the runtime of the backbone, the store and every file in
    use, settings, keys, certificates, and a server that runs. Changes nothing. Exit status 1 when something
    is broken.

    Example: tosca doctor --store .tosca/store
    """
    findings = examine(store)
    counts = {state: sum(one.state == state for one in findings) for state in STATES}
    if json:
        print_json({"healthy": not counts["broken"], "findings": [asdict(one) for one in findings]})
    else:
        print_table(
            ["state", "area", "what", "found"],
            ((one.state, one.area, one.name, one.detail) for one in findings),
            styles=[_STYLE[one.state] for one in findings],
        )
        worst = max((one.state for one in findings), key=STATES.index)
        err.print(f"warnings: {counts['warning']}, broken: {counts['broken']}", style=_STYLE[worst])
    if counts["broken"]:
        raise typer.Exit(1)
