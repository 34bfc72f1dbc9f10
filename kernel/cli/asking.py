"""Having running workers try again what a policy or an effect could not do."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from projections.dead_letters import Retried, Waiting

WAIT_S = 10.0
"""For the workers to have tried."""
LOOK_S = 0.2


async def ask_workers(engine: Engine, parked: Sequence[Waiting]) -> list[Retried]:
    """Have the dead letters of policies and effects tried again, and wait a while for what comes of it."""
    from kernel.reactions.letters import BEHIND, ask_again
    from kernel.reactions.store import is_paused
    from projections import dead_letters as letters
    from projections.dead_letters import Retried

    left = {(each.projection, each.aggregate, each.aggregate_id): each for each in parked}
    for key in left:
        await asyncio.to_thread(ask_again, engine, *key)
    done: list[Retried] = []
    for name in sorted({name for name, _, _ in left}):
        if await asyncio.to_thread(is_paused, engine, name):
            for key, before in [(key, each) for key, each in left.items() if key[0] == name]:
                del left[key]
                done.append(Retried(*key, 0, before.events, f"{name} is paused; they are tried when it is resumed"))
    deadline = time.monotonic() + WAIT_S
    while left:
        await asyncio.sleep(LOOK_S)
        now = {
            (each.projection, each.aggregate, each.aggregate_id): each
            for each in await asyncio.to_thread(letters.waiting, engine)
        }
        for key, before in list(left.items()):
            after = now.get(key)
            at_work = after is not None and (after.next_attempt == 0.0 or after.error == BEHIND)
            if at_work and time.monotonic() < deadline:
                continue
            del left[key]
            if after is None:
                done.append(Retried(*key, before.events, 0, ""))
            else:
                why = "no worker has tried it yet" if at_work else after.error
                done.append(Retried(*key, max(0, before.events - after.events), after.events, why))
    return done
