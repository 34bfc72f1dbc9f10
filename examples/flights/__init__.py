"""A year of real flights: every departure from New York's airports in 2013, one aggregate per aircraft."""

from collections.abc import Sequence
from dataclasses import field
from datetime import date

from sqlalchemy import insert
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import Aggregate, Rejected, applies, command, event, handles
from kernel import App
from projections import Recorded, Rows, Sql, Tallies, Tally, Transaction

LONG_DELAY_MINUTES = 180


@event
class Departed:
    flight: str
    origin: str
    day: date
    delay: int
    miles: int


@event
class Arrived:
    flight: str
    airport: str
    day: date
    delay: int | None
    air_minutes: int | None


@event
class Diverted:
    flight: str
    day: date


@event
class Cancelled:
    flight: str
    origin: str
    day: date


@command
class Depart:
    """The aircraft leaves; `delay` in minutes, negative when early."""

    flight: str
    origin: str
    day: date
    delay: int
    miles: int


@command
class Arrive:
    """The aircraft lands; the delay or the time in the air may be unknown."""

    flight: str
    airport: str
    delay: int | None
    air_minutes: int | None


@command
class Divert:
    """The aircraft lands at another airport: no arrival is on record."""

    flight: str


@command
class Cancel:
    """The flight does not take place."""

    flight: str
    origin: str
    day: date


class Aircraft(Aggregate):
    """One aircraft, by tail number; it knows which of its flights are in the air, and the day they departed."""

    in_air: dict[str, date] = field(default_factory=dict)
    flights: int = 0

    @handles
    def depart(self, command: Depart) -> Departed:
        if command.flight in self.in_air:
            raise Rejected(f"{command.flight} has departed already")
        return Departed(command.flight, command.origin, command.day, command.delay, command.miles)

    @handles
    def arrive(self, command: Arrive) -> Arrived:
        return Arrived(
            command.flight, command.airport, self._departure_day(command.flight), command.delay, command.air_minutes
        )

    @handles
    def divert(self, command: Divert) -> Diverted:
        return Diverted(command.flight, self._departure_day(command.flight))

    @handles
    def cancel(self, command: Cancel) -> Cancelled:
        if command.flight in self.in_air:
            raise Rejected(f"{command.flight} is in the air")
        return Cancelled(command.flight, command.origin, command.day)

    def _departure_day(self, flight: str) -> date:
        if flight not in self.in_air:
            raise Rejected(f"{flight} has not departed")
        return self.in_air[flight]

    @applies
    def departed(self, event: Departed) -> None:
        self.in_air[event.flight] = event.day
        self.flights += 1

    @applies
    def landed(self, event: Arrived | Diverted) -> None:
        del self.in_air[event.flight]

    @applies
    def cancelled(self, event: Cancelled) -> None:
        pass


class Base(DeclarativeBase):
    pass


class AircraftTotals(Base):
    __tablename__ = "aircraft"
    tail: Mapped[str] = mapped_column(primary_key=True)
    flights: Mapped[int] = mapped_column(default=0)
    cancellations: Mapped[int] = mapped_column(default=0)
    diversions: Mapped[int] = mapped_column(default=0)
    air_minutes: Mapped[int] = mapped_column(default=0)
    miles: Mapped[int] = mapped_column(default=0)
    delay_minutes: Mapped[int] = mapped_column(default=0)
    last_airport: Mapped[str | None]


class AirportDay(Base):
    __tablename__ = "airport_days"
    airport: Mapped[str] = mapped_column(primary_key=True)
    day: Mapped[date] = mapped_column(primary_key=True)
    departures: Mapped[int] = mapped_column(default=0)
    arrivals: Mapped[int] = mapped_column(default=0)
    cancellations: Mapped[int] = mapped_column(default=0)
    delay_minutes: Mapped[int] = mapped_column(default=0)


class LongDelay(Base):
    __tablename__ = "long_delays"
    tail: Mapped[str] = mapped_column(primary_key=True)
    flight: Mapped[str] = mapped_column(primary_key=True)
    airport: Mapped[str]
    minutes: Mapped[int]


class Fleet(Rows[AircraftTotals], of=Aircraft, version=1):
    """Totals of each aircraft."""

    @applies
    def departed(self, row: AircraftTotals, event: Departed) -> None:
        row.flights += 1
        row.miles += event.miles
        row.last_airport = event.origin

    @applies
    def arrived(self, row: AircraftTotals, event: Arrived) -> None:
        row.air_minutes += event.air_minutes or 0
        row.delay_minutes += event.delay or 0
        row.last_airport = event.airport

    @applies
    def diverted(self, row: AircraftTotals, event: Diverted) -> None:
        row.diversions += 1

    @applies
    def cancelled(self, row: AircraftTotals, event: Cancelled) -> None:
        row.cancellations += 1


class AirportDays(Tallies[AirportDay], of=Aircraft, version=1):
    """Totals of each airport, by day of departure."""

    @applies
    def departed(self, tally: Tally[AirportDay], event: Departed) -> None:
        entry = tally[event.origin, event.day]
        entry.departures += 1
        entry.delay_minutes += event.delay

    @applies
    def arrived(self, tally: Tally[AirportDay], event: Arrived) -> None:
        tally[event.airport, event.day].arrivals += 1

    @applies
    def cancelled(self, tally: Tally[AirportDay], event: Cancelled) -> None:
        tally[event.origin, event.day].cancellations += 1


class LongDelays(Sql, of=Aircraft, version=1):
    """Flights that arrived at least three hours late."""

    tables = (LongDelay,)

    @applies
    def arrived(self, tx: Transaction, events: Sequence[Recorded[Arrived]]) -> None:
        late = [
            {
                "tail": arrival.meta.aggregate_id,
                "flight": arrival.event.flight,
                "airport": arrival.event.airport,
                "minutes": arrival.event.delay,
            }
            for arrival in events
            if (arrival.event.delay or 0) >= LONG_DELAY_MINUTES
        ]
        if late:
            tx.execute(insert(tx.table(LongDelay)), late)


app = App("flights", aggregates=[Aircraft], projections=[Fleet, AirportDays, LongDelays])
