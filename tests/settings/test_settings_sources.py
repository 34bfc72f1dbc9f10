"""The sources of settings, and the errors for invalid ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from pydantic import SecretStr

from kernel.errors import SettingsError
from kernel.settings import Connection, Database, Security, Settings
from kernel.settings.sources import changed, leaves, load, parse_assignment, settings_of, shown_value, value_of, written

FILE = """
workers = 2
[stream]
replicas = 3
max_bytes = "1GiB"
[http]
port = 8080
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "settings.toml"
    path.write_text(FILE)
    return path


def problems(**given: Any) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        settings_of({name.replace("__", "."): value for name, value in given.items()})
    assert str(caught.value) == "\n".join(caught.value.problems)
    return caught.value.problems


def refused(file: Path | None = None, given: dict[str, Any] | None = None, **variables: str) -> list[str]:
    with pytest.raises(SettingsError) as caught:
        load(file, given, variables)
    return caught.value.problems


def test_the_environment_wins_over_the_file_and_the_command_line_over_both(file: Path) -> None:
    variables = {"ESKERNEL_STREAM__REPLICAS": "5", "ESKERNEL_HTTP__PORT": "8081"}
    loaded = load(file, {"http.port": "8082"}, variables)
    assert (loaded.settings.workers, loaded.settings.stream.replicas, loaded.settings.http.port) == (2, 5, 8082)
    assert loaded.settings.stream.max_bytes == 1024**3
    assert loaded.origins == {
        "workers": str(file),
        "stream.replicas": "ESKERNEL_STREAM__REPLICAS",
        "stream.max_bytes": str(file),
        "http.port": "command line",
    }


