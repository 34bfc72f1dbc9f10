"""`eskernel send`."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click
import msgspec
import orjson

from aggregates import InvalidMessage
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
@click.option("--if-version", type=click.IntRange(0), metavar="N", help="Only if the aggregate has N events so far.")
@click.option("--actor", help="Who sends the command.")
@click.option("--tenant", help="The tenant that it is for.")
@click.option("--metadata", multiple=True, metavar="NAME=TEXT", help="What else is stored with the events. Repeatable.")
@click.option("--occurred-at", metavar="TIME", help="When it has happened, if not now: ISO 8601 (UTC).")
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
    if_version: int | None,
    actor: str | None,
    tenant: str | None,
    metadata: tuple[str, ...],
    occurred_at: str | None,
    timeout: float,
    as_json: bool,
    where: Where,
) -> None:
    """Send a COMMAND to an AGGREGATE, and print its receipt.

    \b
    eskernel send Account alice Deposit cents=500
    eskernel send Account alice Deposit --fields-json '{"cents": 500}'
    eskernel send Account alice Deposit cents=500 --if-version 3 --actor bert --metadata ip=::1

    Exits with 1, and prints the reason, if the aggregate rejects the command.
    """
    said = _parse_metadata(metadata)
    moment = _parse_moment(occurred_at)
    target = where.find()
    declared = target.app.type_of(aggregate)
    if command not in declared.commands:
        raise NotDeclared(f"{aggregate} has no command {command!r}; it has {', '.join(sorted(declared.commands))}")
    made = _make(declared.commands[command], fields, fields_json)
    async with await target.client() as client:
        receipt = await client.execute(
            *(declared.cls, id, made), timeout=timeout, command_id=command_id, if_version=if_version, actor=actor,
            tenant=tenant, metadata=said, occurred_at=moment,
        )  # fmt: skip
    if as_json:
        print_json(receipt)
        return
    again = " (the command had taken effect before)" if receipt.duplicate else ""
    console.print(
        f"{aggregate} {id} is at version {receipt.version}; stream sequence {receipt.sequence}{again}",
        highlight=False,
        markup=False,
    )


def _parse_metadata(assignments: tuple[str, ...]) -> dict[str, str]:
    metadata = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise click.UsageError(f"--metadata {assignment!r} is not NAME=TEXT")
        metadata[name] = value
    return metadata


def _parse_moment(text: str | None) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise click.UsageError(f"--occurred-at {text!r} is not an ISO 8601 time, such as 2026-01-31T12:00") from None
    return moment if moment.tzinfo is not None else moment.replace(tzinfo=UTC)


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
