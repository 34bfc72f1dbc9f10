"""The Grafana dashboard as text: `python docs/monitoring/dashboard.py > docs/monitoring/dashboard.json`."""

from __future__ import annotations

import json
import re
from typing import Any

_ROWS: list[tuple[str, list[tuple[str, str, list[tuple[str, str]]]]]] = [
    (
        "Commands",
        [
            ("Commands by outcome", "ops", [("sum by (outcome) (rate(eskernel_commands_total[1m]))", "{{outcome}}")]),
            (
                "Time to answer",
                "s",
                [
                    (
                        f"histogram_quantile({q}, sum by (le) (rate(eskernel_command_seconds_bucket[1m])))",
                        f"p{100 * q:g}",
                    )
                    for q in (0.5, 0.9, 0.99)
                ],
            ),
            ("Under way", "short", [("sum(eskernel_commands_pending)", "pending")]),
            (
                "By type",
                "ops",
                [("sum by (aggregate, command) (rate(eskernel_commands_total[1m]))", "{{aggregate}}.{{command}}")],
            ),
        ],
    ),
    (
        "Log",
        [
            ("Appends", "ops", [("sum by (outcome) (rate(eskernel_appends_total[1m]))", "{{outcome}}")]),
            (
                "Time to acknowledge",
                "s",
                [
                    (
                        f"histogram_quantile({q}, sum by (le) (rate(eskernel_append_seconds_bucket[1m])))",
                        f"p{100 * q:g}",
                    )
                    for q in (0.5, 0.99)
                ],
            ),
            (
                "Waiting",
                "short",
                [("sum(eskernel_appends_queued)", "queued"), ("sum(eskernel_appends_in_flight)", "in flight")],
            ),
            (
                "Connection",
                "short",
                [
                    ("min(eskernel_nats_connected)", "connected"),
                    ("sum(increase(eskernel_nats_reconnects_total[5m]))", "reconnects in 5 min"),
                ],
            ),
        ],
    ),
    (
        "Projections",
        [
            ("Commits behind", "short", [("eskernel_projection_lag_commits", "{{app}} {{worker}}")]),
            ("Events projected", "ops", [("sum(rate(eskernel_events_folded_total[1m]))", "events")]),
            (
                "Batch: fold and write",
                "s",
                [
                    ("histogram_quantile(0.9, sum by (le) (rate(eskernel_batch_fold_seconds_bucket[1m])))", "fold p90"),
                    (
                        "histogram_quantile(0.9, sum by (le) (rate(eskernel_batch_write_seconds_bucket[1m])))",
                        "write p90",
                    ),
                ],
            ),
            (
                "Rows written",
                "ops",
                [("sum by (projection) (rate(eskernel_rows_written_total[1m]))", "{{projection}}")],
            ),
            (
                "Dead letters",
                "short",
                [
                    ("max(eskernel_parked_aggregates)", "parked"),
                    ("max(eskernel_waiting_aggregates)", "waiting for a newer program"),
                    ("max(eskernel_quarantined_messages)", "quarantined"),
                ],
            ),
        ],
    ),
    (
        "Policies and effects",
        [
            (
                "Events by outcome",
                "ops",
                [("sum by (reaction, outcome) (rate(eskernel_reactions_total[1m]))", "{{reaction}} {{outcome}}")],
            ),
            (
                "Behind",
                "s",
                [("max by (reaction) (eskernel_reaction_lag_seconds)", "{{reaction}}")],
            ),
            (
                "Commands of policies",
                "ops",
                [("sum by (policy, outcome) (rate(eskernel_policy_commands_total[1m]))", "{{policy}} {{outcome}}")],
            ),
            (
                "Timers",
                "short",
                [
                    ("max by (policy) (eskernel_timers_pending)", "{{policy}} pending"),
                    ("max by (policy) (eskernel_timers_late)", "{{policy}} overdue"),
                ],
            ),
        ],
    ),
    (
        "Service",
        [
            ("Components", "short", [("min by (component) (eskernel_component_ok)", "{{component}}")]),
            ("Live aggregates", "short", [("sum(eskernel_actors_live)", "live")]),
            ("Passivations", "ops", [("sum by (reason) (rate(eskernel_passivations_total[1m]))", "{{reason}}")]),
            ("Partitions", "short", [("eskernel_partitions_held", "{{app}} {{worker}}")]),
            ("Event loop late", "s", [("max(eskernel_loop_lag_seconds)", "late")]),
            ("Errors", "ops", [("sum by (kind) (rate(eskernel_errors_total[1m]))", "{{kind}}")]),
            (
                "Jobs that fail",
                "ops",
                [('sum by (task) (rate(eskernel_jobs_total{outcome="failed"}[5m]))', "{{task}}")],
            ),
            ("Memory", "bytes", [("process_resident_memory_bytes", "{{app}} {{worker}}")]),
        ],
    ),
]
_SOURCE = {"type": "prometheus", "uid": "${source}"}
_APP = 'app=~"$app"'
_METRIC = re.compile(r"\b((?:eskernel|process)_[a-z_]+)(\{([^}]*)\})?")


def _of_app(expression: str) -> str:
    """Return an expression that shows the app chosen on the dashboard."""
    return _METRIC.sub(lambda found: f"{found[1]}{{{found[3] + ',' if found[3] else ''}{_APP}}}", expression)


def dashboard() -> dict[str, Any]:
    """Return the dashboard as Grafana imports it."""
    panels: list[dict[str, Any]] = []
    y = 0
    for title, row in _ROWS:
        panels.append({"type": "row", "title": title, "gridPos": {"x": 0, "y": y, "w": 24, "h": 1}, "id": len(panels)})
        y += 1
        for place, (name, unit, queries) in enumerate(row):
            x = place % 4 * 6
            panels.append(
                {
                    "type": "timeseries",
                    "title": name,
                    "id": len(panels),
                    "datasource": _SOURCE,
                    "gridPos": {"x": x, "y": y + place // 4 * 7, "w": 6, "h": 7},
                    "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
                    "targets": [
                        {"refId": chr(65 + n), "expr": _of_app(expr), "legendFormat": legend, "datasource": _SOURCE}
                        for n, (expr, legend) in enumerate(queries)
                    ],
                }
            )
        y += (len(row) + 3) // 4 * 7
    return {
        "title": "eskernel",
        "uid": "eskernel",
        "schemaVersion": 39,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "templating": {
            "list": [
                {"name": "source", "type": "datasource", "query": "prometheus", "label": "Source"},
                {
                    "name": "app",
                    "type": "query",
                    "label": "App",
                    "datasource": _SOURCE,
                    "query": "label_values(eskernel_partitions_held, app)",
                    "refresh": 2,
                    "multi": True,
                    "includeAll": True,
                },
            ]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    print(json.dumps(dashboard(), indent=1))  # noqa: T201 - that is what it is for
