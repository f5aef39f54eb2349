"""What the `tosca` commands share: options, tables for people, plain lines for pipes, JSON for machines."""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from model_store.revision import Reason
from model_store.runtimes.runtime import RUNTIMES

Choice = TypeVar("Choice", bound=str)
Model = TypeVar("Model", bound=BaseModel)
DEFAULT_STORE = ".tosca/store"

StoreOption = Annotated[
    str, typer.Option("--store", envvar="TOSCA_STORE", help="Folder or s3://, gs://, az:// URL of the store.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for machines.")]
DeviceOption = Annotated[
    str, typer.Option("--device", envvar="TOSCA_DEVICE", help="auto, cpu, cuda or cuda:N.")
]
RuntimeOption = Annotated[
    str,
    typer.Option(
        "--runtime",
        envvar="TOSCA_RUNTIME",
        help=f"auto (the one that `tosca backbone tune` chose), {', '.join(RUNTIMES)}.",
    ),
]


def checked(kind: Any) -> Callable[[str], str]:
    """The callback of an option whose value must be of a pydantic type; another one is a usage error."""
    adapter = TypeAdapter(kind)

    def check(value: str) -> str:
        try:
            found: str = adapter.validate_python(value)
        except ValidationError as error:
            raise typer.BadParameter(_first_fault(error)) from error
        return found

    return check


def _first_fault(error: ValidationError) -> str:
    return error.errors(include_url=False)[0]["msg"].removeprefix("Value error, ")


ReasonOption = Annotated[
    str, typer.Option("--reason", callback=checked(Reason), help="Kept in the revision.")
]

# No markup: task names, labels, reasons and paths are printed as they are, brackets and all. Soft wrap: a
# line stays a line, whatever the width, so that `grep` finds it whole.
out = Console(markup=False, highlight=False, soft_wrap=True)
err = Console(stderr=True, markup=False, highlight=False, soft_wrap=True)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]+")


def print_json(value: Any) -> None:
    """One JSON document on standard output, never wrapped or coloured."""
    typer.echo(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def print_table(
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    *,
    min_width: int = 0,
    styles: Sequence[str] = (),
) -> None:
    """A table on a terminal; elsewhere a line a row with tabs between, the columns' names first.

    Control characters, which a stranger's text may hold, become blanks: they could break a row or repaint
    the terminal. On terminals narrower than `min_width` characters the lines are longer than the screen.
    `styles` colour the first cell of each row there.
    """
    cells = [[_CONTROL.sub(" ", str(cell)) for cell in row] for row in rows]
    if not out.is_terminal:
        for row in ([*columns], *cells):
            typer.echo("\t".join(row))
        return
    table = Table(*columns)
    for i, (first, *others) in enumerate(cells):
        table.add_row(Text(first, style=styles[i] if styles else ""), *others)
    out.print(table, soft_wrap=False, crop=False, width=max(out.width, min_width))


def figure(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def print_impact(tasks: Iterable[Any], num_unmeasured: int) -> None:
    """The impact of a change on each task that was measured: its health before and after, None where it is
    not active."""

    def cells(one: Any) -> list[str]:
        return [
            " → ".join(figure(getattr(health, name, None)) for health in (one.before, one.after))
            for name in ("selection_accuracy", "accuracy", "ece")
        ]

    print_table(["task", "right task", "accuracy", "ECE"], ((one.task, *cells(one)) for one in tasks))
    if num_unmeasured:
        out.print(f"{num_unmeasured} more tasks, less like the changed ones, were not measured")


def print_tasks(tasks: Iterable[tuple[Any, int, str]]) -> None:
    """What each task says about itself, with the bytes and the digest of its module file."""
    print_table(
        ["task", "classes", "accuracy", "bytes", "module"],
        (
            (one.task, len(one.labels), figure(one.metrics.get("accuracy")), size_bytes, sha256[:12])
            for one, size_bytes, sha256 in tasks
        ),
    )


def print_revisions(revisions: Iterable[Any]) -> None:
    print_table(
        ["revision", "when", "tasks", "reason", "author"],
        (
            (one.number, f"{one.created_at:%Y-%m-%d %H:%M:%S}", len(one.tasks), one.reason, one.author)
            for one in revisions
        ),
    )


def choose(value: str, allowed: tuple[Choice, ...], option: str) -> Choice:
    """The allowed value that was given; anything else is a usage error of `option`."""
    for one in allowed:
        if one == value:
            return one
    raise typer.BadParameter(f"{value!r}: expected one of {', '.join(allowed)}", param_hint=option)


def read_settings(kind: type[Model], given: Mapping[str, Any]) -> Model:
    """Settings as the options that were given and the TOSCA_* variables have them; a wrong one is a usage
    error."""
    try:
        return kind(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        name = "_".join(str(one) for one in error.errors(include_url=False)[0]["loc"])
        raise typer.BadParameter(f"{name} [TOSCA_{name.upper()}]: {_first_fault(error)}") from error


def read_file(path: Path) -> bytes:
    """The bytes of a file named on the command line; a missing one is a usage error."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path}: {error.strerror}") from error
