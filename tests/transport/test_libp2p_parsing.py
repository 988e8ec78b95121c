"""What comes out of a libp2p stream, byte by byte: messages, ends, errors, and bytes that are none of these. No daemon."""

from __future__ import annotations

import asyncio
import math
import socket
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto.p2pd_pb2 import RPCError
from hivemind.proto.runtime_pb2 import ExpertRequest, ExpertResponse, Tensor
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
from moe.wire import hivemind_dialect
from moe.wire.hivemind_dialect import MAX_MESSAGE_BYTES
from moe.wire.messages import MAX_ERROR_CHARS
from tests.docs.markdown import ROOT, table_of


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
        pace = libp2p._Pace(timeout_s)
        stream = libp2p._Reader(reader, ExpertRequest, pace, "peer", must_end=must_end)
        uids = []
        while (message := await pace.keep(stream.next(), "reading a stream", "peer")) is not None:
            uids.append(message.uid)
        return uids

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


class Admitted:
    """An admission of whatever comes: ``size_bytes`` of each tensor."""

    def __init__(self, inflight: InflightBytes, size_bytes: int = 2**20):
        self.reservation, self._size_bytes = inflight.reserve("peer", 0, "request"), size_bytes

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        self.reservation.grow(self._size_bytes)
        return self._size_bytes


def receive(first: Any, data: bytes, admission: Any) -> list[Any]:
    """The tensors of a request whose first message is here, and the others are ``data``."""

    async def run() -> list[Any]:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        stream = libp2p._Reader(reader, ExpertRequest, libp2p._Pace(5.0), "peer", must_end=True)
        return await libp2p._receive(first, stream, admission)

    return asyncio.run(run())


def part(data: bytes, size: int = 0) -> Any:
    """A message with a part of a tensor; with ``size`` its first one."""
    tensor = Tensor(buffer=data, size=[size], dtype="uint8") if size else Tensor(buffer=data)
    return ExpertRequest(uid="a", tensors=[tensor])


def framed(*messages: Any) -> bytes:
    return b"".join(frame(message.SerializeToString()) for message in messages)


def test_all_messages_of_a_request_name_the_same_expert() -> None:
    with pytest.raises(ProtocolError, match="uids differ"):
        receive(ExpertRequest(uid="a"), request("b") + END, Admitted(InflightBytes(2**20, 2**20)))


def test_a_message_with_nothing_in_it_ends_a_request() -> None:
    with pytest.raises(ProtocolError, match="nothing in it"):
        receive(ExpertRequest(uid="a"), request("a") + END, Admitted(InflightBytes(2**20, 2**20)))


def test_a_tensor_in_tiny_parts_is_refused() -> None:
    admission = Admitted(InflightBytes(2**20, 2**20), 5000)
    whole = bytes(range(250)) * 20
    parts = [part(whole[begin : begin + 1500]) for begin in range(1500, 5000, 1500)]  # the last one is short
    (tensor,) = receive(part(whole[:1500], size=5000), framed(*parts) + END, admission)
    assert bytes(tensor.buffer) == whole
    with pytest.raises(ProtocolError, match="fewer than"):
        receive(
            part(b"1", size=5000), framed(part(b"2"), part(b"3")) + END, Admitted(InflightBytes(2**20, 2**20), 5000)
        )


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


def test_the_size_of_a_message_is_told_before_a_byte_of_it_has_come() -> None:
    async def read_first(data: bytes) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        counted = inflight.reserve("peer", 0, "message")
        try:
            await libp2p._Reader(reader, ExpertRequest, libp2p._Pace(5.0), "peer").next(counted.grow)
            assert inflight.bytes == len(data) - 9
        finally:
            counted.done_with("message")

    inflight = InflightBytes(1000, 1000)
    asyncio.run(read_first(request("a" * 400)))
    with pytest.raises(Overloaded):
        asyncio.run(read_first(frame(b"", length=1001)))
    assert inflight.bytes == 0


def test_what_a_message_has_besides_admitted_tensors_is_counted_while_it_comes() -> None:
    """A request as large as may be in flight is received; a message that lies about what it has to bring is not."""
    inflight, mib = InflightBytes(4 * 2**20, 4 * 2**20), 2**20
    other = inflight.reserve("other", 2 * mib, "request")
    admission = Admitted(inflight)
    first, second = part(bytes(mib), size=mib), part(bytes(mib), size=mib)
    assert len(receive(first, framed(second) + END, admission)) == 2
    assert inflight.bytes == 4 * mib
    admission.reservation.done_with("request")

    admission = Admitted(inflight)
    with pytest.raises(Overloaded):  # not: "more than its declared shape allows", for which it would be read
        receive(first, framed(part(bytes(4 * mib))) + END, admission)
    admission.reservation.done_with("request")
    other.done_with("request")
    inflight.check()
    assert inflight.bytes == 0


