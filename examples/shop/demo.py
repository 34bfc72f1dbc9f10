"""The demo of the shop: some hundred orders over HTTP, most of them paid; then everything is compared.

A service, a web server and a mail server are started, each on a free port of this machine.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from pathlib import Path
from typing import Any

import httpx
from aiosmtpd.smtp import SMTP, Envelope
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

DATA = Path(".demo")
START_TIMEOUT_S = 60.0
PATIENCE_S = 60.0
AT_ONCE = 32
"""Customers that are busy at the same time."""
RESERVED_S = 2.0
"""For so long goods are reserved for those who don't pay."""
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


def main() -> None:
    """Run the demo; exit with 1 if anything is not as it should be."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--orders", type=int, default=400, help="how many (default 400)")
    options = parser.parse_args()
    shutil.rmtree(DATA, ignore_errors=True)
    DATA.mkdir(parents=True)
    code = 1
    try:
        code = asyncio.run(_demo(options.orders))
    except* Wrong as wrong:
        for found in wrong.exceptions[:1]:
            console.print(f"[red bold]{escape(str(found))}[/red bold]; the logs are in {DATA}")
    sys.exit(code)


class Wrong(Exception):
    """Something is not as it should be, so that there is no going on."""


async def _demo(count: int) -> int:
    async with Mailbox.open() as mailbox:
        with _program("service", ["kernel.cli", "run", "examples.shop:app", "--data", str(DATA)], mailbox) as service:
            await _said(service, "is running")
            with _program(
                "web", ["uvicorn", "examples.shop.web:api", "--port", "0", "--no-access-log"], mailbox
            ) as web:
                url = (await _said(web, r"running on (http://\S+)"))[0]
                console.print(
                    "[bold]1. running[/bold] `eskernel run examples.shop:app` and `uvicorn examples.shop.web:api`"
                )
                console.print(f"   the web API is on {url}, a mail server on {mailbox.address}")
                async with httpx.AsyncClient(base_url=url, timeout=30.0) as http:
                    return await _check(Customers(http, count), mailbox)


async def _check(customers: Customers, mailbox: Mailbox) -> int:
    count = customers.count
    started = time.perf_counter()
    console.print(f"[bold]2. placing[/bold] {count} orders over HTTP; every fifth is not paid, every second paid one "
                  "is shipped")  # fmt: skip
    with Progress(TextColumn("   customers"), BarColumn(), MofNCompleteColumn(), console=console) as bar:
        task = bar.add_task("", total=count)
        await customers.buy(lambda: bar.advance(task))
    took = time.perf_counter() - started
    console.print(f"   {customers.requests} requests in {took:.1f} s, {customers.requests / took:,.0f} a second")
    console.print("[bold]3. comparing[/bold] what the shop shows with what was sent")
    expected = Counter(customers.expected.values())

    async def sales() -> bool:
        return await customers.sales() == expected

    checks = [
        await _holds(sales, lambda: f"orders by state: {dict(sorted(expected.items()))}"),
        await _holds(customers.each_is_right, lambda: f"each of the {count} orders is where it should be"),
        await _holds(lambda: mailbox.has(customers.mails), lambda: f"{len(customers.mails)} mails arrived, each once"),
        _tell(customers.repeated == customers.repeats, f"{customers.repeats} repeated commands took effect once"),
        _tell(customers.unseen == 0, f"{customers.reads} reads of one's own write had it"),
        _tell(*await customers.lose_an_update()),
        _tell(*await customers.pay_too_late()),
    ]
    if not all(checks):
        console.print(f"[red bold]not as it should be[/red bold]; the logs are in {DATA}")
        return 1
    console.print("[green bold]all OK[/green bold]\n\nTry next:")
    for line in (
        f"SHOP_SMTP=127.0.0.1:25 eskernel run examples.shop:app --data {DATA}",
        f"SHOP_DATA={DATA} uvicorn examples.shop.web:api      and open http://127.0.0.1:8000/docs",
        f"eskernel show --data {DATA} Order order-1 --history",
    ):
        console.print(f"  {line}", markup=False)
    console.print("  (both are in .venv/bin; the first two want terminals of their own)")
    return 0


@dataclass
class Customers:
    """Those who buy, over HTTP, and what they remember of it.

    Attributes:
        expected: how each order should stand in the end.
        mails: address and subject of each mail that should arrive.
        repeats, repeated: commands that were sent twice, and how many of them were known the second time.
        reads, unseen: reads of an own write, and how many of them did not have it.
    """

    http: httpx.AsyncClient
    count: int
    expected: dict[str, str] = field(default_factory=dict)
    mails: set[tuple[str, str]] = field(default_factory=set)
    requests: int = 0
    repeats: int = 0
    repeated: int = 0
    reads: int = 0
    unseen: int = 0

    async def buy(self, done: Callable[[], None]) -> None:
        """Place all orders, and pay and ship most of them.

        Args:
            done: called for each customer that is done.
        """
        busy = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with busy:
                await self._buy(number)
            done()

        async with asyncio.TaskGroup() as tasks:
            for number in range(self.count):
                tasks.create_task(one(number))

    async def _buy(self, number: int) -> None:
        order, email, cents = f"order-{number}", f"customer-{number}@example.org", 100 + number
        pays, ships = number % 5 != 0, number % 2 == 0
        fields: dict[str, Any] = {"email": email, "address": "1 Old Street", "cents": cents}
        if not pays:
            fields["reserved_s"] = RESERVED_S
        key = {"Idempotency-Key": f"place-{number}"}
        placed = await self._post(f"/Order/{order}/Place", fields, key)
        if number % 10 == 0:
            again = await self._post(f"/Order/{order}/Place", fields, key)
            self.repeats += 1
            self.repeated += again.json() == {**placed.json(), "duplicate": True}
        if pays:
            address = f"{number} New Street"
            changed = await self._post(f"/Order/{order}/ChangeAddress", {"address": address}, {"If-Match": '"1"'})
            shown = await self._get(f"/sales/{order}", {"After": changed.headers["After"]})
            self.reads += 1
            self.unseen += shown.json()["address"] != address or shown.headers["ETag"] != changed.headers["ETag"]
            await self._comes("Payment", order, "requested")
            await self._post(f"/Payment/{order}/Pay", {"cents": cents})
            self.mails.add((email, f"Order {order}: thank you"))
            if ships:
                await self._comes("Shipment", order, "packed")
                await self._post(f"/Shipment/{order}/Ship", {"carrier": "Ada & Sons"})
                self.mails.add((email, f"Order {order}: on its way with Ada & Sons"))
        else:
            self.mails.add((email, f"Order {order}: not paid in time"))
        self.expected[order] = "expired" if not pays else "shipped" if ships else "confirmed"

    async def sales(self) -> dict[str, int]:
        """Return the shop's own count of orders by state."""
        found: dict[str, int] = (await self._get("/sales")).json()
        return found

    async def each_is_right(self) -> bool:
        """Return whether each order stands as it should."""
        answers = [await self._get(f"/sales/{order}") for order in self.expected]
        return [answer.json()["state"] for answer in answers] == [*self.expected.values()]

    async def lose_an_update(self) -> tuple[bool, str]:
        """Change an order twice from the same version."""
        await self._post("/Order/shared/Place", {"email": "two@example.org", "address": "1 Old Street", "cents": 5})
        seen = (await self._get("/Order/shared")).headers["ETag"]
        first = await self._post("/Order/shared/ChangeAddress", {"address": "2 First Street"}, {"If-Match": seen})
        second = await self.http.post(
            "/Order/shared/ChangeAddress", json={"address": "3 Second Street"}, headers={"If-Match": seen}
        )
        kept = (await self._get("/sales/shared", {"After": first.headers["After"]})).json()["address"]
        refused = second.status_code == 412 and second.headers["Content-Type"] == "application/problem+json"
        right = refused and second.json()["version"] == 2 and kept == "2 First Street"
        return right, f"a lost update was refused: {second.status_code} {second.json()['detail']}"

    async def pay_too_late(self) -> tuple[bool, str]:
        """Pay for goods that are not reserved any more."""
        late = await self.http.post("/Payment/order-0/Pay", json={"cents": 100})
        return late.status_code == 409, f"a payment that came too late was refused: {late.json()['detail']}"

    async def _comes(self, aggregate: str, order: str, state: str) -> None:
        """Wait until the policy has brought an aggregate about."""

        async def there() -> bool:
            self.requests += 1
            answer = await self.http.get(f"/{aggregate}/{order}")
            return answer.status_code == 200 and answer.json()["state"] == state

        await _until(there, f"{aggregate} {order} is {state}", PATIENCE_S)

    async def _post(self, path: str, fields: dict[str, Any], headers: dict[str, str] | None = None) -> httpx.Response:
        self.requests += 1
        return _right(await self.http.post(path, json=fields, headers={"X-Customer": "demo", **(headers or {})}))

    async def _get(self, path: str, headers: dict[str, str] | None = None) -> httpx.Response:
        self.requests += 1
        return _right(await self.http.get(path, headers=headers))


