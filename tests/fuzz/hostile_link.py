"""Hostile clients of the direct link: raw frames over an authenticated socket, in a process that dies when it likes."""

from __future__ import annotations

import contextlib
import os
import random
import select
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from moe.errors import MoEError
from moe.transport.direct import dial
from moe.transport.link import LinkSocket
from moe.transport.tickets import Ticket
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
from moe.wire.messages import BlockInputs, RequestHeader, encode_header
from tests.fuzz.experts import FFN_WIDTH, HOSTILE_SLOTS, NOP_WIDTH, SLOTS, SMALL_WIDTH

CHUNK = 2**20
ITEM_BYTES = {"float32": 4, "int64": 8, "bool": 1, "bfloat16": 2, "float16": 2, "float64": 8, "uint8": 1}
CODECS = range(1, 6)
MAX_ROUND_S = 1.2  # of one behaviour


class Request(NamedTuple):
    """A request as it could be sent."""

    method: str
    uid: str
    header: RequestHeader | None
    heads: list[TensorHead]

    @property
    def size_bytes(self) -> int:
        """Of its tensors."""
        return sum(head.size_bytes for head in self.heads)

    def opening(self, call: int) -> bytes:
        """Its first frame."""
        header = b"" if self.header is None else encode_header(self.header)
        return encode_frame(OPEN, call, encode_opening(Opening(self.method, self.uid, header, tuple(self.heads))))

    def data(self, call: int) -> Iterator[bytes]:
        """The frames of its tensors; all zeros, which trains nobody else's weight."""
        left = self.size_bytes
        while left:
            size = min(left, CHUNK)
            yield HEADER.pack(DATA, call, size) + bytes(size)
            left -= size


def head(*shape: int, dtype: str = "float32", codec: int = 0, size: int | None = None) -> TensorHead:
    """What announces a tensor.

    :param size: bytes, if not what the shape takes
    """
    count = 1
    for axis in shape:
        count *= axis
    return TensorHead(dtype, shape, codec, min(count * ITEM_BYTES[dtype], 2**61) if size is None else size)


def random_request(rng: random.Random, rows: int | None = None) -> Request:
    """A well-formed request for one of the experts."""
    method = rng.choice(("forward", "forward", "backward"))
    uid = rng.choice(("nop.0", "nop.0", "wide.0", "mixer.0", "adapted.0", "slots.0", "ffn.0", "nap.0"))
    rows = rng.choice((0, 1, 2, 8, 300, 2000)) if rows is None else rows
    present: tuple[str, ...] = ()
    if uid == "mixer.0":
        length = rng.choice((0, 1, 9, 100))
        rows = min(rows, 300)
        inputs = [head(rows, length, SMALL_WIDTH), head(rows, dtype="int64"), head(rows, length, dtype="bool")]
        outputs = inputs[:1]
    elif uid == "adapted.0":
        rank, present = rng.choice((0, 1, 64, 2000)), ("lora_a", "lora_b")
        inputs = [head(rows, FFN_WIDTH), head(FFN_WIDTH, rank), head(rank, 4 * FFN_WIDTH)]
        outputs = inputs[:1]
    else:
        widths = {"nop.0": NOP_WIDTH, "slots.0": SLOTS, "ffn.0": FFN_WIDTH}
        rows = min(rows, 8) if uid == "wide.0" else rows
        inputs = [head(rows, widths.get(uid, SMALL_WIDTH))]
        outputs = [head(rows, 2**18)] if uid == "wide.0" else inputs
    header = RequestHeader(
        request_id=rng.randbytes(16) if rng.random() < 0.9 else None,
        time_left_s=rng.choice((None, 3.0, 0.5, 0.01)),
        present=present,
        keep=method == "forward" and rng.random() < 0.4,
        hold=(1, 2) if uid == "adapted.0" and rng.random() < 0.5 else (),
        wants_grad=None if method == "forward" or rng.random() < 0.5 else tuple(rng.random() < 0.5 for _ in inputs),
    )
    return Request(method, uid, header, [*inputs, *outputs] if method == "backward" else inputs)


