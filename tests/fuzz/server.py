"""The fuzzed server: a whole one in a process of its own, and the pipe through which a test looks inside."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import gc
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from moe.config import HandlerConfig, ServerConfig
from moe.dht import PeerID, start_dht
from moe.server.idle import find_busy
from moe.server.server import Server
from moe.server.task_pool import Task, TaskPool
from moe.transport.tickets import Ticket
from tests.fuzz.experts import make_backends
from tests.swarm.tools import LOOPBACK, Child, peers_of

MIB = 2**20
LIMITS: dict[str, Any] = {
    "max_request_bytes": 16 * MIB,
    "max_inflight_bytes": 64 * MIB,
    "max_inflight_bytes_per_peer": 24 * MIB,
    "request_timeout_s": 5.0,
    "read_timeout_s": 1.5,
    "once_max_replies": 256,
    "once_max_bytes": 8 * MIB,
    "once_window_s": 30.0,
    "held_max_bytes": 16 * MIB,
    "held_max_bytes_per_peer": 8 * MIB,
    "held_window_s": 1.0,
}
_POOLED_THREADS = re.compile(r"(asyncio|uvloop|moe-handshake|ThreadPoolExecutor-\d+)_\d+")  # made when needed, bounded
_LAG_PERIOD_S = 0.05


@dataclass(frozen=True)
class Inside:
    """What a server process has at one time.

    :ivar busy: what keeps it from being idle, in words
    :ivar links: direct links, by peer
    :ivar threads: names of those that are no pool's
    :ivar rss_bytes: after what is free was given back to the system
    :ivar peak_bytes: the most it had since ``begin_peak``
    :ivar lag_s: the longest time for which its event loop did nothing else since it was last asked
    """

    busy: list[str]
    links: Counter[str]
    descriptors: int
    threads: list[str] = field(repr=False)
    rss_bytes: int
    peak_bytes: int
    lag_s: float


class _Watch:
    """How long the event loop was kept from something that should happen at once."""

    def __init__(self) -> None:
        self.lag_s = 0.0

    async def run(self) -> None:
        while True:
            begin = time.monotonic()
            await asyncio.sleep(_LAG_PERIOD_S)
            self.lag_s = max(self.lag_s, time.monotonic() - begin - _LAG_PERIOD_S)


def memory_of(pid: int | str) -> tuple[int, int]:
    """Resident bytes of a process now, and the most it had since ``begin_peak``."""
    found = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return tuple(int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))  # type: ignore[return-value]


def give_back_free_memory() -> None:
    """What is free in this process's heap goes back to the system, so that what is left is in use."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


class _Gate:
    """Holds the Runtime before its next batch, as a device does that is busy."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()

    def __call__(self, pool: TaskPool, batch: list[Task]) -> None:
        self._open.wait(30.0)

    def set(self, is_open: bool) -> None:
        (self._open.set if is_open else self._open.clear)()


def serve(pipe: Connection, limits: dict[str, Any]) -> None:
    """A server that tells what is asked through the pipe, until that is closed."""
    torch.set_num_threads(1)
    dht = start_dht(**LOOPBACK)
    gate = _Gate()
    server = Server(
        dht,
        make_backends(),
        start=True,
        handler_config=HandlerConfig(**limits),
        config=ServerConfig(update_period_s=60.0),
        on_batch=gate,
    )
    loop, watch = server.loop, _Watch()
    assert loop is not None and server.direct is not None
    watching = loop.submit(watch.run())

    def inside() -> Inside:
        give_back_free_memory()
        assert server.direct is not None
        names = [thread.name for thread in threading.enumerate() if not _POOLED_THREADS.fullmatch(thread.name)]
        rss_bytes, peak_bytes = memory_of("self")
        lag_s, watch.lag_s = watch.lag_s, 0.0
        links = Counter(link.peer for link in list(server.direct._links))
        busy = find_busy(server)
        return Inside(busy, links, len(os.listdir("/proc/self/fd")), sorted(names), rss_bytes, peak_bytes, lag_s)

    def begin_peak() -> int:
        give_back_free_memory()
        Path("/proc/self/clear_refs").write_text("5")
        return memory_of("self")[0]

    async def tickets(peer: str, count: int) -> list[Ticket]:
        assert server.direct is not None
        return [server.direct.ticket(peer) for _ in range(count)]

    answers = {
        "tickets": lambda peer, count: loop.run(tickets(peer, count), 10.0),
        "inside": inside,
        "begin_peak": begin_peak,
        "computes": gate.set,
        "healthy": lambda: (server.is_healthy(), repr(server.failure)),
    }
    try:
        pipe.send({"peers": peers_of(dht)})
        while True:
            name, args = pipe.recv()
            pipe.send(answers[name](*args))
    except EOFError:
        pass
    finally:
        gate.set(True)
        watching.cancel()
        server.shutdown()


class FuzzedServer(Child):
    """``serve`` in a process of its own. A context manager.

    :param limits: changes to LIMITS
    """

    def __init__(self, **limits: Any):
        self.limits = HandlerConfig(**{**LIMITS, **limits})
        super().__init__(serve, {**LIMITS, **limits})
        try:
            self.peers: Sequence[str] = self.receive()["peers"]
        except BaseException:
            self.__exit__()
            raise
        self.peer_id = PeerID.from_base58(self.peers[0].rsplit("/", 1)[1])
        self.family()

    def ask(self, what: str, *args: Any, timeout_s: float = 20.0) -> Any:
        """See ``serve``; fails if the process does not answer."""
        self.send((what, args))
        return self.receive(timeout_s)

    def tickets(self, peer: str, count: int = 1) -> list[Ticket]:
        """For direct links of a peer of this name."""
        tickets: list[Ticket] = self.ask("tickets", peer, count)
        return tickets

    @contextlib.contextmanager
    def computing_nothing(self) -> Iterator[None]:
        """Inside the ``with`` its device is busy: requests wait."""
        self.ask("computes", False)
        try:
            yield
        finally:
            self.ask("computes", True)

    def inside(self) -> Inside:
        """What it has now."""
        state: Inside = self.ask("inside")
        return state

    def settled(self, links: Counter[str], timeout_s: float = 2.0) -> Inside:
        """What it has when nobody calls it, after giving what has ended some time to vanish.

        :param links: those that may be left
        """
        deadline = time.monotonic() + timeout_s
        while True:
            inside = self.inside()
            if (not inside.busy and not inside.links - links) or time.monotonic() > deadline:
                return inside
            time.sleep(0.05)
