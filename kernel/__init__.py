"""What runs: the app, its service, and the client.

Names are imported when they are used: declaring an app, or sending one command, need not load a whole service.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel.alerts import Alert
    from kernel.app import App, AppNotFound, load_app
    from kernel.client import Client, QueryTimeout
    from kernel.protocol import CommandError, Overloaded, Receipt
    from kernel.service import Service
    from kernel.settings import Settings

__all__ = [
    "Alert",
    "App",
    "AppNotFound",
    "Client",
    "CommandError",
    "Overloaded",
    "QueryTimeout",
    "Receipt",
    "Service",
    "Settings",
    "load_app",
]

_HOMES = {
    "Alert": "alerts",
    "App": "app",
    "AppNotFound": "app",
    "load_app": "app",
    "Client": "client",
    "QueryTimeout": "client",
    "CommandError": "protocol",
    "Overloaded": "protocol",
    "Receipt": "protocol",
    "Service": "service",
    "Settings": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernel' has no attribute {name!r}")
    return getattr(import_module(f"kernel.{_HOMES[name]}"), name)
