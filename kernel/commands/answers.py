"""The answers to commands: encoded, sent, and counted."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Collection

from kernel.log.repeats import Repeats
from kernel.protocol import ErrorType, Receipt, Returned, encode_error, encode_receipt
from kernel.telemetry.metrics import COMMAND_SECONDS, COMMANDS, COMMANDS_PENDING, count_error_of, observe_all
from kernel.transport.outbox import Outbox

logger = logging.getLogger("eskernel.commands")
SHORTER = (1_000, 200, 50)
"""Characters of an error's message that are tried, one after the other, where the server does not take the message."""
RETRY_AFTER_S = 0.2
"""When a sender may try again that was refused for a reason that passes."""


class PendingCommands:
    """The commands that were admitted and have no answer yet.

    Attributes:
        total: how many there are.
    """

    def __init__(self, partitions: int) -> None:
        self.total = 0
        self._by_partition = [0] * partitions
        self._drains = 0
        self._ended = asyncio.Event()

    def add(self, partition: int) -> None:
        """Count a command that was admitted."""
        self.total += 1
        self._by_partition[partition] += 1

    def end(self, partition: int) -> None:
        """Count a command that was answered."""
        self.total -= 1
        self._by_partition[partition] -= 1
        if self._drains:
            self._ended.set()

    async def drained(self, timeout: float, partitions: Collection[int] | None = None) -> bool:
        """Wait until no command of these partitions, or of any, is pending; return False after `timeout` seconds."""

        def pending() -> bool:
            if partitions is None:
                return self.total > 0
            return any(self._by_partition[partition] for partition in partitions)

        self._drains += 1
        try:
            async with asyncio.timeout(timeout):
                while pending():
                    self._ended.clear()
                    await self._ended.wait()
        except TimeoutError:
            return False
        finally:
            self._drains -= 1
        return True


class Answers:
    """Sends receipts and errors to the senders of commands.

    Args:
        pending: gets shorter with each answer to a command that was admitted.
    """

    def __init__(self, outbox: Outbox, pending: PendingCommands) -> None:
        self._outbox, self._pending = outbox, pending
        # since the metrics were last brought up to date: answers by aggregate, command, outcome; and their times
        self._outcomes: dict[tuple[str, str, str], int] = {}
        self._times: list[float] = []
        self._repeats = Repeats()

    def send_receipt(self, reply: bytes, receipt: Receipt, returned: Returned | None = None) -> None:
        """Answer a command that took effect. What the server does not take beside the receipt is left out."""
        if returned is not None and reply:
            answer = encode_receipt(receipt, returned)
            if self._outbox.publish(reply, answer):
                return
            omitted = f"the answer would have {len(answer)} bytes, which is more than the server takes (max_payload)"
            if self._outbox.publish(reply, encode_receipt(receipt, Returned(omitted=omitted))):
                return
        if reply and not self._outbox.publish(reply, encode_receipt(receipt)):
            # the sender knows the id
            short = Receipt(receipt.version, receipt.sequence, receipt.partition, "", receipt.duplicate)
            self._publish_or_drop(reply, encode_receipt(short))

    def send_error(
        self,
        reply: bytes,
        type: ErrorType,
        message: str,
        command_id: str = "",
        retry_after: float | None = None,
        version: int | None = None,
    ) -> None:
        """Answer a command that did not take effect. The message is cut if the server does not take all of it."""
        if reply and not self._outbox.publish(reply, encode_error(type, message, command_id, retry_after, version)):
            for length in SHORTER:
                answer = encode_error(type, message[:length], command_id, retry_after, version)
                if self._outbox.publish(reply, answer):
                    return
            self._publish_or_drop(reply, encode_error(type, "", "", retry_after, version))

    def _publish_or_drop(self, reply: bytes, answer: bytes) -> None:
        if not self._outbox.publish(reply, answer) and (more := self._repeats.due("dropped")) is not None:
            logger.warning("an answer is larger than the server takes; its sender gets none: %.80r%s", reply, more)

    def count_refused(self, outcome: str) -> None:
        """Count a request that was refused before it was admitted."""
        answer = "", "", outcome
        self._outcomes[answer] = self._outcomes.get(answer, 0) + 1

    def count_answered(self, aggregate: str, command: str, outcome: str, arrived: float) -> None:
        """Count the answer to a command that was admitted, and note how long it took.

        Args:
            arrived: when it arrived, by the performance counter.
        """
        self._times.append(time.perf_counter() - arrived)
        answer = aggregate, command, outcome
        self._outcomes[answer] = self._outcomes.get(answer, 0) + 1

    def publish_metrics(self) -> None:
        """Bring the counters up to date; a job does it, so that a command pays nothing for them."""
        outcomes, self._outcomes = self._outcomes, {}
        for (aggregate, command, outcome), count in outcomes.items():
            COMMANDS.labels(aggregate=aggregate, command=command, outcome=outcome).inc(count)
            count_error_of(outcome, count)
        times, self._times = self._times, []
        observe_all(COMMAND_SECONDS, times)
        COMMANDS_PENDING.set(self._pending.total)
