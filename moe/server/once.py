"""Exactly-once backward. Owns: which requests were trained, and their answers, within a bounded window.

Pure bookkeeping, ``now`` is passed in. Must not know: what an answer holds, or how requests arrive.

A repeated request id joins the first request while that runs and gets its answer afterwards. When answers have to be dropped
for space, the id is still remembered for the rest of the window: then a repeat is refused rather than trained twice.

Each peer has a window of its own. When there is no room for all, who has most loses its oldest: most answers, by their bytes or
their number, whichever is the larger part of what there may be, and most ids, which are small, by their number. So a flood of
one peer ends nobody else's window, and among n peers nobody loses anything who has less than an n-th.
"""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from moe.errors import Refused

T = TypeVar("T")

MAX_REMEMBERED_IDS = 2**18  # whose answers were dropped, of all peers; ours
ID_BYTES = 512  # one of these takes at most, with all that belongs to it; measured: 285
ANSWER_BYTES = 2048  # an answer takes besides its tensors' values; measured: 1300


@dataclass(frozen=True)
class _Answer(Generic[T]):  # no NamedTuple: Python 3.10 has none that is generic
    finished_at: float
    size_bytes: int
    request: T


class _Peer(Generic[T]):
    """One peer's window.

    :ivar running: begun, neither finished nor abandoned
    :ivar answers: finished, the oldest first
    :ivar ids: when those were finished whose answers are not kept any more, the oldest first
    """

    __slots__ = ("answers", "ids", "running", "size_bytes")

    def __init__(self) -> None:
        self.running: dict[Hashable, T] = {}
        self.answers: OrderedDict[Hashable, _Answer[T]] = OrderedDict()
        self.ids: OrderedDict[Hashable, float] = OrderedDict()
        self.size_bytes = 0

    def drop_oldest(self) -> _Answer[T]:
        """Forget an answer, but not its id."""
        key, answer = self.answers.popitem(last=False)
        self.size_bytes -= answer.size_bytes
        self.ids[key] = answer.finished_at
        return answer

    @property
    def empty(self) -> bool:
        return not (self.running or self.answers or self.ids)


