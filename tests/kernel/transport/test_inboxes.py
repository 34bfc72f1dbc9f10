"""To which reply subjects a service answers."""

from __future__ import annotations

import pytest

from kernel.errors import SettingsError
from kernel.settings import Connection, Settings, Stream
from kernel.transport.inboxes import MAX_REPLY, ReplyFilter, inbox_prefix


def settings(prefix: str = "", replies: tuple[str, ...] | None = None, subjects: str | None = None) -> Settings:
    connection = {"inbox_prefix": prefix, **({} if replies is None else {"reply_prefixes": replies})}
    return Settings(connection=Connection.model_validate(connection), stream=Stream(subject_prefix=subjects))


ALLOWED = [
    b"_INBOX.Zx8Qn2.1",
    b"_INBOX.Zx8Qn2",
    b"_R_.acc.1",
    b"bank.inbox.client.Zx8Qn2.17",
    b"bank.inbox.alice.client.Zx8Qn2.17",
    b"bank.inbox.workers.Zx8Qn2",
    b"_GR_.clustr.server._INBOX.Zx8Qn2.1",
]
REFUSED = [
    b"bank.evt.0.Account.alice",
    b"bank.cmd",
    b"bank.cmd.3",
    b"bank.svc.limits",
    b"bank",
    b"other.evt.0.Account.alice",
    b"$KV.bank-leases.worker.ghost",
    b"$JS.API.STREAM.DELETE.bank",
    b"$JS.ACK.bank.c.1.1.1.1.1",
    b"bank.inbox.service.Zx8Qn2.17",
    b"_INBOX",
    b"_INBOX.",
    b"_INBOX..a",
    b"_INBOX.a.",
    b"_INBOX.*",
    b"_INBOX.a.>",
    b"_INBOXES.a",
    b"_INBOX.a." + b"x" * MAX_REPLY,
    b"_GR_.clustr.server.bank.evt.0.Account.alice",
    b"_GR_.clustr.server._GR_.clustr.server._INBOX.a",
    b"_GR_.clustr.server",
    b"_GR_.clustr.server.bank.inbox.service.Zx8Qn2.17",
]


@pytest.mark.parametrize("warm", [False, True], ids=["first", "known"])
def test_only_inboxes_are_answered_to(warm: bool) -> None:
    replies = ReplyFilter.of("bank", settings())
    if warm:  # what was allowed once is not examined again
        assert all(map(replies.allows, ALLOWED))
    assert [reply for reply in ALLOWED if not replies.allows(reply)] == []
    assert [reply for reply in REFUSED if replies.allows(reply)] == []


def test_the_inboxes_follow_the_subjects_and_the_setting() -> None:
    assert inbox_prefix("bank", settings(), "client") == "bank.inbox.client"
    assert inbox_prefix("bank", settings(subjects="eu.bank"), "service") == "eu.bank.inbox.service"
    own = settings("_INBOX", ())
    assert inbox_prefix("bank", own, "workers") == "_INBOX.workers"
    replies = ReplyFilter.of("bank", own)
    assert replies.allows(b"_INBOX.Zx8Qn2.1")
    assert not replies.allows(b"_INBOX.service.Zx8Qn2.1")
    assert not replies.allows(b"bank.inbox.client.Zx8Qn2.1")


def test_a_list_of_prefixes_replaces_the_usual_ones() -> None:
    replies = ReplyFilter.of("bank", settings(replies=()))
    assert not replies.allows(b"_INBOX.Zx8Qn2.1")
    assert replies.allows(b"bank.inbox.client.Zx8Qn2.1")


@pytest.mark.parametrize("prefix", ["bank", "bank.evt", "bank.evt.0", "bank.cmd", "bank.svc.x"])
def test_the_apps_own_subjects_are_no_prefix_of_inboxes(prefix: str) -> None:
    with pytest.raises(SettingsError, match=r"connection\.inbox_prefix: .* Use bank\.inbox"):
        ReplyFilter.of("bank", settings(prefix))
    with pytest.raises(SettingsError, match=r"connection\.reply_prefixes: .* Use bank\.inbox"):
        ReplyFilter.of("bank", settings(replies=(prefix,)))


@pytest.mark.parametrize("prefix", ["$JS", "a.*", "a.>", "a..b", ".a", "a.", "a b", "_GR_", "x" * 65])
def test_a_prefix_that_is_none_is_refused_by_the_settings(prefix: str) -> None:
    with pytest.raises(ValueError, match="is not a prefix of inboxes"):
        settings(prefix)
    with pytest.raises(ValueError, match="is not a prefix of inboxes"):
        settings(replies=("_INBOX", prefix))
