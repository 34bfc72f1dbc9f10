"""A service inside of an asyncio program: it runs, it leaves the process alone, and it closes what it opened."""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import threading
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from kernel import Client, Service, assembly
from kernel.errors import AlreadyRunning
from kernel.transport.dial import dial
from projections import SchemaError
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for


def process() -> dict[str, object]:
    """Return what a library must not change of the process that it runs in."""
    return {
        "collector": (gc.get_freeze_count(), gc.get_threshold(), gc.isenabled()),
        "path": list(sys.path),
        "finders": list(sys.meta_path),
        "handlers": list(logging.getLogger().handlers),
        "levels": logging.getLogger("eskernel").level,
        "signals": [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)],
        "hook": sys.excepthook,
    }


async def test_a_service_runs_as_a_block_and_leaves_the_process_as_it_was(app_name: str, tmp_path: Path) -> None:
    before = process()
    settings = settings_for(tmp_path)
    async with Service(notebooks(app_name), settings) as service:
        async with await Client.connect(service.app, settings) as client:
            receipt = await client.execute(Notebook, "n", Note("a"))
            assert await client.query("select notes from pages", after=receipt) == [{"notes": 1}]
        assert process() == before
    assert service.stopped.is_set()
    assert service.failure == ""
    assert process() == before


async def test_a_service_leaves_no_task_and_no_thread_behind(app_name: str, tmp_path: Path) -> None:
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    async with Service(notebooks(app_name), settings_for(tmp_path)):
        pass
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - tasks:
            await asyncio.sleep(0)
        # threads that were shut down without being waited for end by themselves
        while left := [thread for thread in set(threading.enumerate()) - threads if "eskernel" in thread.name]:
            await asyncio.to_thread(left[0].join, 0.1)


async def test_a_part_of_a_service_that_was_not_started_is_refused_in_a_sentence(app_name: str, tmp_path: Path) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path))
    assert (service.partitions, service.nats_url, service.durability) == ([], "", "")
    with pytest.raises(RuntimeError, match="has not been started"):
        service.status()


async def test_half_a_start_is_closed_whole(app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever fails at the end of a start: the next start finds nothing in its way."""
    settings = settings_for(tmp_path)
    service = Service(notebooks(app_name), settings)

    async def fail() -> None:
        raise OSError("the address is taken")

    tasks = asyncio.all_tasks()
    monkeypatch.setattr(service.http, "start", fail)
    with pytest.raises(OSError, match="the address is taken"):
        await service.start()
    assert service.stopped.is_set()
    await service.stop()  # harmless
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - tasks:
            await asyncio.sleep(0)
    async with Service(notebooks(app_name), settings) as again:
        assert len(again.partitions) == 64


async def test_a_start_that_fails_at_any_step_closes_what_it_had_opened(
    app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path)
    for step in ("_connect", "open_log", "_join_leases", "_prepare_database", "_assemble"):
        with monkeypatch.context() as patched:

            def fail(*_given: object, **_options: object) -> None:
                raise SchemaError("on purpose")

            patched.setattr(assembly, step, fail)
            with pytest.raises(SchemaError, match="on purpose"):
                await Service(notebooks(app_name), settings).start()
    async with Service(notebooks(app_name), settings) as service:
        with pytest.raises(AlreadyRunning):
            await Service(notebooks(app_name), settings).start()
        assert len(service.partitions) == 64


async def test_a_block_that_is_cancelled_is_closed_whole(app_name: str, tmp_path: Path) -> None:
    """As Ctrl-C does under `asyncio.run`: the stop runs in a task that is being cancelled."""
    settings = settings_for(tmp_path)
    tasks, running = asyncio.all_tasks(), asyncio.Event()

    async def serve() -> None:
        async with Service(notebooks(app_name), settings):
            running.set()
            await asyncio.Event().wait()

    serving = asyncio.create_task(serve())
    await running.wait()
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - tasks:
            await asyncio.sleep(0)
    async with Service(notebooks(app_name), settings) as again:
        assert len(again.partitions) == 64


async def test_a_start_that_is_cancelled_behind_any_step_leaves_nothing_running(
    app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_for(tmp_path)
    tasks = asyncio.all_tasks()
    for step in ("_find_server", "_connect", "open_log", "_join_leases", "_prepare_database"):
        work = getattr(assembly, step)

        async def cancel(
            *given: object, work: Callable[..., Coroutine[Any, Any, object]] = work, **options: object
        ) -> object:
            result = await work(*given, **options)
            task = asyncio.current_task()
            assert task is not None
            task.cancel()
            return result

        with monkeypatch.context() as patched:
            patched.setattr(assembly, step, cancel)
            starting = asyncio.create_task(Service(notebooks(app_name), settings).start())
            await asyncio.wait({starting})
            assert starting.cancelled(), step
        async with asyncio.timeout(10):
            while left := asyncio.all_tasks() - tasks:
                await asyncio.wait(left, timeout=0.1)
    async with Service(notebooks(app_name), settings) as service:
        assert len(service.partitions) == 64


async def test_a_connection_that_is_given_up_while_it_is_made_is_closed(tmp_path: Path) -> None:
    async def accept(_reader: asyncio.StreamReader, _writer: asyncio.StreamWriter) -> None:
        accepted.set()  # and says nothing, as no NATS server does

    accepted = asyncio.Event()
    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    tasks = asyncio.all_tasks()
    dialling = asyncio.create_task(dial(settings_for(tmp_path, nats=url), name="test"))
    await accepted.wait()
    dialling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await dialling
    async with asyncio.timeout(10):
        while left := asyncio.all_tasks() - tasks:
            await asyncio.wait(left, timeout=0.1)
    server.close()
