"""Memory that peers make a server take: requests being received, waiting or computed, and answers that are not sent yet.

Owns: who has how much of it, and how much each and all may have.

Every byte is reserved before it is taken, and given back when nobody needs it any more: a ``Reservation`` knows for what it is
kept. Pure bookkeeping under one lock, for any thread. Must not know: what a request is, or where the bytes lie.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable

from moe.errors import Overloaded


class InflightBytes:
    """Reserved bytes, by peer.

    A peer that has nothing reserved may have one reservation of any size that fits into ``max_bytes``; its others fit into its
    share.

    :param max_bytes: of all peers together
    :param max_bytes_per_peer: the share of one peer
    """

    def __init__(self, max_bytes: int, max_bytes_per_peer: int):
        self.max_bytes, self.max_bytes_per_peer = max_bytes, min(max_bytes, max_bytes_per_peer)
        self._lock = threading.Lock()
        self._bytes = 0
        self._of_peer: dict[str, int] = {}
        self._reservations: dict[str, int] = {}  # how many, by peer
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    def __repr__(self) -> str:
        return f"InflightBytes({self._bytes} of {self.max_bytes} bytes, {len(self._of_peer)} peers)"

    @property
    def bytes(self) -> int:
        """Reserved by all peers together."""
        return self._bytes

    def bytes_of(self, peer: str) -> int:
        """Reserved by one peer."""
        return self._of_peer.get(peer, 0)

    def over_share(self, peer: str) -> bool:
        """True if the peer has all that it may have."""
        return self.bytes_of(peer) >= self.max_bytes_per_peer

    def check(self) -> None:
        """Assert that what is counted is what is there. For tests."""
        with self._lock:
            assert self._bytes == sum(self._of_peer.values()) and set(self._of_peer) <= set(self._reservations)
            assert all(count > 0 for count in self._reservations.values())

    def reserve(self, peer: str, size_bytes: int, reason: Hashable) -> Reservation:
        """Reserve memory for a peer.

        :param reason: what it is kept for; see Reservation
        :raises Overloaded: there is no room for it
        """
        reservation = Reservation(self, peer, reason)
        with self._lock:
            self._reservations[peer] = self._reservations.get(peer, 0) + 1
        try:
            reservation.grow(size_bytes)
        except Overloaded:
            reservation.done_with(reason)
            raise
        return reservation

    def when_given_back(self, peer: str, callback: Callable[[], None]) -> None:
        """Call back once, in whichever thread, when the peer has next given something back."""
        with self._lock:
            self._waiting.setdefault(peer, []).append(callback)

    def _take(self, peer: str, size_bytes: int, *, must_fit: bool) -> None:
        with self._lock:
            of_peer = self._of_peer.get(peer, 0)
            if must_fit and self._bytes + size_bytes > self.max_bytes:
                raise Overloaded(f"{self._bytes} bytes of requests are in flight already; try again later")
            only_one = self._reservations[peer] == 1
            if must_fit and not only_one and of_peer + size_bytes > self.max_bytes_per_peer:
                raise Overloaded(f"{of_peer} bytes of your requests are in flight already; try again later")
            self._bytes += size_bytes
            self._of_peer[peer] = of_peer + size_bytes

    def _give_back(self, peer: str, size_bytes: int, *, ended: bool) -> None:
        with self._lock:
            self._bytes -= size_bytes
            self._of_peer[peer] = self._of_peer.get(peer, 0) - size_bytes
            if ended:
                self._reservations[peer] -= 1
            if not self._reservations[peer]:
                assert self._of_peer[peer] == 0, "bytes without a reservation"
                del self._of_peer[peer], self._reservations[peer]
            waiting = self._waiting.pop(peer, [])
        for callback in waiting:
            callback()


class Reservation:
    """Memory of one request, kept until nothing needs it any more. Of any thread.

    Each ``reason`` (a word, or an object such as a task) is counted once, so to be done with it twice does no harm.
    """

    __slots__ = ("_inflight", "_lock", "_peer", "_reasons", "size_bytes")

    def __init__(self, inflight: InflightBytes, peer: str, reason: Hashable):
        self._inflight, self._peer = inflight, peer
        self._lock = threading.Lock()
        self._reasons = {reason}
        self.size_bytes = 0

    def __repr__(self) -> str:
        return f"Reservation({self.size_bytes} bytes of ...{self._peer[-8:]}, for {sorted(map(str, self._reasons))})"

    @property
    def ended(self) -> bool:
        """True when it was given back."""
        return not self._reasons

    def grow(self, size_bytes: int, *, must_fit: bool = True) -> None:
        """Reserve more.

        :param must_fit: False: the memory is taken already, such as an answer's, and is only to be counted
        :raises Overloaded: there is no room for it
        """
        with self._lock:
            assert self._reasons, "the reservation was given back"
            self._inflight._take(self._peer, size_bytes, must_fit=must_fit)
            self.size_bytes += size_bytes

    def shrink(self, size_bytes: int) -> None:
        """Give back a part."""
        with self._lock:
            assert self._reasons and 0 <= size_bytes <= self.size_bytes
            self.size_bytes -= size_bytes
            self._inflight._give_back(self._peer, size_bytes, ended=False)

    def keep_for(self, reason: Hashable) -> bool:
        """Keep it for something else as well.

        :returns: False if it was given back already
        """
        with self._lock:
            if not self._reasons:
                return False
            self._reasons.add(reason)
            return True

    def done_with(self, reason: Hashable) -> None:
        """It is not kept for this any more; with the last reason all of it is given back."""
        with self._lock:
            if reason not in self._reasons:
                return
            self._reasons.discard(reason)
            if self._reasons:
                return
            size_bytes, self.size_bytes = self.size_bytes, 0
            self._inflight._give_back(self._peer, size_bytes, ended=True)
