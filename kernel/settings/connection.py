"""Settings of the connection to NATS, and of who we are there."""

from __future__ import annotations

from typing import Annotated, Self
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import field_validator, model_validator

from kernel.settings.fields import Count, File, Listed, Seconds, Secret, Section


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
