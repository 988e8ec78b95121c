"""Requests that refer to tensors which the server holds instead of sending them. Owns: what each server has been sent, when
to rely on it, and sending the tensors after all when it does not hold them.

Two kinds: *global* tensors (an adapter) by the digest of their contents, from the second request on; *inputs* of a forward by
its request id, in the backward that follows. A server that has dropped a tensor says so before it takes anything, and gets the
same request with the tensors in it: nobody's failure. A server that drops things all the time is not relied upon for a while.

``SentTensors`` and ``Pauses`` decide and read no clock; ``Referring`` does the calls. Must not know: retries, autograd.
Everything runs in the client's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import msgspec

from moe.client.digests import Digests
from moe.errors import ConnectError, PeerGone, TensorNotHeld
from moe.expert_uid import PeerIDLike
from moe.schema import Entry
from moe.transport.base import BACKWARD, FORWARD, Call, ExpertTransport, Reply
from moe.wire.messages import MAX_HEADER_BYTES, MAX_HELD, MIN_HELD_BYTES, encode_header, new_request_id

KEEP_FROM_BYTES = 2**20  # inputs that are smaller, together, are sent again as fast over a Unix socket; decision 0009
_IN_THREAD_BYTES = 2**20  # more is digested off the event loop; ours, about 1 ms
_ONE_UPLOAD_BYTES = 2**20  # a larger tensor is sent by one request while others that need it wait; ours
_MAX_WAIT_S = 5.0  # they wait no longer than this
_ONE_EPISODE_S = 1.0  # misses within this time have one cause, such as a server that was started again
_MAX_PAUSE_S = 60.0
_MAX_SENT = 16384  # digests remembered, of all servers; ours, about 3 MB


@dataclass
class Kept:
    """Which inputs of one forward are kept, and where. Written by the forward, read by its backward.

    :ivar peer: base58; empty: none are
    """

    peer: str = ""
    request_id: bytes = b""
    positions: tuple[int, ...] = ()


KeptRows = dict[tuple[int, int], Kept]
"""Of a forward that was split: by rows from, to."""


class SentTensors:
    """Which tensors each server has been sent, by digest."""

    def __init__(self, max_known: int = _MAX_SENT):
        self._max_known = max_known
        self._known: OrderedDict[tuple[str, bytes], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def has(self, peer: str, digest: bytes) -> bool:
        """Should the server hold it?"""
        return (peer, digest) in self._known

    def note(self, peer: str, digests: Iterable[bytes]) -> None:
        """The server has been sent these, or has found them."""
        for digest in digests:
            self._known[peer, digest] = None
            self._known.move_to_end((peer, digest))
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def forget(self, peer: str, digests: Iterable[bytes] | None = None) -> None:
        """The server does not hold these, or (None) nothing any more."""
        keys = [key for key in self._known if key[0] == peer] if digests is None else [(peer, d) for d in digests]
        for key in keys:
            self._known.pop(key, None)


class Pauses:
    """When not to rely on a server: for twice as long each time that it did not hold what it should."""

    def __init__(self) -> None:
        self._missed: dict[str, tuple[int, float]] = {}  # how often in a row, and when it was last counted

    def missed(self, peer: str, now: float) -> None:
        """The server did not hold what it should. The first time may be an accident."""
        count, at = self._missed.get(peer, (0, -float("inf")))
        if now - at >= _ONE_EPISODE_S:
            self._missed[peer] = (count + 1, now)

    def found(self, peer: str) -> None:
        """The server held what it should."""
        self._missed.pop(peer, None)

    def paused(self, peer: str, now: float) -> bool:
        """Is it better not to rely on it now?"""
        count, at = self._missed.get(peer, (0, 0.0))
        return count > 1 and now < at + min(2.0 ** (count - 1), _MAX_PAUSE_S)


class Referring:
    """Calls over one transport, which refer to what servers hold.

    :param transport: how calls travel
    """

    def __init__(self, transport: ExpertTransport):
        self._transport = weakref.ref(transport)
        self.digests, self.sent = Digests(), SentTensors()
        self._globals, self._inputs = Pauses(), Pauses()
        self._uploads: dict[tuple[str, bytes], asyncio.Future[None]] = {}

    def __repr__(self) -> str:
        return f"Referring({self.digests!r}, {len(self.sent)} sent)"

    @classmethod
    def over(cls, transport: ExpertTransport) -> Referring:
        """The one of this transport: a server knows its tensors by the peer that has sent them."""
        referring = _of_transports.get(transport)
        if referring is None:
            referring = _of_transports[transport] = cls(transport)
        return referring

    async def call(
        self,
        peer: PeerIDLike,
        call: Call,
        inputs: Sequence[Entry],
        *,
        kept: Kept | None = None,
        timeout_s: float | None,
    ) -> Reply:
        """``ExpertTransport.call``, without the tensors that the server holds.

        :param call: with all tensors; its header is that of a server which holds tensors
        :param inputs: the schema of its tensors, without gradients at the end
        :param kept: of a forward: let the server keep its inputs, and note it here; of a backward: what was noted
        """
        transport = self._transport()
        assert transport is not None and call.header is not None
        loop, name = asyncio.get_running_loop(), peer.to_base58()
        end = None if timeout_s is None else loop.time() + timeout_s
        large = [i for i, tensor in enumerate(call.tensors[: len(inputs)]) if tensor.nbytes >= MIN_HELD_BYTES]
        own = [i for i in large if inputs[i].proto.batched][:MAX_HELD]
        keeps = call.method == FORWARD and kept is not None and self._worth_keeping(name, call, own, loop.time())
        kept_here = call.method == BACKWARD and kept is not None and kept.peer == name
        digests: Mapping[int, bytes] = {}
        if not self._globals.paused(name, loop.time()):
            digests = await self._digests_of(call, [i for i in large if not inputs[i].proto.batched][:MAX_HELD])
        if not (digests or keeps or kept_here):
            return await transport.call(peer, call, timeout_s=timeout_s)
        missed = False
        while True:
            async with self._one_upload(name, call, digests, end):
                held = {i: digest for i, digest in digests.items() if self.sent.has(name, digest)}
                by_digest = list(held.values())
                if kept is not None and kept_here:
                    held.update((i, kept.request_id) for i in kept.positions[: MAX_HELD - len(held)])
                request = _referring(call, held, bool(digests), keeps)
                timeout_s = None if end is None else max(0.0, end - loop.time())
                try:
                    reply = await transport.call(peer, request, timeout_s=timeout_s)
                except TensorNotHeld:
                    if request is call:
                        raise
                    if kept_here:
                        kept_here = False
                        self._inputs.missed(name, loop.time())
                    else:
                        self.sent.forget(name, by_digest)
                        self._globals.missed(name, loop.time())
                        if missed or not by_digest:  # it has something against being referred to at all
                            digests, keeps = {}, False
                        missed = True
                    continue
                except (ConnectError, PeerGone):
                    self.sent.forget(name)
                    raise
            self.sent.note(name, digests.values())
            if by_digest:
                self._globals.found(name)
            if kept_here and kept is not None:
                self._inputs.found(name)
                kept.peer = ""  # they were kept for one backward
            if keeps and kept is not None and request.header is not None and request.header.request_id is not None:
                kept.peer, kept.request_id, kept.positions = name, request.header.request_id, tuple(own)
            return reply

    def _worth_keeping(self, peer: str, call: Call, own: Sequence[int], now: float) -> bool:
        return sum(call.tensors[i].nbytes for i in own) >= KEEP_FROM_BYTES and not self._inputs.paused(peer, now)

    async def _digests_of(self, call: Call, positions: Sequence[int]) -> dict[int, bytes]:
        def compute() -> dict[int, bytes]:
            return {i: self.digests.of(call.tensors[i], call.codecs[i]) for i in positions}

        if sum(call.tensors[i].nbytes for i in positions) <= _IN_THREAD_BYTES:
            return compute()
        return await asyncio.get_running_loop().run_in_executor(None, compute)

    @contextlib.asynccontextmanager
    async def _one_upload(
        self, peer: str, call: Call, digests: Mapping[int, bytes], end: float | None
    ) -> AsyncIterator[None]:
        """Of several requests that need a large tensor at the same time, the first one sends it while the others wait."""
        if not digests:
            yield
            return
        loop = asyncio.get_running_loop()
        patience = loop.time() + _MAX_WAIT_S if end is None else min(loop.time() + _MAX_WAIT_S, (loop.time() + end) / 2)
        needed = {(peer, digest) for i, digest in digests.items() if call.tensors[i].nbytes >= _ONE_UPLOAD_BYTES}
        while (left_s := patience - loop.time()) > 0:
            under_way = {self._uploads[key] for key in needed if key in self._uploads}
            if not under_way:
                break
            await asyncio.wait(under_way, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        own = {key for key in needed if key not in self._uploads and not self.sent.has(*key)}
        done: asyncio.Future[None] = loop.create_future()
        self._uploads.update(dict.fromkeys(own, done))
        try:
            yield
        finally:
            for key in own:
                del self._uploads[key]
            done.set_result(None)


_of_transports: weakref.WeakKeyDictionary[ExpertTransport, Referring] = weakref.WeakKeyDictionary()


def _referring(call: Call, held: Mapping[int, bytes], hold: bool, keep: bool) -> Call:
    """The call without the tensors that are held; as it is if there is nothing to say, or too much for a header."""
    if not (held or hold or keep):
        return call
    assert call.header is not None
    header = msgspec.structs.replace(call.header, held=dict(held) if held or hold else None, keep=keep)
    if keep:
        header = msgspec.structs.replace(header, request_id=new_request_id())
    if len(encode_header(header)) > MAX_HEADER_BYTES:
        return call
    sent = [i for i in range(len(call.tensors)) if i not in held]
    return replace(call, header=header, tensors=[call.tensors[i] for i in sent], codecs=[call.codecs[i] for i in sent])
