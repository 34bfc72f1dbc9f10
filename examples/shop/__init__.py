"""A shop: orders, payments and shipments, what leads from one to the other, mails, and a web API.

domain.py      three aggregates
fulfilment.py  a policy, with a timer for orders that nobody pays
mails.py       an effect
views.py       a table of all three
web.py         the web API: uvicorn examples.shop.web:api
demo.py        all of it at work: make demo SHOP=1
"""

import os

from examples.shop.domain import Order, Payment, Shipment
from examples.shop.fulfilment import Fulfilment
from examples.shop.mails import Mails
from examples.shop.views import Sales
from kernel import App


def shop(smtp: str) -> App:
    """Return the app.

    Args:
        smtp: host and port of the mail server.
    """
    return App(
        "shop",
        aggregates=[Order, Payment, Shipment],
        projections=[Sales],
        policies=[Fulfilment],
        effects=[Mails(smtp)],
    )


app = shop(os.environ.get("SHOP_SMTP", "127.0.0.1:25"))
