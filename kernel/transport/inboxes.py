"""Inboxes: the subjects where a process takes answers, and the reply subjects that a service may answer to.

The sender of a request names the subject of the answer, and the service publishes there with its own permissions. So
the service answers only to inboxes. Each kind of process has inboxes under a prefix of its own, so that the permissions
of a NATS server can keep a client from the answers of others and from what the service reads for itself.
"""

from __future__ import annotations

from typing import Literal

from kernel.errors import SettingsError
from kernel.settings import Settings

Role = Literal["service", "workers", "client", "operator"]
"""Whose inboxes they are. `service`: a worker's own, for what it reads from JetStream. `workers`: for the answers of
workers to each other. `operator`: of the command line."""
MAX_REPLY = 512
"""Largest length of a reply subject in bytes: the answer must fit beside it on any server."""
MAX_TOKEN, MOST_KNOWN = 32, 4_096
_MAPPED = b"_GR_."
_MAPPED_TOKENS = 3
"""Tokens that a gateway between clusters puts before the reply subject that the sender has named."""


def inbox_root(app: str, settings: Settings) -> str:
    """Return the prefix of the inboxes of all roles: `connection.inbox_prefix`, or below the app's own subjects.

    Raises:
        SettingsError: the setting names subjects that are not for answers.
    """
    subjects = settings.stream.subject_prefix or app
    root = settings.connection.inbox_prefix or f"{subjects}.inbox"
    _check_apart("connection.inbox_prefix", root, subjects)
    return root


def _check_apart(setting: str, prefix: str, subjects: str) -> None:
    for own in (f"{subjects}.{kind}." for kind in ("evt", "cmd", "svc", "snap")):
        if own.startswith(f"{prefix}.") or f"{prefix}.".startswith(own):
            problem = (
                f"{setting}: {prefix!r} and the app's own subjects {own}> overlap; answers there would be taken for "
                f"events or requests. Use {subjects}.inbox, or another prefix"
            )
            raise SettingsError([problem])


def inbox_prefix(app: str, settings: Settings, role: Role) -> str:
    """Return the prefix of the inboxes of a role."""
    return f"{inbox_root(app, settings)}.{role}"


class ReplyFilter:
    """Decides to which reply subjects a service answers.

    Args:
        allowed: prefixes of inboxes, without the last dot.
        refused: prefixes that are never answered to, although they may be below an allowed one.
    """

    def __init__(self, allowed: tuple[str, ...], refused: tuple[str, ...]) -> None:
        self._allowed = tuple(f"{prefix}.".encode() for prefix in allowed)
        self._refused = tuple(f"{prefix}.".encode() for prefix in refused)
        # a client has one inbox for many answers: what was examined once is cheap afterwards
        self._known: set[bytes] = set()

    @classmethod
    def of(cls, app: str, settings: Settings) -> ReplyFilter:
        """Return the filter of an app's service.

        Raises:
            SettingsError: `connection.reply_prefixes` or `connection.inbox_prefix` has the app's own subjects.
        """
        prefixes = settings.connection.reply_prefixes
        for prefix in prefixes:
            _check_apart("connection.reply_prefixes", prefix, settings.stream.subject_prefix or app)
        return cls((inbox_root(app, settings), *prefixes), (inbox_prefix(app, settings, "service"),))

    def allows(self, reply: bytes) -> bool:
        """Return whether the service may answer to a reply subject. It is asked for each command."""
        inbox, _, token = reply.rpartition(b".")
        if inbox in self._known and token.isalnum() and len(token) <= MAX_TOKEN:
            return True
        if not self._examine(reply):
            return False
        if len(self._known) >= MOST_KNOWN:
            self._known.clear()
        self._known.add(inbox)
        return True

    def _examine(self, reply: bytes) -> bool:
        if reply.startswith(_MAPPED):
            # a gateway leaves the sender's own words at the end
            reply = reply.split(b".", _MAPPED_TOKENS)[-1]
        tokens = reply.split(b".")
        return (
            reply.startswith(self._allowed)
            and not reply.startswith(self._refused)
            and all(tokens)
            and b"*" not in reply
            and b">" not in reply
            and len(reply) <= MAX_REPLY
        )