class Attacker:
    """One process's means.

    :param tickets: each opens one link
    """

    def __init__(self, rng: random.Random, tickets: Sequence[Ticket], until: float):
        self.rng, self._tickets, self.until = rng, list(tickets), until
        self._sockets: list[LinkSocket] = []

    @property
    def has_time(self) -> bool:
        """False if it should end."""
        return time.monotonic() < self.until

    def link(self) -> LinkSocket:
        """A new link."""
        sock = dial(self._tickets.pop(), self.rng.choice(("unix", "tls")))
        sock.settimeout(0.3)
        self._sockets.append(sock)
        return sock

    def stranger(self) -> socket.socket:
        """A connection without a ticket that is shown."""
        ticket = self._tickets[-1]
        if self.rng.random() < 0.5:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.settimeout(0.3)
            sock.connect(ticket.unix_path)
        else:
            sock = socket.create_connection(ticket.addresses[-1], timeout=0.3)
        self._sockets.append(sock)
        return sock

    def send(self, sock: LinkSocket, *frames: bytes) -> bool:
        """False if the server does not take it all."""
        try:
            sock.sendall(b"".join(frames))
            return True
        except OSError:
            return False

    def send_request(self, sock: LinkSocket, call: int, request: Request, share: float = 1.0) -> bool:
        """A request, or the beginning of one."""
        if not self.send(sock, request.opening(call)):
            return False
        left = int(share * request.size_bytes)
        for frame in request.data(call):
            if left <= 0 or not self.send(sock, frame[: HEADER.size + left]):
                return False
            left -= CHUNK
        return True

    def drain(self, sock: LinkSocket, seconds: float) -> None:
        """Read what comes."""
        deadline = time.monotonic() + seconds
        try:
            while (left_s := deadline - time.monotonic()) > 0:
                sock.settimeout(left_s)
                if not sock.recv(2**18):
                    return
        except OSError:
            pass
        finally:
            sock.settimeout(0.3)

    def leave(self) -> None:
        """End all connections: some politely, some with a reset, some with the whole process."""
        chance = self.rng.random()
        if chance < 0.15:
            os.kill(os.getpid(), signal.SIGKILL)
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                if chance < 0.5 and sock.family != socket.AF_UNIX:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                elif chance < 0.6:
                    sock.shutdown(socket.SHUT_WR)
                elif chance < 0.7:
                    sock.shutdown(socket.SHUT_RD)
        self.close()

    def close(self) -> None:
        """End all connections."""
        for sock in self._sockets:
            sock.close()
        self._sockets.clear()


Behaviour = Callable[[Attacker], None]
BEHAVIOURS: dict[str, Behaviour] = {}


def behaviour(attack: Behaviour) -> Behaviour:
    """One of the things that a hostile client does."""
    BEHAVIOURS[attack.__name__] = attack
    return attack


@behaviour
def work(attacker: Attacker) -> None:
    """Ordinary calls, many at a time, whose answers are read."""
    sock = attacker.link()
    for call in range(1, attacker.rng.randint(2, 40)):
        attacker.send_request(sock, call, random_request(attacker.rng))
        if attacker.rng.random() < 0.2:
            attacker.drain(sock, 0.02)
    attacker.drain(sock, attacker.rng.choice((0.0, 0.1, 0.5)))


@behaviour
def open_and_never_send(attacker: Attacker) -> None:
    sock = attacker.link()
    attacker.send(sock, *(random_request(attacker.rng, 2000).opening(call) for call in range(1, 60)))
    attacker.drain(sock, attacker.rng.random() * MAX_ROUND_S)


@behaviour
def send_a_part(attacker: Attacker) -> None:
    sock = attacker.link()
    for call in range(1, attacker.rng.randint(2, 12)):
        attacker.send_request(sock, call, random_request(attacker.rng), attacker.rng.random())
    time.sleep(attacker.rng.random() * MAX_ROUND_S)


@behaviour
def half_a_frame(attacker: Attacker) -> None:
    sock = attacker.link()
    frame = random_request(attacker.rng).opening(1)
    attacker.send(sock, frame[: attacker.rng.randrange(len(frame))])
    time.sleep(attacker.rng.random() * MAX_ROUND_S / 2)


@behaviour
def trickle(attacker: Attacker) -> None:
    sock = attacker.link()
    request = random_request(attacker.rng, 8)
    data = request.opening(1) + b"".join(request.data(1))
    end = time.monotonic() + MAX_ROUND_S
    for byte in data:
        if time.monotonic() > end or not attacker.send(sock, bytes([byte])):
            return
        time.sleep(attacker.rng.choice((0.0, 0.001, 0.05)))


@behaviour
def flood_refused(attacker: Attacker) -> None:
    """Requests that are refused, with tensors announced that are never sent, or that are."""
    sock, rng = attacker.link(), attacker.rng
    for call in range(1, 3000):
        heads = [head(2 ** rng.randint(0, 12), NOP_WIDTH)]
        request = Request("forward", rng.choice(("no.such", "nop.0 nop.0", "ffn.0", "")), RequestHeader(), heads)
        sent = attacker.send(sock, request.opening(call))
        if rng.random() < 0.02:
            sent = attacker.send_request(sock, call + 10_000, request)
        if not sent or not attacker.has_time:
            return
        if rng.random() < 0.05:
            attacker.drain(sock, 0.001)


