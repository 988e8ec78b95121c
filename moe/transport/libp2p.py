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
import os
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from hivemind.p2p import P2P, P2PContext, P2PDaemonError, P2PHandlerError, PeerID
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure, raise_if_failed, read_pbmsg_safe, write_pbmsg
from hivemind.proto import p2pd_pb2
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.utils.multiaddr import Multiaddr

from moe.errors import (
    ConnectError,
    ExpertFailed,
    MoEError,
    PeerGone,
    ProtocolError,
    ReplyTooLarge,
    TransportError,
    Unavailable,
    error_from_wire,
)
from moe.expert_uid import MAX_UID_LENGTH, PeerIDLike
from moe.schema import Compression
from moe.transport.base import FORWARD, Call, ExpertService, Reply, within
from moe.transport.tickets import Ticket, decode_ticket, encode_ticket
from moe.wire.hivemind_dialect import (
    MAX_MESSAGE_BYTES,
    MAX_UNARY_BYTES,
    RPC_BACKWARD,
    RPC_FORWARD,
    RPC_INFO,
    RPC_TICKET,
    STREAM_SUFFIX,
    ExpertInfo,
    ExpertRequest,
    ExpertResponse,
    ExpertUID,
    TensorAssembler,
    decode_info,
    encode_info,
    from_message,
    stream_requests,
    stream_responses,
    to_message,
)
from moe.wire.messages import (
    ExpertDescription,
    ReplyHeader,
    WireError,
    decode_reply_header,
    decode_request_header,
    encode_header,
)
from moe.wire.tensors import EncodedTensor, decode_tensor, encode_tensor

logger = logging.getLogger(__name__)

_RPC_OF_METHOD = {FORWARD: RPC_FORWARD, "backward": RPC_BACKWARD}
_MESSAGE, _END = b"\x00", b"\x01"
_LENGTH_BYTES = 8
_LINGER_S = 2.0  # for a caller to read the last of a reply; ours
_SMALL_BYTES = 64 * 1024  # tensors up to this are (de)coded in the event loop; ours, about 10 us
_STREAM_BACKLOG = 4096  # Linux allows no more unless told so
_HANDLER_ERROR = re.compile(r"^(?:.*?: )?(\w+)\((.*)\)$", re.DOTALL)  # repr of an exception, as unary calls relay it
_NOT_REACHED = ("failed to find any peer", "failed to dial", "no addresses", "routing: not found", "no good addresses")


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


class _Reader:
    """Reads stream messages of bounded length, each within a deadline."""

    def __init__(self, reader: asyncio.StreamReader, timeout_s: float | None, peer: str, must_end: bool = False):
        self._reader, self._timeout_s, self._peer, self._must_end = reader, timeout_s, peer, must_end

    async def messages(self, message_type: Any) -> AsyncIterator[Any]:
        """Messages until the end of the stream.

        :raises RemoteError: the peer ended the stream with an error
        :raises PeerGone: the connection broke
        :raises CallTimeout: nothing came for too long
        """
        while True:
            try:
                marker, data = await within(self._read_one(), self._timeout_s, "reading a stream", self._peer)
            except MoEError:  # before the next line: a CallTimeout is an OSError
                raise
            except (asyncio.IncompleteReadError, OSError):
                raise PeerGone("the stream was cut off", peer=self._peer) from None
            if not marker and not self._must_end:
                return  # how a server ends a stream
            if not marker:
                raise PeerGone("the stream ended before the request did", peer=self._peer)
            message = message_type() if marker == _MESSAGE else RPCError()
            try:
                message.ParseFromString(data)
            except Exception as e:  # protobuf's DecodeError lives in different places in different versions
                raise ProtocolError(f"malformed message: {e}", peer=self._peer) from None
            if marker == _END:
                if message.message:
                    raise _relayed_error(message.message, self._peer)
                return
            yield message

    async def _read_one(self) -> tuple[bytes, bytes]:
        """Marker and message; no marker at the end of the stream."""
        marker = await self._reader.read(1)
        if not marker:
            return marker, b""
        length = int.from_bytes(await self._reader.readexactly(_LENGTH_BYTES), "big")
        if marker not in (_MESSAGE, _END) or length > MAX_MESSAGE_BYTES:
            raise ProtocolError(
                f"a stream message of {length} bytes (marker {marker!r}); at most {MAX_MESSAGE_BYTES} are allowed",
                peer=self._peer,
            )
        return marker, await self._reader.readexactly(length)


