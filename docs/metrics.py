"""Writes the page about metrics: `python docs/metrics.py > docs/metrics.md`."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import Counter, Gauge, Histogram

from kernel.telemetry import metrics

Metric = Counter | Gauge | Histogram
_HEAD = """# Metrics

`make docs` generates this page from `kernel/telemetry/metrics.py`. `/metrics` shows the metrics in Prometheus's text
format. Each sample has the label `app`. With several workers, the supervisor's page contains the metrics of all
workers, and each sample has the label `worker`. prometheus-client adds metrics about the process and about Python
(`process_*`, `python_*`). A test scrapes a running service and checks the value of each metric.
[docs/monitoring](monitoring/README.md) has a dashboard and alert rules.

| metric | type | labels | unit | meaning |
|---|---|---|---|---|
"""


def declared() -> Iterator[Metric]:
    """Yield every metric of the kernel, in the order of `kernel.telemetry.metrics`."""
    for value in vars(metrics).values():
        if isinstance(value, Counter | Gauge | Histogram):
            yield value


def name_of(metric: Metric) -> str:
    """Return the name as Prometheus scrapes it. A histogram's samples add `_bucket`, `_sum` and `_count`."""
    name: str = metric._name
    return name + ("_total" if isinstance(metric, Counter) else "")


def unit_of(metric: Metric) -> str:
    """Return the unit of a metric."""
    for part in ("seconds", "bytes", "ratio"):
        if f"_{part}" in metric._name:
            return part
    return "1"


def render() -> str:
    """Return the page."""
    rows = [
        f"| `{name_of(metric)}` | {type(metric).__name__.lower()} | {', '.join(metric._labelnames) or ''} "
        f"| {unit_of(metric)} | {metric._documentation} |"
        for metric in declared()
    ]
    return _HEAD + "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(render(), end="")  # noqa: T201 - the output is the page
