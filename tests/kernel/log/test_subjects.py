"""Addresses never change for a stored stream, and no id leads to another id's subject."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregates import InvalidId
from kernel.log.subjects import MAX_TOKEN, Address, Subjects, encode_id, fnv1a

PLAIN = re.compile(r"[A-Za-z0-9_%-]+\Z")


@pytest.mark.parametrize(
    ("text", "value"),
    [("", 0x811C9DC5), ("a", 0xE40C292C), ("foobar", 0xBF9CF968), ("chongo was here!\n", 0xD49930D5)],
)
def test_the_hash_is_fnv_1a_as_published(text: str, value: int) -> None:
    assert fnv1a(text) == value


def test_addresses_stay_as_streams_have_them() -> None:
    subjects = Subjects("bank", 64)
    assert subjects.address("Account", "alice") == Address(
        f"bank.evt.{fnv1a('Account/alice') % 64}.Account.alice", fnv1a("Account/alice") % 64, "Account", "alice"
    )
    assert subjects.address("Account", "Zoë.1").subject.endswith(".Account.Zo%C3%AB%2E1")
    assert subjects.events() == "bank.evt.>"
    assert subjects.events(7) == "bank.evt.7.>"
    assert subjects.commands() == "bank.cmd"
    assert subjects.commands(7) == "bank.cmd.7"


@given(id=st.text(min_size=1, max_size=60), partitions=st.integers(1, 4096))
def test_an_id_comes_back_from_its_subject_or_is_refused(id: str, partitions: int) -> None:
    subjects = Subjects("app", partitions)
    try:
        address = subjects.address("Thing", id)
    except InvalidId:
        # only control characters, lone surrogates, or too many bytes
        spoilt = any(ord(char) < 32 or ord(char) == 127 or 0xD800 <= ord(char) < 0xE000 for char in id)
        assert spoilt or 3 * len(id.encode()) > MAX_TOKEN
        return
    assert subjects.parse(address.subject) == address
    assert address.id == id
    assert 0 <= address.partition < partitions
    parts = address.subject.split(".")
    assert len(parts) == 5
    assert PLAIN.match(parts[4])
    assert len(parts[4]) <= MAX_TOKEN


@given(first=st.text(min_size=1, max_size=20), second=st.text(min_size=1, max_size=20))
def test_two_ids_never_share_a_subject(first: str, second: str) -> None:
    try:
        tokens = encode_id(first), encode_id(second)
    except InvalidId:
        return
    assert (tokens[0] == tokens[1]) == (first == second)


def test_the_longest_ids_are_taken_and_longer_ones_refused() -> None:
    assert encode_id("x" * 255) == "x" * 255
    assert len(encode_id("é" * 42 + "xxx")) == 255
    for long in ("x" * 256, "é" * 43, "." * 86, "x" * 10_240):
        with pytest.raises(InvalidId, match="255"):
            encode_id(long)


@pytest.mark.parametrize("id", ["a\n", "\n", "a\x00b", "\r", "\t", "\x7f", "\x1f"], ids=ascii)
def test_control_characters_are_refused(id: str) -> None:
    with pytest.raises(InvalidId, match="control characters"):
        encode_id(id)


def test_an_empty_id_is_refused() -> None:
    with pytest.raises(InvalidId, match="empty"):
        encode_id("")


@pytest.mark.parametrize(
    "subject", ["", "app", "other.evt.1.Thing.x", "app.cmd.1.Thing.x", "app.evt.x.Thing.y", "app.evt.1.Thing", "a.b.c"]
)
def test_a_subject_that_is_not_an_event_subject_of_the_app_is_refused(subject: str) -> None:
    with pytest.raises(InvalidId, match="not an event subject"):
        Subjects("app", 8).parse(subject)


def test_ids_spread_over_all_partitions() -> None:
    subjects = Subjects("app", 16)
    counts = [0] * 16
    for number in range(8000):
        counts[subjects.partition("Thing", f"id-{number}")] += 1
    assert min(counts) > 250
    assert max(counts) < 1000


def test_the_partition_of_one_id_differs_by_aggregate() -> None:
    subjects = Subjects("app", 64)
    assert len({subjects.partition(f"Thing{number}", "1") for number in range(200)}) > 30
