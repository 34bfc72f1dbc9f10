"""The `eventsourcing` library's projection runner on the flights."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any
from uuid import NAMESPACE_URL, UUID, uuid5

from eventsourcing.application import Application
from eventsourcing.dispatch import singledispatchmethod
from eventsourcing.domain import Aggregate, event
from eventsourcing.persistence import Tracking
from eventsourcing.projection import Projection, ProjectionRunner

from benchmarks import rival_view as view
from examples import flights

TIMEOUT_S = 120.0


class Aircraft(Aggregate):
    def __init__(self, tail: str) -> None:
        self.tail = tail

    @staticmethod
    def create_id(tail: str) -> UUID:
        return uuid5(NAMESPACE_URL, tail)

    @event("Departed")
    def depart(self, tail: str, flight: str, origin: str, day: str, delay: int, miles: int) -> None:
        pass

    @event("Arrived")
    def arrive(
        self, tail: str, flight: str, airport: str, day: str, delay: int | None, air_minutes: int | None
    ) -> None:
        pass

    @event("Diverted")
    def divert(self, tail: str, flight: str) -> None:
        pass

    @event("Cancelled")
    def cancel(self, tail: str, flight: str, origin: str, day: str) -> None:
        pass


class Flights(Application[UUID]):
    pass


class Totals(Projection[Any]):
    """All three projections in one: an event takes one transaction instead of three."""

    @singledispatchmethod
    def process_event(self, domain_event: Any, tracking: Tracking) -> None:  # noqa: ARG002 - the library's name
        self.view.write([], tracking)

    @process_event.register
    def departed(self, e: Aircraft.Departed, tracking: Tracking) -> None:
        self.view.write(
            [
                (view.DEPARTED, (e.tail, 1, e.miles, e.origin)),
                (view.DAY_DEPARTED, (e.origin, e.day, 1, e.delay)),
            ],
            tracking,
        )

    @process_event.register
    def arrived(self, e: Aircraft.Arrived, tracking: Tracking) -> None:
        delay = e.delay or 0
        statements: view.Statements = [
            (view.ARRIVED, (e.tail, e.air_minutes or 0, delay, e.airport)),
            (view.DAY_ARRIVED, (e.airport, e.day, 1)),
        ]
        if delay >= flights.LONG_DELAY_MINUTES:
            statements.append((view.LONG_DELAY, (e.tail, e.flight, e.airport, delay)))
        self.view.write(statements, tracking)

    @process_event.register
    def diverted(self, e: Aircraft.Diverted, tracking: Tracking) -> None:
        self.view.write([(view.DIVERTED, (e.tail, 1))], tracking)

    @process_event.register
    def cancelled(self, e: Aircraft.Cancelled, tracking: Tracking) -> None:
        self.view.write(
            [(view.CANCELLED, (e.tail, 1)), (view.DAY_CANCELLED, (e.origin, e.day, 1))],
            tracking,
        )


def events(commands: Iterable[tuple[str, Any]], limit: int) -> list[Any]:
    """Return the first events that the commands lead to."""
    fleet: dict[str, Aircraft] = {}
    left: dict[str, str] = {}
    found: list[Any] = []
    for tail, command in commands:
        aircraft = fleet.get(tail)
        if aircraft is None:
            aircraft = fleet[tail] = Aircraft(tail)
        flight = command.flight
        match command:
            case flights.Depart():
                left[flight] = command.day.isoformat()
                aircraft.depart(tail, flight, command.origin, left[flight], command.delay, command.miles)
            case flights.Arrive():
                aircraft.arrive(tail, flight, command.airport, left[flight], command.delay, command.air_minutes)
            case flights.Divert():
                aircraft.divert(tail, flight)
            case flights.Cancel():
                aircraft.cancel(tail, flight, command.origin, command.day.isoformat())
        found += aircraft.collect_events()
        if len(found) >= limit:
            break
    return found[:limit]


def _store(application: Flights, backlog: list[Any]) -> None:
    # larger batches fill the driver's pipeline, and then its PostgreSQL recorder never returns
    for start in range(0, len(backlog), 50):
        application.events.put(backlog[start : start + 50])


def run(settings: dict[str, str], view_class: type[Any], backlog: list[Any], *, beforehand: bool) -> float:
    """Project a backlog; return events per second.

    Args:
        beforehand: store the backlog in the application's database first. Otherwise the application lives in memory
            and gets it at the start: the library's SQLite application has no subscriptions.
    """
    if beforehand:
        application = Flights(settings)
        _store(application, backlog)
        application.close()
    environment = settings if beforehand else {f"TOTALS_{name}": value for name, value in settings.items()}
    started = time.perf_counter()
    with ProjectionRunner(
        application_class=Flights, projection_class=Totals, view_class=view_class, env=environment
    ) as runner:
        if not beforehand:
            _store(runner.app, backlog)
        last = runner.app.recorder.max_notification_id()
        runner.wait(last, timeout=TIMEOUT_S)
        return len(backlog) / (time.perf_counter() - started)
