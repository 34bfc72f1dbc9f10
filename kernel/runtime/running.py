"""The description of a running service in its data directory: other processes find the service with it.

It needs no settings: a query must not wait for them.
"""

from __future__ import annotations

import fcntl
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from kernel.errors import NotRunning

if TYPE_CHECKING:
    from kernel.settings import Settings


@dataclass(frozen=True, slots=True)
class Running:
    """The description of a running service.

    Attributes:
        app: name of the app.
        spec: the app's place, as `eskernel run` got it, such as `examples.bank:app`.
        directory: working directory of the service, from which the spec is imported.
        pid: process id.
        nats: URLs of the NATS servers, separated by commas.
        database: URL of the database.
        http: URL of the HTTP pages.
        settings: the settings that are not defaults, with secrets.
    """

    app: str
    spec: str
    directory: str
    pid: int
    nats: str
    database: str
    http: str
    settings: dict[str, Any]

    def as_settings(self) -> Settings:
        """Return the settings of the service, with the URLs of its server and its database."""
        from kernel.settings import Settings

        return Settings.model_validate(self.settings)


def find_running(data: Path, app: str | None = None) -> Running:
    """Return the running service of the data directory.

    Args:
        app: name of the app, or `package.module:variable` as it was started; it may be omitted if only one app is
            running.

    Raises:
        NotRunning: no service is running, or several are and no app is given.
    """
    found = []
    for path in sorted(data.glob("*/service.json")):
        try:
            running = msgspec.json.decode(path.read_bytes(), type=Running)
        except (OSError, msgspec.MsgspecError):
            continue
        if is_locked(path.with_name("lock")) and app in (None, running.app, running.spec):
            found.append(running)
    if len(found) == 1:
        return found[0]
    if not found:
        which = f"app {app!r} is running" if app else "service is running"
        raise NotRunning(f"no {which} in {data}; start one with `eskernel run package.module:app`, or give --data")
    apps = ", ".join(running.app for running in found)
    raise NotRunning(f"several apps are running in {data}: {apps}; choose one with --app")


def is_locked(path: Path) -> bool | None:
    """Return whether a process holds the lock of a file, or None if it can't be found out."""
    try:
        with path.open("r+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False