@behaviour
def flood_cancels(attacker: Attacker) -> None:
    sock = attacker.link()
    for _ in range(20):
        if not attacker.send(sock, *(encode_frame(CANCEL, attacker.rng.getrandbits(32)) for _ in range(2000))):
            return


@behaviour
def cancel_at_once(attacker: Attacker) -> None:
    """Whole requests, cancelled before they are answered; the next ones come in the same write."""
    sock, rng = attacker.link(), attacker.rng
    for call in range(1, rng.randint(3, 30)):
        request = random_request(rng)
        attacker.send_request(sock, call, request, rng.choice((0.0, 0.5, 1.0, 1.0)))
        time.sleep(rng.choice((0.0, 0.0, 0.005)))
        attacker.send(sock, encode_frame(CANCEL, call), random_request(rng, 2000).opening(call + 1000))
        if rng.random() < 0.3:
            attacker.drain(sock, 0.01)


@behaviour
def hang_up_behind_a_burst(attacker: Attacker) -> None:
    """Cancels whose confirmation cannot be sent any more, and new requests behind them in one read."""
    sock, rng = attacker.link(), attacker.rng
    frames = [random_request(rng, 2000).opening(call) for call in range(1, 20)]
    frames += [encode_frame(CANCEL, 1)] * 3
    frames += [random_request(rng, 2000).opening(call) for call in range(100, 300)]
    attacker.send(sock, *frames)


@behaviour
def read_nothing(attacker: Attacker) -> None:
    sock = attacker.link()
    for call in range(1, 40):
        request = Request("forward", "wide.0", RequestHeader(), [head(8, SMALL_WIDTH)])
        if not attacker.send_request(sock, call, request):
            break
    time.sleep(attacker.rng.random() * 2 * MAX_ROUND_S)


@behaviour
def sip(attacker: Attacker) -> None:
    """Large answers, read a little now and then."""
    sock, end = attacker.link(), time.monotonic() + 2 * MAX_ROUND_S
    call = 0
    while time.monotonic() < end and attacker.has_time:
        call += 1
        request = Request("forward", "wide.0", RequestHeader(), [head(8, SMALL_WIDTH)])
        if not attacker.send_request(sock, call, request):
            return
        time.sleep(0.02)
        if call % 8 == 0 and select.select([sock], [], [], 0)[0]:
            try:
                sock.recv(attacker.rng.choice((1, 1000, 2**16)))
            except OSError:
                return


@behaviour
def reset_in_the_middle(attacker: Attacker) -> None:
    """Gone with an unread answer, in the middle of an upload."""
    sock = attacker.link()
    attacker.send_request(sock, 1, Request("forward", "wide.0", RequestHeader(), [head(8, SMALL_WIDTH)]))
    attacker.send_request(sock, 2, Request("forward", "no.such", None, []))
    attacker.send_request(sock, 3, random_request(attacker.rng, 2000), attacker.rng.random())
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@behaviour
def garbage(attacker: Attacker) -> None:
    sock, rng = attacker.link(), attacker.rng
    if rng.random() < 0.5:
        attacker.send(sock, rng.randbytes(rng.randint(1, 2**17)))
    else:
        kind = rng.choice((0, HELLO, WELCOME, OPEN, DATA, CANCEL, 200))
        size = rng.choice((0, 1, 2**14, 2**20, 2**20 + 1, 2**40, 2**63))
        attacker.send(sock, HEADER.pack(kind, rng.getrandbits(32), size), rng.randbytes(min(size, 2**16)))
    attacker.drain(sock, 0.05)


@behaviour
def data_out_of_order(attacker: Attacker) -> None:
    """Frames of several calls, each call's in order, or not, or before it is opened."""
    sock, rng = attacker.link(), attacker.rng
    queues = []
    for call in range(1, rng.randint(3, 10)):
        request = random_request(rng)
        queues.append([request.opening(call), *request.data(call)])
    frames = []
    while queues:
        queue = rng.choice(queues)
        frames.append(queue.pop(0))
        queues = [queue for queue in queues if queue]
    if rng.random() < 0.3:
        at = rng.randrange(len(frames))
        frames.insert(rng.randrange(len(frames)), frames.pop(at))
    for frame in frames:
        if not attacker.send(sock, frame):
            return
    attacker.drain(sock, 0.2)


