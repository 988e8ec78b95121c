"""The direct link: calls over a Unix socket on one host, over TLS 1.3 elsewhere. Owns: tickets, dialing, accepting.

A client asks over libp2p, whose channel is encrypted and tied to the peer's identity, for a *ticket*: where to dial, the
fingerprint of the server's certificate, a single-use secret, and the proof to expect. It dials, checks the certificate
(TLS) and sends the secret; the server finds the ticket, so it knows the peer, and answers with the proof. Who comes without
a valid ticket gets nothing.

Must not know: what a call means (ExpertService), how bytes are multiplexed (Link), or what happens when there is no direct
link (``moe.transport.auto``).
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import datetime
import hashlib
import hmac
import itertools
import logging
import mmap
import os
import pathlib
import shutil
import socket
import ssl
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from moe.errors import CallTimeout, ConnectError, MoEError, PeerGone, ProtocolError
from moe.schema import Compression
from moe.transport.base import Admission, Call, ExpertService, Reply, answered_within
from moe.transport.link import Link, LinkSocket
from moe.transport.tickets import Ticket, TicketOffice
from moe.wire.frames import (
    HEADER_BYTES,
    HELLO,
    SECRET_BYTES,
    WELCOME,
    Opening,
    TensorHead,
    encode_frame,
)
from moe.wire.messages import (
    ReplyHeader,
    WireError,
    decode_reply_header,
    decode_request_header,
    encode_header,
)
from moe.wire.tensors import EncodedTensor, decode_tensor, encode_tensor

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0
MAX_HANDSHAKES = 64  # strangers being listened to at one time
MAX_LINKS_PER_PEER = 8
_HELLO_BYTES = HEADER_BYTES + SECRET_BYTES
_NEVER_REUSED_BYTES = 2**25  # from here on glibc gives freed blocks back to the kernel (DEFAULT_MMAP_THRESHOLD_MAX)
_SMALL_BYTES = 2**16  # tensors up to this are (de)coded in the event loop

# --- handshakes: blocking, each in a thread, before a socket becomes a Link ----------------------------------------------


def _receive_exactly(sock: LinkSocket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = sock.recv(count - len(data))
        if not piece:
            raise ConnectError("the connection was closed during the handshake")
        data += piece
    return data


def dial(ticket: Ticket, only: str | None = None) -> LinkSocket:
    """Connect and prove the ticket. Blocks, for at most a few times HANDSHAKE_TIMEOUT_S.

    :param only: "unix" or "tls"; None: Unix socket if it is there, then the addresses in order
    :raises ConnectError: nobody could be reached who proves to be the server
    """
    failures = []
    attempts: list[tuple[str, Callable[[], LinkSocket]]] = []
    if ticket.unix_path and only in (None, "unix") and os.path.exists(ticket.unix_path):
        attempts.append((ticket.unix_path, partial(_dial_unix, ticket.unix_path)))
    if only in (None, "tls"):
        for host, port in ticket.addresses:
            attempts.append((f"{host}:{port}", partial(_dial_tls, host, port, ticket.fingerprint)))
    for name, connect in attempts:
        try:
            sock = connect()
        except (OSError, MoEError) as e:
            failures.append(f"{name}: {e}")
            continue
        try:
            sock.sendall(encode_frame(HELLO, 0, ticket.secret))
            expected = encode_frame(WELCOME, 0, ticket.proof)
            if not hmac.compare_digest(_receive_exactly(sock, len(expected)), expected):
                raise ConnectError("the other side has not issued this ticket")
            return sock
        except (OSError, MoEError) as e:
            sock.close()
            failures.append(f"{name}: {e}")
            break  # the ticket is used up
    raise ConnectError(f"no direct link ({'; '.join(failures) or 'no address fits'})")


def _dial_unix(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(HANDSHAKE_TIMEOUT_S)
        sock.connect(path)
        return sock
    except BaseException:
        sock.close()
        raise


def _dial_tls(host: str, port: int, fingerprint: bytes) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the certificate is pinned: compared below with the fingerprint in the ticket
    sock = socket.create_connection((host, port), timeout=HANDSHAKE_TIMEOUT_S)
    try:
        tls = context.wrap_socket(sock)
    except BaseException:
        sock.close()
        raise
    certificate = tls.getpeercert(binary_form=True) or b""
    if not hmac.compare_digest(hashlib.sha256(certificate).digest(), fingerprint):
        tls.close()
        raise ConnectError("its certificate is not the one in the ticket")
    return tls


def make_certificate() -> tuple[bytes, bytes]:
    """A new self-signed certificate and its key, as PEM; only its fingerprint matters."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "moe")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return certificate.public_bytes(encoding), key.private_bytes(encoding, private, serialization.NoEncryption())


