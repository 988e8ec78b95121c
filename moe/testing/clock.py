"""Time that stands still. Owns: a clock to pass where a ``clock`` or a ``now`` is asked for."""

from __future__ import annotations

import threading


class FakeClock:
    """Monotonic seconds that pass only when told to. Call it for the time, as ``time.monotonic``.

    >>> clock = FakeClock()
    >>> before = clock()
    >>> clock.advance(1.5) - before
    1.5
    """

    def __init__(self, now: float = 1000.0):
        self._now = now
        self._lock = threading.Lock()

    def __call__(self) -> float:
        return self._now

    def __repr__(self) -> str:
        return f"FakeClock({self._now})"

    def advance(self, seconds: float) -> float:
        """Let time pass.

        :returns: the new time
        :raises ValueError: for negative seconds, as monotonic time never goes back
        """
        if seconds < 0:
            raise ValueError(f"time goes forward only, got {seconds} s")
        with self._lock:
            self._now += seconds
            return self._now
