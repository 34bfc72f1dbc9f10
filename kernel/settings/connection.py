"""Settings of the connection to NATS and of its security."""

from __future__ import annotations

import re
from typing import Annotated, Self
from urllib.parse import urlsplit

from annotated_types import Ge, Le
from pydantic import field_validator, model_validator

from kernel.settings.fields import Count, File, Listed, Seconds, Secret, Section

MAX_INBOX_PREFIX = 64
_INBOX_PREFIX = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


class Connection(Section):
    """The connection to NATS."""

    servers: Annotated[tuple[str, ...], Listed] = ()
    """URLs of the NATS servers, `nats://host:4222` or `tls://host:4222`, separated by commas. They are tried in turn.
    Without a URL the service starts its own embedded server."""
    name: str = ""
    """Name of the client in the server's monitoring; `eskernel APP` unless set."""
    inbox_prefix: str = ""
    """Prefix of the subjects where this process takes answers; `inbox` below the app's own subjects unless set, such as
    `bank.inbox`. The kind of process follows it: `service` and `workers`, `client`, or `operator`. Give a client a
    prefix of its own, such as `bank.inbox.alice`, whose subscription the server allows to no other user."""
    reply_prefixes: Annotated[tuple[str, ...], Listed] = ("_INBOX", "_R_")
    """Prefixes of the reply subjects to which the service answers, beside those of `connection.inbox_prefix`. A request
    with another reply subject is dropped. `_INBOX` is for clients in other languages; `_R_` for those of other
    accounts, to which the server maps the subjects."""
    max_reconnects: Annotated[int, Ge(-1)] = -1
    """Number of failed attempts to reconnect to each server, after which the service tries a last time and stops. -1:
    no limit. 0: the service stops when the connection is lost."""
    reconnect_wait: Seconds = 0.25
    """Pause in seconds before the second attempt to reconnect to a server. It doubles with each further attempt. The
    first attempt has no pause."""
    reconnect_max_wait: Seconds = 5.0
    """Longest pause in seconds between attempts to reconnect, without the jitter."""
    reconnect_jitter: Annotated[float, Ge(0), Le(1)] = 0.2
    """Largest random extension of the pause, as a share of it, so that many clients don't reconnect at the same
    moment. Before the first attempt, which has no pause, it is a share of `reconnect_wait`."""
    connect_timeout: Seconds = 5.0
    """Time limit in seconds for an attempt to connect. A start fails after this time for each server."""
    ping_interval: Seconds = 10.0
    """Interval in seconds between pings, which the server answers."""
    max_missed_pings: Count = 2
    """Number of unanswered pings after which the connection is closed and made again."""
    health_check_interval: Seconds = 5.0
    """Interval in seconds between health checks of the log, the database and the other components of `/readyz`."""

    @field_validator("inbox_prefix", "reply_prefixes")
    @classmethod
    def _inboxes(cls, value: str | tuple[str, ...]) -> str | tuple[str, ...]:
        prefixes = value if isinstance(value, tuple) else (value,) if value else ()
        for prefix in prefixes:
            if len(prefix) > MAX_INBOX_PREFIX or not _INBOX_PREFIX.fullmatch(prefix) or prefix.startswith("_GR_"):
                raise ValueError(
                    f"{prefix[:40]!r} is not a prefix of inboxes: words of letters, digits, `_` and `-` with dots "
                    f"between, at most {MAX_INBOX_PREFIX} characters"
                )
        return value

    @field_validator("servers")
    @classmethod
    def _urls(cls, servers: tuple[str, ...]) -> tuple[str, ...]:
        for server in servers:
            try:
                parts = urlsplit(server if "://" in server else f"nats://{server}")
                valid = parts.scheme in ("nats", "tls") and bool(parts.hostname) and parts.port != 0
            except ValueError:
                valid = False
            if not valid or parts.path.strip("/") or parts.query or parts.fragment:
                # the message must not quote the text: a seeming path may be part of a password
                raise ValueError(
                    "a server's URL is nats://host:4222 or tls://host:4222; set a password that contains / # ? , or : "
                    "as security.password"
                )
        return servers


class Security(Section):
    """How the service and the servers of `connection.servers` prove their identity to each other."""

    token: Secret | None = None
    """Authentication token."""
    user: str | None = None
    """User name; it needs `security.password`."""
    password: Secret | None = None
    """Password of the user."""
    nkey_file: File | None = None
    """File that contains the seed of an nkey (`SU...`)."""
    credentials_file: File | None = None
    """Credentials file (`.creds`) with a user's JWT and seed."""
    client_certificate: File | None = None
    """Certificate of this client (PEM), for servers that verify their clients."""
    client_key: File | None = None
    """Private key of the client's certificate (PEM, not encrypted)."""
    ca_file: File | None = None
    """Certificates of the trusted authorities (PEM), for the server's certificate; those of the system unless set."""
    skip_verify: bool = False
    """Accept any certificate of the server. An attacker on the network can then read and change all messages: use it
    for trials only."""
    tls_required: bool = False
    """Never connect without TLS, whatever the URL is. A URL that begins with `tls://` implies it."""

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
            raise ValueError(
                "security.skip_verify contradicts security.ca_file: a server that is not verified needs no authority"
            )
        return self

    @property
    def tls(self) -> bool:
        """True if a setting of this section needs TLS."""
        return self.tls_required or self.skip_verify or bool(self.ca_file or self.client_certificate)
