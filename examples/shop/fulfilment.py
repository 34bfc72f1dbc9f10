"""What leads from one to the other: a policy, with a timer for orders that nobody pays."""

from collections.abc import Iterator
from datetime import timedelta

from aggregates import After, Cancel, Meta, Policy, Reaction, Reactions, Refusal, Send, reacts
from examples.shop.domain import (
    Close,
    Confirm,
    Confirmed,
    Expire,
    Expired,
    Order,
    Pack,
    Paid,
    Payment,
    Placed,
    Request,
    Shipment,
)


class Fulfilment(Policy, of=(Order, Payment)):
    @reacts
    def placed(self, event: Placed, meta: Meta) -> Iterator[Reaction]:
        order = meta.aggregate_id
        yield Send(Payment, order, Request(event.cents))
        yield After(timedelta(seconds=event.reserved_s), Send(Order, order, Expire()), key=order)

    @reacts
    def paid(self, event: Paid, meta: Meta) -> Iterator[Reaction]:
        order = meta.aggregate_id
        yield Cancel(order)
        yield Send(Order, order, Confirm())

    @reacts
    def confirmed(self, event: Confirmed, meta: Meta) -> Reactions:
        return Send(Shipment, meta.aggregate_id, Pack(event.email, event.address))

    @reacts
    def expired(self, event: Expired, meta: Meta) -> Reactions:
        return Send(Payment, meta.aggregate_id, Close())

    def on_rejected(self, refusal: Refusal) -> Reactions:
        # the money came when the goods were given free already
        return Send(Payment, refusal.sent.id, Close()) if isinstance(refusal.sent.command, Confirm) else None
