"""The domain: aggregates, commands, events, and the scenarios that specify them."""

from aggregates.aggregate import Aggregate, applies, handles, reacts
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
from aggregates.policies import After, At, Cancel, Policy, Reaction, Reactions, Refusal, Send
from aggregates.policy_scenario import PolicyScenario, policy
from aggregates.scenario import Scenario, scenario
from aggregates.upcasting import upcasts

__all__ = [
    "After",
    "Aggregate",
    "At",
    "Cancel",
    "Context",
    "DeclarationError",
    "EskernelError",
    "InvalidEvent",
    "InvalidId",
    "InvalidMessage",
    "Meta",
    "Policy",
    "PolicyScenario",
    "Reaction",
    "Reactions",
    "Refusal",
    "Rejected",
    "Scenario",
    "Send",
    "SequenceError",
    "applies",
    "command",
    "event",
    "handles",
    "policy",
    "reacts",
    "scenario",
    "upcasts",
]
