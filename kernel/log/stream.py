"""Finds an app's stream, creates it, or changes it, and refuses a stream that is unusable as an event log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

from kernel.errors import StreamMismatch, Unavailable
from kernel.log.certainty import gone, make_sure, patience
from kernel.log.jetstream import FORMAT, JetStreamLog, check_keeps_everything, partitions_of
from kernel.log.subjects import Subjects
from kernel.settings import Settings, Stream
from kernel.transport.connection import NatsConnection
from kernel.transport.jetstream_api import NO_STREAM, ApiError, call_api, server_version, version_text

logger = logging.getLogger("eskernel.log")
OLDEST = (2, 10)
"""Oldest supported version of nats-server; the tests run on it."""
ATOMIC = (2, 12)
"""First version of nats-server with atomic batches."""
LEAST_PAYLOAD = 1_024
"""Smallest `max_payload` of a server with which an app can work: receipts and errors must fit."""
_NEEDED = ("subjects", "retention", "storage", "allow_direct")
"""Fields that an event log depends on, and that can't be changed when the stream contains events."""
_UNSET = {"max_age": 0, "max_bytes": -1, "max_msgs": -1, "compression": "none", "num_replicas": 1}
_SETTING = {
    "subjects": "subject_prefix",
    "num_replicas": "replicas",
    "max_msgs": "max_messages",
}


class Difference(NamedTuple):
    """A field of a stream that differs from the settings."""

    field: str
    found: Any
    wanted: Any

    def __str__(self) -> str:
        setting = _SETTING.get(self.field, self.field)
        key = f" (stream.{setting})" if setting in Stream.model_fields else ""
        return f"{self.field}{key} is {self.found!r}, wanted {self.wanted!r}"


def wanted_config(app: str, settings: Stream, version: tuple[int, int]) -> dict[str, Any]:
    """Return the stream's configuration according to the settings, for a server of this version."""
    subjects = Subjects(settings.subject_prefix or app, settings.partitions)
    config: dict[str, Any] = {
        "name": settings.name or app,
        "description": f"eskernel format={FORMAT} partitions={settings.partitions}",
        "subjects": [subjects.events()],
        "retention": settings.retention,
        "storage": settings.storage,
        "num_replicas": settings.replicas,
        "max_age": int(settings.max_age * 1e9),
        "max_bytes": int(settings.max_bytes) or -1,
        "max_msgs": settings.max_messages or -1,
        "discard": settings.discard,
        "compression": settings.compression,
        "allow_direct": True,
        "deny_delete": True,
        "deny_purge": True,
    }
    if version >= ATOMIC:
        config["allow_atomic"] = True
    return config


def differences(found: dict[str, Any], wanted: dict[str, Any]) -> list[Difference]:
    """Return the fields in which a stream differs from the wanted configuration, without name and partition count."""
    different = []
    for field, value in wanted.items():
        if field in ("name", "description"):
            continue
        unset = _UNSET.get(field, False if isinstance(value, bool) else None)
        if (found.get(field) or unset) != (value or unset):
            different.append(Difference(field, found.get(field, unset), value))
    return different


def check_server(connection: NatsConnection) -> None:
    """Raise `StreamMismatch` if the server is too old, or takes only the smallest messages."""
    if (most := connection.max_payload) < LEAST_PAYLOAD:
        raise StreamMismatch(
            f"the server takes messages of at most {most} bytes; set its max_payload to {LEAST_PAYLOAD} or more (its "
            "default is 1 MB)"
        )
    if server_version(connection) < OLDEST:
        least = ".".join(map(str, OLDEST))
        raise StreamMismatch(f"nats-server {version_text(connection)} is too old; {least} or newer is needed")


async def find_config(connection: NatsConnection, name: str) -> dict[str, Any] | None:
    """Return the server's information about a stream, or None if it does not exist. Raises `LogError`."""
    try:
        return await call_api(connection, f"STREAM.INFO.{name}", None)
    except ApiError as error:
        if error.code == NO_STREAM:
            return None
        raise


