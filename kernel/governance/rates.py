"""How fast work is let in: token buckets, and lanes whose rate follows how the service is doing.

Nothing here looks at a clock: every call is told the time, in seconds of any clock that only moves forward.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

from kernel.settings.governance import Limit, Rates

QUEUE_S = 5.0
"""Those refused are told to come back one after the other, spread over no more than this."""
MARGIN_S = 1e-6
"""Whoever waits exactly as long as it was told must not be refused for a rounding error."""
BAD_SPELL = 2
"""Ticks in distress, one after the other, before an unlimited lane is slowed: one bad second is no bad spell."""
REMEMBERED = 10
"""Ticks whose best throughput a lane is slowed from: in the first bad second hardly anything may have been done."""


class TokenBucket:
    """Tokens that come back at a rate; a full bucket holds the burst. Without a rate it gives whatever is asked.

    Args:
        rate: tokens a second; None is no limit.
        burst: tokens that it holds, at least 1; one second's worth unless given.
    """

    __slots__ = ("_at", "_owed", "_tokens", "burst", "rate")

    def __init__(self, rate: float | None = None, burst: float | None = None, now: float = 0.0) -> None:
        self.rate: float | None = None
        self.burst = math.inf
        self._tokens = self._owed = 0.0
        self._at = now
        self.set(rate, burst, now)

    def set(self, rate: float | None, burst: float | None, now: float) -> None:
        """Change the limit. What is in the bucket stays, as far as it fits; one that had no limit begins full."""
        full = self.rate is None
        self._refill(now)
        self.rate = rate
        if rate is None:
            self.burst, self._owed = math.inf, 0.0
            return
        self.burst = max(1.0, rate if burst is None else burst)
        self._tokens = self.burst if full else min(self._tokens, self.burst)

    def _refill(self, now: float) -> None:
        elapsed = max(0.0, now - self._at)
        self._at = now
        if self.rate is not None and elapsed:
            self._tokens = min(self.burst, self._tokens + elapsed * self.rate)
            self._owed = max(0.0, self._owed - elapsed * self.rate)

    def wait(self, n: float, now: float) -> float:
        """Return 0.0 if `n` could be taken now, else the seconds to wait; more than the burst counts as a burst."""
        if self.rate is None:
            return 0.0
        self._refill(now)
        wait = (min(n, self.burst) - self._tokens) / self.rate
        return wait + MARGIN_S if wait > MARGIN_S else 0.0

    def spend(self, n: float) -> None:
        """Take `n` without asking; what is not there is paid back before anything else is given."""
        if self.rate is not None:
            self._tokens -= n

    def refuse(self, n: float, wait: float) -> float:
        """Return the seconds to tell somebody who can't have `n`: behind those who were told before, in their turn."""
        if self.rate is None:
            return wait
        told = max(wait, min(wait + self._owed / self.rate, QUEUE_S))
        self._owed += n
        return told

    def available(self, now: float) -> float:
        """Return how many tokens there are; infinitely many without a limit."""
        if self.rate is None:
            return math.inf
        self._refill(now)
        return max(0.0, self._tokens)


class Keyed:
    """A bucket for each key, all with the same limit.

    Beyond `most` keys the least recently used one is forgotten: it is full again by then, unless more than `most`
    keys come within the time that a bucket takes to fill.
    """

    def __init__(self, rate: float, burst: float | None, most: int = 10_000) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def get(self, key: str, now: float) -> TokenBucket:
        """Return the key's bucket, a full one if it is new."""
        bucket = self._buckets.get(key)
        if bucket is None:
            bucket = self._buckets[key] = TokenBucket(self._rate, self._burst, now)
            if len(self._buckets) > self._most:
                self._buckets.popitem(last=False)
        else:
            self._buckets.move_to_end(key)
        return bucket

    def set(self, rate: float, burst: float | None, now: float) -> None:
        """Change the limit of all keys."""
        self._rate, self._burst = rate, burst
        for bucket in self._buckets.values():
            bucket.set(rate, burst, now)


class Lane:
    """One kind of work: its configured limit, and an adaptive rate while the service is, or was, in distress.

    Additive increase, multiplicative decrease. In distress the rate is multiplied by `decrease` at each tick, starting
    from the best throughput of the last ticks, down to `minimum`. Without distress it grows by `increase` times the
    highest throughput seen until then, a second. At the configured limit, or at twice that throughput where it comes
    first, the adaptive rate is lifted. So the highest throughput is possible again within 1 / `increase` seconds
    of the last distress, and the lane is as configured within 2 / `increase` (20 s and 40 s by default), however long
    the bad spell was.

    Attributes:
        bucket: what the work takes its tokens from.
        rate: the adaptive rate; None while there is none.
        why: the last distress, while the adaptive rate holds.
    """

    def __init__(self, rates: Rates, limit: Limit, now: float = 0.0) -> None:
        self.bucket = TokenBucket(now=now)
        self.rate: float | None = None
        self.why = ""
        self._bad = 0
        self._highest = self._known = 0.0
        self._recent: deque[float] = deque(maxlen=REMEMBERED)
        self.configure(rates, limit, 1.0, now)

    def configure(self, rates: Rates, limit: Limit, share: float, now: float) -> None:
        """Change the limit.

        Args:
            share: the part of the limit that is this worker's, above 0.
        """
        self._rates = rates
        self._limit = math.inf if limit.rate is None else limit.rate * share
        self._burst = None if limit.burst is None else limit.burst * share
        self._minimum = min(rates.minimum * share, self._limit)
        self._set(now)

    @property
    def present(self) -> float | None:
        """The rate at present, a second; None while there is no limit."""
        rate = self._limit if self.rate is None else min(self.rate, self._limit)
        return None if rate == math.inf else rate

    @property
    def lowest(self) -> bool:
        """Whether the adaptive rate has come down as far as it may."""
        return self.rate is not None and self.rate <= self._minimum

    def _set(self, now: float) -> None:
        rate = self.present
        burst = self._burst
        if self.rate is not None and burst is not None:
            burst = min(burst, self.rate)
        self.bucket.set(rate, burst, now)

    def tick(self, done: float, distress: str, dt: float, now: float) -> None:
        """Adapt the rate.

        Args:
            done: how much was done since the last tick, `dt` seconds ago.
            distress: why there must be less; nothing if all is well.
        """
        self._recent.append(done / dt)
        self._highest = max(self._highest, done / dt)
        if not self._rates.adaptive:
            self.rate, self._bad = None, 0
        elif distress:
            self._bad += 1
            if self.rate is not None or self._bad >= BAD_SPELL:
                before = min(max(self._recent), self._limit) if self.rate is None else self.rate
                self.rate = max(self._minimum, before * self._rates.decrease)
                self.why = distress
                # what is reached while it comes back does not count: the end would move away with it
                self._known = max(self._highest, self._minimum)
        else:
            self._bad = 0
            if self.rate is not None:
                self.rate += self._known * self._rates.increase * dt
                if self.rate >= min(self._limit, 2 * self._known):
                    self.rate = None
        if self.rate is None:
            self.why = ""
        self._set(now)
