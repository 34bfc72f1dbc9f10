"""Settings of the stream: the event store."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from annotated_types import Ge, Le
from pydantic import ByteSize, Field, model_validator

from kernel.settings.fields import Section


class Stream(Section):
    """The app's stream: the event store."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")] | None = None
    """The stream's name; the app's unless set."""
    subject_prefix: Annotated[str, Field(pattern=r"^[A-Za-z][A-Za-z0-9_-]*(\.[A-Za-z0-9_-]+)*$")] | None = None
    """First token, or tokens, of all subjects of the app; its name unless set."""
    existing: Literal["create", "update", "validate", "skip"] = "create"
    """What to do about the stream at start. `create`: make it if there is none; differences of an existing one are
    told, those that an event log can't live with are errors. `update`: change an existing one to these settings, as
    far as no event can get lost by it. `validate`: never make or change anything; any difference is an error.
    `skip`: take what is there as it is."""
    partitions: Annotated[int, Ge(1), Le(4096)] = 64
    """Partitions; fixed when the stream is made. At most so many workers share the work."""
    retention: Literal["limits", "interest", "workqueue"] = "limits"
    """`limits` keeps events. The others delete what has been read, and are refused: no aggregate could be loaded."""
    storage: Literal["file", "memory"] = "file"
    """`memory` ends with the server, which the service says at start."""
    replicas: Annotated[int, Ge(1), Le(5)] = 1
    """Servers of a cluster that keep each event."""
    max_age: Annotated[float, Ge(0)] = 0.0
    """Events older than this are deleted; 0 keeps them. Needs `stream.may_lose_events`."""
    max_bytes: Annotated[ByteSize, Ge(0)] = Field(default=ByteSize(0))
    """Size at which the stream is full; 0 is no limit. With `discard = "new"` appends are then refused."""
    max_messages: Annotated[int, Ge(0)] = 0
    """Commits at which the stream is full; 0 is no limit."""
    discard: Literal["new", "old"] = "new"
    """What goes when the stream is full: `new` refuses appends, `old` deletes the first events, which needs
    `stream.may_lose_events`."""
    compression: Literal["none", "s2"] = "none"
    """Whether the server compresses the store."""
    sync: bool = False
    """Embedded server: wait for the disk at every commit, so that a power cut loses nothing. Elsewhere this is the
    server's own setting, `sync_interval: always`, and refused here."""
    may_lose_events: bool = False
    """Say so a second time where another setting deletes events. Aggregates whose first events are gone can't be
    loaded, and projections can't be rebuilt whole."""

    @model_validator(mode="after")
    def _keeps_events(self) -> Self:
        if self.retention != "limits":
            raise ValueError(
                f"stream.retention = {self.retention!r} deletes what has been read: no aggregate could be loaded again "
                "and no projection rebuilt. Use 'limits'; to bound the log see stream.max_age, stream.max_bytes"
            )
        losing = ["stream.max_age"] if self.max_age else []
        if self.discard == "old":
            losing.append("stream.discard = 'old'")
            if not self.max_bytes and not self.max_messages:
                raise ValueError("stream.discard = 'old' needs stream.max_bytes or stream.max_messages")
        if losing and not self.may_lose_events:
            raise ValueError(
                f"{' and '.join(losing)} would delete events; if that is meant, set stream.may_lose_events"
            )
        return self
