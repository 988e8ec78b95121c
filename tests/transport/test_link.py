"""One link by itself, its peer a bare socket: what ends is ended, floods wait, and whoever is slow is cut off."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import psutil
import pytest

from moe.errors import MoEError, PeerGone, ProtocolError
from moe.schema import Compression
from moe.transport import link as link_module
from moe.transport.event_loop import EventLoopThread
from moe.transport.link import (
    MAX_OWED_BYTES,
    MAX_UNWANTED_BYTES,
    MIN_BYTES_PER_S,
    UNWANTED_BYTES_PER_S,
    Link,
    Progress,
    Unwanted,
)
from moe.wire.frames import (
    CANCEL,
    DATA,
    HEADER,
    HEADER_BYTES,
    OPEN,
    Opening,
    TensorHead,
    encode_frame,
    encode_opening,
)
from moe.wire.tensors import EncodedTensor

T = TypeVar("T")


class Owner:
    """Takes every call that has a header, and remembers what it was told."""

    def __init__(self) -> None:
        self.opened_calls: list[int] = []
        self.memory: dict[int, list[bytearray]] = {}
        self.completed_calls: list[int] = []
        self.cancelled_calls: list[int] = []
        self.errors: list[MoEError] = []
        self.takes = True
        self.on_opened: Callable[[int], None] = lambda call: None

    def opened(self, link: Link, call: int, opening: Opening) -> list[memoryview] | None:
        self.opened_calls.append(call)
        self.on_opened(call)
        if not opening.header:
            return None
        self.memory[call] = [bytearray(head.size_bytes) for head in opening.tensors]
        return list(map(memoryview, self.memory[call]))

    def completed(self, link: Link, call: int) -> None:
        self.completed_calls.append(call)

    def cancelled(self, link: Link, call: int) -> None:
        self.cancelled_calls.append(call)

    def takes_more(self, link: Link) -> bool:
        return self.takes

    def check(self, link: Link) -> None:
        pass

    def lost(self, link: Link, error: MoEError) -> None:
        self.errors.append(error)


class Ends:
    """A link in an event loop, and the socket of its peer."""

    def __init__(self, stall_timeout_s: float = 30.0):
        self.loop = EventLoopThread("moe-test-link")
        self.owner = Owner()
        ours, self.peer = socket.socketpair()
        self.peer.settimeout(10.0)

        async def make() -> Link:
            return Link(self.loop.loop, ours, "peer", self.owner, stall_timeout_s)

        self.link = self.loop.run(make(), 10.0)

    def run(self, func: Callable[..., T], *args: Any) -> T:
        """Call something in the event loop."""

        async def call() -> T:
            return func(*args)

        return self.loop.run(call(), 10.0)

    def busy(self, seconds: float) -> Any:
        """Keep the event loop from doing anything, from now on."""
        began = threading.Event()

        async def sleep() -> None:
            began.set()
            time.sleep(seconds)  # noqa: ASYNC251 - that is what it is for

        running = self.loop.submit(sleep())
        assert began.wait(5.0)
        return running

    def close(self) -> None:
        self.run(self.link.close)
        self.loop.stop()
        self.peer.close()


@pytest.fixture(autouse=True)
def _looked_at_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "CHECK_PERIOD_S", 0.1)


@pytest.fixture
def ends() -> Iterator[Ends]:
    with made() as ends:
        yield ends


@contextlib.contextmanager
def made(stall_timeout_s: float = 30.0) -> Iterator[Ends]:
    ends = Ends(stall_timeout_s)
    try:
        yield ends
    finally:
        ends.close()


def eventually(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.01)
    return condition()


def open_frame(call: int, *sizes: int, wanted: bool = True) -> bytes:
    heads = tuple(TensorHead("uint8", (size,), 0, size) for size in sizes)
    return encode_frame(OPEN, call, encode_opening(Opening("", "", b"wanted" if wanted else b"", heads)))


def data(call: int, content: bytes) -> bytes:
    return HEADER.pack(DATA, call, len(content)) + content


def tensor(size: int) -> EncodedTensor:
    return EncodedTensor("uint8", (size,), Compression.NONE, bytearray(size))


def drain(sock: socket.socket, seconds: float = 0.25) -> bytes:
    sock.settimeout(seconds)
    received = bytearray()
    with contextlib.suppress(TimeoutError):
        while piece := sock.recv(2**16):
            received += piece
    return bytes(received)


# --- what ends is ended ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sent", [0, 1, 2**16, 6 * 2**20])
def test_a_peer_that_goes_away_with_a_reset_is_noticed_whatever_it_has_sent(ends: Ends, sent: int) -> None:
    """A socket closed with unread bytes is reset. epoll tells of that once, and uvloop listens no more."""
    ends.run(ends.link.send, 7, Opening("", "", b"", ()), ())  # which the peer will not have read
    busy = ends.busy(0.3)
    ends.peer.settimeout(0.2)
    with contextlib.suppress(TimeoutError):
        ends.peer.sendall(open_frame(1, 2**23) + data(1, bytes(2**20)) * (sent // 2**20) + bytes(sent % 2**20 % 16))
        if 0 < sent < 2**20:
            ends.peer.sendall(HEADER.pack(DATA, 1, 2**20) + bytes(sent))
    ends.peer.close()
    busy.result(5.0)
    assert eventually(lambda: ends.link.closed, 2.0)
    assert [type(error) for error in ends.owner.errors] in ([PeerGone], [ProtocolError])


def test_a_peer_that_goes_away_while_its_link_is_not_read_is_noticed(ends: Ends) -> None:
    ends.owner.takes = False
    ends.peer.sendall(open_frame(1) + open_frame(2) * 1000)
    assert eventually(lambda: not ends.link._reading)
    ends.peer.close()
    assert eventually(lambda: ends.link.closed, 2.0)


def test_nothing_is_opened_on_a_link_that_is_closed(ends: Ends) -> None:
    """A CANCEL whose confirmation cannot be sent closes the link in the middle of what was read."""
    busy = ends.busy(0.2)
    ends.peer.sendall(encode_frame(CANCEL, 1) + b"".join(open_frame(call, 1000) for call in range(2, 500)))
    ends.peer.close()
    busy.result(5.0)
    assert eventually(lambda: ends.link.closed)
    assert ends.owner.opened_calls == []


def test_an_owner_that_closes_the_link_gets_nothing_more(ends: Ends) -> None:
    ends.owner.on_opened = lambda call: ends.link.close()
    ends.peer.sendall(b"".join(open_frame(call, 10) + data(call, bytes(10)) for call in range(1, 100)))
    assert eventually(lambda: ends.link.closed)
    assert ends.owner.opened_calls == [1]
    assert ends.owner.completed_calls == []


@pytest.mark.parametrize("error", [RuntimeError("a bug"), MemoryError(), SystemExit(1), KeyboardInterrupt()])
def test_whatever_an_owner_raises_ends_the_link_and_not_the_event_loop(ends: Ends, error: BaseException) -> None:
    def fail(call: int) -> None:
        raise error

    ends.owner.on_opened = fail
    ends.peer.sendall(open_frame(1))
    assert eventually(lambda: ends.link.closed)
    assert ends.run(lambda: "alive") == "alive"


def test_a_child_that_was_forked_does_not_hold_the_connection(ends: Ends) -> None:
    child = os.fork()
    if child == 0:
        time.sleep(30)
        os._exit(0)
    try:
        with pytest.raises(PeerGone):  # its own copy is closed: checked here by what the peer sees
            ends.run(ends.link.close)
            ends.link.send(1, Opening("", "", b"", ()), ())
        assert drain(ends.peer) == b""
        ends.peer.settimeout(5.0)
        assert ends.peer.recv(1) == b""  # the end, although the child lives
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- turns -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turn_s", [0.0, 0.002, 1.0])
def test_all_arrives_however_short_the_turns_are(ends: Ends, turn_s: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "_TURN_S", turn_s)
    contents = {call: os.urandom(size) for call, size in enumerate((1, 100, 2**14, 300_000, 7, 2**20), 1)}
    stream = b"".join(
        open_frame(call, len(content), 0) + data(call, content[:3]) + (data(call, content[3:]) if content[3:] else b"")
        for call, content in contents.items()
    )
    ends.peer.sendall(stream + encode_frame(CANCEL, 99))
    assert eventually(lambda: ends.owner.cancelled_calls == [99])
    assert {call: bytes(memory[0]) for call, memory in ends.owner.memory.items()} == contents
    assert ends.owner.completed_calls == list(contents)


def test_a_flood_of_frames_leaves_the_event_loop_to_others(ends: Ends) -> None:
    flood = encode_frame(CANCEL, 5) * 4000
    over = threading.Event()

    def pour() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                ends.peer.sendall(flood)

    def read() -> None:
        with contextlib.suppress(OSError):
            while not over.is_set():
                ends.peer.recv(2**16)

    threads = [threading.Thread(target=pour), threading.Thread(target=read)]
    for thread in threads:
        thread.start()
    try:
        waits = []
        for _ in range(30):
            begin = time.monotonic()
            ends.run(lambda: None)
            waits.append(time.monotonic() - begin)
        assert sorted(waits)[15] < 0.1
    finally:
        over.set()
        ends.run(ends.link.close)
        for thread in threads:
            thread.join()


# --- bounds ----------------------------------------------------------------------------------------------------------------


def pour(ends: Ends, flood: bytes, seconds: float) -> int:
    """Send as much as is taken, and read nothing."""
    ends.peer.setblocking(False)
    sent, view, deadline = 0, memoryview(flood), time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            sent += ends.peer.send(view[sent % len(flood) :])
        except BlockingIOError:
            time.sleep(0.02)
        except OSError:
            break
    return sent


@pytest.mark.parametrize(
    "frame",
    [
        encode_frame(CANCEL, 5),
        open_frame(5),  # answered at once, see below
    ],
    ids=["cancel", "open"],
)
def test_who_reads_no_answers_is_not_read(ends: Ends, frame: bytes) -> None:
    error = Opening("", "", bytes(2000), ())
    ends.owner.on_opened = lambda call: ends.link.send(call, error, ())
    before = psutil.Process().memory_info().rss
    sent = pour(ends, frame * 5000, 0.7)
    assert not ends.link.closed
    assert ends.link._urgent_bytes < MAX_OWED_BYTES + 2**14
    assert psutil.Process().memory_info().rss - before < 2**25
    answers = drain(ends.peer)
    whole = sent // len(frame)
    assert len(answers) == whole * (HEADER_BYTES if frame[0] == CANCEL else HEADER_BYTES + len(encode_opening(error)))


def test_refused_calls_that_announce_bytes_are_bounded_in_number(ends: Ends) -> None:
    before = psutil.Process().memory_info().rss
    with contextlib.suppress(OSError):
        for first in range(1, 200_000, 1000):
            ends.peer.sendall(b"".join(open_frame(first + i, 2**40, wanted=False) for i in range(1000)))
    assert eventually(lambda: ends.link.closed)
    assert psutil.Process().memory_info().rss - before < 2**24


def test_a_refused_call_may_go_on_for_a_while_and_then_its_sender_is_cut_off(
    ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link_module, "MAX_UNWANTED_BYTES", 2**22)
    monkeypatch.setattr(link_module, "UNWANTED_BYTES_PER_S", 2**30)
    chunk = bytes(2**20)
    for call in range(1, 11):  # what was refused before does not count
        ends.peer.sendall(open_frame(call, 2**22, wanted=False) + data(call, chunk) * 4)
    ends.peer.sendall(open_frame(50, 8) + data(50, bytes(8)))
    assert eventually(lambda: ends.owner.completed_calls == [50])
    with contextlib.suppress(OSError):
        ends.peer.sendall(open_frame(99, 2**30, wanted=False) + data(99, chunk) * 20)
    assert eventually(lambda: ends.link.closed)


def test_who_sends_nothing_but_what_is_refused_has_to_wait(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_module, "MAX_UNWANTED_BYTES", 2**22)
    monkeypatch.setattr(link_module, "UNWANTED_BYTES_PER_S", 2**23)
    begin = time.monotonic()
    for call in range(1, 4):
        ends.peer.sendall(open_frame(call, 2**22, wanted=False) + data(call, bytes(2**20)) * 4)
    ends.peer.sendall(open_frame(50))
    assert eventually(lambda: ends.owner.completed_calls == [50], 10.0)
    assert time.monotonic() - begin > 0.4


def test_unwanted_bytes_are_forgotten_with_time() -> None:
    unwanted = Unwanted()
    assert not unwanted.too_much(0.0)
    unwanted.add(MAX_UNWANTED_BYTES, 10.0)
    assert not unwanted.too_much(10.0)
    unwanted.add(2 * UNWANTED_BYTES_PER_S, 10.0)
    assert unwanted.too_much(11.0)
    assert not unwanted.too_much(12.0)
    unwanted.add(1, 1e6)
    assert unwanted.bytes == 1


# --- progress --------------------------------------------------------------------------------------------------------------


def test_progress_is_what_moves_within_each_window() -> None:
    progress, total = Progress(10.0), 0
    for _ in range(100):
        total += MIN_BYTES_PER_S
        assert not progress.stalled(1.0, total, waiting=True)
    for _ in range(9):
        total += MIN_BYTES_PER_S // 2
        assert not progress.stalled(1.0, total, waiting=True)
    assert progress.stalled(1.0, total, waiting=True)


def test_who_has_nothing_to_move_is_not_slow() -> None:
    progress = Progress(10.0)
    for _ in range(100):
        assert not progress.stalled(1.0, 0, waiting=False)
    assert not progress.stalled(9.0, 0, waiting=True)
    assert not progress.stalled(1.0, 0, waiting=False)
    assert not progress.stalled(9.0, 0, waiting=True)


@pytest.mark.parametrize(
    "first",
    [
        HEADER.pack(OPEN, 1, 5000)[:5],
        HEADER.pack(OPEN, 1, 5000),
        open_frame(1, 2**20) + HEADER.pack(DATA, 1, 2**20),
        open_frame(1, 2**20),
    ],
    ids=["half a header", "half an opening", "half the data", "no data"],
)
def test_a_peer_that_sends_a_byte_now_and_then_is_cut_off(first: bytes, request: pytest.FixtureRequest) -> None:
    with made(stall_timeout_s=0.4) as ends:
        begin = time.monotonic()
        ends.peer.sendall(first)
        trickles = "half" in request.node.callspec.id
        with contextlib.suppress(OSError):
            while not ends.link.closed and time.monotonic() - begin < 15.0:
                time.sleep(0.05)
                if trickles:
                    ends.peer.sendall(b"\0")
        assert eventually(lambda: ends.link.closed)
        assert time.monotonic() - begin < 10.0
        assert ends.link._incoming == {}


def test_a_peer_that_takes_a_byte_now_and_then_is_cut_off_and_one_that_is_only_slow_is_not() -> None:
    with made(stall_timeout_s=0.5) as ends:
        told: list[str] = []
        ends.run(ends.link.send, 1, Opening("", "", b"", ()), [tensor(2**25)], lambda: told.append("gone"))
        begin = time.monotonic()
        while time.monotonic() - begin < 1.5:  # slow, but it reads
            ends.peer.recv(2**16)
            time.sleep(0.05)
        assert not ends.link.closed
        assert told == []
        with contextlib.suppress(OSError):
            while not ends.link.closed and time.monotonic() - begin < 20.0:
                ends.peer.recv(1)
                time.sleep(0.05)
        assert ends.link.closed
        assert eventually(lambda: told == ["gone"])


def test_a_process_that_was_stopped_itself_does_not_hold_that_against_its_peers() -> None:
    with made(stall_timeout_s=1.0) as ends:
        ends.peer.sendall(open_frame(1, 2**20))
        assert eventually(lambda: ends.owner.opened_calls == [1])
        ends.busy(1.3).result(10.0)
        assert not ends.run(lambda: ends.link.closed)


# --- when an answer has left -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, 2**20, 2**24])
def test_it_has_left_when_the_last_byte_is_written(ends: Ends, size: int) -> None:
    told: list[bool] = []
    ends.link.send(1, Opening("", "", b"", ()), [tensor(size)], lambda: told.append(ends.link.sending))  # by a thread
    if size == 2**24:
        time.sleep(0.3)
        assert told == []
    assert size <= len(drain(ends.peer)) < size + 1000
    assert eventually(lambda: told == [False])


def test_each_is_told_once_in_order_with_many_at_a_time(ends: Ends) -> None:
    told: list[int] = []
    sizes = [0, 5, 2**22, 0, 3 * 2**20, 1, 2**20 + 1]
    for call, size in enumerate(sizes):
        ends.link.send(call, Opening("", "", b"", ()), [tensor(size)], partial(told.append, call))
    received = drain(ends.peer)
    assert len(received) > sum(sizes)
    assert eventually(lambda: sorted(told) == list(range(len(sizes))))


@pytest.mark.parametrize("how", ["close", "cancelled by the peer", "cancel", "reset"])
def test_it_never_leaves(ends: Ends, how: str) -> None:
    told: list[int] = []
    for call in (1, 2, 3):
        ends.link.send(call, Opening("", "", b"", ()), [tensor(2**24)], partial(told.append, call))
    time.sleep(0.1)
    assert told == []
    if how == "close":
        ends.run(ends.link.close)
    elif how == "reset":
        ends.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        ends.peer.close()
    elif how == "cancel":
        for call in (1, 2, 3):
            ends.run(ends.link.cancel, call)
    else:
        ends.peer.sendall(b"".join(encode_frame(CANCEL, call) for call in (1, 2, 3)))
    if "cancel" in how:
        assert eventually(lambda: len(told) == 2)  # a chunk of one is being written: its memory is in use
        received = drain(ends.peer)
        assert len(received) < 2**24
    assert eventually(lambda: sorted(told) == [1, 2, 3])
    assert ends.link._writing == []


def test_nobody_is_told_by_a_link_that_is_closed(ends: Ends) -> None:
    ends.run(ends.link.close)
    with pytest.raises(PeerGone):
        ends.link.send(1, Opening("", "", b"", ()), (), lambda: None)


def test_cancellations_that_are_never_confirmed_are_bounded(ends: Ends) -> None:
    def cancel_many() -> None:
        for call in range(1, 5000):
            ends.link.cancel(call)

    reading = threading.Thread(target=drain, args=(ends.peer, 1.0))
    reading.start()
    ends.run(cancel_many)
    reading.join()
    assert ends.link.closed
