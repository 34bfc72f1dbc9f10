"""The number of files that the process may open."""

from __future__ import annotations

import resource

MOST = 1 << 20
"""Containers often have no hard limit to speak of; some programs grow slow with a soft limit of a billion."""


def allow_files() -> int:
    """Raise the soft limit of open files to the hard one, and return it.

    For a process of its own only: the limit belongs to the process, and a program around a service has chosen its own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(hard, MOST)
    if soft != resource.RLIM_INFINITY and soft < most:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
        except (OSError, ValueError):  # a sandbox may forbid it: what is allowed must do
            return soft
        return most
    return soft
