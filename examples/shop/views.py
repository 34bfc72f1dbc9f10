"""What the shop shows: how each order stands."""

from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from examples.shop.domain import (
    AddressChanged,
    Closed,
    Confirmed,
    Expired,
    Order,
    Packed,
    Paid,
    Payment,
    Placed,
    Refunded,
    Requested,
    Shipment,
    Shipped,
)
from projections import Meta, Rows, applies


class Base(DeclarativeBase):
    pass


class OrderRow(Base):
    __tablename__ = "orders"
    id: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(default=0)
    state: Mapped[str] = mapped_column(default="")
    address: Mapped[str] = mapped_column(default="")


class PaymentRow(Base):
    __tablename__ = "payments"
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str] = mapped_column(default="")
    cents: Mapped[int] = mapped_column(default=0)


class ShipmentRow(Base):
    __tablename__ = "shipments"
    id: Mapped[str] = mapped_column(primary_key=True)
    carrier: Mapped[str] = mapped_column(default="")


class Orders(Rows[OrderRow], of=Order):
    @applies
    def placed(self, row: OrderRow, event: Placed, meta: Meta) -> None:
        row.version, row.state, row.address = meta.sequence, "placed", event.address

    @applies
    def address_changed(self, row: OrderRow, event: AddressChanged, meta: Meta) -> None:
        row.version, row.address = meta.sequence, event.address

    @applies
    def ended(self, row: OrderRow, event: Confirmed | Expired, meta: Meta) -> None:
        row.version, row.state = meta.sequence, type(event).__name__.lower()


class Payments(Rows[PaymentRow], of=Payment):
    @applies
    def requested(self, row: PaymentRow, event: Requested) -> None:
        row.state, row.cents = "requested", event.cents

    @applies
    def changed(self, row: PaymentRow, event: Paid | Refunded | Closed) -> None:
        row.state = type(event).__name__.lower()


class Shipments(Rows[ShipmentRow], of=Shipment):
    @applies
    def packed(self, row: ShipmentRow, event: Packed) -> None:
        pass

    @applies
    def shipped(self, row: ShipmentRow, event: Shipped) -> None:
        row.carrier = event.carrier
