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


class _Known(NamedTuple):
    memory: StorageWeakRef
    version: int
    checksum: bytes
    digest: bytes


class Digests:
    """Digests of CPU tensors as a server computes them.

    :param max_known: how many are remembered
    """

    def __init__(self, max_known: int = 4096):
        self._max_known = max_known
        self._known: OrderedDict[Hashable, _Known] = OrderedDict()
        self._lock = threading.Lock()
        self.computed = 0

    def __repr__(self) -> str:
        return f"Digests({len(self._known)} known, {self.computed} computed)"

    def of(self, tensor: torch.Tensor, codec: int = Compression.NONE) -> bytes:
        """``moe.schema.digest`` of what arrives when the tensor is sent with this codec."""
        if not tensor.is_contiguous() or tensor.is_inference():  # the latter has no version
            return self._compute(tensor, codec)
        storage = tensor.untyped_storage()
        place = (storage._cdata, tensor.storage_offset(), tensor.dtype, tuple(tensor.shape), int(codec))
        version, checksum = tensor._version, _checksum(tensor)
        with self._lock:
            known = self._known.get(place)
        if known is not None and (known.version, known.checksum) == (version, checksum):
            alive = not known.memory.expired()  # type: ignore[no-untyped-call]
            if alive:
                return known.digest
        computed = self._compute(tensor, codec)
        with self._lock:
            memory = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
            self._known[place] = _Known(memory, version, checksum, computed)
            self._known.move_to_end(place)
            while len(self._known) > self._max_known:
                self._known.popitem(last=False)
        return computed

    def _compute(self, tensor: torch.Tensor, codec: int) -> bytes:
        self.computed += 1
        if codec != Compression.NONE:
            tensor = decode_tensor(encode_tensor(tensor, codec))
        return digest(tensor)


def _checksum(tensor: torch.Tensor) -> bytes:
    """Another one if the contents are others, unless somebody looks for a collision."""
    raw = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    whole = len(raw) - len(raw) % (8 * _BLOCK_WORDS)
    words = raw[:whole].view(np.int64).reshape(-1, _BLOCK_WORDS)
    state = hashlib.blake2b(words.sum(axis=0).tobytes(), digest_size=16)
    state.update(words.sum(axis=1).tobytes())
    state.update(raw[whole:].tobytes())
    return state.digest()
