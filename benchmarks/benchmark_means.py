"""By what means should the direct link carry bytes? Echo between two processes of one host: 4 KiB for latency, 8 MiB for rate.

    python -m benchmarks.benchmark_means

Candidates without what a call needs besides (framing, multiplexing, checks): an upper bound for each. ``docs/decisions`` says
which was taken and why.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import multiprocessing
import os
import socket
import ssl
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse

SIZES = {"4 KiB": 2**12, "8 MiB": 2**23}
WRITE_BYTES = 2**20  # large writes slow TLS down
BUFFER_BYTES = 2**22
TIMEOUT_S = 20.0

# --- blocking sockets, a thread each ---------------------------------------------------------------------------------


def exchange(sock: socket.socket, view: memoryview, *, send_first: bool) -> None:
    """Send all of the view and receive as much, or the other way round."""
    for sending in (send_first, not send_first):
        done = 0
        while done < len(view):
            if sending:
                done += sock.send(view[done : done + WRITE_BYTES])
            else:
                count = sock.recv_into(view[done:])
                if not count:
                    raise EOFError("the other side is gone")
                done += count


def blocking_echo(sock: socket.socket, size_bytes: int, shared: mmap.mmap | None) -> None:
    view = memoryview(bytearray(size_bytes))
    with contextlib.suppress(EOFError, OSError):
        while True:
            exchange(sock, view, send_first=False)


def blocking_calls(sock: socket.socket, size_bytes: int, shared: mmap.mmap | None) -> Callable[[], None]:
    view = memoryview(bytearray(size_bytes))
    return lambda: exchange(sock, view, send_first=True)


# --- sockets of an event loop (uvloop), used from another thread as a client's are -----------------------------------


class Pump:
    """Non-blocking socket in a loop: ``add_reader`` / ``add_writer``, as ``moe.transport.link`` does it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, sock: socket.socket, size_bytes: int, on_full: Callable[[], None]
    ):
        self._loop, self._sock, self._on_full = loop, sock, on_full
        self._view = memoryview(bytearray(size_bytes))
        self._received = self._sent = 0
        sock.setblocking(False)
        loop.add_reader(sock, self._read)

    def send(self) -> None:
        """Send the buffer."""
        self._sent = 0
        self._write()

    def _write(self) -> None:
        try:
            while self._sent < len(self._view):
                self._sent += self._sock.send(self._view[self._sent : self._sent + WRITE_BYTES])
            self._loop.remove_writer(self._sock)
        except (BlockingIOError, ssl.SSLWantWriteError, ssl.SSLWantReadError):
            self._loop.add_writer(self._sock, self._write)

    def _read(self) -> None:
        try:
            while True:
                count = self._sock.recv_into(self._view[self._received :])
                if not count:
                    self._loop.stop()
                    return
                self._received += count
                if self._received == len(self._view):
                    self._received = 0
                    self._on_full()
                    return
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            pass
        except OSError:
            self._loop.stop()


def loop_echo(sock: socket.socket, size_bytes: int, shared: mmap.mmap | None) -> None:
    import uvloop

    loop = uvloop.new_event_loop()
    pump: list[Pump] = []
    pump.append(Pump(loop, sock, size_bytes, lambda: pump[0].send()))
    loop.run_forever()


def loop_calls(sock: socket.socket, size_bytes: int, shared: mmap.mmap | None) -> Callable[[], None]:
    import uvloop

    loop = uvloop.new_event_loop()
    arrived = threading.Event()
    pump = Pump(loop, sock, size_bytes, arrived.set)
    threading.Thread(target=loop.run_forever, daemon=True).start()

    def call() -> None:
        arrived.clear()
        loop.call_soon_threadsafe(pump.send)
        if not arrived.wait(TIMEOUT_S):
            raise TimeoutError

    return call


# --- shared memory: bytes in a memfd, a byte on the socket says that they are there ----------------------------------


def shared_echo(sock: socket.socket, size_bytes: int, shared: mmap.mmap | None) -> None:
    assert shared is not None
    there, back = memoryview(shared)[:size_bytes], memoryview(shared)[size_bytes:]
    own = memoryview(bytearray(size_bytes))
    while sock.recv(1):
        own[:] = there  # a peer could change it while it is used
        back[:] = own
        sock.send(b"x")


