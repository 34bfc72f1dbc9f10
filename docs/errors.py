"""The page of errors as text: `python docs/errors.py > docs/errors.md`."""

from __future__ import annotations

import builtins
import inspect
import re
from typing import Final, NamedTuple, get_args

import aggregates
import kernel.errors
import projections
from aggregates import EskernelError
from kernel.cli.exit_codes import exit_code_of
from kernel.protocol import ErrorType, decode_answer, encode_error

HOMES: Final = {module.__name__: module for module in (aggregates, projections, kernel.errors)}
"""The public modules that export errors; the first that has one is the place to import it from."""

DO: Final = {
    "EskernelError": "catch it where any error of eskernel is treated alike",
    "Rejected": "tell the user its message; the same command is refused again until the aggregate's state changes",
    "InvalidMessage": "correct the field that the message names; of a stored event: declare the missing upcaster",
    "InvalidEvent": "correct the handler, or the type of the field that the message names; nothing was appended",
    "InvalidId": "choose another id; the message says what is wrong with this one",
    "DeclarationError": "follow the remedy in each line of `problems`; `eskernel check APP` lists them too",
    "SequenceError": "restore the stream from a backup: commits are missing in it, or other programs append to it",
    "SchemaError": "do what the message says: it names the table, the database or the stream that does not fit",
    "TooManyFailures": "mend the program; if it is right, set `dead_letters.pause_above` to 1 while it is built",
    "NotReproducible": "mend the handler that the message names; or set `deployment.verify` to false",
    "HandlerFailed": "correct the handler; a service parks the aggregate: `eskernel dead-letters` shows and retries it",
    "Fenced": "nothing: the service goes on from the checkpoints as they are now",
    "NoSuchLetter": "list the dead letters with `eskernel dead-letters list`; it may have been retried already",
    "QueryRefused": "write one statement that only reads; the message says what in it is refused",
    "AppNotFound": "write the app as `package.module:variable`, and run from the folder that holds the package",
    "NotDeclared": "choose a name from the list in the message, or declare the class in the app",
    "SettingsError": "correct each line of `problems`; `eskernel config show` tells where each value comes from",
    "LimitsError": "correct the value that each line of the message names; nothing was changed",
    "DatabaseMismatch": "use the database of the other workers; to move to a new one, stop all of them first",
    "AlreadyRunning": "stop the other service, or give this one its own directory with `--data`",
    "NotRunning": "start the service, or say which one is meant with `--data` or `--app`",
    "WorkersFailed": "the message is the worker's own reason; remove it and start again",
    "ConnectionFailed": "check that the server runs at that address; the message names the option that it points to",
    "BadCredentials": "correct the file or the option of `security` that the message names",
    "LogError": "see the more special error, or the message",
    "Conflict": "read the aggregate's commits again and decide again; `actual` is the sequence to expect. Services do "
    "so themselves",
    "PayloadTooLarge": "make the events of one command smaller or fewer, or raise `max_payload` of the server",
    "StreamMismatch": "change the stream or the settings back; the message lists what differs",
    "Replaced": "restore the stream (docs/backup.md); if it is lost, keep the database and name a new one",
    "Unavailable": "try again: nothing was appended. If it lasts, look at the NATS server and at its disk",
    "UnknownOutcome": "send the command again with the same id: it takes effect once",
    "UnreadableHistory": "use the program that appended the event, or add an upcaster; `version` can be read with `at`",
    "CommandError": "look at `type`: the second table",
    "Overloaded": "wait `retry_after` seconds and send the command again with the same id",
    "VersionConflict": "read the aggregate again, and decide whether the command is still wanted; `version` is the "
    "present one",
    "NotReturned": "do not send the command again: it took effect, and `receipt` is its receipt. Read the state with "
    "`Client.load`",
    "CommandTimeout": "send the command again with the same id: it takes effect once",
    "NotProjected": "start a service of the program that declares the version, wait for the build, or roll back",
    "QueryTimeout": "ask again, or look at the backlog with `eskernel status`",
    "NotSettled": "correct the handler that the message names, or execute less before `settled`",
    "NoDatabase": "give `Client.connect` the database: `database=URL`",
}

