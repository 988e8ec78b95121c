"""Link: one established connection of the direct link. Owns: its socket, multiplexing, fairness, bounds, and being cut off.

Non-blocking socket calls (``add_reader`` / ``add_writer``) instead of asyncio's streams or protocols: bytes go from the kernel
right into a tensor's memory, and from a tensor's memory right into the kernel. The event loop reads; any thread may send.
Must not know: how the connection came about, or what a call means.

Fairness: outgoing calls take turns, a chunk each; links take turns, a few milliseconds each.
Bounds: a link that owes its peer too many small frames, has been sent too much that was refused, or whose owner takes no more
calls, is not read until that has passed, so that the peer has to wait.
Ends: a peer that sends garbage, or moves less than ``MIN_BYTES_PER_S`` for ``stall_timeout_s`` while something is on its way,
is cut off. A connection that has ended is found also if nobody reads from it or writes to it. Other links do not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import logging
import os
import select
import socket
import ssl
import struct
import termios
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Protocol

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
CHECK_PERIOD_S = 0.5  # between two looks at what has ended or stalled
MIN_BYTES_PER_S = 2**11  # on average over the stall timeout, either way; a modem is faster
MAX_OWED_BYTES = 2**20  # of small frames: confirmations, errors. With more the link is not read
MAX_UNWANTED_BYTES = 2**28  # of one refused or cancelled call, before its sender has heard of it; more is no mistake
UNWANTED_BYTES_PER_S = 2**24  # of all those calls in the long run; beyond MAX_UNWANTED_BYTES the link is not read
MAX_UNWANTED_CALLS = 4096  # whose bytes are still announced, or whose cancellation is not confirmed
_TURN_S = 0.002  # of parsing, before other links get their turn
_TELL_WITHIN_S = (
    0.01  # that something has left which another thread has sent: to wake the event loop each time takes long
)
_TURN_BYTES = 2**22  # written before other links get their turn
_MAX_VIEWS = 16  # given to the kernel at a time
_SCRATCH = memoryview(bytearray(2**16))  # where bytes of cancelled calls go
_FRAME_OVERHEAD_BYTES = 64  # of a small frame that waits to be sent
_HUNG_UP = getattr(select, "POLLRDHUP", 0)  # Linux; POLLERR and POLLHUP are always told
# A host that has vanished is noticed after about 30 s; a killed process at once, without this.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4))

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

    def takes_more(self, link: Link) -> bool:
        """False: the link is not to be read until ``Link.read_on``. Asked often."""
        ...

    def check(self, link: Link) -> None:
        """Called every CHECK_PERIOD_S: end what has taken too long."""
        ...

    def lost(self, link: Link, error: MoEError) -> None:
        """The link is gone, for good. Called once."""
        ...


class Progress:
    """Whether bytes that are on their way move fast enough. Pure: bytes and passing time are told.

    :param window_s: in each such time something has to move
    """

    def __init__(self, window_s: float):
        self._window_s = window_s
        self._waited_s = 0.0
        self._mark = 0

    def stalled(self, elapsed_s: float, total_bytes: int, *, waiting: bool) -> bool:
        """True if too little has moved for a whole window, with more waiting all the time.

        :param elapsed_s: since the last call; no more than this process could have noticed if it was stopped itself
        :param total_bytes: moved so far
        """
        if not waiting or total_bytes - self._mark >= MIN_BYTES_PER_S * self._window_s:
            self._waited_s, self._mark = 0.0, total_bytes
            return False
        self._waited_s += elapsed_s
        return self._waited_s >= self._window_s


class Unwanted:
    """How much has been sent of calls that were refused or cancelled, forgotten with time. Pure: ``now`` is passed in.

    :ivar bytes: that were not forgotten when something was added last
    """

    def __init__(self) -> None:
        self.bytes = 0.0
        self._at = 0.0

    def add(self, size_bytes: int, now: float) -> None:
        """So much has been sent in vain."""
        self.bytes = max(0.0, self.bytes - (now - self._at) * UNWANTED_BYTES_PER_S) + size_bytes
        self._at = now

    def too_much(self, now: float) -> bool:
        """True until enough of it is forgotten."""
        return self.bytes > MAX_UNWANTED_BYTES + (now - self._at) * UNWANTED_BYTES_PER_S


class _Incoming:
    """Tensors of one call that are still arriving.

    :ivar filled: bytes of the first of the buffers
    :ivar left: bytes still to come
    :ivar wasted: bytes that came although nobody wanted them; None while somebody does
    """

    __slots__ = ("buffers", "filled", "left", "wasted")

    def __init__(self, buffers: Sequence[memoryview] | None, size_bytes: int):
        self.buffers = deque([view for view in buffers or () if len(view)])
        self.filled = 0
        self.left = size_bytes
        self.wasted: int | None = None if buffers is not None else 0

    def discard(self) -> None:
        """Nobody wants the rest; hold no memory for it."""
        self.buffers.clear()
        if self.wasted is None:
            self.wasted = 0


class _Outgoing:
    """Tensors of one call that are still being sent.

    :ivar sent: bytes of the first of the buffers
    """

    __slots__ = ("buffers", "call", "left", "sent")

    def __init__(self, call: int, buffers: Sequence[memoryview], left: Callable[[], None] | None):
        self.call, self.left = call, left
        self.buffers = deque(buffers)
        self.sent = 0


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
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for name, value in _KEEPALIVE:
                if hasattr(socket, name):
                    sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self.peer, self.stall_timeout_s = peer, stall_timeout_s
        self._loop, self._sock, self._owner = loop, sock, owner
        self._tls = isinstance(sock, ssl.SSLSocket)
        self.closed = False
        # receiving
        self._parser = FrameParser(self._on_frame, self, frozenset((OPEN, DATA, CANCEL)), self._goes_on)
        self._incoming: dict[int, _Incoming] = {}
        self._wanted = 0  # of them
        self._received_bytes = 0  # that were wanted
        self._unwanted = Unwanted()
        self._cancelling: set[int] = set()  # by us, not confirmed yet
        self._reading = True  # the event loop watches for bytes
        self._read_soon = False  # the event loop reads in its next turn
        self._turn_ends = 0.0
        # sending
        self._sending = threading.RLock()  # held to change what is to be written, to write it, and to close the socket
        self._urgent: deque[bytes] = deque()  # whole frames without tensors
        self._urgent_bytes = 0
        self._urgent_left: list[Callable[[], None]] = []  # to be told when they have left
        self._outgoing: deque[_Outgoing] = deque()
        self._chunk_of: _Outgoing | None = None  # whose chunk is the last thing in _writing
        self._writing: list[memoryview] = []  # frames being written, in order
        self._to_write_bytes = self._written_bytes = 0  # all that was ever put there, and the part that was written
        self._leaving: deque[tuple[int, Callable[[], None]]] = deque()  # whom to tell when that many are written
        self._left: deque[Callable[[], None]] = deque()  # to be told by the event loop: it has left, or never will
        self._telling: asyncio.TimerHandle | None = None  # it will look for that soon, whatever happens
        self._writer_registered = False
        # looking after it
        self._thread = threading.get_ident()
        self._receiving_progress, self._frame_progress, self._sending_progress = (
            Progress(stall_timeout_s) for _ in range(3)
        )
        self._frames_checked = 0
        self._checked_at = monotonic()
        self._check_timer = loop.call_later(CHECK_PERIOD_S, self._check)
        loop.add_reader(sock, self._on_readable)
        self._read_in_next_turn()  # TLS may have decrypted more than the handshake
        _links.add(self)

    def __repr__(self) -> str:
        kind = "TLS" if self._tls else "Unix socket" if self._sock.family == socket.AF_UNIX else "TCP"
        state = "closed" if self.closed else f"{len(self._incoming)} arriving, {len(self._outgoing)} being sent"
        return f"Link({kind} to ...{self.peer[-8:]}, {state})"

    @property
    def sending(self) -> bool:
        """True while something waits to be written."""
        return bool(self._writing or self._urgent or self._outgoing)

    # --- sending -----------------------------------------------------------------------------------------------------------

    def send(
        self,
        call: int,
        opening: Opening,
        tensors: Sequence[EncodedTensor],
        left: Callable[[], None] | None = None,
    ) -> None:
        """Begin to send a call, or the reply to one. The tensors' memory must not change until they are through.

        Of any thread: the one that has something to say writes it; a TLS connection is the event loop's alone.

        :param left: called once, by the event loop, when all of it has left this process or never will, unless this raises
        :raises PeerGone: the link is closed
        """
        frame = encode_frame(OPEN, call, encode_opening(opening))
        buffers = [view for view in (memoryview(tensor.buffer) for tensor in tensors) if len(view)]
        size = sum(map(len, buffers))
        in_loop = threading.get_ident() == self._thread
        with self._sending:
            if self.closed:
                raise PeerGone("the direct link is closed", peer=self.peer)
            if 0 < size <= MAX_CHUNK_BYTES and len(buffers) < _MAX_VIEWS and not self.sending:  # no need to take turns
                first = frame + HEADER.pack(DATA, call, size)
                self._writing += [memoryview(first), *buffers]
                self._to_write_bytes += len(first) + size
                if left is not None:
                    self._leaving.append((self._to_write_bytes, left))
            else:
                self._add_urgent(frame)
                if buffers:
                    self._outgoing.append(_Outgoing(call, buffers, left))
                elif left is not None:
                    self._urgent_left.append(left)
            if not in_loop and not self._tls:
                with contextlib.suppress(OSError):  # the event loop will find the same
                    self._write()
            rest = self.sending or (self._left and (self._telling is None or not self._reading))
        if in_loop:
            self._pump()
        elif rest:
            try:
                self._loop.call_soon_threadsafe(self._pump)
            except RuntimeError:
                raise PeerGone("the event loop of the direct link has ended", peer=self.peer) from None

    def cancel(self, call: int) -> None:
        """Stop sending and receiving a call, and tell the other side, which does the same and confirms."""
        if self.closed or call in self._cancelling:
            return
        if len(self._cancelling) >= MAX_UNWANTED_CALLS:
            self.close(ProtocolError("the peer does not confirm what is cancelled", peer=self.peer))
            return
        self._cancelling.add(call)
        self._stop_sending(call)
        self.discard(call)
        self._send_cancel(call)

    def discard(self, call: int) -> None:
        """Hold no more memory for a call that is arriving. It goes on arriving until its sender hears of it."""
        incoming = self._incoming.get(call)
        if incoming is not None and incoming.wasted is None:
            self._wanted -= 1
            incoming.discard()

    def _send_cancel(self, call: int) -> None:
        with self._sending:
            self._add_urgent(encode_frame(CANCEL, call))
        self._pump()

    def _add_urgent(self, frame: bytes) -> None:
        self._urgent.append(frame)
        self._urgent_bytes += len(frame) + _FRAME_OVERHEAD_BYTES

    def _stop_sending(self, call: int) -> None:
        with self._sending:
            for outgoing in self._outgoing:
                if outgoing.call != call:
                    continue
                self._outgoing.remove(outgoing)
                if outgoing.left is not None:
                    if outgoing is self._chunk_of and self._writing:  # a chunk of it has to be finished
                        self._leaving.append((self._to_write_bytes, outgoing.left))
                    else:
                        self._left.append(outgoing.left)
                return

    def close(self, error: MoEError | None = None) -> None:
        """End the link. What was being sent or received is lost."""
        with self._sending:
            if self.closed:
                return
            self.closed = self._parser.stopped = True
            self._watch(reading=False, writing=False)
            self._check_timer.cancel()
            if self._telling is not None:
                self._telling.cancel()
            self._sock.close()
            self._left += [left for _, left in self._leaving]
            self._left += self._urgent_left
            self._left += [outgoing.left for outgoing in self._outgoing if outgoing.left is not None]
            for owed in (self._outgoing, self._urgent, self._writing, self._leaving, self._urgent_left):
                owed.clear()
            self._chunk_of = None
        self._incoming.clear()
        self._cancelling.clear()
        _links.discard(self)
        self._tell_left()
        self._owner.lost(self, error or PeerGone("the direct link was closed", peer=self.peer))

    def _pump(self) -> None:
        """Write as much as the socket takes now; the rest when it says that it takes more."""
        if not self.closed and (self.sending or self._writer_registered):
            try:
                with self._sending:
                    self._write()
                    more = self.sending
            except OSError as e:
                self.close(PeerGone(f"the direct link broke: {e!r}", peer=self.peer))
                return
            if more != self._writer_registered:
                self._watch(reading=self._reading, writing=more)
        self._tell_left()

    def _tell_left(self) -> None:
        """Tell of all that has left. More is likely to follow, and is told of within _TELL_WITHIN_S."""
        if self._left and self._telling is None and not self.closed:
            self._telling = self._loop.call_later(_TELL_WITHIN_S, self._tell_now)
        while self._left:
            self._left.popleft()()

    def _tell_now(self) -> None:
        with self._sending:
            self._telling = None
        self._tell_left()

    def _write(self) -> None:
        """Write as much as the socket takes now, of whichever thread holds the lock."""
        left = _TURN_BYTES // 4 if self._tls else _TURN_BYTES
        try:
            while left > 0 and (self._writing or self._refill()):
                sent = self._send_some()
                left -= sent
                self._skip(sent)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError, InterruptedError):
            pass

    def _send_some(self) -> int:
        if isinstance(self._sock, ssl.SSLSocket):
            return self._sock.send(self._writing[0])
        return self._sock.sendmsg(self._writing[:_MAX_VIEWS])

    def _skip(self, sent: int) -> None:
        self._written_bytes += sent
        if self._written_bytes == self._to_write_bytes:
            self._writing.clear()
        else:
            while sent:
                first = self._writing[0]
                if sent < len(first):
                    self._writing[0] = first[sent:]
                    break
                sent -= len(first)
                self._writing.pop(0)
        while self._leaving and self._leaving[0][0] <= self._written_bytes:
            self._left.append(self._leaving.popleft()[1])

    def _refill(self) -> bool:
        """Choose what is written next: small frames first, then a chunk of the call whose turn it is."""
        small = b"".join(self._urgent)
        self._urgent.clear()
        self._urgent_bytes = 0
        if small:
            self._writing.append(memoryview(small))
            self._to_write_bytes += len(small)
            self._leaving += [(self._to_write_bytes, left) for left in self._urgent_left]
            self._urgent_left.clear()
        self._chunk_of = None
        if self._outgoing:
            outgoing = self._chunk_of = self._outgoing.popleft()
            views, size = self._next_chunk(outgoing)
            self._writing += [memoryview(HEADER.pack(DATA, outgoing.call, size)), *views]
            self._to_write_bytes += HEADER.size + size
            if outgoing.buffers:
                self._outgoing.append(outgoing)
            elif outgoing.left is not None:
                self._leaving.append((self._to_write_bytes, outgoing.left))
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

    # --- receiving ---------------------------------------------------------------------------------------------------------

    def _on_readable(self) -> None:
        """Read until nothing is left, the connection has ended, or the turn has.

        Never less: of a connection that was reset, the event loop tells once, whatever is left to be read.
        """
        if self.closed:
            return
        self._turn_ends = monotonic() + _TURN_S
        try:
            self._tell_left()
            self._parser.go_on()
            goes_on = self._takes_more()
            while goes_on and not self._parser.stopped:
                room = self._parser.buffer()
                count = self._sock.recv_into(room)
                if count == 0:
                    self.close(PeerGone("the peer closed the direct link", peer=self.peer))
                    return
                empty = count < len(room) and not self._tls and not self._is_reset()
                self._parser.advance(count)  # last of all: it wakes a thread, which needs the interpreter
                if empty and not self._parser.stopped:
                    return
                goes_on = self._goes_on()
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError, InterruptedError):
            return
        except MoEError as e:
            logger.warning("cutting off peer ...%s: %s", self.peer[-8:], e)
            self.close(e)
            return
        except OSError as e:
            self.close(PeerGone(f"the direct link broke: {e!r}", peer=self.peer))
            return
        except (
            BaseException
        ) as e:  # ours, or the owner's: it must end neither the event loop nor leave a link half done
            logger.exception("a direct link to ...%s has failed", self.peer[-8:])
            self.close(PeerGone(f"the direct link has failed: {type(e).__name__}", peer=self.peer))
            return
        if self.closed:
            return
        if self._takes_more():
            self._read_in_next_turn()
        else:
            self._watch(reading=False, writing=self._writer_registered)

    def _is_reset(self) -> bool:
        return self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0

    def read_on(self) -> None:
        """Read again, if the reason not to has passed."""
        if not self.closed and not self._reading and self._takes_more():
            self._watch(reading=True, writing=self._writer_registered)
            self._read_in_next_turn()

    def _read_in_next_turn(self) -> None:
        if not self._read_soon:
            self._read_soon = True
            self._loop.call_soon(self._read_turn)

    def _read_turn(self) -> None:
        self._read_soon = False
        if not self.closed and self._reading:
            self._on_readable()

    def _watch(self, *, reading: bool, writing: bool) -> None:
        """Have the event loop tell, or not, when the socket can be read and written."""
        if reading != self._reading:
            self._reading = reading
            if reading:
                self._loop.add_reader(self._sock, self._on_readable)
            else:
                self._loop.remove_reader(self._sock)
        if writing != self._writer_registered:
            self._writer_registered = writing
            if writing:
                self._loop.add_writer(self._sock, self._pump)
            else:
                self._loop.remove_writer(self._sock)

    def _takes_more(self) -> bool:
        return (
            self._urgent_bytes <= MAX_OWED_BYTES
            and not (self._unwanted.bytes and self._unwanted.too_much(self._turn_ends))
            and self._owner.takes_more(self)
        )

    def _goes_on(self) -> bool:
        """False if somebody else's turn has come, or the peer has to wait."""
        return monotonic() <= self._turn_ends and self._takes_more()

    def _on_frame(self, frame: Frame) -> None:
        if frame.kind == CANCEL:
            self._on_cancel(frame.call)
            return
        call = frame.call
        if call in self._incoming:
            raise ProtocolError(f"call {call} begins a second time", peer=self.peer)
        opening = decode_opening(frame.payload)
        buffers = self._owner.opened(self, call, opening)
        if self.closed:
            return
        size_bytes = sum([head.size_bytes for head in opening.tensors])
        if size_bytes:
            if len(self._incoming) - self._wanted >= MAX_UNWANTED_CALLS:
                raise ProtocolError("the peer goes on opening calls that are refused", peer=self.peer)
            self._incoming[call] = _Incoming(buffers, size_bytes)
            self._wanted += buffers is not None
        elif buffers is not None:
            self._owner.completed(self, call)

    def _on_cancel(self, call: int) -> None:
        incoming = self._incoming.pop(call, None)  # the other side sends no more of it
        if incoming is not None and incoming.wasted is None:
            self._wanted -= 1
        if call in self._cancelling:
            self._cancelling.discard(call)
            return
        self._stop_sending(call)
        self._send_cancel(call)
        if not self.closed:
            self._owner.cancelled(self, call)

    def room_for(self, call: int, length: int) -> memoryview:
        """See DataSink."""
        incoming = self._incoming.get(call)
        if incoming is None:
            raise ProtocolError(f"tensor bytes of call {call}, which expects none", peer=self.peer)
        if incoming.wasted is not None:
            return _SCRATCH[: min(length, incoming.left)]
        return incoming.buffers[0][incoming.filled : incoming.filled + length]

    def filled(self, call: int, length: int) -> None:
        """See DataSink."""
        incoming = self._incoming[call]
        incoming.left -= length
        if not incoming.left:
            del self._incoming[call]
        if incoming.wasted is not None:
            incoming.wasted += length
            if incoming.wasted > MAX_UNWANTED_BYTES:
                raise ProtocolError("the peer goes on sending a call that was refused or cancelled", peer=self.peer)
            self._unwanted.add(length, self._turn_ends)
        else:
            self._received_bytes += length
            incoming.filled += length
            if incoming.filled == len(incoming.buffers[0]):
                incoming.buffers.popleft()
                incoming.filled = 0
            if not incoming.left:
                self._wanted -= 1
                self._owner.completed(self, call)

    # --- looking after it --------------------------------------------------------------------------------------------------

    def _check(self) -> None:
        """Every CHECK_PERIOD_S: what nobody would tell of."""
        self._check_timer = self._loop.call_later(CHECK_PERIOD_S, self._check)
        now = monotonic()
        elapsed_s, self._checked_at = min(now - self._checked_at, 2 * CHECK_PERIOD_S), now
        try:
            if self._has_hung_up():
                if self._reading:
                    self._on_readable()
                else:  # it hears no answer any more
                    self.close(PeerGone("the peer closed the direct link", peer=self.peer))
            if not self.closed:
                self._owner.check(self)
            if not self.closed:
                self._cut_off_if_stalled(elapsed_s)
            self._turn_ends = now
            self.read_on()
        except BaseException as e:  # as above
            logger.exception("a direct link to ...%s has failed", self.peer[-8:])
            self.close(PeerGone(f"the direct link has failed: {type(e).__name__}", peer=self.peer))

    def _has_hung_up(self) -> bool:
        poll = select.poll()
        poll.register(self._sock.fileno(), _HUNG_UP)
        return bool(poll.poll(0))

    def _cut_off_if_stalled(self, elapsed_s: float) -> None:
        least = f"{MIN_BYTES_PER_S * self.stall_timeout_s:.0f} bytes in {self.stall_timeout_s:.3g} s"
        taken = self._written_bytes - _unread_bytes(self._sock)
        if self._sending_progress.stalled(elapsed_s, taken, waiting=self.sending):
            self.close(PeerGone(f"the peer took less than {least}", peer=self.peer))
            return
        waiting = self._wanted > 0 and self._reading
        frame_began = self._parser.frames == self._frames_checked and self._parser.unfinished and self._reading
        self._frames_checked = self._parser.frames
        if self._receiving_progress.stalled(elapsed_s, self._received_bytes, waiting=waiting) or (
            self._frame_progress.stalled(elapsed_s, 0, waiting=frame_began)
        ):
            self.close(PeerGone(f"the peer sent less than {least}", peer=self.peer))

    def let_go(self) -> None:
        """In a forked child: the connection is the parent's, and ends when the parent does."""
        self._sending = threading.RLock()  # maybe held by a thread that was not forked
        self.closed = True
        with contextlib.suppress(OSError):
            os.close(self._sock.detach())


def _unread_bytes(sock: LinkSocket) -> int:
    """Bytes written that the kernel still has: what the peer's host (a Unix socket: the peer) has not taken."""
    try:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))
    except OSError:
        return 0
    count: int = struct.unpack("i", answer)[0]
    return count


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork() -> None:
    for link in list(_links):
        link.let_go()


os.register_at_fork(after_in_child=_after_fork)
