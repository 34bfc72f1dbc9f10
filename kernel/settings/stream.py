"""Settings of the app's stream, the event store."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Ge, Le
from pydantic import ByteSize, Field, model_validator

from kernel.settings.fields import Section


class Stream(Section):
    """The app's stream, the event store."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """Name of the stream; the app's name unless set."""
    subject_prefix: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$")] | None = None
    """First token or tokens of all subjects of the app; the app's name unless set."""
    existing: Literal["create", "update", "validate", "skip"] = "create"
    """Treatment of the stream at start. `create`: create the stream if it does not exist; differences from these
    settings are logged, and a difference that makes it unusable as an event log is an error. `update`: also change an
    existing stream to these settings, unless the change could lose events. `validate`: never create or change the
    stream; any difference is an error. `skip`: use the stream unchecked."""
    partitions: Annotated[int, Ge(1), Le(4096)] = 64
    """Number of partitions, fixed when the stream is created. It limits the number of workers that share the work."""
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    """Must be `limits`, which keeps events. The other policies delete events that have been read, and are refused: no
    aggregate could be loaded."""
    storage: Literal["file", "memory"] = "file"
    """Storage of the events. With `memory` the events are lost when the server stops; the service logs it at start."""
    replicas: Annotated[int, Ge(1), Le(5)] = 1
    """Number of servers of a cluster that store each event."""
    max_age: Annotated[float, Ge(0)] = 0.0
    """Age in seconds at which events are deleted; 0: never. It needs `stream.may_lose_events`."""
    max_bytes: Annotated[ByteSize, Ge(0)] = Field(default=ByteSize(0))
    """Size at which the stream is full; 0: no limit. With `discard = "new"` appends are then refused."""
    max_messages: Annotated[int, Ge(0)] = 0
    """Number of commits at which the stream is full; 0: no limit."""
    discard: Literal["new", "old"] = "new"
    """Treatment of a full stream. `new`: appends are refused. `old`: the oldest events are deleted, which needs
    `stream.may_lose_events`."""
    compression: Literal["none", "s2"] = "none"
    """Compression of the stored events."""
    sync: bool = False
    """Embedded server only: write each commit to the disk before it is acknowledged, so that a power cut loses no
    event. Other servers have their own setting for it, `sync_interval: always`."""
    may_lose_events: bool = False
    """Allow settings that delete events. Aggregates whose first events are deleted can't be loaded, and projections
    can't be rebuilt completely."""

    @model_validator(mode="after")
    def _keeps_events(self) -> Self:
        if self.retention != "limits":
            raise ValueError(
                f"stream.retention = {self.retention!r} deletes events that have been read: no aggregate could be "
                "loaded again, and no projection rebuilt. Use 'limits'; stream.max_age and stream.max_bytes limit the "
                "log"
            )
        losing = ["stream.max_age"] if self.max_age else []
        if self.discard == "old":
            losing.append("stream.discard = 'old'")
            if not self.max_bytes and not self.max_messages:
                raise ValueError("stream.discard = 'old' needs stream.max_bytes or stream.max_messages")
        if losing and not self.may_lose_events:
            raise ValueError(f"{' and '.join(losing)} would delete events; set stream.may_lose_events to allow it")
        return self
