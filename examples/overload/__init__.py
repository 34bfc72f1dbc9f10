"""What happens at three times the load that a service can bear: `python -m examples.overload`."""
