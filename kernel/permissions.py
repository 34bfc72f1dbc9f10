"""The permissions that each kind of user needs on the NATS servers: for docs/security.md and `eskernel config`.

JetStream answers a request at any subject that the request names, with rights of its own. So who may send a request to
its API can have something written to the stream, and only a service and an operator are given any part of the API.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

from kernel.app import App
from kernel.log.snapshots import snapshots_of
from kernel.log.subjects import subjects_of
from kernel.partitions.bucket import bucket_of
from kernel.settings import Settings
from kernel.transport.connection import NatsConnection
from kernel.transport.inboxes import inbox_root

Kind = Literal["service", "client", "operator", "monitoring"]
CHECK = "eskernel-check"
"""A word in the subjects of trials. No stream has this name: a message that expects it is not stored."""


class Permissions(NamedTuple):
    """The subjects of one kind of user. Everything else is denied.

    Attributes:
        publish: what he may publish to.
        subscribe: what he may subscribe to.
    """

    publish: tuple[str, ...]
    subscribe: tuple[str, ...]

    def as_config(self) -> str:
        """Return them as the value of `permissions` in the configuration of a nats-server."""

        def listed(subjects: tuple[str, ...]) -> str:
            return "[" + ", ".join(f'"{subject}"' for subject in subjects) + "]"

        return f"{{ publish: {{ allow: {listed(self.publish)} }}, subscribe: {{ allow: {listed(self.subscribe)} }} }}"


def permissions_of(kind: Kind, app: App, settings: Settings) -> Permissions:
    """Return the permissions that a kind of user needs for this app and these settings.

    Args:
        kind: `service`: workers. `client`: sends commands. `operator`: the command line. `monitoring`: the status;
            its `connection.inbox_prefix` must be that of its inboxes.
    """
    subjects, root = subjects_of(app.name, settings), inbox_root(app.name, settings)
    commands = (subjects.commands(), subjects.commands(">"))
    status = subjects.service("status")
    if kind == "client":
        return Permissions(commands, (f"{root}.client.>",))
    if kind == "monitoring":
        return Permissions((status,), (f"{root}.monitoring.>",))
    if kind == "operator":
        dropping = f"{settings.jetstream.prefix}.STREAM.PURGE.{_snapshots(app, settings)}"
        requests = (*commands, subjects.service(">"), *_reading(app, settings), dropping)
        return Permissions(requests, (f"{root}.operator.>",))
    # where an account is reached over a domain, other tokens stand between
    stream = settings.stream.name or app.name
    acknowledge = "$JS.ACK.>" if settings.jetstream.domain else f"$JS.ACK.{stream}.>"
    replies = tuple(f"{prefix}.>" for prefix in dict.fromkeys((root, *settings.connection.reply_prefixes)))
    owned = (
        subjects.events(),
        subjects.snapshot(),
        subjects.commands(">"),
        subjects.service(">"),
        acknowledge,
        *replies,
    )
    return Permissions(
        (*owned, *_reading(app, settings), *_writing(app, settings)),
        (*commands, subjects.service(">"), f"{root}.service.>", f"{root}.workers.>"),
    )


class Share(NamedTuple):
    """What an account of readers gets of the account of the service: read-only access to the log.

    In an account of its own an answer can't leave that account, whatever reply subject a reader names.

    Attributes:
        requests: the part of JetStream's API that is exported. It has no consumers: who may create one can have events
            delivered to any subject of the service's account.
        prefix: prefix of the API in the account of the readers, their `jetstream.api_prefix`.
    """

    requests: tuple[str, ...]
    prefix: str
    api: str

    def as_exports(self) -> str:
        """Return the exports of the service's account, for the configuration of a nats-server."""
        return "\n".join(
            f'{{ service: "{self.api}.{request}"{", response_type: Stream" if "DIRECT" in request else ""} }}'
            for request in self.requests
        )

    def as_imports(self, account: str) -> str:
        """Return the imports of the readers' account."""
        return "\n".join(
            f'{{ service: {{ account: {account}, subject: "{self.api}.{request}" }}, to: "{self.prefix}.{request}" }}'
            for request in self.requests
        )


