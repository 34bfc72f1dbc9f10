"""Aggregates with long histories are loaded from snapshots, and every doubt leads to the history."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from aggregates.context import uuid7
from aggregates.snapshot import SnapshotCodec
from kernel.log.base import Stored
from kernel.log.snapshots import SnapshotStore, snapshots_of
from kernel.transport.jetstream_api import call_api
from tests.apps import Note, Notebook
from tests.failing import Running, metric, running

EVERY = 10


@asynccontextmanager
async def service(
    app_name: str, folder: Path, url: str, **more: Any
) -> AsyncIterator[tuple[Running, list[tuple[str, int]]]]:
    """Run a service, and note which histories it reads, and from which sequence on."""
    more = {"snapshots__every": EVERY, "snapshots__verify": 0.0, **more}
    async with running(app_name, folder, url, **more) as made:
        reads: list[tuple[str, int]] = []
        log = made.service.parts.log
        read_subject = log.read_subject

        async def read(subject: str, after: int = 0, known: Sequence[Stored] = ()) -> Any:
            reads.append((subject.rsplit(".", 1)[-1], after))
            return await read_subject(subject, after, known)

        log.read_subject = read  # type: ignore[method-assign]
        yield made, reads


def used(outcome: str) -> float:
    return metric("eskernel_snapshots_used_total", outcome=outcome)


def taken() -> float:
    return metric("eskernel_snapshots_taken_total", outcome="ok")


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def fill(made: Running, commands: int, name: str = "n") -> list[str]:
    """Send commands one after the other, and wait until a snapshot is stored; return their ids."""
    before, ids = taken(), [uuid7() for _ in range(commands)]
    for command_id in ids:
        await made.client.execute(Notebook, name, Note("a"), command_id=command_id)
    if commands >= EVERY:
        await until(lambda: taken() > before)
        store = made.service.parts.snapshots
        assert store is not None
        await until(lambda: store.written > 0)
    return ids


async def test_after_a_restart_only_what_came_after_the_snapshot_is_read(
    app_name: str, tmp_path: Path, nats_url: str
) -> None:
    async with service(app_name, tmp_path, nats_url) as (made, _):
        ids = await fill(made, 25)
    loaded = used("ok")
    async with service(app_name, tmp_path, nats_url) as (made, reads):
        receipt = await made.client.execute(Notebook, "n", Note("b"))
        assert receipt.version == 26
        ((_, after),) = reads
        assert after > 0
        assert used("ok") == loaded + 1
        # every command still takes effect once, the first and the last
        for place in (0, 24):
            again = await made.client.execute(Notebook, "n", Note("a"), command_id=ids[place])
            assert (again.version, again.duplicate) == (place + 1, True)
        rows = await made.client.query("select total from pages", after=[receipt])
        assert rows == [{"total": 26}]


async def test_ids_older_than_the_snapshot_knows_are_searched_for_once(
    app_name: str, tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aggregates.seen.LATEST", 4)
    async with service(app_name, tmp_path, nats_url) as (made, _):
        ids = await fill(made, 30)
    async with service(app_name, tmp_path, nats_url) as (made, reads):
        for command_id in (ids[0], ids[1], ids[29], uuid7()):
            await made.client.execute(Notebook, "n", Note("a"), command_id=command_id)
        assert (await made.client.execute(Notebook, "n", Note("a"), command_id=ids[2])).duplicate
        # the first search has told all ids; a repeated command is searched for to have its receipt
        early = await made.client.execute(Notebook, "n", Note("new"), command_id=ids[0][:-1] + "/")
        assert (early.version, early.duplicate) == (32, False)
        assert [after for _, after in reads].count(0) == 3


async def test_a_snapshot_of_other_code_is_never_loaded(
    app_name: str, tmp_path: Path, nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with service(app_name, tmp_path, nats_url) as (made, _):
        await fill(made, 12)
    monkeypatch.setattr("tests.apps.Notebook.noted.__code__", (lambda self, event: None).__code__)
    before = used("other-code")
    async with service(app_name, tmp_path, nats_url) as (made, reads):
        await made.client.execute(Notebook, "n", Note("b"))
        assert [after for _, after in reads] == [0]
        assert used("other-code") == before + 1


@pytest.mark.parametrize("differs", ["aggregate", "commit"])
async def test_a_snapshot_that_does_not_fit_the_log_is_not_used(
    app_name: str, tmp_path: Path, nats_url: str, differs: str
) -> None:
    async with service(app_name, tmp_path, nats_url) as (made, _):
        await fill(made, 12, "one")
        await fill(made, 12, "two")
        store = made.service.parts.snapshots
        assert store is not None
        subjects = [made.service.parts.log.subjects.address("Notebook", name).subject for name in ("one", "two")]
        if differs == "aggregate":
            other = (await store.read(subjects[1]) or b"").replace(b"two", b"one")
        else:
            codec = SnapshotCodec(made.service.app.types["Notebook"])
            restored = codec.restore(await store.read(subjects[0]) or b"", "one")
            assert restored is not None
            other = codec.take(restored.cell, b"another commit") or b""
        before = store.written
        store.write(subjects[0], other)
        await until(lambda: store.written > before)
    unfit = used("other-log")
    async with service(app_name, tmp_path, nats_url) as (made, reads):
        assert (await made.client.execute(Notebook, "one", Note("b"))).version == 13
        assert [after for _, after in reads][-1] == 0
        assert used("other-log") == unfit + 1


async def test_without_the_stream_of_snapshots_everything_goes_on(
    app_name: str, tmp_path: Path, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with service(app_name, tmp_path, nats_url) as (made, _):
        await fill(made, 12)
        stream = made.service.parts.log.stream
        await call_api(made.service.parts.connection, f"STREAM.DELETE.{snapshots_of(stream)}", None)
        for _ in range(2 * EVERY):
            await made.client.execute(Notebook, "n", Note("a"))
        await until(lambda: "snapshots are not stored" in caplog.text)
        assert (await made.client.execute(Notebook, "m", Note("a"))).version == 1
    async with service(app_name, tmp_path, nats_url) as (made, _):
        assert (await made.client.execute(Notebook, "n", Note("a"))).version == 33


@pytest.mark.setting("snapshots.verify")
async def test_a_sampled_snapshot_that_differs_from_its_history_ends_their_use(
    app_name: str, tmp_path: Path, nats_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with service(app_name, tmp_path, nats_url) as (made, _):
        await fill(made, 12)
        store = made.service.parts.snapshots
        assert store is not None
        subject = made.service.parts.log.subjects.address("Notebook", "n").subject
        data = await store.read(subject)
        assert data is not None
        before = store.written
        assert data.count(b"\xa5total\x0a") == 1
        store.write(subject, data.replace(b"\xa5total\x0a", b"\xa5total\x63"))
        await until(lambda: store.written > before)
    wrong = used("wrong")
    async with service(app_name, tmp_path, nats_url, snapshots__verify=1.0) as (made, reads):
        receipt = await made.client.execute(Notebook, "n", Note("b"))
        assert used("wrong") == wrong + 1
        assert "differs from its history at version 10" in caplog.text
        assert await made.client.query("select total from pages", after=[receipt]) == [{"total": 13}]
        assert [after for _, after in reads] == [0]


@pytest.mark.setting("snapshots.every")
async def test_with_every_0_there_are_none(app_name: str, tmp_path: Path, nats_url: str) -> None:
    async with service(app_name, tmp_path, nats_url, snapshots__every=0) as (made, _):
        before = taken()
        for _ in range(2 * EVERY):
            await made.client.execute(Notebook, "n", Note("a"))
        assert taken() == before
        log = made.service.parts.log
        store = SnapshotStore(made.service.parts.connection, log.stream, log.subjects)
        assert await store.info() is None
