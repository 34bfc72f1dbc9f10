"""Settings of everything that concerns NATS."""

from __future__ import annotations

from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import ByteSize, Field, field_validator, model_validator

from kernel.settings.base import Count, File, Listed, Seconds, Secret, Section

GroupCommit = Literal["auto", "always", "never"]


class Connection(Section):
    """The connection to NATS."""

    servers: Annotated[tuple[str, ...], Listed] = ()
    """URLs of NATS servers, `nats://host:4222` or `tls://host:4222`, with commas between; all are tried in turn.
    Without any the embedded server is started."""
    name: str = ""
    """The client's name in the server's monitoring; `eskernel APP` unless set."""
    max_reconnects: Annotated[int, Ge(-1)] = -1
    """Failed attempts to reconnect to each server after which the service tries a last time, gives up and stops; -1 is
    for ever, 0 stops it when the connection is lost."""
    reconnect_wait: Seconds = 0.25
    """Pause before the second attempt to reconnect to a server, doubled at each further one; the first is made at
    once."""
    reconnect_max_wait: Seconds = 5.0
    """Longest pause between attempts to reconnect, but for the jitter."""
    reconnect_jitter: Annotated[float, Ge(0), Le(1)] = 0.2
    """Share of the pause by which it is lengthened at random, so that many clients don't come back at once; before the
    first attempt, which has no pause, it is that share of `reconnect_wait`."""
    connect_timeout: Seconds = 5.0
    """For each attempt to connect; a start gives up after one such time for each server."""
    ping_interval: Seconds = 10.0
    """Between pings of the connection; the server answers each."""
    max_missed_pings: Count = 2
    """Pings without an answer after which the connection is given up."""
    health_check_interval: Seconds = 5.0
    """Between health checks: a request to the log, one to the database, and what else `/readyz` shows."""

    @field_validator("servers")
    @classmethod
    def _urls(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for one in servers:
            try:
                parts = urlsplit(one if "://" in one else f"nats://{one}")
                right = parts.scheme in ("nats", "tls") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                right = False
            if not right or parts.path.strip("/") or parts.query or parts.fragment:
                # nothing of the text is told: what looks like a path may be half a password
                raise ValueError(
                    "a server's URL is nats://host:4222 or tls://host:4222; a password with any of / # ? , : in it "
                    "belongs in security.password"
                )
        return servers


class Security(Section):
    """How the service proves who it is to NATS, and NATS to the service. For the servers of `connection.servers`."""

    token: Secret | None = None
    """Token."""
    user: str | None = None
    """User name."""
    password: Secret | None = None
    """Password of the user."""
    nkey_file: File | None = None
    """File with an nkey's seed (`SU...`)."""
    credentials_file: File | None = None
    """Credentials file (`.creds`): a user's JWT and seed."""
    client_certificate: File | None = None
    """Certificate of this client, PEM; for servers that verify clients."""
    client_key: File | None = None
    """Private key of the certificate, PEM, not encrypted."""
    ca_file: File | None = None
    """Certificates, PEM, by one of which the server's has to be signed; the system's unless set."""
    skip_verify: bool = False
    """Take any certificate of the server: whoever is in between can read and change everything. For trials only."""
    tls_required: bool = False
    """Never speak in clear text, whatever the URL says. URLs that begin with `tls://` imply it."""

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        ways = [name for name in ("token", "user", "nkey_file", "credentials_file") if getattr(self, name) is not None]
        if len(ways) > 1:
            raise ValueError(f"security.{' and security.'.join(ways)} contradict each other: a client has one identity")
        if (self.user is None) != (self.password is None):
            raise ValueError("security.user and security.password go together")
        if (self.client_certificate is None) != (self.client_key is None):
            raise ValueError("security.client_certificate and security.client_key go together")
        if self.skip_verify and self.ca_file is not None:
            raise ValueError("security.skip_verify contradicts security.ca_file: one says not to verify, the other how")
        return self

    @property
    def tls(self) -> bool:
        """Whether anything here needs TLS."""
        return self.tls_required or self.skip_verify or bool(self.ca_file or self.client_certificate)


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


class Stream(Section):
    """The app's stream: the event store."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """The stream's name; the app's unless set."""
    subject_prefix: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$")] | None = None
    """First token, or tokens, of all subjects of the app; its name unless set."""
    existing: Literal["create", "update", "validate", "skip"] = "create"
    """What to do about the stream at start. `create`: make it if there is none; differences of an existing one are
    told, those that an event log can't live with are errors. `update`: change an existing one to these settings, as
    far as no event can get lost by it. `validate`: never make or change anything; any difference is an error.
    `skip`: take what is there as it is."""
    partitions: Annotated[int, Ge(1), Le(4096)] = 64
    """Partitions; fixed when the stream is made. At most so many workers share the work."""
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    """`limits` keeps events. The others delete what has been read, and are refused: no aggregate could be loaded."""
    storage: Literal["file", "memory"] = "file"
    """`memory` ends with the server, which the service says at start."""
    replicas: Annotated[int, Ge(1), Le(5)] = 1
    """Servers of a cluster that keep each event."""
    max_age: Annotated[float, Ge(0)] = 0.0
    """Events older than this are deleted; 0 keeps them. Needs `stream.may_lose_events`."""
    max_bytes: Annotated[ByteSize, Ge(0)] = Field(default=ByteSize(0))
    """Size at which the stream is full; 0 is no limit. With `discard = "new"` appends are then refused."""
    max_messages: Annotated[int, Ge(0)] = 0
    """Commits at which the stream is full; 0 is no limit."""
    discard: Literal["new", "old"] = "new"
    """What goes when the stream is full: `new` refuses appends, `old` deletes the first events, which needs
    `stream.may_lose_events`."""
    compression: Literal["none", "s2"] = "none"
    """Whether the server compresses the store."""
    sync: bool = False
    """Embedded server: wait for the disk at every commit, so that a power cut loses nothing. Elsewhere this is the
    server's own setting, `sync_interval: always`, and refused here."""
    may_lose_events: bool = False
    """Say so a second time where another setting deletes events. Aggregates whose first events are gone can't be
    loaded, and projections can't be rebuilt whole."""

    @model_validator(mode="after")
    def _keeps_events(self) -> Self:
        if self.retention != "limits":
            raise ValueError(
                f"stream.retention = {self.retention!r} deletes what has been read: no aggregate could be loaded again "
                "and no projection rebuilt. Use 'limits'; to bound the log see stream.max_age, stream.max_bytes"
            )
        losing = ["stream.max_age"] if self.max_age else []
        if self.discard == "old":
            losing.append("stream.discard = 'old'")
            if not self.max_bytes and not self.max_messages:
                raise ValueError("stream.discard = 'old' needs stream.max_bytes or stream.max_messages")
        if losing and not self.may_lose_events:
            raise ValueError(
                f"{' and '.join(losing)} would delete events; if that is meant, set stream.may_lose_events"
            )
        return self


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
