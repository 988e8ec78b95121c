"""What comes out of a libp2p stream, byte by byte: messages, ends, errors, and bytes that are none of these. No daemon."""

from __future__ import annotations

import asyncio
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
from moe.transport import libp2p
from moe.wire.hivemind_dialect import MAX_MESSAGE_BYTES


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
