"""Digests of tensors, computed once for the same contents. Owns: how contents are recognized.

The digest that servers know a tensor by (``moe.schema.digest``, BLAKE2b) takes about a millisecond for a MiB, and an adapter is
sent with every call. Contents are recognized by another one, BLAKE3, in a seventh of the time. Nothing else tells that a tensor
is unchanged: ``parameter.data -= step`` changes no version, memory is used again, and sums, however weighted cheaply, are equal
for contents that people have (permutations, signs). Must not know: what digests are for. CPU tensors, any thread.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any, NamedTuple

import torch
from blake3 import blake3
from torch.multiprocessing.reductions import StorageWeakRef

from moe.schema import Compression, digest
from moe.wire.tensors import decode_tensor, encode_tensor


class Contents(NamedTuple):
    """What is known of a tensor's contents at a glance.

    :ivar mark: the same for the same contents only
    :ivar digest: None if it has to be computed
    :ivar changed: the same memory had other contents when it was last digested
    """

    mark: bytes
    digest: bytes | None
    changed: bool


class _Place(NamedTuple):
    memory: StorageWeakRef
    mark: bytes


class Digests:
    """Digests of CPU tensors as a server computes them: ``moe.schema.digest`` of what arrives.

    :param max_known: how many are remembered
    """

    def __init__(self, max_known: int = 4096):
        self._max_known = max_known
        self._known: OrderedDict[bytes, bytes] = OrderedDict()  # by mark
        self._places: OrderedDict[Hashable, _Place] = OrderedDict()  # where something was digested
        self._lock = threading.Lock()
        self.computed = 0

    def __repr__(self) -> str:
        return f"Digests({len(self._known)} known, {self.computed} computed)"

    def look(self, tensor: torch.Tensor, codec: int = Compression.NONE) -> Contents:
        """What can be told without computing a digest.

        :param codec: with which the tensor is sent
        """
        mark = _mark(tensor, codec)
        with self._lock:
            known, place = self._known.get(mark), self._places.get(_place_of(tensor))
        changed = place is not None and place.mark != mark and not place.memory.expired()  # type: ignore[no-untyped-call]
        return Contents(mark, known, changed and known is None)

    def of(self, tensor: torch.Tensor, codec: int = Compression.NONE) -> bytes:
        """The digest, computed if it is not known."""
        seen = self.look(tensor, codec)
        return seen.digest or self.compute(tensor, codec, seen.mark)

    def compute(self, tensor: torch.Tensor, codec: int, mark: bytes) -> bytes:
        """The digest, computed.

        :param mark: from a look at it
        """
        arriving = tensor if codec == Compression.NONE else decode_tensor(encode_tensor(tensor, codec))
        computed = digest(arriving)
        unchanged = _mark(tensor, codec) == mark  # meanwhile, by another thread
        place = _Place(StorageWeakRef(tensor.untyped_storage()), mark)  # type: ignore[no-untyped-call]
        with self._lock:
            self.computed += 1
            if unchanged:
                self._remember(self._known, mark, computed)
                self._remember(self._places, _place_of(tensor), place)
        return computed

    def _remember(self, memory: OrderedDict[Any, Any], key: Hashable, value: object) -> None:
        memory[key] = value
        memory.move_to_end(key)
        while len(memory) > self._max_known:
            memory.popitem(last=False)


def _place_of(tensor: torch.Tensor) -> Hashable:
    """Where the tensor is."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tuple(tensor.shape)


def _mark(tensor: torch.Tensor, codec: int) -> bytes:
    """Of all that makes the digest: contents and codec."""
    return fingerprint([tensor], codec)


def fingerprint(tensors: Sequence[torch.Tensor], *more: int) -> bytes:
    """BLAKE3 of every byte in its place, dtypes and shapes: the same for the same tensors only."""
    state = blake3(repr(more).encode())
    for tensor in tensors:
        raw = tensor.detach().contiguous().reshape(-1)
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}:".encode())
        if raw.numel():
            state.update(raw.view(torch.uint8).numpy().data)
    return state.digest()
