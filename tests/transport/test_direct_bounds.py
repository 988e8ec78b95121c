"""Bounds of a server's links, against peers with tickets and no manners: memory, time, and an answer to everything.

The service behind them is a simple one, which counts what it admits and does what a request's uid says.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import pytest
import torch

from moe.errors import ExpertFailed, MoEError, Overloaded, PeerGone, ProtocolError, Refused
from moe.schema import Compression
from moe.transport import direct as direct_module
from moe.transport import handshakes
from moe.transport import link as link_module
from moe.transport.base import FORWARD, Call, Reply
from moe.transport.direct import (
    MAX_LINK_WEIGHT,
    DirectClient,
    DirectServer,
    _encoding_is_work,
    _restoring_is_work,
    dial,
)
from moe.transport.event_loop import EventLoopThread
from moe.transport.inflight import InflightBytes
from moe.transport.tickets import Ticket
from moe.wire.frames import (
    CANCEL,
    DATA,
    HEADER,
    HEADER_BYTES,
    OPEN,
    Opening,
    TensorHead,
    decode_opening,
    encode_frame,
    encode_opening,
)
from moe.wire.messages import ExpertDescription, RequestHeader, WireError, decode_reply_header, encode_header
from tests.docs.markdown import ROOT, table_of
from tests.leaks import held_bytes, resident_bytes

MIB = 2**20


class Admission:
    """Admits any tensor; ``uid`` says what becomes of it: "echo", "hold", "raise in WHERE", "fail in WHERE"."""

    def __init__(self, service: Service, peer: str, uid: str, deadline: float):
        self.service, self.uid, self.deadline = service, uid, deadline
        self.reservation = service.inflight.reserve(peer, 0, "request")
        self.released = 0

    def _maybe_raise(self, where: str) -> None:
        if self.uid == f"raise in {where}":
            raise self.service.error
        if self.uid == f"fail in {where}":
            raise Refused("not this one")

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        self._maybe_raise("admit")
        size = 4
        for length in shape:
            size *= length
        self.reservation.grow(size)
        return size

    async def run(self, tensors: Sequence[torch.Tensor]) -> Reply:
        self._maybe_raise("run")
        if self.uid == "hold":
            await asyncio.get_running_loop().run_in_executor(None, self.service.go_on.wait)
        if self.uid == "odd":
            return Reply(None, [tensors[0].to_sparse()], [0])
        if self.uid == "large":
            return Reply(None, [torch.zeros(16 * MIB // 4)], [0])
        return Reply(None, list(tensors), [0] * len(tensors))

    def start(self, tensors: Sequence[torch.Tensor], answer: Callable[[Reply | MoEError], None]) -> bool:
        self._maybe_raise("start")
        if self.uid == "echo":
            threading.Thread(target=answer, args=(Reply(None, list(tensors), [0] * len(tensors)),)).start()
            return True
        return False

    def release(self) -> None:
        self.released += 1
        self.reservation.done_with("request")
        self._maybe_raise("release")


class Service:
    def __init__(self, max_bytes: int = 2**30, share_bytes: int = 2**29, read_timeout_s: float = 30.0):
        self.inflight = InflightBytes(max_bytes, share_bytes)
        self.read_timeout_s = read_timeout_s
        self.request_timeout_s = 30.0
        self.admissions: list[Admission] = []
        self.error: BaseException = RuntimeError("a bug")
        self.go_on = threading.Event()

    def describe(self, uid: str) -> ExpertDescription:
        raise NotImplementedError

    def open(self, peer: str, method: str, uid: str, header: RequestHeader | None) -> Admission:
        if uid == "raise in open":
            raise self.error
        limit_s = self.request_timeout_s
        if header is not None and header.time_left_s is not None:
            limit_s = min(limit_s, header.time_left_s)
        self.admissions.append(Admission(self, peer, uid, time.monotonic() + limit_s))
        return self.admissions[-1]


class Host:
    def __init__(self, service: Service):
        self.service = service
        self.loop, self.client_loop = EventLoopThread("moe-test-server"), EventLoopThread("moe-test-client")
        self.direct = DirectServer(service, hosts=["127.0.0.1"], listen_host="127.0.0.1")

    def __enter__(self) -> Host:
        self.loop.run(self.direct.start(), 10.0)
        return self

    def __exit__(self, *exc: object) -> None:
        self.service.go_on.set()
        self.loop.run(self.direct.stop(0.0), 10.0)
        self.client_loop.stop()
        self.loop.stop()

    def ticket(self, peer: str) -> Ticket:
        async def issue() -> Ticket:
            return self.direct.ticket(peer)

        return self.loop.run(issue(), 5.0)

    def raw(self, peer: str = "mallory", kind: str = "unix") -> socket.socket:
        sock = dial(self.ticket(peer), kind)
        sock.settimeout(5.0)
        return sock

    @contextlib.contextmanager
    def client(self, kind: str = "unix", peer: str = "honest") -> Iterator[DirectClient]:
        async def connect() -> DirectClient:
            return DirectClient(dial(self.ticket(peer), kind), "server", lambda _: None)

        async def close(client: DirectClient) -> None:
            client.close()

        client = self.client_loop.run(connect(), 10.0)
        try:
            yield client
        finally:
            self.client_loop.run(close(client), 10.0)

    def nothing_left(self, *, links: int = 0, seconds: float = 2.0) -> None:
        """Every admission was released, all bytes given back, all links closed."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and (self.service.inflight._shares or self.direct.links > links):
            time.sleep(0.01)
        assert self.service.inflight.bytes == 0
        assert not self.service.inflight._shares
        assert self.direct.links <= links
        assert all(admission.released for admission in self.service.admissions)
        for link in self.direct._links:
            assert not (link._arriving or link._serving or link._weight)


