"""How the worker is doing: backlog, pressure, health, alerts."""
