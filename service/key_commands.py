"""`tosca keys`: who may use a server."""

from datetime import timedelta
from pathlib import Path
from typing import Annotated

import typer

from model_store.console import JsonOption, choose, out, print_json, print_table
from service.keys import SCOPES, change_keys, make_key, now_utc, read_keys, without_key

keys_app = typer.Typer(no_args_is_help=True, help="API keys of a server; it reads a changed file by itself.")

FileOption = Annotated[
    Path,
    typer.Option("--file", envvar="TOSCA_KEYS_FILE", help="The file that the server reads, too."),
]
DEFAULT_FILE = Path(".tosca/keys.json")


@keys_app.command("create")
def create(
    name: Annotated[str, typer.Argument(help="Who will hold it; the author of what is done with it.")],
    scope: Annotated[list[str], typer.Option(help=f"May be repeated: {', '.join(SCOPES)}.")],
    days: Annotated[int | None, typer.Option(min=1, max=36_500, help="Valid for so many days.")] = None,
    file: FileOption = DEFAULT_FILE,
    json: JsonOption = False,
) -> None:
    """Make a key and print its token, which is shown this once: the file keeps only its SHA-256.

    To rotate a key, create another under the same name, hand it over, and revoke the old one.

    Example: tosca keys create ci --scope admin --scope read --days 90
    """
    scopes = tuple(sorted({choose(one, SCOPES, "--scope") for one in scope}, key=SCOPES.index))
    now = now_utc()
    key, token = make_key(name, scopes, now=now, expires_at=now + timedelta(days=days) if days else None)
    change_keys(file, lambda keys: (*keys, key))
    if json:
        print_json({"key_id": key.key_id, "token": token})
        return
    out.print(f"key {key.key_id} of {name} for {', '.join(scopes)}. Its token, shown this once:")
    typer.echo(token)


@keys_app.command("list")
def list_keys(file: FileOption = DEFAULT_FILE, json: JsonOption = False) -> None:
    """List keys, without their secrets, which nobody has kept.

    Example: tosca keys list --file .tosca/keys.json
    """
    keys = read_keys(file)
    if json:
        print_json([one.model_dump(mode="json", exclude={"secret_sha256"}) for one in keys])
        return
    now = now_utc()
    print_table(
        ["id", "name", "scopes", "created", "expires"],
        (
            (
                one.key_id,
                one.name,
                ", ".join(one.scopes),
                f"{one.created_at:%Y-%m-%d}",
                "expired" if one.is_expired(now) else f"{one.expires_at:%Y-%m-%d}" if one.expires_at else "–",
            )
            for one in keys
        ),
    )


@keys_app.command("revoke")
def revoke(
    key_id: Annotated[str, typer.Argument(help="As `tosca keys list` shows it.")],
    file: FileOption = DEFAULT_FILE,
) -> None:
    """Take a key away; the server refuses it from its next request on.

    Example: tosca keys revoke 4bf92f3577b3
    """
    change_keys(file, without_key(key_id))
    out.print(f"revoked {key_id}")
