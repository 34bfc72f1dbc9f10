"""Tracing: the interface that the service uses, and the implementation without spans.

Only `kernel.telemetry.opentelemetry` imports OpenTelemetry.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine, Sequence
from types import ModuleType
from typing import Any, Protocol, TypeVar

from aggregates.commit import Decision, Envelope
from kernel.app import App
from kernel.log.subjects import Address
from kernel.protocol import CommandRequest

T = TypeVar("T")
logger = logging.getLogger("eskernel.telemetry")


class Span(Protocol):
    """A span of an operation in progress."""

    def end(self, outcome: str, problem: str = "", **numbers: int) -> None:
        """End the span with the outcome of the operation."""


class CommitGroup(Protocol):
    """The commits of one aggregate in a batch.

    Attributes:
        skip: indexes of the projections that have folded the commits already.
        commits: stream sequence and events of each commit.
    """

    @property
    def address(self) -> Address: ...
    @property
    def skip(self) -> frozenset[int]: ...
    @property
    def commits(self) -> Sequence[tuple[int, Sequence[Envelope]]]: ...


class Tracer(Protocol):
    """Creates spans for requests and events with a sampled traceparent. Invalid traceparents are ignored."""

    def command(self, sent: CommandRequest, address: Address) -> Span | None:
        """Begin the span of a command. Its traceparent replaces the sender's, so that later spans are its children."""

    def appends(self, address: Address, decisions: Sequence[Decision]) -> Sequence[Span]:
        """Begin a span for each command whose events are in a commit."""

    def projecting(
        self, write: Coroutine[Any, Any, T], groups: Sequence[CommitGroup], began: int
    ) -> Coroutine[Any, Any, T]:
        """Return a coroutine that writes a batch and then creates the spans of its commits.

        Args:
            began: start of the fold, in nanoseconds since the epoch.
        """


class NoTracing:
    """Creates no spans. Traceparents are copied from the request to the events unchanged."""

    def command(self, sent: CommandRequest, address: Address) -> None:  # noqa: ARG002
        return None

    def appends(self, address: Address, decisions: Sequence[Decision]) -> Sequence[Span]:  # noqa: ARG002
        return ()

    def projecting(
        self,
        write: Coroutine[Any, Any, T],
        groups: Sequence[CommitGroup],  # noqa: ARG002
        began: int,  # noqa: ARG002
    ) -> Coroutine[Any, Any, T]:
        return write


NO_TRACING = NoTracing()


def open_tracing(app: App, enabled: bool) -> Tracer:
    """Return the tracer of a service. It creates spans only if the app has set a tracer provider before."""
    otel = _otel() if enabled else None
    if otel is None or not otel.has_provider():
        return NO_TRACING
    logger.info("tracing: commands that carry a sampled traceparent get spans")
    tracer: Tracer = otel.OpenTelemetry(app)
    return tracer


def sender_context(enabled: bool) -> Callable[[], str | None]:
    """Return a function that returns the traceparent of the caller's current span."""
    otel = _otel() if enabled else None
    return otel.current if otel is not None else lambda: None


def _otel() -> ModuleType | None:
    try:
        from kernel.telemetry import opentelemetry as otel
    except ImportError:
        return None
    return otel
