"""What a service stands on: its data directory, its scheduler, an embedded nats-server."""