@behaviour
def reuse_ids(attacker: Attacker) -> None:
    sock, rng = attacker.link(), attacker.rng
    for _ in range(rng.randint(2, 40)):
        if not attacker.send_request(sock, rng.randint(1, 3), random_request(rng, rng.choice((0, 1, 300)))):
            break
        if rng.random() < 0.3:
            attacker.send(sock, encode_frame(CANCEL, rng.randint(1, 3)))
        attacker.drain(sock, 0.01)


@behaviour
def impossible_shapes(attacker: Attacker) -> None:
    """No rows of any length; axes that overflow; announced sizes that are not the shape's."""
    sock, rng = attacker.link(), attacker.rng
    for call in range(1, 60):
        long = rng.choice((2**20, 2**31, 2**40, 2**61))
        mixed = [head(0, long, 8), head(0, dtype="int64"), head(0, long, dtype="bool")]
        requests = [
            Request("forward", "mixer.0", RequestHeader(), mixed),
            Request("forward", "mixer.0", RequestHeader(), [head(0, long, long, size=0)]),
            Request("forward", "nop.0", RequestHeader(), [head(long, NOP_WIDTH, size=rng.choice((0, 1, 2**61)))]),
            Request("forward", "nop.0", RequestHeader(), [head(*[1] * rng.randint(3, 64), dtype=rng.choice(list(ITEM_BYTES)))]),
            Request("backward", "adapted.0", RequestHeader(present=("lora_a", "lora_b")),
                    [head(0, FFN_WIDTH), head(FFN_WIDTH, 0), head(0, 4 * FFN_WIDTH), head(0, FFN_WIDTH)]),
        ]  # fmt: skip
        request = rng.choice(requests)
        if not attacker.send(sock, request.opening(call), *(request.data(call) if request.size_bytes < 2**24 else ())):
            break
    attacker.drain(sock, 0.3)


