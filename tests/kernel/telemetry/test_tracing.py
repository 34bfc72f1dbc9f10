"""Traces lead from the sender's span over the command and its append to the projection; there are none by default."""

from __future__ import annotations

import ast
import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
from opentelemetry.trace import NonRecordingSpan, SpanContext, SpanKind, StatusCode, TraceFlags

from aggregates import Rejected
from aggregates.commit import decode
from kernel import Client, Service
from kernel.errors import CommandError
from kernel.telemetry.tracing import NO_TRACING
from projections import HandlerFailed
from projections.unit_of_work import Write, Writer
from tests.apps import Explode, Note, Notebook, notebooks
from tests.conftest import settings_for

Wait = Callable[..., Coroutine[Any, Any, Any]]
ROOT = Path(__file__).parents[3]
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{SPAN}-01", f"00-{TRACE}-{SPAN}-00"
NO_TRACEPARENTS = [
    "", "00-ab", "x" * 128, SAMPLED.upper(), SAMPLED + " ", f"ff-{TRACE}-{SPAN}-01", f"00-{'0' * 32}-{SPAN}-01",
    f"00-{TRACE}-{'0' * 16}-01", f"00-{TRACE}-{SPAN}-1", f"00-{TRACE}-{SPAN}-zz",
]  # fmt: skip


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[TracerProvider]:
    """A tracer provider for this test only: OpenTelemetry allows only one global provider per process."""
    made = TracerProvider()
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", made)
    yield made
    made.shutdown()


@pytest.fixture
def exporter(provider: TracerProvider) -> InMemorySpanExporter:
    kept = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(kept))
    return kept


@asynccontextmanager
async def running(
    app: str, directory: Path, nats: str, database: str | None = None, **more: Any
) -> AsyncIterator[tuple[Service, Client]]:
    database = database or f"sqlite:///{directory / 'projections.db'}"
    settings = settings_for(directory, nats=nats, database=database, **more)
    service = Service(notebooks(app), settings)
    await service.start()
    try:
        async with await Client.connect(service.app, settings) as client:
            yield service, client
    finally:
        await service.stop()


async def stored(service: Service, aggregate_id: str) -> list[str | None]:
    """The traceparents of an aggregate's events."""
    log = service.parts.log
    commits = await log.read_subject(log.subjects.address("Notebook", aggregate_id).subject)
    return [event.traceparent for commit in commits for event in decode(commit.payload)]


def named(exporter: InMemorySpanExporter, name: str, trace_id: int | None = None) -> list[ReadableSpan]:
    return [
        span
        for span in exporter.get_finished_spans()
        if span.name.startswith(name) and trace_id in (None, span.context.trace_id)
    ]


def traceparent(span: Any) -> str:
    context = span.get_span_context()
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"


async def test_one_trace_leads_from_the_sender_over_command_and_append_to_the_projection(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path, wait_until: Wait, exporter: InMemorySpanExporter
) -> None:
    async with running(app_name, tmp_path, nats_url, database_url) as (service, client):
        with trace.get_tracer("shop").start_as_current_span("order") as order:
            receipt = await client.execute(Notebook, "n1", Note("a"), command_id="c1", correlation_id="order 7")
        await wait_until(lambda: named(exporter, "project"))
        events = await stored(service, "n1")
    (command,) = named(exporter, "command Notebook.Note")
    (append,) = named(exporter, "append")
    (project,) = named(exporter, "project Notebook")
    assert len(exporter.get_finished_spans()) == 4
    assert {span.context.trace_id for span in exporter.get_finished_spans()} == {order.get_span_context().trace_id}
    assert [span.parent and span.parent.span_id for span in (command, append, project)] == [
        order.get_span_context().span_id, command.context.span_id, command.context.span_id,
    ]  # fmt: skip
    assert events == [traceparent(command)]
    assert [span.kind for span in (command, append, project)] == [
        SpanKind.SERVER, SpanKind.PRODUCER, SpanKind.CONSUMER,
    ]  # fmt: skip
    for span in (command, append, project):
        assert span.attributes is not None
        assert span.attributes["messaging.system"] == "nats"
        assert span.attributes["eskernel.stream_sequence"] == receipt.sequence
        assert span.attributes["eskernel.command_id"] == "c1"
        assert span.attributes["eskernel.outcome"] == "ok"
        assert span.status.status_code is StatusCode.UNSET
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
    assert dict(command.attributes or {}) == {
        "messaging.system": "nats", "messaging.operation.type": "process", "messaging.message.id": "c1",
        "messaging.message.conversation_id": "order 7", "eskernel.app": app_name, "eskernel.aggregate": "Notebook",
        "eskernel.aggregate_id": "n1", "eskernel.partition": receipt.partition, "eskernel.command": "Note",
        "eskernel.command_id": "c1", "eskernel.correlation_id": "order 7", "eskernel.outcome": "ok",
        "eskernel.version": 1, "eskernel.stream_sequence": receipt.sequence,
    }  # fmt: skip
    assert project.attributes is not None
    assert project.attributes["eskernel.projections"] == ("Pages", "Words", "Lines")
    assert project.attributes["messaging.batch.message_count"] == 1
    assert (command.end_time or 0) >= (append.end_time or 0) >= (append.start_time or 0) >= (command.start_time or 0)