@pytest.fixture
def host() -> Iterator[Host]:
    with Host(Service()) as host:
        yield host


def call(uid: str, x: torch.Tensor, time_left_s: float | None = None) -> Call:
    return Call(FORWARD, uid, RequestHeader(time_left_s=time_left_s), [x], [0], x.nbytes)


def open_frame(number: int, uid: str, *lengths: int, header: RequestHeader | None = None) -> bytes:
    heads = tuple(TensorHead("float32", (length,), 0, 4 * length) for length in lengths)
    return encode_frame(
        OPEN, number, encode_opening(Opening(FORWARD, uid, encode_header(header or RequestHeader()), heads))
    )


def data(number: int, size: int) -> bytes:
    return b"".join(
        HEADER.pack(DATA, number, min(MIB, size - at)) + bytes(min(MIB, size - at)) for at in range(0, size, MIB)
    )


def frames(sock: socket.socket, count: int) -> Iterator[tuple[int, int, bytes]]:
    """The next frames: kind, call, payload."""
    stream = sock.makefile("rb")
    for _ in range(count):
        kind, number, length = HEADER.unpack(stream.read(HEADER_BYTES))
        yield kind, number, stream.read(length)


def error_of(payload: bytes) -> WireError:
    header = decode_reply_header(decode_opening(payload).header)
    assert header is not None
    assert header.error is not None
    return header.error


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not condition():
        time.sleep(0.01)
    return condition()


def test_bounds_are_those_of_the_documentation() -> None:
    for name, bound, _ in table_of(ROOT / "docs" / "protocol.md", "bounds of a link"):
        number, _, unit = bound.partition(" ")
        value = int(number) * (MIB if unit == "MiB" else 1)
        assert value == next(
            getattr(module, name.strip("`"))
            for module in (direct_module, link_module, handshakes)
            if hasattr(module, name.strip("`"))
        )


