"""An app that writes its own log lines, for `eskernel run tests.logging_app:app`."""

from __future__ import annotations

import logging
import os
from datetime import UTC, datetime

from tests.apps import notebooks

logger = logging.getLogger("shop.stock")
app = notebooks(os.environ.get("LOGGING_APP", "logging"))


class Odd:
    def __repr__(self) -> str:
        return "<odd>"


logger.info("imported")
logger.warning("%d left", 3, extra={"event": "Sold", "odd": Odd(), 7: datetime(2026, 1, 31, tzinfo=UTC)})
logger.warning("too large", extra={"huge": 2**70, "odd": Odd(), "broken": "\udc80"})
logging.getLogger("nats.aio").info("of no interest")
logging.getLogger("sqlalchemy.engine").warning("of interest")