async def open_log(
    connection: NatsConnection,
    app: str,
    settings: Settings | None = None,
    *,
    create: bool = True,
    worker: str = "",
    on_replaced: Callable[[str], None] | None = None,
) -> JetStreamLog:
    """Return the app's log, and create or change its stream according to `settings.stream.existing`.

    An existing stream keeps its partition count.

    Args:
        create: the stream may be created. If it is False and the stream does not exist, `Replaced` is raised.
        worker: name of the worker, for the names of consumers.
        on_replaced: called with the reason where the stream later turns out to be another one, or to have lost its end.

    Raises:
        Replaced: the stream does not exist, but the database was folded from it.
        StreamMismatch: the existing stream is unusable as an event log, or differs from the settings.
        Unavailable: the server doesn't answer, or JetStream is not enabled.
    """
    settings = settings or Settings()
    stream = settings.stream
    check_server(connection)
    wanted = wanted_config(app, stream, server_version(connection))
    name = wanted["name"]
    answer = await make_sure(lambda: _find(connection, name, create), patience(stream.replicas))
    if answer is None:
        answer = await _create(connection, wanted, stream)
    else:
        answer = await _keep(connection, answer, wanted, stream)
    config = answer["config"]
    partitions = partitions_of(config)
    if stream.existing != "skip":
        check_keeps_everything(config, stream.may_lose_events)
    if partitions != stream.partitions and "partitions" in stream.model_fields_set:
        if stream.existing == "validate":
            raise StreamMismatch(
                f"stream {name!r} differs from the settings: {Difference('partitions', partitions, stream.partitions)}"
            )
        logger.warning(
            "the stream has %d partitions, not %d: the number is fixed when the stream is created",
            partitions,
            stream.partitions,
        )
    if settings.jetstream.group_commit == "always" and not config.get("allow_atomic"):
        why = (
            "the stream was created without allow_atomic: stream.existing = 'update' adds it"
            if server_version(connection) >= ATOMIC
            else f"it needs nats-server {'.'.join(map(str, ATOMIC))} or newer, this is {version_text(connection)}"
        )
        raise StreamMismatch(f"jetstream.group_commit = 'always' can't be used: {why}; or use 'auto'")
    if stream.may_lose_events:
        logger.warning("stream.may_lose_events: the server may delete events of %s; %s", name, _losing(config))
    state = answer.get("state") or {}
    if missing := int(state.get("last_seq", 0)) - int(state.get("messages", 0)):
        logger.warning("%d messages of the stream %s are missing: deleted, or lost by the server", missing, name)
    return await _start(connection, app, answer, settings, worker, on_replaced)


async def find_log(
    connection: NatsConnection, app: str, settings: Settings | None = None, *, worker: str = ""
) -> JetStreamLog:
    """Return the log of an app whose stream exists.

    Raises:
        Unavailable: there is no such stream, or the server doesn't answer.
    """
    settings = settings or Settings()
    name = settings.stream.name or app
    answer = await find_config(connection, name)
    if answer is None:
        raise Unavailable(f"there is no stream {name!r} on this server; has the service been started?")
    return await _start(connection, app, answer, settings, worker, None)


async def _start(
    connection: NatsConnection,
    app: str,
    stream: dict[str, Any],
    settings: Settings,
    worker: str,
    on_replaced: Callable[[str], None] | None,
) -> JetStreamLog:
    subjects = Subjects(settings.stream.subject_prefix or app, partitions_of(stream["config"]))
    log = JetStreamLog(connection, subjects, stream, settings, worker, on_replaced)
    await log.start()
    return log


async def _find(connection: NatsConnection, name: str, create: bool) -> dict[str, Any] | None:
    found = await find_config(connection, name)
    if found is None and not create:
        # an empty stream of this name would prevent a restore
        raise gone(f"the stream {name!r} is gone, and the database was folded from it")
    return found


