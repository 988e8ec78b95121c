"""Hostile clients over libp2p: streams by hand, unary messages of any bytes, in a process that dies when it likes."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import struct
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

from hivemind.p2p import P2PDaemonError, P2PHandlerError
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure
from hivemind.proto import runtime_pb2
from hivemind.proto.p2pd_pb2 import RPCError

from moe.dht import PeerID
from moe.errors import MoEError
from moe.transport.libp2p import _connect, _open_stream
from moe.wire.hivemind_dialect import RPC_BACKWARD, RPC_FORWARD, RPC_INFO, RPC_TICKET, STREAM_SUFFIX
from moe.wire.messages import RequestHeader, encode_header
from tests.fuzz.experts import NOP_WIDTH, SMALL_WIDTH
from tests.fuzz.hostile_link import CODECS, MAX_ROUND_S, Request, head, random_request
from tests.swarm.tools import END_OF_STREAM, framed

PART = 2**22
HANDLES = {"forward": RPC_FORWARD, "backward": RPC_BACKWARD}
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def messages(request: Request) -> Iterator[bytes]:
    """A request as protobuf messages of one part each; all zeros, which trains nobody else's weight."""
    metadata = b"" if request.header is None else encode_header(request.header)
    first = True
    for one in request.heads:
        sizes = [min(PART, one.size_bytes - begin) for begin in range(0, one.size_bytes, PART)] or [0]
        for number, size in enumerate(sizes):
            tensor = runtime_pb2.Tensor(buffer=bytes(size))
            if number == 0:
                tensor = declared(one, bytes(size), chunks=len(sizes))
            yield runtime_pb2.ExpertRequest(
                uid=request.uid, tensors=[tensor], metadata=metadata if first else b""
            ).SerializeToString()
            first = False


def declared(one: Any, data: bytes, chunks: int = 1) -> Any:
    """A tensor's first part."""
    shape = [min(axis, 2**31 - 1) for axis in one.shape]
    return runtime_pb2.Tensor(buffer=data, size=shape, dtype=one.dtype, compression=one.codec, chunks=chunks)


def unary(request: Request) -> bytes:
    """A request as one protobuf message."""
    tensors = [declared(one, bytes(one.size_bytes)) for one in request.heads]
    metadata = b"" if request.header is None else encode_header(request.header)
    message: bytes = runtime_pb2.ExpertRequest(uid=request.uid, tensors=tensors, metadata=metadata).SerializeToString()
    return message


