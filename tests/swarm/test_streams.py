"""Streams that lie about their size, stall or break off: refused early, and nothing is kept of them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import psutil
import pytest
import torch
from hivemind.proto import runtime_pb2

from moe.config import HandlerConfig
from moe.dht import DHT
from moe.errors import DeadlineExceeded, Overloaded, ProtocolError, RemoteSchemaError
from moe.server.server import Server
from moe.testing import check_idle
from moe.transport.base import FORWARD
from moe.wire.hivemind_dialect import ExpertRequest, ExpertResponse
from moe.wire.messages import RequestHeader, encode_header
from tests.swarm.experts import WIDTH, make_backend
from tests.swarm.tools import (
    END_OF_STREAM,
    Host,
    RawClient,
    checked,
    framed,
    gather_limited,
    peers_of,
    read_message,
    refused,
    report,
    serving,
    wait_until,
)

MIB = 2**20
READ_TIMEOUT_S = 1.0
LIMITS: dict[str, Any] = {
    "max_request_bytes": 512 * MIB,
    "max_inflight_bytes": 1024 * MIB,
    "read_timeout_s": READ_TIMEOUT_S,
}


@pytest.fixture(scope="module")
def host(dht: DHT) -> Iterator[Host]:
    """A server whose memory can be looked at."""
    experts = [{"kind": "mixer", "uid": "mixer.0"}, {"kind": "linear", "uid": "linear.0"}]
    with Host(peers_of(dht), experts=experts, handler=LIMITS) as host:
        yield host


@pytest.fixture(scope="module")
def server(dht: DHT) -> Iterator[Server]:
    """A server that can be looked into."""
    backends = make_backend("mixer", "mixer.0"), make_backend("linear", "linear.0")
    with serving(dht, *backends, handler_config=HandlerConfig(**LIMITS)) as server:
        yield server


@pytest.fixture(scope="module")
def to_host(dht: DHT, host: Host) -> Iterator[RawClient]:
    raw = RawClient(dht, host.peer_id)
    yield raw
    raw.close()


@pytest.fixture(scope="module")
def raw(dht: DHT, server: Server) -> Iterator[RawClient]:
    raw = RawClient(dht, server.dht.peer_id)
    yield raw
    raw.close()


def first_part(length: int, data: bytes, rows: int = 1, uid: str = "mixer.0") -> bytes:
    """The beginning of a request with a tensor of ``length`` positions."""
    tensor = runtime_pb2.Tensor(buffer=data, size=[rows, length, WIDTH], dtype="float32", chunks=2**20)
    request = ExpertRequest(uid=uid, tensors=[tensor], metadata=encode_header(RequestHeader()))
    return framed(request.SerializeToString())


def next_part(data: bytes) -> bytes:
    return framed(ExpertRequest(uid="mixer.0", tensors=[runtime_pb2.Tensor(buffer=data)]).SerializeToString())


async def works(raw: RawClient) -> None:
    reply = await raw.call(FORWARD, "linear.0", [torch.ones(3, WIDTH)], way="stream")
    assert reply.tensors[0].shape == (3, WIDTH)


async def answer(reader: asyncio.StreamReader) -> Any:
    return checked(ExpertResponse.FromString(await read_message(reader)))


async def pour(writer: asyncio.StreamWriter, part: bytes, count: int) -> int:
    """Write on and on, also after the other side has stopped reading; how many parts went out."""
    for sent in range(count):
        try:
            writer.write(part)
            await asyncio.wait_for(writer.drain(), 0.5)
        except (OSError, asyncio.TimeoutError):
            return sent
    return count


# --- sizes -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_flat(host: Host, by_less_than: int) -> Iterator[None]:
    before = host.rss_bytes()
    yield
    after = host.rss_bytes()
    report(f"server: {before / MIB:.0f} -> {after / MIB:.0f} MiB")
    assert after - before < by_less_than


def test_ten_gigabytes_are_refused_at_the_first_part(host: Host, to_host: RawClient) -> None:
    part = next_part(bytes(4 * MIB))

    async def attack() -> None:
        async with to_host.open_stream(FORWARD) as (reader, writer):
            writer.write(first_part(10 * 2**30 // (4 * WIDTH), bytes(64 * 1024)))
            pouring = asyncio.ensure_future(pour(writer, part, 100))
            try:
                with refused(RemoteSchemaError, "args[0]", "exceeds"):
                    await answer(reader)
            finally:
                sent = await pouring
                report(f"{sent} parts of 4 MiB left this process")
            await works(to_host)

    to_host.run(works(to_host))
    with memory_flat(host, 128 * MIB):
        to_host.run(attack())


def test_more_than_was_declared_is_refused_where_it_begins(host: Host, to_host: RawClient) -> None:
    async def attack() -> None:
        async with to_host.open_stream(FORWARD) as (reader, writer):
            writer.write(first_part(MIB // (4 * WIDTH), bytes(MIB)))  # all that there is
            pouring = asyncio.ensure_future(pour(writer, next_part(bytes(4 * MIB)), 100))
            try:
                with refused(ProtocolError, "more than"):
                    await answer(reader)
            finally:
                await pouring
            await works(to_host)

    with memory_flat(host, 128 * MIB):
        to_host.run(attack())


def test_what_is_declared_and_never_sent_takes_no_memory(host: Host, to_host: RawClient) -> None:
    """Two requests of 400 MiB may be in flight, not a third; none of them has sent more than a few bytes."""

    async def attack() -> None:
        async with contextlib.AsyncExitStack() as stack:
            streams = [await stack.enter_async_context(to_host.open_stream(FORWARD)) for _ in range(3)]
            for _, writer in streams:
                writer.write(first_part(400 * MIB // (4 * WIDTH), bytes(16)))
                await writer.drain()
            answers = [asyncio.ensure_future(answer(reader)) for reader, _ in streams]
            done, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
            with refused(Overloaded, "in flight"):
                await done.pop()
            results = await asyncio.gather(*answers, return_exceptions=True)
            assert sorted(type(result).__name__ for result in results) == ["DeadlineExceeded"] * 2 + ["Overloaded"]
        await works(to_host)

    with memory_flat(host, 64 * MIB):
        to_host.run(attack())


@pytest.mark.parametrize("length", [2**24 + 1, 2**40, 2**63, 2**64 - 1])
def test_messages_of_unbelievable_length(host: Host, to_host: RawClient, length: int) -> None:
    async def attack() -> None:
        async with to_host.open_stream(FORWARD) as (reader, writer):
            writer.write(b"\x00" + length.to_bytes(8, "big"))
            pouring = asyncio.ensure_future(pour(writer, bytes(4 * MIB), 20))
            try:
                with refused(ProtocolError, str(length)):
                    await answer(reader)
            finally:
                await pouring
            await works(to_host)

    with memory_flat(host, 128 * MIB):
        to_host.run(attack())


# --- order -----------------------------------------------------------------------------------------------------------

UID = ExpertRequest(uid="mixer.0", metadata=encode_header(RequestHeader())).SerializeToString()
NONSENSE: dict[str, tuple[bytes, Any, str]] = {
    "nothing": (b"", ProtocolError, "empty stream"),
    "no message": (framed(b"\xff\xff\xff\xff"), ProtocolError, "malformed message"),
    "another marker": (b"\x07" + bytes(8), ProtocolError, "marker"),
    "a part of no tensor": (framed(UID) + next_part(b"1"), ProtocolError, "dtype"),
    "a part of nothing": (first_part(4, b"1") + next_part(b""), ProtocolError, "nothing in it"),
    "another expert in between": (
        first_part(4, bytes(16)) + framed(ExpertRequest(uid="linear.0").SerializeToString()),
        ProtocolError,
        "linear.0",
    ),
}


@pytest.mark.parametrize("fault", NONSENSE)
def test_nonsense(server: Server, raw: RawClient, fault: str) -> None:
    data, kind, text = NONSENSE[fault]

    async def attack() -> None:
        async with raw.open_stream(FORWARD) as (reader, writer):
            writer.write(data + END_OF_STREAM)
            with refused(kind, text):
                await answer(reader)
        await works(raw)

    raw.run(attack())
    check_idle(server)


# --- time ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begun", [b"", b"\x00", framed(UID)[:12], framed(UID), first_part(MIB, bytes(16))])
def test_silence_ends_a_stream(server: Server, raw: RawClient, begun: bytes) -> None:
    async def attack() -> None:
        async with raw.open_stream(FORWARD) as (reader, writer):
            writer.write(begun)
            with refused(DeadlineExceeded, "reading a stream", within_s=READ_TIMEOUT_S + 5.0):
                await answer(reader)

    raw.run(attack())
    check_idle(server)


def test_a_byte_now_and_then_does_not_keep_a_stream_open(server: Server, raw: RawClient) -> None:
    data = first_part(MIB, bytes(MIB))

    async def attack() -> None:
        async with raw.open_stream(FORWARD) as (reader, writer):
            answered = asyncio.ensure_future(answer(reader))
            with refused(DeadlineExceeded, within_s=READ_TIMEOUT_S + 5.0):
                for byte in data:
                    writer.write(bytes([byte]))
                    await asyncio.wait([answered], timeout=0.2)
                    if answered.done():
                        break
                await answered

    raw.run(attack())


def test_many_silent_streams_do_not_keep_others_out(server: Server, raw: RawClient) -> None:
    async def open_many(stack: contextlib.AsyncExitStack) -> None:
        async def one(_: int) -> None:
            _, writer = await stack.enter_async_context(raw.open_stream(FORWARD))
            writer.write(framed(UID))

        await gather_limited(one, 200, 20)

    async def attack() -> None:
        async with contextlib.AsyncExitStack() as stack:
            await open_many(stack)
            await works(raw)
            await asyncio.sleep(READ_TIMEOUT_S)  # now the server has closed its ends
            await works(raw)

    before = psutil.Process().num_fds()
    raw.run(attack())
    wait_until(lambda: psutil.Process().num_fds() <= before + 4, what="closing the streams")


# --- those who leave ---------------------------------------------------------------------------------------------------


def test_a_caller_who_leaves_in_the_middle(server: Server, raw: RawClient) -> None:
    async def leave(_: int) -> None:
        async with raw.open_stream(FORWARD) as (_, writer):
            writer.write(first_part(8 * MIB // (4 * WIDTH), bytes(4 * MIB)))
            await writer.drain()

    raw.run(gather_limited(leave, 20, 5))
    raw.run(works(raw))
    wait_until(lambda: server.handler.inflight.bytes == 0, what="forgetting the requests")


def test_a_caller_who_never_reads_the_answer(server: Server, raw: RawClient) -> None:
    rows = 4096
    tensors = [torch.zeros(rows, 64, WIDTH), torch.arange(rows), torch.ones(rows, 64, dtype=torch.bool)]  # 8 MiB

    @contextlib.asynccontextmanager
    async def asked() -> AsyncIterator[asyncio.StreamReader]:
        from moe.wire.hivemind_dialect import stream_requests
        from moe.wire.tensors import encode_tensor

        async with raw.open_stream(FORWARD) as (reader, writer):
            encoded = [encode_tensor(tensor) for tensor in tensors]
            for request in stream_requests("mixer.0", encoded, encode_header(RequestHeader())):
                writer.write(framed(request.SerializeToString()))
                await writer.drain()
            writer.write(END_OF_STREAM)
            yield reader

    async def attack() -> None:
        async with contextlib.AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(asked())
            await works(raw)
            for _ in range(100):
                if server.handler.inflight.bytes == 0:
                    return
                await asyncio.sleep(0.1)
            raise AssertionError("the server still holds what nobody reads")

    raw.run(attack())
