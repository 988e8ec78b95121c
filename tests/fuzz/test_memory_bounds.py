"""The bounds of docs/operations.md ("Processes and memory") and docs/protocol.md, held against the memory of a server process.

Each test does one hostile thing to a server with small limits, far more of it than the limits allow, and looks at the most
memory that the process had meanwhile.
"""

from __future__ import annotations

import asyncio
import random
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
from hivemind.proto import runtime_pb2

from moe.config import HandlerConfig
from moe.dht import resolve_p2p, start_dht, stop_dht
from moe.transport.direct import MAX_LINK_WEIGHT
from moe.transport.libp2p import _connect
from moe.transport.link import MAX_OWED_BYTES, MAX_UNWANTED_CALLS
from moe.wire.frames import CANCEL, DATA, HEADER, MAX_OPENING_BYTES, encode_frame
from moe.wire.hivemind_dialect import RPC_FORWARD
from moe.wire.messages import BlockInputs, RequestHeader, encode_header
from tests.fuzz import hostile_libp2p
from tests.fuzz.experts import FFN_WIDTH, NOP_WIDTH, SLOTS, SMALL_WIDTH
from tests.fuzz.hostile_libp2p import declared
from tests.fuzz.hostile_link import CHUNK, Attacker, Request, head
from tests.fuzz.server import MIB, FuzzedServer
from tests.swarm.tools import END_OF_STREAM, LOOPBACK, framed, report

PEERS = 4
# Of one direct link, besides tensors: as docs/protocol.md ("What is bounded") has it.
LINK_BYTES = 2**16 + MAX_OPENING_BYTES + 2 * MAX_OWED_BYTES + MAX_LINK_WEIGHT * 2**14 + MAX_UNWANTED_CALLS * 2**9
STREAM_BYTES = 2**18  # of one libp2p stream: its socket's buffers; messages are in flight
LARGEST_BATCH_BYTES = 16 * MIB  # of the experts here: 4096 rows of nop
SPARE_BYTES = 48 * MIB  # fragments of the heap, threads that were made, tables that have grown


def bound(limits: HandlerConfig, *, links: int = 0, streams: int = 0) -> int:
    """The most that requests may take of a server's memory, whoever sends what.

    :param links: direct ones that are filled with what is no tensor
    :param streams: of libp2p
    """
    return (
        limits.max_inflight_bytes  # being received, waiting, computed, or answered
        + 3 * LARGEST_BATCH_BYTES  # one batch: its rows put together, what the module makes of them, the outputs
        + kept(limits)
        + links * LINK_BYTES
        + streams * STREAM_BYTES
        + SPARE_BYTES
    )


def kept(limits: HandlerConfig) -> int:
    """The most that stays when all requests are over."""
    return limits.once_max_bytes + 3 * limits.held_max_bytes * 5 // 4


class Hostile:
    """Some peers that are up to no good, all in this process.

    :ivar links: how many they have filled with what is no tensor
    :ivar streams: of libp2p that they have opened
    """

    def __init__(self, server: FuzzedServer, daemon: str):
        self.server, self._daemon = server, daemon
        self.links = self.streams = 0
        self.rng = random.Random(0)
        self._attackers: list[Attacker] = []

    def peer(self, number: int = 0, links: int = 1) -> Attacker:
        """A peer that may open so many direct links."""
        tickets = self.server.tickets(f"hostile-{number}", links)
        attacker = Attacker(self.rng, tickets, time.monotonic() + 60.0)
        self._attackers.append(attacker)
        return attacker

    def all_at_once(self, work: Callable[[Attacker], object], links: int = 1, *, no_tensors: bool = False) -> None:
        """Each of PEERS peers does it.

        :param no_tensors: it fills its links with headers and control frames
        """
        self.links += PEERS * links if no_tensors else 0
        attackers = [self.peer(number, links) for number in range(PEERS)]
        with ThreadPoolExecutor(PEERS) as threads:
            list(threads.map(work, attackers))

    def over_libp2p(self, work: Callable[[hostile_libp2p.Attacker], Any], streams: int) -> None:
        """One peer does it, with so many streams."""
        self.streams += streams

        async def run() -> None:
            p2p = await _connect(self._daemon)
            attacker = hostile_libp2p.Attacker(self.rng, p2p, self.server.peer_id, time.monotonic() + 60.0)
            try:
                await work(attacker)
            finally:
                attacker.close()
                await p2p.shutdown()

        asyncio.run(run())

    def close(self) -> None:
        """End all connections."""
        for attacker in self._attackers:
            attacker.close()


