"""Names what blocks the event loop: a thread looks at the loop's stack while the loop is late.

While the loop turns, the thread compares two numbers ten times a second. A command or an event pays nothing for it.
"""

from __future__ import annotations

import inspect
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any, NamedTuple

from kernel.app import App
from kernel.telemetry.loop_lag import LoopLag

logger = logging.getLogger("eskernel.monitoring")
SAMPLE_S = 0.1
NOTICE_S = 0.15
"""A loop that is late by less is not looked at."""
WARN_S = 2.0
"""A loop that is blocked for longer is logged while it is: what blocks it may never end."""
_OURS = ("kernel", "aggregates", "projections")


class Blocked(NamedTuple):
    """What blocked the loop.

    Attributes:
        what: the handler or function, with file and line.
        seconds: for how long the loop was late.
    """

    what: str
    seconds: float

    def __str__(self) -> str:
        return f"{self.what} ran for {self.seconds:.1f} s"


class Watchdog:
    """Watches the loop of the thread that starts it.

    Args:
        app: names its handlers.
        loop_lag: how late the loop is.
    """

    def __init__(self, app: App, loop_lag: LoopLag) -> None:
        self._names = dict(_handlers(app))
        self._loop_lag = loop_lag
        self._loop_thread = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._seen: Counter[str] = Counter()
        self._since = 0.0
        self._warned = False
        self._worst: Blocked | None = None

    def start(self) -> None:
        """Start watching this thread's loop."""
        self._loop_thread = threading.get_ident()
        self._thread = threading.Thread(target=self._run, name="eskernel-watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Stop watching."""
        self._ended.set()

    def worst(self) -> Blocked | None:
        """Return what blocked the loop longest since the last call, if anything did."""
        with self._lock:
            worst, self._worst = self._worst, None
            present = self._present()
        if present is not None and (worst is None or present.seconds > worst.seconds):
            return present
        return worst

    def _run(self) -> None:
        while not self._ended.wait(SAMPLE_S):
            with self._lock:
                self._sample()

    def _sample(self) -> None:
        overdue = self._loop_lag.overdue
        if overdue < NOTICE_S:
            if self._seen:
                self._conclude()
            return
        frame = sys._current_frames().get(self._loop_thread)
        if frame is None:
            return
        now = time.monotonic()
        self._since = now - overdue
        self._seen[self._name(frame)] += 1
        if overdue >= WARN_S and not self._warned and (present := self._present()):
            self._warned = True
            logger.warning("the event loop is blocked; %s so far", present)

    def _present(self) -> Blocked | None:
        ranked = self._seen.most_common(1)
        return Blocked(ranked[0][0], time.monotonic() - self._since) if ranked else None

    def _conclude(self) -> None:
        present = self._present()
        if present is not None and (self._worst is None or present.seconds > self._worst.seconds):
            self._worst = present
        self._seen = Counter()
        self._warned = False

    def _name(self, frame: FrameType) -> str:
        """Return the handler that runs; without one, what the kernel, or the loop, has called."""
        stack = _stack(frame)
        for called in stack:
            if known := self._names.get(called.f_code):
                return f"{known} ({_where(called)})"
        turns = [place for place, called in enumerate(stack) if called.f_globals.get("__name__") == "asyncio.events"]
        stack = stack[turns[-1] + 1 if turns else 0 :] or stack
        ours = [place for place, called in enumerate(stack) if _package(called) in _OURS]
        below = stack[ours[-1] + 1 if ours else 0 :]
        called = below[0] if below else stack[-1]
        return f"{called.f_globals.get('__name__', '?')}.{called.f_code.co_qualname} ({_where(called)})"


def _stack(frame: FrameType | None) -> list[FrameType]:
    """Return the frames, the outermost first."""
    found: list[FrameType] = []
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found[::-1]


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).split(".", maxsplit=1)[0]


def _where(frame: FrameType) -> str:
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"


def _handlers(app: App) -> Iterator[tuple[CodeType, str]]:
    """Yield the code of everything that the app declares, with a name for people."""
    for declared in app.types.values():
        yield from _methods(declared.cls, f"aggregate {declared.name}")
        for message in (*declared.commands.values(), *declared.event_types):
            yield from _methods(message, "message")
        for command, handler in declared.handlers.items():
            for code in _codes(handler.function):
                yield code, f"aggregate {declared.name}, the handler of {command.__name__}"
        for event, applier in declared.appliers.items():
            for code in _codes(applier):
                yield code, f"aggregate {declared.name}, the applier of {event.__name__}"
    for projection in app.projections:
        yield from _methods(type(projection.instance), f"projection {projection.name}")


def _methods(cls: type, of: str) -> Iterator[tuple[CodeType, str]]:
    for base in reversed(cls.__mro__):
        if base.__module__.split(".", maxsplit=1)[0] in (*_OURS, "builtins"):
            continue
        for name, value in vars(base).items():
            for code in _codes(value):
                yield code, f"{of}, {base.__name__}.{name}"


def _codes(function: Any) -> Iterator[CodeType]:
    """Yield the code of a function and of the functions that it wraps."""
    function = getattr(function, "__func__", function)
    while inspect.isfunction(function):
        yield function.__code__
        function = getattr(function, "__wrapped__", None)
