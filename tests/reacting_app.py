"""A shop for `eskernel run tests.reacting_app:app`: its payments fail, and its mails, while a file says so."""

from __future__ import annotations

import os
from pathlib import Path

from aggregates import Meta, reacts
from kernel import App, Effect
from tests.shops import Confirmed, Fulfilment, Order, Payment, Refused

FOLDER = Path(os.environ.get("REACTING_FOLDER", "."))


class Fails(Effect, of=Order, timeout=5.0):
    """Writes a line for each mail, unless the mail server is away."""

    @reacts
    async def ended(self, event: Confirmed | Refused, meta: Meta) -> None:
        if (FOLDER / "away").exists():
            raise ValueError("the mail server is away")
        with (FOLDER / "mails").open("a") as file:
            file.write(f"{meta.aggregate_id}\n")


app = App("shop", aggregates=[Order, Payment], policies=[Fulfilment], effects=[Fails])
