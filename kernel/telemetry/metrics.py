"""Every metric of the kernel: name, meaning and labels. docs/metrics.md is generated from them.

The code sets a metric per batch, per second or per change, never per event. Every label has a bounded set of values:
an aggregate id is never a label.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from prometheus_client import Counter, Gauge, Histogram, generate_latest

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_MANY = (1, 10, 100, 1000, 5000, 10000, 50000)

# commands
COMMANDS = Counter("eskernel_commands_total", "Commands answered", ["aggregate", "command", "outcome"])
COMMAND_SECONDS = Histogram("eskernel_command_seconds", "Time from a command's arrival to its answer", buckets=_FAST)
COMMANDS_PENDING = Gauge("eskernel_commands_pending", "Commands received and not yet answered")
# the log
APPENDS = Counter("eskernel_appends_total", "Commits appended to the log", ["outcome"])
APPEND_SECONDS = Histogram("eskernel_append_seconds", "Time from append to acknowledgement, sampled", buckets=_FAST)
APPENDS_QUEUED = Gauge("eskernel_appends_queued", "Commits that wait to be sent to the log")
APPENDS_IN_FLIGHT = Gauge("eskernel_appends_in_flight", "Messages sent to the log and not acknowledged")
READ_BACKS = Counter("eskernel_append_read_backs_total", "Reads of the log to find out whether an append took effect")
LOG_EVENTS = Counter("eskernel_log_commits_read_total", "Commits that the live projection has read from the log")
# aggregates
LIVE = Gauge("eskernel_actors_live", "Aggregates with a live actor")
MEMORY = Gauge("eskernel_actors_memory_bytes", "Estimated size of the states and rows of live aggregates")
SHELLS = Gauge("eskernel_actor_shells", "Existing actors: live ones, and empty ones kept for reuse")
ACTIVATIONS = Counter("eskernel_activations_total", "Aggregates activated")
LOADS = Counter("eskernel_aggregate_loads_total", "Aggregates loaded from the log to decide a command")
LOAD_SECONDS = Histogram("eskernel_aggregate_load_seconds", "Time to load an aggregate from the log", buckets=_FAST)
SNAPSHOTS_TAKEN = Counter("eskernel_snapshots_taken_total", "Snapshots of aggregates taken", ["outcome"])
SNAPSHOTS_USED = Counter("eskernel_snapshots_used_total", "Snapshots of aggregates that were read", ["outcome"])
PASSIVATIONS = Counter("eskernel_passivations_total", "Aggregates passivated", ["reason"])
# projections
EVENTS = Counter("eskernel_events_folded_total", "Events folded into projections and written")
FOLD_SECONDS = Histogram(
    "eskernel_batch_fold_seconds", "Time to fold a batch, including loading its rows", buckets=_FAST
)
BATCHES = Counter("eskernel_batches_total", "Batches written to the database", ["outcome"])
BATCH_SECONDS = Histogram("eskernel_batch_write_seconds", "Time of a batch's database transaction", buckets=_FAST)
BATCH_EVENTS = Histogram("eskernel_batch_events", "Events in a batch", buckets=_MANY)
DEADLOCKS = Counter(
    "eskernel_database_deadlocks_total", "Transactions that the database ended for another one's sake; tried again"
)
ROWS = Counter("eskernel_rows_written_total", "Rows and tallies written or deleted", ["projection"])
BUILD_LEFT = Gauge("eskernel_build_commits_left", "Commits that the build of a new version has before it")
ROWS_COMPARED = Counter(
    "eskernel_rows_compared_total", "Rows compared with the events that they follow from", ["projection", "outcome"]
)
FENCED = Counter("eskernel_fenced_batches_total", "Batches that the fence refused")
SESSIONS_FAILED = Counter(
    "eskernel_projection_failures_total", "Times that the live projection began again after a failure", ["cause"]
)
CONSUMERS = Counter("eskernel_consumers_created_total", "Consumers created to read the log")
LAG = Gauge("eskernel_projection_lag_commits", "Commits behind in this worker's partitions, of the worst projection")
POSITION = Gauge("eskernel_projection_position", "Stream sequence up to which everything is projected")
# backlog and pressure
BACKLOG_BEHIND = Gauge("eskernel_backlog_commits", "Commits behind", ["projection"])
BACKLOG_AGE = Gauge("eskernel_backlog_age_seconds", "Age of the oldest commit that is not projected", ["projection"])
BACKLOG_DRAIN = Gauge("eskernel_backlog_drain_seconds", "Time to catch up at the current rate", ["projection"])
BACKLOG_PARTITIONS = Gauge("eskernel_backlog_partitions", "Partitions at a level", ["projection", "level"])
SPEED = Gauge("eskernel_projected_commits_per_second", "Commits projected per second, smoothed")
PRESSURE = Gauge("eskernel_publishing_pressure", "Pressure on publishing: 0 low, 1 medium, 2 high, 3 critical")
ALERTS_SENT = Counter("eskernel_alerts_total", "Alerts about backlog, health and pressure", ["kind", "level"])
ALERTS_DROPPED = Counter("eskernel_alerts_dropped_total", "Alerts dropped because a callback was too slow")
# policies and effects
REACTED = Counter(
    "eskernel_reactions_total",
    "Events that a policy or an effect is done with, by outcome",
    ["reaction", "outcome"],
)
REACTION_COMMANDS = Counter(
    "eskernel_policy_commands_total", "Commands of policies, by what became of them", ["policy", "outcome"]
)
REACTION_LAG = Gauge("eskernel_reaction_lag_commits", "Commits that a policy or an effect has not read", ["reaction"])
REACTION_AGE = Gauge(
    "eskernel_reaction_lag_seconds", "Age of the oldest commit that it has read and is not done with", ["reaction"]
)
REACTION_PARKED = Gauge(
    "eskernel_reaction_parked_aggregates",
    "Aggregates parked for a policy or an effect, in the whole database",
    ["reaction"],
)
TIMERS_PENDING = Gauge("eskernel_timers_pending", "Timers of a policy in the whole database", ["policy"])
TIMERS_LATE = Gauge("eskernel_timers_late", "Timers of a policy that are overdue by more than a second", ["policy"])
# dead letters
DEAD_LETTERS = Counter("eskernel_dead_letters_total", "Events that became dead letters")
PARKINGS = Counter("eskernel_parkings_total", "Aggregates parked, by reason of the failure", ["reason"])
PARKED = Gauge("eskernel_parked_aggregates", "Parked aggregates in the whole database")
WAITING = Gauge(
    "eskernel_waiting_aggregates",
    "Aggregates in the whole database whose projections wait for a newer program to read their events",
)
PAUSED = Gauge("eskernel_projections_paused", "Projections that this worker has paused: too many aggregates failed")
QUARANTINED = Gauge("eskernel_quarantined_messages", "Messages on the stream that are not events of the app")
RETRIES = Counter("eskernel_dead_letter_retries_total", "Automatic retries of dead letters", ["outcome"])
# connection and leases
CONNECTED = Gauge("eskernel_nats_connected", "1 while connected to NATS")
RECONNECTS = Counter("eskernel_nats_reconnects_total", "Reconnects to NATS")
CONNECTION_EVENTS = Counter("eskernel_nats_events_total", "Events of the connection to NATS", ["event"])
PARTITIONS = Gauge("eskernel_partitions_held", "Partitions that this worker holds")
MOVED = Counter("eskernel_partitions_moved_total", "Partitions assigned and given back", ["direction"])
LEASES_LOST = Counter("eskernel_leases_lost_total", "Partitions lost because a lease expired")
# governance
RATE_PRESENT = Gauge("eskernel_rate_present", "Current rate of a lane per second; +Inf: no limit", ["lane"])
RATE_LIMIT = Gauge("eskernel_rate_limit", "Configured rate of a lane per second, for the app; +Inf: no limit", ["lane"])
REFUSED = Counter("eskernel_commands_refused_total", "Commands refused as overloaded, by limit", ["limit"])
REPLIES_REFUSED = Counter(
    "eskernel_replies_refused_total", "Requests dropped because their reply subject is not an allowed inbox"
)
THROTTLED = Counter("eskernel_throttled_seconds_total", "Time that readers waited for a lane's tokens", ["lane"])
# the kernel itself
ERRORS = Counter("eskernel_errors_total", "Errors by kind", ["kind"])
COMPONENT_OK = Gauge("eskernel_component_ok", "1 while a component of the health report works", ["component"])
JOBS = Counter(
    "eskernel_jobs_total", "Runs of scheduled jobs; waiting: for an unreachable database", ["task", "outcome"]
)
JOB_SECONDS = Gauge("eskernel_job_seconds", "Duration of a job's last run", ["task"])
LOOP_LAG = Gauge("eskernel_loop_lag_seconds", "Longest delay of the event loop in the last second")
BUGS = Counter("eskernel_kernel_bugs_total", "Unexpected failures, which are bugs in the kernel")

KINDS = ("timeout", "connection", "permission", "invalid", "conflict", "database", "handler")
"""Kinds of errors. The counter of each exists from the start, so that a rate can be computed."""
for _kind in KINDS:
    ERRORS.labels(kind=_kind)


_KIND_OF = {
    "malformed": "invalid",
    "unknown-aggregate": "invalid",
    "unknown-command": "invalid",
    "invalid-command": "invalid",
    "invalid-id": "invalid",
    "too-large": "invalid",
    "failed": "handler",
    "invalid-event": "handler",
    "conflict": "conflict",
    "unknown-outcome": "timeout",
    "unavailable": "connection",
}


def count_error_of(outcome: str, times: float = 1) -> None:
    """Count a command's outcome as an error, if it is one."""
    if kind := _KIND_OF.get(outcome):
        ERRORS.labels(kind=kind).inc(times)


