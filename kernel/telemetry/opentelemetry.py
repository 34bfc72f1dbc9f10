"""Spans with OpenTelemetry. It needs the extra `eskernel[otel]` and a tracer provider, which the app sets."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, Status, StatusCode, TraceFlags

from aggregates.commit import Decision
from kernel.app import App
from kernel.log.subjects import Address
from kernel.protocol import CommandRequest
from kernel.telemetry.tracing import CommitGroup

T = TypeVar("T")
TRACEPARENT = re.compile(r"00-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})")
"""W3C Trace Context, version 00."""
EXPECTED = {"ok", "duplicate", "rejected"}
"""Outcomes that are not errors: an aggregate may reject a command."""
SLICE = 200
"""Number of spans that are created before the event loop may run other tasks."""


def has_provider() -> bool:
    """Return whether the app has set a tracer provider, which would receive the spans."""
    return not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider | trace.NoOpTracerProvider)


def current() -> str | None:
    """Return the traceparent of the caller's current span."""
    context = trace.get_current_span().get_span_context()
    return _traceparent(context) if context.is_valid else None


def _traceparent(context: SpanContext) -> str:
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


def _sampled(traceparent: str | None) -> Context | None:
    """Return the context of a parent span, or None if the traceparent is invalid or not sampled."""
    found = TRACEPARENT.fullmatch(traceparent) if traceparent is not None else None
    if found is None:
        return None
    flags = TraceFlags(int(found[3], 16))
    if not flags.sampled:
        return None
    parent = SpanContext(int(found[1], 16), int(found[2], 16), is_remote=True, trace_flags=flags)
    # a new context, because requests of many senders are handled in the same task
    return trace.set_span_in_context(NonRecordingSpan(parent), Context())


class _Span:
    """A span that ends with an outcome."""

    __slots__ = ("_span",)

    def __init__(self, span: trace.Span) -> None:
        self._span = span

    def end(self, outcome: str, problem: str = "", at: int | None = None, **numbers: int) -> None:
        self._span.set_attribute("eskernel.outcome", outcome)
        for name, value in numbers.items():
            self._span.set_attribute(f"eskernel.{name}", value)
        if outcome not in EXPECTED:
            self._span.set_attribute("error.type", outcome)
            self._span.set_status(Status(StatusCode.ERROR, problem))
        self._span.end(at)


class OpenTelemetry:
    """Implements `kernel.telemetry.tracing.Tracer`."""

    def __init__(self, app: App) -> None:
        self._tracer = trace.get_tracer("eskernel")
        self._app = app.name
        self._projections = {
            name: [(index, each.name) for index, each in enumerate(app.projections) if name in each.units]
            for name in [*app.types, *(each.name for each in app.projections if each.keyed)]
        }

    def _about(self, address: Address, **more: str | None) -> dict[str, Any]:
        return {
            "messaging.system": "nats",
            "messaging.operation.type": "process",
            "eskernel.app": self._app,
            "eskernel.aggregate": address.aggregate,
            "eskernel.aggregate_id": address.id,
            "eskernel.partition": address.partition,
        } | {f"eskernel.{name}": value for name, value in more.items() if value}

    def command(self, sent: CommandRequest, address: Address) -> _Span | None:
        parent = _sampled(sent.traceparent)
        if parent is None:
            return None
        attributes = self._about(
            address,
            command=sent.command,
            command_id=sent.command_id,
            correlation_id=sent.correlation_id,
            causation_id=sent.causation_id,
        )
        attributes["messaging.message.id"] = sent.command_id
        if sent.correlation_id:
            attributes["messaging.message.conversation_id"] = sent.correlation_id
        span = self._tracer.start_span(f"command {sent.aggregate}.{sent.command}", parent, SpanKind.SERVER, attributes)
        if not span.is_recording():
            return None  # the app's sampler has dropped the span
        sent.traceparent = _traceparent(span.get_span_context())
        return _Span(span)

    def appends(self, address: Address, decisions: Sequence[Decision]) -> Sequence[_Span]:
        spans = []
        for decision in decisions:
            if decision.traceparent is not None and (parent := _sampled(decision.traceparent)) is not None:
                attributes: Mapping[str, Any] = {
                    "messaging.system": "nats",
                    "messaging.operation.type": "send",
                    "messaging.destination.name": address.subject,
                    "eskernel.command_id": decision.command_id,
                    "eskernel.events": len(decision.events),
                    "eskernel.decisions": len(decisions),
                }
                spans.append(_Span(self._tracer.start_span("append", parent, SpanKind.PRODUCER, attributes)))
        return spans

    async def projecting(self, write: Coroutine[Any, Any, T], groups: Sequence[CommitGroup], began: int) -> T:
        try:
            result = await write
        except Exception as error:
            # after its first line, a database error contains the values that were written
            await self._project(groups, began, type(error).__name__, str(error).split("\n", 1)[0])
            raise
        await self._project(groups, began, "ok", "")
        return result

    async def _project(self, groups: Sequence[CommitGroup], began: int, outcome: str, problem: str) -> None:
        """Create a span for each traceparent of each commit."""
        ended = time.time_ns()
        size = sum(len(group.commits) for group in groups)
        made = 0
        for group in groups:
            for sequence, events in group.commits:
                last = None
                for event in events:
                    if event.traceparent == last:
                        continue
                    last = event.traceparent
                    if (parent := _sampled(last)) is None:
                        continue
                    attributes = self._about(group.address, command_id=event.commandid)
                    attributes["messaging.batch.message_count"] = size
                    attributes["eskernel.projections"] = self._names(group)
                    attributes["eskernel.stream_sequence"] = sequence
                    name = f"project {group.address.aggregate}"
                    span = self._tracer.start_span(name, parent, SpanKind.CONSUMER, attributes, start_time=began)
                    _Span(span).end(outcome, problem, ended)
                    made += 1
                    if made % SLICE == 0:
                        await asyncio.sleep(0)

    def _names(self, group: CommitGroup) -> list[str]:
        return [name for index, name in self._projections[group.address.aggregate] if index not in group.skip]
