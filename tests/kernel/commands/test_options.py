"""What may be said of a command beside its fields: for which version it is, whose it is, and what it shall return."""

# no postponed annotations here: handlers of the app below are read with their annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from aggregates import (
    Aggregate,
    Context,
    InvalidMessage,
    Meta,
    Rejected,
    Send,
    applies,
    command,
    event,
    handles,
    scenario,
)
from aggregates.commit import Decision, decode
from aggregates.declaration import declare
from aggregates.messages import dumps
from aggregates.origin import Origin
from aggregates.reacting import Due
from kernel import App, Client, Service
from kernel.errors import CommandError, NotReturned, VersionConflict
from kernel.protocol import decode_request, origin_of
from kernel.reactions import requests
from projections import Rows, projected
from tests.conftest import settings_for
from tests.histories import encode

NOON = datetime(2013, 1, 1, 12, tzinfo=UTC)


@command
class Sign:
    text: str = ""
    times: int = 1


@event
class Signed:
    text: str
    seen: str


class Paper(Aggregate):
    signatures: int = 0
    texts: tuple[str, ...] = ()

    @handles
    def sign(self, command: Sign, context: Context) -> list[Signed]:
        if command.text == "forged":
            raise Rejected("forged")
        if command.text == "torn":
            raise ZeroDivisionError("torn")
        seen = f"{context.actor}/{context.tenant}/{dict(context.metadata)}/{context.occurred_at == context.now}"
        return [Signed(command.text, seen)] * command.times

    @applies
    def signed(self, event: Signed) -> None:
        self.signatures += 1
        self.texts = (*self.texts, event.text)


class Drawer(Aggregate):
    """Its state is not what its fields say."""

    signed_times: int = 0

    @handles
    def sign(self, command: Sign) -> Signed:
        return Signed(command.text, "")

    @applies
    def signed(self, event: Signed) -> None:
        self.open = True


class Base(DeclarativeBase):
    pass


class Signature(Base):
    __tablename__ = "signatures"
    paper: Mapped[str] = mapped_column(primary_key=True)
    actor: Mapped[str] = mapped_column(default="")
    tenant: Mapped[str] = mapped_column(default="")
    request: Mapped[str] = mapped_column(default="")
    year: Mapped[int] = mapped_column(default=0)


class Signatures(Rows[Signature], of=Paper):
    @applies
    def signed(self, row: Signature, event: Signed, meta: Meta) -> None:
        row.actor, row.tenant, row.request = meta.actor, meta.tenant, meta.metadata.get("request", "")
        row.year = meta.occurred_at.year


@pytest.fixture
async def service(nats_url: str, app_name: str, tmp_path: Path) -> AsyncIterator[Service]:
    app = App(app_name, aggregates=[Paper, Drawer], projections=[Signatures])
    service = Service(app, settings_for(tmp_path, nats=nats_url))
    await service.start()
    yield service
    await service.stop()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    async with await Client.connect(service.app, nats=service.nats_url, database=service.database_url) as client:
        yield client


async def stored(client: Client, paper: str) -> list[Any]:
    commits = await client.log.read_subject(client.log.subjects.address("Paper", paper).subject)
    return [envelope for commit in commits for envelope in decode(commit.payload)]


async def test_what_a_sender_says_is_seen_by_handlers_and_projections_and_stays_in_the_log(client: Client) -> None:
    said: Any = {"actor": "alice", "tenant": "acme", "metadata": {"request": "r-1", "ip": "::1"}, "occurred_at": NOON}
    receipt = await client.execute(Paper, "p", Sign(), **said)
    await client.execute(Paper, "q", Sign())
    full, bare = (await stored(client, "p"))[0], (await stored(client, "q"))[0]
    assert (full.actor, full.tenant, full.metadata) == ("alice", "acme", {"request": "r-1", "ip": "::1"})
    assert full.occurred_at == "2013-01-01T12:00:00Z"
    assert b"alice/acme/{'request': 'r-1', 'ip': '::1'}/False" in bytes(full.data)
    assert (bare.actor, bare.tenant, bare.metadata, bare.occurred_at) == (None, None, None, None)
    assert b"//{}/True" in bytes(bare.data)
    rows = await client.query("select * from signatures where paper = 'p'", after=receipt)
    assert rows == [{"paper": "p", "actor": "alice", "tenant": "acme", "request": "r-1", "year": 2013}]