def count_connection_error(problem: str) -> None:
    """Count an error that the connection to NATS has reported."""
    low = problem.lower()
    denied = "permissions violation" in low or "authorization" in low or "authentication" in low
    kind = "permission" if denied else "timeout" if "time" in low else "connection"
    ERRORS.labels(kind=kind).inc()


def render_page(app: str) -> bytes:
    """Return this process's metrics in Prometheus's text format. Each sample has the label `app`.

    The label is added here, once a scrape: it costs nothing where metrics are counted.
    """
    quoted = app.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    label = f'app="{quoted}"'
    return "\n".join(_labelled(line, label) for line in generate_latest().decode().split("\n")).encode()


def _labelled(line: str, label: str) -> str:
    if not line or line.startswith("#"):
        return line
    name, space, rest = line.partition(" ")
    opening = name.find("{")
    if opening < 0:
        return f"{name}{{{label}}}{space}{rest}"
    return f"{line[:opening]}{{{label},{line[opening + 1 :]}"


def observe_all(histogram: Histogram, values: Iterable[float]) -> None:
    """Add many samples at once, at a tenth of the cost of single samples."""
    bounds: list[float] = histogram._upper_bounds
    counts = [0] * len(bounds)
    total = 0.0
    for value in values:
        counts[bisect_left(bounds, value)] += 1
        total += value
    for bucket, count in zip(histogram._buckets, counts, strict=True):
        if count:
            bucket.inc(count)
    histogram._sum.inc(total)
