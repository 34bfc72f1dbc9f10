"""Tables as of then: folded up to a moment, under a name of their own, and never mistaken for live ones."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from kernel import Client, Rebuild, Service
from kernel.projector.freezing import freeze
from projections import SchemaError
from projections.freezing import drop_frozen
from projections.schema import drop_version
from projections.standing import read_standing
from tests.conftest import settings_for
from tests.ledgers import Pay, Purse, ledger


async def test_a_frozen_table_is_what_the_log_said_then_and_stays_it(
    nats_url: str, database_url: str, app_name: str, tmp_path: Path
) -> None:
    app = ledger(app_name)
    settings = settings_for(tmp_path / "data", nats=nats_url, database=database_url, partitions=4)
    async with (
        Service(app, settings) as service,
        await Client.connect(app, nats=nats_url, database=database_url) as client,
    ):
        engine, (balances, volumes) = service.parts.engine, app.projections
        first = [await client.execute(Purse, f"p{n}", Pay(n)) for n in range(10)]
        then = datetime.now(UTC)
        later = [await client.execute(Purse, f"p{n}", Pay(100)) for n in range(10)]
        await client.query("SELECT 1", after=later)
        frozen = await freeze(app, client.log, engine, balances, "balances_then", then)
        assert frozen.sequence == first[-1].sequence
        await freeze(app, client.log, engine, volumes, "volumes_5", later[4].sequence)
        for _ in range(2):
            sums = [
                (await client.query(f"SELECT sum({column}) AS n FROM {table}"))[0]["n"]
                for column, table in (("cents", "balances_then"), ("times", "volumes_5"), ("cents", "balances"))
            ]
            assert sums == [45, 15, 1045]
            # a rebuild, its cut-over and what comes after it leave the frozen ones alone
            await Rebuild(app, client.log, engine, app.projections).run()
            await client.execute(Purse, "p0", Pay(0))
        for view, at, words in (
            ("balances_then", 5, "there is a view balances_then; choose another name"),
            ("balances", 5, "there is a view balances; "),
            ("eskernel_projection", 5, "a table named eskernel_projection exists"),
            ("no name", 5, "can't be the name of a table"),
            ("future", 1_000, "there is nothing to fold up to sequence 1000"),
            ("past", datetime(2013, 1, 1), "there is nothing to fold up to 2013-01-01"),
        ):
            with pytest.raises(SchemaError, match=words):
                await freeze(app, client.log, engine, balances, view, at)
        with engine.connect() as connection:
            states = [made["state"] for made in read_standing(connection)["Balances"]]
        assert states.count("frozen") == 1 and states.count("live") == 1 and "freezing" not in states
        with pytest.raises(SchemaError, match="readers see version 1"):
            await asyncio.to_thread(drop_version, engine, "Balances", 1, app.projections)
        with pytest.raises(SchemaError, match=r"no frozen table 'balances'; it has: balances_then"):
            await asyncio.to_thread(drop_frozen, engine, "Balances", "balances")
        await asyncio.to_thread(drop_frozen, engine, "Balances", "balances_then")
        with engine.connect() as connection:
            assert "frozen" not in [made["state"] for made in read_standing(connection)["Balances"]]
