"""The connection to NATS, JetStream's API, and requests to all workers."""
