"""Exactly-once backward. Owns: which requests were trained, and their answers, within a bounded window.

Pure bookkeeping, ``now`` is passed in. Must not know: what an answer holds, or how requests arrive.

A repeated request id joins the first request while that runs and gets its answer afterwards. When answers have to be dropped
for space, the id is still remembered for the rest of the window: then a repeat is refused rather than trained twice.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from moe.errors import Refused

T = TypeVar("T")

MAX_REMEMBERED_IDS = 2**18  # whose answers were dropped; ours, about 50 MB at the very most


class OnceWindow(Generic[T]):
    """Requests by id, from their start until they are forgotten.

    :param max_replies: answers kept
    :param max_bytes: of all kept answers together
    :param window_s: how long a request is remembered
    """

    def __init__(self, max_replies: int, max_bytes: int, window_s: float):
        self._max_replies, self._max_bytes, self._window_s = max_replies, max_bytes, window_s
        self._running: dict[Hashable, T] = {}
        self._done: OrderedDict[Hashable, tuple[float, int, T]] = OrderedDict()  # finished_at, size, answer
        self._dropped: OrderedDict[Hashable, float] = OrderedDict()  # finished_at
        self._bytes = 0

    def __repr__(self) -> str:
        return f"OnceWindow({len(self._running)} running, {len(self._done)} answers of {self._bytes} bytes)"

    def find(self, key: Hashable, now: float) -> T | None:
        """The first request with this id, running or done; None if there was none.

        :raises Refused: there was one, but its answer had to be dropped
        """
        self._forget(now)
        if key in self._running:
            return self._running[key]
        if key in self._done:
            return self._done[key][2]
        if key in self._dropped:
            raise Refused(
                "this backward was done already, but its answer is not kept any more; it is not trained twice"
            )
        return None

    def begin(self, key: Hashable, request: T) -> None:
        """Remember a request that starts now."""
        assert key not in self._running
        self._running[key] = request

    def abandon(self, key: Hashable) -> None:
        """The request failed before anything was trained: a repeat may try again."""
        self._running.pop(key, None)

    def finish(self, key: Hashable, size_bytes: int, now: float) -> None:
        """The request was trained; keep its answer."""
        request = self._running.pop(key, None)
        if request is None:
            return
        self._done[key] = (now, size_bytes, request)
        self._bytes += size_bytes
        while len(self._done) > self._max_replies or self._bytes > self._max_bytes:
            old, (finished_at, size, _) = self._done.popitem(last=False)
            self._bytes -= size
            self._dropped[old] = finished_at
        while len(self._dropped) > MAX_REMEMBERED_IDS:
            self._dropped.popitem(last=False)

    def _forget(self, now: float) -> None:
        while self._done and next(iter(self._done.values()))[0] <= now - self._window_s:
            _, (_, size, _) = self._done.popitem(last=False)
            self._bytes -= size
        while self._dropped and next(iter(self._dropped.values())) <= now - self._window_s:
            self._dropped.popitem(last=False)
