"""A client of servers that answer anything: each call ends in time, in a checked answer or a typed error, and holds no memory.

The servers' ends of links are played by this process: they read requests, and answer with what a seed says, cut up as it says.
Run longer with ``FUZZ_SECONDS=600 FUZZ_SEED=7 pytest tests/fuzz/test_hostile_server.py``.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator

import torch

from moe.chains import Chain
from moe.client.requests import Request, Terms
from moe.config import ClientConfig
from moe.errors import MoEError
from moe.schema import BatchTensorProto, ExpertSchema
from moe.transport.base import Call, Reply
from moe.transport.direct import DirectClient
from moe.transport.event_loop import EventLoopThread
from moe.wire.frames import (
    CANCEL,
    DATA,
    HEADER,
    HELLO,
    OPEN,
    WELCOME,
    Opening,
    TensorHead,
    encode_frame,
    encode_opening,
)
from moe.wire.messages import ReplyHeader, WireError, encode_header
from tests.fuzz.experts import SMALL_WIDTH
from tests.leaks import held_bytes

SECONDS = float(os.environ.get("FUZZ_SECONDS", "6"))
SEED = int(os.environ.get("FUZZ_SEED", "1"))
TIMEOUT_S = 0.2
MIB = 2**20


class Anybody:
    """A peer's name."""

    def to_base58(self) -> str:
        return "hostile"

    def to_bytes(self) -> bytes:
        return b"hostile"


class HostileServer:
    """The other end of a link: answers each request with a few frames of its own choice."""

    def __init__(self, rng: random.Random, sock: socket.socket):
        self._rng, self._sock = rng, sock
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._thread.join(10.0)
        assert not self._thread.is_alive()
        self._sock.close()

    def _serve(self) -> None:
        with contextlib.suppress(OSError), self._sock.makefile("rb") as stream:
            while head := stream.read(HEADER.size):
                kind, call, length = HEADER.unpack(head)
                stream.read(length)
                if kind == DATA:
                    for piece in self._cut(b"".join(self._frames(call))):
                        self._sock.sendall(piece)
                elif kind == CANCEL and self._rng.random() < 0.8:
                    self._sock.sendall(encode_frame(CANCEL, call))

    def _cut(self, data: bytes) -> Iterator[bytes]:
        """Sent at once, in pieces, slowly, or not to the end."""
        how = self._rng.choice(["whole", "whole", "pieces", "slowly", "not all", "reset"])
        if how == "reset":
            yield data[: self._rng.randrange(len(data) + 1)]
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            raise OSError("the end")
        if how == "not all":
            data = data[: self._rng.randrange(len(data) + 1)]
        size = len(data) + 1 if how in ("whole", "not all") else self._rng.randint(1, 999)
        for start in range(0, len(data), size):
            if how == "slowly":
                time.sleep(0.02)
            yield data[start : start + size]

    def _frames(self, call: int) -> Iterator[bytes]:
        for _ in range(self._rng.choice([1, 1, 1, 2, 5])):
            number = call if self._rng.random() < 0.8 else self._rng.randrange(2**32)
            yield from self._rng.choice([self._right, self._odd, self._odd, self._error, self._flood, self._garbage])(
                number
            )

    def _right(self, call: int) -> Iterator[bytes]:
        head = TensorHead("float32", (2, SMALL_WIDTH), 0, 8 * SMALL_WIDTH)
        yield encode_frame(OPEN, call, encode_opening(Opening("", "", encode_header(ReplyHeader()), (head,))))
        yield encode_frame(DATA, call, bytes(head.size_bytes))

    def _odd(self, call: int) -> Iterator[bytes]:
        rng = self._rng
        heads = tuple(
            TensorHead(
                rng.choice(["float32", "float32", "bool", "int64", "bfloat16", "float99", ""]),
                tuple(rng.choice([0, 1, 2, SMALL_WIDTH, 2**31, 2**61]) for _ in range(rng.choice([0, 1, 2, 2, 70]))),
                rng.choice([0, 0, 0, 1, 2, 5, 99]),
                rng.choice([0, 8, 8 * SMALL_WIDTH, 8 * SMALL_WIDTH, 2**16, 2**26, 2**40, 2**63]),
            )
            for _ in range(rng.choice([0, 1, 1, 2, 100]))
        )
        header = rng.choice(
            [encode_header(ReplyHeader()), b"", b"\xc1", encode_header(ReplyHeader(has_grad=(True,) * 9))]
        )
        with contextlib.suppress(Exception):  # not all of these can even be written
            yield encode_frame(OPEN, call, encode_opening(Opening("", "", header, heads)))
            yield encode_frame(DATA, call, rng.randbytes(rng.choice([1, 8, 8 * SMALL_WIDTH, 2**16])))

    def _error(self, call: int) -> Iterator[bytes]:
        code = self._rng.choice(
            ["schema", "config", "overloaded", "lifecycle", "nonsense", "reply_too_large", "not_held"]
        )
        header = encode_header(
            ReplyHeader(error=WireError(code=code, message=self._rng.choice(["", "x" * 2000, "\0[red]"])))
        )
        yield encode_frame(OPEN, call, encode_opening(Opening("", "", header, ())))

    def _flood(self, call: int) -> Iterator[bytes]:
        yield encode_frame(CANCEL, call) * self._rng.choice([1, 1000])
        yield from self._odd(call)

    def _garbage(self, call: int) -> Iterator[bytes]:
        kind = self._rng.choice([OPEN, DATA, HELLO, WELCOME, 0, 200])
        yield HEADER.pack(kind, call, self._rng.choice([0, 5, 2**20, 2**31])) + self._rng.randbytes(
            self._rng.choice([0, 5, 300])
        )