def test_the_file_is_named_or_that_of_the_environment_or_the_one_of_the_folder(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load(None, None, {}).origins == {}
    (tmp_path / "eskernel.toml").write_text("workers = 3")
    assert load(None, None, {}).settings.workers == 3
    assert load(None, None, {"ESKERNEL_CONFIG": str(file)}).settings.workers == 2
    (tmp_path / "other.toml").write_text("workers = 4")
    assert load(tmp_path / "other.toml", None, {"ESKERNEL_CONFIG": str(file)}).settings.workers == 4
    assert refused(None, None, ESKERNEL_CONFIG="nowhere.toml") == ["nowhere.toml: no such file"]


def test_nothing_else_of_the_environment_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ESKERNEL_WORKERS", "7")
    monkeypatch.setenv("WORKERS", "7")
    assert Settings().workers == 1
    assert settings_of({}).workers == 1
    assert load(None, None, {"WORKERS": "7"}).settings.workers == 1
    assert load(None, None, None).settings.workers == 7


def test_a_whole_section_may_be_one_variable() -> None:
    loaded = load(None, None, {"ESKERNEL_STREAM": '{"replicas": 3}', "ESKERNEL_STREAM__STORAGE": "memory"})
    assert (loaded.settings.stream.replicas, loaded.settings.stream.storage) == (3, "memory")
    assert loaded.origins == {"stream.replicas": "ESKERNEL_STREAM", "stream.storage": "ESKERNEL_STREAM__STORAGE"}


@pytest.mark.parametrize("text", ["nats://a:1,tls://b:2", "nats://a:1, tls://b:2 ,", '["nats://a:1", "tls://b:2"]'])
def test_lists_are_written_with_commas_or_as_json(text: str) -> None:
    wanted = ("nats://a:1", "tls://b:2")
    assert load(None, None, {"ESKERNEL_CONNECTION__SERVERS": text}).settings.connection.servers == wanted
    assert settings_of(dict([parse_assignment(f"connection.servers={text}")])).connection.servers == wanted


def test_a_list_may_have_one_number() -> None:
    assert load(None, None, {"ESKERNEL_CONSUMER__BACKOFF": "0.5"}).settings.consumer.backoff == (0.5,)
    assert load(None, None, {"ESKERNEL_CONSUMER__BACKOFF": "[0.5, 1]"}).settings.consumer.backoff == (0.5, 1.0)
    assert settings_of(dict([parse_assignment("consumer.backoff=0.5,1")])).consumer.backoff == (0.5, 1.0)


@pytest.mark.parametrize("secret", ["12345", "true", '"quoted"', "a=b", "", "null", "1e3"])
def test_a_secret_is_the_text_that_was_written(secret: str) -> None:
    given = dict([parse_assignment(f"security.token={secret}")])
    for settings in (settings_of(given), load(None, None, {"ESKERNEL_SECURITY__TOKEN": secret}).settings):
        assert settings.security.token == SecretStr(secret)


def test_assignments_have_names_values_and_right_json() -> None:
    assert parse_assignment('rates.commands={"rate": 5}') == ("rates.commands", {"rate": 5})
    for wrong, message in (
        ("stream.replicas", "name=value"),
        ("=3", "name=value"),
        ("consumer.backoff=[1", "not JSON"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse_assignment(wrong)


def test_paths_are_absolute_so_that_other_folders_can_use_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/somewhere")
    settings = settings_of({"security.ca_file": "ca.pem"})
    assert settings.security.ca_file == tmp_path / "ca.pem"
    assert settings_of({"security.ca_file": "~/ca.pem"}).security.ca_file == Path("/somewhere/ca.pem")


# what is wrong


def test_an_unknown_key_is_named_with_its_source_and_the_nearest_one(tmp_path: Path) -> None:
    file = tmp_path / "wrong.toml"
    file.write_text("[stream]\nreplica = 3\n[connection]\nmax_bytes = 5\n")
    found = refused(file, {"databse.url": "sqlite://"}, ESKERNEL_STREAM__STORRAGE="file", ESKERNEL_STREEM__REPLICAS="3")
    assert sorted(found) == [
        "ESKERNEL_STREEM__REPLICAS: no such setting; the nearest is ESKERNEL_STREAM__REPLICAS",
        f"connection.max_bytes: no such setting ({file}); the nearest is stream.max_bytes",
        "databse: no such setting (command line); the nearest is database.url",
        f"stream.replica: no such setting ({file}); the nearest is stream.replicas",
        "stream.storrage: no such setting (ESKERNEL_STREAM__STORRAGE); the nearest is stream.storage",
    ]
    assert problems(qqqq=1) == ["qqqq: no such setting; `eskernel config show` lists all"]


def test_all_problems_are_reported_at_once_and_without_the_values() -> None:
    found = refused(
        None,
        {"stream.replicas": "seven", "security.token": "hush-hush", "security.user": "u"},
        ESKERNEL_WORKERS="1000",
        ESKERNEL_JETSTREAM__DOMAIN="d",
        ESKERNEL_JETSTREAM__API_PREFIX="p",
    )
    assert len(found) == 4
    text = "\n".join(found)
    assert "workers: input should be less than or equal to 64 (ESKERNEL_WORKERS)" in found
    assert "stream.replicas: input should be a valid integer" in text
    assert "security.token and security.user contradict each other" in text
    assert "jetstream.domain and jetstream.api_prefix contradict" in text
    assert "hush" not in text


def test_a_file_that_is_no_toml_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.toml"
    file.write_text("workers =")
    assert refused(file)[0].startswith(f"{file}: Invalid value")


def test_a_variable_that_is_no_json_is_named() -> None:
    assert "connection" in refused(ESKERNEL_CONNECTION__SERVERS='["nats://a')[0].lower()


S = "security__"
CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({f"{S}token": "t", f"{S}nkey_file": "n"}, "security.token and security.nkey_file contradict"),
    ({f"{S}token": "t", f"{S}credentials_file": "n"}, "security.token and security.credentials_file contradict"),
    ({f"{S}user": "u"}, "security.user and security.password go together"),
    ({f"{S}password": "p"}, "security.user and security.password go together"),
    ({f"{S}client_certificate": "c"}, "security.client_certificate and security.client_key go together"),
    ({f"{S}client_key": "c"}, "security.client_certificate and security.client_key go together"),
    ({f"{S}skip_verify": True, f"{S}ca_file": "c"}, "security.skip_verify contradicts security.ca_file"),
    ({"jetstream__domain": "d", "jetstream__api_prefix": "p"}, "jetstream.domain and jetstream.api_prefix contradict"),
    ({"stream__sync": True, "connection__servers": "nats://a"}, "stream.sync is for the embedded server"),
    ({"stream__max_age": 5}, "stream.max_age would delete events"),
    ({"stream__discard": "old", "stream__max_bytes": 5}, "stream.discard = 'old' would delete events"),
    ({"stream__discard": "old"}, "stream.discard = 'old' needs stream.max_bytes or stream.max_messages"),
    ({"stream__retention": "interest"}, "no aggregate could be loaded again"),
    ({"stream__retention": "workqueue"}, "no aggregate could be loaded again"),
    *(
        ({"consumer__deliver_policy": policy}, "leaves out events that projections need")
        for policy in ("new", "last", "last_per_subject", "by_start_time", "by_start_sequence")
    ),
    ({"consumer__ack_policy": "explicit"}, "out of order"),
    ({"consumer__max_deliver": 3}, "dead_letters.retries"),
    ({"consumer__max_ack_pending": 3}, "no effect with consumer.ack_policy = 'none'"),
    ({"consumer__ack_wait": 3}, "no effect with consumer.ack_policy = 'none'"),
    ({"consumer__inactive_threshold": 3}, "at least twice consumer.heartbeat"),
    ({"consumer__name_prefix": "a.b"}, "consumer.name_prefix"),
    ({"stream__name": "a.b"}, "stream.name"),
    ({"stream__subject_prefix": "a..b"}, "stream.subject_prefix"),
    ({"stream__subject_prefix": "a.*"}, "stream.subject_prefix"),
    ({"backlog__count_warn": 9, "backlog__count_critical": 5}, "count_warn is above"),
    ({"backlog__age_warn": 9, "backlog__age_critical": 5}, "age_warn is above"),
]


@pytest.mark.setting("consumer.deliver_policy", "consumer.max_deliver", "stream.retention", on="")
@pytest.mark.parametrize(("given", "message"), CONTRADICTIONS)
def test_contradictory_settings_are_refused(given: dict[str, Any], message: str) -> None:
    found = problems(**given)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize(
    "url", ["http://a", "nats://u:hu/sh@a", "nats://u:12/hush@a", "nats://u:p#hush@a", "nats://", "nats://a:0", "a:b"]
)
def test_an_invalid_server_url_is_refused_and_not_printed(url: str) -> None:
    [found] = problems(connection__servers=url)
    assert found.startswith("connection.servers") or "a server's URL is" in found
    assert "hu" not in found


# secrets


def test_no_secret_is_printed() -> None:
    settings = Settings(
        connection=Connection(servers=("nats://u:hush@a:1", "nats://hush@b:2", "nats://u:hu@sh@c")),
        security=Security(user="u", password=SecretStr("hush")),
        database=Database(url="postgresql://u:hush@h/d?sslpassword=hush&password=hush"),
    )
    shown = [shown_value(value_of(settings, name)) for name, _ in leaves()]
    for text in (repr(settings), str(settings), repr(settings.security), str(shown)):
        assert "hush" not in text
        assert "sh@" not in text


def test_settings_are_restored_completely_from_their_written_form() -> None:
    given = {
        "data": Path("/d"),
        "connection.servers": "nats://u:p@a,nats://b",
        "security.token": "hush",
        "security.ca_file": "/ca.pem",
        "consumer.backoff": (1, 2),
        "stream.max_bytes": "1GiB",
        "stream.partitions": 64,
        "rates.per_aggregate": {"Account": {"rate": 5}},
    }
    settings = settings_of(given)
    back = Settings.model_validate(orjson.loads(orjson.dumps(written(settings))))
    assert back == settings
    assert back.security.token == SecretStr("hush")
    assert back.stream.model_fields_set == {"max_bytes", "partitions"}
    assert "lease" not in written(settings)


def test_changed_settings_leave_the_others_unchanged() -> None:
    settings = settings_of({"security.token": "hush", "stream.partitions": 64})
    other = changed(settings, {"stream.replicas": 3, "connection.servers": "nats://a"})
    assert (other.stream.replicas, other.connection.servers) == (3, ("nats://a",))
    assert other.security.token == SecretStr("hush")
    assert other.stream.model_fields_set == {"partitions", "replicas"}
    assert settings.stream.replicas == 1
    with pytest.raises(SettingsError, match="stream.replicas"):
        changed(settings, {"stream.replicas": 9})
