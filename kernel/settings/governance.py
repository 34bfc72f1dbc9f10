"""Settings of admission, passivation, backlog and rates."""

from __future__ import annotations

from typing import Annotated, Self

from annotated_types import Ge, Gt, Le
from pydantic import ByteSize, Field, model_validator

from kernel.settings.fields import MIB, Count, Seconds, Section


class Passivation(Section):
    """When live aggregates go. Only those go that nobody waits for; the least recently used first."""

    idle: Annotated[float, Ge(0)] = 300.0
    """Seconds without use."""
    count: Count = 50_000
    """Aggregates that stay live, in each worker."""
    memory: Annotated[ByteSize, Ge(0)] = Field(default=ByteSize(512 * MIB))
    """Bytes of their states and rows, as measured, in each worker; 0 is no limit."""


class Commands(Section):
    """What is admitted."""

    pending: Count = 10_000
    """Commands under way in each worker; more are refused as overloaded, with a time to retry after."""
    pending_per_aggregate: Count = 1_000
    """Commands under way for one aggregate: a hot one must not take all there is."""


class Backlog(Section):
    """When projections are said to be behind, for each partition and projection."""

    interval: Seconds = 1.0
    """Between looks."""
    count_warn: Count = 10_000
    """Commits behind."""
    count_critical: Count = 100_000
    """Commits behind."""
    age_warn: Seconds = 10.0
    """Age of the oldest commit that is not projected."""
    age_critical: Seconds = 60.0
    """Age of the oldest commit that is not projected."""
    hysteresis: Annotated[float, Gt(0), Le(1)] = 0.5
    """A level is left below this share of its threshold."""
    min_duration: Annotated[float, Ge(0)] = 3.0
    """A change of level must hold for so long before it counts."""

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
    """A second; no limit unless set."""
    burst: Annotated[float, Ge(1)] | None = None
    """How much may come at once; one second's worth unless set."""


class Rates(Section):
    """How fast work is let in. Limits are of the app: each worker takes the share of the partitions that it holds."""

    commands: Limit = Limit()
    """Commands of the app."""
    per_aggregate: dict[str, Limit] = Field(default_factory=dict)
    """Commands of an aggregate type, by its name."""
    per_key: Limit = Limit()
    """Commands of one key, as the app's `rate_key` gives it: a tenant, for instance."""
    live: Limit = Limit()
    """Commits projected live."""
    rebuild: Limit = Limit()
    """Commits replayed by rebuilds."""
    adaptive: bool = True
    """Lower the rates when the service is in distress, multiplicatively, and raise them again, additively."""
    minimum: Annotated[float, Gt(0)] = 50.0
    """The adaptive rate never falls below this, a second."""
    decrease: Annotated[float, Gt(0), Le(0.95)] = 0.7
    """Factor of the rate, each second in distress."""
    increase: Annotated[float, Gt(0), Le(1)] = 0.05
    """Share of the highest rate seen by which the rate grows, each second without distress."""
    commit_latency: Seconds = 3.0
    """Distress of the projections: a batch's database transaction takes longer."""
    append_latency: Seconds = 1.0
    """Distress of the commands: an append takes longer."""
    loop_lag: Seconds = 0.5
    """Distress of everything: the event loop is late by more."""
    error_rate: Annotated[float, Gt(0), Le(1)] = 0.1
    """Distress: more than this share of appends, or of batches, fails."""
