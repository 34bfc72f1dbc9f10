"""Users with the permissions that `eskernel config permissions` prints, on a server that enforces them.

What must work works, and what must not is refused. One server and one service for most of it: starting takes the time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import nats
import pytest

from kernel import App, Client, Rebuild, Service
from kernel.cli.config import KINDS
from kernel.errors import CommandError, Unavailable
from kernel.partitions.bucket import bucket_of
from kernel.permissions import find_missing, permissions_of, share_of
from kernel.preflight import examine
from kernel.settings import Settings
from kernel.transport.dial import dial
from kernel.transport.survey import survey
from projections.database import open_database
from tests.apps import Note, Notebook, notebooks
from tests.conftest import settings_for
from tests.servers import Server, server

Wait = Callable[..., Any]


def users(app: App, settings: Settings, **extra: str) -> str:
    """Return the configuration of a server with a user of each kind, an omnipotent one, and others."""
    lines = ["{ user: root, password: pw }"]
    for kind in KINDS:
        lines.append(
            f"{{ user: {kind}, password: pw, permissions: {permissions_of(kind, app, settings).as_config()} }}"
        )
    lines += [f"{{ user: {name}, password: pw, permissions: {given} }}" for name, given in extra.items()]
    return f"authorization {{ users: [{', '.join(lines)}] }}\n"


def settings_of(user: str, url: str, data: Path, **values: Any) -> Settings:
    return settings_for(data, nats=url, security__user=user, security__password="pw", **values)


@pytest.fixture
async def enforcing(app_name: str, tmp_path: Path) -> AsyncIterator[tuple[App, Server]]:
    """A server that enforces the printed permissions, alice's own inbox among them."""
    app = notebooks(app_name)
    alice = permissions_of("client", app, settings_for(tmp_path, connection__inbox_prefix=f"{app_name}.inbox.alice"))
    async with server(tmp_path / "nats", users(app, settings_for(tmp_path), alice=alice.as_config())) as running:
        yield app, running


@asynccontextmanager
async def plain(url: str, user: str) -> AsyncIterator[tuple[Any, list[str]]]:
    """A connection of plain nats-py, and what the server refuses it."""
    refused: list[str] = []

    async def note(error: Exception) -> None:
        refused.append(str(error))

    connection = await nats.connect(url, user=user, password="pw", error_cb=note)
    try:
        yield connection, refused
    finally:
        await connection.close()


