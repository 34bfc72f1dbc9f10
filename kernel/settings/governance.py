"""Settings of admission, passivation, backlog and rates."""

from __future__ import annotations

from typing import Annotated, Self

from annotated_types import Ge, Gt, Le
from pydantic import ByteSize, Field, model_validator

from kernel.settings.fields import MIB, Count, Seconds, Section


class Passivation(Section):
    """Eviction of aggregates from memory. Idle aggregates are evicted, and beyond the limits the least recently used
    ones. An aggregate with work in progress stays."""

    idle: Annotated[float, Ge(0)] = 300.0
    """Time in seconds without use after which an aggregate is evicted."""
    count: Count = 50_000
    """Largest number of aggregates in memory, in each worker."""
    memory: Annotated[ByteSize, Ge(0)] = Field(default=ByteSize(512 * MIB))
    """Largest measured size of the aggregates' states and rows, in each worker; 0: no limit."""


class Snapshots(Section):
    """Snapshots of aggregates with long histories, in a stream beside the log. They are a cache: used only with the
    code that has made them, and never needed."""

    every: Annotated[int, Ge(0)] = 100
    """Number of events of an aggregate after which a snapshot is taken; 0: none are taken, and none are used."""
    verify: Annotated[float, Ge(0), Le(1)] = 0.01
    """Share of the loaded snapshots that are compared with the aggregate's whole history, at most one in a second; 1:
    all of them."""


class Commands(Section):
    """Limits for the commands in progress."""

    pending: Count = 10_000
    """Largest number of commands in progress, in each worker. Further commands are refused as overloaded, with a time
    to retry after."""
    pending_per_aggregate: Count = 1_000
    """Largest number of commands in progress for one aggregate, so that a busy aggregate does not block the others."""


class Policies(Section):
    """Policies and effects: what follows from events."""

    in_flight: Count = 256
    """Largest number of events of one policy that are worked on at once in each worker, each of another aggregate.
    An effect has its own `concurrency`."""
    depth: Annotated[int, Ge(1), Le(1_000)] = 16
    """How many policies in a row may lead to a command, each at once after the one before. Another one is taken for a
    loop, and parks the aggregate. What a timer sends a second or more after its event begins anew."""
    retention: Seconds = 2_592_000.0
    """Seconds after which a rejected command of a policy is forgotten."""


class Backlog(Section):
    """Thresholds of the backlog's levels, for each partition of each projection."""

    interval: Seconds = 1.0
    """Interval in seconds between measurements."""
    count_warn: Count = 10_000
    """Number of commits behind, from which the level is `warn`."""
    count_critical: Count = 100_000
    """Number of commits behind, from which the level is `critical`."""
    age_warn: Seconds = 10.0
    """Age in seconds of the oldest commit that is not projected, from which the level is `warn`."""
    age_critical: Seconds = 60.0
    """Age in seconds of the oldest commit that is not projected, from which the level is `critical`."""
    hysteresis: Annotated[float, Gt(0), Le(1)] = 0.5
    """Share of a threshold: a level ends only when the value falls below this share of its threshold."""
    min_duration: Annotated[float, Ge(0)] = 3.0
    """Time in seconds for which a new level must last before it is reported."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.count_warn > self.count_critical:
            raise ValueError("backlog.count_warn is above backlog.count_critical")
        if self.age_warn > self.age_critical:
            raise ValueError("backlog.age_warn is above backlog.age_critical")
        return self


class Limit(Section):
    """A token bucket."""

    rate: Annotated[float, Gt(0)] | None = None
    """Largest number in a second, on average; no limit unless set."""
    burst: Annotated[float, Ge(1)] | None = None
    """Largest number at once; as many as in one second unless set."""


class Rates(Section):
    """Rate limits of the app. Each worker applies its share, which is its share of the partitions. `eskernel limits`
    changes them while the service runs."""

    commands: Limit = Limit()
    """Commands of the app."""
    per_aggregate: dict[str, Limit] = Field(default_factory=dict)
    """Commands of an aggregate type, by the type's name."""
    per_key: Limit = Limit()
    """Commands of one key, for example a tenant. The app's `rate_key` returns the key of a command. Without it the
    key is the tenant that the command's sender names."""
    live: Limit = Limit()
    """Commits projected live."""
    rebuild: Limit = Limit()
    """Commits replayed by rebuilds."""
    adaptive: bool = True
    """Adapt the rates to the load: multiply them by `decrease` in distress, and raise them by `increase` afterwards."""
    minimum: Annotated[float, Gt(0)] = 50.0
    """Lowest adaptive rate, per second."""
    decrease: Annotated[float, Gt(0), Le(0.95)] = 0.7
    """Factor by which an adaptive rate is multiplied in each second of distress."""
    increase: Annotated[float, Gt(0), Le(1)] = 0.05
    """Share of the highest throughput seen, by which an adaptive rate grows in each second without distress."""
    commit_latency: Seconds = 3.0
    """Duration in seconds of a batch's transaction, beyond which the projections are in distress."""
    append_latency: Seconds = 1.0
    """Duration in seconds of an append, beyond which the commands are in distress."""
    loop_lag: Seconds = 0.5
    """Delay in seconds of the event loop, beyond which commands and projections are in distress."""
    error_rate: Annotated[float, Gt(0), Le(1)] = 0.1
    """Share of failed appends, beyond which the commands are in distress; share of failed batches, beyond which the
    projections are."""