# --- an answer to everything -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), MemoryError(), KeyError("token"), SystemExit(1), OverflowError()]
)
@pytest.mark.parametrize("where", ["open", "admit", "start", "run"])
def test_whatever_a_service_raises_is_an_answer_and_the_link_lives_on(where: str, error: BaseException) -> None:
    service = Service()
    service.error = error
    with Host(service) as host, host.client() as client:
        for rows in (1, 0, 100_000):
            with pytest.raises(Overloaded if isinstance(error, MemoryError) else ExpertFailed, match="the request can"):
                client.call_blocking(call(f"raise in {where}", torch.ones(rows)), 10.0)
        if where != "open":
            with pytest.raises(Refused):
                client.call_blocking(call(f"fail in {where}", torch.ones(3)), 10.0)
        assert client.call_blocking(call("echo", torch.ones(3)), 10.0).tensors[0].tolist() == [1, 1, 1]
        host.nothing_left(links=1)


def test_a_release_that_raises_harms_nobody(host: Host) -> None:
    with host.client() as client:
        for _ in range(3):
            assert client.call_blocking(call("raise in release", torch.ones(3)), 10.0).tensors[0].shape == (3,)
        host.nothing_left(links=1)


@pytest.mark.parametrize("rows", [1, 400_000])
def test_an_answer_that_cannot_be_sent_is_an_error(host: Host, rows: int) -> None:
    with host.client() as client, pytest.raises(ExpertFailed, match="cannot be answered: RuntimeError"):
        client.call_blocking(call("odd", torch.ones(rows)), 10.0)


@pytest.mark.parametrize("shape", [(0, 2**61, 2**61), (2**61, 0), (2**31, 2**31), (1,) * 64, (0,) * 64])
def test_shapes_that_nobody_can_have_are_answered(host: Host, shape: tuple[int, ...]) -> None:
    sock = host.raw()
    heads = (TensorHead("float32", shape, 0, 0),)
    for number, uid in ((1, "echo"), (2, "run")):
        sock.sendall(
            encode_frame(OPEN, number, encode_opening(Opening(FORWARD, uid, encode_header(RequestHeader()), heads)))
        )
    assert {number for _, number, _ in frames(sock, 2)} == {1, 2}
    host.nothing_left(links=1)


def test_a_reply_of_a_shape_that_nobody_can_have_is_an_error_of_the_call(host: Host) -> None:
    ours, theirs = socket.socketpair()

    async def connect() -> DirectClient:
        return DirectClient(ours, "server", lambda _: None)

    client = host.client_loop.run(connect(), 10.0)
    answer = Opening("", "", b"", (TensorHead("float32", (0, 2**61, 2**61), 0, 0),))
    theirs.sendall(encode_frame(OPEN, 1, encode_opening(answer)))
    with pytest.raises(MoEError):
        client.call_blocking(call("echo", torch.ones(1)), 1.0)
    host.client_loop.loop.call_soon_threadsafe(client.close)
    theirs.close()


# --- what ends is ended ----------------------------------------------------------------------------------------------------


def test_a_request_withdrawn_before_it_was_begun_is_released(host: Host) -> None:
    """A task that is cancelled before its first step never runs."""
    sock = host.raw()
    sock.sendall(b"".join(open_frame(n, "run", 4) + data(n, 16) + encode_frame(CANCEL, n) for n in range(1, 50)))
    host.nothing_left(links=1)
    sock.close()
    host.nothing_left()


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_a_burst_and_a_hang_up_leave_nothing(host: Host, kind: str) -> None:
    for _ in range(5):
        with host.raw(kind=kind) as sock:
            burst = b"".join(open_frame(n, "hold", 2**18) for n in range(2, 300))
            sock.sendall(encode_frame(CANCEL, 1) + burst + data(2, MIB))
    host.service.go_on.set()
    host.nothing_left()