def make_tls_context(directory: pathlib.Path) -> tuple[ssl.SSLContext, bytes]:
    """A TLS 1.3 server context with a new certificate, and the certificate's SHA-256.

    :param directory: private; the key lies there for a moment, since ``load_cert_chain`` takes nothing but files
    """
    certificate, key = make_certificate()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    pem = directory / "pem"
    pem.touch(mode=0o600)
    pem.write_bytes(certificate + key)
    context.load_cert_chain(pem)
    pem.unlink()
    return context, hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode())).digest()


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
    return [
        decode_tensor(EncodedTensor(head.dtype, head.shape, Compression(head.codec), view))
        for head, view in zip(heads, views)
    ]


def _encode(tensors: Sequence[torch.Tensor], codecs: Sequence[int]) -> list[EncodedTensor]:
    return [encode_tensor(tensor, codec) for tensor, codec in zip(tensors, codecs)]


async def _maybe_in_thread(lossy: bool, size_bytes: int, func: Callable[..., object], *args: object) -> object:
    """Lossy codecs work; raw tensors are only looked at from another side."""
    if not lossy or size_bytes <= _SMALL_BYTES:
        return func(*args)
    return await asyncio.get_running_loop().run_in_executor(None, func, *args)


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
    :ivar max_bytes: of the reply's tensors
    """

    __slots__ = ("answered", "arriving", "max_bytes")

    def __init__(self, answered: asyncio.Future[_Arriving] | _ThreadsAnswer, max_bytes: int):
        self.answered, self.max_bytes = answered, max_bytes
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
    """

    def __init__(self, sock: LinkSocket, peer: str, on_lost: Callable[[DirectClient], None]):
        self.peer = peer
        self._on_lost = on_lost
        self._numbers = itertools.cycle(range(1, 2**32))
        self._waiting: dict[int, _Waiting] = {}
        self._loop, self._pid, self._thread = asyncio.get_running_loop(), os.getpid(), threading.get_ident()
        self.link = Link(self._loop, sock, peer, self)
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
        encoded: list[EncodedTensor] = await _maybe_in_thread(  # type: ignore[assignment]
            any(call.codecs), call.request_bytes, _encode, call.tensors, call.codecs
        )
        number, answered = next(self._numbers), self._loop.create_future()
        self._waiting[number] = _Waiting(answered, _max_reply_bytes(call))
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
        size_bytes = sum(head.size_bytes for head in heads)
        tensors: list[torch.Tensor] = await _maybe_in_thread(  # type: ignore[assignment]
            any(head.codec for head in heads), size_bytes, _restore, heads, arrived.views
        )
        return Reply(header, tensors)

    def call_blocking(self, call: Call, timeout_s: float | None) -> Reply:
        """``call`` by a thread that waits; see ``takes_blocking_calls``."""
        encoded = _encode(call.tensors, call.codecs)
        number = next(self._numbers)
        answered = _ThreadsAnswer()
        self._waiting[number] = _Waiting(answered, _max_reply_bytes(call))
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
        self.link.close()

    # --- LinkOwner ---

    def opened(self, link: Link, call: int, opening: Opening) -> list[memoryview] | None:
        """A reply begins."""
        waiting = self._waiting.get(call)
        if waiting is None:
            return None  # its caller has given up
        if sum(head.size_bytes for head in opening.tensors) > waiting.max_bytes:
            raise ProtocolError("a reply much larger than the call can have", peer=self.peer)
        views = allocate(opening.tensors)
        waiting.arriving = _Arriving(opening, views)
        return views

    def completed(self, link: Link, call: int) -> None:
        """A reply is there."""
        waiting = self._waiting.get(call)
        if waiting is not None and waiting.arriving is not None and not waiting.answered.done():
            waiting.answered.set_result(waiting.arriving)

    def cancelled(self, link: Link, call: int) -> None:
        """The server will not answer."""
        waiting = self._waiting.get(call)
        if waiting is not None:
            waiting.fail(PeerGone("the server has dropped the call", peer=self.peer))

    def lost(self, link: Link, error: MoEError) -> None:
        """Nobody may go on waiting."""
        self._guard.cancel()
        for waiting in list(self._waiting.values()):
            waiting.fail(PeerGone(error.message, peer=self.peer))
        self._on_lost(self)