WIRE: Final = {
    "malformed": "the request, or the answer, has not the form of the wire format: correct the program that made it",
    "unknown-aggregate": "the message lists the aggregates of the service; is it another version of the app?",
    "unknown-command": "the message lists the commands of the aggregate; is the service another version of the app?",
    "invalid-command": "a field is missing, unknown, or of the wrong type: correct the field that the message names",
    "invalid-id": "the id cannot be addressed: choose another",
    "rejected": "the aggregate refused: tell the user its message",
    "failed": "code of the app raised, or the stored history cannot be read: the service's log has the traceback",
    "invalid-event": "a handler returned a value that its field cannot hold: correct the handler; nothing was appended",
    "too-large": "make the command or its events smaller, or raise `max_payload` of the server",
    "conflict": "with `version`: the aggregate has that version, and not the one of `if_version`; read it again. "
    "Without: others kept appending to the aggregate; send the command again with the same id",
    "overloaded": "wait `retry_after` seconds and send the command again with the same id",
    "unavailable": "nothing was appended: send the command again; if it lasts, look at the NATS server. If the message "
    "names a newer program: this worker's program is too old for the aggregate",
    "unknown-outcome": "send the command again with the same id: it takes effect once",
}

_HEAD = """# Errors

Made by `make docs` of `kernel/errors.py` and of `docs/errors.py`. Every error of eskernel is an `EskernelError`,
carries what a program needs as attributes, and can be pickled. Database errors come as SQLAlchemy raises them.

An exit code is what `eskernel` ends with when the error reaches the command line: 1 refused or failed, 2 wrong usage,
settings or declarations, 3 nothing runs there or it does not answer.

| error | import from | is also | meaning | exit code | what to do |
|---|---|---|---|---|---|
"""
_WIRE_HEAD = """
## Answers to commands

The `type` of an error in the [wire format](wire-format.md), and what `Client.execute` and `Client.send` raise for it.
The client itself repeats `overloaded`, `unavailable` and `unknown-outcome`, with the same command id, until its
time-out; then it raises. Without any answer it raises `CommandTimeout`.

| type | `Client` raises | what it means, and what to do |
|---|---|---|
"""


class Drawn(NamedTuple):
    """An error as the drawing in kernel/errors.py shows it."""

    name: str
    home: str
    parent: str
    also: tuple[str, ...]


def drawn() -> list[Drawn]:
    """Return the errors of the drawing, in its order."""
    errors = [Drawn("EskernelError", "aggregates", "Exception", ())]
    above = ["EskernelError"]
    for line in (kernel.errors.__doc__ or "").splitlines():
        if found := re.match(r"    ((?:│   |    )*)[├└]── (?:(\w+)\.)?(\w+)\s+(.*)", line):
            branches, home, name, text = found.groups()
            depth = 1 + len(branches) // 4
            also = re.search(r"\(also an? (\w+(?:, \w+)*)\)", text)
            errors.append(
                Drawn(name, home or "kernel.errors", above[depth - 1], tuple(also[1].split(", ") if also else ()))
            )
            above[depth:] = [name]
    return errors


def class_of(error: Drawn) -> type[EskernelError]:
    """Return the class, from where users import it."""
    found: type[EskernelError] = getattr(HOMES[error.home], error.name)
    return found


def built_in_bases(error: type[EskernelError]) -> tuple[str, ...]:
    """Return the built-in errors that a class derives from beside EskernelError."""
    return tuple(
        base.__name__ for base in error.__bases__ if vars(builtins).get(base.__name__) is base and base is not Exception
    )


def also(error: type[EskernelError]) -> str:
    """Return the errors, built in and of eskernel, that a handler may catch instead."""
    bases = [base.__name__ for base in error.__bases__ if base not in (EskernelError, Exception)]
    return ", ".join(f"`{base}`" for base in bases)


def meaning(error: type[EskernelError]) -> str:
    """Return the first sentence of a class's text."""
    text = " ".join((inspect.getdoc(error) or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.!?]) |\.$", text)[0].rstrip(".")


def raised_for(type: str) -> str:
    """Return the name of the exception that a client raises for an error type of the wire format."""
    answer = encode_error(type, "text", "id", 1.0)  # type: ignore[arg-type]
    try:
        decode_answer(answer)
    except EskernelError as error:
        return error.__class__.__name__
    raise AssertionError(f"{type} raised nothing")


def render() -> str:
    """Return the page."""
    lines = []
    for error in drawn():
        kind = class_of(error)
        cells = f"`{error.home}`", also(kind), meaning(kind), str(exit_code_of(kind)), DO[error.name]
        lines.append(f"| `{error.name}` | {' | '.join(cells)} |")
    types = [f"| `{name}` | `{raised_for(name)}` | {WIRE[name]} |" for name in get_args(ErrorType)]
    return _HEAD + "\n".join(lines) + "\n" + _WIRE_HEAD + "\n".join(types) + "\n"


if __name__ == "__main__":
    print(render(), end="")  # noqa: T201 - that is what it is for
