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
from kernel.log.jetstream import JetStreamLog, find_log, open_log
from kernel.log.memory import MemoryLog

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