class OnceWindow(Generic[T]):
    """Requests by peer and id, from their start until they are forgotten.

    :param max_replies: answers kept, of all peers together
    :param max_bytes: of all kept answers together, ``ANSWER_BYTES`` for each besides its values
    :param window_s: how long a request is remembered
    """

    def __init__(self, max_replies: int, max_bytes: int, window_s: float):
        self._max_replies, self._max_bytes, self._window_s = max_replies, max_bytes, window_s
        self._peers: dict[str, _Peer[T]] = {}
        self._used: OrderedDict[str, float] = OrderedDict()  # when a request of a peer was last finished
        self._most_answers = _Most(self._part)
        self._most_ids = _Most(lambda peer: len(self._peers[peer].ids) if peer in self._peers else 0)
        self._replies = self._ids = 0
        self.bytes = 0

    def __repr__(self) -> str:
        running = sum(len(peer.running) for peer in self._peers.values())
        return f"OnceWindow({running} running, {self._replies} answers of {self.bytes} bytes)"

    def find(self, peer: str, key: Hashable, now: float) -> T | None:
        """The first request of this peer with this id, running or done; None if there was none.

        :raises Refused: there was one, but its answer had to be dropped
        """
        self._forget(now)
        own = self._peers.get(peer)
        if own is None:
            return None
        if key in own.running:
            return own.running[key]
        self._forget_of(peer, now)
        if key in own.answers:
            return own.answers[key].request
        if own.ids.get(key, -math.inf) > now - self._window_s:
            raise Refused(
                "this backward was done already, but its answer is not kept any more; it is not trained twice"
            )
        return None

    def begin(self, peer: str, key: Hashable, request: T) -> None:
        """Remember a request that starts now."""
        own = self._peers.setdefault(peer, _Peer())
        assert key not in own.running
        own.running[key] = request

    def abandon(self, peer: str, key: Hashable) -> None:
        """The request failed before anything was trained: a repeat may try again."""
        own = self._peers.get(peer)
        if own is not None:
            own.running.pop(key, None)
            self._drop_if_empty(peer)

    def finish(self, peer: str, key: Hashable, size_bytes: int | None, now: float) -> None:
        """The request was trained; keep its answer.

        :param size_bytes: of the answer's values; None: there is none to keep, only that it was trained
        """
        self._forget(now)
        own = self._peers.get(peer)
        if own is None or key not in own.running:
            return
        self._forget_of(peer, now)  # while this one keeps the peer known
        request = own.running.pop(key)
        self._used[peer] = now
        self._used.move_to_end(peer)
        self._ids -= own.ids.pop(key, None) is not None  # one whose time was over
        if size_bytes is None:
            own.ids[key] = now
            self._ids += 1
            self._most_ids.changed(peer)
        else:
            size_bytes += ANSWER_BYTES
            own.answers[key] = _Answer(now, size_bytes, request)
            own.size_bytes += size_bytes
            self._replies += 1
            self.bytes += size_bytes
            self._most_answers.changed(peer)
        while self._replies > self._max_replies or self.bytes > self._max_bytes:
            most = self._most_answers.peer()
            dropped = self._peers[most].drop_oldest()
            self._replies -= 1
            self._ids += 1
            self.bytes -= dropped.size_bytes
            self._most_answers.changed(most)
            self._most_ids.changed(most)
        while self._ids > MAX_REMEMBERED_IDS:
            most = self._most_ids.peer()
            self._peers[most].ids.popitem(last=False)
            self._ids -= 1
            self._most_ids.changed(most)
            self._drop_if_empty(most)

    def check(self) -> None:
        """Assert that what is counted is what is there."""
        peers = self._peers.values()
        assert self._replies == sum(len(peer.answers) for peer in peers) <= self._max_replies
        assert self._ids == sum(len(peer.ids) for peer in peers) <= MAX_REMEMBERED_IDS
        assert self.bytes == sum(answer.size_bytes for peer in peers for answer in peer.answers.values())
        assert self.bytes == sum(peer.size_bytes for peer in peers) <= self._max_bytes
        assert not any(peer.empty for peer in peers)
        assert {name for name, peer in self._peers.items() if peer.answers or peer.ids} <= set(self._used)

    def _part(self, peer: str) -> float:
        """What this peer's answers take of what there may be."""
        own = self._peers.get(peer)
        if own is None or not own.answers:
            return 0.0
        return max(own.size_bytes / self._max_bytes, len(own.answers) / self._max_replies)

    def _forget(self, now: float) -> None:
        """Peers of which nothing was finished for a whole window."""
        while self._used:
            peer, used_at = next(iter(self._used.items()))
            if used_at > now - self._window_s:
                return
            del self._used[peer]
            self._forget_of(peer, now)

    def _forget_of(self, peer: str, now: float) -> None:
        """What one peer has finished so long ago."""
        own, end = self._peers.get(peer), now - self._window_s
        if own is None:
            return
        while own.answers and next(iter(own.answers.values())).finished_at <= end:
            _, answer = own.answers.popitem(last=False)
            own.size_bytes -= answer.size_bytes
            self.bytes -= answer.size_bytes
            self._replies -= 1
            self._most_answers.changed(peer)
        while own.ids and next(iter(own.ids.values())) <= end:
            own.ids.popitem(last=False)
            self._ids -= 1
            self._most_ids.changed(peer)
        self._drop_if_empty(peer)

    def _drop_if_empty(self, peer: str) -> None:
        if peer in self._peers and self._peers[peer].empty:
            del self._peers[peer]
            self._used.pop(peer, None)


class _Most:
    """Who has most of something.

    :param amount: what a peer has now
    """

    def __init__(self, amount: Callable[[str], float]):
        self._amount = amount
        self._heap: list[tuple[float, str]] = []  # negative amounts; those that are not so any more are not valid
        self._known: dict[str, float] = {}

    def changed(self, peer: str) -> None:
        """What this peer has is another amount now."""
        amount = self._amount(peer)
        if not amount:
            self._known.pop(peer, None)
        else:
            self._known[peer] = amount
            heapq.heappush(self._heap, (-amount, peer))
        if len(self._heap) > 2 * len(self._known) + 64:
            self._heap = [(-amount, peer) for peer, amount in self._known.items()]
            heapq.heapify(self._heap)

    def peer(self) -> str:
        """The one that has most; there must be one."""
        while True:
            amount, peer = self._heap[0]
            if self._known.get(peer) == -amount:
                return peer
            heapq.heappop(self._heap)
