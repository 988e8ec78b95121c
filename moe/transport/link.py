"""Link: one established connection of the direct link. Owns: its socket, multiplexing, fairness, and being cut off.

Non-blocking socket calls (``add_reader`` / ``add_writer``) instead of asyncio's streams or protocols: bytes go from the kernel
right into a tensor's memory, and from a tensor's memory right into the kernel. The event loop reads; any thread may send.
Must not know: how the connection came about, or what a call means.

Fairness: outgoing calls take turns, a chunk each. A peer that sends garbage, or takes nothing for ``stall_timeout_s`` while
something waits to be sent, is cut off; other links do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
import threading
from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

from moe.errors import MoEError, PeerGone, ProtocolError
from moe.wire.frames import (
    CANCEL,
    DATA,
    HEADER,
    MAX_CHUNK_BYTES,
    OPEN,
    Frame,
    FrameParser,
    Opening,
    decode_opening,
    encode_frame,
    encode_opening,
)
from moe.wire.tensors import EncodedTensor

logger = logging.getLogger(__name__)

SOCKET_BUFFER_BYTES = 2**22  # asked of the kernel, which may give less
_TURN_BYTES = 2**22  # read or written before other links get their turn
_MAX_VIEWS = 16  # given to the kernel at a time
_SCRATCH = memoryview(bytearray(2**16))  # where bytes of cancelled calls go
_MAX_UNWANTED_BYTES = 2**28  # a peer that goes on sending what was refused or cancelled is cut off after so much

LinkSocket = socket.socket | ssl.SSLSocket


class LinkOwner(Protocol):
    """Gets what arrives. Called in the event loop; a MoEError from ``opened`` ends the link."""

    def opened(self, link: Link, call: int, opening: Opening) -> list[memoryview] | None:
        """A call (or the reply to one) begins. Where its tensors go, in order; None: throw them away."""
        ...

    def completed(self, link: Link, call: int) -> None:
        """All tensors of a call have arrived."""
        ...

    def cancelled(self, link: Link, call: int) -> None:
        """The other side does not wait for this call any more."""
        ...

    def lost(self, link: Link, error: MoEError) -> None:
        """The link is gone, for good. Called once."""
        ...


class _Incoming:
    """Tensors of one call that are still arriving."""

    __slots__ = ("buffers", "filled", "unwanted")

    def __init__(self, buffers: Sequence[memoryview | _Unwanted]):
        self.buffers: deque[Any] = deque(view for view in buffers if len(view))
        self.filled = 0  # of the first of them
        self.unwanted = False


class _Outgoing:
    """Tensors of one call that are still being sent."""

    __slots__ = ("buffers", "call", "sent")

    def __init__(self, call: int, buffers: Sequence[memoryview]):
        self.call = call
        self.buffers = deque(buffers)
        self.sent = 0  # of the first of them


class Link:
    """One connection, both directions.

    :param loop: the event loop; all methods but ``send`` are called in it, and the link is made in it
    :param sock: connected, authenticated; becomes the link's own
    :param peer: whose it is
    :param stall_timeout_s: see above
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: LinkSocket,
        peer: str,
        owner: LinkOwner,
        stall_timeout_s: float = 30.0,
    ):
        sock.setblocking(False)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, SOCKET_BUFFER_BYTES)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.peer, self.stall_timeout_s = peer, stall_timeout_s
        self._loop, self._sock, self._owner = loop, sock, owner
        self._tls = isinstance(sock, ssl.SSLSocket)
        self._parser = FrameParser(self._on_frame, self, frozenset((OPEN, DATA, CANCEL)))
        self._incoming: dict[int, _Incoming] = {}
        self._cancelling: set[int] = set()  # by us, not confirmed yet
        self._urgent: deque[bytes] = deque()  # whole frames without tensors
        self._outgoing: deque[_Outgoing] = deque()
        self._writing: list[memoryview] = []  # frames being written, in order
        self._unwanted_bytes = 0
        self._writer_registered = False
        self._progress = False  # something was written since the stall timer was last looked at
        self._stall_timer: asyncio.TimerHandle | None = None
        self.closed = False
        self._thread = threading.get_ident()
        self._sending = threading.RLock()  # held to change what is to be written, to write it, and to close the socket
        loop.add_reader(sock, self._on_readable)

    def __repr__(self) -> str:
        kind = "TLS" if self._tls else "Unix socket" if self._sock.family == socket.AF_UNIX else "TCP"
        state = "closed" if self.closed else f"{len(self._incoming)} arriving, {len(self._outgoing)} being sent"
        return f"Link({kind} to ...{self.peer[-8:]}, {state})"

    @property
    def sending(self) -> bool:
        """True while something waits to be written."""
        return bool(self._writing or self._urgent or self._outgoing)

    # --- sending -----------------------------------------------------------------------------------------------------------

    def send(self, call: int, opening: Opening, tensors: Sequence[EncodedTensor]) -> None:
        """Begin to send a call, or the reply to one. The tensors' memory must not change until they are through.

        Of any thread: the one that has something to say writes it; a TLS connection is the event loop's alone.

        :raises PeerGone: the link is closed
        """
        frame = encode_frame(OPEN, call, encode_opening(opening))
        buffers = [view for view in (memoryview(tensor.buffer) for tensor in tensors) if len(view)]
        size = sum(map(len, buffers))
        with self._sending:
            if self.closed:
                raise PeerGone("the direct link is closed", peer=self.peer)
            if 0 < size <= MAX_CHUNK_BYTES and len(buffers) < _MAX_VIEWS and not self.sending:  # no need to take turns
                self._writing += [memoryview(frame + HEADER.pack(DATA, call, size)), *buffers]
            else:
                self._urgent.append(frame)
                if buffers:
                    self._outgoing.append(_Outgoing(call, buffers))
            if threading.get_ident() == self._thread:
                self._pump()
                return
            if not self._tls:
                with contextlib.suppress(OSError):  # the event loop will find the same
                    self._write()
            rest = self.sending
        if rest:
            try:
                self._loop.call_soon_threadsafe(self._pump)
            except RuntimeError:
                raise PeerGone("the event loop of the direct link has ended", peer=self.peer) from None

    def cancel(self, call: int) -> None:
        """Stop sending and receiving a call, and tell the other side, which does the same and confirms."""
        if self.closed or call in self._cancelling:
            return
        self._cancelling.add(call)
        self._stop_sending(call)
        incoming = self._incoming.get(call)
        if incoming is not None:  # it goes on arriving until the confirmation, but no memory is held for it
            left = sum(map(len, incoming.buffers)) - incoming.filled
            incoming.buffers, incoming.filled, incoming.unwanted = deque([_Unwanted(left)]), 0, True
        self._send_cancel(call)

    def _send_cancel(self, call: int) -> None:
        with self._sending:
            self._urgent.append(encode_frame(CANCEL, call))
            self._pump()

    def _stop_sending(self, call: int) -> None:
        with self._sending:
            self._outgoing = deque(outgoing for outgoing in self._outgoing if outgoing.call != call)

    def close(self, error: MoEError | None = None) -> None:
        """End the link. What was being sent or received is lost."""
        with self._sending:
            if self.closed:
                return
            self.closed = True
            self._loop.remove_reader(self._sock)
            if self._writer_registered:
                self._loop.remove_writer(self._sock)
            if self._stall_timer is not None:
                self._stall_timer.cancel()
            self._sock.close()
            self._outgoing.clear()
            self._urgent.clear()
            self._writing.clear()
        self._incoming.clear()
        self._owner.lost(self, error or PeerGone("the direct link was closed", peer=self.peer))

    def _pump(self) -> None:
        """Write as much as the socket takes now; the rest when it says that it takes more."""
        if self.closed:
            return
        try:
            with self._sending:
                self._write()
                more, progress, self._progress = self.sending, self._progress, False
        except OSError as e:
            self.close(PeerGone(f"the direct link broke: {e!r}", peer=self.peer))
            return
        if more != self._writer_registered:
            self._writer_registered = more
            if more:
                self._loop.add_writer(self._sock, self._pump)
            else:
                self._loop.remove_writer(self._sock)
        self._arm_stall_timer(restart=progress)

    def _write(self) -> None:
        """Write as much as the socket takes now, of whichever thread holds the lock."""
        left = _TURN_BYTES
        try:
            while left > 0 and (self._writing or self._refill()):
                sent = self._send_some()
                left -= sent
                self._skip(sent)
                self._progress = True
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError, InterruptedError):
            pass

    def _send_some(self) -> int:
        if isinstance(self._sock, ssl.SSLSocket):
            return self._sock.send(self._writing[0])
        return self._sock.sendmsg(self._writing[:_MAX_VIEWS])

    def _skip(self, sent: int) -> None:
        if sent == sum(map(len, self._writing)):
            self._writing.clear()
            return
        while sent:
            first = self._writing[0]
            if sent < len(first):
                self._writing[0] = first[sent:]
                return
            sent -= len(first)
            self._writing.pop(0)

    def _refill(self) -> bool:
        """Choose what is written next: small frames first, then a chunk of the call whose turn it is."""
        small = b"".join(self._urgent)
        self._urgent.clear()
        if small:
            self._writing.append(memoryview(small))
        if self._outgoing:
            outgoing = self._outgoing.popleft()
            views, size = self._next_chunk(outgoing)
            self._writing += [memoryview(HEADER.pack(DATA, outgoing.call, size)), *views]
            if outgoing.buffers:
                self._outgoing.append(outgoing)
        return bool(self._writing)

    def _next_chunk(self, outgoing: _Outgoing) -> tuple[list[memoryview], int]:
        views: list[memoryview] = []
        size = 0
        while outgoing.buffers and size < MAX_CHUNK_BYTES and len(views) < _MAX_VIEWS // 2:
            first = outgoing.buffers[0]
            part = first[outgoing.sent : outgoing.sent + MAX_CHUNK_BYTES - size]
            views.append(part)
            size += len(part)
            outgoing.sent += len(part)
            if outgoing.sent == len(first):
                outgoing.buffers.popleft()
                outgoing.sent = 0
        return views, size

    def _arm_stall_timer(self, *, restart: bool) -> None:
        if self._stall_timer is not None and (restart or not self._writer_registered):
            self._stall_timer.cancel()
            self._stall_timer = None
        if self._stall_timer is None and self._writer_registered and not self.closed:
            stalled = PeerGone(f"the peer took nothing for {self.stall_timeout_s:.3g} s", peer=self.peer)
            self._stall_timer = self._loop.call_later(self.stall_timeout_s, self.close, stalled)

    # --- receiving ---------------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        left = _TURN_BYTES
        try:
            while left > 0 and not self.closed:
                room = self._parser.buffer()
                count = self._sock.recv_into(room)
                if count == 0:
                    self.close(PeerGone("the peer closed the direct link", peer=self.peer))
                    return
                self._parser.advance(count)
                left -= count
                if count < len(room) and not self._tls:
                    return  # the socket is empty
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError, InterruptedError):
            return
        except MoEError as e:
            logger.warning("cutting off peer ...%s: %s", self.peer[-8:], e)
            self.close(e)
            return
        except OSError as e:
            self.close(PeerGone(f"the direct link broke: {e!r}", peer=self.peer))
            return
        if not self.closed and isinstance(self._sock, ssl.SSLSocket) and self._sock.pending():
            self._loop.call_soon(self._on_readable)  # decrypted bytes do not make the socket readable again

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == CANCEL:
            self._incoming.pop(frame.call, None)  # the other side sends no more of it
            if frame.call in self._cancelling:
                self._cancelling.discard(frame.call)
                return
            self._stop_sending(frame.call)
            self._send_cancel(frame.call)
            self._owner.cancelled(self, frame.call)
            return
        if frame.call in self._incoming:
            raise ProtocolError(f"call {frame.call} begins a second time", peer=self.peer)
        opening = decode_opening(frame.payload)
        buffers = self._owner.opened(self, frame.call, opening)
        if self.closed:
            return
        total = sum(head.size_bytes for head in opening.tensors)
        if buffers is None:
            if total:
                incoming = _Incoming([_Unwanted(total)])
                incoming.unwanted = True
                self._incoming[frame.call] = incoming
            return
        if not total:
            self._owner.completed(self, frame.call)
            return
        self._incoming[frame.call] = _Incoming(buffers)

    def room_for(self, call: int, length: int) -> memoryview:
        """See DataSink."""
        incoming = self._incoming.get(call)
        if incoming is None:
            raise ProtocolError(f"tensor bytes of call {call}, which expects none", peer=self.peer)
        if incoming.unwanted:
            left = len(incoming.buffers[0]) - incoming.filled
            return _SCRATCH[: min(length, left)]
        room: memoryview = incoming.buffers[0][incoming.filled : incoming.filled + length]
        return room

    def filled(self, call: int, length: int) -> None:
        """See DataSink."""
        incoming = self._incoming[call]
        incoming.filled += length
        if incoming.unwanted:
            self._unwanted_bytes += length
            if self._unwanted_bytes > _MAX_UNWANTED_BYTES:
                raise ProtocolError("the peer goes on sending calls that were refused or cancelled", peer=self.peer)
        if incoming.filled == len(incoming.buffers[0]):
            incoming.buffers.popleft()
            incoming.filled = 0
            if not incoming.buffers:
                del self._incoming[call]
                if not incoming.unwanted:
                    self._owner.completed(self, call)


class _Unwanted:
    """Stands for this many bytes that nobody wants."""

    def __init__(self, size_bytes: int):
        self._size_bytes = size_bytes

    def __len__(self) -> int:
        return self._size_bytes
