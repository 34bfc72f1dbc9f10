"""Which problem an error becomes."""

from __future__ import annotations

import json
from typing import get_args

import pytest

from aggregates import EskernelError, InvalidId, InvalidMessage, Rejected
from kernel import errors
from kernel.errors import CommandError, CommandTimeout, NotProjected, Overloaded, QueryTimeout, VersionConflict
from kernel.protocol import ErrorType
from kernel.web.problems import STATUS, problem_of


def test_every_error_type_of_the_wire_format_has_a_status() -> None:
    assert {*get_args(ErrorType)} <= {*STATUS}


@pytest.mark.parametrize(
    ("error", "status", "retry_after"),
    [
        (Overloaded("overloaded", "too much", 2.3), 429, "3"),
        (CommandError("unavailable", "no log"), 503, "1"),
        (CommandError("conflict", "others kept appending"), 503, "1"),
        (errors.Unavailable("no log"), 503, "1"),
        (errors.ConnectionFailed("nobody answers"), 503, "1"),
        (NotProjected("nobody projects"), 503, "1"),
        (QueryTimeout("behind"), 504, None),
        (CommandTimeout("no answer"), 504, None),
        (CommandError("unknown-outcome", "who knows"), 504, None),
        (VersionConflict("it has version 4", 4), 412, None),
        (Rejected("no"), 409, None),
        (InvalidMessage("no such field"), 422, None),
        (InvalidId("empty"), 422, None),
        (errors.NotDeclared("no such aggregate"), 404, None),
        (CommandError("unknown-command", "no such command"), 404, None),
    ],
    ids=lambda value: getattr(value, "type", type(value).__name__) if isinstance(value, EskernelError) else None,
)
def test_an_error_has_a_status_and_says_when_to_try_again(
    error: EskernelError, status: int, retry_after: str | None
) -> None:
    answer = problem_of(error)
    assert (answer.status_code, answer.headers.get("Retry-After")) == (status, retry_after)
    detail = json.loads(answer.body)["detail"]
    assert detail == (error.message if isinstance(error, CommandError) else str(error))


@pytest.mark.parametrize(
    "error",
    [
        CommandError("failed", "KeyError: 'password' in secrets.py"),
        CommandError("invalid-event", "secrets"),
        CommandError("of-a-newer-service", "secrets"),
        errors.UnreadableHistory("secrets"),
        errors.NoDatabase("secrets"),
    ],
)
def test_a_fault_of_the_application_is_told_to_its_log_only(
    error: EskernelError, caplog: pytest.LogCaptureFixture
) -> None:
    answer = problem_of(error)
    assert answer.status_code == 500
    assert b"secrets" not in answer.body
    assert "secrets" in caplog.text