async def test_commands_that_share_a_commit_keep_their_traces_apart(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait, exporter: InMemorySpanExporter
) -> None:
    async def order(number: int) -> int:
        with trace.get_tracer("shop").start_as_current_span(f"order {number}") as span:
            await client.execute(Notebook, "n1", Note(f"{number}"))
        return span.get_span_context().trace_id

    async with running(app_name, tmp_path, nats_url) as (service, client):
        traces = await asyncio.gather(*map(order, range(30)))
        plain = await client.execute(Notebook, "n1", Note("untraced"))
        await wait_until(lambda: len(named(exporter, "project")) >= 30)
        await client.query("select 1", after=plain)
        assert (
            len(await service.parts.log.read_subject(service.parts.log.subjects.address("Notebook", "n1").subject)) < 30
        )
        assert (await stored(service, "n1"))[-1] is None
    assert len(set(traces)) == 30
    for trace_id in traces:
        (command,) = named(exporter, "command", trace_id)
        for below in ("append", "project"):
            (span,) = named(exporter, below, trace_id)
            assert span.parent is not None
            assert span.parent.span_id == command.context.span_id
    assert len(exporter.get_finished_spans()) == 4 * 30


async def test_a_span_has_the_outcome_of_its_command(
    nats_url: str, app_name: str, tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    async with running(app_name, tmp_path, nats_url) as (_, client):
        with pytest.raises(Rejected):
            await client.execute(Notebook, "n1", Note(""), traceparent=SAMPLED)
        with pytest.raises(CommandError):
            await client.execute(Notebook, "n1", Explode(), traceparent=SAMPLED)
        for _ in range(2):
            await client.execute(Notebook, "n1", Note("a"), command_id="c1", traceparent=SAMPLED)
    spans = named(exporter, "command")
    assert [(span.attributes or {})["eskernel.outcome"] for span in spans] == ["rejected", "failed", "ok", "duplicate"]
    assert [span.status.status_code for span in spans] == [
        StatusCode.UNSET, StatusCode.ERROR, StatusCode.UNSET, StatusCode.UNSET,
    ]  # fmt: skip
    assert spans[1].status.description == "ZeroDivisionError: boom"
    assert all(span.parent is not None and f"{span.parent.span_id:016x}" == SPAN for span in spans)
    assert len(named(exporter, "append")) == 1


async def test_a_command_that_a_limit_turns_away_has_a_span_that_says_so(
    nats_url: str, app_name: str, tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    async with running(app_name, tmp_path, nats_url, commands__pending_per_aggregate=1) as (_, client):
        await asyncio.gather(*(client.execute(Notebook, "n1", Note("a"), traceparent=SAMPLED) for _ in range(5)))
    spans = named(exporter, "command")
    outcomes = [(span.attributes or {})["eskernel.outcome"] for span in spans]
    assert set(outcomes) == {"ok", "overloaded"}
    assert outcomes.count("ok") == 5
    assert spans[outcomes.index("overloaded")].status.status_code is StatusCode.ERROR


async def test_a_batch_that_was_not_written_shows_as_an_error_before_the_one_that_was(
    nats_url: str,
    app_name: str,
    tmp_path: Path,
    wait_until: Wait,
    exporter: InMemorySpanExporter,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commit, refusals = Writer.commit, ["no such line"]

    def refuse_once(writer: Writer, write: Write) -> list[HandlerFailed]:
        if refusals and write.batch:
            raise ValueError(refusals.pop())
        return commit(writer, write)

    monkeypatch.setattr(Writer, "commit", refuse_once)
    async with running(app_name, tmp_path, nats_url) as (_, client):
        await client.execute(Notebook, "n1", Note("a"), traceparent=SAMPLED)
        await wait_until(lambda: len(named(exporter, "project")) == 2)
    refused, written = named(exporter, "project")
    assert refused.status.status_code is StatusCode.ERROR
    assert "no such line" in (refused.status.description or "")
    assert (written.attributes or {})["eskernel.outcome"] == "ok"


async def test_unsampled_traces_make_no_spans_and_are_passed_on(
    nats_url: str, app_name: str, tmp_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    provider.sampler = ALWAYS_ON  # it samples every trace without asking the parent
    outside = NonRecordingSpan(SpanContext(int(TRACE, 16), int(SPAN, 16), False, TraceFlags(0)))
    async with running(app_name, tmp_path, nats_url) as (service, client):
        await client.execute(Notebook, "n1", Note("a"), traceparent=UNSAMPLED)
        with trace.use_span(outside):
            receipt = await client.execute(Notebook, "n1", Note("a"))
        await client.query("select 1", after=receipt)
        assert await stored(service, "n1") == [UNSAMPLED, UNSAMPLED]
    assert exporter.get_finished_spans() == ()


async def test_a_sampler_of_the_apps_own_has_the_last_word(
    nats_url: str, app_name: str, tmp_path: Path, provider: TracerProvider, exporter: InMemorySpanExporter
) -> None:
    provider.sampler = ALWAYS_OFF
    async with running(app_name, tmp_path, nats_url) as (service, client):
        receipt = await client.execute(Notebook, "n1", Note("a"), traceparent=SAMPLED)
        await client.query("select 1", after=receipt)
        assert await stored(service, "n1") == [SAMPLED]
    assert exporter.get_finished_spans() == ()


async def test_an_invalid_traceparent_is_ignored(
    nats_url: str, app_name: str, tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    async with running(app_name, tmp_path, nats_url) as (service, client):
        for number, odd in enumerate(NO_TRACEPARENTS):
            request = {"aggregate": "Notebook", "id": "n1", "command": "Note", "data": {"text": "a", "number": 1}}
            receipt = await client.send({**request, "command_id": f"c{number}", "traceparent": odd})
        await client.query("select 1", after=receipt)
        assert await stored(service, "n1") == NO_TRACEPARENTS
    assert exporter.get_finished_spans() == ()


async def test_without_a_provider_traceparents_only_flow(nats_url: str, app_name: str, tmp_path: Path) -> None:
    async with running(app_name, tmp_path, nats_url) as (service, client):
        await client.execute(Notebook, "n1", Note("a"), traceparent=SAMPLED)
        assert await stored(service, "n1") == [SAMPLED]
        assert service.parts.gateway._tracing is NO_TRACING


@pytest.mark.setting("tracing.enabled")
async def test_switched_off_there_are_no_spans_and_the_senders_is_not_taken(
    nats_url: str, app_name: str, tmp_path: Path, exporter: InMemorySpanExporter
) -> None:
    async with running(app_name, tmp_path, nats_url, tracing__enabled=False) as (service, client):
        with trace.get_tracer("shop").start_as_current_span("order"):
            await client.execute(Notebook, "n1", Note("a"))
            receipt = await client.execute(Notebook, "n1", Note("a"), traceparent=SAMPLED)
        await client.query("select 1", after=receipt)
        assert await stored(service, "n1") == [None, SAMPLED]
    assert [span.name for span in exporter.get_finished_spans()] == ["order"]


WITHOUT = """
import asyncio, sys
from pathlib import Path
sys.modules["opentelemetry"] = None
from tests.kernel.telemetry.test_logs import notebooks, Note, Notebook
from kernel import Client, Service
from kernel.telemetry.tracing import NO_TRACING
from aggregates.commit import decode
from tests.conftest import settings_for

async def main():
    settings = settings_for(Path(sys.argv[1]), nats=sys.argv[2], database="sqlite:///" + sys.argv[1] + "/p.db")
    service = Service(notebooks(sys.argv[3]), settings)
    await service.start()
    async with await Client.connect(service.app, settings) as client:
        await client.execute(Notebook, "n1", Note("a"))
        receipt = await client.execute(Notebook, "n1", Note("a"), traceparent=sys.argv[4])
        await client.query("select 1", after=receipt)
    assert service.parts.gateway._tracing is NO_TRACING
    commits = await service.parts.log.read_subject(service.parts.log.subjects.address("Notebook", "n1").subject)
    print([event.traceparent for commit in commits for event in decode(commit.payload)])
    await service.stop()

asyncio.run(main())
"""


def test_without_the_package_everything_works_and_traceparents_flow(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-c", WITHOUT, str(tmp_path), nats_url, app_name, SAMPLED]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str([None, SAMPLED])


def test_one_module_imports_the_package() -> None:
    def imports(path: Path) -> bool:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        return any(name.split(".")[0] == "opentelemetry" for name in names)

    folders = ("aggregates", "projections", "kernel", "migrations")
    found = [path.name for folder in folders for path in (ROOT / folder).rglob("*.py") if imports(path)]
    assert found == ["opentelemetry.py"]