def check_call(client: DirectClient, request: Request, call: Call) -> bool:
    """Make a call, as those do that wait for it.

    :returns: whether there was an answer
    """
    begin = time.monotonic()
    try:
        reply: Reply = client.call_blocking(call, TIMEOUT_S)
        (output,) = request.outputs(reply, 2, Anybody())
        assert output.shape == (2, SMALL_WIDTH) and output.dtype == torch.float32
        return True
    except MoEError:
        return False
    finally:
        assert time.monotonic() - begin < TIMEOUT_S + 5.0


def test_whatever_a_server_sends_a_call_ends_in_time() -> None:
    row = BatchTensorProto(SMALL_WIDTH)
    chain = Chain.single("e.0", ExpertSchema((row,), {}, row), ())
    request = Request(None, chain, ClientConfig())  # type: ignore[arg-type]  # nothing is sent by it
    terms = Terms(native=True, chains=True, holds=False, max_rows=64, max_bytes=2**20)
    call = request.forward_call(Anybody(), terms, [torch.ones(2, SMALL_WIDTH)], 2, TIMEOUT_S)
    loop = EventLoopThread("moe-test-client")
    rng = random.Random(SEED)
    answers = calls = 0
    before, until = 0, time.monotonic() + SECONDS
    try:
        while time.monotonic() < until:
            ours, theirs = socket.socketpair()
            server = HostileServer(random.Random(rng.random()), theirs)

            async def connect(sock: socket.socket = ours) -> DirectClient:
                return DirectClient(sock, "hostile", lambda _: None)

            client = loop.run(connect(), 10.0)
            for _ in range(rng.randint(1, 5)):
                calls += 1
                answers += check_call(client, request, call)

            async def close(client: DirectClient = client) -> None:
                client.close()

            loop.run(close(), 10.0)
            server.end()
            assert not client._waiting
            if not before and calls > 20:
                before = held_bytes()
    finally:
        loop.stop()
    del client, server
    assert 0 < answers < calls, f"seed {SEED}: {calls} calls, {answers} answered"
    assert held_bytes() - before < 64 * MIB