class Mailbox:
    """A mail server that keeps what it gets."""

    def __init__(self) -> None:
        self.address = ""
        self._mails: dict[str, tuple[str, str]] = {}

    @classmethod
    @asynccontextmanager
    async def open(cls) -> AsyncIterator[Mailbox]:
        """Take mails on a free port until the block ends."""
        mailbox = cls()
        server = await asyncio.get_running_loop().create_server(lambda: SMTP(mailbox), "127.0.0.1", 0)
        mailbox.address = "{}:{}".format(*server.sockets[0].getsockname())
        try:
            yield mailbox
        finally:
            server.close()

    async def handle_DATA(self, server: object, session: object, envelope: Envelope) -> str:  # noqa: N802
        """Keep a mail; one that is sent again has the same id."""
        mail = message_from_bytes(envelope.original_content or b"")
        self._mails[str(mail["Message-ID"])] = (str(mail["To"]), str(mail["Subject"]))
        return "250 kept"

    async def has(self, expected: set[tuple[str, str]]) -> bool:
        """Return whether exactly these mails have come, by receiver and subject."""
        return Counter(self._mails.values()) == Counter(expected)


def _right(answer: httpx.Response) -> httpx.Response:
    if answer.status_code != 200:
        raise Wrong(f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}")
    return answer