@behaviour
def lossy_bombs(attacker: Attacker) -> None:
    """Compressed tensors whose tables make far more of them than was announced."""
    sock, rng = attacker.link(), attacker.rng
    for call in range(1, 12):
        rows, codec = rng.choice((1, 16, 64, 400)), rng.choice(CODECS)
        most = 4 * rows * NOP_WIDTH
        scales = (most - 24) // 4
        tables = struct.pack("<qq", scales, 1) if codec == 5 else struct.pack("<q", rng.choice((0, 1, 256, most // 8)))
        blob = (tables + rng.randbytes(256) + bytes(most))[: rng.choice((most, most // 2, most // 4 + 2048))]
        announced = head(rows, NOP_WIDTH, codec=codec, size=len(blob))
        request = Request("forward", "nop.0", RequestHeader(), [announced])
        if not attacker.send(sock, request.opening(call)):
            break
        for begin in range(0, len(blob), CHUNK):
            piece = blob[begin : begin + CHUNK]
            attacker.send(sock, HEADER.pack(DATA, call, len(piece)) + piece)
    attacker.drain(sock, 0.4)


@behaviour
def strange_headers(attacker: Attacker) -> None:
    sock, rng = attacker.link(), attacker.rng
    for call in range(1, 40):
        request = random_request(rng, 1)
        headers = [
            RequestHeader(time_left_s=rng.choice((0.0, 1e308, float("inf"), 1e-9))),
            RequestHeader(wants_grad=tuple([True] * rng.randint(0, 4096))),
            RequestHeader(held={rng.randrange(4096): rng.randbytes(rng.randint(16, 32)) for _ in range(200)}),
            RequestHeader(hold=tuple(range(500)), keep=True, request_id=rng.randbytes(16)),
            RequestHeader(present=tuple(f"{i}" for i in range(rng.randint(0, 4000)))),
            RequestHeader(metadata={f"{i}": "x" * 50 for i in range(60)}),
            RequestHeader(chain=tuple(BlockInputs(tensors=(rng.randrange(4096),)) for _ in range(rng.randint(1, 256)))),
        ]
        header = rng.choice(headers)
        uid = " ".join(["ffn.0"] * len(header.chain)) if header.chain else request.uid
        if not attacker.send_request(sock, call, request._replace(header=header, uid=uid)):
            break
        raw = rng.randbytes(rng.randint(1, 200))
        opening = Opening("forward", request.uid, raw, tuple(request.heads))
        if rng.random() < 0.3 and not attacker.send(sock, encode_frame(OPEN, call + 1000, encode_opening(opening))):
            break
    attacker.drain(sock, 0.3)


@behaviour
def long_chains(attacker: Attacker) -> None:
    """Much work for a small request."""
    sock, rng = attacker.link(), attacker.rng
    for call in range(1, 10):
        count = rng.choice((2, 16, 256))
        chain = tuple(BlockInputs(request_id=rng.randbytes(16)) for _ in range(count))
        method = rng.choice(("forward", "backward"))
        heads = [head(300, FFN_WIDTH)] * (2 if method == "backward" else 1)
        header = RequestHeader(chain=chain, time_left_s=rng.choice((0.1, None)))
        attacker.send_request(sock, call, Request(method, " ".join(["ffn.0"] * count), header, heads))
    attacker.drain(sock, 0.3)


@behaviour
def poison(attacker: Attacker) -> None:
    """Gradients that are not finite; repeats of one request; the owner's weights must stay what they are."""
    sock, rng = attacker.link(), attacker.rng
    same = rng.randbytes(16)
    for call in range(1, 12):
        uid, width = rng.choice((("ffn.0", FFN_WIDTH), ("slots.0", SLOTS)))
        header = RequestHeader(request_id=rng.choice((same, rng.randbytes(16))))
        request = Request("backward", uid, header, [head(1, width), head(1, width)])
        value = rng.choice((float("nan"), float("inf")))
        x = struct.pack(f"<{width}f", *(value if i < HOSTILE_SLOTS else 0.0 for i in range(width)))
        grad = struct.pack(f"<{width}f", *([value] * width))
        attacker.send(sock, request.opening(call), HEADER.pack(DATA, call, len(x + grad)), x, grad)
    attacker.drain(sock, 0.3)


@behaviour
def evict(attacker: Attacker) -> None:
    """Many small backwards, so that others' ids are forgotten."""
    sock, rng = attacker.link(), attacker.rng
    for call in range(1, 1500):
        request = Request(
            "backward",
            "slots.0",
            RequestHeader(request_id=rng.randbytes(16), wants_grad=(False,)),
            [head(0, SLOTS)] * 2,
        )
        if not attacker.send(sock, request.opening(call)):
            return
        if call % 100 == 0:
            attacker.drain(sock, 0.01)


@behaviour
def keep_and_refer(attacker: Attacker) -> None:
    """Forwards that are kept, backwards that refer to them, also to those of other experts, or to nothing."""
    sock, rng = attacker.link(), attacker.rng
    ids = [rng.randbytes(16) for _ in range(3)]
    for call in range(1, 30):
        uid, width = rng.choice((("nop.0", NOP_WIDTH), ("slots.0", SLOTS)))
        if rng.random() < 0.5:
            request = Request("forward", uid, RequestHeader(request_id=rng.choice(ids), keep=True), [head(300, width)])
        else:
            header = RequestHeader(request_id=rng.randbytes(16), held={0: rng.choice(ids)})
            request = Request("backward", uid, header, [head(300, width)])
        if not attacker.send_request(sock, call, request):
            break
        attacker.drain(sock, 0.02)


@behaviour
def strangers(attacker: Attacker) -> None:
    """Connections without a ticket: silent, slow, wrong."""
    rng = attacker.rng
    socks = []
    try:
        for _ in range(rng.randint(1, 12)):
            socks.append(attacker.stranger())
        for sock in socks:
            choice = rng.random()
            if choice < 0.3:
                attacker.send(sock, rng.randbytes(rng.randint(1, 100)))
            elif choice < 0.6:
                attacker.send(sock, encode_frame(HELLO, 0, rng.randbytes(32)))
        for _ in range(6):
            for sock in socks:
                attacker.send(sock, b"\x16")
            time.sleep(0.15)
    except OSError:
        pass


@behaviour
def many_links(attacker: Attacker) -> None:
    """More links than a peer may have: the oldest ones are closed, with what they carry."""
    for _ in range(9):
        sock = attacker.link()
        attacker.send_request(sock, 1, random_request(attacker.rng), attacker.rng.choice((0.3, 1.0)))


def attack(tickets: Sequence[Ticket], seed: int, seconds: float, only: Sequence[str]) -> None:
    """One hostile client, until it is out of time or tickets, or kills itself."""
    rng = random.Random(seed)
    attacker = Attacker(rng, tickets, time.monotonic() + seconds)
    names = list(only or BEHAVIOURS)
    try:
        while attacker.has_time:
            BEHAVIOURS[rng.choice(names)](attacker)
            attacker.leave()
    except (IndexError, OSError, MoEError):  # no more tickets, or the server has had enough
        pass
    attacker.leave()