async def test_what_would_be_stored_with_each_event_is_checked(client: Client) -> None:
    options: list[tuple[dict[str, Any], str]] = [
        ({"actor": "a" * 201}, "actor has 201 characters"),
        ({"tenant": "a\nb"}, "control characters"),
        ({"metadata": {"Request": "x"}}, "lower-case"),
        ({"metadata": {"tenant": "x"}}, "reserved"),
        ({"metadata": {"eskernelx": "x"}}, "reserved"),
        ({"metadata": {"a": "x" * 501}}, "501 characters"),
        ({"metadata": {f"a{number}": "x" * 400 for number in range(6)}}, "together"),
        ({"metadata": {"a": "\x85"}}, "control characters"),
        ({"occurred_at": datetime(2013, 1, 1)}, "time zone"),
        ({"occurred_at": datetime.now(UTC) + timedelta(minutes=10)}, "ahead of the service"),
    ]
    for option, names in options:
        with pytest.raises(CommandError, match=names) as refused:
            await client.execute(Paper, "p", Sign(), **option)
        assert refused.value.type == "invalid-command"
    assert await stored(client, "p") == []
    largest: Any = {"actor": "\u3000" * 200, "metadata": {f"a{number}": "x" * 398 for number in range(5)}}
    assert (await client.execute(Paper, "p", Sign(), **largest)).version == 1


