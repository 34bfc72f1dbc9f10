"""Every exception that a caller of the kernel may meet.

    EskernelError
    ├── aggregates.Rejected             the aggregate refused the command
    ├── aggregates.InvalidMessage       a command or an event has not the declared form (also a ValueError)
    │   └── aggregates.InvalidEvent     an event cannot be stored, or not be read back as the same value
    ├── aggregates.InvalidId            an aggregate id cannot be addressed (also a ValueError)
    ├── aggregates.DeclarationError     the declarations of an app cannot work
    ├── aggregates.SequenceError        an aggregate's events do not follow each other 1, 2, 3, ...
    ├── projections.SchemaError         the database is not as this program needs it
    ├── projections.TooManyFailures     a projection that was built fails at too many aggregates
    ├── projections.NotReproducible     two folds of the same log came to different rows
    ├── projections.HandlerFailed       an event could not be folded into a projection
    ├── projections.Fenced              another owner moved the checkpoints on
    ├── projections.NoSuchLetter        no such dead letter
    ├── projections.QueryRefused        a query is not one statement that only reads (also a ValueError)
    ├── AppNotFound                     `package.module:variable` does not lead to an app
    ├── NotDeclared                     the app has no such aggregate, command or projection (also a KeyError)
    ├── SettingsError                   unknown settings, values out of range, contradictions
    ├── LimitsError                     limits that cannot be set (also a ValueError)
    ├── DatabaseMismatch                the app's workers project into another database
    ├── AlreadyRunning                  another service works on the data directory
    ├── NotRunning                      no running service was found
    ├── WorkersFailed                   a worker process could not start
    ├── ConnectionFailed                no NATS server answered (also a ConnectionError)
    │   └── BadCredentials              a file or an option of `security` cannot be used
    ├── LogError                        the log could not do what was asked
    │   ├── Conflict                    something else was appended first
    │   ├── PayloadTooLarge             a commit or a request is larger than the server takes
    │   ├── StreamMismatch              the stream is not what the app needs
    │   ├── Replaced                    the stream is not the one that the service works on
    │   └── Unavailable                 the log cannot be reached, or is full
    │       └── UnknownOutcome          an append may or may not have taken effect
    ├── UnreadableHistory               the program can't read an aggregate's events
    ├── CommandError                    a command was not carried out
    │   ├── VersionConflict             the aggregate has not the version that the sender of the command has seen
    │   └── Overloaded                  the service takes no more commands at the moment
    ├── NotReturned                     a command took effect, and its answer lacks the events or the state
    ├── CommandTimeout                  no answer to a command in time (also a TimeoutError)
    ├── QueryTimeout                    the projections did not include a receipt in time (also a TimeoutError)
    │   └── NotProjected                no running program keeps a projection up to date that readers see
    ├── NotSettled                      an app under test does not come to rest
    └── NoDatabase                      the client was connected without a database (also a RuntimeError)

The errors of the domain are importable from `aggregates`, those of the read side from `projections`, the others from
here. docs/errors.md says what to do about each, and with which exit code the command line reports it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from aggregates.errors import EskernelError

__all__ = [
    "AlreadyRunning",
    "AppNotFound",
    "BadCredentials",
    "CommandError",
    "CommandTimeout",
    "Conflict",
    "ConnectionFailed",
    "DatabaseMismatch",
    "EskernelError",
    "LimitsError",
    "LogError",
    "NoDatabase",
    "NotDeclared",
    "NotProjected",
    "NotReturned",
    "NotRunning",
    "NotSettled",
    "Overloaded",
    "PayloadTooLarge",
    "QueryTimeout",
    "Replaced",
    "SettingsError",
    "StreamMismatch",
    "Unavailable",
    "UnknownOutcome",
    "UnreadableHistory",
    "VersionConflict",
    "WorkersFailed",
]


class AppNotFound(EskernelError):
    """The text given for an app does not lead to one; the message says why."""


class NotDeclared(EskernelError, KeyError):
    """The app has no aggregate, command or projection of that name; the message lists what it has."""

    def __str__(self) -> str:
        """Return the message; a KeyError would print it in quotes."""
        return str(self.args[0]) if self.args else ""


class SettingsError(EskernelError):
    """Settings that cannot be: unknown keys, values out of range, contradictions.

    Attributes:
        problems: one line each, with the key, where its value comes from, and the nearest valid key.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class LimitsError(EskernelError, ValueError):
    """Limits that cannot be set; the message has a line for each problem."""


