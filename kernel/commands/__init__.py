"""From a request on NATS to a receipt."""
