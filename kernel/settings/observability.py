"""Settings of HTTP, logs and traces."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Annotated, Literal, Self

from annotated_types import Ge, Le
from pydantic import model_validator

from kernel.settings.fields import Seconds, Secret, Section


class Http(Section):
    """The HTTP pages `/healthz`, `/readyz` and `/metrics`."""

    host: str = "127.0.0.1"
    """Address to listen on; the loopback address unless set."""
    port: Annotated[int, Ge(0), Le(65535)] = 0
    """Port to listen on; 0: any free port."""
    token: Secret | None = None
    """Bearer token. If it is set, `/metrics` and the details of `/readyz` require it. The status codes of `/healthz`
    and `/readyz` don't. It must be set where `http.host` is not a loopback address."""
    public: bool = False
    """Serve the pages without a token on an address that is not a loopback address. For networks that no stranger can
    reach."""
    connections: Annotated[int, Ge(4), Le(4096)] = 64
    """Largest number of connections at once; never more than an eighth of the files that the process may open. A new
    connection beyond it closes the oldest one that has sent no request."""
    header_timeout: Seconds = 5.0
    """Time limit in seconds for a request to arrive. A connection carries one request."""
    timeout: Seconds = 30.0
    """Time limit in seconds for a request and its answer, also for a client that reads it slowly."""

    @model_validator(mode="after")
    def _guarded(self) -> Self:
        if self.token is None and not self.public and not _is_loopback(self.host):
            raise ValueError(
                f"http.host = {self.host!r} is not a loopback address, and everybody who reaches it could read the "
                "metrics; set http.token (ESKERNEL_HTTP__TOKEN), or http.public = true for a network that no stranger "
                "reaches"
            )
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Logging(Section):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Lowest level that is logged."""
    format: Literal["text", "json"] = "text"
    """Format of the log. `json`: one JSON object per line."""


class Tracing(Section):
    """Tracing with OpenTelemetry. It needs the extra `eskernel[otel]` and a tracer provider, which the app sets."""

    enabled: bool = True
    """Create spans for commands, appends and projected commits that carry a sampled traceparent."""
