"""What the shop shows: how each order stands, in one row from three aggregates."""

from typing import TypeAlias

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop.domain import (
    AddressChanged,
    Closed,
    Confirmed,
    Expired,
    Order,
    Paid,
    Payment,
    Placed,
    Refunded,
    Requested,
    Shipment,
    Shipped,
)
from projections import Meta, Rows, applies

OfPayment: TypeAlias = Requested | Paid | Refunded | Closed


class Base(DeclarativeBase):
    pass


class Sale(Base):
    """An order.

    Attributes:
        version: of the order.
    """

    __tablename__ = "sales"
    id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(default=0)
    state: Mapped[str] = mapped_column(default="")
    address: Mapped[str] = mapped_column(default="")
    payment: Mapped[str] = mapped_column(default="")
    carrier: Mapped[str | None]


class Sales(Rows[Sale], of=(Order, Payment, Shipment)):
    def key(self, event: Placed | AddressChanged | Confirmed | Expired | OfPayment | Shipped, meta: Meta) -> str:
        return meta.aggregate_id

    @applies
    def placed(self, row: Sale, event: Placed, meta: Meta) -> None:
        row.version, row.state, row.address = meta.sequence, "placed", event.address

    @applies
    def address_changed(self, row: Sale, event: AddressChanged, meta: Meta) -> None:
        row.version, row.address = meta.sequence, event.address

    @applies
    def ended(self, row: Sale, event: Confirmed | Expired, meta: Meta) -> None:
        row.version, row.state = meta.sequence, type(event).__name__.lower()

    @applies
    def paid(self, row: Sale, event: OfPayment) -> None:
        row.payment = type(event).__name__.lower()

    @applies
    def shipped(self, row: Sale, event: Shipped) -> None:
        row.state, row.carrier = "shipped", event.carrier
