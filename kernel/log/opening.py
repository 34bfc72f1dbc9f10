"""Finding an app's stream, or making it; refusing one that an event log can't be built on."""

from __future__ import annotations

import logging
from typing import Any

from kernel.log.api import NO_STREAM, ApiError, call_api, server_version
from kernel.log.appender import GroupCommit
from kernel.log.base import Replaced, StreamMismatch, Unavailable
from kernel.log.jetstream import FORMAT, JetStreamLog, check_keeps_everything, partitions_of
from kernel.log.wire import Wire
from kernel.subjects import Subjects

logger = logging.getLogger("eskernel")


def _config(subjects: Subjects, wire: Wire, replicas: int) -> dict[str, Any]:
    config: dict[str, Any] = {
        "name": subjects.app,
        "description": f"eskernel format={FORMAT} partitions={subjects.partitions}",
        "subjects": [subjects.events()],
        "retention": "limits",
        "discard": "new",
        "storage": "file",
        "num_replicas": replicas,
        "allow_direct": True,
        "deny_delete": True,
        "deny_purge": True,
    }
    if server_version(wire) >= (2, 12):
        config["allow_atomic"] = True
    return config


OLDEST = (2, 10)
"""Oldest server that the tests run on."""


async def open_log(
    wire: Wire,
    app: str,
    *,
    partitions: int = 64,
    replicas: int = 1,
    group_commit: GroupCommit = "auto",
    create: bool = True,
) -> JetStreamLog:
    """Return the app's log, creating its stream if there is none.

    An existing stream keeps the partition count that it was made with.

    Args:
        create: make a stream where there is none.

    Raises:
        Replaced: there is none, and there should be.
        StreamMismatch: a stream of that name exists and an event store can't be built on it.
        Unavailable: the server doesn't answer, or JetStream is not enabled.
    """
    if server_version(wire) < OLDEST:
        told, least = (".".join(map(str, pair)) for pair in (server_version(wire), OLDEST))
        raise StreamMismatch(f"nats-server {told} is too old; {least} or newer is needed")
    wanted = _config(Subjects(app, partitions), wire, replicas)
    try:
        answer = await call_api(wire, f"STREAM.INFO.{app}", None)
    except ApiError as error:
        if error.code != NO_STREAM:
            raise
        if not create:
            # an empty one in its place would be in the way of a restore
            raise Replaced(
                f"the stream {app!r} is gone, and the database was folded from it: restore the stream, or start with "
                "an empty database"
            ) from None
        answer = await call_api(wire, f"STREAM.CREATE.{app}", wanted)
    config = answer["config"]
    found = partitions_of(config)
    # read back: older servers drop fields that they don't know without a word
    needed = ("subjects", "retention", "discard", "storage", "allow_direct")
    if different := [name for name in needed if config.get(name) != wanted[name]]:
        details = "; ".join(f"{name} is {config.get(name)!r}, needed {wanted[name]!r}" for name in different)
        raise StreamMismatch(f"stream {app!r} can't carry an event log: {details}")
    check_keeps_everything(config)
    if int(config.get("num_replicas") or 1) < replicas:
        logger.warning(
            "the stream %s has %s replicas, not %d: `nats stream edit %s --replicas %d` changes that",
            app, config.get("num_replicas"), replicas, app, replicas,
        )  # fmt: skip
    state = answer.get("state") or {}
    if missing := int(state.get("last_seq", 0)) - int(state.get("messages", 0)):
        logger.warning("%d messages of the stream %s are missing: deleted, or lost by the server", missing, app)
    log = JetStreamLog(wire, app, found, group_commit if config.get("allow_atomic") else "never")
    await log.start()
    return log


async def find_log(wire: Wire, app: str) -> JetStreamLog:
    """Return the log of an app whose stream exists.

    Raises:
        Unavailable: there is no such stream, or the server doesn't answer.
    """
    try:
        answer = await call_api(wire, f"STREAM.INFO.{app}", None)
    except ApiError as error:
        if error.code == NO_STREAM:
            raise Unavailable(f"there is no stream {app!r} on this server; has the service been started?") from None
        raise
    log = JetStreamLog(
        wire, app, partitions_of(answer["config"]), "auto" if answer["config"].get("allow_atomic") else "never"
    )
    await log.start()
    return log
