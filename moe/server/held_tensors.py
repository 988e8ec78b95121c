"""Tensors that peers have sent and may refer to instead of sending them again. Owns: whose they are, how long and how much.

Pure bookkeeping, ``now`` is passed in. Must not know: requests, schemas, what a key is made of. A peer finds only what it has
sent itself. What is dropped here lives on for as long as a running request uses it.

A held tensor is what has arrived, not a copy, and experts compute with it. So one that an expert's code has written to is
not what was sent any more: that is told by torch's version counter, and it is not given out. (Writes that torch does not count,
through ``.data`` or NumPy, are not noticed.)
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from typing import Generic, NamedTuple, Protocol, TypeVar

import torch


class HeldTensor(NamedTuple):
    """A tensor that more than one request may use.

    :ivar version: of the tensor, when it had arrived
    :ivar digest: of its contents, if somebody has computed it
    """

    tensor: torch.Tensor
    version: int
    digest: bytes | None = None

    @property
    def unchanged(self) -> bool:
        """False if somebody has written to it."""
        return self.tensor._version == self.version

    @property
    def size_bytes(self) -> int:
        """The memory it takes: all of that which it is a part of."""
        return self.tensor.untyped_storage().nbytes()


class Holdable(Protocol):
    """What can be held."""

    @property
    def size_bytes(self) -> int:
        """The memory it takes."""
        ...

    @property
    def unchanged(self) -> bool:
        """False if it is not what was held any more."""
        ...


H = TypeVar("H", bound=Holdable)


@dataclass(frozen=True)
class _Held(Generic[H]):  # no NamedTuple: Python 3.10 has none that is generic
    used_at: float
    size_bytes: int
    what: H


class HeldTensors(Generic[H]):
    """Tensors (or what else is made of them) by peer and key, the least recently used ones dropped first.

    :param max_bytes: of all of them; 0: nothing is held
    :param max_bytes_per_peer: of those of one peer
    :param window_s: how long one is held that nobody uses
    :param entry_bytes: what each takes besides
    """

    def __init__(self, max_bytes: int, max_bytes_per_peer: int, window_s: float, *, entry_bytes: int = 0):
        self._max_bytes, self._max_bytes_per_peer = max_bytes, min(max_bytes, max_bytes_per_peer)
        self._window_s, self._entry_bytes = window_s, entry_bytes
        self._held: OrderedDict[tuple[str, Hashable], _Held[H]] = OrderedDict()
        self._of_peer: dict[str, OrderedDict[Hashable, None]] = {}
        self._peer_bytes: dict[str, int] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return f"HeldTensors({len(self._held)} of {len(self._of_peer)} peers, {self.bytes} bytes)"

    def find(self, peer: str, key: Hashable, now: float) -> H | None:
        """What the peer has sent under this key; None if it is not held, or not what was sent any more."""
        self.expire(now)
        found = self._held.get((peer, key))
        if found is None:
            return None
        if not found.what.unchanged:
            self.drop(peer, [key])
            return None
        self._held[peer, key] = dataclasses.replace(found, used_at=now)
        self._held.move_to_end((peer, key))
        self._of_peer[peer].move_to_end(key)
        return found.what

    def hold(self, peer: str, key: Hashable, held: H, now: float) -> None:
        """Hold something, in place of one with the same key, if it is not too large."""
        self.expire(now)
        self.drop(peer, [key])
        size = held.size_bytes + self._entry_bytes
        if size > self._max_bytes_per_peer or not held.unchanged:
            return
        while self._peer_bytes.get(peer, 0) + size > self._max_bytes_per_peer:
            self.drop(peer, [next(iter(self._of_peer[peer]))])
        while self.bytes + size > self._max_bytes:
            other, oldest = next(iter(self._held))
            self.drop(other, [oldest])
        self._held[peer, key] = _Held(now, size, held)
        self._of_peer.setdefault(peer, OrderedDict())[key] = None
        self._peer_bytes[peer] = self._peer_bytes.get(peer, 0) + size
        self.bytes += size

    def drop(self, peer: str, keys: Iterable[Hashable]) -> None:
        """Hold these no longer; those that are not held are no mistake."""
        for key in keys:
            found = self._held.pop((peer, key), None)
            if found is None:
                continue
            self.bytes -= found.size_bytes
            self._peer_bytes[peer] -= found.size_bytes
            del self._of_peer[peer][key]
            if not self._of_peer[peer]:
                del self._of_peer[peer], self._peer_bytes[peer]

    def clear(self) -> None:
        """Hold nothing."""
        for peer, key in list(self._held):
            self.drop(peer, [key])

    def expire(self, now: float) -> float | None:
        """Drop what nobody has used for long.

        :returns: when there is more to drop, if nobody uses it until then; None if nothing is held
        """
        while self._held:
            (peer, key), held = next(iter(self._held.items()))
            if held.used_at > now - self._window_s:
                return held.used_at + self._window_s
            self.drop(peer, [key])
        return None

    def check(self) -> None:
        """Assert that what is counted is what is there."""
        assert self.bytes == sum(held.size_bytes for held in self._held.values()) == sum(self._peer_bytes.values())
        assert set(self._held) == {(peer, key) for peer, keys in self._of_peer.items() for key in keys}
        assert self.bytes <= self._max_bytes