class Attacker:
    """One process's means. Everything ends at its time."""

    def __init__(self, rng: random.Random, p2p: Any, peer_id: PeerID, until: float):
        self.rng, self._p2p, self._peer_id, self.until = rng, p2p, peer_id, until
        self._streams: list[Ends] = []

    @property
    def has_time(self) -> bool:
        """False if it should end."""
        return time.monotonic() < self.until

    async def stream(self, method: str = "forward") -> Ends:
        """A new stream to the server."""
        ends = await asyncio.wait_for(_open_stream(self._p2p, self._peer_id, HANDLES[method] + STREAM_SUFFIX), 2.0)
        self._streams.append(ends)
        return ends

    async def write(self, ends: Ends, *data: bytes) -> bool:
        """False if nobody takes it."""
        try:
            for piece in data:
                ends[1].write(piece)
                await asyncio.wait_for(ends[1].drain(), 0.3)
            return True
        except (OSError, asyncio.TimeoutError):
            return False

    async def read(self, ends: Ends, count: int = 2**18, seconds: float = 0.3) -> bytes:
        """What comes, if anything does."""
        try:
            return await asyncio.wait_for(ends[0].read(count), seconds)
        except (OSError, asyncio.TimeoutError):
            return b""

    async def drain(self, ends: Ends, seconds: float) -> None:
        """Read what comes."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and await self.read(ends, seconds=0.1):
            pass

    async def ask(self, handle: str, data: bytes, timeout_s: float = 0.5) -> None:
        """A unary call."""
        try:
            call = self._p2p._client.control.call_unary_handler(self._peer_id, handle, data)
            await asyncio.wait_for(call, timeout_s)
        except (P2PHandlerError, P2PDaemonError, ControlFailure, OSError, asyncio.TimeoutError):
            pass

    def leave(self) -> None:
        """Close all streams, some with the whole process."""
        if self.rng.random() < 0.15:
            os.kill(os.getpid(), signal.SIGKILL)
        for _, writer in self._streams:
            if self.rng.random() < 0.7:
                writer.close()
        self.close()

    def close(self) -> None:
        """End all streams at once; what they still had to send is lost."""
        for _, writer in self._streams:
            writer.transport.abort()
        self._streams.clear()


Behaviour = Callable[[Attacker], Awaitable[None]]
BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(attack: Behaviour) -> Behaviour:
    """One of the things that a hostile client does."""
    BEHAVIOURS[attack.__name__] = attack  # type: ignore[attr-defined]
    return attack


@behaviour
async def work(attacker: Attacker) -> None:
    """Ordinary calls, streamed, whose answers are read."""

    async def one() -> None:
        request = random_request(attacker.rng)
        ends = await attacker.stream(request.method)
        if await attacker.write(ends, *map(framed, messages(request)), END_OF_STREAM):
            await attacker.drain(ends, 0.5)

    await asyncio.gather(*(one() for _ in range(attacker.rng.randint(1, 6))))


@behaviour
async def work_unary(attacker: Attacker) -> None:
    """Ordinary calls, unary; some callers give up."""
    requests = [random_request(attacker.rng, attacker.rng.choice((0, 1, 8))) for _ in range(20)]
    await asyncio.gather(
        *(
            attacker.ask(HANDLES[request.method], unary(request), attacker.rng.choice((0.001, 0.01, 1.0)))
            for request in requests
            if request.size_bytes < 2**21
        )
    )


@behaviour
async def silence(attacker: Attacker) -> None:
    """Many streams with a beginning, or without one."""
    for _ in range(attacker.rng.randint(1, 40)):
        request = random_request(attacker.rng, 300)
        data = b"".join(map(framed, messages(request)))
        ends = await attacker.stream(request.method)
        await attacker.write(ends, data[: attacker.rng.choice((0, 1, 5, 9, 50, 5000))])
    await asyncio.sleep(attacker.rng.random() * MAX_ROUND_S)


@behaviour
async def trickle(attacker: Attacker) -> None:
    request = random_request(attacker.rng, 8)
    ends, end = await attacker.stream(request.method), time.monotonic() + MAX_ROUND_S
    for byte in b"".join(map(framed, messages(request))):
        if time.monotonic() > end or not await attacker.write(ends, bytes([byte])):
            return
        await asyncio.sleep(attacker.rng.choice((0.0, 0.05)))


@behaviour
async def send_a_part(attacker: Attacker) -> None:
    for _ in range(attacker.rng.randint(1, 6)):
        request = random_request(attacker.rng, 2000)
        data = b"".join(map(framed, messages(request)))
        ends = await attacker.stream(request.method)
        await attacker.write(ends, data[: attacker.rng.randrange(len(data))])
    await asyncio.sleep(attacker.rng.random() * MAX_ROUND_S)


@behaviour
async def read_nothing(attacker: Attacker) -> None:
    """Large answers that nobody reads, or a little of them now and then."""
    request = Request("forward", "wide.0", RequestHeader(), [head(8, SMALL_WIDTH)])
    streams = []
    for _ in range(attacker.rng.randint(1, 12)):
        ends = await attacker.stream()
        await attacker.write(ends, *map(framed, messages(request)), END_OF_STREAM)
        streams.append(ends)
    end = time.monotonic() + attacker.rng.random() * 2 * MAX_ROUND_S
    while time.monotonic() < end:
        await attacker.read(attacker.rng.choice(streams), attacker.rng.choice((1, 2**14)), 0.05)


@behaviour
async def garbage(attacker: Attacker) -> None:
    rng = attacker.rng
    ends = await attacker.stream(rng.choice(list(HANDLES)))
    length = rng.choice((0, 1, 100, 2**24, 2**24 + 1, 2**40, 2**64 - 1))
    data = rng.choice(
        (rng.randbytes(200), bytes([rng.randrange(4)]) + length.to_bytes(8, "big") + rng.randbytes(min(length, 2**16)))
    )
    await attacker.write(ends, data)
    await attacker.drain(ends, 0.1)
    await attacker.ask(
        rng.choice((RPC_FORWARD, RPC_BACKWARD, RPC_INFO, RPC_TICKET)), rng.randbytes(rng.randint(0, 300))
    )


@behaviour
async def errors_with_long_texts(attacker: Attacker) -> None:
    """How a stream ends with an error: what it says is somebody's to read, in time that grows no faster than the text."""
    rng = attacker.rng
    text = rng.choice(("a(: ", "a: ", "((", "x", ": a(", "\u00e4(")) * rng.choice((10, 50_000, 1_000_000))
    data = RPCError(message=text[: 2**23]).SerializeToString()
    ends = await attacker.stream()
    await attacker.write(ends, b"\x01" + len(data).to_bytes(8, "big") + data)
    await attacker.drain(ends, 0.3)


