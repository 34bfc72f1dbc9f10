"""Settings of what a service shows: HTTP, logs, traces."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge, Le

from kernel.settings.fields import Secret, Section


class Http(Section):
    """`/healthz`, `/readyz`, `/metrics`."""

    host: str = "127.0.0.1"
    """Address to listen on; the loopback unless set."""
    port: Annotated[int, Ge(0), Le(65535)] = 0
    """Port; 0 takes a free one."""
    token: Secret | None = None
    """Bearer token. With one, `/metrics` and the details of `/readyz` need it; the two status codes do not."""


class Logging(Section):
    """What is written to standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least level of what is written."""
    format: Literal["text", "json"] = "text"
    """`json`: one object a line."""


class Tracing(Section):
    """OpenTelemetry; needs the extra `eskernel[otel]`, and a tracer provider set by the app."""

    enabled: bool = True
    """Spans for commands, commits and projected batches that carry a traceparent, where the extra is installed."""
