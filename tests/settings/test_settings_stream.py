"""Each field of the stream as the server shows it and by its effect; the treatment of an existing stream."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from kernel import Client, Service
from kernel.errors import LogError, StreamMismatch, Unavailable
from kernel.log import JetStreamLog
from kernel.transport.connection import NatsConnection
from kernel.transport.dial import dial
from kernel.transport.jetstream_api import call_api
from tests.apps import Note, Notebook, notebooks
from tests.commands import eskernel
from tests.conftest import open_log, settings_for
from tests.failing import api, change_stream, running
from tests.servers import cluster, server

Wait = Callable[..., Any]


@pytest.fixture(params=["2.15", "2.10"])
def url(request: pytest.FixtureRequest) -> str:
    """A running server of each version."""
    found: str = request.getfixturevalue("nats_url" if request.param == "2.15" else "old_nats_url")
    return found


@asynccontextmanager
async def opened(url: str, app: str, **values: Any) -> AsyncIterator[tuple[NatsConnection, JetStreamLog]]:
    connection = await dial(settings_for(Path(), nats=url), name="test")
    try:
        log = await open_log(connection, app, **values)
        try:
            yield connection, log
        finally:
            await log.close()
    finally:
        await connection.close()


async def config_of(url: str, stream: str) -> dict[str, Any]:
    async with api(url) as call:
        found: dict[str, Any] = (await call(f"STREAM.INFO.{stream}"))["config"]
        return found


async def append(log: JetStreamLog, *ids: str, size: int = 10) -> list[Any]:
    subjects = [log.subjects.address("Notebook", aggregate_id).subject for aggregate_id in ids]
    return await asyncio.gather(
        *(log.append(subject, 0, subject.encode().ljust(size, b".")) for subject in subjects), return_exceptions=True
    )


async def made(url: str, app: str, **values: Any) -> dict[str, Any]:
    async with opened(url, app, **values):
        return await config_of(url, values.get("stream__name", app))


MAY_LOSE = {"stream__may_lose_events": True}
FIELDS: list[tuple[str, Any, str, Any, dict[str, Any]]] = [
    ("storage", "memory", "storage", "memory", {}),
    ("storage", "file", "storage", "file", {}),
    ("replicas", 1, "num_replicas", 1, {}),
    ("max_age", 3600.5, "max_age", 3_600_500_000_000, MAY_LOSE),
    ("max_bytes", "1MiB", "max_bytes", 1024 * 1024, {}),
    ("max_messages", 100, "max_msgs", 100, {}),
    ("discard", "old", "discard", "old", {**MAY_LOSE, "stream__max_messages": 5}),
    ("discard", "new", "discard", "new", {}),
    ("compression", "s2", "compression", "s2", {}),
    ("retention", "limits", "retention", "limits", {}),
    ("partitions", 8, "description", "eskernel format=1 partitions=8", {}),
]


@pytest.mark.setting(
    "stream.storage", "stream.replicas", "stream.max_age", "stream.max_bytes", "stream.max_messages",
    "stream.discard", "stream.compression", "stream.retention", "stream.partitions",
)  # fmt: skip
@pytest.mark.parametrize(("name", "value", "field", "shown", "more"), FIELDS)
async def test_the_server_shows_what_was_set(
    url: str, app_name: str, name: str, value: Any, field: str, shown: Any, more: dict[str, Any]
) -> None:
    config = await made(url, app_name, **{f"stream__{name}": value}, **more)
    assert config.get(field) == shown


async def test_without_settings_nothing_is_limited(url: str, app_name: str) -> None:
    config = await made(url, app_name)
    assert (config["max_bytes"], config["max_msgs"], config["max_age"]) == (-1, -1, 0)
    assert (config["discard"], config["retention"], config["storage"]) == ("new", "limits", "file")
    assert config["deny_delete"]
    assert config["deny_purge"]


# full streams


@pytest.mark.setting("stream.max_messages", "stream.max_bytes", "stream.discard")
@pytest.mark.parametrize("limit", [{"stream__max_messages": 5}, {"stream__max_bytes": 4096}], ids=str)
async def test_a_full_stream_refuses_and_loses_nothing(url: str, app_name: str, limit: dict[str, Any]) -> None:
    async with opened(url, app_name, **limit) as (_, log):
        outcomes = await append(log, *(f"n{n}" for n in range(30)), size=300)
        taken = [outcome for outcome in outcomes if isinstance(outcome, int)]
        refused = [outcome for outcome in outcomes if not isinstance(outcome, int)]
        assert taken
        assert len(refused) >= 15
        assert all(type(error) is Unavailable and "full" in str(error) for error in refused)
        info = await log.info()
        assert (info.first, info.last, info.commits) == (1, len(taken), len(taken))


@pytest.mark.setting("stream.discard", "stream.may_lose_events")
async def test_a_full_stream_that_may_lose_events_drops_the_first_ones(
    url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    values: dict[str, Any] = {"stream__max_messages": 5, "stream__discard": "old", **MAY_LOSE}
    async with opened(url, app_name, **values) as (_, log):
        assert "may delete events" in caplog.text
        assert await append(log, *(f"n{n}" for n in range(12))) == list(range(1, 13))
        info = await log.info()
        assert (info.first, info.last) == (8, 12)


@pytest.mark.setting("stream.max_age", "stream.may_lose_events")
async def test_old_events_go_where_that_was_asked_for_twice(url: str, app_name: str, wait_until: Wait) -> None:
    async with opened(url, app_name, stream__max_age=0.3, **MAY_LOSE) as (_, log):
        await append(log, "n")

        async def gone() -> bool:
            return (await log.info()).commits == 0

        await wait_until(gone)


@pytest.mark.setting("stream.compression")
async def test_a_compressed_store_is_smaller(tmp_path: Path, app_name: str, binary: str) -> None:
    sizes = {}
    async with server(tmp_path, binary=binary) as nats:
        for how in ("none", "s2"):
            async with opened(nats.url, f"{app_name}-{how}", stream__compression=how) as (_, log):
                for start in range(0, 60, 20):
                    await append(log, *(f"n{n}" for n in range(start, start + 20)), size=500_000)
        await nats.stop()  # the last block is compressed when it is closed
        for how in sizes.fromkeys(("none", "s2")):
            blocks = tmp_path.rglob(f"{app_name}-{how}/msgs/*.blk")
            sizes[how] = sum(block.stat().st_size for block in blocks)
    assert sizes["s2"] < sizes["none"] / 2


@pytest.mark.setting("stream.storage")
async def test_memory_ends_with_the_server_which_is_said_at_start(tmp_path: Path, app_name: str, binary: str) -> None:
    async with server(tmp_path, binary=binary) as nats:
        async with opened(nats.url, app_name, stream__storage="memory") as (_, log):
            await append(log, "n")
            assert "end with it" in (await log.info()).durability
        await nats.stop()
        await nats.start()
        async with opened(nats.url, app_name, stream__storage="memory") as (_, log):
            assert (await log.info()).commits == 0


@pytest.mark.setting("stream.replicas")
async def test_replicas_are_on_the_set_number_of_servers_and_can_be_raised(
    tmp_path: Path, app_name: str, wait_until: Wait
) -> None:
    async with cluster(tmp_path) as members:
        url = members[0].url
        async with opened(url, app_name) as (_, log):
            await append(log, "n")
        async with opened(url, app_name, stream__replicas=3, stream__existing="update") as (connection, log):
            assert "majority of 3 servers" in (await log.info()).durability

            async def followed() -> bool:
                found = (await call_api(connection, f"STREAM.INFO.{app_name}", None)).get("cluster", {}).get(
                    "replicas"
                ) or []
                return len(found) == 2 and all(replica.get("current") for replica in found)

            await wait_until(followed, timeout=40)
            assert (await log.info()).commits == 1


@pytest.mark.setting("stream.replicas")
async def test_more_replicas_than_servers_are_refused_with_the_servers_reason(url: str, app_name: str) -> None:
    with pytest.raises(LogError, match="replicas"):
        await made(url, app_name, stream__replicas=3)


@pytest.mark.setting("stream.sync")
async def test_the_embedded_server_syncs(tmp_path: Path, app_name: str) -> None:
    for sync in (True, False):
        service = Service(notebooks(app_name), settings_for(tmp_path / str(sync), sync=sync))
        await service.start()
        config = (service.directory.path / "nats" / "nats.conf").read_text()
        assert ("sync_interval: always" in config) == sync
        assert ("power cut" in service.durability and "survive a power" in service.durability) == sync
        await service.stop()


# an existing stream

DIFFERENT: dict[str, Any] = {"stream__max_messages": 1000, "stream__compression": "s2"}


@pytest.mark.setting("stream.existing")
async def test_create_keeps_the_stream_and_lists_the_differences(
    url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    before = await made(url, app_name)
    await made(url, app_name, **DIFFERENT)
    assert await config_of(url, app_name) == before
    assert "max_msgs (stream.max_messages) is -1, wanted 1000" in caplog.text
    assert "compression (stream.compression) is 'none', wanted 's2'" in caplog.text
    assert "stream.existing = 'update' changes it" in caplog.text


@pytest.mark.setting("stream.existing")
async def test_update_changes_it_and_says_what(url: str, app_name: str, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(url, app_name) as (_, log):
        await append(log, *(f"n{n}" for n in range(10)))
    config = await made(url, app_name, **DIFFERENT, stream__existing="update")
    assert (config["max_msgs"], config["compression"]) == (1000, "s2")
    assert "max_msgs was -1, is 1000" in caplog.text
    caplog.clear()
    async with opened(url, app_name, **DIFFERENT, stream__existing="update") as (_, log):
        assert (await log.info()).commits == 10
    assert caplog.text == ""


@pytest.mark.setting("stream.existing", "stream.max_age")
async def test_update_takes_a_short_age_where_that_was_asked_for_twice(url: str, app_name: str) -> None:
    await made(url, app_name)
    config = await made(url, app_name, stream__max_age=10, stream__existing="update", **MAY_LOSE)
    assert config["max_age"] == 10_000_000_000


@pytest.mark.setting("stream.existing")
@pytest.mark.parametrize(
    "less",
    [
        {"stream__max_messages": 9},
        {"stream__max_bytes": 100},
        {"stream__max_messages": 9, "stream__discard": "old", **MAY_LOSE},
    ],
    ids=str,
)
async def test_update_never_makes_the_stream_smaller_than_what_it_holds(
    url: str, app_name: str, less: dict[str, Any]
) -> None:
    async with opened(url, app_name) as (_, log):
        await append(log, *(f"n{n}" for n in range(10)))
    before = await config_of(url, app_name)
    with pytest.raises(StreamMismatch, match=r"holds \d+ already.*nothing was changed"):
        await made(url, app_name, **less, stream__existing="update")
    assert await config_of(url, app_name) == before


@pytest.mark.setting("stream.existing", "stream.storage")
@pytest.mark.parametrize("how", ["create", "update", "validate"])
async def test_a_field_that_can_not_be_changed_is_an_error(url: str, app_name: str, how: str) -> None:
    await made(url, app_name)
    with pytest.raises(StreamMismatch, match=r"storage \(stream.storage\) is 'file', wanted 'memory'"):
        await made(url, app_name, stream__storage="memory", stream__existing=how)


@pytest.mark.setting("stream.existing", "stream.partitions")
async def test_validate_changes_and_makes_nothing(url: str, app_name: str) -> None:
    with pytest.raises(StreamMismatch, match="never creates it"):
        await made(url, app_name, stream__existing="validate")
    before = await made(url, app_name)
    assert await made(url, app_name, stream__existing="validate") == before
    with pytest.raises(StreamMismatch, match=r"max_msgs \(stream.max_messages\).*compression") as caught:
        await made(url, app_name, **DIFFERENT, stream__existing="validate")
    assert str(caught.value).count("wanted") == 2
    with pytest.raises(StreamMismatch, match=r"partitions \(stream.partitions\) is 64, wanted 8"):
        await made(url, app_name, partitions=8, stream__existing="validate")
    assert await config_of(url, app_name) == before


@pytest.mark.setting("stream.existing")
async def test_skip_accepts_the_existing_stream(url: str, app_name: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StreamMismatch, match="never creates it"):
        await made(url, app_name, stream__existing="skip")
    await made(url, app_name)
    await change_stream(url, app_name, max_age=3600 * 10**9)
    with pytest.raises(StreamMismatch, match="would lose events"):
        await made(url, app_name)
    caplog.clear()
    config = await made(url, app_name, **DIFFERENT, stream__existing="skip")
    assert (config["max_age"], config["compression"]) == (3600 * 10**9, "none")
    assert "max_age" not in caplog.text


@pytest.mark.setting("stream.may_lose_events", "stream.max_age")
@pytest.mark.parametrize("how", ["create", "validate"])
async def test_a_stream_that_others_configured_to_lose_events_is_refused(url: str, app_name: str, how: str) -> None:
    await made(url, app_name)
    await change_stream(url, app_name, max_age=3600 * 10**9)
    with pytest.raises(StreamMismatch, match="max_age"):
        await made(url, app_name, stream__existing=how)


@pytest.mark.setting("stream.existing")
async def test_update_takes_back_what_would_lose_events(url: str, app_name: str) -> None:
    await made(url, app_name)
    await change_stream(url, app_name, max_age=3600 * 10**9)
    assert (await made(url, app_name, stream__existing="update"))["max_age"] == 0


@pytest.mark.setting("stream.partitions")
async def test_the_partition_count_is_that_of_the_stream(
    url: str, app_name: str, caplog: pytest.LogCaptureFixture
) -> None:
    await made(url, app_name, partitions=8)
    async with opened(url, app_name, partitions=16) as (_, log):
        assert log.subjects.partitions == 8
    assert "has 8 partitions, not 16" in caplog.text
    caplog.clear()
    async with opened(url, app_name) as (_, log):
        assert log.subjects.partitions == 8
    assert caplog.text == ""


# names


@pytest.mark.setting("stream.name", "stream.subject_prefix")
@pytest.mark.parametrize(
    ("url", "database_url", "prefix"),
    [("2.15", "postgresql", "acme.billing.v2"), ("2.10", "sqlite", "acme.billing.v2"), ("2.10", "postgresql", "acme")],
    indirect=["url", "database_url"],
)
async def test_a_stream_may_have_another_name_and_other_subjects(
    url: str, app_name: str, tmp_path: Path, prefix: str, database_url: str
) -> None:
    values: dict[str, Any] = {"stream__name": f"{app_name}-events", "stream__subject_prefix": f"{prefix}.{app_name}"}
    async with running(app_name, tmp_path, url, database_url, **values) as service:
        settings = service.service.settings
        async with await Client.connect(notebooks(app_name), settings) as client:
            receipts = await asyncio.gather(*(client.execute(Notebook, f"n{n}", Note("a")) for n in range(20)))
            rows = await client.query("select count(*) as n from pages", after=receipts)
            assert rows == [{"n": 20}]
        config = await config_of(url, f"{app_name}-events")
        assert config["subjects"] == [f"{prefix}.{app_name}.evt.>"]
        with pytest.raises(Unavailable):
            await Client.connect(notebooks(app_name), settings_for(tmp_path, nats=url))
        file = tmp_path / "eskernel.toml"
        file.write_text("[stream]\n" + "".join(f'{n.split("__")[1]} = "{v}"\n' for n, v in values.items()))
        output = await cli(tmp_path, app_name, url, database_url, "rebuild", "Pages", "--json")
        assert json.loads(output)[0]["events"] == 20
        assert "n3" in await cli(tmp_path, app_name, url, database_url, "show", "Notebook", "n3")
        status = json.loads(await cli(tmp_path, app_name, url, database_url, "status", "--json"))
        assert status["ready"]
        await cli(tmp_path, app_name, url, database_url, "send", "Notebook", "n3", "Note", "text=b")


async def cli(folder: Path, app: str, url: str, database: str, *arguments: str) -> str:
    """Run a command with the settings of the folder's file."""
    where = ["--app", "tests.failing:app", "--nats", url, "--database", database]
    done = await asyncio.to_thread(eskernel, *arguments, *where, folder=folder, FAILING_APP=app, COLUMNS="200")
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.setting("stream.name", "stream.subject_prefix")
async def test_one_app_may_run_twice_on_a_server(
    nats_url: str, app_name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    other: dict[str, Any] = {"stream__name": f"{app_name}-b", "stream__subject_prefix": f"{app_name}-b"}
    async with running(app_name, tmp_path / "a", nats_url) as neighbour:
        service = Service(notebooks(app_name), settings_for(tmp_path / "b", nats=nats_url, drain=2.0, **other))
        await service.start()
        try:
            assert len(service.partitions) == len(neighbour.service.partitions) == 64
            assert service.status()["workers"] == [service.worker]
            async with await Client.connect(service.app, service.settings) as client:
                await client.execute(Notebook, "n", Note("b"))
            assert (await neighbour.service.parts.log.info()).commits == 0
        finally:
            await service.stop()
