"""Settings of JetStream: its API, and the consumers that read the stream."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from kernel.settings.fields import Listed, Seconds, Section

GroupCommit = Literal["auto", "always", "never"]


class JetStream(Section):
    """Requests to JetStream, and appends to the stream."""

    domain: str | None = None
    """JetStream domain, of a leaf node or a hub. Requests are then sent to `$JS.DOMAIN.API`."""
    api_prefix: str | None = None
    """Prefix of API requests, for an account that imports JetStream from another account; `$JS.API` unless set."""
    request_timeout: Seconds = 5.0
    """Time limit in seconds for an answer of the API."""
    publish_timeout: Seconds = 5.0
    """Time limit in seconds for the acknowledgement of an append. Then the log is read to find out whether the append
    took effect."""
    publish_deadline: Seconds = 30.0
    """Time in seconds after which an append with an unknown outcome is answered as `unknown-outcome`."""
    max_in_flight: Annotated[int, Ge(1), Le(10_000)] = 4_000
    """Largest number of appends that are sent and not yet acknowledged. Further appends wait in the service."""
    group_commit: GroupCommit = "auto"
    """Send commits that are ready together as one atomic batch (nats-server 2.12 or newer): `always`, `never`, or
    `auto`, which measures whether it is faster."""

    @model_validator(mode="after")
    def _one_prefix(self) -> Self:
        if self.domain and self.api_prefix:
            raise ValueError(
                "jetstream.domain and jetstream.api_prefix contradict each other: the domain determines the prefix"
            )
        return self

    @property
    def prefix(self) -> str:
        """The prefix of API requests."""
        return (self.api_prefix or (f"$JS.{self.domain}.API" if self.domain else "$JS.API")).rstrip(".")


class Consumer(Section):
    """The consumer that reads the log for the projections. The checkpoint in SQL is its position, not the server's."""

    name_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "eskernel"
    """Prefix of consumer names: `PREFIX-WORKER-NUMBER` in the server's monitoring."""
    deliver_policy: Literal["all", "new", "last", "last_per_subject", "by_start_time", "by_start_sequence"] = "all"
    """Must be `all`: every commit after the checkpoint is delivered. The other policies omit events, and are
    refused."""
    ack_policy: Literal["none", "all", "explicit"] = "none"
    """`none`: only the checkpoint in SQL records progress. `all`: the service also acknowledges each written batch, so
    that the server's monitoring shows the progress of the projections. `explicit` is refused, because it would break
    the order."""
    ack_wait: Seconds = 120.0
    """With `ack_policy = "all"`: time in seconds without an acknowledgement after which the server delivers again. The
    service then creates a new consumer after the last commit that it has received."""
    max_deliver: int = -1
    """Must be -1, no limit: the server must not drop events. An event that can't be folded becomes a dead letter; see
    `dead_letters.retries`."""
    max_ack_pending: Annotated[int, Ge(0)] = 0
    """With `ack_policy = "all"`: largest number of commits delivered and not yet acknowledged; 0 means 128,000."""
    replay_policy: Literal["instant", "original"] = "instant"
    """`instant`: the server delivers as fast as possible. `original`: it delivers at the rate at which the events were
    appended, for trials and demonstrations."""
    max_waiting: Annotated[int, Ge(2)] = 8
    """Largest number of pull requests that the server queues. The service uses two."""
    window: Annotated[int, Ge(1), Le(100_000)] = 8_000
    """Number of commits in one pull request. Two requests are outstanding."""
    heartbeat: Seconds = 2.0
    """Interval in seconds of the server's heartbeats. When they stop, the service creates a new consumer."""
    inactive_threshold: Seconds = 60.0
    """Time in seconds without a pull request after which the server deletes the consumer of a worker that has died."""
    backoff: Annotated[tuple[Seconds, ...], Listed] = (0.01, 0.05, 0.2, 1.0, 5.0)
    """Pauses in seconds before the projections continue after a failure of the log or the database. The last pause
    repeats."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.deliver_policy != "all":
            raise ValueError(
                f"consumer.deliver_policy = {self.deliver_policy!r} leaves out events that projections need; 'all' "
                "delivers every commit after the checkpoint"
            )
        if self.ack_policy == "explicit":
            raise ValueError(
                "consumer.ack_policy = 'explicit' makes the server deliver single events again, out of order; "
                "use 'all' to show the progress in the server's monitoring, or 'none'"
            )
        if self.max_deliver != -1:
            raise ValueError(
                "consumer.max_deliver would drop events that are not at fault; leave it at -1. An event that can't be "
                "folded is kept as a dead letter; see dead_letters.retries"
            )
        if self.max_ack_pending and self.ack_policy == "none":
            raise ValueError("consumer.max_ack_pending has no effect with consumer.ack_policy = 'none'")
        if "ack_wait" in self.model_fields_set and self.ack_policy == "none":
            raise ValueError("consumer.ack_wait has no effect with consumer.ack_policy = 'none'")
        if self.inactive_threshold < 2 * self.heartbeat:
            raise ValueError("consumer.inactive_threshold must be at least twice consumer.heartbeat")
        return self
