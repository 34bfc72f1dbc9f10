"""The settings of the projections' consumer: as the server shows them, and by their effect."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import orjson
import pytest
from sqlalchemy import text

from kernel.log import JetStreamLog
from kernel.log.reader import JetStreamReader
from kernel.projector.rebuild import Rebuild
from kernel.projector.session import Session
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import dial
from kernel.transport.jetstream_api import call_api
from projections.database import open_database
from tests.conftest import open_log, settings_for
from tests.failing import api, running
from tests.servers import server

Wait = Callable[..., Any]
ACK: dict[str, Any] = {"consumer__ack_policy": "all"}


@pytest.fixture(params=["2.15", "2.10"])
def url(request: pytest.FixtureRequest) -> str:
    """A running server of each version."""
    found: str = request.getfixturevalue("nats_url" if request.param == "2.15" else "old_nats_url")
    return found


async def consumers(url: str, stream: str) -> list[dict[str, Any]]:
    """Return the server's descriptions of the live consumers of a stream; other consumers have a filter."""
    async with api(url) as call:
        found: list[dict[str, Any]] = (await call(f"CONSUMER.LIST.{stream}"))["consumers"] or []
        return [consumer for consumer in found if not consumer["config"].get("filter_subject")]


@asynccontextmanager
async def reading(
    url: str, app: str, **values: Any
) -> AsyncIterator[tuple[NatsConnection, JetStreamLog, JetStreamReader]]:
    """A live reader, as the projections use it."""
    connection = await dial(settings_for(Path(), nats=url), name="test")
    try:
        log = await open_log(connection, app, **values)
        reader = await log.read(0, live=True)
        assert isinstance(reader, JetStreamReader)
        yield connection, log, reader
        await log.close()
    finally:
        await connection.close()


async def fill(log: JetStreamLog, count: int, start: int = 0) -> None:
    subjects = [log.subjects.address("Notebook", f"n{n}").subject for n in range(start, start + count)]
    await asyncio.gather(*(log.append(subject, 0, subject.encode()) for subject in subjects))


@pytest.mark.setting(
    "consumer.name_prefix", "consumer.ack_policy", "consumer.ack_wait", "consumer.max_ack_pending",
    "consumer.replay_policy", "consumer.max_waiting", "consumer.inactive_threshold", "consumer.max_deliver",
    "consumer.deliver_policy",
)  # fmt: skip
async def test_the_server_shows_what_was_set(url: str, app_name: str, tmp_path: Path, wait_until: Wait) -> None:
    values: dict[str, Any] = {
        "consumer__name_prefix": "billing", "consumer__ack_wait": 33.5, "consumer__max_ack_pending": 77,
        "consumer__replay_policy": "original", "consumer__max_waiting": 5, "consumer__inactive_threshold": 44.0, **ACK,
    }  # fmt: skip
    async with running(app_name, tmp_path, url, **values) as service:
        [consumer] = await wait_until(lambda: consumers(url, app_name))
        config = consumer["config"]
        assert consumer["name"].startswith(f"billing-{service.service.worker}-")
        assert config["ack_policy"] == "all"
        assert config["ack_wait"] == 33_500_000_000
        assert config["max_ack_pending"] == 77
        assert config["replay_policy"] == "original"
        assert config["max_waiting"] == 5
        assert config["inactive_threshold"] == 44_000_000_000
        assert config["max_deliver"] == -1
        assert config["deliver_policy"] in ("all", "by_start_sequence")
    async with running(app_name, tmp_path, url) as service:
        [consumer] = await wait_until(lambda: consumers(url, app_name))
        assert consumer["name"].startswith(f"eskernel-{service.service.worker}-")
        assert consumer["config"]["ack_policy"] == "none"
        assert consumer["config"]["replay_policy"] == "instant"
        assert consumer["config"]["inactive_threshold"] == 60_000_000_000


@pytest.mark.setting("consumer.ack_policy")
async def test_the_servers_ack_floor_follows_the_checkpoint(
    url: str, app_name: str, tmp_path: Path, database_url: str, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, url, database_url, **ACK) as service:
        await service.note(200, ids=50)

        async def followed() -> bool:
            last = (await service.client.log.info()).last
            found = await consumers(url, app_name)
            return last >= 50 and bool(found) and found[0]["ack_floor"]["stream_seq"] == last

        await wait_until(followed)
        await service.check()


