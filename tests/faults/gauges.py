"""What follows from the events of tanks: a policy with commands, rejections and timers, and an effect."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

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
from tests.faults.app import Drained, Filled, Marked, Tank
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


class Bell(Effect, of=Gauge, start="beginning"):
    @reacts
    async def rang(self, event: Rang, meta: Meta) -> None:
        with Path(os.environ[BELL_VARIABLE]).open("a") as file:
            file.write(f"{meta.event_id}\n")
