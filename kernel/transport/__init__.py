"""The connection to NATS, JetStream's API, and what goes over it."""