SEQUENCES: dict[str, Callable[[Hostile], None]] = {}


def sequence(attack: Callable[[Hostile], None]) -> Callable[[Hostile], None]:
    """One of the things to do."""
    SEQUENCES[attack.__name__] = attack
    return attack


def upload(method: str = "forward", *, rows: int = 2000, **header: Any) -> Request:
    """8 MiB, or 16 for a backward."""
    tensors = [head(rows, SLOTS)] * (2 if method == "backward" else 1)
    return Request(method, "slots.0" if method == "backward" else "nop.0", RequestHeader(**header), tensors)


@sequence
def announced_and_not_sent(hostile: Hostile) -> None:
    def work(attacker: Attacker) -> None:
        for _ in range(4):
            attacker.send(attacker.link(), *(upload().opening(call) for call in range(1, 100)))

    hostile.all_at_once(work, 4)
    time.sleep(0.5)


@sequence
def sent_slowly(hostile: Hostile) -> None:
    """Uploads side by side, each of which gets a little now and then."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        attacker.send(sock, *(upload().opening(call) for call in range(1, 60)))
        end = time.monotonic() + 1.2
        while time.monotonic() < end:
            for call in range(1, 60):
                if not attacker.send(sock, HEADER.pack(DATA, call, 2**16) + bytes(2**16)):
                    return

    hostile.all_at_once(work)


@sequence
def refused_with_much_announced(hostile: Hostile) -> None:
    """None of it is sent; all answers are read."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        request = Request("forward", "no.such", None, [head(1000, NOP_WIDTH)])
        for batch in range(250):
            if not attacker.send(sock, *(request.opening(1 + 400 * batch + i) for i in range(400))):
                return
            attacker.drain(sock, 0.002)

    hostile.all_at_once(work, no_tensors=True)


@sequence
def refused_with_large_headers(hostile: Hostile) -> None:
    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        header = RequestHeader(metadata={f"{i}": "x" * 900 for i in range(60)})
        request = Request("forward", "no.such", header, [head(1000, NOP_WIDTH)])
        for call in range(1, 4000):
            if not attacker.send(sock, request.opening(call)):
                return

    hostile.all_at_once(work, no_tensors=True)


@sequence
def waiting_with_large_headers(hostile: Hostile) -> None:
    """Requests of a few rows, which take next to nothing but for what comes with them."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        header = RequestHeader(metadata={f"{i}": "x" * 900 for i in range(60)})
        for call in range(1, 2000):
            request = Request("forward", "nop.0", header, [head(call % 2, NOP_WIDTH)])
            if not attacker.send_request(sock, call, request):
                return

    with hostile.server.computing_nothing():
        hostile.all_at_once(work, no_tensors=True)


@sequence
def cancelled_while_waiting(hostile: Hostile) -> None:
    """Backwards that wait for the device, cancelled as soon as they are there."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        for call in range(1, 10):
            request = upload("backward", request_id=attacker.rng.randbytes(16))
            if not attacker.send_request(sock, call, request):
                return
            time.sleep(0.01)
            attacker.send(sock, encode_frame(CANCEL, call))
            attacker.drain(sock, 0.02)

    with hostile.server.computing_nothing():
        hostile.all_at_once(work)


