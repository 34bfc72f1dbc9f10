"""Telling the app's own callbacks what changed: backlog, health, pressure. None of them can harm the service."""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

from kernel.alerts import Alert, OnAlert
from kernel.telemetry.metrics import ALERTS_DROPPED, ALERTS_SENT

logger = logging.getLogger("eskernel.monitoring")
LIMIT_S = 10.0
"""For one call of an async callback; then it is cancelled. A sync one can't be: what comes waits behind it."""
WAITING = 1_000
"""Alerts that wait for one callback; of more, the oldest are dropped."""


class _Listener:
    """One callback with its thread, made when there is something to tell."""

    def __init__(self, callback: OnAlert, limit: float) -> None:
        self._callback, self._limit = callback, limit
        self._name = getattr(callback, "__qualname__", repr(callback))
        self._waiting: deque[Alert | None] = deque()
        self._more = threading.Condition()
        self._thread: threading.Thread | None = None
        self._dropping = False

    def tell(self, alert: Alert) -> None:
        """Hand over an alert. Never waits."""
        with self._more:
            if len(self._waiting) >= WAITING:
                self._waiting.popleft()
                ALERTS_DROPPED.inc()
                if not self._dropping:
                    logger.error("on_alert callback %s does not keep up; alerts are dropped", self._name)
                self._dropping = True
            self._waiting.append(alert)
            self._more.notify()
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="eskernel-alerts", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """End the thread when it has done what it is at."""
        with self._more:
            self._waiting.clear()
            self._waiting.append(None)
            self._more.notify()

    def _run(self) -> None:
        while True:
            with self._more:
                while not self._waiting:
                    self._dropping = False
                    self._more.wait()
                alert = self._waiting.popleft()
            if alert is None:
                return
            # later than an async one is cancelled, which has its own line
            late = threading.Timer(1.5 * self._limit, self._complain)
            late.daemon = True
            late.start()
            try:
                result = self._callback(alert)
                if inspect.isawaitable(result):
                    asyncio.run(self._finish(result))
            except BaseException as error:  # a callback that exits must not take its successors' thread along
                logger.error("on_alert callback %s failed: %s: %s", self._name, type(error).__name__, error)
            finally:
                late.cancel()

    def _complain(self) -> None:
        logger.error("on_alert callback %s has not returned after %g s", self._name, self._limit)

    async def _finish(self, result: Any) -> None:
        async with asyncio.timeout(self._limit):
            await result


class Alerts:
    """Hands alerts to callbacks.

    Args:
        limit: seconds for one call.
    """

    def __init__(self, callbacks: Sequence[OnAlert], worker: str = "", limit: float = LIMIT_S) -> None:
        self._listeners = [_Listener(one, limit) for one in callbacks]
        self.worker = worker
        self.told = 0

    def tell(self, alert: Alert) -> None:
        """Count an alert and hand it to every callback. Never waits and never raises."""
        self.told += 1
        ALERTS_SENT.labels(kind=alert.kind, level=alert.after).inc()
        for listener in self._listeners:
            listener.tell(alert)

    def close(self) -> None:
        """End; what the callbacks are at is not waited for, and what waits for them is dropped."""
        for listener in self._listeners:
            listener.close()
