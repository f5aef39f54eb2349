"""Reference pages made from the code itself: commands, settings, HTTP. They cannot fall behind it."""

from collections.abc import Iterator
from functools import cache
from importlib.metadata import entry_points
from typing import Any

import typer
from pydantic.fields import FieldInfo
from typer.core import TyperArgument, TyperGroup
from typer.main import get_command

from model_store import commands
from service.app import create_app
from service.settings import Settings

_BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}
_METHODS = ("get", "post", "put", "delete")


# -- commands ----------------------------------------------------------------------------------------


@cache
def whole_command() -> Any:
    """`tosca` with the commands of every installed package; `model_store.commands.app` stays as it is."""
    whole = typer.Typer(help=commands.app.info.help, add_completion=False)
    whole.registered_callback = commands.app.registered_callback
    whole.registered_commands = [*commands.app.registered_commands]
    whole.registered_groups = [*commands.app.registered_groups]
    for entry in entry_points(group="tosca.commands"):
        entry.load()(whole)
    return get_command(whole)


def leaf_commands(command: Any, path: tuple[str, ...] = ("tosca",)) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every command that does something, with the words that call it."""
    if isinstance(command, TyperGroup):
        for name, one in command.commands.items():
            yield from leaf_commands(one, (*path, name))
    else:
        yield path, command


def commands_page() -> str:
    """Every command with its arguments, options, variables and defaults."""
    lines = [
        "# Every command and option",
        "",
        "Made from the program itself, which prints the same with `--help`.",
    ]
    for path, command in leaf_commands(whole_command()):
        if command.hidden:
            continue
        lines += ["", f"## {' '.join(path)}", "", *_help(command.help or ""), ""]
        parameters = [one for one in command.params if one.name != "help"]
        if parameters:
            lines += ["| | variable | default | |", "|---|---|---|---|", *map(_parameter_row, parameters)]
    return "\n".join(lines) + "\n"


def _help(text: str) -> list[str]:
    """Paragraphs of a help text; an example becomes a block of code."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith(("Example", "$ ")):
            first, _, rest = paragraph.partition(":")
            lines += ["Example:" if rest else "", "", f"    {(rest or first).strip()}", ""]
        else:
            lines += [paragraph, ""]
    return lines


def _parameter_row(parameter: Any) -> str:
    if isinstance(parameter, TyperArgument):
        name = f"`{(parameter.metavar or parameter.name or '').upper()}`"
    else:
        name = ", ".join(f"`{one}`" for one in (*parameter.opts, *parameter.secondary_opts))
    variable = f"`{parameter.envvar}`" if parameter.envvar else ""
    default = parameter.default
    if parameter.required:
        shown = "required"
    elif default in (None, "", ()) or callable(default) or repr(default) == "Sentinel.UNSET":
        shown = ""
    else:
        shown = f"`{str(default).lower() if isinstance(default, bool) else default}`"
    return _row(name, variable, shown, getattr(parameter, "help", None) or "")


# -- settings ----------------------------------------------------------------------------------------


def settings_page() -> str:
    """Every setting of the service with its range, default and meaning."""
    lines = [
        "# Settings of the service",
        "",
        "Variables of the environment, read once when the service starts; an empty one counts as not set.",
        "Made from `service/settings.py`.",
        "",
        "| variable | values | default | |",
        "|---|---|---|---|",
    ]
    for name, field in Settings.model_fields.items():
        lines.append(
            _row(f"`TOSCA_{name.upper()}`", _values(field), _default(name, field), field.description or "")
        )
    return "\n".join(lines) + "\n"


def _values(field: FieldInfo) -> str:
    schema = Settings.model_json_schema()["properties"]
    name = next(name for name, one in Settings.model_fields.items() if one is field)
    choices = schema[name].get("anyOf", [schema[name]])
    described = next(one for one in choices if one.get("type") != "null")
    if "enum" in described:
        return ", ".join(f"`{one}`" for one in described["enum"])
    names = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}
    kinds = {"integer": "whole number", "number": "number", "boolean": "`true`, `false`", "array": "words"}
    bounds = [text.format(f"{described[key]:g}") for key, text in names.items() if key in described]
    kind = "path" if described.get("format") == "path" else kinds.get(described.get("type", ""), "text")
    return " ".join([kind, *bounds])


