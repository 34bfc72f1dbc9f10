"""Commands sent to a running service: receipts, rejections, and errors that name the cause."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nats
import pytest

from aggregates import InvalidId, Rejected
from aggregates.commit import Decision, decode
from aggregates.context import uuid7
from examples.bank import Account, Deposit
from kernel import App, Client, Service
from kernel.errors import CommandError, Overloaded, Unavailable
from kernel.protocol import decode_answer, encode_error
from tests.apps import Explode, Note, Notebook, Noted, NoteTwice, Weigh, bank, notebooks
from tests.conftest import settings_for
from tests.histories import encode


@pytest.fixture
async def service(nats_url: str, app_name: str, tmp_path: Path) -> AsyncIterator[Service]:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url))
    await service.start()
    yield service
    await service.stop()


@pytest.fixture
async def client(service: Service) -> AsyncIterator[Client]:
    async with await Client.connect(service.app, nats=service.nats_url, database=service.database_url) as client:
        yield client


async def request(service: Service, payload: bytes, subject: str = "") -> dict[str, Any]:
    """Send raw bytes with plain nats-py, as a program in any language does."""
    connection = await nats.connect(service.nats_url)
    answer = await connection.request(subject or f"{service.app.name}.cmd", payload, timeout=5)
    await connection.close()
    return json.loads(answer.data)


async def test_a_receipt_has_version_and_stream_sequence(client: Client) -> None:
    first = await client.execute(Notebook, "n", Note("one"))
    second = await client.execute(Notebook, "n", NoteTwice("two"))
    assert (first.version, second.version) == (1, 3)
    assert second.sequence > first.sequence
    assert not second.duplicate


async def test_how_many_policies_led_to_a_command_is_stored_with_its_events(client: Client) -> None:
    request = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": {"text": "hi"}, "command_id": "c"}
    await client.send({**request, "depth": 3})
    await client.execute(Notebook, "n", Note("by a person"))
    stored = await client.log.read_subject(client.log.subjects.address("Notebook", "n").subject)
    assert [envelope.depth for commit in stored for envelope in decode(commit.payload)] == [3, 0]


async def test_a_rejection_reaches_the_caller_as_such_and_appends_nothing(client: Client) -> None:
    with pytest.raises(Rejected, match="^nothing to note$"):
        await client.execute(Notebook, "n", Note(""))
    assert (await client.execute(Notebook, "n", Note("one"))).version == 1


async def test_many_commands_in_flight_are_each_decided_once_and_in_order(client: Client) -> None:
    receipts = await asyncio.gather(
        *(client.execute(Notebook, f"n{number % 7}", Note(f"{number}")) for number in range(700))
    )
    for notebook in range(7):
        versions = [receipt.version for receipt in receipts[notebook::7]]
        assert versions == list(range(1, 101))


async def test_a_command_repeated_with_its_id_gets_its_first_receipt(client: Client) -> None:
    first = await client.execute(Notebook, "n", Note("one"), command_id="c-1")
    again = await client.execute(Notebook, "n", Note("one"), command_id="c-1")
    assert again.duplicate
    assert (again.version, again.sequence) == (first.version, first.sequence)
    assert (await client.execute(Notebook, "n", Note("two"))).version == 2


async def test_a_repeated_command_is_found_however_long_ago_it_was(client: Client) -> None:
    first = await client.execute(Notebook, "n", Note("one"), command_id="c-1")
    await asyncio.gather(*(client.execute(Notebook, "n", Note("more")) for _ in range(50)))
    request = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": Note("one"), "command_id": "c-1"}
    again = await client.send(request)
    assert again.duplicate
    assert again.version == first.version


async def test_a_command_that_arrives_twice_at_once_takes_effect_once(service: Service, client: Client) -> None:
    request = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": Note("one"), "command_id": "c-1"}
    receipts = await asyncio.gather(*(client.send(request) for _ in range(5)))
    assert [receipt.version for receipt in receipts] == [1] * 5
    assert sorted(receipt.duplicate for receipt in receipts) == [False, True, True, True, True]


@pytest.mark.parametrize(
    ("payload", "kind", "names"),
    [
        (b"{", "malformed", "request"),
        (b"\xff\xfe", "malformed", "request"),
        (b"[]", "malformed", "object"),
        (b'{"id": "n", "command": "Note"}', "malformed", "aggregate"),
        (b'{"aggregate": "Notebook", "id": "n", "command": "Note", "depth": -1}', "malformed", "depth"),
        (b'{"aggregate": "Notebok", "id": "n", "command": "Note"}', "unknown-aggregate", "Notebook"),
        (b'{"aggregate": "Notebook", "id": "n", "command": "Nope"}', "unknown-command", "NoteTwice"),
        (b'{"aggregate": "Notebook", "id": "n", "command": "Note"}', "invalid-command", "text"),
        (b'{"aggregate": "Notebook", "id": "n", "command": "Note", "data": 3}', "invalid-command", "Note"),
        (b'{"aggregate":"Notebook","id":"n","command":"Note","data":{"text":1}}', "invalid-command", "text"),
        (b'{"aggregate":"Notebook","id":"n","command":"Note","data":{"txt":"a"}}', "invalid-command", "txt"),
        (b'{"aggregate":"Notebook","id":"","command":"Note","data":{"text":"a"}}', "invalid-id", "empty"),
    ],
)
async def test_a_bad_request_gets_a_typed_error_that_names_the_culprit(
    service: Service, payload: bytes, kind: str, names: str
) -> None:
    error = (await request(service, payload))["error"]
    assert error["type"] == kind
    assert names in error["message"]
    good = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": {"text": "fine"}}
    assert (await request(service, json.dumps(good).encode()))["ok"]["version"] == 1


@pytest.mark.parametrize(
    ("field", "value", "names"),
    [
        ("correlation_id", "x" * 900_000, "900000 characters, at most 200"),
        ("causation_id", "x" * 201, "at most 200"),
        ("command_id", "x" * 201, "at most 200"),
        ("traceparent", "0" * 129, "at most 128"),
        ("correlation_id", "a\x00b", "control characters"),
        ("causation_id", "a\nb", "control characters"),
        ("data", {"text": "a", "more": 2**63}, "64 bits"),
        ("data", {"text": [{"deep": [-(2**63) - 1]}]}, "64 bits"),
        ("data", {"text": int("9" * 400)}, "2^63"),
    ],
)
async def test_what_is_stored_with_each_event_is_bounded(
    service: Service, field: str, value: object, names: str
) -> None:
    command = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": {"text": "a"}}
    error = (await request(service, json.dumps({**command, field: value}).encode()))["error"]
    assert error["type"] == "invalid-command"
    assert names in error["message"]
    longest = {"correlation_id": "\u3000" * 200, "causation_id": "x" * 200, "traceparent": "0" * 128}
    assert (await request(service, json.dumps({**command, **longest}).encode()))["ok"]["version"] == 1


async def test_a_client_says_what_can_not_be_sent(client: Client) -> None:
    request = {"aggregate": "Notebook", "id": "n", "command": "Note", "command_id": "c"}
    for text in (2**70, "\ud800", object()):
        with pytest.raises(CommandError, match="Note can't be sent") as refused:
            await client.send({**request, "data": {"text": text}})
        assert refused.value.type == "invalid-command"


async def test_any_nats_client_can_send_to_the_app_or_to_the_partition(service: Service) -> None:
    command = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": {"text": "hi"}, "command_id": uuid7()}
    answer = await request(service, json.dumps(command).encode())
    assert answer["ok"]["version"] == 1
    partition = f"{service.app.name}.cmd.{answer['ok']['partition']}"
    assert (await request(service, json.dumps(command).encode(), partition))["ok"]["duplicate"]


async def test_a_handler_that_raises_harms_no_other_command(client: Client) -> None:
    outcomes = await asyncio.gather(
        client.execute(Notebook, "n", Note("one")),
        client.execute(Notebook, "n", Explode()),
        client.execute(Notebook, "n", Note("two")),
        return_exceptions=True,
    )
    assert isinstance(outcomes[1], CommandError)
    assert outcomes[1].type == "failed"
    assert "ZeroDivisionError: boom" in outcomes[1].message
    assert [outcome.version for outcome in (outcomes[0], outcomes[2])] == [1, 2]  # type: ignore[union-attr]


async def test_events_too_large_for_the_log_are_refused_and_neighbours_are_not(client: Client) -> None:
    outcomes = await asyncio.gather(
        client.execute(Notebook, "n", NoteTwice("x" * 600_000)),
        client.execute(Notebook, "n", Note("small")),
        return_exceptions=True,
    )
    assert isinstance(outcomes[0], CommandError)
    assert outcomes[0].type == "too-large"
    assert outcomes[1].version == 1  # type: ignore[union-attr]


async def test_an_unstorable_event_fails_its_own_command_only(client: Client) -> None:
    outcomes = await asyncio.gather(
        *(client.execute(Notebook, "n", Weigh("inf" if number == 5 else "1.5")) for number in range(12)),
        return_exceptions=True,
    )
    failed = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, BaseException)]
    assert failed == [5]
    assert isinstance(outcomes[5], CommandError)
    assert outcomes[5].type == "invalid-event"
    assert "Weighed.grams" in outcomes[5].message


async def test_a_request_that_breaks_the_decoder_harms_no_other_request(service: Service, client: Client) -> None:
    connection = await nats.connect(service.nats_url)
    inbox = connection.new_inbox()
    deep = b'{"aggregate":"Notebook","id":"n","command":"Note","data":' + b"[" * 200_000 + b"]" * 200_000 + b"}"
    heavy = b'{"aggregate":"Notebook","id":"n","command":"Weigh","data":{"grams":"heavy"}}'
    answers = await connection.subscribe(inbox)
    for payload in (deep, heavy):
        await connection.publish(f"{app_of(service)}.cmd", payload, reply=inbox)
    receipt = await client.execute(Notebook, "n", Note("fine"))
    kinds = sorted([json.loads((await answers.next_msg(timeout=5)).data)["error"]["type"] for _ in range(2)])
    assert receipt.version == 1
    assert kinds == ["invalid-command", "malformed"]
    assert service.status()["commands_pending"] == 0
    await connection.close()


def app_of(service: Service) -> str:
    return service.app.name


async def test_an_answer_never_exceeds_what_the_server_takes(service: Service) -> None:
    named = {"aggregate": "Notebook", "id": "n", "command": "\x7f" * 150_000, "data": {}}
    error = (await request(service, json.dumps(named).encode()))["error"]
    assert error["type"] == "unknown-command"
    assert len(error["message"]) <= 4_000
    long = {"aggregate": "Notebook", "id": "n", "command": "Note", "data": {"text": "a"}, "command_id": "x" * 300}
    assert (await request(service, json.dumps(long).encode()))["error"]["type"] == "invalid-command"


async def test_an_append_that_may_lie_below_somebody_elses_is_looked_for(service: Service, client: Client) -> None:
    """The acknowledgement is lost, then another writer appends: deciding again must not apply the commands twice."""
    await asyncio.gather(*(client.execute(Notebook, "n", Note("first")) for _ in range(12)))
    appender, address = service.parts.log.appender, service.parts.log.subjects.address("Notebook", "n")
    take = appender._acknowledged
    lost = asyncio.Event()

    def lose(subject: bytes, reply: bytes, payload: bytes, headers: bytes | None) -> None:
        if not lost.is_set() and b'"seq"' in payload:
            lost.set()
        else:
            take(subject, reply, payload, headers)

    key = next(key for key, listener in service.parts.connection.listeners.items() if listener == take)
    service.parts.connection.listeners[key] = lose
    sending = [asyncio.create_task(client.execute(Notebook, "n", Note("again"), timeout=60)) for _ in range(20)]
    await lost.wait()
    last = await client.log.last(address.subject)
    assert last is not None
    envelopes = decode(last.payload)
    stranger = encode(
        "/x",
        "n",
        {Noted: ("Noted", 1)},
        [Decision("stranger", [Noted("x", 1)])],
        envelopes[-1].sequence,
        "2013-01-01T00:00:00Z",
    )
    await client.log.append(address.subject, last.sequence, stranger)
    appender._timeout = 0.05
    await asyncio.gather(*sending)
    stored = await client.log.read_subject(address.subject)
    ids = [envelope.commandid for commit in stored for envelope in decode(commit.payload)]
    assert len(ids) == len(set(ids)) == 33


async def test_an_id_that_cannot_be_addressed_is_refused_by_the_client(client: Client) -> None:
    with pytest.raises(InvalidId, match="empty"):
        await client.execute(Notebook, "", Note("one"))


async def test_ids_are_any_text(client: Client) -> None:
    for odd in ("a b", "a.b", "*", ">", "名前", "50%", "a/b", "~", "x" * 255):
        assert (await client.execute(Notebook, odd, Note(odd))).version == 1
    pages = await client.query(
        "select notebook from pages", after=await client.execute(Notebook, "名前", Note("again"))
    )
    assert {page["notebook"] for page in pages} >= {"名前"}


async def test_beyond_the_limit_commands_are_refused_with_a_time_to_retry_after(
    nats_url: str, app_name: str, tmp_path: Path
) -> None:
    service = Service(notebooks(app_name), settings_for(tmp_path, nats=nats_url, max_commands=10))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url) as client:
        request = {"aggregate": "Notebook", "command": "Note", "data": {"text": "a"}}
        # shorter than `retry_after`, so that the client can't wait long enough
        outcomes = await asyncio.gather(
            *(client.send({**request, "id": f"n{n}", "command_id": uuid7()}, timeout=0.15) for n in range(200)),
            return_exceptions=True,
        )
        refused = [outcome for outcome in outcomes if isinstance(outcome, Overloaded)]
        assert refused
        assert all(outcome.retry_after for outcome in refused)
        # a client with enough time waits for `retry_after`, and its command takes effect
        receipts = await asyncio.gather(*(client.execute(Notebook, f"m{n}", Note("a")) for n in range(100)))
        assert len(receipts) == 100
    await service.stop()


async def test_a_client_without_a_service_says_so(nats_url: str, app_name: str, tmp_path: Path) -> None:
    app: App = notebooks(app_name)
    service = Service(app, settings_for(tmp_path, nats=nats_url))
    await service.start()
    await service.stop()
    async with await Client.connect(app, nats=nats_url) as client:
        with pytest.raises(TimeoutError, match="no answer to Note"):
            await client.execute(Notebook, "n", Note("one"), timeout=0.3)


async def test_a_refusal_waits_until_what_it_rests_on_is_stored(
    nats_url: str, app_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two withdrawals at once: the second is refused because of the first, whose append then fails."""
    service = Service(bank(app_name), settings_for(tmp_path, nats=nats_url))
    await service.start()
    async with await Client.connect(service.app, nats=nats_url) as client:
        await client.execute(Account, "a", Deposit(100))
        append, failed = service.parts.log.append, []

        def fail_once(subject: str, expected: int, payload: bytes, links: bytes) -> asyncio.Future[int]:
            if failed:
                return append(subject, expected, payload, links)
            failed.append(payload)
            future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
            future.set_exception(Unavailable("not now"))
            return future

        monkeypatch.setattr(service.parts.log, "append", fail_once)
        answers: list[bytes] = []
        monkeypatch.setattr(service.parts.outbox, "publish", lambda _subject, payload: answers.append(payload))
        partition = client.log.subjects.commands(client.log.subjects.partition("Account", "a")).encode()
        for cents in (100, 50):
            request = b'{"aggregate":"Account","id":"a","command":"Withdraw","data":{"cents":%d}}' % cents
            service.parts.admission.receive(partition, b"_INBOX.a.1", request, None)
        async with asyncio.timeout(10):
            while len(answers) < 2:
                await asyncio.sleep(0)
    await service.stop()
    assert failed
    assert all(b'"unavailable"' in answer for answer in answers), answers


def test_an_error_whose_message_is_no_unicode_is_sent_all_the_same() -> None:
    """As a file's name with foreign bytes has: Python keeps them as lone surrogates."""
    with pytest.raises(Rejected, match="file"):
        decode_answer(encode_error("rejected", "the file \udcff is missing"))
