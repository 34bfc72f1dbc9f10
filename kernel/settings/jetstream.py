"""Settings of JetStream: how it is spoken to, and by which consumer it is read."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Ge, Le
from pydantic import Field, model_validator

from kernel.settings.fields import Listed, Seconds, Section

GroupCommit = Literal["auto", "always", "never"]


class JetStream(Section):
    """How JetStream is spoken to."""

    domain: str | None = None
    """JetStream domain (a leaf node's, or a hub's); requests go to `$JS.DOMAIN.API`."""
    api_prefix: str | None = None
    """Prefix of API requests where an account imports JetStream from another; `$JS.API` unless set."""
    request_timeout: Seconds = 5.0
    """For an answer of the API."""
    publish_timeout: Seconds = 5.0
    """For the acknowledgement of an append; then the log is read to find out whether it took effect."""
    publish_deadline: Seconds = 30.0
    """After which an append whose outcome can't be found out is given up, and answered as `unknown-outcome`."""
    max_in_flight: Annotated[int, Ge(1), Le(10_000)] = 4_000
    """Appends sent and not acknowledged; more wait in the service."""
    group_commit: GroupCommit = "auto"
    """Whether commits that are ready together go out as one atomic batch (nats-server 2.12+); auto measures."""

    @model_validator(mode="after")
    def _one_prefix(self) -> Self:
        if self.domain and self.api_prefix:
            raise ValueError("jetstream.domain and jetstream.api_prefix contradict each other: a domain is a prefix")
        return self

    @property
    def prefix(self) -> str:
        """The prefix of API requests."""
        return (self.api_prefix or (f"$JS.{self.domain}.API" if self.domain else "$JS.API")).rstrip(".")


class Consumer(Section):
    """The consumer by which the projections read the log. Its position is the checkpoint in SQL, not the server's."""

    name_prefix: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] = "eskernel"
    """Consumers are named `PREFIX-WORKER-NUMBER` in the server's monitoring."""
    deliver_policy: Literal["all", "new", "last", "last_per_subject", "by_start_time", "by_start_sequence"] = "all"
    """`all`: everything behind the checkpoint. The others leave out events, and are refused."""
    ack_policy: Literal["none", "all", "explicit"] = "none"
    """`none`: the checkpoint in SQL is the acknowledgement. `all`: the server is told too, after each batch that was
    written, so that its monitoring shows how far the projections are. `explicit` is refused: it would break order."""
    ack_wait: Seconds = 120.0
    """With `ack_policy = "all"`: seconds without an acknowledgement after which the server delivers again; the service
    then makes a new consumer behind what it has."""
    max_deliver: int = -1
    """Only -1, without limit: dropping an event after some attempts is what dead letters do, for the aggregate that is
    to blame; see `dead_letters.retries`."""
    max_ack_pending: Annotated[int, Ge(0)] = 0
    """With `ack_policy = "all"`: commits that the server delivers ahead of the acknowledgements; 0 is 128,000."""
    replay_policy: Literal["instant", "original"] = "instant"
    """`original`: the server delivers at the pace at which events were once appended. For trials and demonstrations."""
    max_waiting: Annotated[int, Ge(2)] = 8
    """Pull requests that the server keeps waiting; two are used."""
    window: Annotated[int, Ge(1), Le(100_000)] = 8_000
    """Commits asked for in one pull request; two are outstanding."""
    heartbeat: Seconds = 2.0
    """The server says at this interval that it is there; when it doesn't, a new consumer is made."""
    inactive_threshold: Seconds = 60.0
    """After so long without a pull the server removes a consumer whose worker is gone."""
    backoff: Annotated[tuple[Seconds, ...], Listed] = (0.01, 0.05, 0.2, 1.0, 5.0)
    """Pauses before the projections go on after the log or the database failed; the last one repeats."""

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.deliver_policy != "all":
            raise ValueError(
                f"consumer.deliver_policy = {self.deliver_policy!r} leaves out events that projections need; 'all' "
                "delivers everything behind the checkpoint"
            )
        if self.ack_policy == "explicit":
            raise ValueError(
                "consumer.ack_policy = 'explicit' has the server deliver single events again, out of order; "
                "use 'all' to show progress to the server, or 'none'"
            )
        if self.max_deliver != -1:
            raise ValueError(
                "consumer.max_deliver would drop events that nothing is wrong with; what can't be folded becomes a "
                "dead letter after dead_letters.retries, and is kept. Leave it at -1"
            )
        if self.max_ack_pending and self.ack_policy == "none":
            raise ValueError("consumer.max_ack_pending has no effect with consumer.ack_policy = 'none'")
        if "ack_wait" in self.model_fields_set and self.ack_policy == "none":
            raise ValueError("consumer.ack_wait has no effect with consumer.ack_policy = 'none'")
        if self.inactive_threshold < 2 * self.heartbeat:
            raise ValueError("consumer.inactive_threshold must be at least twice consumer.heartbeat")
        return self
