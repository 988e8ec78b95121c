"""The direct link: calls over a Unix socket on one host, over TLS 1.3 elsewhere. Owns: calls at both ends, a server's links.

A client asks over libp2p, whose channel is encrypted and tied to the peer's identity, for a *ticket*: where to dial, the
fingerprint of the server's certificate, a single-use secret, and the proof to expect. It dials, checks the certificate
(TLS) and sends the secret; the server finds the ticket, so it knows the peer, and answers with the proof. Who comes without
a valid ticket gets nothing.

Must not know: what a call means (ExpertService), how bytes are multiplexed (Link), how a handshake goes (handshakes), or what
happens when there is no direct link (``moe.transport.auto``).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import math
import mmap
import os
import pathlib
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, TypeVar

import torch

from moe.errors import (
    CallTimeout,
    DeadlineExceeded,
    ExpertFailed,
    MoEError,
    Overloaded,
    PeerGone,
    ProtocolError,
)
from moe.schema import Compression
from moe.transport.base import Admission, Call, ExpertService, Reply, answered_within
from moe.transport.handshakes import (
    DIRECTORY_PREFIX,
    SOCKET_NAME,
    Listener,
    Stranger,
    dial,
    listening_sockets,
    make_certificate,
    make_tls_context,
)
from moe.transport.link import Link, LinkSocket
from moe.transport.tickets import Ticket, TicketOffice
from moe.wire.frames import WELCOME, Opening, TensorHead, encode_frame
from moe.wire.messages import (
    ReplyHeader,
    WireError,
    decode_reply_header,
    decode_request_header,
    encode_header,
)
from moe.wire.tensors import EncodedTensor, decode_tensor, encode_tensor

__all__ = ["DirectClient", "DirectServer", "dial", "make_certificate", "make_tls_context"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

MAX_LINKS = 1024  # of a server
MAX_LINKS_PER_PEER = 8
MAX_LINK_WEIGHT = 1024  # of the calls of one link: 1 each, and 1 more for each KiB of its opening
MAX_REPLY_SLACK_BYTES = 2**28  # by which all replies arriving over one link may be larger than was expected
CLIENT_STALL_TIMEOUT_S = 300.0  # calls have time limits of their own; a server may make a link wait for long
_SENDING_GRACE_S = 1.0  # an answer that has not left so long after its caller's time is dropped
_ORPHAN_AGE_S = 60.0
_NEVER_REUSED_BYTES = 2**25  # from here on glibc gives freed blocks back to the kernel (DEFAULT_MMAP_THRESHOLD_MAX)
_SMALL_BYTES = 2**16  # answers up to this are sent by the thread that has them
_SMALL_WORK_BYTES = 2**20  # copied or checked in the event loop: less than a millisecond
_CODEC_COST = 16  # times that of a copy

# --- calls over a link -----------------------------------------------------------------------------------------------------


def allocate(heads: Sequence[TensorHead]) -> list[memoryview]:
    """Memory to read tensors into that are about to arrive, aligned as torch aligns its own."""
    return [_memory(head.size_bytes) for head in heads]


def _memory(size_bytes: int) -> memoryview:
    if size_bytes == 0:
        return memoryview(b"")
    if size_bytes >= _NEVER_REUSED_BYTES and hasattr(mmap, "MADV_HUGEPAGE"):  # fresh pages each time: few, large ones
        pages = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a kernel without them
            pages.madvise(mmap.MADV_HUGEPAGE)
        return memoryview(pages)
    view: memoryview = torch.empty(size_bytes, dtype=torch.uint8).numpy().data
    return view


def _restore(heads: Sequence[TensorHead], views: Sequence[memoryview]) -> list[torch.Tensor]:
    """The tensors that have arrived.

    :raises ProtocolError: they are none
    """
    try:
        return [
            decode_tensor(EncodedTensor(head.dtype, head.shape, Compression(head.codec), view))
            for head, view in zip(heads, views)
        ]
    except MoEError:
        raise
    except Exception as e:  # whatever torch makes of a shape that somebody has made up
        raise ProtocolError(f"tensors that nobody can have: {type(e).__name__}") from None


def _encode(tensors: Sequence[torch.Tensor], codecs: Sequence[int]) -> list[EncodedTensor]:
    return [encode_tensor(tensor, codec) for tensor, codec in zip(tensors, codecs)]


def _encoding_is_work(tensors: Sequence[torch.Tensor], codecs: Sequence[int]) -> bool:
    """Lossy codecs work, and tensors with gaps are copied; others are only looked at from another side."""
    copied = (t.nbytes * (_CODEC_COST if codec else 1) for t, codec in zip(tensors, codecs) if codec or _copied(t))
    return sum(copied) > _SMALL_WORK_BYTES


def _copied(tensor: torch.Tensor) -> bool:
    return not tensor.is_contiguous() or tensor.is_cuda


def _restoring_is_work(heads: Sequence[TensorHead]) -> bool:
    """So they do here; bool values are checked, and hivemind's bfloat16 is converted."""
    if sum([head.size_bytes for head in heads]) <= _SMALL_BYTES:
        return False
    converted = (
        head.size_bytes * (_CODEC_COST if head.codec else 1)
        for head in heads
        if head.codec
        or head.dtype == "bool"
        or (head.dtype == "bfloat16" and head.size_bytes > 2 * math.prod(head.shape))
    )
    return sum(converted) > _SMALL_WORK_BYTES


