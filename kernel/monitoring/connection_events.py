"""What happens to the connection to NATS: counted, logged, and reported where it is the end."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable

from kernel.log.repeats import Repeats
from kernel.telemetry.metrics import CONNECTED, CONNECTION_EVENTS, RECONNECTS, count_connection_error

logger = logging.getLogger("eskernel.monitoring")
_QUOTED = re.compile(r'"[^"]*"')
"""What differs between errors of the same kind: the subject of each message that may not be published, for instance."""


class ConnectionEvents:
    """Notes the events of one connection.

    Args:
        stopped: set when the service stops; nothing is logged any more then.
        on_closed: called with a reason when the connection, once established, is closed for good.
    """

    def __init__(self, stopped: asyncio.Event, on_closed: Callable[[str], None]) -> None:
        self._stopped, self._on_closed = stopped, on_closed
        self._established = False
        # while a server is down the same error happens several times a second
        self._repeats = Repeats()

    def establish(self) -> None:
        """Note that the connection was made."""
        self._established = True
        CONNECTED.set(1)

    def note(self, event: str) -> None:
        """Note an event: `disconnected`, `reconnected`, `closed`, or `error: ...`."""
        kind = event.split(":", maxsplit=1)[0]
        CONNECTION_EVENTS.labels(event=kind).inc()
        if kind == "reconnected":
            RECONNECTS.inc()
            CONNECTED.set(1)
        elif kind.startswith("error"):
            count_connection_error(event)
        else:
            CONNECTED.set(0)
        if self._stopped.is_set():
            return
        if event == "closed" and self._established:
            # nats-py gives up after some errors of the server; nothing would ever work again
            self._on_closed("the connection to NATS was closed for good; the lines before say why")
        elif not event.startswith("error"):
            logger.warning("NATS: %s", event)
        elif (more := self._repeats.due(_QUOTED.sub("", event))) is not None:
            logger.warning("NATS: %s%s", event, more)
