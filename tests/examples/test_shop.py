"""The example of a shop: its rules, what leads from one to the other, its mails, and the whole of it over HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

import httpx
import pytest

from aggregates import After, Send, policy, scenario
from examples.shop import shop
from examples.shop.demo import Mailbox
from examples.shop.domain import (
    AddressChanged,
    ChangeAddress,
    Close,
    Closed,
    Confirm,
    Confirmed,
    Expire,
    Expired,
    Order,
    Pack,
    Packed,
    Paid,
    Pay,
    Payment,
    Place,
    Placed,
    Refunded,
    Request,
    Requested,
    Ship,
    Shipment,
    Shipped,
)
from examples.shop.fulfilment import Fulfilment
from examples.shop.views import Sale, Sales
from examples.shop.web import api
from kernel.testing import RunningApp, running
from projections import projected

PLACED = Placed("ada@example.org", "1 Old Street", 500, 60.0)
PLACE = {"email": "ada@example.org", "address": "1 Old Street", "cents": 500, "reserved_s": 60.0}


@asynccontextmanager
async def open_shop() -> AsyncIterator[tuple[httpx.AsyncClient, RunningApp, Mailbox]]:
    """Run the shop in this process, with a mail server; yield a client of its web API."""
    async with (
        Mailbox.open() as mailbox,
        running(shop(mailbox.address)) as kernel,
        httpx.AsyncClient(transport=httpx.ASGITransport(api), base_url="http://shop") as http,
    ):
        api.state.client = kernel
        yield http, kernel, mailbox


def test_an_order_is_placed_once_and_changed_until_it_is_paid() -> None:
    order = scenario(Order)
    place = Place("ada@example.org", "1 Old Street", 500, 60.0)
    order.when(place).then(PLACED)
    order.given(PLACED).when(place).rejects("the order is placed already")
    order.when(Place("ada", "1 Old Street", 500)).rejects("we need your e-mail address")
    order.when(Place("a@example.org\nBcc: b@example.org", "", 500)).rejects("we need your e-mail address")
    order.when(Place("ada@example.org", "1 Old Street", 0)).rejects("an order has a price")
    order.given(PLACED).when(ChangeAddress("2 New Street")).then(AddressChanged("2 New Street"))
    paid = order.given(PLACED, AddressChanged("2 New Street"))
    paid.when(Confirm()).then(Confirmed("ada@example.org", "2 New Street"))
    order.given(PLACED, Confirmed("", "")).when(ChangeAddress("")).rejects("the order is confirmed")
    order.given(PLACED).when(Expire()).then(Expired("ada@example.org"))
    order.given(PLACED, Confirmed("", "")).when(Expire()).rejects("the order is confirmed")


def test_a_payment_takes_what_was_asked_for_and_gives_it_back() -> None:
    payment = scenario(Payment)
    payment.when(Pay(500)).rejects("the payment is unknown")
    payment.given(Requested(500)).when(Pay(499)).rejects("it costs 500")
    payment.given(Requested(500)).when(Pay(500)).then(Paid(500))
    payment.given(Requested(500), Paid(500)).when(Close()).then(Refunded(500))
    payment.given(Requested(500)).when(Close()).then(Closed())
    payment.given(Requested(500), Closed()).when(Pay(500)).rejects("the payment is closed")


def test_a_parcel_is_shipped_once() -> None:
    parcel = scenario(Shipment).given(Packed("ada@example.org", ""))
    parcel.when(Ship("Carrier")).then(Shipped("ada@example.org", "Carrier"))
    scenario(Shipment).when(Ship("Carrier")).rejects("the parcel is unknown")


def test_fulfilment_leads_from_an_order_to_its_parcel() -> None:
    fulfilment = policy(Fulfilment)
    placed = fulfilment.when(PLACED, of=Order, id="o")
    placed.sends(Send(Payment, "o", Request(500)))
    placed.sets(After(timedelta(seconds=60), Send(Order, "o", Expire()), key="o"))
    paid = fulfilment.given(PLACED, of=Order, id="o").when(Paid(500), of=Payment, id="o")
    paid.sends(Send(Order, "o", Confirm()))
    paid.when_rejected(Send(Order, "o", Confirm())).sends(Send(Payment, "o", Close()))
    confirmed = fulfilment.when(Confirmed("ada@example.org", "1 Old Street"), of=Order, id="o")
    confirmed.sends(Send(Shipment, "o", Pack("ada@example.org", "1 Old Street")))
    fulfilment.when(Expired("ada@example.org"), of=Order, id="o").sends(Send(Payment, "o", Close()))


def test_a_sale_is_one_row_of_three_aggregates() -> None:
    sale = projected(Sales).given("o", PLACED, AddressChanged("2 New Street")).given("o", Requested(500), Paid(500))
    confirmed = sale.given("o", Confirmed("", ""))
    confirmed.then(Sale(id="o", version=3, state="confirmed", address="2 New Street", payment="paid"))
    confirmed.given("o", Shipped("", "Carrier")).then(
        Sale(id="o", version=3, state="shipped", address="2 New Street", payment="paid", carrier="Carrier")
    )


async def test_an_order_is_paid_and_shipped_over_http() -> None:
    async with open_shop() as (http, kernel, mailbox):
        placed = await http.post("/Order/o/Place", json=PLACE, headers={"X-Customer": "ada"})
        changed = {"address": "2 New Street"}
        change = await http.post("/Order/o/ChangeAddress", json=changed, headers={"If-Match": placed.headers["ETag"]})
        shown = await http.get("/sales/o", headers={"After": change.headers["After"]})
        assert (shown.json()["address"], shown.headers["ETag"]) == ("2 New Street", change.headers["ETag"])
        lost = await http.post("/Order/o/ChangeAddress", json=changed, headers={"If-Match": placed.headers["ETag"]})
        assert (lost.status_code, lost.json()["version"]) == (412, 2)
        await kernel.settled()
        assert (await http.post("/Payment/o/Pay", json={"cents": 500})).status_code == 200
        await kernel.settled()
        assert (await http.get("/Shipment/o")).json()["state"] == "packed"
        ship = await http.post("/Shipment/o/Ship", json={"carrier": "Carrier"})
        assert (await http.get("/sales", params={"after": ship.headers["After"]})).json() == {"shipped": 1}
        kernel.clock.advance(timedelta(hours=1))  # its timer was cancelled
        await kernel.settled()
        assert (await http.get("/sales")).json() == {"shipped": 1}
        subjects = ["Order o: thank you", "Order o: on its way with Carrier"]
        assert await mailbox.has({("ada@example.org", subject) for subject in subjects})


async def test_an_order_that_nobody_pays_expires_and_takes_no_money_any_more() -> None:
    async with open_shop() as (http, kernel, mailbox):
        await http.post("/Order/o/Place", json=PLACE)
        await kernel.settled()
        kernel.clock.advance(timedelta(seconds=59))
        await kernel.settled()
        assert (await http.get("/sales")).json() == {"placed": 1}
        kernel.clock.advance(timedelta(seconds=1))
        await kernel.settled()
        assert (await http.get("/sales")).json() == {"expired": 1}
        assert (await http.post("/Payment/o/Pay", json={"cents": 500})).status_code == 409
        assert await mailbox.has({("ada@example.org", "Order o: not paid in time")})


async def test_money_that_comes_when_the_order_has_expired_goes_back() -> None:
    async with open_shop() as (_, kernel, _):
        await kernel.execute(Order, "o", Place("ada@example.org", "", 500))
        await kernel.settled()
        # at the same moment, so that the policy has seen neither
        await asyncio.gather(kernel.execute(Order, "o", Expire()), kernel.execute(Payment, "o", Pay(500)))
        await kernel.settled()
        assert (await kernel.load(Payment, "o")).state.state == "refunded"


@pytest.mark.parametrize("path", ["/Order/o/Confirm", "/Order/o/Expire", "/Payment/o/Close", "/Shipment/o/Pack"])
async def test_what_only_the_policy_sends_is_not_on_the_web(path: str) -> None:
    async with open_shop() as (http, _, _):
        assert (await http.post(path, json={})).status_code == 404
        assert (await http.get("/sales/o")).status_code == 404