def _default(name: str, field: FieldInfo) -> str:
    value = field.default
    if value is None or value == ():
        return "–"
    if name.endswith("_bytes") and value % 1024 == 0 and value:
        return f"{value // 2**20} MiB" if value % 2**20 == 0 else f"{value // 1024} KiB"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


# -- HTTP --------------------------------------------------------------------------------------------


def http_page() -> str:
    """Every operation of the OpenAPI document, then every schema."""
    document = create_app(Settings.model_construct()).openapi()
    lines = [
        "# HTTP",
        "",
        "Made from the OpenAPI document that the service gives at `/openapi.json`. Every refusal is a",
        "problem document (RFC 9457); when which status is given is in",
        "[guarantees](../guarantees.md#refusals).",
    ]
    for path, operations in document["paths"].items():
        for method in _METHODS:
            if method in operations:
                lines += _operation(f"{method.upper()} {path}", operations[method])
    lines += ["", "## Schemas"]
    for name, schema in document["components"]["schemas"].items():
        lines += _schema(name, schema)
    return "\n".join(lines) + "\n"


def _operation(title: str, operation: dict[str, Any]) -> list[str]:
    lines = ["", f"## {title.replace('{', '&#123;').replace('}', '&#125;')}", ""]
    lines += [operation.get("description") or operation.get("summary", ""), ""]
    if operation.get("parameters"):
        lines += ["| parameter | in | values | |", "|---|---|---|---|"]
        for one in operation["parameters"]:
            description = one.get("description") or one["schema"].get("description", "")
            lines.append(_row(f"`{one['name']}`", one["in"], _type(one["schema"]), description))
    bodies = operation.get("requestBody", {}).get("content", {})
    lines += ["", "| | | |", "|---|---|---|"]
    lines += [_row("body", f"`{media}`", _type(body.get("schema", {}))) for media, body in bodies.items()]
    refusals = [status for status in operation["responses"] if status >= "400"]
    for status, answer in operation["responses"].items():
        if status not in refusals:
            content: dict[str, Any] = next(iter(answer.get("content", {}).values()), {})
            lines.append(_row(status, answer.get("description", ""), _type(content.get("schema", {}))))
    if refusals:
        lines.append(_row(", ".join(refusals), "refused", "problem document"))
    for media, body in bodies.items():
        if media == "application/json":
            lines += ["", *_fields(body.get("schema", {}))]
    return lines


def _schema(name: str, schema: dict[str, Any]) -> list[str]:
    return ["", f"### {name}", "", schema.get("description", ""), "", *_fields(schema)]


def _fields(schema: dict[str, Any]) -> list[str]:
    """A table of the fields of an object; nothing for other schemas."""
    if not schema.get("properties"):
        return []
    required = schema.get("required", [])
    lines = ["| field of the JSON | values | | |", "|---|---|---|---|"]
    for name, one in schema["properties"].items():
        need = "required" if name in required else ""
        lines.append(_row(f"`{name}`", _type(one), need, one.get("description", "")))
    return lines


def _type(schema: dict[str, Any]) -> str:
    """A schema in a few words, with a link where it has a name."""
    if "$ref" in schema:
        name = schema["$ref"].rsplit("/", 1)[1]
        return f"[{name}](#{name.lower()})"
    for several in ("anyOf", "oneOf"):
        if several in schema:
            return " or ".join(_type(one) for one in schema[several])
    if "enum" in schema:
        return ", ".join(f"`{one}`" for one in schema["enum"])
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}))}"
    if schema.get("format") == "binary" or "contentMediaType" in schema:
        return "bytes"
    kind = str(schema.get("format") or schema.get("type", ""))
    names = {"exclusiveMinimum": "> {}", "minimum": "≥ {}", "exclusiveMaximum": "< {}", "maximum": "≤ {}"}
    return " ".join(
        [kind, *(text.format(schema[key]) for key, text in names.items() if key in schema)]
    ).strip()


def _row(*cells: str) -> str:
    """A row of a table; line breaks and bars inside cells would end it."""
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"
