"""What runs: the app, its service, and the client."""

from kernel.app import App, AppNotFound, load_app
from kernel.client import Client, QueryTimeout
from kernel.messages import CommandError, Overloaded, Receipt
from kernel.service import Service
from kernel.settings import Settings

__all__ = [
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
