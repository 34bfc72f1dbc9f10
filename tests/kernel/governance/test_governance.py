"""Rate governance on running services: limits of commands, fairness, and limits that are changed meanwhile."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from kernel import App, Client, Service
from kernel.errors import Overloaded
from kernel.log.subjects import Address, subjects_of
from kernel.transport.dial import connect
from kernel.transport.survey import survey
from tests.apps import Lines, Note, Notebook, Pages, Words
from tests.conftest import settings_for
from tests.failing import Wait, metric, running
from tests.kernel.cli.test_cli import Shell


def tenants(name: str) -> App:
    return App(
        name,
        aggregates=[Notebook],
        projections=[Pages, Words, Lines],
        rate_key=lambda _aggregate, aggregate_id, _command: aggregate_id.partition("-")[0],
    )


def refused(limit: str) -> float:
    return metric("eskernel_commands_refused_total", limit=limit)


# limits of commands


@pytest.mark.parametrize(
    ("limit", "section", "says"),
    [
        ("commands", {"rates__commands": {"rate": 0.5, "burst": 3}}, "rates.commands: 0.5/s"),
        (
            "per_aggregate",
            {"rates__per_aggregate": {"Notebook": {"rate": 0.5, "burst": 3}}},
            "rates.per_aggregate Notebook: 0.5/s",
        ),
        ("per_key", {"rates__per_key": {"rate": 0.5, "burst": 3}}, "rates.per_key acme: 0.5/s"),
    ],
)
@pytest.mark.setting(
    "rates.commands.rate", "rates.commands.burst", "rates.per_aggregate", "rates.per_key.rate", "rates.per_key.burst"
)
async def test_each_limit_refuses_with_a_time_after_which_it_lets_in_and_the_client_waits_for_it(
    nats_url: str, app_name: str, tmp_path: Path, limit: str, section: dict[str, Any], says: str
) -> None:
    service = Service(tenants(app_name), settings_for(tmp_path, nats=nats_url, **section))
    await service.start()
    try:
        async with await Client.connect(service.app, nats=nats_url) as client:
            for n in range(3):
                await client.execute(Notebook, f"acme-{n}", Note("a"))
            before = refused(limit)
            with pytest.raises(Overloaded) as caught:
                await client.execute(Notebook, "acme-3", Note("a"), timeout=0.4)
            assert caught.value.message == says
            assert caught.value.retry_after is not None
            assert 0.4 < caught.value.retry_after <= 2.1
            if limit == "per_key":
                await client.execute(Notebook, "other-1", Note("a"), timeout=0.4)
            # refused once more, the client waits for `retry_after`, and its first repetition takes effect
            assert (await client.execute(Notebook, "acme-3", Note("a"))).version == 1
            assert refused(limit) - before == 2
    finally:
        await service.stop()


@pytest.mark.setting("commands.pending_per_aggregate")
async def test_a_hot_aggregate_is_refused_alone(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One id gets 90 % of a flood, more than may be under way for one id: no other id is refused for it."""
    async with running(app_name, tmp_path, nats_url, commands__pending_per_aggregate=50) as here:
        gateway, admission = here.service.parts.gateway, here.service.parts.admission
        turned_away: list[str] = []
        most = 0
        turn_away = admission._turn_away

        def watched(address: Address, *rest: Any) -> None:
            nonlocal most
            turned_away.append(address.id)
            resident = gateway.residents.find(address.subject)
            assert resident is not None
            most = max(most, resident.commands)
            turn_away(address, *rest)

        monkeypatch.setattr(admission, "_turn_away", watched)

        async def send(name: str) -> None:
            await here.client.execute(Notebook, name, Note("a"), timeout=60)

        await asyncio.gather(*(send("hot" if n % 10 else f"cold{n % 200}") for n in range(1_000)))
        assert set(turned_away) == {"hot"}
        assert most == 50
        await here.client.query("select 1", after=await here.client.execute(Notebook, "hot", Note("a")))
        rows = await here.client.query("select notes from pages where notebook = 'hot'")
        assert rows == [{"notes": 901}]
        assert gateway.pending.total == 0
        assert all(resident.commands == 0 for resident in gateway.residents.all())


async def test_others_overtake_a_hot_aggregate(nats_url: str, app_name: str, tmp_path: Path) -> None:
    """Commands for other ids are answered before thousands of earlier ones for one id on the same connection."""
    async with running(app_name, tmp_path, nats_url, commands__pending_per_aggregate=5_000) as here:
        client = here.client
        await here.note(20, ids=20)
        await client.execute(Notebook, "hot", Note("a"))
        answered: list[str] = []

        async def send(name: str) -> None:
            await client.execute(Notebook, name, Note("a"), timeout=60)
            answered.append(name)

        await asyncio.gather(*(send("hot") for _ in range(3_000)), *(send(f"n{n % 20}") for n in range(300)))
        last_of_others = max(place for place, name in enumerate(answered) if name != "hot")
        behind = sum(name == "hot" for name in answered[last_of_others:])
        assert behind > 1_500, f"only {behind} of the hot aggregate's came after the others"