class Paced:
    """A stream into which ``data`` is fed over and over."""

    def __init__(self, data: bytes, every_s: float):
        self._data, self._every_s = data, every_s
        self.reader = asyncio.StreamReader()

    async def __aenter__(self) -> asyncio.StreamReader:
        async def feed() -> None:
            while True:
                self.reader.feed_data(self._data)
                await asyncio.sleep(self._every_s)

        self._feeding = asyncio.ensure_future(feed())
        return self.reader

    async def __aexit__(self, *exc: object) -> None:
        self._feeding.cancel()


@pytest.mark.parametrize("data", [request("a"), b"\x00"])
@pytest.mark.parametrize("deadline_s", [0.5, math.inf])
def test_small_messages_and_single_bytes_put_nothing_off(data: bytes, deadline_s: float) -> None:
    async def trickle() -> None:
        pace = libp2p._Pace(0.5 if deadline_s == math.inf else 60.0)
        pace.deadline = time.monotonic() + deadline_s
        async with Paced(data, 0.02) as reader:
            reader.feed_data(b"" if data != b"\x00" else frame(b"", length=2**20))
            stream = libp2p._Reader(reader, ExpertRequest, pace, "peer", must_end=True)

            async def read_on() -> None:
                while await stream.next() is not None:
                    pass

            await pace.keep(read_on(), "reading a stream", "peer")

    begin = time.monotonic()
    with pytest.raises(CallTimeout, match="too slow" if deadline_s == math.inf else "time is over"):
        asyncio.run(trickle())
    assert 0.4 < time.monotonic() - begin < 5.0


def test_who_is_fast_enough_may_take_longer_than_a_silence() -> None:
    async def steady() -> None:
        pace = libp2p._Pace(0.6)
        async with Paced(bytes(libp2p.MIN_PACE_BYTES), 0.05) as reader:
            reader.feed_data(frame(b"", length=24 * libp2p.MIN_PACE_BYTES))
            stream = libp2p._Reader(reader, ExpertRequest, pace, "peer")
            with pytest.raises(ProtocolError):  # zeros are no message, but all of them have been read
                await pace.keep(stream.next(), "reading a stream", "peer")

    begin = time.monotonic()
    asyncio.run(steady())
    assert time.monotonic() - begin > 0.9


def test_a_cancelled_wait_for_a_peer_ends_what_it_waits_for() -> None:
    async def run() -> bool:
        ended = False

        async def wait_for_ever() -> None:
            nonlocal ended
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                ended = True

        waiting = asyncio.ensure_future(libp2p._Pace(60.0).keep(wait_for_ever(), "it", "peer"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        return ended

    assert asyncio.run(run())


def test_many_small_messages_that_are_here_leave_room_for_others() -> None:
    async def run() -> int:
        turns = 0

        async def count_turns() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        reader = asyncio.StreamReader(limit=2**24)
        reader.feed_data(request("a") * 5000)
        reader.feed_eof()
        counting = asyncio.ensure_future(count_turns())
        stream = libp2p._Reader(reader, ExpertRequest, libp2p._Pace(None), "peer")
        while await stream.next() is not None:
            pass
        counting.cancel()
        return turns

    assert asyncio.run(run()) > 50


def test_bounds_are_those_of_the_documentation() -> None:
    for name, bound, _ in table_of(ROOT / "docs" / "protocol.md", "bounds of libp2p"):
        number, _, unit = bound.partition(" ")
        module = libp2p if hasattr(libp2p, name.strip("`")) else hivemind_dialect
        assert getattr(module, name.strip("`")) == int(number) * (2**20 if unit == "MiB" else 1), name


def test_an_answer_after_its_call_was_given_up_does_no_harm() -> None:
    """hivemind's reader of answers would die of it, and all calls with it."""

    async def run() -> None:
        answer = libp2p._Answer()
        answer.cancel()
        answer.set_result(b"late")
        answer.set_exception(ValueError("late"))
        assert answer.cancelled()

    asyncio.run(run())


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
    with pytest.raises(ProtocolError, match="compressed as FLOAT16"):  # nobody has asked for that
        libp2p._ReplyGate(1000, {Compression.NONE}).admit(0, (1,), "float32", Compression.FLOAT16)


@pytest.mark.parametrize("more_bytes", [0, 5000])
def test_an_answer_has_left_before_its_stream_is_closed(more_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a reader that takes its time gets the beginning, and takes it for the whole (stock hivemind does)."""
    message = ExpertResponse(metadata=bytes(2**18 + more_bytes))

    def read_slowly(connection: socket.socket) -> int:
        received = 0
        connection.settimeout(10.0)
        while piece := connection.recv(2**12):
            received += len(piece)
            time.sleep(0.001)
        return received

    async def run() -> int:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
        reader, writer = await asyncio.open_connection(sock=ours)
        server = libp2p.LibP2PServer("", cast(Any, None))

        async def answer(method: str, peer: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await libp2p._write(writer, message)

        monkeypatch.setattr(server, "_serve_stream", answer)
        peer = SimpleNamespace(peer_id=SimpleNamespace(to_base58=lambda: "peer"))
        serving = asyncio.ensure_future(server._stream("forward")(peer, reader, writer))
        received = await asyncio.to_thread(read_slowly, theirs)
        await serving
        theirs.close()
        return received

    assert asyncio.run(run()) > message.ByteSize()
