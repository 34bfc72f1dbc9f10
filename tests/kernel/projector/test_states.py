"""The states of aggregates under two programs: the first event at which they part is named."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from kernel import Client, Service
from kernel.projector.states import compare_states, digest_states, load, save
from tests.conftest import settings_for
from tests.ledgers import Pay, Purse, ledger


async def test_the_first_event_after_which_two_programs_differ_is_named(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    old = ledger(app_name)
    settings = settings_for(tmp_path / "data", nats=nats_url, database=f"sqlite:///{tmp_path / 'p.db'}", partitions=4)
    async with Service(old, settings), await Client.connect(old, nats=nats_url) as client:
        for cents in (1, 60, 2):
            await asyncio.gather(*(client.execute(Purse, f"p{n}", Pay(cents + n)) for n in range(12)))
        saved = await digest_states(old, client.log)
        save(saved, tmp_path / "states.gz")
        before = load(tmp_path / "states.gz", app_name)
        assert before == saved
        await client.execute(Purse, "p0", Pay(500))  # what came after the file was written is not compared
        same = compare_states(before, await digest_states(ledger(app_name, 2, newer_events=True), client.log))
        assert (same.same, same.differing) == (12, 0)
        other = await digest_states(ledger(app_name, limit=69), client.log, last=before.sequence)
        found = compare_states(before, other)
        assert (found.same, found.differing) == (10, 2)
        assert [(parting.aggregate_id, parting.sequence) for parting in found.examples] == [("p10", 2), ("p11", 2)]
        broken = await digest_states(ledger(app_name, limit=None), client.log, last=before.sequence)  # type: ignore[arg-type]
        found = compare_states(before, broken)
        assert (found.differing, found.examples[0].sequence) == (12, 1)
        assert "TypeError" in found.examples[0].error
    with pytest.raises(ValueError, match="holds the states of the app"):
        load(tmp_path / "states.gz", "another")
    (tmp_path / "text").write_text("nothing of the kind")
    with pytest.raises(ValueError, match="was not written by"):
        load(tmp_path / "text", app_name)