async def _maybe_in_thread(work: bool, func: Callable[..., T], *args: object) -> T:
    """Run what takes long in a thread. Its memory is in use until it ends, also if nobody waits any more."""
    if not work:
        return func(*args)
    running = asyncio.get_running_loop().run_in_executor(None, partial(func, *args))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        with contextlib.suppress(Exception):
            await running
        raise


def _as_error(error: BaseException, what: str) -> MoEError:
    """What the other side is told, whatever was raised."""
    if isinstance(error, MoEError):
        return error.with_traceback(None)  # which would hold the frames that hold the error, and tensors, in a cycle
    if isinstance(error, MemoryError):
        return Overloaded(f"{what}: not enough memory")
    logger.error("%s", what, exc_info=error)
    return ExpertFailed(f"{what}: {type(error).__name__}")


class _Arriving(NamedTuple):
    opening: Opening
    views: list[memoryview]


class _ThreadsAnswer:
    """What a thread waits for: a concurrent Future without its costs. Given in the event loop only."""

    __slots__ = ("_arrived", "_error", "_given")

    def __init__(self) -> None:
        self._given = threading.Lock()
        self._given.acquire()
        self._arrived: _Arriving | None = None
        self._error: MoEError | None = None

    def done(self) -> bool:
        """True if it was given."""
        return self._arrived is not None or self._error is not None

    def set_result(self, arrived: _Arriving) -> None:
        """The reply is there."""
        self._arrived = arrived
        self._given.release()

    def set_exception(self, error: MoEError) -> None:
        """There will be none."""
        self._error = error
        self._given.release()

    def wait(self, timeout_s: float | None) -> _Arriving | None:
        """What was given; None if nothing was in time."""
        if not self._given.acquire(
            timeout=-1 if timeout_s is None else min(max(0.0, timeout_s), threading.TIMEOUT_MAX)
        ):
            return None
        if self._error is not None:
            raise self._error
        return self._arrived


class _Waiting:
    """A call whose reply is waited for.

    :ivar answered: what the waiting one waits for: a coroutine, or a thread
    :ivar expected_bytes: of the reply's tensors, at most
    :ivar slack_bytes: by which the reply is larger
    :ivar codecs: in which its tensors may travel
    """

    __slots__ = ("answered", "arriving", "codecs", "expected_bytes", "slack_bytes")

    def __init__(self, answered: asyncio.Future[_Arriving] | _ThreadsAnswer, call: Call):
        self.answered = answered
        self.expected_bytes, self.slack_bytes = 4 * call.reply_bytes, 0
        self.codecs = call.reply_codecs
        self.arriving: _Arriving | None = None

    def fail(self, error: MoEError) -> None:
        """There will be no reply."""
        if not self.answered.done():
            self.answered.set_exception(error)


