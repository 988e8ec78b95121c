"""Whoever comes and goes, a server process goes on with the memory it had: no peer, request, link or failure stays in it."""

from __future__ import annotations

import random
import time
from collections import Counter

from moe.wire.frames import CANCEL, encode_frame
from moe.wire.messages import RequestHeader
from tests.fuzz.experts import FFN_WIDTH, NOP_WIDTH, SLOTS
from tests.fuzz.hostile_link import Attacker, Request, head, random_request
from tests.fuzz.server import MIB, FuzzedServer
from tests.leaks import growth_bytes
from tests.swarm.tools import report

CYCLES = 4  # in each half
PEERS = 30  # in each cycle, none of them seen before
SLACK_BYTES = 6 * MIB  # the heap's fragments; a leak of one of a peer's inputs, 80 KiB, is found


def visit(attacker: Attacker) -> None:
    """A peer that trains, fails, gives up and leaves in the middle, and refers to what it has sent."""
    rng, sock = attacker.rng, attacker.link()
    kept_as, rows = rng.randbytes(16), [head(20, SLOTS)]
    requests = [
        Request("forward", "nop.0", RequestHeader(request_id=rng.randbytes(16), keep=True), [head(20, NOP_WIDTH)]),
        Request("forward", "slots.0", RequestHeader(request_id=kept_as, keep=True), rows),
        Request("backward", "slots.0", RequestHeader(request_id=rng.randbytes(16), held={0: kept_as}), rows),
        Request("backward", "ffn.0", RequestHeader(request_id=rng.randbytes(16)), [head(20, FFN_WIDTH)] * 2),
        Request("forward", "no.such", RequestHeader(metadata={"who": "x" * 1000}), [head(20, NOP_WIDTH)]),
        Request("forward", "nop.0", RequestHeader(time_left_s=0.0), [head(20, NOP_WIDTH)]),
        random_request(rng, 2),
    ]
    for call, request in enumerate(requests, start=1):
        attacker.send_request(sock, call, request)
    attacker.drain(sock, 0.005)
    attacker.send_request(sock, 100, Request("forward", "nop.0", RequestHeader(), [head(20, NOP_WIDTH)]))
    attacker.send(sock, encode_frame(CANCEL, 100))
    attacker.send_request(sock, 101, Request("forward", "nop.0", RequestHeader(), [head(20, NOP_WIDTH)]), share=0.5)
    attacker.close()


def test_memory_does_not_grow_with_those_who_come_and_go() -> None:
    rng = random.Random(0)
    with FuzzedServer() as server:

        def cycle(number: int) -> None:
            for peer in range(PEERS):
                tickets = server.tickets(f"peer-{number}-{peer}")
                visit(Attacker(rng, tickets, time.monotonic() + 60.0))

        def measure() -> int:
            inside = server.settled(Counter())
            assert inside.busy == []
            return inside.rss_bytes

        begin = time.monotonic()
        grown = growth_bytes(measure, cycle, CYCLES)
        peers = CYCLES * PEERS
        report(f"{grown / MIB:.1f} MiB more after {peers} more peers; {time.monotonic() - begin:.1f} s")
        assert grown < SLACK_BYTES