def _opening(call: Call, encoded: Sequence[EncodedTensor]) -> Opening:
    header = encode_header(call.header) if call.header is not None else b""
    return Opening(call.method, call.uid, header, tuple(map(TensorHead.of, encoded)))


def _max_reply_bytes(call: Call) -> int:
    return 4 * call.reply_bytes + 2**26


class _Serving:
    """A request that is being received or served.

    :ivar unanswered: whoever gets it answers
    :ivar task: what serves it, if that takes a coroutine
    """

    __slots__ = ("admission", "opening", "task", "unanswered", "views")

    def __init__(self, opening: Opening, views: list[memoryview], admission: Admission):
        self.opening, self.views, self.admission = opening, views, admission
        self.unanswered = threading.Lock()
        self.task: asyncio.Task[None] | None = None


class _ServerLink:
    """The server's end of one link."""

    def __init__(self, sock: LinkSocket, peer: str, service: ExpertService, on_lost: Callable[[_ServerLink], None]):
        self.peer, self._service, self._on_lost = peer, service, on_lost
        self._arriving: dict[int, _Serving] = {}
        self._serving: dict[int, _Serving] = {}
        self._loop = asyncio.get_running_loop()
        self.link = Link(self._loop, sock, peer, self, service.read_timeout_s)

    @property
    def busy(self) -> bool:
        """True while somebody waits for an answer, or one is on its way."""
        return bool(self._serving) or self.link.sending

    def close(self) -> None:
        self.link.close()

    def opened(self, link: Link, call: int, opening: Opening) -> list[memoryview] | None:
        """A request begins: admit it by its header and tensor heads, before memory is taken."""
        if call in self._serving or call in self._arriving:
            raise ProtocolError(f"call {call} begins a second time", peer=self.peer)
        admission: Admission | None = None
        try:
            admission = self._service.open(
                self.peer, opening.method, opening.uid, decode_request_header(opening.header)
            )
            for index, head in enumerate(opening.tensors):
                limit = admission.admit(index, head.shape, head.dtype, Compression(head.codec))
                if head.size_bytes > limit:
                    raise ProtocolError(f"tensor {index} announces {head.size_bytes} bytes, its shape allows {limit}")
        except MoEError as e:
            if admission is not None:
                admission.release()
            self._refuse(call, e)
            return None
        views = allocate(opening.tensors)
        self._arriving[call] = _Serving(opening, views, admission)
        return views

    def completed(self, link: Link, call: int) -> None:
        """A request is there."""
        serving = self._arriving.pop(call, None)
        if serving is None:
            return
        self._serving[call] = serving
        heads = serving.opening.tensors
        try:
            lossy = any(head.codec for head in heads)
            if not lossy and serving.admission.start(
                _restore(heads, serving.views), partial(self._answer_anywhere, call, serving)
            ):
                return
        except MoEError as e:
            self._answer(call, serving, e, [])
            return
        serving.task = self._loop.create_task(self._serve(call, serving))

    def cancelled(self, link: Link, call: int) -> None:
        """Nobody waits for the answer."""
        serving = self._arriving.pop(call, None) or self._serving.get(call)
        if serving is not None:
            self._withdraw(call, serving)

    def lost(self, link: Link, error: MoEError) -> None:
        """The peer has gone: withdraw everything."""
        for call, serving in (*self._arriving.items(), *self._serving.items()):
            self._withdraw(call, serving)
        self._arriving.clear()
        self._on_lost(self)

    def _withdraw(self, call: int, serving: _Serving) -> None:
        if serving.task is not None:
            serving.task.cancel()
        elif serving.unanswered.acquire(blocking=False):  # else it is being answered
            self._done(call, serving)

    async def _serve(self, call: int, serving: _Serving) -> None:
        heads = serving.opening.tensors
        try:
            size_bytes = sum(head.size_bytes for head in heads)
            tensors: list[torch.Tensor] = await _maybe_in_thread(  # type: ignore[assignment]
                any(head.codec for head in heads), size_bytes, _restore, heads, serving.views
            )
            reply = await serving.admission.run(tensors)
            encoded: list[EncodedTensor] = await _maybe_in_thread(  # type: ignore[assignment]
                any(reply.codecs), sum(t.nbytes for t in reply.tensors), _encode, reply.tensors, reply.codecs
            )
            self._send(call, reply, encoded)
        except MoEError as e:
            self._refuse(call, e)
        finally:
            self._done(call, serving)

    def _answer_anywhere(self, call: int, serving: _Serving, outcome: Reply | MoEError) -> None:
        """Answer a request that was started, from any thread. Large answers are the event loop's: to send one takes long."""
        if not serving.unanswered.acquire(blocking=False):
            return
        encoded: list[EncodedTensor] = []
        if isinstance(outcome, Reply):
            try:
                encoded = _encode(outcome.tensors, outcome.codecs)
            except Exception as e:  # whatever a module has returned, there is an answer
                logger.exception("an answer cannot be sent")
                outcome = ProtocolError(f"the answer cannot be sent: {type(e).__name__}")
        try:
            if sum(len(tensor.buffer) for tensor in encoded) > _SMALL_BYTES:
                self._loop.call_soon_threadsafe(self._answer, call, serving, outcome, encoded)
            else:
                self._say(call, outcome, encoded)
                self._loop.call_soon_threadsafe(self._done, call, serving)
        except RuntimeError:
            pass  # the loop is closed: the server stops

    def _answer(self, call: int, serving: _Serving, outcome: Reply | MoEError, encoded: list[EncodedTensor]) -> None:
        self._say(call, outcome, encoded)
        self._done(call, serving)

    def _say(self, call: int, outcome: Reply | MoEError, encoded: list[EncodedTensor]) -> None:
        try:
            if isinstance(outcome, Reply):
                self._send(call, outcome, encoded)
                return
        except MoEError as e:  # too large a header; or the link is lost, and nobody is told
            outcome = e
        self._refuse(call, outcome)

    def _send(self, call: int, reply: Reply, encoded: list[EncodedTensor]) -> None:
        header = encode_header(reply.header or ReplyHeader())
        self.link.send(call, Opening("", "", header, tuple(map(TensorHead.of, encoded))), encoded)

    def _done(self, call: int, serving: _Serving) -> None:
        self._serving.pop(call, None)
        serving.admission.release()

    def _refuse(self, call: int, error: MoEError) -> None:
        logger.debug("refused call %d of %s: %r", call, self.peer, error)
        header = encode_header(ReplyHeader(error=WireError.from_exception(error)))
        with contextlib.suppress(PeerGone):
            self.link.send(call, Opening("", "", header, ()), ())


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
        self._listeners: list[socket.socket] = []
        self._links: set[_ServerLink] = set()
        self._directory = ""
        self._unix_path = ""
        self._fingerprint = b""
        self._context: ssl.SSLContext | None = None
        self._handshakes = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._executor = concurrent.futures.ThreadPoolExecutor(4, thread_name_prefix="moe-handshake")

    @property
    def links(self) -> int:
        """Links that are open."""
        return len(self._links)

    @property
    def addresses(self) -> tuple[tuple[str, int], ...]:
        """Where the TLS listener can be reached."""
        return tuple((host, self._port) for host in self._hosts)

    async def start(self) -> None:
        """Open the listeners.

        :raises OSError: the port is taken
        """
        self._directory = tempfile.mkdtemp(prefix="moe-link-")  # mode 0700: other users dial TLS
        self._context, self._fingerprint = make_tls_context(pathlib.Path(self._directory))
        self._unix_path = os.path.join(self._directory, "socket")
        unix = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        unix.bind(self._unix_path)
        listeners = [unix]
        for host in self._listen_hosts:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            listeners.append(socket.create_server((host, self._port), family=family, backlog=128))
            self._port = listeners[-1].getsockname()[1]
        loop = asyncio.get_running_loop()
        for listener in listeners:
            listener.listen(128)
            listener.setblocking(False)
            self._listeners.append(listener)
            loop.add_reader(listener, self._accept, listener)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Take no new links, send the answers of calls in flight, close all links.

        :param grace_s: for answers to be sent
        """
        loop = asyncio.get_running_loop()
        for listener in self._listeners:
            loop.remove_reader(listener)
            listener.close()
        self._listeners.clear()
        deadline = loop.time() + grace_s
        while any(link.busy for link in self._links) and loop.time() < deadline:  # noqa: ASYNC110 - they have no event
            await asyncio.sleep(0.01)
        for link in list(self._links):
            link.close()
        for task in list(self._tasks):
            task.cancel()
        self._executor.shutdown(wait=False, cancel_futures=True)
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

    def _accept(self, listener: socket.socket) -> None:
        try:
            sock, _ = listener.accept()
        except OSError:
            return
        if self._handshakes >= MAX_HANDSHAKES:
            sock.close()
            return
        self._handshakes += 1
        task = asyncio.get_running_loop().create_task(self._welcome(sock))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _welcome(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        try:
            secured, hello = await loop.run_in_executor(self._executor, self._hear, sock)
        except (OSError, MoEError, RuntimeError) as e:
            logger.debug("a stranger was turned away: %r", e)
            return
        finally:
            self._handshakes -= 1
        redeemed = self._office.redeem(hello[HEADER_BYTES:], loop.time())
        if redeemed is None or hello[:HEADER_BYTES] != encode_frame(HELLO, 0, bytes(SECRET_BYTES))[:HEADER_BYTES]:
            logger.debug("a stranger came without a valid ticket")
            secured.close()
            return
        peer, proof = redeemed
        own = [link for link in self._links if link.peer == peer]
        if len(own) >= MAX_LINKS_PER_PEER:
            own[0].close()
        try:
            secured.sendall(encode_frame(WELCOME, 0, proof))
            self._links.add(_ServerLink(secured, peer, self._service, self._links.discard))
        except OSError:
            secured.close()

    def _hear(self, sock: socket.socket) -> tuple[LinkSocket, bytes]:
        """TLS handshake and HELLO, within HANDSHAKE_TIMEOUT_S each."""
        secured: LinkSocket = sock
        try:
            sock.settimeout(HANDSHAKE_TIMEOUT_S)
            if sock.family != socket.AF_UNIX:
                assert self._context is not None
                secured = self._context.wrap_socket(sock, server_side=True)
            return secured, _receive_exactly(secured, _HELLO_BYTES)
        except BaseException:
            secured.close()
            sock.close()
            raise