class DirectClient:
    """The client's end of one link: sends calls, matches replies. Lives until the link is lost.

    A call is made by a coroutine of the event loop (``call``), or by any other thread (``call_blocking``), which writes its
    request and reads its reply's tensors itself: two changes of thread less, of which each costs as much as all the rest.

    :param on_lost: called once
    :ivar was_of_use: a reply has come over it
    """

    def __init__(self, sock: LinkSocket, peer: str, on_lost: Callable[[DirectClient], None]):
        self.peer = peer
        self.was_of_use = False
        self._on_lost = on_lost
        self._numbers = itertools.cycle(range(1, 2**32))
        self._waiting: dict[int, _Waiting] = {}
        self._loop, self._pid, self._thread = asyncio.get_running_loop(), os.getpid(), threading.get_ident()
        self.link = Link(self._loop, sock, peer, self, CLIENT_STALL_TIMEOUT_S)
        self._guard = self._loop.create_task(self._end_with_loop())

    @property
    def takes_blocking_calls(self) -> bool:
        """False in the event loop's own thread, which may not wait for itself, and in a process that was forked."""
        return threading.get_ident() != self._thread and os.getpid() == self._pid and not self.link.closed

    async def call(self, call: Call, timeout_s: float | None) -> Reply:
        """Carry one call.

        :raises PeerGone: the link broke meanwhile
        :raises CallTimeout: no reply in time; the server is told
        """
        work = _encoding_is_work(call.tensors, call.codecs)
        encoded = await _maybe_in_thread(work, _encode, call.tensors, call.codecs)
        number, answered = next(self._numbers), self._loop.create_future()
        self._waiting[number] = _Waiting(answered, call)
        try:
            self.link.send(number, _opening(call, encoded), encoded)
            arrived = await answered_within(answered, timeout_s, f"{call.method} of {call.uid}", self.peer)
        except BaseException:
            self.link.cancel(number)
            raise
        finally:
            self._waiting.pop(number, None)
        header = self._header(number, call, arrived)
        heads = arrived.opening.tensors
        return Reply(header, await _maybe_in_thread(_restoring_is_work(heads), _restore, heads, arrived.views))

    def call_blocking(self, call: Call, timeout_s: float | None) -> Reply:
        """``call`` by a thread that waits; see ``takes_blocking_calls``."""
        encoded = _encode(call.tensors, call.codecs)
        number = next(self._numbers)
        answered = _ThreadsAnswer()
        self._waiting[number] = _Waiting(answered, call)
        try:
            self.link.send(number, _opening(call, encoded), encoded)
            arrived = answered.wait(timeout_s)
            if arrived is None:
                raise CallTimeout(f"{call.method} of {call.uid}: no answer within {timeout_s:.3g} s", peer=self.peer)
        except BaseException:
            self._cancel_soon(number)
            raise
        finally:
            self._waiting.pop(number, None)
        header = self._header(number, call, arrived)
        return Reply(header, _restore(arrived.opening.tensors, arrived.views))

    def _header(self, number: int, call: Call, arrived: _Arriving) -> ReplyHeader | None:
        header = decode_reply_header(arrived.opening.header)
        if header is not None and header.error is not None:
            self._cancel_soon(number)  # what is left of the request is not wanted
            raise header.error.to_exception(peer=self.peer, uid=call.uid)
        return header

    def _cancel_soon(self, number: int) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended, and the link with it
            self._loop.call_soon_threadsafe(self.link.cancel, number)

    async def _end_with_loop(self) -> None:
        """Threads that wait are told when the event loop is stopped, which cancels all that runs in it."""
        try:
            await asyncio.Event().wait()
        finally:
            self.link.close()

    def close(self) -> None:
        """Drop the link."""
        if os.getpid() == self._pid:
            self.link.close()

    # --- LinkOwner ---

    def opened(self, link: Link, call: int, opening: Opening) -> list[memoryview] | None:
        """A reply begins."""
        waiting = self._waiting.get(call)
        if waiting is None or waiting.answered.done():
            return None  # its caller has given up
        if waiting.arriving is not None:
            raise ProtocolError("a second reply to one call", peer=self.peer)
        if any(head.codec not in waiting.codecs for head in opening.tensors):
            waiting.fail(ProtocolError("a reply in a codec that its schema does not have", peer=self.peer))
            return None
        size_bytes = sum(head.size_bytes for head in opening.tensors)
        if size_bytes > waiting.expected_bytes:
            waiting.slack_bytes = size_bytes - waiting.expected_bytes
            if sum(other.slack_bytes for other in list(self._waiting.values())) > MAX_REPLY_SLACK_BYTES:
                waiting.slack_bytes = 0
                waiting.fail(ProtocolError("a reply much larger than the call can have", peer=self.peer))
                return None
        try:
            views = allocate(opening.tensors)
        except Exception as e:
            waiting.fail(
                ProtocolError(f"no memory for a reply of {size_bytes} bytes: {type(e).__name__}", peer=self.peer)
            )
            return None
        waiting.arriving = _Arriving(opening, views)
        return views

    def completed(self, link: Link, call: int) -> None:
        """A reply is there."""
        waiting = self._waiting.get(call)
        if waiting is not None and waiting.arriving is not None and not waiting.answered.done():
            self.was_of_use = True
            waiting.answered.set_result(waiting.arriving)

    def cancelled(self, link: Link, call: int) -> None:
        """The server will not answer."""
        waiting = self._waiting.get(call)
        if waiting is not None:
            waiting.fail(PeerGone("the server has dropped the call", peer=self.peer))

    def takes_more(self, link: Link) -> bool:
        """Replies always: each is bounded, and somebody waits for it."""
        return True

    def check(self, link: Link) -> None:
        """Calls have time limits of their own."""

    def lost(self, link: Link, error: MoEError) -> None:
        """Nobody may go on waiting."""
        self._guard.cancel()
        for waiting in list(self._waiting.values()):
            waiting.fail(PeerGone(error.message, peer=self.peer))
        self._on_lost(self)


