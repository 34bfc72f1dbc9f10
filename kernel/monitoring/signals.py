"""How a worker is doing, as the governor wants to know it: collected about once a second from counters."""

from __future__ import annotations

from collections.abc import Callable

from kernel.commands.gateway import CommandGateway
from kernel.governance.governor import Signals
from kernel.log.appender import Appender
from kernel.projector.committer import AWAY
from kernel.projector.live import Projector
from kernel.telemetry.loop_lag import LoopLag
from kernel.telemetry.metrics import LOOP_LAG


class SignalCollector:
    """Turns the counters of a worker's parts into the signals that the governor goes by.

    Args:
        loop_lag: how late the event loop is.
        backlog: level of the projections' backlog: 0 none, 1 warning, 2 critical.
    """

    def __init__(
        self,
        gateway: CommandGateway,
        appender: Appender,
        projector: Projector,
        loop_lag: LoopLag,
        backlog: Callable[[], int],
    ) -> None:
        self._gateway, self._appender, self._projector, self._backlog = gateway, appender, projector, backlog
        self._lag = loop_lag
        self._appends = self._batches = (0, 0)

    def collect(self) -> Signals:
        """Return how it was since the last call."""
        gateway, projector = self._gateway, self._projector
        appends, batches = (gateway.appended, gateway.unappended), projector.committer.batches
        lag = self._lag.worst("governor")
        LOOP_LAG.set(lag)
        away = projector.state == AWAY
        signals = Signals(
            loop_lag=lag,
            append_latency=max(gateway.slowest_append, self._appender.waiting_for),
            append_errors=_share(self._appends, appends),
            commit_latency=max(projector.committer.slowest, projector.committer.lasting),
            # while it can't even read its checkpoints there is no batch that could fail
            batch_errors=1.0 if away else _share(self._batches, batches),
            backlog=self._backlog(),
            projecting=projector.state == "running",
        )
        gateway.slowest_append = projector.committer.slowest = 0.0
        self._appends, self._batches = appends, batches
        return signals


def _share(before: tuple[int, int], now: tuple[int, int]) -> float:
    """Return the share of failures among what has happened: pairs of successes and failures."""
    ok, failed = now[0] - before[0], now[1] - before[1]
    return failed / (ok + failed) if failed else 0.0