def say_in_a_process(ticket: Ticket, kind: str, said: bytes) -> int:
    """Start a process that says something over a link of its own and then waits to be killed."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            sock = dial(ticket, kind)
            sock.sendall(said)
            os.write(write, b"said")
            time.sleep(60)
        os._exit(1)
    os.close(write)
    assert os.read(read, 4) == b"said"
    os.close(read)
    return child


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_a_process_killed_at_any_point_leaves_nothing(host: Host, kind: str) -> None:
    whole = open_frame(1, "echo", 4) + data(1, 16)
    points = [
        b"",
        whole[:7],
        whole[:30],
        whole[:-3],
        whole,
        open_frame(1, "large", 4) + data(1, 16),
        open_frame(1, "hold", 4) + data(1, 16) + open_frame(2, "hold", 2**20) + data(2, 2**16),
    ]
    descriptors = psutil.Process().num_fds()
    children = [say_in_a_process(host.ticket("mallory"), kind, point) for point in points]
    assert eventually(lambda: host.direct.links == len(points))
    for child in children:
        os.kill(child, signal.SIGKILL)
    for child in children:
        os.waitpid(child, 0)
    host.service.go_on.set()
    host.nothing_left(seconds=2.0)
    assert eventually(lambda: psutil.Process().num_fds() <= descriptors)


def test_a_request_that_does_not_arrive_within_its_time_is_refused_and_its_memory_freed(host: Host) -> None:
    sock = host.raw()
    header = RequestHeader(time_left_s=3.0)
    before = held_bytes()
    sock.sendall(open_frame(1, "echo", 16 * MIB, header=header) + data(1, 32 * MIB))
    assert eventually(lambda: host.service.inflight.bytes == 64 * MIB)
    assert eventually(lambda: resident_bytes() - before > 16 * MIB)
    ((kind, number, payload),) = frames(sock, 1)
    assert (kind, number, error_of(payload).code) == (OPEN, 1, "deadline")
    host.nothing_left(links=1)
    assert eventually(lambda: held_bytes() - before < 8 * MIB)
    sock.sendall(data(1, 32 * MIB) + open_frame(2, "echo", 1) + data(2, 4))  # the rest is not wanted, the link lives on
    assert next(frames(sock, 1))[1] == 2


def test_announced_and_never_sent(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    host.service.read_timeout_s = 0.5
    monkeypatch.setattr(link_module, "CHECK_PERIOD_S", 0.1)
    sock = host.raw()
    sock.sendall(b"".join(open_frame(n, "echo", 2**20) for n in range(1, 100)))
    assert eventually(lambda: host.service.inflight.bytes > 0)
    host.nothing_left(seconds=4.0)


# --- memory ----------------------------------------------------------------------------------------------------------------


def test_an_answer_counts_until_it_has_left(host: Host) -> None:
    sock = host.raw()
    sock.sendall(open_frame(1, "large", 1000) + data(1, 4000))
    time.sleep(0.3)
    assert host.service.inflight.bytes == 4000
    assert sum(len(payload) for kind, _, payload in frames(sock, 17) if kind == DATA) == 16 * MIB
    host.nothing_left(links=1)


def test_an_answer_that_is_not_read_in_its_callers_time_is_dropped(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct_module, "_SENDING_GRACE_S", 0.1)
    sock = host.raw()
    for n in range(1, 5):
        sock.sendall(open_frame(n, "large", 1, header=RequestHeader(time_left_s=0.5)) + data(n, 4))
    assert eventually(lambda: len(host.service.admissions) == 4)
    # of one of them a chunk is being written, and it is in use until then
    assert eventually(lambda: sum(not admission.released for admission in host.service.admissions) == 1)
    kinds: list[int] = []
    for kind, _, _ in frames(sock, 100):
        kinds.append(kind)
        if kinds.count(CANCEL) == 4:
            break
    assert kinds.count(OPEN) == 4
    assert kinds.count(DATA) < 20  # of 64
    host.nothing_left(links=1)


@pytest.mark.parametrize("reads", [False, True])
def test_a_peer_that_asks_and_hardly_reads_takes_its_share_and_no_more(reads: bool) -> None:
    """16 MiB are answered to each request of 4 bytes, of which the service counts 16 MiB."""
    service = Service(share_bytes=70 * MIB)
    admit = Admission.admit

    def count_answers(self: Admission, *args: Any) -> int:
        self.reservation.grow(16 * MIB, must_fit=False)
        return admit(self, *args)

    with Host(service) as host, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Admission, "admit", count_answers)
        sock, before = host.raw(), held_bytes()
        sock.settimeout(0.01)
        requests, sent = memoryview(b"".join(open_frame(n, "large", 1) + data(n, 4) for n in range(1, 5000))), 0
        deadline = time.monotonic() + 1.0
        while time.monotonic() < deadline:
            with contextlib.suppress(TimeoutError):
                sent += sock.send(requests[sent:])
            if reads:
                with contextlib.suppress(TimeoutError):
                    sock.recv(2**16)
        assert service.inflight.bytes < 96 * MIB
        assert held_bytes() - before < 256 * MIB
        with host.client() as client:  # others do not notice
            assert client.call_blocking(call("echo", torch.ones(3)), 10.0).tensors[0].shape == (3,)
        sock.close()
        host.nothing_left()


def test_a_peer_over_its_share_waits_and_is_not_refused() -> None:
    with Host(Service(share_bytes=8 * MIB)) as host, host.client() as client:
        replies = []

        def work() -> None:
            for _ in range(5):
                replies.append(client.call_blocking(call("run", torch.ones(MIB)), 20.0))

        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(replies) == 10


def test_calls_of_one_link_are_bounded_and_those_beyond_wait(host: Host) -> None:
    sock = host.raw()
    wanted = MAX_LINK_WEIGHT + 500
    stream = b"".join(open_frame(n, "hold", 1) + data(n, 4) for n in range(1, wanted + 1))
    sending = threading.Thread(target=sock.sendall, args=(stream,))
    sending.start()
    assert eventually(lambda: len(host.service.admissions) >= MAX_LINK_WEIGHT)
    time.sleep(0.2)
    assert len(host.service.admissions) == MAX_LINK_WEIGHT
    host.service.go_on.set()
    sending.join()
    answered = {number for kind, number, _ in frames(sock, 2 * wanted) if kind == OPEN}
    assert answered == set(range(1, wanted + 1))
    host.nothing_left(links=1, seconds=5.0)


def test_the_memory_of_a_link_is_what_the_documentation_says(host: Host) -> None:
    """All of it at once: calls served, calls refused, an opening that is not whole, answers that are not read."""
    refused = b"".join(open_frame(n, "fail in admit", 2**40) for n in range(1, 4001))
    served = b"".join(open_frame(n, "hold", 1) + data(n, 4) for n in range(5000, 5000 + MAX_LINK_WEIGHT - 1))
    never_read = encode_frame(CANCEL, 1) * 10**6
    with host.raw() as sock:
        before = held_bytes()
        sock.settimeout(1.0)
        for said in (refused, served, never_read):
            with contextlib.suppress(TimeoutError):
                sock.sendall(said)
        held = [admission for admission in host.service.admissions if not admission.released]
        assert len(held) == MAX_LINK_WEIGHT - 1
        host.service.admissions = held  # the fake's own
        assert held_bytes() - before < (64 + 384 + 2 * 1024 + 16 * MAX_LINK_WEIGHT + 4096 // 2) * 1024


def test_calls_that_only_begin_to_arrive_are_refused_beyond_a_bound(host: Host) -> None:
    sock = host.raw()
    sock.sendall(b"".join(open_frame(n, "echo", 1) for n in range(1, MAX_LINK_WEIGHT + 11)))
    refused = list(frames(sock, 10))
    assert [number for _, number, _ in refused] == list(range(MAX_LINK_WEIGHT + 1, MAX_LINK_WEIGHT + 11))
    assert {error_of(payload).code for _, _, payload in refused} == {"overloaded"}


def test_large_headers_weigh_more(host: Host) -> None:
    sock, before = host.raw(), held_bytes()
    header = RequestHeader(present=tuple(f"{i:060}" for i in range(900)))  # 55 KiB
    with contextlib.suppress(TimeoutError):
        sock.settimeout(1.0)
        for n in range(1, 500):
            sock.sendall(open_frame(n, "hold", 1, header=header) + data(n, 4))
    assert 10 <= len(host.service.admissions) <= 25
    assert held_bytes() - before < 32 * MIB


@pytest.mark.parametrize(
    "flood",
    [
        lambda n: open_frame(n, "fail in admit", 2**40),
        lambda n: open_frame(n, "raise in open"),
        lambda n: open_frame(n, "hold"),
        lambda n: open_frame(n, "echo"),
        lambda n: open_frame(n, "echo", 5) + encode_frame(CANCEL, n),
        lambda n: encode_frame(CANCEL, n),
        lambda n: open_frame(n, "fail in start", 1) + data(n, 4),
    ],
    ids=["refused", "raised", "held", "echoed", "cancelled", "cancel", "refused late"],
)
@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_floods_take_little_memory_and_leave_nothing(host: Host, kind: str, flood: Callable[[int], bytes]) -> None:
    sock, before = host.raw(kind=kind), held_bytes()
    sock.settimeout(0.02)
    n, pending, deadline = 1, b"", time.monotonic() + 0.7
    with contextlib.suppress(OSError):
        while time.monotonic() < deadline:
            if not pending:
                pending = b"".join(flood(n + i) for i in range(500))
                n += 500
            try:
                pending = pending[sock.send(pending) :]
            except TimeoutError:
                time.sleep(0.01)
    assert held_bytes() - before < 48 * MIB
    begin = time.monotonic()
    with host.client() as client:
        client.call_blocking(call("run", torch.ones(3)), 10.0)
    assert time.monotonic() - begin < 3.0
    sock.close()
    host.service.go_on.set()
    host.nothing_left(seconds=5.0)


# --- links of one peer -----------------------------------------------------------------------------------------------------


def test_a_busy_link_is_not_closed_for_a_new_one(host: Host) -> None:
    busy = host.raw()
    busy.sendall(open_frame(1, "hold", 1) + data(1, 4))
    idle = [host.raw() for _ in range(20)]
    host.service.go_on.set()
    assert next(frames(busy, 1))[:2] == (OPEN, 1)
    assert host.direct.links == 8
    for sock in (busy, *idle):
        sock.close()


def test_with_nothing_but_busy_links_a_new_one_is_turned_away(host: Host) -> None:
    socks = [host.raw() for _ in range(8)]
    for sock in socks:
        sock.sendall(open_frame(1, "hold", 1) + data(1, 4))
    assert eventually(lambda: len(host.service.admissions) == 8)
    with pytest.raises(MoEError):
        host.raw()
    host.raw("another").close()
    host.service.go_on.set()
    for sock in socks:
        assert next(frames(sock, 1))[:2] == (OPEN, 1)


# --- a client and a hostile server -----------------------------------------------------------------------------------------


@pytest.fixture
def hostile(host: Host) -> Iterator[tuple[DirectClient, socket.socket]]:
    ours, theirs = socket.socketpair()

    async def connect() -> DirectClient:
        return DirectClient(ours, "server", lambda _: None)

    async def close(client: DirectClient) -> None:
        client.close()

    client = host.client_loop.run(connect(), 10.0)
    yield client, theirs
    host.client_loop.run(close(client), 10.0)
    theirs.close()


def reply(number: int, *sizes: int) -> bytes:
    heads = tuple(TensorHead("float32", (size // 4,), 0, size) for size in sizes)
    return encode_frame(OPEN, number, encode_opening(Opening("", "", b"", heads)))


def test_a_codec_that_nobody_asked_for_is_not_decoded(hostile: tuple[DirectClient, socket.socket]) -> None:
    client, server = hostile
    wanted = dataclasses.replace(call("echo", torch.ones(64)), reply_codecs={Compression.NONE})
    heads = (TensorHead("float32", (64,), Compression.FLOAT16, 128),)

    def answer() -> None:
        time.sleep(0.1)
        server.sendall(encode_frame(OPEN, 1, encode_opening(Opening("", "", b"", heads))) + data(1, 128))
        time.sleep(0.3)
        server.sendall(reply(2, 256) + data(2, 256))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(ProtocolError, match="codec"):
        client.call_blocking(wanted, 5.0)
    client.call_blocking(wanted, 5.0)
    thread.join()


def test_a_reply_much_larger_than_expected_is_the_calls_error_alone(
    hostile: tuple[DirectClient, socket.socket],
) -> None:
    client, server = hostile
    before, errors = held_bytes(), []

    def work() -> None:
        with pytest.raises(ProtocolError, match="much larger") as caught:
            client.call_blocking(call("echo", torch.ones(1)), 5.0)
        errors.append(caught.value)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.sendall(b"".join(reply(n, 2**28 + 1024) for n in range(1, 7)))
    for thread in threads:
        thread.join()
    assert len(errors) == 6
    assert not client.link.closed
    assert held_bytes() - before < 32 * MIB


def test_replies_larger_than_expected_are_bounded_together(hostile: tuple[DirectClient, socket.socket]) -> None:
    client, server = hostile
    outcomes: list[str] = []

    def work() -> None:
        try:
            client.call_blocking(call("echo", torch.ones(1)), 2.0)
        except MoEError as e:
            outcomes.append(e.code)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    time.sleep(0.2)
    server.sendall(b"".join(reply(n, 2**26) for n in range(1, 7)))  # and not a byte of them
    for thread in threads:
        thread.join()
    assert (
        sorted(outcomes) == ["protocol"] * 2 + ["timeout"] * 4 or sorted(outcomes) == ["protocol"] * 3 + ["timeout"] * 3
    )


def test_a_second_reply_to_a_call_cuts_the_server_off(hostile: tuple[DirectClient, socket.socket]) -> None:
    client, server = hostile
    server.sendall(b"")

    def answer_twice() -> None:
        time.sleep(0.2)
        server.sendall(reply(1, 2**20) + reply(1, 2**20))

    thread = threading.Thread(target=answer_twice)
    thread.start()
    with pytest.raises(PeerGone):
        client.call_blocking(call("echo", torch.ones(1)), 5.0)
    thread.join()
    assert client.link.closed


def test_a_reply_that_was_given_up_holds_no_memory(hostile: tuple[DirectClient, socket.socket]) -> None:
    client, server = hostile
    before = held_bytes()

    def answer() -> None:
        time.sleep(0.1)
        server.sendall(reply(1, 2**26) + data(1, 60 * MIB))

    thread = threading.Thread(target=answer)
    thread.start()
    with pytest.raises(MoEError):
        client.call_blocking(call("echo", torch.ones(1)), 1.0)
    thread.join()
    assert eventually(lambda: held_bytes() - before < 40 * MIB), (
        f"{(held_bytes() - before) / MIB:.1f} MiB more, {client.link}"
    )
    assert not client.link.closed


# --- what takes long is not the event loop's -----------------------------------------------------------------------------


def test_what_is_work() -> None:
    large, small = torch.zeros(2048, 2048), torch.zeros(10, 10)
    assert not _encoding_is_work([large], [0])
    assert not _encoding_is_work([small, small.t()], [Compression.FLOAT16, 0])
    assert _encoding_is_work([small, large.t()], [0, 0])
    assert _encoding_is_work([large[:, ::2]], [0])
    assert _encoding_is_work([large], [Compression.FLOAT16])

    def head(dtype: str, count: int, size_bytes: int, codec: int = 0) -> TensorHead:
        return TensorHead(dtype, (count,), codec, size_bytes)

    assert not _restoring_is_work(
        [head("float32", 2**28, 2**30), head("bfloat16", 2**28, 2**29), head("bool", 100, 100)]
    )
    assert _restoring_is_work([head("bool", 2**24, 2**24)])
    assert _restoring_is_work([head("bfloat16", 2**24, 2**26)])
    assert _restoring_is_work([head("float32", 2**24, 2**25, Compression.FLOAT16)])


def test_descriptors_are_what_they_were(host: Host) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for kind in ("unix", "tls"):
        for _ in range(5):
            with host.client(kind, "p") as client:
                client.call_blocking(call("echo", torch.ones(1)), 5.0)
    host.nothing_left()
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) <= before)