async def test_what_must_work_works_and_what_must_not_is_refused(
    enforcing: tuple[App, Server], tmp_path: Path, wait_until: Wait
) -> None:
    app, running = enforcing
    url, name = running.url, app.name
    # from nothing: the stream, the leases and the tables do not exist
    async with Service(app, settings_of("service", url, tmp_path / "data")) as service:
        parts = service.parts
        database = service.database_url
        # a client: commands, and queries that have its own writes; it does not know the partitions
        sent: list[str] = []

        async def note(message: Any) -> None:
            sent.append(message.subject)

        root = await nats.connect(url, user="root", password="pw")
        await root.subscribe(f"{name}.cmd", cb=note)
        await root.flush()
        own = settings_of("alice", url, tmp_path, connection__inbox_prefix=f"{name}.inbox.alice", database=database)
        for settings in (settings_of("client", url, tmp_path, database=database), own):
            async with await Client.connect(app, settings) as client:
                receipt = await client.execute(Notebook, f"of-{settings.security.user}", Note("a"))
                (found,) = await client.query("SELECT count(*) AS n FROM pages", after=receipt)
                assert (receipt.version, found["n"] > 0) == (1, True)
                with pytest.raises(Unavailable, match="may not read the log"):
                    _ = client.log
        await wait_until(lambda: len(sent) == 2)
        await root.close()
        # an operator: status, limits, a rebuild
        operator = settings_of("operator", url, tmp_path)
        connection = await dial(operator, app=name, role="operator", name="operator")
        for subject, payload in (("status", b""), ("limits", b'{"rebuilt": 0}')):
            (answer,), silent = await survey(connection, f"{name}.svc.{subject}", payload)
            assert (answer["worker"], silent) == (service.worker, [])
        await connection.close()
        operator = settings_of("operator", url, tmp_path, connection__inbox_prefix=f"{name}.inbox.operator")
        async with await Client.connect(app, operator) as client:
            engine = open_database(database)
            built = await Rebuild(app, client.log, engine, app.projections).run()
            engine.dispose()
            assert [rebuilt.events for rebuilt in built] == [2] * len(app.projections)
        # monitoring: the status
        settings = settings_of("monitoring", url, tmp_path, connection__inbox_prefix=f"{name}.inbox.monitoring")
        monitoring = await dial(settings, app=name, role="operator", name="monitoring")
        (answer,), _ = await survey(monitoring, f"{name}.svc.status")
        assert answer["worker"] == service.worker
        await monitoring.close()

        before = await parts.log.info()
        for user, publishes, subscribes in (
            (
                "client",
                ["svc.limits", "evt.0.Notebook.x", "snap.0.Notebook.x"],
                ["evt.>", "cmd", "svc.>"],
            ),
            ("alice", ["svc.limits", "inbox.service.x", "inbox.client.x"], ["inbox.client.>", "inbox.>"]),
            ("monitoring", ["svc.limits", "cmd", "cmd.0", "evt.0.Notebook.x"], ["inbox.operator.>", "inbox.service.>"]),
            ("operator", ["evt.0.Notebook.x", "inbox.service.x"], ["inbox.service.>", "inbox.alice.>", "cmd"]),
            ("service", [], ["inbox.client.>", "inbox.operator.>", "evt.>"]),
        ):
            bucket = bucket_of(name)
            foreign = [f"$KV.{bucket}.w.ghost", f"$JS.API.STREAM.PURGE.{name}", f"$JS.API.STREAM.DELETE.{name}"]
            if user in ("client", "alice", "monitoring"):
                # its answer goes anywhere, with JetStream's own rights
                foreign += [f"$JS.API.STREAM.INFO.{name}", f"$JS.API.STREAM.MSG.GET.KV_{bucket}", "$JS.API.INFO"]
            if user == "service":
                del foreign[0]
            published = [*(f"{name}.{subject}" for subject in publishes), *foreign]
            subscribed = [*(f"{name}.{subject}" for subject in subscribes), "_INBOX.>", ">", f"$KV.{bucket}.>"]
            async with plain(url, user) as (connection, refused):
                for subject in published:
                    await connection.publish(subject, b"{}", reply=f"{name}.evt.0.Notebook.forged")
                for subject in subscribed:
                    await connection.subscribe(subject)
                await connection.flush()
                await wait_until(lambda refused=refused, wanted=published + subscribed: len(refused) >= len(wanted))
                for subject in published:
                    assert any(f'publish to "{subject.lower()}"' in line for line in refused), (user, subject)
                for subject in subscribed:
                    assert any(f'subscription to "{subject.lower()}"' in line for line in refused), (user, subject)
        after = await parts.log.info()
        assert (after.last, after.commits) == (before.last, before.commits)
        assert service.failure == ""


async def test_a_service_that_lacks_a_permission_says_which_at_start_and_at_a_check(
    app_name: str, tmp_path: Path
) -> None:
    app, settings = notebooks(app_name), settings_for(tmp_path)
    service = permissions_of("service", app, settings)
    inbox = f"{app_name}.inbox.service.>"
    deaf = service._replace(subscribe=tuple(subject for subject in service.subscribe if subject != inbox))
    aloof = service._replace(subscribe=tuple(subject for subject in service.subscribe if ".svc." not in subject))
    creation = f"$JS.API.STREAM.CREATE.{app_name}"
    mute = service._replace(publish=tuple(subject for subject in service.publish if subject != creation))
    lacking = {"deaf": deaf, "aloof": aloof, "mute": mute}
    extra = {name: permissions.as_config() for name, permissions in lacking.items()}
    async with server(tmp_path / "nats", users(app, settings, **extra)) as running:
        for user, named in (("deaf", inbox), ("mute", creation), ("aloof", f"{app_name}.svc.")):
            with pytest.raises(Unavailable) as refused:
                async with asyncio.timeout(4):  # less than the time-out of a request
                    await Service(app, settings_of(user, running.url, tmp_path / user)).start()
            assert named in str(refused.value)
            assert "may not" in str(refused.value)
        for user, subject in (("deaf", inbox), ("mute", creation), ("aloof", f"{app_name}.svc.>")):
            # the stream exists meanwhile
            findings = await examine(app, settings_of(user, running.url, tmp_path / user, database="sqlite://"))
            lacks = [finding for finding in findings if finding.what.startswith("permissions")]
            assert [subject in finding.detail for finding in lacks] == [True], (user, lacks)
            assert lacks[0].level == ("warning" if user == "mute" else "error")
            assert "eskernel config permissions" in lacks[0].remedy
        before = await _stored(running.url, app_name)
        connection = await dial(settings_of("service", running.url, tmp_path), app=app_name, role="service", name="t")
        assert await find_missing(connection, app, settings) == []
        await connection.close()
        assert await _stored(running.url, app_name) == before, "a check has stored something"


