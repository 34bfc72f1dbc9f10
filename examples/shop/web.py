"""The shop's web API.

The service runs in a process of its own, `eskernel run examples.shop:app`. SHOP_DATA is its data directory.
"""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Response

from examples.shop import app
from examples.shop.domain import ChangeAddress, Order, Pay, Payment, Place, Ship, Shipment
from kernel import Client
from kernel.web import ConnectedClient, OwnWrites, ProblemRoute, commands_and_queries, problems


@asynccontextmanager
async def connected(api: FastAPI) -> AsyncIterator[None]:
    """Connect to the service for as long as the web server runs."""
    async with await Client.connect(app, data=Path(os.environ.get("SHOP_DATA", ".eskernel"))) as client:
        api.state.client = client
        yield


api = FastAPI(title="Shop", lifespan=connected)
api.router.route_class = ProblemRoute
api.include_router(
    commands_and_queries(
        app,
        # whoever stands in front of this program has checked it
        actor=lambda request: request.headers.get("X-Customer"),
        # the other commands come from the policy
        expose=[Order, Payment, Shipment, Place, ChangeAddress, Pay, Ship],
    )
)


@api.get("/sales", responses=problems(400, 422, 503, 504))
async def count_sales(client: ConnectedClient, after: OwnWrites) -> dict[str, int]:
    """Return how many orders stand how."""
    rows = await client.query("select state, count(*) as orders from sales group by state", after=after)
    return {row["state"]: row["orders"] for row in rows}


@api.get("/sales/{id}", responses=problems(400, 404, 422, 503, 504))
async def show_sale(id: str, client: ConnectedClient, after: OwnWrites, response: Response) -> dict[str, Any]:
    """Return how an order stands."""
    rows = await client.query("select * from sales where id = :id", {"id": id}, after=after)
    if not rows:
        raise HTTPException(404, f"there is no order {id}")
    response.headers["ETag"] = f'"{rows[0]["version"]}"'
    return rows[0]
