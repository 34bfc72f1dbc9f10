"""The runtime of a service: its data directory, its scheduler, and the embedded nats-server."""
