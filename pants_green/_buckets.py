"""Token buckets: how many per second, and what may come at once; pure, the caller passes in "now"."""

__all__ = ["TokenBucket"]

#: Seconds after which one looks again in any case: what is slower than that is a timer that no loop would take.
LONGEST = 3600.0


class TokenBucket:
    """Tokens that come at a steady rate, up to so many at a time.

    What is taken may be more than there is, for nobody knows how long a receive is before it has been made: then the next have
    to wait for as much longer.

    Args:
        rate: tokens per second, more than 0.
        now: seconds, by the clock of all calls.
        burst: how many there may be at most, with which it begins; by default those of one second, and one at least.
    """

    __slots__ = ("_at", "_tokens", "burst", "rate")

    def __init__(self, rate: float, now: float, burst: float | None = None) -> None:
        self.rate = rate
        self.burst = max(rate, 1.0) if burst is None else burst
        self._tokens = self.burst
        self._at = now

    def take(self, count: float, now: float) -> None:
        """Take tokens, be they there or not."""
        self._tokens = self._now(now) - count

    def delay(self, now: float) -> float:
        """Return the seconds until something may be taken: 0.0 if it may now."""
        missing = self.least - self._now(now)
        # Who waited for exactly so long may find a little less, as floats are.
        return 0.0 if missing <= self.least * 1e-6 else min(missing / self.rate, LONGEST)

    def available(self, now: float) -> int:
        """Return how many may be taken at once, if any may: 1 at least."""
        return max(1, int(self._now(now)))

    @property
    def least(self) -> float:
        """Tokens that are waited for: a whole one; of bytes those of a hundredth of a second, so that none comes alone."""
        return min(self.burst, max(1.0, self.rate / 100))

    def _now(self, now: float) -> float:
        tokens = self._tokens
        if now > self._at:
            tokens = self._tokens = min(self.burst, tokens + (now - self._at) * self.rate)
            self._at = now
        return tokens