def share_of(app: App, settings: Settings) -> Share:
    """Return what readers get who must change nothing."""
    stream = settings.stream.name or app.name
    requests = (f"STREAM.INFO.{stream}", f"STREAM.MSG.GET.{stream}", f"DIRECT.GET.{stream}")
    prefix = f"{settings.stream.subject_prefix or app.name}.api"
    return Share(requests, prefix, settings.jetstream.prefix)


def _snapshots(app: App, settings: Settings) -> str:
    return snapshots_of(settings.stream.name or app.name)


def _reading(app: App, settings: Settings) -> tuple[str, ...]:
    """Return the subjects of JetStream's API with which the log and the leases are read."""
    api, stream = settings.jetstream.prefix, settings.stream.name or app.name
    bucket, snapshots = f"KV_{bucket_of(stream)}", _snapshots(app, settings)
    requests = (
        "INFO",
        *(f"STREAM.{verb}.{name}" for verb in ("INFO", "MSG.GET") for name in (stream, bucket, snapshots)),
        f"DIRECT.GET.{stream}",
        f"DIRECT.GET.{snapshots}",
        f"CONSUMER.CREATE.{stream}.>",
        *(f"CONSUMER.{verb}.{stream}.*" for verb in ("INFO", "DELETE", "MSG.NEXT")),
    )
    return tuple(f"{api}.{request}" for request in requests)


def _writing(app: App, settings: Settings) -> tuple[str, ...]:
    """Return the subjects with which a service keeps its stream and its leases."""
    api, stream = settings.jetstream.prefix, settings.stream.name or app.name
    bucket, snapshots = bucket_of(stream), _snapshots(app, settings)
    kept = settings.stream.existing
    changes = {"create": ("CREATE",), "update": ("CREATE", "UPDATE")}.get(kept, ())
    return (
        *(f"{api}.STREAM.{verb}.{stream}" for verb in changes),
        f"{api}.STREAM.CREATE.KV_{bucket}",
        f"{api}.STREAM.CREATE.{snapshots}",
        *(f"{api}.CONSUMER.{verb}.{snapshots}.*" for verb in ("CREATE", "DELETE", "MSG.NEXT")),
        f"{api}.STREAM.MSG.DELETE.KV_{bucket}",
        f"$KV.{bucket}.>",
    )


class Missing(NamedTuple):
    """A permission that the user of a connection lacks.

    Attributes:
        needed: False if a service works without it: for most senders, without snapshots, or while its stream exists.
    """

    verb: Literal["publish", "subscribe"]
    subject: str
    needed: bool = True


async def find_missing(connection: NatsConnection, app: App, settings: Settings) -> list[Missing]:
    """Return the permissions of a service that a connection's user lacks, found out by trying them.

    Nothing is changed: requests to the API are such that it refuses them, and no stream stores the messages.
    """
    wanted = permissions_of("service", app, settings)
    subjects = subjects_of(app.name, settings)
    events = subjects.events()
    optional = tuple(f"{prefix}." for prefix in settings.connection.reply_prefixes)
    made = settings.stream.name or app.name
    creation = [f"{settings.jetstream.prefix}.STREAM.{verb}.{made}" for verb in ("CREATE", "UPDATE")]
    snapshots = _snapshots(app, settings)
    denied: set[str] = set()
    connection.denials.append(denied.add)
    tried: dict[str, Missing] = {}
    for subject in wanted.publish:
        trial = subject.replace(">", f"0.{CHECK}.0" if subject == events else f"{CHECK}.0").replace("*", CHECK)
        needed = not subject.startswith(optional) and subject not in creation
        needed = needed and subject != subjects.snapshot() and snapshots not in subject.split(".")
        tried[trial] = Missing("publish", subject, needed)
        await connection.publish(trial, b"-", headers={"Nats-Expected-Stream": CHECK})
    listening = []
    for subject in wanted.subscribe:
        tried[subject] = Missing("subscribe", subject)
        listening.append(await connection.subscribe(subject))
    await connection.flush()  # the server answers it after all refusals
    for subscription in listening:
        await subscription.unsubscribe()
    connection.denials.remove(denied.add)
    return [missing for trial, missing in tried.items() if trial in denied]
