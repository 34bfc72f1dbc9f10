"""The settings of JetStream take effect: prefix, domain, time-outs and grouping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kernel import Client
from kernel.errors import StreamMismatch, Unavailable, UnknownOutcome
from kernel.log import JetStreamLog
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import dial
from kernel.transport.jetstream_api import call_api
from tests.apps import Note, Notebook, notebooks
from tests.conftest import OLD_SERVER, open_log, settings_for
from tests.failing import free_port, running
from tests.faults.proxy import Proxy
from tests.servers import server

Wait = Callable[..., Any]
MAPPED = 'mappings = { "acme.js.>": "$JS.API.>" }\n'


@asynccontextmanager
async def opened(url: str, app: str, **values: Any) -> AsyncIterator[tuple[NatsConnection, JetStreamLog]]:
    settings = settings_for(Path(), nats=url, **values)
    connection = await dial(settings, name="test")
    try:
        log = await open_log(connection, app, nats=url, **values)
        yield connection, log
        await log.close()
    finally:
        await connection.close()


@asynccontextmanager
async def proxied(nats_url: str) -> AsyncIterator[Proxy]:
    proxy = Proxy(free_port(), int(nats_url.rsplit(":", 1)[1]))
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()


async def whole_service(app_name: str, directory: Path, url: str, **values: Any) -> None:
    """A service and its client do everything: leases, appends, projections, loading."""
    async with running(app_name, directory, url, **values) as service:
        settings = service.service.settings
        async with await Client.connect(notebooks(app_name), settings) as client:
            receipts = [await client.execute(Notebook, "one", Note("a")) for _ in range(5)]
            # reloaded aggregates come from the log
            await asyncio.gather(*(client.execute(Notebook, f"n{n}", Note("b")) for n in range(20)))
            stored = await client.log.read_subject(client.log.subjects.address("Notebook", "one").subject)
            assert len(stored) == 5
            rows = await client.query("select notes from pages where notebook = 'one'", after=receipts)
            assert rows == [{"notes": 5}]


@pytest.mark.setting("jetstream.domain")
async def test_a_domain(tmp_path: Path, app_name: str, binary: str) -> None:
    async with server(tmp_path / "nats", "jetstream { domain: hub }", binary=binary) as nats:
        await whole_service(app_name, tmp_path, nats.url, jetstream__domain="hub", consumer__ack_policy="all")
        with pytest.raises(Unavailable, match=r"\$JS.other.API \(jetstream.domain"):
            async with opened(nats.url, app_name, jetstream__domain="other", jetstream__request_timeout=0.5):
                pass


@pytest.mark.setting("jetstream.domain", "jetstream.api_prefix")
@pytest.mark.parametrize(
    ("how", "prefix"),
    [({"jetstream__domain": "hub"}, b"$JS.hub.API."), ({"jetstream__api_prefix": "acme.js"}, b"acme.js.")],
)
async def test_all_requests_use_the_prefix(
    tmp_path: Path, app_name: str, monkeypatch: pytest.MonkeyPatch, how: dict[str, Any], prefix: bytes
) -> None:
    asked: list[bytes] = []
    request, send = NatsConnection.request, NatsConnection.send

    def requested(connection: NatsConnection, subject: str, *rest: Any, **more: Any) -> Any:
        asked.append(subject.encode())
        return request(connection, subject, *rest, **more)

    def sent(connection: NatsConnection, frames: bytes) -> None:
        asked.extend(line.split()[1] for line in frames.split(b"\r\n") if line.startswith((b"PUB ", b"HPUB ")))
        send(connection, frames)

    monkeypatch.setattr(NatsConnection, "request", requested)
    monkeypatch.setattr(NatsConnection, "send", sent)
    async with server(tmp_path / "nats", MAPPED + "jetstream { domain: hub }") as nats:
        await whole_service(app_name, tmp_path, nats.url, **how)
    apis = [
        subject for subject in asked if b"STREAM." in subject or b"CONSUMER." in subject or b"DIRECT.GET" in subject
    ]
    assert any(b"DIRECT.GET" in subject for subject in apis)
    assert any(b"CONSUMER.MSG.NEXT" in subject for subject in apis)
    assert any(b"STREAM.CREATE.KV_" in subject for subject in apis)
    assert [subject for subject in apis if not subject.startswith(prefix)] == []


@pytest.mark.setting("jetstream.api_prefix")
async def test_a_prefix_of_the_api(tmp_path: Path, app_name: str, binary: str) -> None:
    async with server(tmp_path / "nats", MAPPED, binary=binary) as nats:
        await whole_service(app_name, tmp_path, nats.url, jetstream__api_prefix="acme.js")
        with pytest.raises(Unavailable, match=r"acme.other .*jetstream.api_prefix"):
            async with opened(nats.url, app_name, jetstream__api_prefix="acme.other"):
                pass


@pytest.mark.setting("jetstream.request_timeout")
async def test_an_api_that_does_not_answer_is_given_up(nats_url: str, app_name: str) -> None:
    async with proxied(nats_url) as proxy, opened(proxy.url, app_name, jetstream__request_timeout=0.2) as (_, log):
        proxy.lose_answers = True
        async with asyncio.timeout(4):  # the default is longer
            with pytest.raises(Unavailable):
                await log.info()
            with pytest.raises(Unavailable, match="no answer"):
                await log.read_subject(log.subjects.address("Notebook", "n").subject)
        await proxy.heal()


@pytest.mark.setting("jetstream.publish_timeout")
async def test_an_append_without_an_answer_is_looked_up(nats_url: str, app_name: str, wait_until: Wait) -> None:
    values: dict[str, Any] = {"jetstream__publish_timeout": 0.1, "jetstream__request_timeout": 0.2}
    async with proxied(nats_url) as proxy, opened(proxy.url, app_name, **values) as (_, log):
        proxy.lose_answers = True
        appended = log.append(log.subjects.address("Notebook", "n").subject, 0, b"1")
        await wait_until(lambda: log.appender.read_backs > 0, timeout=4)
        assert "no acknowledgement for 0.1 s" in log.appender.refusal
        await proxy.heal()
        assert await appended == 1


@pytest.mark.setting("jetstream.publish_deadline")
async def test_an_append_whose_outcome_is_not_found_out_is_given_up(nats_url: str, app_name: str) -> None:
    values: dict[str, Any] = {
        "jetstream__publish_timeout": 0.1, "jetstream__request_timeout": 0.1, "jetstream__publish_deadline": 0.5,
    }  # fmt: skip
    async with proxied(nats_url) as proxy, opened(proxy.url, app_name, **values) as (_, log):
        proxy.lose_answers = True
        async with asyncio.timeout(15):
            with pytest.raises(UnknownOutcome, match="may or may not have happened"):
                await log.append(log.subjects.address("Notebook", "n").subject, 0, b"1")
        await proxy.heal()


@pytest.mark.setting("jetstream.max_in_flight")
async def test_no_more_appends_than_set_are_under_way(tmp_path: Path, app_name: str, binary: str) -> None:
    async with server(tmp_path, binary=binary) as nats:
        values: dict[str, Any] = {"jetstream__max_in_flight": 7, "group_commit": "never"}
        async with opened(nats.url, app_name, **values) as (connection, log):
            most = 0
            send = connection.send

            def watched(frames: bytes) -> None:
                nonlocal most
                most = max(most, log.appender.pressure[1])
                send(frames)

            connection.send = watched  # type: ignore[method-assign]
            subjects = [log.subjects.address("Notebook", f"n{n}").subject for n in range(100)]
            await asyncio.gather(*(log.append(subject, 0, subject.encode()) for subject in subjects))
            assert most == 7


@pytest.mark.setting("jetstream.group_commit", lacking="`always`: refused at start, with the version it needs (2.12)")
@pytest.mark.parametrize("how", ["always", "never"])
async def test_commits_go_out_together_or_one_by_one(nats_url: str, app_name: str, how: str) -> None:
    async with opened(nats_url, app_name, group_commit=how) as (connection, log):
        sent: list[bytes] = []
        send = connection.send
        connection.send = lambda frames: (sent.append(frames), send(frames))[1]  # type: ignore[method-assign]
        subjects = [log.subjects.address("Notebook", f"n{n}").subject for n in range(20)]
        await asyncio.gather(*(log.append(subject, 0, subject.encode()) for subject in subjects))
        assert b"".join(sent).count(b"Nats-Batch-Commit") == (1 if how == "always" else 0)


@pytest.mark.setting("jetstream.group_commit")
async def test_a_server_without_batches_is_reported(tmp_path: Path, app_name: str) -> None:
    async with server(tmp_path, binary=OLD_SERVER) as nats:
        with pytest.raises(StreamMismatch, match=r"group_commit = 'always' .* needs nats-server 2.12 or"):
            async with opened(nats.url, app_name, group_commit="always"):
                pass
        async with opened(nats.url, app_name, group_commit="auto") as (_, log):
            assert await log.append(log.subjects.address("Notebook", "n").subject, 0, b"1") == 1


@pytest.mark.setting("jetstream.group_commit")
async def test_a_stream_without_batches_is_reported_and_update_enables_them(nats_url: str, app_name: str) -> None:
    async with opened(nats_url, app_name, group_commit="never") as (connection, log):
        config = (await call_api(connection, f"STREAM.INFO.{app_name}", None))["config"]
        await call_api(connection, f"STREAM.DELETE.{app_name}", None)
        await call_api(connection, f"STREAM.CREATE.{app_name}", {**config, "allow_atomic": False})
    with pytest.raises(StreamMismatch, match=r"without allow_atomic: stream.existing = 'update' adds it"):
        async with opened(nats_url, app_name, group_commit="always"):
            pass
    async with opened(nats_url, app_name, group_commit="always", stream__existing="update") as (_, log):
        assert log.appender.grouping
