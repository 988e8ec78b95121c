"""Requests that refer to tensors which the server holds instead of sending them. Owns: what each server has been sent, when
to rely on it, and sending the tensors after all when it does not hold them.

Two kinds: *global* tensors (an adapter) by the digest of their contents, from the second request on; *inputs* of a forward by
its request id, in the backward that follows, if all inputs are still what they were. A server that has dropped a tensor says so
before it takes anything, and gets the same request with the tensors in it: nobody's failure. A server that drops things all the
time is not relied upon for a while.

``SentTensors`` and ``Pauses`` decide and read no clock; ``Referring`` does the calls. Must not know: retries, autograd.
Everything runs in the client's event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import weakref
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec
import torch

from moe.client.digests import Contents, Digests, fingerprint
from moe.errors import ConnectError, PeerGone, TensorNotHeld
from moe.expert_uid import PeerIDLike
from moe.schema import Entry
from moe.transport.base import FORWARD, Call, ExpertTransport, Reply
from moe.wire.messages import MAX_HEADER_BYTES, MAX_HELD, MIN_HELD_BYTES, encode_header, new_request_id

KEEP_FROM_BYTES = 2**20  # inputs that are smaller, together, are sent again as fast over a Unix socket; decision 0009
_DIGEST_IN_THREAD_BYTES = 2**20  # more is digested off the event loop; ours, about 1 ms
_LOOK_IN_THREAD_BYTES = 2**22  # likewise, for looks, which are quicker; both of all tensors of a request together
_ONE_UPLOAD_BYTES = 2**20  # a larger tensor is sent by one request while others that need it wait; ours
_MAX_WAIT_S = 5.0  # they wait no longer than this
_ONE_EPISODE_S = 1.0  # misses within this time have one cause, such as a server that was started again
_MAX_PAUSE_S = 60.0
_MAX_SENT = 16384  # digests and marks remembered, of all servers; ours, a few MB


@dataclass
class Kept:
    """Which inputs of one forward a server keeps for its backward. Written by the forward.

    :ivar peer: base58, who keeps them; empty: nobody
    :ivar contents: of all inputs, kept or not: a server that keeps some may keep what it has computed from all of them
    """

    peer: str = ""
    request_id: bytes = b""
    positions: tuple[int, ...] = ()
    contents: bytes = b""


KeptRows = dict[tuple[int, int], Kept]
"""Of a forward that was split: by rows from, to."""


class SentTensors:
    """What each server has been sent and asked to hold: digests of tensors, and marks of some that have not been digested."""

    def __init__(self, max_known: int = _MAX_SENT):
        self._max_known = max_known
        self._known: OrderedDict[tuple[str, Hashable], None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def has(self, peer: str, *names: Hashable) -> bool:
        """Should the server hold what has one of these names?"""
        return any((peer, name) in self._known for name in names)

    def note(self, peer: str, names: Iterable[Hashable]) -> None:
        """The server has been sent these, or has found them."""
        for name in names:
            self._known[peer, name] = None
            self._known.move_to_end((peer, name))
        while len(self._known) > self._max_known:
            self._known.popitem(last=False)

    def forget(self, peer: str, names: Iterable[Hashable] | None = None) -> None:
        """The server does not hold these, or (None) nothing any more."""
        keys = [key for key in self._known if key[0] == peer] if names is None else [(peer, name) for name in names]
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


@dataclass
class _Hopes:
    """What one call tries, less after each miss.

    :ivar shared: positions of global tensors that the server may hold, or shall
    :ivar by_id: request ids under which it keeps inputs, by position
    :ivar keep: it shall keep the inputs
    """

    shared: Sequence[int] = ()
    by_id: Mapping[int, bytes] = field(default_factory=dict)
    keep: bool = False
    missed: bool = False

    def lower(self, *, referred: bool) -> None:
        """After a miss: first without what was kept, then all tensors, at last as if nothing were ever held.

        :param referred: it was by digest
        """
        if self.by_id:
            self.by_id = {}
        elif self.missed or not referred:  # it has something against holding at all
            self.shared, self.keep = (), False
        else:
            self.missed = True


class Referring:
    """Calls over one transport, which refer to what servers hold.

    :param transport: how calls travel
    """

    def __init__(self, transport: ExpertTransport):
        self._transport, self._pid = weakref.ref(transport), os.getpid()
        self.digests, self.sent = Digests(), SentTensors()
        self._globals, self._inputs = Pauses(), Pauses()
        self._uploads: dict[tuple[str, Hashable], asyncio.Future[None]] = {}
        self._computing: dict[bytes, asyncio.Future[bytes]] = {}

    def __repr__(self) -> str:
        return f"Referring({self.digests!r}, {len(self.sent)} sent)"

    @classmethod
    def over(cls, transport: ExpertTransport) -> Referring:
        """The one of this transport: a server knows its tensors by the peer that has sent them."""
        referring = _of_transports.get(transport)
        if referring is None or referring._pid != os.getpid():  # else with locks and futures of the parent's threads
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
        :param kept: of a forward: where to note what the server keeps for the backward, None if there will be none; of a
            backward: what was noted
        """
        transport = self._transport()
        assert transport is not None and call.header is not None
        if not may_refer(call.method, call.tensors, inputs, kept):
            return await transport.call(peer, call, timeout_s=timeout_s)
        loop, name = asyncio.get_running_loop(), peer.to_base58()
        end = None if timeout_s is None else loop.time() + timeout_s
        large = [i for i, tensor in enumerate(call.tensors[: len(inputs)]) if tensor.nbytes >= MIN_HELD_BYTES]
        hopes, told = _Hopes(), None
        if not self._globals.paused(name, loop.time()):
            hopes.shared = [i for i in large if not inputs[i].proto.batched]
        if call.method == FORWARD:
            hopes.keep = kept is not None and not self._inputs.paused(name, loop.time())
        elif kept is not None and kept.peer == name and kept.contents == await _contents_of(call, inputs):
            hopes.by_id = dict.fromkeys(kept.positions[:MAX_HELD], kept.request_id)
        while True:
            others = [i for i in hopes.shared if i not in hopes.by_id][: MAX_HELD - len(hopes.by_id)]
            contents = await self._contents(name, call, others, end)
            names = [x for content in contents.values() for x in (content.mark, content.digest) if x is not None]
            by_digest = {
                i: content.digest
                for i, content in contents.items()
                if content.digest is not None and self.sent.has(name, content.mark, content.digest)
            }
            held = {**by_digest, **hopes.by_id}
            hold = [i for i in contents if i not in held]
            keep = [i for i in large if i not in held] if hopes.keep else []
            if sum(call.tensors[i].nbytes for i in keep) < KEEP_FROM_BYTES:
                keep = []
            request = _referring(call, held, hold, bool(keep))
            if keep and told is None:  # while the request is on its way
                told = asyncio.ensure_future(_contents_of(call, inputs))
            uploads = {(name, contents[i].mark) for i in hold if call.tensors[i].nbytes >= _ONE_UPLOAD_BYTES}
            with self._uploading(uploads):
                try:
                    left_s = None if end is None else max(0.0, end - loop.time())
                    reply = await transport.call(peer, request, timeout_s=left_s)
                    break
                except TensorNotHeld:
                    if request is call:
                        raise
                    (self._inputs if hopes.by_id else self._globals).missed(name, loop.time())
                    if not hopes.by_id:
                        self.sent.forget(name, names)
                    hopes.lower(referred=bool(by_digest))
                except (ConnectError, PeerGone):
                    self.sent.forget(name)
                    raise
        if request is not call:
            self.sent.note(name, names)
        if by_digest:
            self._globals.found(name)
        if hopes.by_id and kept is not None:
            self._inputs.found(name)
            kept.peer = ""  # they were kept for one backward
        if keep and kept is not None and request.header is not None and request.header.request_id is not None:
            assert told is not None
            kept.contents = await told
            kept.peer, kept.request_id, kept.positions = name, request.header.request_id, tuple(keep)
        return reply

    # --- contents of global tensors ------------------------------------------------------------------------------------

    async def _contents(
        self, peer: str, call: Call, positions: Sequence[int], end: float | None
    ) -> dict[int, Contents]:
        """What is in these tensors, when no other request is sending the same to this server.

        A digest is computed where it may be of use: if the server has been sent these contents, or may know them from
        another tensor. An adapter that has just been changed is sent, and digested if it is used once more.
        """
        if not positions:
            return {}
        loop = asyncio.get_running_loop()
        patience = loop.time() + _MAX_WAIT_S if end is None else min(loop.time() + _MAX_WAIT_S, (loop.time() + end) / 2)
        while True:
            contents = await self._look(call, positions)
            keys = [(peer, content.mark) for content in contents.values()]
            under_way = {self._uploads[key] for key in keys if key in self._uploads}
            left_s = patience - loop.time()
            if not under_way or left_s <= 0:
                break
            await asyncio.wait(under_way, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        unknown = [
            i
            for i, content in contents.items()
            if content.digest is None and (not content.changed or self.sent.has(peer, content.mark))
        ]
        in_thread = sum(call.tensors[i].nbytes for i in unknown) > _DIGEST_IN_THREAD_BYTES
        for i in unknown:
            digest = await self._digest(call, i, contents[i].mark, in_thread)
            contents[i] = contents[i]._replace(digest=digest)
        return contents

    async def _look(self, call: Call, positions: Sequence[int]) -> dict[int, Contents]:
        def look() -> dict[int, Contents]:
            return {i: self.digests.look(call.tensors[i], call.codecs[i]) for i in positions}

        if sum(call.tensors[i].nbytes for i in positions) <= _LOOK_IN_THREAD_BYTES:
            return look()
        return await asyncio.get_running_loop().run_in_executor(None, look)

    async def _digest(self, call: Call, position: int, mark: bytes, in_thread: bool) -> bytes:
        """Computed once, however many requests ask for it at the same time."""
        tensor, codec = call.tensors[position], call.codecs[position]
        if not in_thread:
            return self.digests.compute(tensor, codec, mark)
        computing = self._computing.get(mark)
        if computing is None:
            loop = asyncio.get_running_loop()
            computing = self._computing[mark] = loop.run_in_executor(None, self.digests.compute, tensor, codec, mark)
            computing.add_done_callback(lambda _: self._computing.pop(mark, None))
        return await asyncio.shield(computing)

    @contextlib.contextmanager
    def _uploading(self, contents: Iterable[tuple[str, Hashable]]) -> Iterator[None]:
        """Of several requests that need a large tensor at the same time, the first one sends it while the others wait."""
        own = [key for key in contents if key not in self._uploads]
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._uploads.update(dict.fromkeys(own, done))
        try:
            yield
        finally:
            for key in own:
                del self._uploads[key]
            done.set_result(None)


_of_transports: weakref.WeakKeyDictionary[ExpertTransport, Referring] = weakref.WeakKeyDictionary()


def may_refer(method: str, tensors: Sequence[torch.Tensor], inputs: Sequence[Entry], kept: Kept | None) -> bool:
    """Is there a tensor that the server may hold, or shall? If not, ``Referring.call`` is ``ExpertTransport.call``.

    :param tensors: with or without gradients at the end
    """
    sizes = [tensor.nbytes for tensor, _ in zip(tensors, inputs)]
    if any(size >= MIN_HELD_BYTES and not entry.proto.batched for size, entry in zip(sizes, inputs)):
        return True
    if method == FORWARD:
        return kept is not None and sum(size for size in sizes if size >= MIN_HELD_BYTES) >= KEEP_FROM_BYTES
    return kept is not None and bool(kept.peer)


async def _contents_of(call: Call, inputs: Sequence[Entry]) -> bytes:
    """Of all inputs, as they are now: nothing else tells that nobody has written to them."""
    tensors = call.tensors[: len(inputs)]
    return await asyncio.get_running_loop().run_in_executor(None, fingerprint, tensors)


def _referring(call: Call, held: Mapping[int, bytes], hold: Sequence[int], keep: bool) -> Call:
    """The call without the tensors that are held; as it is if there is nothing to say, or too much for a header."""
    if not (held or hold or keep):
        return call
    assert call.header is not None
    header = msgspec.structs.replace(call.header, held=dict(held), hold=tuple(hold), keep=keep)
    if keep:
        header = msgspec.structs.replace(header, request_id=new_request_id())
    if len(encode_header(header)) > MAX_HEADER_BYTES:
        return call
    sent = [i for i in range(len(call.tensors)) if i not in held]
    return replace(call, header=header, tensors=[call.tensors[i] for i in sent], codecs=[call.codecs[i] for i in sent])
