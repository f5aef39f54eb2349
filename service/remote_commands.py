"""`tosca remote`: the tasks of a running server, for those who have its key and not its store."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, TypeAlias

import typer

from model_store.console import (
    JsonOption,
    ReasonOption,
    out,
    print_impact,
    print_json,
    print_revisions,
    print_table,
    print_tasks,
    read_file,
)
from model_store.sign_commands import read_signature
from service.client import Change, Client, Standing

remote_app = typer.Typer(no_args_is_help=True, help="Tasks of a running server, over HTTP.")

ServerOption: TypeAlias = Annotated[
    str,
    typer.Option(
        "--server", envvar="TOSCA_SERVER", help="URL of the server; of its admin port, for changes."
    ),
]
KeyOption: TypeAlias = Annotated[
    str | None,
    typer.Option("--key", envvar="TOSCA_API_KEY", help="API key for the server; better as variable."),
]
WaitOption: TypeAlias = Annotated[
    bool,
    typer.Option("--wait", help="Until every live replica serves the change; status 1 where some do not."),
]
DEFAULT_SERVER = "http://127.0.0.1:8000"


@remote_app.command("status")
def remote_status(
    server: ServerOption = DEFAULT_SERVER, key: KeyOption = None, json: JsonOption = False
) -> None:
    """Is the server ready, and what does it answer with?

    Example: tosca remote status --server http://localhost:8000
    """
    with Client(server, key=key) as client:
        state = client.ready()
    if json:
        print_json(asdict(state))
        return
    out.print(
        f"ready: revision {state.revision}, {state.num_tasks} task(s), {state.backbone} on {state.device}"
    )
    if state.is_stale:
        out.print(
            f"the store was not read for {state.staleness_s:.0f} s: {state.store_fault or 'no fault known'}"
        )


@remote_app.command("tasks")
def remote_tasks(
    server: ServerOption = DEFAULT_SERVER, key: KeyOption = None, json: JsonOption = False
) -> None:
    """List the tasks that the server answers with.

    Example: tosca remote tasks --json
    """
    with Client(server, key=key) as client:
        listed = client.tasks()
    if json:
        print_json(asdict(listed))
        return
    print_tasks((one, one.size_bytes, one.module_sha256) for one in listed.tasks)


@remote_app.command("add")
def remote_add(
    module: Annotated[Path, typer.Argument(help="A module file, *.safetensors.")],
    dry_run: Annotated[bool, typer.Option(help="Only print the impact report.")] = False,
    force: Annotated[bool, typer.Option(help="Go ahead even if another task is harmed.")] = False,
    reason: ReasonOption = "",
    wait: WaitOption = False,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Register a module file with the server; its signature goes along if one lies beside it.

    Example: tosca remote add birds.safetensors --dry-run
    """
    data, signature = read_file(module), read_signature(module)
    with Client(server, key=key) as client:
        change = client.add_task(
            data,
            dry_run=dry_run,
            force=force,
            reason=reason,
            signature=None if signature is None else signature.model_dump_json(),
            wait="all" if wait else None,
        )
    _print_change(change, json)


@remote_app.command("remove")
def remote_remove(
    task: str,
    reason: ReasonOption = "",
    wait: WaitOption = False,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Take a task out of the active set; a rollback brings it back.

    Example: tosca remote remove birds --reason "wrong labels"
    """
    with Client(server, key=key) as client:
        _print_change(client.remove_task(task, reason=reason, wait="all" if wait else None), json)


@remote_app.command("replicas")
def remote_replicas(
    server: ServerOption = DEFAULT_SERVER, key: KeyOption = None, json: JsonOption = False
) -> None:
    """List the servers of the same store and the revision each serves.

    Example: tosca remote replicas
    """
    with Client(server, key=key) as client:
        found = client.replicas()
    if json:
        print_json([asdict(one) for one in found])
        return
    print_table(
        ["replica", "state", "revision", "record age", "address"],
        (
            (
                one.replica_id,
                "live" if one.is_live else "gone",
                one.revision,
                f"{one.age_s:.0f} s",
                one.address or "–",
            )
            for one in found
        ),
    )


@remote_app.command("revisions")
def remote_revisions(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="How many, newest first.")] = 20,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """List the newest revisions.

    Example: tosca remote revisions --limit 5
    """
    with Client(server, key=key) as client:
        revisions = client.revisions(limit)
    if json:
        print_json([asdict(one) for one in revisions])
        return
    print_revisions(revisions)


@remote_app.command("rollback")
def remote_rollback(
    number: Annotated[int, typer.Argument(min=1, help="The revision whose tasks become active again.")],
    reason: ReasonOption = "",
    wait: WaitOption = False,
    server: ServerOption = DEFAULT_SERVER,
    key: KeyOption = None,
    json: JsonOption = False,
) -> None:
    """Publish the task set of an old revision as a new one.

    Example: tosca remote rollback 7
    """
    with Client(server, key=key) as client:
        _print_change(client.rollback(number, reason=reason, wait="all" if wait else None), json)


def _print_change(change: Change, json: bool) -> None:
    """Show a change; ends with status 1 where it was to wait for replicas that do not serve it."""
    if json:
        print_json(asdict(change))
    else:
        print_impact(change.impact, change.num_unmeasured)
        if change.published:
            out.print(f"published as revision {change.revision}")
        else:
            out.print(f"nothing published; the server stays at revision {change.revision}")
        if change.replicas is not None:
            _print_standing(change.replicas)
    if change.replicas is not None and not change.replicas.all_serve:
        raise typer.Exit(1)


def _print_standing(standing: Standing) -> None:
    out.print(f"served by {len(standing.serving)} replica(s)")
    for one in standing.behind:
        out.print(f"not served yet by {one.replica_id}, which is at revision {one.revision}")
    if standing.fault is not None:
        out.print(f"not known of all replicas: {standing.fault}")
