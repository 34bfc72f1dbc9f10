"""The page of metrics as text: `python docs/metrics.py > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter, Gauge, Histogram

from kernel.telemetry import metrics

Metric = Counter | Gauge | Histogram
_HEAD = """# Metrics

Made by `make docs` of `kernel/telemetry/metrics.py`. `/metrics` shows them in Prometheus's text format; with several
workers the parent's page has those of all of them, each sample labelled with its `worker`. Beside them there is what
prometheus-client tells of the process and of Python (`process_*`, `python_*`). A test scrapes a running service and
looks at the value of each. [docs/monitoring](monitoring/README.md) has a dashboard and alert rules made of them.

| metric | type | labels | unit | meaning |
|---|---|---|---|---|
"""


def declared() -> Iterator[Metric]:
    """Return every metric of the kernel, in the order of `kernel.telemetry.metrics`."""
    for value in vars(metrics).values():
        if isinstance(value, Counter | Gauge | Histogram):
            yield value


def name_of(metric: Metric) -> str:
    """Return the name as it is scraped; a histogram's samples have `_bucket`, `_sum`, `_count` behind it."""
    name: str = metric._name
    return name + ("_total" if isinstance(metric, Counter) else "")


def unit_of(metric: Metric) -> str:
    """Return the unit."""
    for part in ("seconds", "bytes", "ratio"):
        if f"_{part}" in metric._name:
            return part
    return "1"


def render() -> str:
    """Return the page."""
    rows = [
        f"| `{name_of(one)}` | {type(one).__name__.lower()} | {', '.join(one._labelnames) or ''} "
        f"| {unit_of(one)} | {one._documentation} |"
        for one in declared()
    ]
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(render(), end="")  # noqa: T201 - that is what it is for