@sequence
def answers_that_are_not_read(hostile: Hostile) -> None:
    """Small requests with large answers."""
    request = Request("forward", "wide.0", RequestHeader(), [head(8, SMALL_WIDTH)])

    def work(attacker: Attacker) -> None:
        for _ in range(2):
            sock = attacker.link()
            for call in range(1, 60):
                attacker.send_request(sock, call, request)

    hostile.all_at_once(work, 2)
    time.sleep(0.6)


@sequence
def answers_that_are_read_slowly(hostile: Hostile) -> None:
    request = Request("forward", "wide.0", RequestHeader(), [head(8, SMALL_WIDTH)])

    def work(attacker: Attacker) -> None:
        sock, end, call = attacker.link(), time.monotonic() + 2.0, 0
        while time.monotonic() < end:
            call += 1
            if not attacker.send_request(sock, call, request):
                return
            time.sleep(0.01)
            if call % 20 == 0:
                attacker.drain(sock, 0.001)

    hostile.all_at_once(work)


@sequence
def floods_of_cancels(hostile: Hostile) -> None:
    """Each is confirmed; no confirmation is read."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        frames = b"".join(encode_frame(CANCEL, call) for call in range(1, 20_000))
        for _ in range(100):
            if not attacker.send(sock, frames):
                return

    hostile.all_at_once(work, no_tensors=True)


@sequence
def no_rows_of_any_length(hostile: Hostile) -> None:
    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        for call, length in enumerate((2**20, 2**24, 2**28, 2**40, 2**61), start=1):
            heads = [head(0, length, SMALL_WIDTH), head(0, dtype="int64"), head(0, length, dtype="bool")]
            request = Request("forward", "mixer.0", RequestHeader(), heads)
            attacker.send(sock, request.opening(2 * call))
            backward = Request("backward", "mixer.0", RequestHeader(), [*heads, heads[0]])
            attacker.send(sock, backward.opening(2 * call + 1))
        attacker.drain(sock, 0.6)

    hostile.all_at_once(work)


@sequence
def no_rows_but_much_that_is_global(hostile: Hostile) -> None:
    """The tensors that do not belong to rows are empty, too, along one axis."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        for call, rank in enumerate((2**20, 2**22, 2**24), start=1):
            heads = [head(0, FFN_WIDTH), head(FFN_WIDTH, rank, size=0), head(rank, 4 * FFN_WIDTH, size=0)]
            attacker.send(
                sock, Request("forward", "adapted.0", RequestHeader(present=("lora_a", "lora_b")), heads).opening(call)
            )
        attacker.drain(sock, 0.5)

    hostile.all_at_once(work)