async def _stored(url: str, app: str) -> list[Any]:
    async with plain(url, "root") as (connection, _):
        found = []
        for stream in (app, f"KV_{bucket_of(app)}"):
            answer = json.loads((await connection.request(f"$JS.API.STREAM.INFO.{stream}", b"", timeout=5)).data)
            state = answer["state"]
            found.append((answer["config"], state.get("num_subjects", 0), state["consumer_count"]))
            if stream == app:
                found.append(state["last_seq"])
        return found


async def test_readers_of_an_account_of_their_own_read_and_change_nothing(app_name: str, tmp_path: Path) -> None:
    app = notebooks(app_name)
    share = share_of(app, settings_for(tmp_path))
    config = (
        "accounts { APP { jetstream: enabled, users: [{ user: root, password: pw }]\n"
        f"exports: [\n{share.as_exports()}\n] }}\n"
        f"READERS {{ users: [{{ user: reader, password: pw }}]\nimports: [\n{share.as_imports('APP')}\n] }} }}\n"
    )
    async with (
        server(tmp_path / "nats", config) as running,
        Service(app, settings_of("root", running.url, tmp_path)) as service,
    ):
        async with await Client.connect(app, settings_of("root", running.url, tmp_path)) as client:
            await client.execute(Notebook, "n", Note("a"))
        settings = settings_of("reader", running.url, tmp_path, jetstream__api_prefix=share.prefix)
        async with await Client.connect(app, settings) as reader:
            address = reader.log.subjects.address("Notebook", "n")
            (stored,) = await reader.log.read_subject(address.subject)
            last = await reader.log.last(address.subject)
            assert last is not None
            assert (last.sequence, (await reader.log.info()).commits) == (stored.sequence, 1)
        async with plain(running.url, "reader") as (connection, _):
            for subject in (*(f"{share.prefix}.{request}" for request in share.requests), f"{app_name}.cmd"):
                await connection.publish(subject, b'{"seq": 1}', reply=f"{app_name}.evt.0.Notebook.forged")
            await connection.publish(f"{app_name}.evt.0.Notebook.forged", b"{}")
            await connection.flush()
            with pytest.raises(nats.errors.NoRespondersError):
                await connection.request(f"{share.prefix}.CONSUMER.CREATE.{app_name}.c", b"{}", timeout=5)
            await connection.request(f"{share.prefix}.{share.requests[0]}", b"", timeout=5)
        assert (await service.parts.log.info()).last == 1


async def test_a_client_of_another_account_sends_to_what_it_imports(app_name: str, tmp_path: Path) -> None:
    app = notebooks(app_name)
    commands = (f"{app_name}.cmd", f"{app_name}.cmd.>")
    exports = ", ".join(f'{{ service: "{subject}" }}' for subject in commands)
    imports = ", ".join(f'{{ service: {{ account: APP, subject: "{subject}" }} }}' for subject in commands)
    config = (
        f"accounts {{ APP {{ jetstream: enabled, users: [{{ user: root, password: pw }}], exports: [{exports}] }}\n"
        f"SHOP {{ users: [{{ user: shop, password: pw }}], imports: [{imports}] }} }}\n"
    )
    async with (
        server(tmp_path / "nats", config) as running,
        Service(app, settings_of("root", running.url, tmp_path)),
        await Client.connect(app, settings_of("shop", running.url, tmp_path)) as client,
    ):
        assert (await client.execute(Notebook, "n", Note("a"))).version == 1


async def test_a_client_without_an_inbox_is_told_which_permission_it_lacks(app_name: str, tmp_path: Path) -> None:
    app = notebooks(app_name)
    config = (
        "authorization { users: [{ user: old, password: pw, permissions: "
        '{ publish: ">", subscribe: "_INBOX.>" } }, { user: root, password: pw }] }\n'
    )
    async with server(tmp_path / "nats", config) as running:
        with pytest.raises(Unavailable, match=rf"may not subscribe to {app_name}\.inbox\.client\.>.*inbox_prefix"):
            await Client.connect(app, settings_of("old", running.url, tmp_path))
        async with Service(app, settings_of("root", running.url, tmp_path)):
            old = settings_of("old", running.url, tmp_path, connection__inbox_prefix="_INBOX")
            async with await Client.connect(app, old) as client:
                assert (await client.execute(Notebook, "n", Note("a"))).version == 1
                with pytest.raises(CommandError, match="has no command"):
                    await client.send({"aggregate": "Notebook", "id": "n", "command": "Nope", "command_id": "c"})