async def _until(condition: Callable[[], Awaitable[bool] | bool], what: str, seconds: float) -> None:
    """Wait until something is so; exit if it does not come."""
    if not await _comes_true(condition, seconds):
        raise Wrong(f"waited {seconds:g} s until {what}")


async def _comes_true(condition: Callable[[], Awaitable[bool] | bool], seconds: float) -> bool:
    deadline, pause = time.monotonic() + seconds, 0.01
    while True:
        holds = condition()
        if holds if isinstance(holds, bool) else await holds:
            return True
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(pause)
        pause = min(pause * 1.5, 0.2)


async def _holds(condition: Callable[[], Awaitable[bool]], text: Callable[[], str]) -> bool:
    return _tell(await _comes_true(condition, PATIENCE_S), text())


def _tell(right: bool, text: str) -> bool:
    console.print(f"   {'[green]OK[/green]   ' if right else '[red]WRONG[/red]'} {text}")
    return right


async def _said(log: Path, pattern: str) -> list[str]:
    """Wait until a program has logged something, and return it."""
    await _until(lambda: bool(re.findall(pattern, log.read_text())), f"{log} says {pattern!r}", START_TIMEOUT_S)
    return re.findall(pattern, log.read_text())


@contextmanager
def _program(name: str, arguments: list[str], mailbox: Mailbox) -> Iterator[Path]:
    """Run a module in a process of its own until the block ends, then end it in order. Yield the file of its log."""
    path = DATA / f"{name}.log"
    environment = {**os.environ, "SHOP_SMTP": mailbox.address, "SHOP_DATA": str(DATA), "COLUMNS": "200"}
    with path.open("w") as log:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=log, stderr=log, env=environment)
    try:
        yield path
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(timeout=60)
        if code not in (0, -signal.SIGTERM):
            console.print(f"[red]{name} ended with {code}[/red]; see {path}")
    if code not in (0, -signal.SIGTERM) or re.search("Traceback", path.read_text()):
        raise Wrong(f"{name} did not end well; see {path}")


if __name__ == "__main__":
    main()
