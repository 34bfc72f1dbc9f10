"""The domain: aggregates, commands, events, and the scenarios that specify them."""

from aggregates.aggregate import Aggregate, applies, handles
from aggregates.context import Context
from aggregates.errors import (
    DeclarationError,
    EskernelError,
    InvalidEvent,
    InvalidId,
    InvalidMessage,
    Rejected,
    SequenceError,
)
from aggregates.messages import command, event
from aggregates.meta import Meta
from aggregates.scenario import Scenario, scenario
from aggregates.upcasting import upcasts

__all__ = [
    "Aggregate",
    "Context",
    "DeclarationError",
    "EskernelError",
    "InvalidEvent",
    "InvalidId",
    "InvalidMessage",
    "Meta",
    "Rejected",
    "Scenario",
    "SequenceError",
    "applies",
    "command",
    "event",
    "handles",
    "scenario",
    "upcasts",
]
