"""The next version of the program: the table of aircraft has a column more, the longest delay of an arrival."""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import applies
from examples.flights import Aircraft, AirportDays, Arrived, Cancelled, Departed, Diverted, LongDelays
from kernel import App
from projections import Rows


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
    longest_delay: Mapped[int] = mapped_column(default=0)


class Fleet(Rows[AircraftTotals], of=Aircraft, version=2):
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
        row.longest_delay = max(row.longest_delay, event.delay or 0)
        row.last_airport = event.airport

    @applies
    def diverted(self, row: AircraftTotals, event: Diverted) -> None:
        row.diversions += 1

    @applies
    def cancelled(self, row: AircraftTotals, event: Cancelled) -> None:
        row.cancellations += 1


app = App("flights", aggregates=[Aircraft], projections=[Fleet, AirportDays, LongDelays])