def shared_calls(sock: socket.socket, size_bytes: int, shared: mmap.mmap | None) -> Callable[[], None]:
    assert shared is not None
    there, back = memoryview(shared)[:size_bytes], memoryview(shared)[size_bytes:]
    own = memoryview(bytearray(size_bytes))

    def call() -> None:
        there[:] = own
        sock.send(b"x")
        if not sock.recv(1):
            raise EOFError
        own[:] = back

    return call


Echo = Callable[[socket.socket, int, "mmap.mmap | None"], None]
Calls = Callable[[socket.socket, int, "mmap.mmap | None"], Callable[[], None]]
MEANS: dict[str, tuple[str, Echo, Calls]] = {
    "blocking, Unix socket": ("unix", blocking_echo, blocking_calls),
    "event loop, Unix socket": ("unix", loop_echo, loop_calls),
    "blocking, TCP": ("tcp", blocking_echo, blocking_calls),
    "blocking, TLS 1.3": ("tls", blocking_echo, blocking_calls),
    "event loop, TLS 1.3": ("tls", loop_echo, loop_calls),
    "shared memory": ("unix", shared_echo, shared_calls),
}


class Pair:
    """One candidate: a child that echoes, and how to call it."""

    def __init__(self, name: str, size_bytes: int):
        self.name = name
        self._size_bytes = size_bytes
        self.restart()

    def restart(self) -> None:
        """See Measurable."""
        kind, echo, calls = MEANS[self.name]
        shared = mmap.mmap(-1, 2 * self._size_bytes) if self.name == "shared memory" else None
        ours, theirs = connected(kind)
        self._sock = ours
        self._child = multiprocessing.get_context("fork").Process(
            target=_child, args=(echo, theirs, ours, self._size_bytes, shared, kind), daemon=True
        )
        self._child.start()
        theirs.close()
        if kind == "tls":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            self._sock = context.wrap_socket(ours)
        self.call = calls(self._sock, self._size_bytes, shared)

    def close(self) -> None:
        """End the child."""
        self._child.terminate()
        self._child.join()
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


def connected(kind: str) -> tuple[socket.socket, socket.socket]:
    """Two ends, with large buffers."""
    if kind == "unix":
        ours, theirs = socket.socketpair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            ours = socket.create_connection(listener.getsockname())
            theirs, _ = listener.accept()
        for end in (ours, theirs):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for end in (ours, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            end.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    return ours, theirs


def _child(
    echo: Echo, sock: socket.socket, other: socket.socket, size_bytes: int, shared: mmap.mmap | None, kind: str
) -> None:
    other.close()
    if kind == "tls":
        from moe.transport.direct import make_tls_context

        with tempfile.TemporaryDirectory() as directory:
            context, _ = make_tls_context(Path(directory))
        sock = context.wrap_socket(sock, server_side=True)
    echo(sock, size_bytes, shared)
    os._exit(0)


@contextlib.contextmanager
def pairs(size_bytes: int) -> Iterator[list[Pair]]:
    """All candidates, running."""
    started = [Pair(name, size_bytes) for name in MEANS]
    try:
        yield started
    finally:
        for pair in started:
            pair.close()


def measure(rounds: int, seconds: float) -> list[Case]:
    """Median time of an echo, and the rate of large ones."""
    cases = []
    for label, size_bytes in SIZES.items():

        def run(pair: Pair) -> Mapping[str, float]:
            durations: list[float] = []
            end = time.monotonic() + seconds
            while time.monotonic() < end or not durations:
                begin = time.perf_counter()
                pair.call()
                durations.append(time.perf_counter() - begin)
            return {"ms": 1e3 * statistics.median(durations)}

        with pairs(size_bytes) as started:
            found = interleave(started, rounds, run).of("ms")
        for name, values in found.items():
            cases.append(Case(f"{name}, {label}", "ms, echo", False, {OURS: values}, panel=label))
            if size_bytes > 2**20:
                rates = {OURS: [2 * size_bytes / 1e6 / value for value in values]}
                cases.append(Case(f"{name}, {label}, rate", "GB/s, both directions", True, rates, panel="rate"))
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, seconds=1.0, systems=(OURS,))
    options = parse(parser, argv, {})
    record = Record("means", options.smoke)
    record.cases = measure(options.rounds, options.seconds)
    record.publish(options.out)


if __name__ == "__main__":
    main()