def bomb(codec: int, rows: int) -> bytes:
    """What claims to be a compressed tensor of so many rows of nop, with tables that make more of it."""
    most = 4 * rows * NOP_WIDTH
    if codec == 5:
        return (struct.pack("<qq", (most - 24) // 4, 1) + bytes(most))[:most]
    return (struct.pack("<q", 256) + bytes(most))[:most]


@sequence
def compressed_tensors_that_expand(hostile: Hostile) -> None:
    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        for call in range(1, 9):
            codec = 5 if call % 2 else 3 + call % 4 // 2
            blob = bomb(codec, 64 if codec == 5 else 1000)
            announced = head(len(blob) // (4 * NOP_WIDTH), NOP_WIDTH, codec=codec, size=len(blob))
            request = Request("forward", "nop.0", RequestHeader(), [announced])
            attacker.send(sock, request.opening(call))
            for begin in range(0, len(blob), CHUNK):
                piece = blob[begin : begin + CHUNK]
                attacker.send(sock, HEADER.pack(DATA, call, len(piece)) + piece)
        attacker.drain(sock, 0.6)

    hostile.all_at_once(work)


@sequence
def outputs_that_are_kept(hostile: Hostile) -> None:
    """Forwards whose inputs and activations are to be kept for backwards that never come."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        for call in range(1, 15):
            header = RequestHeader(request_id=attacker.rng.randbytes(16), keep=True)
            request = Request("forward", "slots.0", header, [head(1000, SLOTS)])
            attacker.send_request(sock, call, request)
            attacker.drain(sock, 0.05)

    hostile.all_at_once(work)


@sequence
def globals_that_are_held(hostile: Hostile) -> None:
    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        for call in range(1, 17):
            rank = 4000 - call
            heads = [head(1, FFN_WIDTH), head(FFN_WIDTH, rank), head(rank, 4 * FFN_WIDTH)]
            header = RequestHeader(present=("lora_a", "lora_b"), hold=(1, 2))
            attacker.send_request(sock, call, Request("forward", "adapted.0", header, heads))
            attacker.drain(sock, 0.03)

    hostile.all_at_once(work)


@sequence
def backwards_that_are_remembered(hostile: Hostile) -> None:
    """Training steps whose inputs were kept by their forwards and want no gradient: nothing of them is to be remembered."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        for call in range(1, 40, 2):
            kept_as, grads = attacker.rng.randbytes(16), [head(1000, SLOTS)]
            keeping = RequestHeader(request_id=kept_as, keep=True)
            attacker.send_request(sock, call, Request("forward", "slots.0", keeping, grads))
            attacker.drain(sock, 0.03)
            header = RequestHeader(request_id=attacker.rng.randbytes(16), held={0: kept_as}, wants_grad=(False,))
            attacker.send_request(sock, call + 1, Request("backward", "slots.0", header, grads))
            attacker.drain(sock, 0.03)

    hostile.all_at_once(work)


@sequence
def repeats_of_one_backward(hostile: Hostile) -> None:
    """All of them wait for the first one's answer, or get it again."""

    def work(attacker: Attacker) -> None:
        sock, same = attacker.link(), attacker.rng.randbytes(16)
        for call in range(1, 17):
            request = Request("backward", "slots.0", RequestHeader(request_id=same), [head(1000, SLOTS)] * 2)
            if not attacker.send_request(sock, call, request):
                return
            if call > 10:
                attacker.drain(sock, 0.02)

    hostile.all_at_once(work)


@sequence
def long_chains(hostile: Hostile) -> None:
    """A backward of a chain keeps what each of its blocks was given."""

    def work(attacker: Attacker) -> None:
        sock = attacker.link()
        blocks = tuple(BlockInputs(request_id=attacker.rng.randbytes(16)) for _ in range(256))
        for call in range(1, 5):
            header = RequestHeader(chain=blocks, time_left_s=1.0)
            uid = " ".join(["slots.0"] * len(blocks))
            attacker.send_request(sock, call, Request("backward", uid, header, [head(500, SLOTS)] * 2))
        attacker.drain(sock, 0.8)

    hostile.all_at_once(work)


@sequence
def garbage_without_a_ticket(hostile: Hostile) -> None:
    def work(attacker: Attacker) -> None:
        for _ in range(100):
            try:
                attacker.stranger()
            except OSError:
                return
        time.sleep(0.5)

    hostile.all_at_once(work)


# --- over libp2p -------------------------------------------------------------------------------------------------------


@sequence
def messages_of_a_million_parts(hostile: Hostile) -> None:
    message = framed((b"\x0a\x05nop.0" + b"\x12\x00" * 2**23)[: 2**24 - 2])

    async def work(attacker: hostile_libp2p.Attacker) -> None:
        async def one() -> None:
            ends = await attacker.stream()
            await attacker.write(ends, message, END_OF_STREAM)
            await attacker.drain(ends, 1.0)

        await asyncio.gather(*(one() for _ in range(4)))

    hostile.over_libp2p(work, 4)


@sequence
def large_messages_that_are_not_finished(hostile: Hostile) -> None:
    """Before it is complete, nobody knows what a message wants."""
    message = framed((b"\x0a\x05nop.0" + b"\x12\x00" * 2**23)[: 2**24 - 2])[: 2**23]

    async def work(attacker: hostile_libp2p.Attacker) -> None:
        async def one() -> None:
            ends = await attacker.stream()
            await attacker.write(ends, *(message[begin : begin + CHUNK] for begin in range(0, len(message), CHUNK)))

        await asyncio.gather(*(one() for _ in range(48)))
        await asyncio.sleep(0.5)

    hostile.over_libp2p(work, 48)


@sequence
def unary_requests_of_many_parts(hostile: Hostile) -> None:
    message = (b"\x0a\x05nop.0" + b"\x12\x00" * 2**20)[: 2**21]

    async def work(attacker: hostile_libp2p.Attacker) -> None:
        await asyncio.gather(*(attacker.ask(RPC_FORWARD, message, 2.0) for _ in range(8)))

    hostile.over_libp2p(work, 8)


@sequence
def streamed_answers_that_are_not_read(hostile: Hostile) -> None:
    tensor = declared(head(8, SMALL_WIDTH), bytes(32 * 8))
    data = runtime_pb2.ExpertRequest(uid="wide.0", tensors=[tensor], metadata=encode_header(RequestHeader()))
    message = framed(data.SerializeToString())

    async def work(attacker: hostile_libp2p.Attacker) -> None:
        async def one() -> None:
            ends = await attacker.stream()
            await attacker.write(ends, message, END_OF_STREAM)

        await asyncio.gather(*(one() for _ in range(100)))
        await asyncio.sleep(1.0)

    hostile.over_libp2p(work, 100)


@sequence
def streams_that_announce_much(hostile: Hostile) -> None:
    async def work(attacker: hostile_libp2p.Attacker) -> None:
        async def one() -> None:
            tensor = declared(head(2000, NOP_WIDTH), bytes(2**20), chunks=8)
            data = runtime_pb2.ExpertRequest(uid="nop.0", tensors=[tensor], metadata=encode_header(RequestHeader()))
            part = runtime_pb2.ExpertRequest(uid="nop.0", tensors=[runtime_pb2.Tensor(buffer=bytes(2**20))])
            ends = await attacker.stream()
            await attacker.write(ends, framed(data.SerializeToString()), *[framed(part.SerializeToString())] * 6)

        await asyncio.gather(*(one() for _ in range(60)))

    hostile.over_libp2p(work, 60)


# --- the test ----------------------------------------------------------------------------------------------------------


class Servers:
    """A server for all tests, with a libp2p daemon for those who call it; and another one when it has been harmed."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._made: tuple[FuzzedServer, str] | None = None

    def get(self) -> tuple[FuzzedServer, str]:
        """One that is as it should be, and the daemon's address."""
        if self._made is None:
            server = self._stack.enter_context(FuzzedServer())
            dht = start_dht(list(server.peers), **LOOPBACK)
            self._stack.callback(stop_dht, dht)
            self._made = server, str(resolve_p2p(dht))
        return self._made

    def close(self) -> None:
        """It is not needed any more, or has been harmed."""
        self._made = None
        self._stack.close()


@pytest.fixture(scope="module")
def servers() -> Iterator[Servers]:
    servers = Servers()
    servers.get()
    yield servers
    servers.close()


@pytest.mark.parametrize("name", SEQUENCES)
def test_memory_stays_within_what_the_options_say(servers: Servers, name: str) -> None:
    server, daemon = servers.get()
    hostile = Hostile(server, daemon)
    begin = server.ask("begin_peak")
    try:
        SEQUENCES[name](hostile)
        peak = server.inside().peak_bytes
        hostile.close()
        after = server.settled(Counter())
        allowed = bound(server.limits, links=hostile.links, streams=hostile.streams)
        left = after.rss_bytes - begin
        report(f"{name}: at most {(peak - begin) // MIB} MiB of {allowed // MIB} MiB, {left // MIB} MiB are left")
        assert after.busy == []
        assert not after.links
        assert peak - begin <= allowed
        assert left <= kept(server.limits) + SPARE_BYTES
    except BaseException:
        servers.close()
        raise
    finally:
        hostile.close()
