"""Token buckets, and lanes that adapt their rate to the state of the service.

No function here reads a clock. The caller passes the time, in seconds of any clock that only moves forward.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque

from kernel.settings.governance import Limit, Rates

QUEUE_S = 5.0
"""Refused senders get staggered times to retry, at most this long."""
MARGIN_S = 1e-6
"""Added to a wait, so that a rounding error does not refuse a sender that has waited exactly as long as required."""
BAD_SPELL = 2
"""Consecutive ticks in distress before an unlimited lane is slowed: one bad second does not slow it."""
REMEMBERED = 10
"""A lane is slowed from the best throughput of this many ticks: in the first tick of distress it may be near zero."""


class TokenBucket:
    """Tokens that are refilled at a rate, up to the burst. A bucket without a rate has no limit.

    Args:
        rate: tokens per second; None is no limit.
        burst: capacity, at least 1; by default the tokens of one second.
    """

    __slots__ = ("_at", "_owed", "_tokens", "burst", "rate")

    def __init__(self, rate: float | None = None, burst: float | None = None, now: float = 0.0) -> None:
        self.rate: float | None = None
        self.burst = math.inf
        self._tokens = self._owed = 0.0
        self._at = now
        self.set(rate, burst, now)

    def set(self, rate: float | None, burst: float | None, now: float) -> None:
        """Change the limit. The tokens stay, up to the new burst; a bucket that had no limit becomes full."""
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
        """Return the seconds until `n` tokens are there, 0.0 if they are. More than the burst counts as the burst."""
        if self.rate is None:
            return 0.0
        self._refill(now)
        wait = (min(n, self.burst) - self._tokens) / self.rate
        return wait + MARGIN_S if wait > MARGIN_S else 0.0

    def spend(self, n: float) -> None:
        """Take `n` tokens unconditionally. The bucket may become negative until it is refilled."""
        if self.rate is not None:
            self._tokens -= n

    def refuse(self, n: float, wait: float) -> float:
        """Return the seconds after which a refused sender should retry: behind all senders that were refused before."""
        if self.rate is None:
            return wait
        retry_after = max(wait, min(wait + self._owed / self.rate, QUEUE_S))
        self._owed += n
        return retry_after

    def available(self, now: float) -> float:
        """Return the number of tokens; infinity without a limit."""
        if self.rate is None:
            return math.inf
        self._refill(now)
        return max(0.0, self._tokens)


class Keyed:
    """A bucket for each key, all with the same limit.

    Beyond `most` keys the least recently used bucket is forgotten. It is usually full by then: only if more than `most`
    keys are used within the time that a bucket takes to fill, a key gets too many tokens.
    """

    def __init__(self, rate: float, burst: float | None, most: int = 10_000) -> None:
        self._rate, self._burst, self._most = rate, burst, most
        self._buckets: OrderedDict[str, TokenBucket] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def get(self, key: str, now: float) -> TokenBucket:
        """Return the key's bucket. A new bucket is full."""
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
    """One kind of work: its configured limit, and an adaptive rate during and after distress.

    The rate increases additively and decreases multiplicatively:

    - In distress each tick multiplies the rate by `decrease`, down to `minimum`. The first rate is the best throughput
      of the last ticks.
    - Without distress the rate grows in each second by `increase` times the highest throughput seen so far.
    - The adaptive rate ends at the configured limit, or at twice the highest throughput, whichever is lower.

    So the highest throughput is possible again within 1 / `increase` seconds after the last distress, and the lane is
    as configured within 2 / `increase` seconds (20 s and 40 s by default), however long the distress lasted.

    Attributes:
        bucket: the bucket that the work takes its tokens from.
        rate: the adaptive rate; None while there is none.
        why: reason of the last distress, while there is an adaptive rate.
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
            share: this worker's share of the limit, above 0.
        """
        self._rates = rates
        self._limit = math.inf if limit.rate is None else limit.rate * share
        self._burst = None if limit.burst is None else limit.burst * share
        self._minimum = min(rates.minimum * share, self._limit)
        self._set(now)

    @property
    def present(self) -> float | None:
        """The current rate per second; None while there is no limit."""
        rate = self._limit if self.rate is None else min(self.rate, self._limit)
        return None if rate == math.inf else rate

    @property
    def lowest(self) -> bool:
        """True if the adaptive rate is at its minimum."""
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
            done: amount of work done since the last tick, `dt` seconds ago.
            distress: reason of the distress; empty if there is none.
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
                # later throughput does not count: the rate at which the adaptation ends must not grow with it
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
