"""Effects: what the app does outside of itself when something has happened, such as a mail or a call of a service."""

from __future__ import annotations

from typing import Any, ClassVar

from aggregates.policies import Reacting

_NOT_GIVEN: Any = object()


class Effect(Reacting):
    """Whenever this has happened, something is done outside of the app: async handlers.

    Each event is handled at least once: after a crash, or when partitions move, it may be handled again. Use
    `meta.event_id` as an idempotency key: it is always the same. Events of one aggregate are handled in order. A
    handler that raises, or takes too long, is tried again with growing pauses; meanwhile later events of its aggregate
    wait. After the last attempt the event waits for `eskernel dead-letters`. A rebuild never runs an effect.

        class Mails(Effect, of=Order, timeout=10):
            @reacts
            async def confirmed(self, event: Confirmed, meta: Meta) -> None:
                await send_mail(event.address, key=meta.event_id)

    Class keywords, besides `of`, `start` and `name`:
        timeout: seconds after which a handler is cancelled.
        concurrency: how many handlers of this effect run at once in a worker, each for another aggregate.
    """

    timeout: ClassVar[float] = 30.0
    concurrency: ClassVar[int] = 16

    def __init_subclass__(cls, *, timeout: float = _NOT_GIVEN, concurrency: int = _NOT_GIVEN, **keywords: Any) -> None:
        super().__init_subclass__(**keywords)
        if timeout is not _NOT_GIVEN:
            cls.timeout = timeout
        if concurrency is not _NOT_GIVEN:
            cls.concurrency = concurrency


def effect_problems(effect: Effect) -> list[str]:
    """Return what is wrong with an effect's own keywords."""
    problems = []
    name = type(effect).__name__
    timeout: object = effect.timeout
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not 0 < timeout <= 3600:
        problems.append(f"{name}: timeout={timeout!r} is not a number of seconds up to 3600")
    concurrency: object = effect.concurrency
    if type(concurrency) is not int or not 1 <= concurrency <= 10_000:
        problems.append(f"{name}: concurrency={concurrency!r} is not a whole number from 1 to 10,000")
    return problems
