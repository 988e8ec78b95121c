"""What comes out of a libp2p stream, byte by byte: messages, ends, errors, and bytes that are none of these. No daemon."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.proto.runtime_pb2 import ExpertRequest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.errors import (
    CallTimeout,
    ConnectError,
    ExpertFailed,
    ExpertNotFound,
    MoEError,
    Overloaded,
    PeerGone,
    ProtocolError,
    RemoteSchemaError,
    SchemaError,
    TransportError,
    Unavailable,
)
from moe.schema import Compression
from moe.transport import libp2p
from moe.transport.inflight import InflightBytes
from moe.wire.hivemind_dialect import MAX_MESSAGE_BYTES
from moe.wire.messages import MAX_ERROR_CHARS


def frame(data: bytes, marker: int = 0, length: int | None = None) -> bytes:
    return bytes([marker]) + (len(data) if length is None else length).to_bytes(8, "big") + data


def request(uid: str) -> bytes:
    return frame(ExpertRequest(uid=uid).SerializeToString())


END = frame(RPCError().SerializeToString(), marker=1)


def read(data: bytes, *, must_end: bool = False, timeout_s: float | None = 5.0, eof: bool = True) -> list[str]:
    """Uids of the messages in these bytes."""

    async def collect() -> list[str]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        if eof:
            reader.feed_eof()
        messages = libp2p._Reader(reader, timeout_s, "peer", must_end=must_end).messages(ExpertRequest)
        return [message.uid async for message in messages]

    return asyncio.run(collect())


def test_messages_until_the_end() -> None:
    assert read(request("a") + request("b") + END, must_end=True) == ["a", "b"]
    assert read(request("a")) == ["a"]  # how a server ends a stream
    assert read(b"") == []


@pytest.mark.parametrize("cut", [1, 5, 9, 11])
@pytest.mark.parametrize("must_end", [False, True])
def test_a_stream_cut_off_inside_a_message_is_a_broken_connection(cut: int, must_end: bool) -> None:
    with pytest.raises(PeerGone, match="cut off"):
        read(request("a") + request("b")[:cut], must_end=must_end)


def test_a_request_without_an_end_is_not_whole() -> None:
    with pytest.raises(PeerGone, match="ended before the request did"):
        read(request("a"), must_end=True)


def test_silence_has_a_limit() -> None:
    with pytest.raises(CallTimeout, match="reading a stream"):
        read(request("a") + request("b")[:7], timeout_s=0.05, eof=False)


@pytest.mark.parametrize(
    "data, problem",
    [
        (frame(b"", length=MAX_MESSAGE_BYTES + 1), "at most"),
        (frame(b"", length=2**63), "at most"),
        (frame(b"", marker=7), "marker b'\\\\x07'"),
        (frame(b"\xff\xff\xff"), "malformed message"),
        (frame(b"\xff\xff\xff", marker=1), "malformed message"),
    ],
)
def test_bytes_that_are_no_message_are_refused_before_memory_is_taken(data: bytes, problem: str) -> None:
    with pytest.raises(ProtocolError, match=problem):
        read(data)


def test_an_error_at_the_end_is_raised() -> None:
    end = frame(RPCError(message="SchemaError('args[0]: no')").SerializeToString(), marker=1)
    with pytest.raises(RemoteSchemaError, match=r"args\[0\]: no"):
        read(request("a") + end)


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=40), st.booleans())
def test_any_bytes_are_messages_or_a_typed_error(data: bytes, must_end: bool) -> None:
    try:
        read(data, must_end=must_end)
        read(request("a") + data, must_end=must_end)
    except MoEError:
        return


@pytest.mark.parametrize(
    "text, kind, message",
    [
        ("SchemaError('args[0]: expected a, got b')", RemoteSchemaError, "args[0]: expected a, got b"),
        ('Overloaded("it\'s full")', Overloaded, "it's full"),
        ("Failed to call handler `x` at y: Overloaded('full')", Overloaded, "full"),
        ("KeyError('ffn.0')", ExpertNotFound, "no expert ffn.0"),
        ("RuntimeError('mat1 (2x3) and mat2')", ExpertFailed, "RuntimeError('mat1 (2x3) and mat2')"),
        ("something else", ExpertFailed, "something else"),
        ("", ExpertFailed, ""),
        ("SchemaError('two\nlines')", RemoteSchemaError, "two lines"),
    ],
)
def test_errors_that_a_stock_handler_relays_as_text(text: str, kind: type[MoEError], message: str) -> None:
    error = libp2p._relayed_error(text, "peer", "ffn.0")
    assert type(error) is kind
    assert (error.message, error.peer, error.uid) == (message, "peer", "ffn.0")


@pytest.mark.parametrize(
    "error, kind",
    [
        (P2PHandlerError("Failed to call handler `h` at p: Overloaded('full')"), Overloaded),
        (ControlFailure("Connect failed. msg=routing: not found"), ConnectError),
        (P2PDaemonError("failed to dial: all dials failed"), ConnectError),
        (ControlFailure("protocol ConnectionHandler.rpc_forward not supported"), Unavailable),
        (P2PDaemonError("no idea"), TransportError),
        (ConnectionResetError("reset"), PeerGone),
        (asyncio.IncompleteReadError(b"", 8), PeerGone),
        (SchemaError("own"), SchemaError),
    ],
    ids=repr,
)
def test_what_libp2p_says_is_told_as_our_errors(error: Exception, kind: type[MoEError]) -> None:
    with pytest.raises(MoEError) as caught, libp2p._translated("peer", "ffn.0"):
        raise error
    assert type(caught.value) is kind
    assert (caught.value.peer, caught.value.uid) == ("peer", "ffn.0")


def test_a_foreign_error_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), libp2p._translated("peer", "ffn.0"):
        _ = 1 / 0


def test_uids_are_bounded() -> None:
    assert libp2p._checked_uid("ffn.0") == "ffn.0"
    with pytest.raises(ProtocolError, match="a uid of"):
        libp2p._checked_uid("x" * 2**20)


def test_all_messages_of_a_request_name_the_same_expert() -> None:
    class Anything:
        def feed(self, part: Any) -> None: ...

    async def receive() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(request("b") + END)
        requests = libp2p._Reader(reader, 5.0, "peer").messages(ExpertRequest)
        await libp2p._receive(ExpertRequest(uid="a"), requests, Anything())  # type: ignore[arg-type]

    with pytest.raises(ProtocolError, match="uids differ"):
        asyncio.run(receive())


@pytest.mark.parametrize(
    "text", ["a(: " * 50_000, ": " * 2_000_000, "a" * 4_000_000, "(" * 4_000_000, "a: " * 1_000_000]
)
def test_reading_an_error_takes_no_longer_the_longer_it_is(text: str) -> None:
    begin = time.process_time()
    error = libp2p._relayed_error(text, "peer")
    assert time.process_time() - begin < 1.0, "200 KB took 18 s with the interpreter's lock held"
    assert len(error.message) <= MAX_ERROR_CHARS


def test_what_a_client_says_at_the_end_is_not_looked_into() -> None:
    end = frame(RPCError(message="SchemaError('of yours')").SerializeToString(), marker=1)
    with pytest.raises(PeerGone, match="ended the request with an error"):
        read(request("a") + end, must_end=True)
    with pytest.raises(ProtocolError, match="at most"):
        read(frame(b"", marker=1, length=2**20), must_end=True)


def test_the_memory_of_a_message_is_reserved_before_it_is_read() -> None:
    async def receive(data: bytes) -> list[int]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        counted = inflight.reserve("peer", 0, "message")
        try:
            messages = libp2p._Reader(reader, 5.0, "peer", must_end=True, counted=counted).messages(ExpertRequest)
            return [inflight.bytes async for _ in messages]
        finally:
            counted.done_with("message")

    inflight = InflightBytes(1000, 1000)
    assert asyncio.run(receive(request("a" * 100) + request("b") + END)) == [3 * 102, 3 * 102]
    with pytest.raises(Overloaded):
        asyncio.run(receive(request("a" * 400)))
    with pytest.raises(Overloaded):
        asyncio.run(receive(frame(b"", length=400)))  # before a byte of it has come
    assert inflight.bytes == 0


def test_many_small_messages_do_not_put_off_the_deadline() -> None:
    async def trickle() -> None:
        reader = asyncio.StreamReader()
        stream = libp2p._Reader(reader, 5.0, "peer", must_end=True)
        stream.deadline = time.monotonic() + 0.3

        async def feed() -> None:
            while True:
                reader.feed_data(request("a"))
                await asyncio.sleep(0.02)

        feeding = asyncio.ensure_future(feed())
        try:
            async for _ in stream.messages(ExpertRequest):
                pass
        finally:
            feeding.cancel()

    begin = time.monotonic()
    with pytest.raises(CallTimeout):
        asyncio.run(trickle())
    assert time.monotonic() - begin < 4.0


def test_a_message_with_nothing_in_it_ends_a_request() -> None:
    class Anything:
        def feed(self, part: Any) -> None: ...

    async def receive() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(request("a") + END)
        requests = libp2p._Reader(reader, 5.0, "peer").messages(ExpertRequest)
        await libp2p._receive(ExpertRequest(uid="a"), requests, Anything())  # type: ignore[arg-type]

    with pytest.raises(ProtocolError, match="nothing in it"):
        asyncio.run(receive())


def test_a_reply_is_bounded_in_all_and_not_by_tensor() -> None:
    gate = libp2p._ReplyGate(1000)
    assert gate.admit(0, (100,), "float32", Compression.NONE) == 400
    assert gate.admit(1, (100,), "float32", Compression.NONE) == 400
    with pytest.raises(ProtocolError, match="much larger"):
        gate.admit(2, (100,), "float32", Compression.NONE)
    with pytest.raises(ProtocolError, match="much larger"):  # what it becomes when decoded counts, too
        libp2p._ReplyGate(10_000).admit(0, (2000,), "float64", Compression.FLOAT16)
    with pytest.raises(ProtocolError, match="float33"):
        libp2p._ReplyGate(1000).admit(0, (1,), "float33", Compression.NONE)