async def test_a_failure_in_the_log_names_who_asked(client: Client, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(CommandError, match="torn"):
        await client.execute(Paper, "p", Sign("torn"), actor="alice", tenant="acme")
    (line,) = [record for record in caplog.records if "torn" in record.getMessage()]
    assert (vars(line)["actor"], vars(line)["tenant"]) == ("alice", "acme")


async def test_a_command_takes_effect_only_at_the_version_that_it_is_for(client: Client) -> None:
    assert (await client.execute(Paper, "p", Sign(), if_version=0, command_id="c-1")).version == 1
    for stale in (0, 2):
        with pytest.raises(VersionConflict, match=f"Paper p has version 1, and not {stale}") as refused:
            await client.execute(Paper, "p", Sign(), if_version=stale)
        assert (refused.value.type, refused.value.version) == ("conflict", 1)
    assert (await client.execute(Paper, "p", Sign(), if_version=0, command_id="c-1")).duplicate
    outcomes = await asyncio.gather(
        *(client.execute(Paper, "p", Sign(), if_version=1) for _ in range(20)), return_exceptions=True
    )
    assert [type(outcome) for outcome in outcomes].count(VersionConflict) == 19
    assert len(await stored(client, "p")) == 2


async def test_a_version_that_another_program_has_appended_is_found(client: Client) -> None:
    receipt = await client.execute(Paper, "p", Sign())
    strange = [Decision("stranger", [Signed("by hand", "")])]
    payload = encode("/x", "p", {Signed: ("Signed", 1)}, strange, 1, "2013-01-01T00:00:00Z")
    await client.log.append(client.log.subjects.address("Paper", "p").subject, receipt.sequence, payload)
    assert (await client.execute(Paper, "p", Sign(), if_version=2)).version == 3


async def test_a_receipt_holds_the_events_or_the_state(client: Client) -> None:
    first = await client.execute(Paper, "p", Sign("a", times=2), returning="events", command_id="c-1")
    assert first.events == (Signed("a", "//{}/True"),) * 2
    again = await client.execute(Paper, "p", Sign("b"), returning="state")
    assert again.state == Paper(id="p", signatures=3, texts=("a", "a", "b"))
    repeated = await client.execute(Paper, "p", Sign("a", times=2), returning="events", command_id="c-1")
    assert (repeated.events, repeated.version, repeated.duplicate) == (first.events, 2, True)
    present = await client.execute(Paper, "p", Sign("a", times=2), returning="state", command_id="c-1")
    assert (present.state, present.version) == (again.state, 2)
    nothing = await client.execute(Paper, "p", Sign(times=0), returning="events")
    assert (nothing.events, nothing.version) == ((), 3)
    together = await asyncio.gather(
        *(client.execute(Paper, "q", Sign(str(number)), returning="state") for number in range(20))
    )
    assert [(receipt.version, receipt.state.signatures) for receipt in together] == [(n, n) for n in range(1, 21)]


async def test_what_cannot_be_returned_leaves_the_receipt_of_what_took_effect(
    client: Client, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotReturned, match=r"took effect, Drawer has version 1; .*open is not a field") as refused:
        await client.execute(Drawer, "d", Sign(), returning="state")
    assert refused.value.receipt.version == 1
    fits = service.parts.connection.fits
    monkeypatch.setattr(
        service.parts.connection, "fits",
        lambda subject, payload, reply=b"": fits(subject, payload, reply) and b"returned" not in payload[:4_000],
    )  # fmt: skip
    with pytest.raises(NotReturned, match="took effect.*more than the server takes"):
        await client.execute(Paper, "p", Sign("x" * 1_000), returning="events")


# without a service


def test_a_scenario_says_who_sends() -> None:
    paper = scenario(Paper).when(Sign("a"))
    paper.then(Signed("a", "//{}/True"))
    paper.by(actor="alice", tenant="acme", metadata={"ip": "::1"}, occurred_at=NOON - timedelta(days=1)).then(
        Signed("a", "alice/acme/{'ip': '::1'}/False")
    )
    with pytest.raises(ValueError, match="reserved"):
        paper.by(metadata={"id": "x"})


def test_metadata_of_some_commands_of_a_commit_are_those_of_their_events() -> None:
    signed = declare(Paper).event_types[Signed].encode(Signed("metadatakeys", "metadata"))
    decisions = [
        Decision("a", [signed]),
        Decision("b", [signed, signed], origin=Origin(metadata={"a": "1", "b": "2"})),
        Decision("c", [signed], origin=Origin(actor="eve")),
    ]
    found = decode(encode("/x", "p", {}, decisions, 0, "2013-01-01T00:00:00Z"))
    assert [envelope.metadata or {} for envelope in found] == [{}, {"a": "1", "b": "2"}, {"a": "1", "b": "2"}, {}]
    assert [envelope.actor for envelope in found] == [None, None, None, "eve"]


def test_a_policys_command_is_of_the_same_actor_and_tenant_also_after_a_timer() -> None:
    app = App("papers", aggregates=[Paper])
    origin = Origin("alice", "acme", {"ip": "::1"}, NOON)
    signed = declare(Paper).event_types[Signed].encode(Signed("a", ""))
    decision = Decision("c", [signed], origin=origin)
    (envelope,) = decode(encode("/x", "p", {}, [decision], 0, "2013-01-01T00:00:00Z"))
    request = requests.request_of(app, "Archive", Due("0", Send(Paper, "q", Sign())), envelope)
    assert origin_of(decode_request(dumps(request)), lambda: NOON) == Origin("alice", "acme", {"ip": "::1"})
    kept, again = requests.restore(requests.store(request, "0", envelope, "p"))
    assert origin_of(decode_request(dumps(kept.request)), lambda: NOON) == Origin("alice", "acme", {"ip": "::1"})
    assert again.metadata == {"ip": "::1"}


def test_metadata_that_another_program_has_stored_are_what_can_be_read_of_them() -> None:
    event = b'{"id":"1","type":"Signed","time":"2013-01-01T00:00:00Z","sequence":1,"data":{},%b}'
    (found,) = decode(b"[%b]" % event % b'"metadatakeys":"a b  c","a":"1","b":[2]')
    assert found.metadata == {"a": "1"}
    for damaged in (b'"metadatakeys":"a","a":"\xff"', b'"metadatakeys":"a","\xff":"1"', b'"metadatakeys":1'):
        with pytest.raises(InvalidMessage, match="not a commit"):
            decode(b"[%b]" % event % damaged)


def test_a_projection_without_anything_said_sees_the_decision_time() -> None:
    projected(Signatures).given("p", Signed("", "")).then(Signature(paper="p", actor="", tenant="", year=2013))