@behaviour
async def a_million_parts(attacker: Attacker) -> None:
    """Messages of a few bytes a tensor, which take far more as objects."""
    rng = attacker.rng
    empty = rng.choice((b"\x12\x00", b"\x12\x02\x0a\x00"))  # tensors: one without fields, one with an empty buffer
    data = b"\x0a\x05nop.0" + empty * rng.choice((10_000, 1_000_000))
    ends = await attacker.stream()
    await attacker.write(ends, framed(data[: 2**24]), END_OF_STREAM)
    await attacker.drain(ends, 0.3)
    if rng.random() < 0.3:
        await attacker.ask(RPC_FORWARD, data[: 2**21])


@behaviour
async def declarations_that_lie(attacker: Attacker) -> None:
    """More or fewer bytes than declared, no rows of any length, axes that overflow, parts of nothing."""
    rng = attacker.rng
    long = rng.choice((2**20, 2**31, 2**40, 2**61))
    heads = rng.choice(
        (
            [head(0, long, 8), head(0, dtype="int64"), head(0, long, dtype="bool")],
            [head(0, long, long)],
            [head(long, NOP_WIDTH)],
            [head(*[1] * rng.randint(0, 70))],
            [head(16, NOP_WIDTH, codec=rng.randrange(8))],
        )
    )
    uid = "mixer.0" if heads[0].shape and heads[0].shape[0] == 0 else "nop.0"
    tensors = [declared(one, bytes(rng.choice((0, 1, 2**16, 2**20)))) for one in heads]
    tensors += [runtime_pb2.Tensor(buffer=bytes(rng.choice((0, 100)))) for _ in range(rng.randint(0, 3))]
    metadata = rng.choice((encode_header(RequestHeader()), b"", rng.randbytes(20)))
    data = runtime_pb2.ExpertRequest(uid=uid, tensors=tensors, metadata=metadata).SerializeToString()
    ends = await attacker.stream()
    for _ in range(rng.randint(1, 3)):
        await attacker.write(ends, framed(data))
    await attacker.write(ends, END_OF_STREAM)
    await attacker.drain(ends, 0.3)
    if len(data) < 2**21:
        await attacker.ask(RPC_FORWARD, data)


@behaviour
async def lossy_bombs(attacker: Attacker) -> None:
    rng = attacker.rng
    rows, codec = rng.choice((1, 16, 64)), rng.choice(CODECS)
    most = 4 * rows * NOP_WIDTH
    tables = struct.pack("<qq", (most - 24) // 4, 1) if codec == 5 else struct.pack("<q", rng.choice((0, 1, 256)))
    blob = (tables + rng.randbytes(256) + bytes(most))[: rng.choice((most, most // 2))]
    tensor = declared(head(rows, NOP_WIDTH, codec=codec), blob)
    metadata = encode_header(RequestHeader())
    data = runtime_pb2.ExpertRequest(uid="nop.0", tensors=[tensor], metadata=metadata).SerializeToString()
    await attacker.ask(RPC_FORWARD, data)
    ends = await attacker.stream()
    await attacker.write(ends, framed(data), END_OF_STREAM)
    await attacker.drain(ends, 0.3)


@behaviour
async def questions(attacker: Attacker) -> None:
    """Descriptions and tickets, more of them than anybody needs."""
    rng = attacker.rng
    uids = ("nop.0", "no.such", "x" * 100_000, "")
    asked = [runtime_pb2.ExpertUID(uid=rng.choice(uids)).SerializeToString() for _ in range(60)]
    await asyncio.gather(*(attacker.ask(rng.choice((RPC_INFO, RPC_TICKET)), data) for data in asked))


@behaviour
async def leave_in_the_middle(attacker: Attacker) -> None:
    """The whole process goes, with streams at all stages."""
    for _ in range(attacker.rng.randint(1, 8)):
        request = random_request(attacker.rng)
        data = b"".join(map(framed, messages(request))) + END_OF_STREAM
        ends = await attacker.stream(request.method)
        await attacker.write(ends, data[: int(len(data) * attacker.rng.choice((0.3, 1.0)))])
    os.kill(os.getpid(), signal.SIGKILL)


def attack(daemon_maddr: str, peer: str, seed: int, seconds: float, only: Sequence[str]) -> None:
    """One hostile client, until it is out of time or kills itself."""
    rng = random.Random(seed)
    names = list(only or BEHAVIOURS)

    async def run() -> None:
        p2p = await _connect(daemon_maddr)
        attacker = Attacker(rng, p2p, PeerID.from_base58(peer), time.monotonic() + seconds)
        try:
            while attacker.has_time:
                await BEHAVIOURS[rng.choice(names)](attacker)
                attacker.leave()
        except (OSError, MoEError, P2PDaemonError, ControlFailure, asyncio.TimeoutError, EOFError):
            pass  # the server has had enough
        attacker.leave()
        await p2p.shutdown()

    asyncio.run(run())