def _opening(call: Call, encoded: Sequence[EncodedTensor]) -> Opening:
    header = encode_header(call.header) if call.header is not None else b""
    return Opening(call.method, call.uid, header, tuple(map(TensorHead.of, encoded)))


class _Serving:
    """A request that is being received, served or answered.

    :ivar unanswered: whoever gets it answers
    :ivar task: what serves it, if that takes a coroutine
    :ivar weight: see MAX_LINK_WEIGHT
    :ivar withdrawn: nobody waits for the answer
    """

    __slots__ = ("admission", "heads", "task", "unanswered", "views", "weight", "withdrawn")

    def __init__(self, opening: Opening, views: list[memoryview], admission: Admission):
        self.heads, self.views, self.admission = opening.tensors, views, admission
        self.weight = 1 + (len(opening.uid) + len(opening.header) + 64 * len(opening.tensors)) // 1024
        self.unanswered = threading.Lock()
        self.task: asyncio.Task[None] | None = None
        self.withdrawn = False


class _ServerLink:
    """The server's end of one link.

    A request is arriving, then served, until its answer has left this process or never will; then its admission is released,
    once. The link is not read while the calls being served weigh too much, or the peer has all the memory it may have, unless
    the rest of something is to be read that has begun.
    """

    def __init__(self, sock: LinkSocket, peer: str, service: ExpertService, on_lost: Callable[[_ServerLink], None]):
        self.peer, self._service, self._on_lost = peer, service, on_lost
        self._arriving: dict[int, _Serving] = {}
        self._serving: dict[int, _Serving] = {}
        self._weight = 0  # of both
        self._waits_for_memory = False
        self._loop = asyncio.get_running_loop()
        self.link = Link(self._loop, sock, peer, self, service.read_timeout_s)

    @property
    def busy(self) -> bool:
        """True while somebody waits for an answer, or one is on its way."""
        return bool(self._serving) or self.link.sending

    @property
    def idle(self) -> bool:
        """True while nothing is going on at all."""
        return not self._arriving and not self.busy

    def close(self) -> None:
        self.link.close()

    # --- LinkOwner ---

    def opened(self, link: Link, call: int, opening: Opening) -> list[memoryview] | None:
        """A request begins: admit it by its header and tensor heads, before memory is taken."""
        if call in self._serving or call in self._arriving:
            raise ProtocolError(f"call {call} begins a second time", peer=self.peer)
        admission: Admission | None = None
        try:
            if self._weight >= MAX_LINK_WEIGHT:
                raise Overloaded("too many calls at a time over one link; try again later")
            admission = self._service.open(
                self.peer, opening.method, opening.uid, decode_request_header(opening.header)
            )
            for index, head in enumerate(opening.tensors):
                limit = admission.admit(index, head.shape, head.dtype, Compression(head.codec))
                if head.size_bytes > limit:
                    raise ProtocolError(f"tensor {index} announces {head.size_bytes} bytes, its shape allows {limit}")
            views = allocate(opening.tensors)
        except BaseException as e:  # also what a rule of the server's owner may raise, SystemExit included
            if admission is not None:
                _release(admission)
            self._refuse(call, _as_error(e, "the request cannot be taken"))
            return None
        serving = self._arriving[call] = _Serving(opening, views, admission)
        self._weight += serving.weight
        return views

    def completed(self, link: Link, call: int) -> None:
        """A request is there."""
        serving = self._arriving.pop(call, None)
        if serving is None:
            return
        self._serving[call] = serving
        try:
            if not _restoring_is_work(serving.heads):
                views, serving.views = serving.views, []
                tensors = _restore(serving.heads, views)
                if serving.admission.start(tensors, partial(self._answer_anywhere, call, serving)):
                    return
            else:
                tensors = []
        except BaseException as e:
            if serving.unanswered.acquire(blocking=False):
                self._say(call, serving, _as_error(e, "the request cannot be served"), [])
            return
        serving.task = self._loop.create_task(self._serve(call, serving, tensors))
        serving.task.add_done_callback(partial(self._served, call, serving))

    def cancelled(self, link: Link, call: int) -> None:
        """Nobody waits for the answer."""
        serving = self._arriving.get(call) or self._serving.get(call)
        if serving is not None:
            self._withdraw(call, serving)

    def takes_more(self, link: Link) -> bool:
        """See LinkOwner."""
        if self._serving and self._weight >= MAX_LINK_WEIGHT:
            return False
        if self._arriving or not self._service.inflight.over_share(self.peer):
            return True
        if not self._waits_for_memory:
            self._waits_for_memory = True
            self._service.inflight.when_given_back(self.peer, self._given_back)
        return not self._service.inflight.over_share(self.peer)  # or nothing may be given back any more

    def _given_back(self) -> None:
        """The peer has a little less memory. In any thread."""

        def read_on() -> None:
            self._waits_for_memory = False
            self.link.read_on()

        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(read_on)

    def check(self, link: Link) -> None:
        """What is not received, or has not left, when nobody waits any more, is let go."""
        now = time.monotonic()
        for call, serving in list(self._arriving.items()):
            if now > serving.admission.deadline:
                link.discard(call)
                self._done(call, serving)
                self._refuse(call, DeadlineExceeded("the caller's time was over before its request had arrived"))
        for call, serving in list(self._serving.items()):
            if now > serving.admission.deadline + _SENDING_GRACE_S and serving.unanswered.locked():
                serving.withdrawn = True
                link.cancel(call)

    def lost(self, link: Link, error: MoEError) -> None:
        """The peer has gone: withdraw everything."""
        for call, serving in (*self._arriving.items(), *self._serving.items()):
            self._withdraw(call, serving)
        self._on_lost(self)

    # --- answering ---

    def _withdraw(self, call: int, serving: _Serving) -> None:
        serving.withdrawn = True
        if serving.task is not None:
            serving.task.cancel()
        elif serving.unanswered.acquire(blocking=False):  # else it is being answered
            self._done(call, serving)

    async def _serve(self, call: int, serving: _Serving, tensors: list[torch.Tensor]) -> None:
        outcome: Reply | MoEError
        encoded: list[EncodedTensor] = []
        try:
            if serving.views:
                views, serving.views = serving.views, []
                tensors = await _maybe_in_thread(True, _restore, serving.heads, views)
                del views
            outcome = await serving.admission.run(tensors)
            encoded = await _maybe_in_thread(
                _encoding_is_work(outcome.tensors, outcome.codecs), _encode, outcome.tensors, outcome.codecs
            )
        except (asyncio.CancelledError, GeneratorExit):
            raise
        except BaseException as e:  # whatever a module has raised, or returned, there is an answer
            outcome = _as_error(e, "the request cannot be answered")
        serving.unanswered.acquire(blocking=False)
        self._say(call, serving, outcome, encoded)

    def _served(self, call: int, serving: _Serving, task: asyncio.Task[None]) -> None:
        """The coroutine has ended; one that was cancelled, maybe before it began, has not answered."""
        serving.task = None
        if task.cancelled() or task.exception() is not None:
            self._done(call, serving)

    def _answer_anywhere(self, call: int, serving: _Serving, outcome: Reply | MoEError) -> None:
        """Answer a request that was started, from any thread. Large answers are the event loop's: to send one takes long."""
        if not serving.unanswered.acquire(blocking=False):
            return
        encoded: list[EncodedTensor] = []
        if isinstance(outcome, Reply):
            try:
                encoded = _encode(outcome.tensors, outcome.codecs)
            except BaseException as e:  # whatever a module has returned, there is an answer
                outcome = _as_error(e, "the answer cannot be sent")
        if sum(len(tensor.buffer) for tensor in encoded) > _SMALL_BYTES:
            self._soon(self._say, call, serving, outcome, encoded)
        else:
            self._say(call, serving, outcome, encoded)

    def _say(self, call: int, serving: _Serving, outcome: Reply | MoEError, encoded: list[EncodedTensor]) -> None:
        """Send the answer, and be done when it has left. In any thread, by whoever has got ``unanswered``."""
        left = partial(self._done, call, serving)
        if serving.withdrawn:
            self._soon(left)
            return
        if isinstance(outcome, Reply):
            try:
                header = encode_header(outcome.header or ReplyHeader())
                self.link.send(call, Opening("", "", header, tuple(map(TensorHead.of, encoded))), encoded, left)
                return
            except BaseException as e:  # too large a header, for example; or the link is lost
                outcome = _as_error(e, "the answer cannot be sent")
        if not self._refuse(call, outcome, left):
            self._soon(left)

    def _soon(self, func: Callable[..., object], *args: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops
            self._loop.call_soon_threadsafe(func, *args)

    def _done(self, call: int, serving: _Serving) -> None:
        """The answer has left this process, or never will. Again does no harm."""
        calls = self._serving if call in self._serving else self._arriving
        if calls.get(call) is serving:
            del calls[call]
            self._weight -= serving.weight
        serving.views = []
        _release(serving.admission)
        self.link.read_on()

    def _refuse(self, call: int, error: MoEError, left: Callable[[], None] | None = None) -> bool:
        """Answer with an error.

        :returns: False if the link is closed
        """
        logger.debug("refused call %d of %s: %r", call, self.peer, error)
        header = encode_header(ReplyHeader(error=WireError.from_exception(error)))
        try:
            self.link.send(call, Opening("", "", header, ()), (), left)
        except PeerGone:
            return False
        return True


def _release(admission: Admission) -> None:
    try:
        admission.release()
    except Exception:
        logger.exception("a request could not be ended")


class DirectServer:
    """Listens for direct links, and issues the tickets for them.

    :param service: what serves the calls
    :param port: of the TLS listener; 0: any free one
    :param hosts: names or addresses under which other hosts can reach this one, best first
    :param listen_host: address of the TLS listener, or several
    """

    def __init__(
        self,
        service: ExpertService,
        port: int = 0,
        hosts: Sequence[str] = (),
        listen_host: str | Sequence[str] = "0.0.0.0",
    ):
        self._service, self._port, self._hosts = service, port, tuple(hosts)
        self._listen_hosts = (listen_host,) if isinstance(listen_host, str) else tuple(listen_host)
        self._office = TicketOffice()
        self._listener: Listener | None = None
        self._links: dict[_ServerLink, None] = {}  # those used first come first
        self._directory = ""
        self._unix_path = ""
        self._fingerprint = b""

    @property
    def links(self) -> int:
        """Links that are open."""
        return len(self._links)

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where the TLS listener can be reached."""
        return tuple((host, self._port) for host in self._hosts)

    @property
    def _handshakes(self) -> int:
        return len(self._listener) if self._listener is not None else 0

    async def start(self) -> None:
        """Open the listeners.

        :raises OSError: the port is taken
        """
        await asyncio.get_running_loop().run_in_executor(None, _remove_orphans)
        self._directory = tempfile.mkdtemp(prefix=DIRECTORY_PREFIX)  # mode 0700: other users dial TLS
        try:
            self._listen()
        except BaseException:
            await self.stop(grace_s=0.0)
            raise

    def _listen(self) -> None:
        context, self._fingerprint = make_tls_context(pathlib.Path(self._directory))
        listener = self._listener = Listener(self._heard)
        for sock in listening_sockets(self._listen_hosts, self._port):
            self._port = sock.getsockname()[1]
            listener.listen(sock, context)
        self._unix_path = os.path.join(self._directory, SOCKET_NAME)
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(self._unix_path)
        listener.listen(unix, None)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Take no new links, send the answers of calls in flight, close all links.

        :param grace_s: for answers to be sent
        """
        loop = asyncio.get_running_loop()
        if self._listener is not None:
            self._listener.close()
        deadline = loop.time() + grace_s
        while any(link.busy for link in self._links) and loop.time() < deadline:  # noqa: ASYNC110 - they have no event
            await asyncio.sleep(0.01)
        for link in list(self._links):
            link.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    def ticket(self, peer: str) -> Ticket:
        """A ticket for a peer that has asked for one over libp2p. Called in the event loop."""
        secret, proof = self._office.issue(peer, asyncio.get_running_loop().time())
        return Ticket(
            secret=secret,
            proof=proof,
            unix_path=self._unix_path,
            addresses=self.addresses,
            fingerprint=self._fingerprint,
        )

    def _heard(self, stranger: Stranger, secret: bytes) -> None:
        """A stranger has shown a secret."""
        redeemed = self._office.redeem(secret, asyncio.get_running_loop().time())
        if redeemed is None:
            logger.debug("a stranger came without a valid ticket")
            return
        peer, proof = redeemed
        own = [link for link in self._links if link.peer == peer]
        if not (_room_among(own, MAX_LINKS_PER_PEER) and _room_among(list(self._links), MAX_LINKS)):
            logger.debug("peer ...%s has too many links", peer[-8:])
            return
        sock = stranger.take(encode_frame(WELCOME, 0, proof))
        try:
            self._links[_ServerLink(sock, peer, self._service, self._lost)] = None
        except BaseException:
            sock.close()
            raise

    def _lost(self, link: _ServerLink) -> None:
        self._links.pop(link, None)


def _room_among(links: Sequence[_ServerLink], most: int) -> bool:
    """Make room for one more link, at the cost of the oldest with nothing going on; False if all are in use."""
    if len(links) < most:
        return True
    for link in links:
        if link.idle:
            link.close()
            return True
    return False


def _remove_orphans() -> None:
    """Directories of servers that were killed: nobody listens at their sockets."""
    for directory in pathlib.Path(tempfile.gettempdir()).glob(f"{DIRECTORY_PREFIX}*"):
        with contextlib.suppress(OSError):
            found = directory.lstat()
            if found.st_uid != os.geteuid() or not directory.is_dir() or directory.is_symlink():
                continue
            if time.time() - found.st_mtime > _ORPHAN_AGE_S and not _listened_at(directory / SOCKET_NAME):
                shutil.rmtree(directory, ignore_errors=True)


def _listened_at(path: pathlib.Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        return sock.connect_ex(str(path)) not in (errno.ECONNREFUSED, errno.ENOENT)
