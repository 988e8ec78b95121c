"""Calls over hivemind's P2P (libp2p): unary for small ones, streamed for large ones, in stock hivemind's messages.

Owns: which of the two a call takes, reading and writing streams within bounds and deadlines, and turning what libp2p says
into our errors. Must not know: what a call means.

Streams are read here and not by hivemind's protobuf handlers: those take a message of any length a peer announces into
memory, and wait for ever for the next one. Framing is hivemind's (``p2p_daemon.py``): a marker byte (0 message, 1 end of
stream or error), 8 bytes of length, the protobuf.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import re
import resource
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from hivemind.p2p import P2P, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.multiaddr import Multiaddr

from moe.errors import (
    CallTimeout,
    ConnectError,
    ExpertFailed,
    MoEError,
    Overloaded,
    PeerGone,
    ProtocolError,
    ReplyTooLarge,
    TransportError,
    Unavailable,
    error_from_wire,
    error_named,
    printable,
)
from moe.expert_uid import MAX_UID_LENGTH, PeerIDLike
from moe.schema import DTYPES, MAX_TENSORS, Compression
from moe.transport.base import FORWARD, Admission, Call, ExpertService, Reply, end, within
from moe.transport.in_process import OwnServer, find_own, register, unregister
from moe.transport.tickets import Ticket, decode_ticket, encode_ticket
from moe.wire.hivemind_dialect import (
    CHUNK_BYTES,
    MAX_MESSAGE_BYTES,
    MAX_UNARY_BYTES,
    RPC_BACKWARD,
    RPC_FORWARD,
    RPC_INFO,
    RPC_TICKET,
    STREAM_SUFFIX,
    Bounded,
    ExpertInfo,
    ExpertRequest,
    ExpertResponse,
    ExpertUID,
    TensorAssembler,
    TensorGate,
    decode_info,
    encode_info,
    from_message,
    stream_requests,
    stream_responses,
    to_message,
)
from moe.wire.messages import (
    MAX_ERROR_CHARS,
    ExpertDescription,
    ReplyHeader,
    WireError,
    decode_reply_header,
    decode_request_header,
    encode_header,
)
from moe.wire.tensors import EncodedTensor, count_values, decode_tensor, encode_tensor, max_encoded_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")

_RPC_OF_METHOD = {FORWARD: RPC_FORWARD, "backward": RPC_BACKWARD}
_MESSAGE, _END = b"\x00", b"\x01"
_LENGTH_BYTES = 8
_LINGER_S = 2.0  # for a caller to read the last of a reply; ours
MAX_STREAMS_PER_PEER = 256  # at one time; each has a socket and a buffer of 128 KiB
_MAX_REFUSED_PER_PEER = 64  # streams beyond that are told so; further ones are cut off
MAX_CALLS_PER_PEER = 4096  # unary ones, at one time
MIN_PACE_BYTES = 2**16  # to be sent, or taken, in each read_timeout_s: who is slower is cut off
_PIECE_BYTES = 2**17  # of a message, read or written at one time
_MESSAGES_PER_TURN = 64  # that have arrived already, read at one time
_COPIES = 3  # of a unary message until it is decoded: the bytes, those of protobuf, and what is made of them
_FIRST_MESSAGE_TIMEOUTS = 4  # times read_timeout_s, for what a stream wants, however fast it comes
_READING = "reading a stream"
_ENVELOPE_BYTES = 2**16  # of a message, besides tensors; not counted
_SMALL_BYTES = 64 * 1024  # tensors up to this are (de)coded in the event loop; ours, about 10 us
_STREAM_BACKLOG = 4096  # Linux allows no more unless told so
_ERROR_NAME = re.compile(r"(\w{1,64})\(")  # how the repr of an exception begins, in which unary calls relay it
_MAX_ERROR_BYTES = 2**16  # of the message that ends a stream with an error
_NOT_REACHED = ("failed to find any peer", "failed to dial", "no addresses", "routing: not found", "no good addresses")

_TO_ITSELF = "dial to self"


async def _in_thread(size_bytes: int, func: Callable[..., Any], *args: Any) -> Any:
    """Large tensors are (de)coded off the event loop."""
    if size_bytes <= _SMALL_BYTES:
        return func(*args)
    return await asyncio.get_running_loop().run_in_executor(None, func, *args)


def _encode_all(tensors: Sequence[torch.Tensor], codecs: Sequence[int]) -> list[EncodedTensor]:
    return [encode_tensor(tensor, codec) for tensor, codec in zip(tensors, codecs)]


def _decode_all(encoded: Iterable[EncodedTensor]) -> list[torch.Tensor]:
    return [decode_tensor(tensor) for tensor in encoded]


async def _connect(daemon_maddr: str) -> P2P:
    """A connection to a libp2p daemon, to be closed with ``shutdown``.

    Unlike a bare replica of hivemind's, it is over when the daemon is: calls that wait for an answer then fail at once.
    """
    p2p: P2P = await P2P.replicate(Multiaddr(daemon_maddr))
    control = p2p._client.control

    def daemon_gone(reading: asyncio.Task[None]) -> None:
        if not reading.cancelled():
            logger.debug("the connection to libp2p daemon %s has ended: %r", daemon_maddr, reading.exception())
        for answer in control._pending_calls.values():
            if not answer.done():
                answer.set_exception(P2PDaemonError("the connection to this process's own libp2p daemon has ended"))
        p2p._terminate()

    control._read_task.add_done_callback(daemon_gone)
    return p2p


async def _listen(p2p: P2P) -> None:
    """hivemind's listener for the daemon's streams, with room for many that come at once: what finds no room is cut off
    (measured: half of 1000 calls, 200 at once, with asyncio's default of 100)."""
    path = p2p._client_listen_maddr["unix"]
    async with await asyncio.start_unix_server(p2p._client.control._handler, path=path, backlog=_STREAM_BACKLOG):
        await asyncio.get_running_loop().create_future()


class _Answer(asyncio.Future):  # type: ignore[type-arg]
    """What a unary call waits for. hivemind's reader of answers dies of one that comes after the call was given up."""

    def set_result(self, result: Any) -> None:
        """See Future."""
        if not self.done():
            super().set_result(result)

    def set_exception(self, exception: Any) -> None:
        """See Future."""
        if not self.done():
            super().set_exception(exception)


async def _ask(p2p: P2P, peer_id: PeerID, handle: str, request: Any, answer_type: Any) -> Any:
    """A unary call.

    :raises ProtocolError: the answer is malformed, or of too many parts
    """
    control, call_id = p2p._client.control, uuid.uuid4()
    asked = p2pd_pb2.CallUnaryRequest(peer=peer_id.to_bytes(), proto=handle, data=request.SerializeToString())
    control._pending_calls[call_id] = answer = _Answer()
    try:
        await control._pending_messages.put(p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, callUnary=asked))
        data = await answer
    except asyncio.CancelledError:
        await control._cancel_unary_call(call_id)
        raise
    finally:
        control._pending_calls.pop(call_id, None)
    return Bounded(answer_type).FromString(data)


