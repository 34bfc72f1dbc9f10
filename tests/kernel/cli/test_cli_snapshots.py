"""`eskernel snapshots`: what there is, whether it is right, and away with it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from kernel import Client
from kernel.log.snapshots import SnapshotStore
from tests.apps import bank
from tests.kernel.cli.test_cli import Shell


async def _spoil(folder: Path) -> None:
    """Change the balance in the account's snapshot."""
    async with await Client.connect(bank("bank"), data=folder / ".eskernel") as client:
        store = SnapshotStore(client.connection, client.log.stream, client.log.subjects)
        await store.listen()
        subject = client.log.subjects.address("Account", "anna").subject
        data = await store.read(subject)
        assert data is not None
        assert data.count(b"\xa7balance\x07") == 1
        store.write(subject, data.replace(b"\xa7balance\x07", b"\xa7balance\x08"))
        async with asyncio.timeout(20):
            while not store.written:
                await asyncio.sleep(0.01)
        await store.close()


def test_snapshots_are_listed_verified_and_dropped(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.start("--set", "snapshots.every=2")
    try:
        assert "0 snapshots" in shell("snapshots", "list")
        assert json.loads(shell("snapshots", "verify", "--json")) == {"ok": 0, "other": 0, "wrong": []}
        for cents in (3, 4):
            shell("send", "Account", "anna", "Deposit", f"cents={cents}")
        listed = json.loads(shell("snapshots", "list", "--json"))
        assert listed["stream"] == "bank-snapshots"
        assert listed["types"] == [{"aggregate": "Account", "snapshots": 1, "problem": ""}]
        assert "1 equal their histories" in shell("snapshots", "verify", "Account", "--most", "5")
        asyncio.run(_spoil(tmp_path))
        assert "1 snapshots differ" in shell("snapshots", "verify", code=1)
        assert "no aggregate" in shell("snapshots", "drop", "Nobody", code=2)
        assert "1 snapshots are deleted" in shell("snapshots", "drop", "Account")
        assert "0 snapshots" in shell("snapshots", "list")
    finally:
        assert shell.stop() == 0
