"""The event log: one protocol (`base`), kept by JetStream or by memory."""

from kernel.log.base import (
    Batch,
    Conflict,
    EventLog,
    LogError,
    LogReader,
    PayloadTooLarge,
    Replaced,
    Stored,
    StreamInfo,
    StreamMismatch,
    Unavailable,
    UnknownOutcome,
)
from kernel.log.jetstream import JetStreamLog
from kernel.log.memory import MemoryLog
from kernel.log.stream import find_log, open_log

__all__ = [
    "Batch",
    "Conflict",
    "EventLog",
    "JetStreamLog",
    "LogError",
    "LogReader",
    "MemoryLog",
    "PayloadTooLarge",
    "Replaced",
    "Stored",
    "StreamInfo",
    "StreamMismatch",
    "Unavailable",
    "UnknownOutcome",
    "find_log",
    "open_log",
]
