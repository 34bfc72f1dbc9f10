"""What follows from the events of tanks: a policy with commands, rejections and timers, and an effect."""

from __future__ import annotations

import os
import zlib
from datetime import timedelta
from pathlib import Path

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from aggregates import (
    After,
    Aggregate,
    Cancel,
    Meta,
    Policy,
    Reactions,
    Refusal,
    Rejected,
    Send,
    applies,
    command,
    event,
    handles,
    reacts,
)
from kernel import Effect
from projections import Rows
from tests.faults.app import Base, Drained, Filled, Marked, Tank
from tests.faults.owed import DELAY_S, LARGE, ODD

BELL_VARIABLE = "FAULTS_BELL"
"""File to which the effect writes a line for each event."""


@event
class Noted:
    sequence: int


@event
class Objected:
    sequence: int


@event
class Rang:
    sequence: int


@command
class Note:
    sequence: int
    amount: int


@command
class Object:
    sequence: int


@command
class Ring:
    sequence: int


class Gauge(Aggregate):
    events: int = 0

    @handles
    def note(self, command: Note) -> Noted:
        if command.amount % ODD == 0:
            raise Rejected(f"{command.amount} is odd")
        return Noted(command.sequence)

    @handles
    def object(self, command: Object) -> Objected:
        return Objected(command.sequence)

    @handles
    def ring(self, command: Ring) -> Rang:
        return Rang(command.sequence)

    @applies
    def happened(self, event: Noted | Objected | Rang) -> None:
        self.events += 1


class Watch(Policy, of=Tank, start="beginning"):
    @reacts
    def drained(self, event: Drained, meta: Meta) -> Reactions:
        return Send(Gauge, meta.aggregate_id, Note(meta.sequence, event.amount))

    @reacts
    def filled(self, event: Filled, meta: Meta) -> Reactions:
        if event.amount < LARGE:
            return None
        ring = Send(Gauge, meta.aggregate_id, Ring(meta.sequence))
        return After(timedelta(seconds=DELAY_S), ring, key=meta.aggregate_id)

    @reacts
    def marked(self, event: Marked, meta: Meta) -> Reactions:
        return Cancel(meta.aggregate_id)

    def on_rejected(self, refusal: Refusal) -> Reactions:
        note = refusal.sent.command
        assert isinstance(note, Note)
        return Send(Gauge, refusal.sent.id, Object(note.sequence))


class Story(Base):
    """What happened under a key, in the order of the log: another order gives another digest."""

    __tablename__ = "stories"
    story: Mapped[str] = mapped_column(primary_key=True)
    events: Mapped[int] = mapped_column(default=0)
    digest: Mapped[int] = mapped_column(BigInteger, default=0)


class Stories(Rows[Story], of=(Tank, Gauge)):
    """Each event of a tank belongs to the tank and to its colour, an event of a gauge to its tank."""

    def key(self, event: Filled | Drained | Marked | Noted | Objected | Rang, meta: Meta) -> list[str]:
        if isinstance(event, Noted | Objected | Rang):
            return [meta.aggregate_id]
        return [meta.aggregate_id, f"colour {event.note.partition(' ')[0]}"]

    @applies
    def happened(self, row: Story, event: Filled | Drained | Marked | Noted | Objected | Rang, meta: Meta) -> None:
        row.events += 1
        row.digest = zlib.crc32(f"{row.digest} {meta.event_id}".encode())


class Bell(Effect, of=Gauge, start="beginning"):
    @reacts
    async def rang(self, event: Rang, meta: Meta) -> None:
        with Path(os.environ[BELL_VARIABLE]).open("a") as file:
            file.write(f"{meta.event_id}\n")