def _write(writer: asyncio.StreamWriter, message: Any, marker: bytes = _MESSAGE) -> None:
    data = message.SerializeToString()
    writer.write(marker + len(data).to_bytes(_LENGTH_BYTES, "big"))
    writer.write(data)


def _relayed_error(text: str, peer: str, uid: str | None = None) -> MoEError:
    """The error a handler raised over there, from the text by which hivemind relays it."""
    matched = _HANDLER_ERROR.match(text)
    if matched is not None:
        name, message = matched[1], matched[2].strip("'\"")
        for cls in _error_classes(MoEError):
            if cls.__name__ == name:
                return cls(message, peer=peer, uid=uid)
        if name == "KeyError":  # stock hivemind, asked for an expert it does not have
            return error_from_wire("not_found", f"no expert {message}", peer=peer, uid=uid)
    return ExpertFailed(text, peer=peer, uid=uid)


def _error_classes(cls: type[MoEError]) -> Iterable[type[MoEError]]:
    for child in cls.__subclasses__():
        yield child
        yield from _error_classes(child)


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
            p2p = await within(self._connected(), timeout_s, "connecting to libp2p", name)
            call = p2p.call_protobuf_handler(_peer_id(peer), RPC_INFO, ExpertUID(uid=uid), ExpertInfo)
            answer = await within(call, timeout_s, f"rpc_info of {uid}", name)
        return decode_info(answer.serialized_info)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        name = peer.to_base58()
        return await within(self._call(_peer_id(peer), name, call), timeout_s, f"{call.method} of {call.uid}", name)

    async def ticket(self, peer: PeerIDLike, *, timeout_s: float | None) -> Ticket:
        """A ticket for a direct link to this peer.

        :raises MoEError: the peer has none to give
        """
        name = peer.to_base58()
        with _translated(name, ""):
            p2p = await within(self._connected(), timeout_s, "connecting to libp2p", name)
            call = p2p.call_protobuf_handler(_peer_id(peer), RPC_TICKET, ExpertUID(), ExpertResponse)
            answer = await within(call, timeout_s, "asking for a direct link", name)
        return decode_ticket(answer.metadata)

    async def close(self) -> None:
        """Close the connection to the daemon; the daemon itself belongs to the DHT."""
        if self._p2p is not None:
            await self._p2p.shutdown()
            self._p2p = None

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
    response = await p2p.call_protobuf_handler(peer_id, _RPC_OF_METHOD[call.method], request, ExpertResponse)
    header = _checked_header(response.metadata, name, call.uid)
    return header, [from_message(message) for message in response.tensors]


async def _stream_call(
    p2p: P2P, peer_id: PeerID, name: str, call: Call, requests: Iterable[Any]
) -> tuple[ReplyHeader | None, list[EncodedTensor]]:
    handle = _RPC_OF_METHOD[call.method] + STREAM_SUFFIX
    reader, writer = await _open_stream(p2p, peer_id, handle)
    header: ReplyHeader | None = None
    assembler = TensorAssembler(_ReplyGate(4 * call.reply_bytes + 2**26))
    sending = asyncio.create_task(_send_all(writer, requests))
    try:
        first = True
        async for response in _Reader(reader, None, name).messages(ExpertResponse):
            if first:
                header, first = _checked_header(response.metadata, name, call.uid), False
            for part in response.tensors:
                assembler.feed(part)
        if first:
            raise PeerGone("the stream ended without an answer", peer=name, uid=call.uid)
        return header, assembler.finish()
    finally:
        sending.cancel()
        with contextlib.suppress(asyncio.CancelledError, OSError):
            await sending
        writer.close()  # tells the server that nobody waits any more, if it is not done


