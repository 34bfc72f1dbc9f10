"""A worker process: `python -P -m kernel.workers.worker NUMBER`, started by `eskernel run --workers N` alone.

Its supervisor writes one line to its standard input, what to run, and keeps the pipe open. When the pipe closes, the
supervisor is gone, and the worker stops. The worker writes a line of JSON each second: its loop turns, and how it is.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from pathlib import Path
from typing import Any

import orjson

from aggregates import DeclarationError
from kernel.app import load_app
from kernel.errors import AppNotFound
from kernel.packages import enter
from kernel.runtime.memory import settle_memory
from kernel.runtime.scheduler import Scheduler
from kernel.service import Service
from kernel.settings import Settings
from kernel.settings.sources import written
from kernel.telemetry.logging import set_up

REFUSED = 4
"""Exit code of a worker that could not start, and would not start the next time either."""
GAVE_UP = 5
"""Exit code of a worker that stopped by itself for a reason that a new start does not remove: its stream is gone."""
BEAT_S = 1.0


def describe(spec: str, directory: str, settings: Settings) -> bytes:
    """Return the line that tells a worker what to run."""
    return orjson.dumps({"spec": spec, "directory": directory, "settings": written(settings)})


class Parent:
    """The way to the parent: what was standard output, which the app's own prints no longer reach."""

    def __init__(self) -> None:
        self._out = os.dup(1)
        os.dup2(2, 1)

    def send(self, **what: Any) -> None:
        """Send one line."""
        try:
            os.write(self._out, orjson.dumps(what) + b"\n")
        except BrokenPipeError:
            pass  # it is gone; standard input says so too

    def refuse(self, error: BaseException) -> None:
        """Say why this worker can't start."""
        text = str(getattr(error, "orig", error)).strip()  # of a database: without the statement
        self.send(failed=text or type(error).__name__, kinds=[kind.__name__ for kind in type(error).__mro__])


async def _work(number: int, order: dict[str, Any], settings: Settings, parent: Parent) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def signalled() -> None:
        if stop.is_set():
            os._exit(1)
        stop.set()

    loop.add_signal_handler(signal.SIGTERM, signalled)
    loop.add_reader(sys.stdin.fileno(), lambda: None if os.read(0, 4096) else _orphaned(stop))
    try:
        app = load_app(order["spec"])
    except (AppNotFound, DeclarationError) as problem:
        parent.refuse(problem)
        return REFUSED
    set_up(settings.logging, app.name, number)
    service = Service(app, settings, order["spec"], number=number)

    def beat() -> None:
        parent.send(
            worker=service.worker,
            http=service.http.url,
            ready=service.health.ready,
            started=bool(service.http.url),
            durability=service.durability,
            partitions=service.partitions,
            health=service.health.report()["components"],
        )

    beats = Scheduler()
    beats.every(BEAT_S, beat)
    beats.start()
    starting = asyncio.ensure_future(service.start())
    waiting = [asyncio.ensure_future(event.wait()) for event in (stop, service.stopped)]
    # a start that fails sets `stopped` before it has closed what it had opened: its own end says why
    await asyncio.wait([starting, waiting[0]], return_when=asyncio.FIRST_COMPLETED)
    if not starting.done():
        starting.cancel()
        await asyncio.wait({starting})
        return 0
    if (error := starting.exception()) is not None:
        parent.refuse(error)
        return REFUSED
    settle_memory()
    beat()
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    await service.stop()
    beats.stop()
    if service.failure:
        parent.send(failed=service.failure)
    return GAVE_UP if service.failure else 0


def _orphaned(stop: asyncio.Event) -> None:
    asyncio.get_running_loop().remove_reader(0)
    stop.set()


def main() -> None:
    """Run one worker until its supervisor stops it."""
    number = int(sys.argv[1])
    parent = Parent()
    # unbuffered: what comes later, the end, is for the loop to notice
    with os.fdopen(0, "rb", buffering=0, closefd=False) as told:
        order = orjson.loads(told.readline())
    settings = Settings.model_validate(order["settings"])
    set_up(settings.logging, worker=number)
    enter(Path(order["directory"]))
    sys.exit(asyncio.run(_work(number, order, settings, parent)))


if __name__ == "__main__":
    main()
