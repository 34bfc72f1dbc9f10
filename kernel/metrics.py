"""Every metric of the kernel, with its help and unit. They are set where the thing happens; nothing per event."""

from __future__ import annotations

from prometheus_client import Counter, Gauge, Histogram

_FAST = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

COMMANDS = Counter("eskernel_commands_total", "Commands answered", ["outcome"])
COMMANDS_PENDING = Gauge("eskernel_commands_pending", "Commands received and not yet answered")
APPENDS = Counter("eskernel_appends_total", "Commits appended to the log", ["outcome"])
APPEND_SECONDS = Histogram("eskernel_append_seconds", "From append to acknowledgement, a sample a turn", buckets=_FAST)
APPENDS_IN_FLIGHT = Gauge("eskernel_appends_in_flight", "Messages sent to the log and not acknowledged")
READ_BACKS = Gauge("eskernel_append_read_backs", "Reads of the log to find out whether an append took effect")
LOADS = Counter("eskernel_aggregate_loads_total", "Aggregates loaded from the log to decide a command")
EVENTS = Counter("eskernel_events_folded_total", "Events folded into projections")
BATCHES = Counter("eskernel_batches_total", "Batches written to the database", ["outcome"])
BATCH_SECONDS = Histogram("eskernel_batch_write_seconds", "Time of a batch's database transaction", buckets=_FAST)
FENCED = Counter("eskernel_fenced_batches_total", "Batches that met the fence: somebody else had moved on")
BATCH_EVENTS = Histogram("eskernel_batch_events", "Events in a batch", buckets=(1, 10, 100, 1000, 5000, 10000))
LAG = Gauge("eskernel_projection_lag_commits", "Commits in the log that the projections have not seen")
POSITION = Gauge("eskernel_projection_position", "Stream sequence up to which everything is projected")
PARKINGS = Counter("eskernel_parkings_total", "Times that an aggregate was parked, by what had failed", ["reason"])
QUARANTINED = Gauge("eskernel_quarantined_messages", "Messages on the stream that are no events of this app")
RETRIES = Counter("eskernel_dead_letter_retries_total", "Automatic retries of dead letters", ["outcome"])
PARKED = Gauge("eskernel_parked_aggregates", "Aggregates that wait behind a dead letter")
DEAD_LETTERS = Counter("eskernel_dead_letters_total", "Events put into the dead letters")
PARTITIONS = Gauge("eskernel_partitions_held", "Partitions that this worker holds")
LEASES_LOST = Counter("eskernel_leases_lost_total", "Partitions lost without having been given back")
MOVED = Counter("eskernel_partitions_moved_total", "Partitions taken and given back", ["direction"])
LIVE = Gauge("eskernel_actors_live", "Aggregates with a live actor")
ACTIVATIONS = Counter("eskernel_activations_total", "Aggregates activated")
PASSIVATIONS = Counter("eskernel_passivations_total", "Aggregates passivated", ["reason"])
COMPONENT_OK = Gauge("eskernel_component_ok", "1 while a component of the health report works", ["component"])
CONNECTED = Gauge("eskernel_nats_connected", "1 while connected to NATS")
CONNECTION_EVENTS = Counter("eskernel_nats_events_total", "What happened to the connection", ["event"])
ALERTS = Counter("eskernel_kernel_alerts_total", "Failures that should not happen: bugs in the kernel")
JOBS = Counter("eskernel_jobs_total", "Runs of scheduled jobs", ["job", "outcome"])
LOOP_LAG = Gauge("eskernel_loop_lag_seconds", "How late the event loop ran the last probe")
