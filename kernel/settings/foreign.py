"""Tells the environment variables of eskernel from the variables that Kubernetes makes.

Kubernetes gives every container variables about each Service of its namespace. Those of a Service named `eskernel` or
`eskernel-http` begin as ours do.
"""

from __future__ import annotations

import re
from typing import Final

_ABOUT_A_SERVICE: Final = re.compile(
    r"ESKERNEL(_[A-Z0-9_]+)?_("
    r"SERVICE_HOST|SERVICE_PORT(_[A-Z0-9_]+)?|PORT_\d+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)"
)
_LINK_NAME: Final = re.compile(r"ESKERNEL(_[A-Z0-9_]+)?_PORT")
_LINK: Final = re.compile(r"(tcp|udp|sctp)://")


def is_foreign(name: str, value: str) -> bool:
    """Return whether Kubernetes made this variable for a Service: its name alone, or its name with its value, says so.

    `ESKERNEL_PORT=8080` is not one: Kubernetes writes `tcp://10.0.0.11:8080` there.
    """
    if _ABOUT_A_SERVICE.fullmatch(name):
        return True
    return bool(_LINK_NAME.fullmatch(name) and _LINK.match(value))