@pytest.mark.setting("consumer.ack_policy")
async def test_nothing_is_acknowledged_before_it_is_written(
    nats_url: str, app_name: str, tmp_path: Path, fresh_postgres: str, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, fresh_postgres, **ACK) as service:
        await service.note(10)
        await service.check()
        held = open_database(fresh_postgres)
        with held.connect() as connection:
            connection.execute(text("LOCK TABLE eskernel_checkpoint IN ACCESS EXCLUSIVE MODE"))
            written = (await service.client.log.info()).last
            await service.note(50, ids=50)

            async def delivered() -> bool:
                found = await consumers(nats_url, app_name)
                return bool(found) and found[0]["delivered"]["stream_seq"] > written

            await wait_until(delivered)
            assert (await consumers(nats_url, app_name))[0]["ack_floor"]["stream_seq"] <= written
            connection.rollback()
        held.dispose()
        await service.check()


@pytest.mark.setting("consumer.ack_wait")
async def test_a_redelivered_commit_is_noticed_and_returned_once(url: str, app_name: str) -> None:
    values: dict[str, Any] = {"consumer__ack_wait": 0.3, **ACK}
    async with reading(url, app_name, **values) as (_, log, reader):
        await fill(log, 20)
        got: list[int] = []
        while len(got) < 20:
            got += [commit.sequence for commit in (await reader.next(5)).commits]
        first = reader.consumer
        # nothing is acknowledged: the server delivers again, and a new consumer continues after the delivered commits
        for _ in range(200):
            got += [commit.sequence for commit in (await reader.next(5, timeout=0.05)).commits]
            if reader.consumer != first:
                break
        assert reader.consumer != first
        await fill(log, 20, start=20)
        while len(got) < 40:
            got += [commit.sequence for commit in (await reader.next(50)).commits]
        assert got == list(range(1, 41))


@pytest.mark.setting("consumer.ack_wait")
async def test_a_database_that_is_slower_than_the_acknowledgements_folds_nothing_twice(
    nats_url: str, app_name: str, tmp_path: Path, fresh_postgres: str
) -> None:
    values: dict[str, Any] = {"consumer__ack_wait": 0.05, **ACK}
    async with running(app_name, tmp_path, nats_url, fresh_postgres, **values) as service:
        for _ in range(5):
            await service.note(50)
        await service.check()


@pytest.mark.setting("consumer.max_ack_pending")
async def test_no_more_is_delivered_ahead_of_the_acknowledgements(url: str, app_name: str) -> None:
    values: dict[str, Any] = {"consumer__max_ack_pending": 10, **ACK}
    async with reading(url, app_name, **values) as (_, log, reader):
        await fill(log, 35)
        got: list[int] = []
        for wanted in (10, 20, 30, 35):
            while len(got) < wanted:
                got += [commit.sequence for commit in (await reader.next(100)).commits]
            assert not (await reader.next(100, timeout=0.2)).commits
            assert len(got) == wanted
            reader.acknowledge(got[-1])
        assert got == list(range(1, 36))


@pytest.mark.setting("consumer.max_ack_pending")
async def test_a_small_number_ahead_stops_neither_projections_nor_rebuilds_nor_loading(
    url: str, app_name: str, tmp_path: Path
) -> None:
    values: dict[str, Any] = {"consumer__max_ack_pending": 3, "passivation__count": 1, **ACK}
    async with running(app_name, tmp_path, url, **values) as service:
        async with asyncio.timeout(60):
            for _ in range(3):
                await service.note(40, ids=4)
            await service.check()
            engine = open_database(service.service.database_url)
            [done] = await Rebuild(
                service.service.app, service.client.log, engine, service.service.app.projections[:1]
            ).run()
            engine.dispose()
            assert done.events == sum(service.acknowledged.values())
            await service.check()


@pytest.mark.setting("consumer.replay_policy")
async def test_events_come_at_the_pace_at_which_they_were_appended(url: str, app_name: str) -> None:
    pauses = 3
    async with reading(url, app_name, consumer__replay_policy="original") as (_, log, reader):
        for n in range(pauses + 1):
            await fill(log, 1, start=n)
            if n < pauses:
                # time has to pass between the appends, because the replay repeats these pauses
                await asyncio.sleep(0.25)
        loop = asyncio.get_running_loop()
        began, got = loop.time(), 0
        while got <= pauses:
            got += len((await reader.next(100)).commits)
        assert loop.time() - began > 0.25 * pauses * 0.8
        plain = await log.read(0)
        assert len((await plain.next(100)).commits) == pauses + 1  # a rebuild doesn't wait


