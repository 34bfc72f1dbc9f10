"""Tracing: what the service asks of it, and the way to do without.

Only `kernel.telemetry.opentelemetry` imports OpenTelemetry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from types import ModuleType
from typing import Any, Protocol

from aggregates.commit import Decision
from kernel.app import App
from kernel.log.subjects import Address
from kernel.projector.grouping import Group
from kernel.protocol import CommandRequest

logger = logging.getLogger("eskernel.telemetry")


class Span(Protocol):
    """Something under way that a sender wants to see."""

    def end(self, outcome: str, problem: str = "", **numbers: int) -> None:
        """Say what became of it."""


class Tracing(Protocol):
    """Makes spans where a sampled traceparent asks for them; traceparents that are none are passed over."""

    def command(self, sent: CommandRequest, address: Address) -> Span | None:
        """Begin the span of a command, and have what follows hang below it: its traceparent replaces the sender's."""

    def appends(self, address: Address, decisions: Sequence[Decision]) -> Sequence[Span]:
        """Begin a span for each command that a commit is appended for."""

    def projecting(
        self, write: Coroutine[Any, Any, None], groups: Sequence[Group], began: int
    ) -> Coroutine[Any, Any, None]:
        """Return what writes a batch, and then makes the spans of its commits.

        Args:
            began: when folding began, in nanoseconds since the epoch.
        """


class NoTracing:
    """Traceparents flow from the request to the event unchanged."""

    def command(self, sent: CommandRequest, address: Address) -> None:  # noqa: ARG002
        return None

    def appends(self, address: Address, decisions: Sequence[Decision]) -> Sequence[Span]:  # noqa: ARG002
        return ()

    def projecting(
        self,
        write: Coroutine[Any, Any, None],
        groups: Sequence[Group],  # noqa: ARG002
        began: int,  # noqa: ARG002
    ) -> Coroutine[Any, Any, None]:
        return write


NO_TRACING = NoTracing()


def open_tracing(app: App, enabled: bool) -> Tracing:
    """Decide, once, whether this service makes spans: it does where the app has set a tracer provider."""
    otel = _otel() if enabled else None
    if otel is None or not otel.has_provider():
        return NO_TRACING
    logger.info("tracing: commands that carry a sampled traceparent get spans")
    tracing: Tracing = otel.OpenTelemetry(app)
    return tracing


def sender_context(enabled: bool) -> Callable[[], str | None]:
    """Return the function that gives the traceparent of the span that the caller is in."""
    otel = _otel() if enabled else None
    return otel.current if otel is not None else lambda: None


def _otel() -> ModuleType | None:
    try:
        from kernel.telemetry import opentelemetry as otel
    except ImportError:
        return None
    return otel
