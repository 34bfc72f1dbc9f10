"""Orders, their payments and their shipments: three aggregates, each with the id of the order."""

from aggregates import Aggregate, Rejected, applies, command, event, handles


@command
class Place:
    """Order goods, which are reserved for some seconds until they are paid."""

    email: str
    address: str
    cents: int
    reserved_s: float = 1800.0


@command
class ChangeAddress:
    """Send the goods elsewhere; possible until the parcel is packed."""

    address: str


@command
class Confirm:
    """Take an order that is paid."""


@command
class Expire:
    """Give the goods of an order free that is not paid."""


@event
class Placed:
    email: str
    address: str
    cents: int
    reserved_s: float


@event
class AddressChanged:
    address: str


@event
class Confirmed:
    email: str
    address: str


@event
class Expired:
    email: str


class Order(Aggregate):
    """What a customer wants to have."""

    state: str = "new"
    email: str = ""
    address: str = ""

    @handles
    def place(self, command: Place) -> Placed:
        if self.state != "new":
            raise Rejected(f"the order is {self.state} already")
        if command.cents <= 0:
            raise Rejected("an order has a price")
        if "@" not in command.email or not command.email.isprintable():
            raise Rejected("we need your e-mail address")
        if not 0 < command.reserved_s <= 86_400:
            raise Rejected("goods are reserved for up to a day")
        return Placed(command.email, command.address, command.cents, command.reserved_s)

    @handles
    def change_address(self, command: ChangeAddress) -> AddressChanged:
        if self.state != "placed":
            raise Rejected(f"the order is {self.state}")
        return AddressChanged(command.address)

    @handles
    def confirm(self, command: Confirm) -> Confirmed:
        if self.state != "placed":
            raise Rejected(f"the order is {self.state}")
        return Confirmed(self.email, self.address)

    @handles
    def expire(self, command: Expire) -> Expired:
        if self.state != "placed":
            raise Rejected(f"the order is {self.state}")
        return Expired(self.email)

    @applies
    def placed(self, event: Placed) -> None:
        self.state, self.email, self.address = "placed", event.email, event.address

    @applies
    def address_changed(self, event: AddressChanged) -> None:
        self.address = event.address

    @applies
    def confirmed(self, event: Confirmed) -> None:
        self.state = "confirmed"

    @applies
    def expired(self, event: Expired) -> None:
        self.state = "expired"


@command
class Request:
    """Ask the customer for money."""

    cents: int


@command
class Pay:
    """Pay what was asked for."""

    cents: int


@command
class Close:
    """Take no money any more, and give back what was paid."""


@event
class Requested:
    cents: int


@event
class Paid:
    cents: int


@event
class Refunded:
    cents: int


@event
class Closed:
    pass


class Payment(Aggregate):
    """The money for an order."""

    state: str = "unknown"
    cents: int = 0

    @handles
    def request(self, command: Request) -> Requested:
        return Requested(command.cents)

    @handles
    def pay(self, command: Pay) -> Paid:
        if self.state != "requested":
            raise Rejected(f"the payment is {self.state}")
        if command.cents != self.cents:
            raise Rejected(f"it costs {self.cents}")
        return Paid(command.cents)

    @handles
    def close(self, command: Close) -> Refunded | Closed | None:
        if self.state == "paid":
            return Refunded(self.cents)
        return Closed() if self.state == "requested" else None

    @applies
    def requested(self, event: Requested) -> None:
        self.state, self.cents = "requested", event.cents

    @applies
    def paid(self, event: Paid) -> None:
        self.state = "paid"

    @applies
    def refunded(self, event: Refunded) -> None:
        self.state = "refunded"

    @applies
    def closed(self, event: Closed) -> None:
        self.state = "closed"


@command
class Pack:
    """Put the goods into a parcel."""

    email: str
    address: str


@command
class Ship:
    """Give the parcel to a carrier."""

    carrier: str


@event
class Packed:
    email: str
    address: str


@event
class Shipped:
    email: str
    carrier: str


class Shipment(Aggregate):
    """The parcel with the goods of an order."""

    state: str = "unknown"
    email: str = ""

    @handles
    def pack(self, command: Pack) -> Packed:
        return Packed(command.email, command.address)

    @handles
    def ship(self, command: Ship) -> Shipped:
        if self.state != "packed":
            raise Rejected(f"the parcel is {self.state}")
        return Shipped(self.email, command.carrier)

    @applies
    def packed(self, event: Packed) -> None:
        self.state, self.email = "packed", event.email

    @applies
    def shipped(self, event: Shipped) -> None:
        self.state = "shipped"