async def _send_all(writer: asyncio.StreamWriter, requests: Iterable[Any]) -> None:
    for request in requests:
        _write(writer, request)
        await writer.drain()
    _write(writer, RPCError(), _END)
    await writer.drain()


class _ReplyGate:
    """Bounds what a reply may take in all; what it should look like is checked by the caller, who knows the schema."""

    def __init__(self, max_bytes: int):
        self._left = max_bytes

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        return self._left


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
        text = str(e)
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
        self._requests: set[asyncio.Task[Any]] = set()

    async def start(self) -> None:
        """Register the handlers. Requests may arrive before this returns."""
        self._p2p = p2p = await _connect(self._daemon_maddr)
        p2p._listen_task = asyncio.create_task(_listen(p2p))
        await p2p.add_protobuf_handler(RPC_INFO, self._info, ExpertUID, balanced=True)
        if self._issue_ticket is not None:
            await p2p.add_protobuf_handler(RPC_TICKET, self._ticket, ExpertUID, balanced=True)
        for method, handle in _RPC_OF_METHOD.items():
            await p2p.add_protobuf_handler(handle, self._unary(method), ExpertRequest, balanced=True)
            await p2p.add_binary_stream_handler(handle + STREAM_SUFFIX, self._stream(method), balanced=True)

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
                await asyncio.wait_for(p2p.remove_protobuf_handler(RPC_INFO), timeout=1.0)
        await p2p.shutdown()

    async def _unregister(self, p2p: P2P) -> None:
        if self._issue_ticket is not None:
            await p2p.remove_protobuf_handler(RPC_TICKET)
        for handle in _RPC_OF_METHOD.values():
            await p2p.remove_protobuf_handler(handle)
            await p2p.remove_binary_stream_handler(handle + STREAM_SUFFIX)

    @contextlib.contextmanager
    def _request(self) -> Iterator[None]:
        """The running task serves a request."""
        task = asyncio.current_task()
        assert task is not None
        self._requests.add(task)
        try:
            yield
        finally:
            self._requests.discard(task)

    def _forget_cancelled(self) -> None:
        """hivemind keeps the tasks of unary requests whose callers gave up, for ever."""
        tasks = self._p2p._client.control._handler_tasks if self._p2p is not None else {}
        if len(tasks) > 2 * len(self._requests) + 64:
            for call_id in [call_id for call_id, task in tasks.items() if task.done()]:
                del tasks[call_id]

    async def _info(self, request: Any, context: P2PContext) -> Any:
        return ExpertInfo(serialized_info=encode_info(self._service.describe(request.uid)))

    async def _ticket(self, request: Any, context: P2PContext) -> Any:
        assert self._issue_ticket is not None
        return ExpertResponse(metadata=encode_ticket(self._issue_ticket(context.remote_id.to_base58())))

    # --- unary -------------------------------------------------------------------------------------------------------

    def _unary(self, method: str) -> Callable[[Any, P2PContext], Awaitable[Any]]:
        async def handle(request: Any, context: P2PContext) -> Any:
            native = bool(request.metadata)
            self._forget_cancelled()
            with self._request():
                try:
                    reply = await self._serve_unary(method, request, context.remote_id.to_base58())
                    tensors = await self._encode(reply)
                    size_bytes = sum(len(tensor.buffer) for tensor in tensors)
                    if size_bytes > 2 * MAX_UNARY_BYTES - 2**16:
                        raise ReplyTooLarge(f"{size_bytes} bytes are too large for a unary reply; use a stream")
                    metadata = encode_header(reply.header or ReplyHeader()) if native else b""
                    return ExpertResponse(tensors=[to_message(tensor) for tensor in tensors], metadata=metadata)
                except MoEError as e:
                    if not native:
                        raise  # hivemind relays the repr
                    return ExpertResponse(metadata=encode_header(ReplyHeader(error=WireError.from_exception(e))))

        return handle

    async def _serve_unary(self, method: str, request: Any, peer: str) -> Reply:
        header = decode_request_header(request.metadata)
        admission = self._service.open(peer, method, _checked_uid(request.uid), header)
        try:
            encoded = []
            for index, message in enumerate(request.tensors):  # one by one: refused before the next is looked at
                tensor = from_message(message)
                limit = admission.admit(index, tensor.shape, tensor.dtype, tensor.codec)
                if len(tensor.buffer) > limit:
                    raise ProtocolError(f"tensor {index} has {len(tensor.buffer)} bytes, its shape allows {limit}")
                encoded.append(tensor)
            size_bytes = sum(len(tensor.buffer) for tensor in encoded)
            return await admission.run(await _in_thread(size_bytes, _decode_all, encoded))
        finally:
            admission.release()

    async def _encode(self, reply: Reply) -> list[EncodedTensor]:
        size_bytes = sum(tensor.nbytes for tensor in reply.tensors)
        encoded: list[EncodedTensor] = await _in_thread(size_bytes, _encode_all, reply.tensors, reply.codecs)
        return encoded

    # --- streamed ----------------------------------------------------------------------------------------------------

    def _stream(self, method: str) -> Callable[..., Awaitable[None]]:
        async def handle(info: Any, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            try:
                with self._request():
                    await self._serve_stream(method, info.peer_id.to_base58(), reader, writer)
            except OSError:
                logger.debug("a peer left in the middle of a stream", exc_info=True)
            finally:
                writer.close()

        return handle

    async def _serve_stream(
        self, method: str, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        native = True
        try:
            requests = _Reader(reader, self._service.read_timeout_s, peer, must_end=True).messages(ExpertRequest)
            first = await anext(requests, None)
            if first is None:
                raise ProtocolError("an empty stream: expected at least one message with the expert's uid")
            native = bool(first.metadata)
            header = decode_request_header(first.metadata)
            admission = self._service.open(peer, method, _checked_uid(first.uid), header)
            try:
                assembler = TensorAssembler(admission)
                await _receive(first, requests, assembler)
                encoded = assembler.finish()
                size_bytes = sum(len(tensor.buffer) for tensor in encoded)
                tensors = await _in_thread(size_bytes, _decode_all, encoded)
                reply = await _unless_closed(admission.run(tensors), reader)
                encoded = await self._encode(reply)
                metadata = encode_header(reply.header or ReplyHeader()) if native else b""
                for response in stream_responses(encoded, metadata):
                    _write(writer, response)
                    await within(writer.drain(), self._service.read_timeout_s, "sending a reply", peer)
            finally:
                admission.release()
            if native:  # a stock caller takes this for an error, and waits for us to close
                _write(writer, RPCError(), _END)
                await _linger(reader)
        except MoEError as e:
            logger.debug("refused a stream of %s: %r", peer, e)
            if native:
                _write(writer, ExpertResponse(metadata=encode_header(ReplyHeader(error=WireError.from_exception(e)))))
            else:
                _write(writer, RPCError(message=f"{type(e).__name__}({e.message!r})"), _END)
            await within(writer.drain(), self._service.read_timeout_s, "sending an error", peer)
            await _linger(reader)


async def _receive(first: Any, requests: AsyncIterator[Any], assembler: TensorAssembler) -> None:
    for part in first.tensors:
        assembler.feed(part)
    async for request in requests:
        if request.uid != first.uid:
            raise ProtocolError(f"Expert uids differ in one request: {first.uid!r} and {request.uid!r}")
        for part in request.tensors:
            assembler.feed(part)


async def _linger(reader: asyncio.StreamReader) -> None:
    """Read on, for nothing, until the caller closes: libp2p's daemon resets a stream whose receiving end closes last, and
    what is on its way is lost (measured: 3 of 240 replies of 1 to 8 MiB, eight at a time)."""

    async def discard() -> None:
        while await reader.read(_SMALL_BYTES):
            pass

    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(discard(), _LINGER_S)


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
