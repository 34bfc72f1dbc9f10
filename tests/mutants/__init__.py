"""Deliberate bugs, each of which a test must catch: `python -m tests.mutants`."""
