"""Memory that peers make a server take: requests being received, waiting or computed, and answers that are not sent yet.

Owns: who has how much of it, and how much each and all may have.

Every byte is reserved before it is taken, and given back when nobody needs it any more: a ``Reservation`` knows for what it is
kept. Pure bookkeeping under one lock, for any thread. Must not know: what a request is, or where the bytes lie.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence

from moe.errors import Overloaded


class InflightBytes:
    """Reserved bytes, by peer.

    A peer that has nothing reserved may have one reservation of any size that fits into ``max_bytes``; its others fit into its
    share.

    :param max_bytes: of all peers together
    :param max_bytes_per_peer: the share of one peer
    :ivar bytes: reserved by all peers together
    """

    def __init__(self, max_bytes: int, max_bytes_per_peer: int):
        self.max_bytes, self.max_bytes_per_peer = max_bytes, min(max_bytes, max_bytes_per_peer)
        self._lock = threading.Lock()  # also of the reservations
        self.bytes = 0
        self._shares: dict[str, _Share] = {}  # of peers that have a reservation
        self._waiting: dict[str, list[Callable[[], None]]] = {}

    def __repr__(self) -> str:
        return f"InflightBytes({self.bytes} of {self.max_bytes} bytes, {len(self._shares)} peers)"

    def bytes_of(self, peer: str) -> int:
        """Reserved by one peer."""
        share = self._shares.get(peer)
        return 0 if share is None else share.bytes

    def over_share(self, peer: str) -> bool:
        """True if the peer has all that it may have."""
        return self.bytes_of(peer) >= self.max_bytes_per_peer

    def check(self) -> None:
        """Assert that what is counted is what is there. For tests."""
        with self._lock:
            assert self.bytes == sum(share.bytes for share in self._shares.values())
            assert all(share.reservations > 0 and share.bytes >= 0 for share in self._shares.values())

    def reserve(self, peer: str, size_bytes: int, reason: Hashable, *, must_fit: bool = True) -> Reservation:
        """Reserve memory for a peer.

        :param reason: what it is kept for; see Reservation
        :param must_fit: see ``Reservation.grow``
        :raises Overloaded: there is no room for it
        """
        with self._lock:
            share = self._shares.get(peer) or _Share()
            share.reservations += 1
            try:
                self._take(share, size_bytes, must_fit)
            except Overloaded:
                share.reservations -= 1
                raise
            self._shares[peer] = share
            return Reservation(self, peer, share, size_bytes, reason)

    def when_given_back(self, peer: str, callback: Callable[[], None]) -> None:
        """Call back once, in whichever thread, when the peer has next given something back."""
        with self._lock:
            self._waiting.setdefault(peer, []).append(callback)

    def _take(self, share: _Share, size_bytes: int, must_fit: bool) -> None:
        """Under the lock."""
        if must_fit and self.bytes + size_bytes > self.max_bytes:
            raise Overloaded(f"{self.bytes} bytes of requests are in flight already; try again later")
        if must_fit and share.reservations > 1 and share.bytes + size_bytes > self.max_bytes_per_peer:
            raise Overloaded(f"{share.bytes} bytes of your requests are in flight already; try again later")
        self.bytes += size_bytes
        share.bytes += size_bytes


class _Share:
    """What one peer has."""

    __slots__ = ("bytes", "reservations")

    def __init__(self) -> None:
        self.bytes = self.reservations = 0


class Reservation:
    """Memory of one request, kept until nothing needs it any more. Of any thread.

    Each ``reason`` (a word, or the number of a task) is counted once, so to be done with it twice does no harm.
    """

    __slots__ = ("_inflight", "_peer", "_reasons", "_share", "size_bytes")

    def __init__(self, inflight: InflightBytes, peer: str, share: _Share, size_bytes: int, reason: Hashable):
        self._inflight, self._peer, self._share = inflight, peer, share
        self._reasons = {reason}
        self.size_bytes = size_bytes

    def __repr__(self) -> str:
        return f"Reservation({self.size_bytes} bytes of ...{self._peer[-8:]}, for {sorted(map(str, self._reasons))})"

    @property
    def is_all(self) -> bool:
        """True if nobody has anything else reserved."""
        return self._inflight.bytes == self.size_bytes

    @property
    def ended(self) -> bool:
        """True when it was given back."""
        return not self._reasons

    def grow(self, size_bytes: int, *, must_fit: bool = True) -> None:
        """Reserve more.

        :param must_fit: False: the memory is taken already, such as an answer's, and is only to be counted
        :raises Overloaded: there is no room for it
        """
        with self._inflight._lock:
            assert self._reasons, "the reservation was given back"
            self._inflight._take(self._share, size_bytes, must_fit)
            self.size_bytes += size_bytes

    def shrink(self, size_bytes: int) -> None:
        """Give back a part."""
        with self._inflight._lock:
            assert self._reasons and 0 <= size_bytes <= self.size_bytes
            told = self._give_back(size_bytes)
        for callback in told:
            callback()

    def keep_for(self, reason: Hashable) -> bool:
        """Keep it for something else as well.

        :returns: False if it was given back already
        """
        with self._inflight._lock:
            if not self._reasons:
                return False
            self._reasons.add(reason)
            return True

    def done_with(self, reason: Hashable) -> None:
        """It is not kept for this any more; with the last reason all of it is given back."""
        with self._inflight._lock:
            if reason not in self._reasons:
                return
            self._reasons.discard(reason)
            if self._reasons:
                return
            self._share.reservations -= 1
            if not self._share.reservations:
                assert self._share.bytes == self.size_bytes, "bytes without a reservation"
                del self._inflight._shares[self._peer]
            told = self._give_back(self.size_bytes)
        for callback in told:
            callback()

    def _give_back(self, size_bytes: int) -> Sequence[Callable[[], None]]:
        """Under the lock. Those who wait for it, to be told without."""
        self.size_bytes -= size_bytes
        self._share.bytes -= size_bytes
        self._inflight.bytes -= size_bytes
        waiting = self._inflight._waiting
        return waiting.pop(self._peer, ()) if waiting else ()
