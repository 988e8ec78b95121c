"""Digests of tensors, computed once while a tensor is unchanged. Owns: when a digest known from before still holds.

A cryptographic digest takes about a millisecond for a MiB, and an adapter is sent with every call. Whether a tensor is the
one of before is told by its memory (a weak reference, so that it cannot be other memory at the same address), torch's version
counter, and a sum over all of it, a twentieth of the digest's time: ``parameter.data -= step`` changes no version.
Must not know: what digests are for. Any thread.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from moe.schema import Compression, digest
from moe.wire.tensors import decode_tensor, encode_tensor

_BLOCK_WORDS = 512  # of 8 bytes; a sum for each block and one for each place in a block


class Contents(NamedTuple):
    """What is known of a tensor's contents at a glance.

    :ivar mark: another one if the tensor has changed; not told for how long it means the same
    :ivar digest: None if it has to be computed
    :ivar changed: the same memory had other contents the last time
    """

    mark: Hashable
    digest: bytes | None
    changed: bool


class _Known(NamedTuple):
    memory: StorageWeakRef
    mark: Hashable
    digest: bytes


class Digests:
    """Digests of CPU tensors as a server computes them: ``moe.schema.digest`` of what arrives.

    :param max_known: how many are remembered
    """

    def __init__(self, max_known: int = 4096):
        self._max_known = max_known
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._lock = threading.Lock()
        self.computed = 0

    def __repr__(self) -> str:
        return f"Digests({len(self._known)} known, {self.computed} computed)"

    def look(self, tensor: torch.Tensor, codec: int = Compression.NONE) -> Contents:
        """What can be told without computing a digest.

        :param codec: with which the tensor is sent
        """
        place, mark = _place(tensor, codec), _mark(tensor, codec)
        with self._lock:
            known = self._known.get(place)
        if known is None or known.memory.expired():  # type: ignore[no-untyped-call]
            return Contents(mark, None, changed=False)
        if known.mark != mark:
            return Contents(mark, None, changed=True)
        return Contents(mark, known.digest, changed=False)

    def of(self, tensor: torch.Tensor, codec: int = Compression.NONE) -> bytes:
        """The digest, computed if it is not known."""
        seen = self.look(tensor, codec)
        return seen.digest or self.compute(tensor, codec, seen.mark)

    def compute(self, tensor: torch.Tensor, codec: int, mark: Hashable) -> bytes:
        """The digest, computed.

        :param mark: from a look at it
        """
        self.computed += 1
        arriving = tensor if codec == Compression.NONE else decode_tensor(encode_tensor(tensor, codec))
        computed = digest(arriving)
        if tensor.is_contiguous() and not tensor.is_inference() and _mark(tensor, codec) == mark:
            memory = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
            place = _place(tensor, codec)
            with self._lock:
                self._known[place] = _Known(memory, mark, computed)
                self._known.move_to_end(place)
                while len(self._known) > self._max_known:
                    self._known.popitem(last=False)
        return computed


def _place(tensor: torch.Tensor, codec: int) -> Hashable:
    """Where the tensor is, and what it is read as."""
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), int(codec)


def _mark(tensor: torch.Tensor, codec: int) -> Hashable:
    version = -1 if tensor.is_inference() else tensor._version  # those of inference mode have none
    return _place(tensor, codec), version, _checksum(tensor)


def _checksum(tensor: torch.Tensor) -> bytes:
    """Another one if the contents are others, unless somebody looks for a collision."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    whole = len(raw) - len(raw) % (8 * _BLOCK_WORDS)
    words = raw[:whole].view(np.int64).reshape(-1, _BLOCK_WORDS)
    state = hashlib.blake2b(words.sum(axis=0).tobytes(), digest_size=16)
    state.update(words.sum(axis=1).tobytes())
    state.update(raw[whole:].tobytes())
    return state.digest()