@pytest.mark.setting("consumer.window", "consumer.heartbeat")
async def test_pull_requests_carry_the_set_window_and_heartbeat(
    url: str, app_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values: dict[str, Any] = {"consumer__window": 7, "consumer__heartbeat": 20.0}
    async with reading(url, app_name, **values) as (connection, log, reader):
        sent: list[bytes] = []
        send = connection.send
        monkeypatch.setattr(connection, "send", lambda frames: (sent.append(frames), send(frames))[1])
        await fill(log, 50)
        got = 0
        async with asyncio.timeout(20):
            while got < 50:
                batch = (await reader.next(100)).commits
                assert len(batch) <= 14
                got += len(batch)
        pulls = [orjson.loads(frame.split(b"\r\n")[1]) for frame in sent if b"MSG.NEXT" in frame]
        assert {pull["batch"] for pull in pulls} == {7}
        assert {pull["idle_heartbeat"] for pull in pulls} == {20_000_000_000}
        assert not reader._broken  # the server refuses heartbeats that are longer than half of a request


@pytest.mark.setting("consumer.heartbeat")
async def test_without_heartbeats_a_new_consumer_is_made(url: str, app_name: str) -> None:
    async with reading(url, app_name, consumer__heartbeat=0.1) as (connection, log, reader):
        await fill(log, 3)
        assert len((await reader.next(10)).commits) == 3
        first = reader.consumer
        for _ in range(10):
            await reader.next(10, timeout=0.1)
        assert reader.consumer == first  # heartbeats arrive, and a quiet stream alone is no reason for a new consumer
        await call_api(connection, f"CONSUMER.DELETE.{app_name}.{first}", {})
        await fill(log, 3, start=3)
        got = 0
        async with asyncio.timeout(10):
            while got < 3:
                got += len((await reader.next(10, timeout=0.1)).commits)
        assert reader.consumer != first


@pytest.mark.setting("consumer.inactive_threshold")
async def test_the_server_removes_the_consumer_of_a_worker_that_is_gone(
    tmp_path: Path, app_name: str, binary: str, wait_until: Wait
) -> None:
    values: dict[str, Any] = {"consumer__heartbeat": 0.1, "consumer__inactive_threshold": 0.4}
    async with server(tmp_path, binary=binary) as nats:
        async with reading(nats.url, app_name, **values) as (connection, log, reader):
            await fill(log, 1)
            await reader.next(10)
            first = reader.consumer
            for _ in range(12):
                await reader.next(10, timeout=0.1)
            assert reader.consumer == first  # a consumer in use is not removed, however quiet it is
            assert len(await consumers(nats.url, app_name)) == 1
            connection._transport._io_writer.transport.abort()  # type: ignore[union-attr]
            await connection.close()

            async def gone() -> bool:
                return not await consumers(nats.url, app_name)

            await wait_until(gone)


@pytest.mark.setting("consumer.backoff")
async def test_the_projections_pause_for_the_set_time_after_each_failure(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wait_until: Wait
) -> None:
    async with running(app_name, tmp_path, nats_url, consumer__backoff="0.011,0.022,0.033") as service:
        await service.note(5)
        await service.check()
        projector = service.service.parts.projector
        rested: list[float] = []
        timeout = asyncio.timeout

        def noted(seconds: float | None) -> asyncio.Timeout:
            if seconds in (0.011, 0.022, 0.033):
                rested.append(seconds)
            return timeout(seconds)

        async def failing(*_given: Any) -> None:
            raise OSError("on purpose")

        claim = Session.claim
        monkeypatch.setattr(asyncio, "timeout", noted)
        monkeypatch.setattr(Session, "claim", failing)
        projector._interrupted.set()
        await wait_until(lambda: len(rested) >= 5)
        assert rested[:5] == [0.011, 0.022, 0.033, 0.033, 0.033]
        monkeypatch.setattr(Session, "claim", claim)
        await service.check()
