"""Policies and effects at work: each reads the log for itself, and keeps where it stands in SQL."""
