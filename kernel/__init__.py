"""What runs: the app, its service, and the client.

These names are public, and so are those of `kernel.errors`, `kernel.settings`, `kernel.log`, `kernel.testing`
and `kernel.web`. Every other module of this package is private: it may change in any version.

Names are imported when they are used: declaring an app, or sending one command, need not load a whole service.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kernel.alerts import Alert
    from kernel.app import App, load_app
    from kernel.client import Client
    from kernel.effect import Effect
    from kernel.log.history import LoadedAggregate
    from kernel.projector.rebuild import Rebuild, Rebuilt
    from kernel.projector.replay import RebuildProgress
    from kernel.protocol import CommandMessage, CommandOptions, Receipt, ReceiptWithEvents, ReceiptWithState
    from kernel.service import Service
    from kernel.settings import Settings
    from kernel.transport.importing import Outcome

__all__ = [
    "Alert",
    "App",
    "Client",
    "CommandMessage",
    "CommandOptions",
    "Effect",
    "LoadedAggregate",
    "Outcome",
    "Rebuild",
    "RebuildProgress",
    "Rebuilt",
    "Receipt",
    "ReceiptWithEvents",
    "ReceiptWithState",
    "Service",
    "Settings",
    "load_app",
]

_HOMES = {
    "Alert": "alerts",
    "App": "app",
    "load_app": "app",
    "Client": "client",
    "CommandMessage": "protocol",
    "CommandOptions": "protocol",
    "Effect": "effect",
    "LoadedAggregate": "log.history",
    "Outcome": "transport.importing",
    "Rebuild": "projector.rebuild",
    "RebuildProgress": "projector.replay",
    "Rebuilt": "projector.rebuild",
    "Receipt": "protocol",
    "ReceiptWithEvents": "protocol",
    "ReceiptWithState": "protocol",
    "Service": "service",
    "Settings": "settings",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kernel' has no attribute {name!r}")
    return getattr(import_module(f"kernel.{_HOMES[name]}"), name)
