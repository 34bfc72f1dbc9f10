"""Settings of HTTP, logs and traces."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le

from kernel.settings.fields import Secret, Section


class Http(Section):
    """The HTTP pages `/healthz`, `/readyz` and `/metrics`."""

    host: str = "127.0.0.1"
    """Address to listen on; the loopback address unless set."""
    port: Annotated[int, Ge(0), Le(65535)] = 0
    """Port to listen on; 0: any free port."""
    token: Secret | None = None
    """Bearer token. If it is set, `/metrics` and the details of `/readyz` require it. The status codes of `/healthz`
    and `/readyz` don't."""


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