def _is_connected(p2p: P2P | None) -> bool:
    """False also when the daemon has gone. (hivemind's own ``is_alive`` does not notice.)"""
    return p2p is not None and not p2p._client.control._read_task.done()


async def _open_stream(p2p: P2P, peer_id: PeerID, handle: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Like hivemind's ``call_binary_stream_handler``, but leaves no socket open when it fails or is cancelled."""
    reader, writer = await p2p._client.control.daemon_connector.open_connection()
    try:
        wanted = p2pd_pb2.StreamOpenRequest(peer=peer_id.to_bytes(), proto=[handle])
        await write_pbmsg(writer, p2pd_pb2.Request(type=p2pd_pb2.Request.STREAM_OPEN, streamOpen=wanted))
        response = p2pd_pb2.Response()
        await read_pbmsg_safe(reader, response)
        raise_if_failed(response)
    except BaseException:
        writer.close()
        raise
    return reader, writer


class _Pace:
    """How long to wait for a peer: it has to send, or take, MIN_PACE_BYTES in each ``patience_s``.

    :param patience_s: None: whoever waits has a deadline
    :ivar deadline: monotonic time at which nothing is waited for any more, however fast the peer is
    """

    def __init__(self, patience_s: float | None):
        self._patience_s, self.deadline = patience_s, math.inf
        self.begin()

    def begin(self) -> None:
        """Now it is the peer's turn."""
        self._since, self._moved = time.monotonic(), 0

    def moved(self, size_bytes: int) -> None:
        """So much has come, or has been taken."""
        self._moved += size_bytes
        if self._moved >= MIN_PACE_BYTES:
            self.begin()

    async def keep(self, doing: Coroutine[Any, Any, T], what: str, peer: str) -> T:
        """Await something in which the peer moves bytes.

        :raises CallTimeout: it is too slow
        """
        if self._patience_s is None:
            return await doing
        waited = asyncio.ensure_future(doing)
        try:
            while (left_s := min(self._since + self._patience_s, self.deadline) - time.monotonic()) > 0:
                done, _ = await asyncio.wait({waited}, timeout=left_s)
                if done:
                    return waited.result()
            await end(waited)
        except asyncio.CancelledError:
            await end(waited)
            raise
        why = "its time is over" if time.monotonic() >= self.deadline else "the peer is too slow"
        raise CallTimeout(f"{what}: {why}", peer=peer)


class _Reader:
    """Reads stream messages of bounded length and number of parts.

    :param message_type: ExpertRequest or ExpertResponse
    :param must_end: the stream is a request, which says that it ends; a reply may just end
    """

    def __init__(
        self, reader: asyncio.StreamReader, message_type: Any, pace: _Pace, peer: str, *, must_end: bool = False
    ):
        self._reader, self._type, self._pace, self._peer = reader, Bounded(message_type), pace, peer
        self._must_end = must_end
        self._messages = 0

    async def next(self, count: Callable[[int], None] | None = None) -> Any:
        """The next message; None at the end of the stream.

        :param count: told the size of a message before it is read
        :raises RemoteError: the server ended the stream with an error
        :raises PeerGone: the connection broke, or the client ended the stream with an error
        :raises Overloaded: (from ``count``) there is no memory for it
        """
        self._messages += 1
        if self._messages % _MESSAGES_PER_TURN == 0:
            await asyncio.sleep(0)
        try:
            marker, data = await self._read_one(count)
        except MoEError:  # before the next line: a CallTimeout is an OSError
            raise
        except (asyncio.IncompleteReadError, OSError):
            raise PeerGone("the stream was cut off", peer=self._peer) from None
        if not marker and not self._must_end:
            return None  # how a server ends a stream
        if not marker:
            raise PeerGone("the stream ended before the request did", peer=self._peer)
        return self._end(data) if marker == _END else self._type.FromString(data)

    def _end(self, data: bytearray) -> None:
        try:
            text = RPCError.FromString(data).message
        except Exception:
            raise ProtocolError("malformed message at the end of a stream", peer=self._peer) from None
        if text and self._must_end:  # what a client says is not looked into
            raise PeerGone("the caller ended the request with an error", peer=self._peer)
        if text:
            raise _relayed_error(text, self._peer)

    async def _read_one(self, count: Callable[[int], None] | None) -> tuple[bytes, bytearray]:
        """Marker and message; no marker at the end of the stream."""
        data = bytearray()
        marker = await self._reader.read(1)
        if not marker:
            return marker, data
        length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
        most = {_MESSAGE: MAX_MESSAGE_BYTES, _END: _MAX_ERROR_BYTES}.get(marker, -1)
        if length > most:
            raise ProtocolError(
                f"a stream message of {length} bytes (marker {marker!r}); at most {most} are allowed", peer=self._peer
            )
        if count is not None:
            count(length)
        while len(data) < length:
            piece = await self._reader.read(min(length - len(data), _PIECE_BYTES))
            if not piece:
                raise asyncio.IncompleteReadError(b"", length)
            data += piece
            self._pace.moved(len(piece))
        return marker, data


async def _write(
    writer: asyncio.StreamWriter, message: Any, marker: bytes = _MESSAGE, pace: _Pace | None = None
) -> None:
    data = memoryview(message.SerializeToString())
    writer.write(marker + len(data).to_bytes(_LENGTH_BYTES, "big"))
    for start in range(0, len(data), _PIECE_BYTES):
        piece = data[start : start + _PIECE_BYTES]
        writer.write(piece)
        await writer.drain()
        if pace is not None:
            pace.moved(len(piece))
    await writer.drain()  # of a message without content, too


def _close(writer: asyncio.StreamWriter) -> None:
    """Close, without waiting for a peer that may never take what has been written."""
    if writer.transport.get_write_buffer_size():
        writer.transport.abort()
    else:
        writer.close()


def _relayed_error(text: str, peer: str, uid: str | None = None) -> MoEError:
    """The error a handler raised over there, from the text by which hivemind relays it: ``... : Name('message')``."""
    text = text[:MAX_ERROR_CHARS]
    start = 0
    while (found := _ERROR_NAME.match(text, start)) is None:
        colon = text.find(": ", start)
        if colon < 0:
            return ExpertFailed(printable(text), peer=peer, uid=uid)
        start = colon + 2
    message = text[found.end() :].removesuffix(")").strip("'\"")
    named = error_named(found[1], message, peer=peer, uid=uid)
    if named is not None:
        return named
    if found[1] == "KeyError":  # stock hivemind, asked for an expert it does not have
        return error_from_wire("not_found", f"no expert {message}", peer=peer, uid=uid)
    return ExpertFailed(printable(text), peer=peer, uid=uid)


# --- client ------------------------------------------------------------------------------------------------------------


class LibP2PTransport:
    """Calls experts through a running libp2p daemon.

    :param daemon_maddr: control address of the daemon (``moe.dht.resolve_p2p``). The connection to it is made in the event
        loop of the first call, not taken over from ``dht.replicate_p2p()``, whose replica is bound to another loop.
    """

    def __init__(self, daemon_maddr: str):
        self._daemon_maddr = daemon_maddr
        self._of_parent: P2P | None = None  # never touched: its sockets and event loop are another process's
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._p2p: P2P | None = None
        self._connecting = asyncio.Lock()

    def __repr__(self) -> str:
        return f"LibP2PTransport({self._daemon_maddr})"

    async def _connected(self) -> P2P:
        if self._pid != os.getpid():
            self._of_parent = self._p2p
            self._begin()
        if not self.is_connected:
            async with self._connecting:
                if not self.is_connected:
                    await self.close()
                    try:
                        self._p2p = await _connect(self._daemon_maddr)
                    except (OSError, P2PDaemonError) as e:
                        raise ConnectError(f"cannot reach this process's own libp2p daemon: {e}") from e
        assert self._p2p is not None
        return self._p2p

    @property
    def is_connected(self) -> bool:
        """False before the first call, and when the daemon has gone."""
        return _is_connected(self._p2p)

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        name = peer.to_base58()
        with _translated(name, uid):
            if (own := find_own(self._daemon_maddr, name)) is not None:
                return await own.info(uid, timeout_s)
            asking = self._ask(_peer_id(peer), RPC_INFO, ExpertUID(uid=uid), ExpertInfo)
            answer = await within(asking, timeout_s, f"rpc_info of {uid}", name)
            return decode_info(answer.serialized_info)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        name = peer.to_base58()
        if (own := find_own(self._daemon_maddr, name)) is not None:
            return await own.call(call, timeout_s)
        return await within(self._call(_peer_id(peer), name, call), timeout_s, f"{call.method} of {call.uid}", name)

    async def ticket(self, peer: PeerIDLike, *, timeout_s: float | None) -> Ticket:
        """A ticket for a direct link to this peer.

        :raises MoEError: the peer has none to give
        """
        name = peer.to_base58()
        with _translated(name, ""):
            if (own := find_own(self._daemon_maddr, name)) is not None:
                return await own.ticket(timeout_s)
            asking = self._ask(_peer_id(peer), RPC_TICKET, ExpertUID(), ExpertResponse)
            answer = await within(asking, timeout_s, "asking for a direct link", name)
            return decode_ticket(answer.metadata)

    async def close(self) -> None:
        """Close the connection to the daemon; the daemon itself belongs to the DHT."""
        if self._p2p is not None:
            await self._p2p.shutdown()
            self._p2p = None

    async def _ask(self, peer_id: PeerID, handle: str, request: Any, answer_type: Any) -> Any:
        return await _ask(await self._connected(), peer_id, handle, request, answer_type)

    async def _call(self, peer_id: PeerID, name: str, call: Call) -> Reply:
        encoded = await _in_thread(call.request_bytes, _encode_all, call.tensors, call.codecs)
        metadata = encode_header(call.header) if call.header is not None else b""
        sent_bytes = sum(len(tensor.buffer) for tensor in encoded)
        with _translated(name, call.uid):
            p2p = await self._connected()
            try:
                if max(sent_bytes, call.reply_bytes) > MAX_UNARY_BYTES:
                    raise ReplyTooLarge
                header, received = await _unary_call(p2p, peer_id, name, call, encoded, metadata)
            except ReplyTooLarge:  # expected, or said by the server: the same request id gets the same answer
                requests = stream_requests(call.uid, encoded, metadata)
                header, received = await _stream_call(p2p, peer_id, name, call, requests)
            received_bytes = sum(len(tensor.buffer) for tensor in received)
            return Reply(header, await _in_thread(received_bytes, _decode_all, received))


async def _unary_call(
    p2p: P2P, peer_id: PeerID, name: str, call: Call, encoded: Sequence[EncodedTensor], metadata: bytes
) -> tuple[ReplyHeader | None, list[EncodedTensor]]:
    messages = [to_message(tensor) for tensor in encoded]
    request = ExpertRequest(uid=call.uid, tensors=messages, metadata=metadata)
    response = await _ask(p2p, peer_id, _RPC_OF_METHOD[call.method], request, ExpertResponse)
    header = _checked_header(response.metadata, name, call.uid)
    return header, _received(response, _ReplyGate.of(call))


async def _stream_call(
    p2p: P2P, peer_id: PeerID, name: str, call: Call, requests: Iterable[Any]
) -> tuple[ReplyHeader | None, list[EncodedTensor]]:
    handle = _RPC_OF_METHOD[call.method] + STREAM_SUFFIX
    reader, writer = await _open_stream(p2p, peer_id, handle)
    assembler = TensorAssembler(_ReplyGate.of(call))
    replies = _Reader(reader, ExpertResponse, _Pace(None), name)
    sending = asyncio.create_task(_send_all(writer, requests))
    try:
        response = await replies.next()
        if response is None:
            raise PeerGone("the stream ended without an answer", peer=name, uid=call.uid)
        header = _checked_header(response.metadata, name, call.uid)
        assembler.feed_all(response.tensors)
        while (response := await replies.next()) is not None:
            if not response.tensors:
                raise ProtocolError("a message with nothing in it", peer=name, uid=call.uid)
            assembler.feed_all(response.tensors)
        return header, assembler.finish()
    finally:
        sending.cancel()
        await asyncio.wait({sending}, timeout=1.0)
        if sending.done() and not sending.cancelled():
            sending.exception()  # what matters is what the server has said
        _close(writer)  # tells the server that nobody waits any more, if it is not done


async def _send_all(writer: asyncio.StreamWriter, requests: Iterable[Any]) -> None:
    for request in requests:
        await _write(writer, request)
    await _write(writer, RPCError(), _END)


def _received(message: Any, gate: TensorGate) -> list[EncodedTensor]:
    """The tensors of a unary message, one by one: refused before the next is looked at."""
    encoded = []
    for index, tensor in enumerate(map(from_message, message.tensors)):
        limit = gate.admit(index, tensor.shape, tensor.dtype, tensor.codec)
        if len(tensor.buffer) > limit:
            raise ProtocolError(f"tensor {index} has {len(tensor.buffer)} bytes, its shape allows {limit}")
        encoded.append(tensor)
    return encoded


class _ReplyGate:
    """Bounds what the tensors of a reply take in all, and how they are encoded; the caller, who knows the schema, checks what
    they look like."""

    def __init__(self, max_bytes: int, codecs: Collection[int] = frozenset(Compression)):
        self._left, self._codecs = max_bytes, codecs

    @classmethod
    def of(cls, call: Call) -> _ReplyGate:
        """For the reply of a call."""
        return cls(4 * call.reply_bytes + 2**26, call.reply_codecs)

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        """See TensorGate."""
        if dtype not in DTYPES or index >= MAX_TENSORS:
            raise ProtocolError(f"tensor {index} of a reply is of dtype {dtype[:50]!r}")
        if codec not in self._codecs:
            raise ProtocolError(
                f"tensor {index} of a reply is compressed as {codec.name}, as its schema does not have it"
            )
        encoded_bytes = max_encoded_bytes(shape, DTYPES[dtype], codec)
        decoded_bytes = count_values(shape) * DTYPES[dtype].itemsize if codec else 0
        self._left -= encoded_bytes + decoded_bytes
        if self._left < 0:
            raise ProtocolError("a reply much larger than the call can have")
        return encoded_bytes


def _checked_header(metadata: bytes, peer: str, uid: str) -> ReplyHeader | None:
    header = decode_reply_header(metadata)
    if header is not None and header.error is not None:
        raise header.error.to_exception(peer=peer, uid=uid)
    return header


def _peer_id(peer: PeerIDLike) -> PeerID:
    return peer if isinstance(peer, PeerID) else PeerID.from_base58(peer.to_base58())


@contextlib.contextmanager
def _translated(peer: str, uid: str) -> Any:
    """libp2p's and hivemind's errors as ours, where they occur."""
    try:
        yield
    except MoEError as e:
        e.peer = e.peer or peer
        e.uid = e.uid or uid
        raise
    except P2PHandlerError as e:
        raise _relayed_error(str(e), peer, uid) from None
    except (P2PDaemonError, ControlFailure) as e:
        text = printable(str(e))
        if _TO_ITSELF in text:
            raise ConnectError(
                "the server is behind this process's own libp2p daemon, which does not call itself, and it is not in this "
                "process: call it with a DHT of your own",
                peer=peer,
                uid=uid,
            ) from None
        if any(sign in text for sign in _NOT_REACHED):
            raise ConnectError(f"the peer cannot be reached: {text}", peer=peer, uid=uid) from None
        if "protocol" in text and "not supported" in text:
            raise Unavailable("the peer does not serve experts (any more)", peer=peer, uid=uid) from None
        raise TransportError(text, peer=peer, uid=uid) from None
    except (OSError, asyncio.IncompleteReadError) as e:
        raise PeerGone(f"the connection broke: {e!r}", peer=peer, uid=uid) from None


# --- server ------------------------------------------------------------------------------------------------------------


class LibP2PServer:
    """Offers an ExpertService to peers through a running libp2p daemon, under stock hivemind's handle names.

    :param daemon_maddr: control address of the daemon
    :param service: what serves the requests
    :param issue_ticket: makes a ticket for a peer that asks for a direct link; None: there are no direct links
    """

    def __init__(self, daemon_maddr: str, service: ExpertService, issue_ticket: Callable[[str], Ticket] | None = None):
        self._daemon_maddr, self._service, self._issue_ticket = daemon_maddr, service, issue_ticket
        self._p2p: P2P | None = None
        self._own: OwnServer | None = None
        self._requests: set[asyncio.Task[Any]] = set()
        self._streams: Counter[str] = Counter()  # open now, by peer
        self._calls: Counter[str] = Counter()  # unary ones
        self._unread: dict[asyncio.Task[Any], None] = {}  # streams that have not said what they want, oldest first
        self._max_streams = max(MAX_STREAMS_PER_PEER // 2, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2)

    async def start(self) -> None:
        """Register the handlers. Requests may arrive before this returns."""
        self._p2p = p2p = await _connect(self._daemon_maddr)
        p2p._listen_task = asyncio.create_task(_listen(p2p))
        control = p2p._client.control
        control._handle_persistent_request, control._handler_tasks = self._serve_unary, _HandlerTasks()
        await control.add_unary_handler(RPC_INFO, self._info, balanced=True)
        if self._issue_ticket is not None:
            await control.add_unary_handler(RPC_TICKET, self._ticket, balanced=True)
        for method, handle in _RPC_OF_METHOD.items():
            await control.add_unary_handler(handle, self._unary(method), balanced=True)
            await p2p.add_binary_stream_handler(handle + STREAM_SUFFIX, self._stream(method), balanced=True)
        self._own = OwnServer(p2p.peer_id.to_base58(), self._service, self._issue_ticket)
        register(self._daemon_maddr, self._own)

    @property
    def is_connected(self) -> bool:
        """False when the daemon has gone, and nobody can call any more."""
        return _is_connected(self._p2p)

    async def stop(self, grace_s: float = 1.0) -> None:
        """Take no more requests, send the answers of those in flight, end those that have none.

        :param grace_s: for answers to be sent
        """
        if self._p2p is None:
            return
        p2p, self._p2p = self._p2p, None
        unregister(self._daemon_maddr, self._own)
        if _is_connected(p2p):  # it would not say that the daemon is gone
            with contextlib.suppress(Exception):
                await asyncio.wait_for(self._unregister(p2p), timeout=2.0)
        if self._requests:
            await asyncio.wait(self._requests, timeout=grace_s)
        for task in self._requests:
            task.cancel()
        if self._requests:
            await asyncio.wait(self._requests, timeout=1.0)
        if _is_connected(p2p):
            with contextlib.suppress(Exception):  # one more question to the daemon: it reads what comes before it
                await asyncio.wait_for(p2p._client.control.remove_unary_handler(RPC_INFO), timeout=1.0)
        await p2p.shutdown()

    async def _unregister(self, p2p: P2P) -> None:
        if self._issue_ticket is not None:
            await p2p._client.control.remove_unary_handler(RPC_TICKET)
        for handle in _RPC_OF_METHOD.values():
            await p2p._client.control.remove_unary_handler(handle)
            await p2p.remove_binary_stream_handler(handle + STREAM_SUFFIX)

    @contextlib.contextmanager
    def _request(self, of_peers: Counter[str], peer: str) -> Iterator[None]:
        """The running task serves a request of a peer."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        of_peers[peer] += 1
        try:
            yield
        finally:
            self._requests.discard(task)
            of_peers[peer] -= 1
            if not of_peers[peer]:
                del of_peers[peer]

    async def _info(self, peer: str, data: bytes, until_sent: contextlib.ExitStack) -> Any:
        request = Bounded(ExpertUID).FromString(data)
        return ExpertInfo(serialized_info=encode_info(self._service.describe(peer, _checked_uid(request.uid))))

    async def _ticket(self, peer: str, data: bytes, until_sent: contextlib.ExitStack) -> Any:
        assert self._issue_ticket is not None
        self._service.allow_ticket(peer)
        return ExpertResponse(metadata=encode_ticket(self._issue_ticket(peer)))

    # --- unary -------------------------------------------------------------------------------------------------------

    async def _serve_unary(self, call_id: uuid.UUID, request: Any) -> None:
        """Answer what the daemon has received whole.

        In place of hivemind's, which keeps the message until it is answered, and the answer where nobody counts it.
        """
        assert self._p2p is not None
        control = self._p2p._client.control
        peer, handle, data = PeerID(request.peer).to_base58(), request.proto, request.data
        del request
        with self._request(self._calls, peer), contextlib.ExitStack() as until_sent:
            try:
                if self._calls[peer] > MAX_CALLS_PER_PEER:
                    raise Overloaded(f"more than {MAX_CALLS_PER_PEER} calls at one time; try again later")
                if handle not in control.unary_handlers:
                    raise Unavailable("this is not served (any more)")
                answer = await control.unary_handlers[handle](peer, data, until_sent)
                response = p2pd_pb2.CallUnaryResponse(response=answer.SerializeToString())
                del answer
            except Exception as e:  # whatever it is, there is an answer; hivemind relays the repr
                if not isinstance(e, MoEError):
                    logger.exception("a call of ...%s could not be served", peer[-8:])
                response = p2pd_pb2.CallUnaryResponse(error=_as_repr(e).encode("utf-8", "replace"))
            del data
            sent = asyncio.get_running_loop().create_future()
            payload = p2pd_pb2.PersistentConnectionRequest(callId=call_id.bytes, unaryResponse=response)
            del response
            await control._pending_messages.put(_Outgoing(payload, sent))
            del payload
            await asyncio.wait({sent}, timeout=self._service.read_timeout_s)

    def _unary(self, method: str) -> Callable[[str, bytes, contextlib.ExitStack], Awaitable[Any]]:
        async def handle(peer: str, data: bytes, until_sent: contextlib.ExitStack) -> Any:
            dialect = _Dialect()
            try:
                return await self._answer_unary(method, peer, dialect, data, until_sent)
            except MoEError as e:
                if not dialect.native:
                    raise
                return dialect.refusal(e)[0]

        return handle

    async def _answer_unary(
        self, method: str, peer: str, dialect: _Dialect, data: bytes, until_sent: contextlib.ExitStack
    ) -> Any:
        inflight = self._service.inflight
        counted = inflight.reserve(peer, _COPIES * len(data), "message", must_fit=inflight.bytes > 0)
        try:
            request = Bounded(ExpertRequest).FromString(data)
        finally:
            counted.done_with("message")  # the tensors are counted by the admission from here on
        dialect.native = bool(request.metadata)
        header = decode_request_header(request.metadata)
        admission = self._service.open(peer, method, _checked_uid(request.uid), header)
        until_sent.callback(admission.release)
        encoded = _received(request, admission)
        del request
        admission.reservation.grow(_COPIES * len(data), must_fit=False)
        size_bytes = sum(len(tensor.buffer) for tensor in encoded)
        tensors = await _in_thread(size_bytes, _decode_all, encoded)
        del encoded
        admission.reservation.shrink((_COPIES - 1) * len(data))
        serving = admission.run(tensors)
        del tensors
        reply = await serving
        answer = await self._encode(reply)
        size_bytes = sum(len(tensor.buffer) for tensor in answer)
        if size_bytes > 2 * MAX_UNARY_BYTES - 2**16:
            raise ReplyTooLarge(f"{size_bytes} bytes are too large for a unary reply; use a stream")
        metadata = encode_header(reply.header or ReplyHeader()) if dialect.native else b""
        return ExpertResponse(tensors=[to_message(tensor) for tensor in answer], metadata=metadata)

    async def _encode(self, reply: Reply) -> list[EncodedTensor]:
        size_bytes = sum(tensor.nbytes for tensor in reply.tensors)
        encoded: list[EncodedTensor] = await _in_thread(size_bytes, _encode_all, reply.tensors, reply.codecs)
        return encoded

    # --- streamed ----------------------------------------------------------------------------------------------------

    def _stream(self, method: str) -> Callable[..., Awaitable[None]]:
        async def handle(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peer = info.peer_id.to_base58()
            writer.transport.set_write_buffer_limits(high=0)  # what has been drained has left: see _close
            try:
                with self._request(self._streams, peer):
                    if self._streams[peer] <= MAX_STREAMS_PER_PEER + _MAX_REFUSED_PER_PEER:
                        await self._serve_stream(method, peer, reader, writer)
            except OSError:
                logger.debug("a peer left in the middle of a stream", exc_info=True)
            finally:
                _close(writer)

        return handle

    async def _serve_stream(
        self, method: str, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        dialect = _Dialect()
        try:
            if self._streams[peer] > MAX_STREAMS_PER_PEER:
                raise Overloaded(f"more than {MAX_STREAMS_PER_PEER} streams at one time; try again later")
            self._make_room()
            await self._answer_stream(method, peer, dialect, reader, writer)
            if dialect.native:  # a stock caller waits for us to close
                await _linger(reader)
            return
        except MoEError as e:
            error: MoEError = e.with_traceback(None)  # which holds what has been received
        except OSError:
            raise
        except Exception as e:  # whatever it is, there is an answer
            logger.exception("a stream of ...%s could not be served", peer[-8:])
            error = ExpertFailed(f"the request could not be served: {type(e).__name__}")
        logger.debug("refused a stream of %s: %r", peer, error)
        if writer.transport.get_write_buffer_size():  # a part of an answer that is not taken
            return
        await within(_write(writer, *dialect.refusal(error)), self._service.read_timeout_s, "sending an error", peer)
        await _linger(reader)

    def _make_room(self) -> None:
        """Descriptors are for streams that want something: cut off the one that has been silent for longest.

        :raises Overloaded: all of them do
        """
        if self._streams.total() <= self._max_streams:
            return
        oldest = next(iter(self._unread), None)
        if oldest is None:
            raise Overloaded("too many streams at one time; try again later")
        del self._unread[oldest]
        oldest.cancel()

    async def _answer_stream(
        self,
        method: str,
        peer: str,
        dialect: _Dialect,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Receive a request, serve it, send the answer."""
        pace = _Pace(self._service.read_timeout_s)
        stream = _Reader(reader, ExpertRequest, pace, peer, must_end=True)
        first = await self._first_message(stream, pace, peer)
        dialect.native = bool(first.metadata)
        header = decode_request_header(first.metadata)
        admission = self._service.open(peer, method, _checked_uid(first.uid), header)
        try:
            pace.deadline = admission.deadline
            receiving = _receive(first, stream, admission)
            del first
            encoded = await pace.keep(receiving, _READING, peer)
            size_bytes = sum(len(tensor.buffer) for tensor in encoded)
            tensors = await _in_thread(size_bytes, _decode_all, encoded)
            del encoded
            serving = admission.run(tensors)
            del tensors
            reply = await _unless_closed(serving, reader)
            metadata = encode_header(reply.header or ReplyHeader()) if dialect.native else b""
            encoded = await self._encode(reply)
            del reply
            largest = max((len(tensor.buffer) for tensor in encoded), default=0)
            admission.reservation.grow(2 * min(largest, CHUNK_BYTES), must_fit=False)  # a message, and its bytes
            pace.begin()
            pace.deadline = admission.deadline + self._service.read_timeout_s
            sending = _send_reply(writer, encoded, metadata, pace)
            del encoded
            await pace.keep(sending, "sending a reply", peer)
        finally:
            admission.release()

    async def _first_message(self, stream: _Reader, pace: _Pace, peer: str) -> Any:
        """What a stream wants. Nobody has been asked yet whether the peer may."""
        inflight, task = self._service.inflight, asyncio.current_task()
        assert task is not None
        counted = inflight.reserve(peer, 0, "message")
        pace.deadline = time.monotonic() + _FIRST_MESSAGE_TIMEOUTS * self._service.read_timeout_s
        self._unread[task] = None
        try:
            reading = stream.next(lambda size_bytes: counted.grow(size_bytes, must_fit=inflight.bytes > 0))
            first = await pace.keep(reading, _READING, peer)
        finally:
            self._unread.pop(task, None)
            counted.done_with("message")  # the tensors are counted by the admission from here on
        if first is None:
            raise ProtocolError("an empty stream: expected at least one message with the expert's uid")
        return first


async def _receive(first: Any, stream: _Reader, admission: Admission) -> list[EncodedTensor]:
    """The tensors of a request."""
    uid, assembler = first.uid, TensorAssembler(admission)
    assembler.feed_all(first.tensors)
    del first
    besides = 0  # of a message that is being received, what is not admitted yet

    def count(size_bytes: int) -> None:
        nonlocal besides
        besides = max(0, size_bytes - assembler.missing_bytes - _ENVELOPE_BYTES)
        admission.reservation.grow(besides, must_fit=not admission.reservation.is_all)

    while (request := await stream.next(count)) is not None:
        if request.uid != uid:
            raise ProtocolError(f"Expert uids differ in one request: {uid[:100]!r} and {request.uid[:100]!r}")
        if not request.tensors:
            raise ProtocolError("a message with nothing in it")
        admission.reservation.shrink(besides)
        besides = 0
        assembler.feed_all(request.tensors)
        del request
    return assembler.finish()


async def _send_reply(writer: asyncio.StreamWriter, encoded: list[EncodedTensor], metadata: bytes, pace: _Pace) -> None:
    for response in stream_responses(encoded, metadata):
        await _write(writer, response, pace=pace)
    if metadata:  # a stock caller takes this for an error
        await _write(writer, RPCError(), _END)


class _Outgoing:
    """A message in the queue to the daemon, which tells when it is taken from there."""

    def __init__(self, message: Any, taken: asyncio.Future[None]):
        self._message, self._taken = message, taken

    def ByteSize(self) -> int:
        """As of a protobuf message."""
        size_bytes: int = self._message.ByteSize()
        return size_bytes

    def SerializeToString(self) -> bytes:
        """As of a protobuf message."""
        if not self._taken.done():
            self._taken.set_result(None)
        data: bytes = self._message.SerializeToString()
        return data


class _HandlerTasks(dict[uuid.UUID, "asyncio.Task[None]"]):
    """hivemind's tasks of unary requests, each of which it forgets when it is over. (hivemind's own keeps the cancelled.)"""

    def __setitem__(self, call_id: uuid.UUID, task: asyncio.Task[None]) -> None:
        super().__setitem__(call_id, task)
        task.add_done_callback(lambda _: self.pop(call_id, None))


def _as_repr(error: Exception) -> str:
    message = error.message if isinstance(error, MoEError) else str(error)
    return f"{type(error).__name__}({message[:MAX_ERROR_CHARS]!r})"


class _Dialect:
    """How to answer on a stream: as a native caller reads it, until one is known to be a stock peer."""

    def __init__(self) -> None:
        self.native = True

    def refusal(self, error: MoEError) -> tuple[Any, bytes]:
        """Message and marker of an error."""
        if self.native:
            wire = WireError.from_exception(error)
            return ExpertResponse(metadata=encode_header(ReplyHeader(error=wire))), _MESSAGE
        return RPCError(message=_as_repr(error)), _END


async def _linger(reader: asyncio.StreamReader) -> None:
    """Read on, for nothing, until the caller closes: libp2p's daemon resets a stream whose receiving end closes last, and
    what is on its way is lost (measured: 3 of 240 replies of 1 to 8 MiB, eight at a time)."""

    async def discard() -> None:
        while await reader.read(_SMALL_BYTES):
            pass

    with contextlib.suppress(CallTimeout):
        await within(discard(), _LINGER_S, "waiting for the caller to close")


async def _unless_closed(serving: Any, reader: asyncio.StreamReader) -> Reply:
    """Serve a request, but withdraw it when its caller closes the stream."""
    task = asyncio.ensure_future(serving)
    closed = asyncio.ensure_future(reader.read(1))
    try:
        await asyncio.wait((task, closed), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise PeerGone("the caller has gone")
        reply: Reply = await task
        return reply
    finally:
        for future in (task, closed):
            future.cancel()
        await asyncio.gather(task, closed, return_exceptions=True)


def _checked_uid(uid: str) -> str:
    if len(uid) > 64 * MAX_UID_LENGTH:
        raise ProtocolError(f"a uid of {len(uid)} characters")
    return uid
