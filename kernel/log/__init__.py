"""The event log: one protocol (`base`), implemented on JetStream and in memory."""

from kernel.log.base import Appending, CommitBatch, EventLog, LogReader, Stored, StreamInfo
from kernel.log.jetstream import JetStreamLog
from kernel.log.memory import MemoryLog
from kernel.log.stream import find_log, open_log

__all__ = [
    "Appending",
    "CommitBatch",
    "EventLog",
    "JetStreamLog",
    "LogReader",
    "MemoryLog",
    "Stored",
    "StreamInfo",
    "find_log",
    "open_log",
]