async def test_where_a_limit_does_not_reach_for_all_few_commands_come_before_many(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(app_name, tmp_path, nats_url, rates__commands={"rate": 1.0, "burst": 30}) as here:
        answers: dict[bytes, bytes] = {}
        monkeypatch.setattr(
            here.service.parts.outbox, "publish", lambda subject, payload: answers.update({subject: payload})
        )
        subject = f"{app_name}.cmd".encode()
        names = ["hot"] * 200 + [f"cold{n}" for n in range(20)]
        for place, name in enumerate(names):
            request = {"aggregate": "Notebook", "id": name, "command": "Note", "data": {"text": "a"}}
            here.service.parts.admission.receive(
                subject, f"_INBOX.{name}.{place}".encode(), json.dumps(request).encode(), None
            )
        async with asyncio.timeout(10):
            while len(answers) < len(names):
                await asyncio.sleep(0)
        let_in = [token.decode().split(".")[1] for token, answer in answers.items() if b'"ok"' in answer]
        assert sorted(let_in) == sorted(["hot"] * 10 + [f"cold{n}" for n in range(20)])


# changed while running


async def test_limits_are_changed_on_all_running_workers_and_adopted_by_later_ones(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    database = f"sqlite:///{tmp_path / 'p.db'}"

    def made(number: int) -> Service:
        settings = settings_for(tmp_path / str(number), nats=nats_url, database=database, lease=5.0)
        return Service(tenants(app_name), settings)

    def commands(service: Service) -> float | None:
        rate: float | None = service.status()["limits"]["lanes"]["commands"]["present"]
        return rate

    services = [made(n) for n in range(2)]
    connection = await connect(nats_url, name="operator")
    subject = subjects_of(app_name, services[0].settings).service("limits")

    async def set_limits(at: float, **values: float | None) -> list[dict[str, Any]]:
        overrides = {name.replace("__", "."): value for name, value in values.items()}
        answers, silent = await survey(connection, subject, json.dumps({"overrides": overrides, "at": at}).encode())
        assert silent == []
        return answers

    try:
        for service in services:
            await service.start()
        await wait_until(lambda: [len(service.partitions) for service in services] == [32, 32])
        assert len(await set_limits(1, commands__rate=100, per_key__rate=20)) == 2
        # each worker has its share of the limit
        await wait_until(lambda: [commands(service) for service in services] == [50, 50])
        # an override that a worker can't take changes nothing
        assert all(
            "no aggregate" in answer["error"]
            for answer in await set_limits(2, live__rate=5, per_aggregate__Book__rate=1)
        )
        assert [commands(service) for service in services] == [50, 50]
        services.append(made(2))
        await services[2].start()
        await wait_until(lambda: all(len(service.partitions) in (21, 22) for service in services))
        await wait_until(lambda: round(sum(commands(service) or 0 for service in services), 3) == 100)
        assert services[2].status()["limits"]["fixed"]["per_key"]["rate"] == 20
        await set_limits(3)
        assert [commands(service) for service in services] == [None] * 3
    finally:
        await connection.close()
        for service in services:
            await service.stop()


async def test_a_worker_that_was_away_when_limits_were_set_has_them_when_it_is_back(
    nats_url: str, app_name: str, tmp_path: Path, wait_until: Wait
) -> None:
    database = f"sqlite:///{tmp_path / 'p.db'}"
    services = [
        Service(tenants(app_name), settings_for(tmp_path / str(n), nats=nats_url, database=database)) for n in range(2)
    ]
    try:
        for service in services:
            await service.start()
        first, second = (service.parts.governor for service in services)
        first.answer(b'{"overrides":{"commands.rate":7},"at":5}')
        assert not second.limiting
        await services[1].parts.connection.force_reconnect()
        await wait_until(lambda: second.rates.commands.rate == 7)
    finally:
        for service in services:
            await service.stop()


def test_the_command_line_shows_sets_and_resets_limits(tmp_path: Path) -> None:
    shell = Shell(tmp_path)
    shell.start()
    try:
        output = shell("limits", "set", "commands=500", "commands.burst=800", "per_aggregate.Account=0.5", "rebuild=9")
        assert "until the service restarts" in output
        assert "per_aggregate.Account" in output
        lanes = json.loads(shell("limits", "--json"))["workers"][0]["limits"]["lanes"]
        assert (lanes["commands"]["rate"], lanes["commands"]["burst"], lanes["rebuild"]["rate"]) == (500, 800, 9)
        shell("send", "Account", "anna", "Deposit", "cents=1")
        # overrides that are set later are added, all of them or none
        for wrong, says in (
            ("per_aggregate.Acount=1", "it has Account"),
            ("live=fast", "write it as"),
        ):
            assert says in shell("limits", "set", "live=7", wrong, code=2)
        shell("limits", "set", "rebuild=none")
        lanes = json.loads(shell("limits", "--json"))["workers"][0]["limits"]["lanes"]
        assert (lanes["commands"]["rate"], lanes["live"]["rate"], lanes["rebuild"]["rate"]) == (500, None, None)
        report = json.loads(shell("limits", "reset", "--json"))["workers"][0]["limits"]
        assert report["overrides"]["values"] == {}
        assert report["lanes"]["commands"]["rate"] is None
        assert "behind `set`" in shell("limits", "--app", "bank", "set", "live=1", code=2)
        assert "until the service restarts" in " ".join(shell("limits", "set", "--help").split())
    finally:
        shell.stop()
    assert "no service" in shell("limits", code=3)