# service


class AlreadyRunning(EskernelError):
    """Another service works on this data directory."""


class DatabaseMismatch(EskernelError):
    """The app's workers project into another database; the message names both, and says what to do."""


class NotRunning(EskernelError):
    """No running service was found, or more than one; the message says what to do."""


class WorkersFailed(EskernelError):
    """A worker process could not start; the message has the reason that it gave.

    Attributes:
        kinds: names of the classes of the worker's own error.
    """

    def __init__(self, message: str, kinds: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.kinds = frozenset(kinds)


class ConnectionFailed(EskernelError, ConnectionError):
    """No NATS server answered; the message has the cause and the option that it points to."""


class BadCredentials(ConnectionFailed):
    """A file or an option of `security` cannot be used; the message names it."""


# the log


class LogError(EskernelError):
    """The log could not do what was asked."""


class Conflict(LogError):
    """Something else was appended first.

    Attributes:
        actual: stream sequence of the subject's last commit, or None if the log did not say.
        uncertain: the answer to the append was lost, so it may have taken effect before the other commit.
    """

    def __init__(self, subject: str, expected: int, actual: int | None, uncertain: bool = False) -> None:
        super().__init__(f"{subject}: expected last sequence {expected}, it is {actual}")
        self.actual = actual
        self.uncertain = uncertain


class PayloadTooLarge(LogError):
    """A commit or a request is larger than the server takes; the message has both sizes."""


class StreamMismatch(LogError):
    """The stream that exists under the app's name is not what the app needs; the message says what differs."""


class Replaced(LogError):
    """The stream is not the one that this service works on: deleted, created again, or restored from a backup."""


class Unavailable(LogError):
    """The log cannot be reached, or is full; nothing was appended."""


class UnknownOutcome(Unavailable):
    """An append was sent, and whether it took effect could not be found out."""


class UnreadableHistory(EskernelError):
    """The program can't read an aggregate's history; the message names the event, and says why.

    Attributes:
        version: the last event up to which it can be read, 0 if there is none.
    """

    def __init__(self, message: str, version: int = 0) -> None:
        super().__init__(message)
        self.version = version


# commands and queries


class CommandError(EskernelError):
    """A command that was not carried out.

    Attributes:
        type: one of the error types of the wire format.
        message: for people.
        retry_after: seconds to wait before trying again, where that makes sense.
    """

    def __init__(self, type: str, message: str, retry_after: float | None = None) -> None:
        super().__init__(f"{type}: {message}")
        self.type = type
        self.message = message
        self.retry_after = retry_after


class Overloaded(CommandError):
    """The service takes no more commands at the moment; try again after `retry_after` seconds."""


class VersionConflict(CommandError):
    """The aggregate has not the version that the command was sent for with `if_version`; nothing was appended.

    Attributes:
        version: that it has; read it again, and decide anew.
    """

    def __init__(self, message: str, version: int) -> None:
        super().__init__("conflict", message)
        self.version = version


class NotReturned(EskernelError):
    """A command took effect, and its answer lacks what `returning` asked for; the message says why.

    Attributes:
        receipt: of the command, a `kernel.Receipt`.
    """

    def __init__(self, message: str, receipt: Any) -> None:
        super().__init__(message)
        self.receipt = receipt


class CommandTimeout(EskernelError, TimeoutError):
    """No answer to a command in time: it may or may not have taken effect. Send it again with the same id."""


class QueryTimeout(EskernelError, TimeoutError):
    """The projections did not include a receipt in time; the message says how far they got."""


class NotProjected(QueryTimeout):
    """No running program keeps up to date what readers see of a projection; the message says what is built meanwhile.

    It is raised at once, before the time-out.
    """


class NotSettled(EskernelError):
    """An app under test does not come to rest, or events could not be folded or reacted to; the message says why."""


class NoDatabase(EskernelError, RuntimeError):
    """The client was connected without the projection database."""