async def _create(connection: NatsConnection, wanted: dict[str, Any], stream: Stream) -> dict[str, Any]:
    name = wanted["name"]
    if stream.existing in ("validate", "skip"):
        raise StreamMismatch(
            f"the stream {name!r} does not exist, and stream.existing = {stream.existing!r} never creates it; create "
            "the stream, or set stream.existing = 'create'"
        )
    answer = await call_api(connection, f"STREAM.CREATE.{name}", wanted)
    # compare: older servers silently ignore fields that they don't know
    if lost := differences(answer["config"], wanted):
        raise StreamMismatch(
            f"nats-server {version_text(connection)} created the stream {name!r} with other values: {_listed(lost)}; "
            "use a newer nats-server, or other settings"
        )
    return answer


async def _keep(
    connection: NatsConnection, answer: dict[str, Any], wanted: dict[str, Any], stream: Stream
) -> dict[str, Any]:
    """Check an existing stream, and change it if the settings demand it. Return the server's information about it."""
    config, name = answer["config"], wanted["name"]
    partitions_of(config)
    different = differences(config, wanted)
    if stream.existing == "skip" or not different:
        return answer
    if stream.existing == "validate":
        raise StreamMismatch(f"stream {name!r} differs from the settings: {_listed(different)}")
    if fatal := [difference for difference in different if difference.field in _NEEDED]:
        raise StreamMismatch(f"stream {name!r} can't carry this event log: {_listed(fatal)}")
    if stream.existing == "update":
        return await _update(connection, answer, wanted, different)
    # the caller refuses differences that lose events
    logger.warning(
        "stream %s differs from the settings, and stays as it is: %s; stream.existing = 'update' changes it",
        name,
        _listed(different),
    )
    return answer


def treatment_of(difference: Difference, stream: Stream, state: dict[str, Any]) -> tuple[str, bool]:
    """Return the treatment of a difference at start, and whether the start fails because of it."""
    if stream.existing == "skip":
        return "it stays as it is: stream.existing = 'skip'", False
    if stream.existing == "validate":
        return "the service does not start: stream.existing = 'validate'", True
    if difference.field in _NEEDED:
        return "it can't be changed: choose another stream.name, or set the present value", True
    if stream.existing == "create":
        return "it stays as it is: stream.existing = 'update' changes it", False
    if _stored_beyond(difference.field, difference.wanted, state):
        return "the service does not start: the stream holds more already", True
    return "the service changes it: stream.existing = 'update'", False


def _stored_beyond(field: str, wanted: Any, state: dict[str, Any]) -> int:
    """Return the stored amount if it is more than a limit, else 0."""
    stored = {"max_bytes": int(state["bytes"]), "max_msgs": int(state["messages"])}.get(field, 0)
    return stored if 0 < (wanted if stored else 0) < stored else 0


async def _update(
    connection: NatsConnection, answer: dict[str, Any], wanted: dict[str, Any], different: list[Difference]
) -> dict[str, Any]:
    name, state = wanted["name"], answer["state"]
    for field in ("max_bytes", "max_msgs"):
        if stored := _stored_beyond(field, wanted[field], state):
            raise StreamMismatch(
                f"stream {name!r} holds {stored} already: {Difference(field, stored, wanted[field])}; the server might "
                "delete events, so nothing was changed"
            )
    changed = {**answer["config"], **{difference.field: difference.wanted for difference in different}}
    if wanted["max_age"]:
        # the server demands it; events have no message ids, so the window has no other effect
        changed["duplicate_window"] = min(changed.get("duplicate_window", 0), wanted["max_age"])
    try:
        updated = await call_api(connection, f"STREAM.UPDATE.{name}", changed)
    except ApiError as error:
        raise StreamMismatch(
            f"stream {name!r} could not be changed: {error}; the changes were {_listed(different)}"
        ) from None
    for field, found, value in different:
        logger.warning("stream %s changed: %s was %r, is %r", name, field, found, value)
    return updated


def _listed(different: list[Difference]) -> str:
    return "; ".join(map(str, different))


def _losing(config: dict[str, Any]) -> str:
    return ", ".join(f"{name} is {config.get(name)!r}" for name in ("max_age", "max_bytes", "max_msgs", "discard"))
