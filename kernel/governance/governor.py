"""Rate governance of one worker: it admits commands, paces the projections, and slows both in distress.

Three lanes are adaptive: commands, live projection and rebuilds. Limits by aggregate type and by key are fixed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import msgspec

from kernel.app import App
from kernel.errors import LimitsError, SettingsError
from kernel.governance.limits import Overrides, check, override
from kernel.governance.pace import Pace
from kernel.governance.rates import Keyed, Lane, TokenBucket
from kernel.settings.governance import Limit, Rates
from kernel.telemetry.metrics import RATE_LIMIT, RATE_PRESENT

logger = logging.getLogger("eskernel.governance")
WARN, CRITICAL = 1, 2
"""Levels of the backlog."""
LIVE_WORTH_S, REBUILD_WORTH_S = 0.2, 1.0
"""Seconds of the rate for which a reader waits. A rebuild waits longer: it writes each row once for a whole window."""
NO_LIMIT = float("inf")


@dataclass(frozen=True, slots=True)
class Signals:
    """Measurements of the service since the last tick.

    Attributes:
        loop_lag: longest delay of the event loop in seconds.
        append_latency: duration in seconds of the slowest append, waiting appends included.
        append_errors: share of failed appends.
        commit_latency: duration in seconds of the slowest transaction of the projections, running ones included.
        batch_errors: share of failed transactions of the projections.
        backlog: level of the backlog: 0 ok, 1 warning, 2 critical.
        projecting: True if the projections make progress.
    """

    loop_lag: float = 0.0
    append_latency: float = 0.0
    append_errors: float = 0.0
    commit_latency: float = 0.0
    batch_errors: float = 0.0
    backlog: int = 0
    projecting: bool = True


class Refusal(NamedTuple):
    """The reason for not admitting a command.

    Attributes:
        limit: kind of the limit, for the metrics.
        message: explanation for people.
        retry_after: seconds after which the sender should try again.
    """

    limit: str
    message: str
    retry_after: float


class _Request(msgspec.Struct, forbid_unknown_fields=True):
    """A request on the subject `limits`.

    Attributes:
        at: when the overrides were set, in Unix time.
        overrides: limits to adopt, by name; None to change nothing.
        check: check the overrides, but don't adopt them.
        rebuilt: commits that a rebuild in another process has read since its last request.
    """

    at: float = 0.0
    overrides: dict[str, float | None] | None = None
    check: bool = False
    rebuilt: int = 0


class Governor:
    """The limits of one worker.

    Attributes:
        limiting: True if any limit applies to commands; otherwise `admit` need not be called.
        live, rebuild: pace of the live projection and of rebuilds.
        overrides: limits set at run time.

    Raises:
        SettingsError: the limits don't fit the app.
    """

    def __init__(self, app: App, rates: Rates | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._app, self._settings, self._clock = app, rates or Rates(), clock
        self.rates = self._settings
        if problems := check(self.rates, app):
            raise SettingsError([f"rates.{problem}" for problem in problems])
        now = self._ticked = clock()
        self.lanes = {
            "commands": Lane(self.rates, self.rates.commands, now),
            "live": Lane(self.rates, self.rates.live, now),
            "rebuild": Lane(self.rates, self.rates.rebuild, now),
        }
        self._done = dict.fromkeys(self.lanes, 0)
        self.live = Pace(self.lanes["live"].bucket, "live", LIVE_WORTH_S, clock)
        self.rebuild = Pace(self.lanes["rebuild"].bucket, "rebuild", REBUILD_WORTH_S, clock)
        self.taken = 0
        self.overrides = Overrides()
        self.limiting = False
        self._share = 1.0
        self._types: dict[str, TokenBucket] = {}
        self._keyed: Keyed | None = None
        self._key_failed = False
        self._configure()

    # admission

    def admit(self, aggregate: str, aggregate_id: str, command: object, tenant: str = "") -> Refusal | None:
        """Admit a command, or return its refusal: of several limits, by the limit with the longest wait."""
        now = self._clock()
        limits: list[tuple[str, str, TokenBucket]] = [("commands", "", self.lanes["commands"].bucket)]
        if (bucket := self._types.get(aggregate)) is not None:
            limits.append(("per_aggregate", aggregate, bucket))
        if self._keyed is not None and (key := self._key_of(aggregate, aggregate_id, command, tenant)) is not None:
            limits.append(("per_key", key, self._keyed.get(key, now)))
        longest = 0.0
        refusing = limits[0]
        for limit in limits:
            if (wait := limit[2].wait(1.0, now)) > longest:
                longest, refusing = wait, limit
        if longest:
            kind, name, bucket = refusing
            return Refusal(kind, self._explain(kind, name), bucket.refuse(1.0, longest))
        for _, _, bucket in limits:
            bucket.spend(1.0)
        return None

    def _key_of(self, aggregate: str, aggregate_id: str, command: object, tenant: str) -> str | None:
        if self._app.rate_key is None:
            return tenant or None
        try:
            return self._app.rate_key(aggregate, aggregate_id, command)
        except Exception:
            if not self._key_failed:
                self._key_failed = True
                logger.exception("rate_key failed for %s %s; rates.per_key does not limit it", aggregate, aggregate_id)
            return None

    def _explain(self, kind: str, name: str) -> str:
        if kind == "commands":
            lane = self.lanes["commands"]
            if lane.rate is not None:
                return f"rates.commands: {_rate(lane.present)} in this worker at present: {lane.why}"
            return f"rates.commands: {_rate(self.rates.commands.rate)}"
        if kind == "per_key":
            return f"rates.per_key {name[:100]}: {_rate(self.rates.per_key.rate)}"
        return f"rates.per_aggregate {name}: {_rate(self.rates.per_aggregate[name].rate)}"

    # adaptation

    def tick(self, signals: Signals, share: float | None = None) -> None:
        """Adapt the lanes, about once a second.

        Args:
            share: the part of the app's partitions that this worker holds, if it has changed.
        """
        now = self._clock()
        dt = max(now - self._ticked, 1e-3)
        self._ticked = now
        if share and share != self._share:
            self._share = share
            self._configure()
        distress = self._distress(signals)
        done = {"commands": self.taken, "live": self.live.done, "rebuild": self.rebuild.done}
        for name in ("commands", "rebuild", "live"):
            lane, why = self.lanes[name], distress[name]
            before = lane.rate
            if name == "live" and not self.lanes["rebuild"].lowest:
                why = ""  # the live projection is slowed only when rebuilds are as slow as they may be
            lane.tick(done[name] - self._done[name], why, dt, now)
            if before is None and lane.rate is not None:
                logger.warning("%s slowed to %s: %s", name, _rate(lane.rate), lane.why)
            elif before is not None and lane.rate is None:
                logger.info("%s no longer slowed", name)
        self._done = done
        self._publish()

    def _distress(self, signals: Signals) -> dict[str, str]:
        """Return the reason of the distress for each lane, empty if there is none."""
        rates = self.rates

        def over(what: str, value: float, setting: str) -> str:
            threshold: float = getattr(rates, setting)
            return f"{what} {value:.2g}, above rates.{setting} {threshold:g}" if value > threshold else ""

        lag = over("seconds that the event loop was late:", signals.loop_lag, "loop_lag")
        commands = (
            over("seconds of an append:", signals.append_latency, "append_latency")
            or over("share of appends that failed:", signals.append_errors, "error_rate")
            or lag
        )
        if not commands and signals.backlog >= CRITICAL and signals.projecting:
            commands = "the backlog of the projections is critical"
        live = (
            over("seconds of a batch's transaction:", signals.commit_latency, "commit_latency")
            or over("share of batches that failed:", signals.batch_errors, "error_rate")
            or lag
        )
        rebuild = live or ("the live projections are behind" if signals.backlog >= WARN else "")
        return {"commands": commands, "live": live, "rebuild": rebuild}

    # configuration

    def adopt(self, overrides: Overrides) -> None:
        """Adopt limits that were set at run time, if they are newer. Empty overrides restore the settings.

        Raises:
            LimitsError: the limits are invalid; nothing has changed.
        """
        rates = override(self._settings, overrides.values, self._app)
        if overrides.at <= self.overrides.at:
            return
        self.rates, self.overrides = rates, overrides
        self._configure()
        logger.info("limits set: %s", _words(overrides.values) or "those of the settings")

    def _configure(self) -> None:
        rates, share, now = self.rates, self._share, self._clock()
        # a rebuild is one process for all partitions
        for name, limit, part in (
            ("commands", rates.commands, share), ("live", rates.live, share), ("rebuild", rates.rebuild, 1.0),
        ):  # fmt: skip
            self.lanes[name].configure(rates, limit, part, now)
        types = {}
        for name, limit in rates.per_aggregate.items():
            if limit.rate is not None:
                bucket = types[name] = self._types.get(name) or TokenBucket(now=now)
                bucket.set(limit.rate * share, _part(limit, share), now)
        self._types = types
        if rates.per_key.rate is None:
            self._keyed = None
        elif self._keyed is None:
            self._keyed = Keyed(rates.per_key.rate * share, _part(rates.per_key, share))
        else:
            self._keyed.set(rates.per_key.rate * share, _part(rates.per_key, share), now)
        self._publish()

    def _publish(self) -> None:
        self.limiting = self.lanes["commands"].present is not None or bool(self._types) or self._keyed is not None
        for name, lane in self.lanes.items():
            RATE_PRESENT.labels(lane=name).set(NO_LIMIT if lane.present is None else lane.present)
            limit: Limit = getattr(self.rates, name)
            RATE_LIMIT.labels(lane=name).set(NO_LIMIT if limit.rate is None else limit.rate)

    # reporting and requests

    def show(self) -> dict[str, Any]:
        """Return the limits as JSON data. `present` is this worker's share; all other rates are those of the app."""
        lanes = {
            name: {**getattr(self.rates, name).model_dump(), "present": lane.present, "why": lane.why}
            for name, lane in self.lanes.items()
        }
        types = {f"per_aggregate.{name}": limit.model_dump() for name, limit in self.rates.per_aggregate.items()}
        return {
            "share": self._share,
            "lanes": lanes,
            "fixed": {"per_key": self.rates.per_key.model_dump(), **types},
            "overrides": asdict(self.overrides),
        }

    def answer(self, payload: bytes) -> dict[str, Any]:
        """Carry out a request on the subject `limits`, completely or not at all, and return the answer."""
        try:
            request = msgspec.json.decode(payload or b"{}", type=_Request)
            if request.overrides is not None and request.check:
                override(self._settings, request.overrides, self._app)
            elif request.overrides is not None:
                self.adopt(Overrides(request.at, request.overrides))
        except (LimitsError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            return {"error": str(error)}
        self.rebuild.done += max(0, request.rebuilt)
        return {"limits": self.show()}


def _part(limit: Limit, share: float) -> float | None:
    return None if limit.burst is None else limit.burst * share


def _rate(rate: float | None) -> str:
    return "no limit" if rate is None else f"{rate:.4g}/s"


def _words(values: Mapping[str, float | None]) -> str:
    return ", ".join(
        f"{name.removesuffix('.rate')}={'none' if value is None else f'{value:g}'}" for name, value in values.items()
    )
