"""Freed memory, given back to the operating system when a server has nothing to do.

glibc keeps what is freed inside its heaps, in holes between blocks that are in use: after a burst of large requests a server
would hold most of its peak for good. To give it back at once would cost page faults with each request, so it is done when no
request has come for a while. Must not know: what the memory was used for.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable

IDLE_BEFORE_TRIM_S = (
    1.0  # ours: longer than the pauses within a burst, shorter than anybody's patience with a full machine
)


class HeapTrimmer:
    """Decides when to trim, and does it, once for each time of work.

    :param trim: gives free memory back; see ``trim_heap``
    """

    def __init__(self, trim: Callable[[], None] | None = None):
        self._trim = trim or trim_heap
        self._requests = self._held_bytes = 0  # when it was looked at last
        self._quiet_since = math.inf

    def look(self, requests: int, busy: bool, now: float, held_bytes: int = 0) -> None:
        """To be called now and then, from any one thread.

        :param requests: accepted so far
        :param busy: True while there is one to be served
        :param held_bytes: kept for later requests, until they are dropped
        """
        worked = busy or requests != self._requests or held_bytes < self._held_bytes
        self._requests, self._held_bytes = requests, held_bytes
        if worked:
            self._quiet_since = now
        elif now - self._quiet_since >= IDLE_BEFORE_TRIM_S:
            self._quiet_since = math.inf
            self._trim()


def trim_heap() -> None:
    """Give the free memory of all heaps back. Without glibc there is nothing to do, or no way to."""
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _malloc_trim() -> Callable[[int], int] | None:
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError):  # macOS, musl
        return None
    trim.argtypes, trim.restype = [ctypes.c_size_t], ctypes.c_int
    return trim
