"""`eskernel send`."""

from __future__ import annotations

from typing import Any

import click
import msgspec
import orjson

from aggregates import InvalidMessage
from aggregates.context import uuid7
from aggregates.messages import dumps, parse
from kernel.cli import EXIT_CODES
from kernel.cli.common import Where, asynchronous, console, print_json, target_options
from kernel.errors import NotDeclared


@click.command(epilog=EXIT_CODES)
@click.argument("aggregate")
@click.argument("id")
@click.argument("command")
@click.argument("fields", nargs=-1, metavar="[FIELD=VALUE]...")
@click.option("--fields-json", metavar="JSON", help="The fields as one JSON object, instead of FIELD=VALUE.")
@click.option(
    "--command-id", help="Id of the command. A command that is sent again with the same id takes effect once."
)
@click.option("--timeout", default=15.0, show_default=True, help="Seconds to wait for the receipt.")
@click.option("--json", "as_json", is_flag=True, help="Print the receipt as JSON.")
@target_options
@asynchronous
async def send(
    aggregate: str,
    id: str,
    command: str,
    fields: tuple[str, ...],
    fields_json: str | None,
    command_id: str | None,
    timeout: float,
    as_json: bool,
    where: Where,
) -> None:
    """Send a COMMAND to an AGGREGATE, and print its receipt.

    \b
    eskernel send Account alice Deposit cents=500
    eskernel send Account alice Deposit --fields-json '{"cents": 500}'

    Exits with 1, and prints the reason, if the aggregate rejects the command.
    """
    target = where.find()
    declared = target.app.type_of(aggregate)
    if command not in declared.commands:
        raise NotDeclared(f"{aggregate} has no command {command!r}; it has {', '.join(sorted(declared.commands))}")
    made = _make(declared.commands[command], fields, fields_json)
    async with await target.client() as client:
        receipt = await client.execute(declared.cls, id, made, command_id=command_id or uuid7(), timeout=timeout)
    if as_json:
        print_json(receipt)
        return
    again = " (the command had taken effect before)" if receipt.duplicate else ""
    console.print(
        f"{aggregate} {id} is at version {receipt.version}; stream sequence {receipt.sequence}{again}",
        highlight=False,
        markup=False,
    )


def _make(cls: type, fields: tuple[str, ...], fields_json: str | None) -> Any:
    """Make the command from the typed fields. A text is converted to the type of its field."""
    if fields_json is not None:
        if fields:
            raise click.UsageError("give FIELD=VALUE or --fields-json, not both")
        try:
            return parse(cls, orjson.loads(fields_json))
        except orjson.JSONDecodeError as error:
            raise InvalidMessage(f"--fields-json is not JSON: {error}") from None
    typed: dict[str, Any] = {}
    for assignment in fields:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.UsageError(f"{assignment!r} is not FIELD=VALUE")
        typed[name] = value
    known = {field.name: field.type for field in msgspec.inspect.type_info(cls).fields}  # type: ignore[attr-defined]
    for name, value in typed.items():
        if not isinstance(known.get(name), msgspec.inspect.StrType) and value[:1] in ("[", "{", '"'):
            try:
                typed[name] = orjson.loads(value)
            except orjson.JSONDecodeError:
                raise InvalidMessage(f"{name}: {value!r} is not JSON") from None
    if any(name not in known for name in typed):
        parse(cls, typed)  # it raises an error that lists the fields
    try:
        made: Any = msgspec.convert(typed, cls, strict=False)
        dumps(made)
    except (msgspec.ValidationError, TypeError) as error:
        raise InvalidMessage(f"{cls.__name__}: {error}") from None
    return made
