"""Sends alerts to the app's callbacks. A callback that fails or hangs does not affect the service."""

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
"""Time limit in seconds for one call. An async callback is then cancelled; later alerts wait for a sync callback."""
WAITING = 1_000
"""Largest number of alerts that wait for one callback. Beyond it the oldest alerts are dropped."""


class _Listener:
    """One callback with its thread, which starts at the first alert."""

    def __init__(self, callback: OnAlert, limit: float) -> None:
        self._callback, self._limit = callback, limit
        self._name = getattr(callback, "__qualname__", repr(callback))
        self._waiting: deque[Alert | None] = deque()
        self._more = threading.Condition()
        self._thread: threading.Thread | None = None
        self._dropping = False

    def send(self, alert: Alert) -> None:
        """Queue an alert for the callback. It never waits."""
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
        """End the thread after the current call, and drop the waiting alerts."""
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
            # later than the cancellation of an async callback, which is logged already
            late = threading.Timer(1.5 * self._limit, self._complain)
            late.daemon = True
            late.start()
            try:
                result = self._callback(alert)
                if inspect.isawaitable(result):
                    asyncio.run(self._finish(result))
            except BaseException as error:  # a callback that calls sys.exit must not end the thread
                logger.error("on_alert callback %s failed: %s: %s", self._name, type(error).__name__, error)
            finally:
                late.cancel()

    def _complain(self) -> None:
        logger.error("on_alert callback %s has not returned after %g s", self._name, self._limit)

    async def _finish(self, result: Any) -> None:
        async with asyncio.timeout(self._limit):
            await result


class Alerts:
    """Sends alerts to callbacks.

    Args:
        worker: name of this worker.
        limit: time limit in seconds for one call.

    Attributes:
        sent: number of alerts.
    """

    def __init__(self, callbacks: Sequence[OnAlert], worker: str = "", limit: float = LIMIT_S) -> None:
        self._listeners = [_Listener(callback, limit) for callback in callbacks]
        self.worker = worker
        self.sent = 0

    def send(self, alert: Alert) -> None:
        """Count an alert and queue it for every callback. It never waits and never raises."""
        self.sent += 1
        ALERTS_SENT.labels(kind=alert.kind, level=alert.after).inc()
        for listener in self._listeners:
            listener.send(alert)

    def close(self) -> None:
        """Drop the waiting alerts and end the threads, without waiting for running callbacks."""
        for listener in self._listeners:
            listener.close()
