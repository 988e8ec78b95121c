"""What a server may not have when nobody calls it. Owns: which of its counters must be zero, and which equal what exists.

Looks into the parts, from any thread, and changes nothing. A number that never returns to zero is memory, or a place in a
queue, that is lost until the server is started again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Final, Protocol

from moe.server.connection_handler import ConnectionHandler
from moe.server.held_tensors import HeldTensors
from moe.server.runtime import Runtime
from moe.server.task_pool import TaskPool
from moe.transport.direct import DirectServer
from moe.transport.inflight import InflightBytes

_POLL_S: Final = 0.02
LEFT_AT_THE_END: Final = "a stopped server has something left of requests: "  # in its log; tests look for it


class HasParts(Protocol):
    """A server: ``moe.Server``, or one of ``moe.testing``. May have ``direct``, a DirectServer, and ``libp2p``."""

    handler: ConnectionHandler
    runtime: Runtime


def find_busy(server: HasParts, timeout_s: float = 0.0) -> list[str]:
    """What keeps a server from being idle, in words: the counters that are not what they must be.

    :param timeout_s: how long to wait for what is ending by itself
    """
    deadline = time.monotonic() + timeout_s
    while (busy := list(_busy(server))) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return busy


def _busy(server: HasParts) -> Iterator[str]:
    yield from _handler(server.handler)
    for pool in server.runtime.pools:
        yield from _pool(pool)
    direct, libp2p = getattr(server, "direct", None), getattr(server, "libp2p", None)
    if direct is not None:
        yield from _direct(direct)
    if libp2p is not None:
        yield from _must_be_empty("requests over libp2p", libp2p._requests)


def _handler(handler: ConnectionHandler) -> Iterator[str]:
    yield from _inflight(handler.inflight)
    yield from _must_be_empty("open requests", {uid: count for uid, count in list(handler._open.items()) if count})
    for name in ("held_globals", "held_inputs", "held_forwards"):
        yield from _held(name, getattr(handler, name))
    once = handler.once
    yield from _must_be_empty("running backwards", once._running)
    counted = sum(size for _, size, _ in list(once._done.values()))
    yield from _must_equal("bytes of answers kept for repeats", once._bytes, counted)


def _inflight(inflight: InflightBytes) -> Iterator[str]:
    yield from _must_be_empty("bytes in flight", {"": inflight.bytes} if inflight.bytes else {})
    yield from _must_be_empty("peers with bytes in flight", inflight._of_peer)
    yield from _must_be_empty("reservations", inflight._reservations)
    yield from _must_be_empty("links that wait for what nobody will give back", inflight._waiting)


def _held(name: str, held: HeldTensors[Any]) -> Iterator[str]:
    found = list(held._held.items())
    yield from _must_equal(f"bytes of {name}", held.bytes, sum(one.size_bytes for _, (_, one) in found))
    of_peer: dict[str, int] = {}
    for (peer, _), (_, one) in found:
        of_peer[peer] = of_peer.get(peer, 0) + one.size_bytes
    yield from _must_equal(f"bytes of {name} by peer", dict(held._peer_bytes), of_peer)


def _pool(pool: TaskPool) -> Iterator[str]:
    queue = pool._queue
    yield from _must_be_empty(f"tasks of {pool.name}", pool._tasks)
    yield from _must_be_empty(f"queue of {pool.name}", queue._waiting)
    yield from _must_be_empty(f"peers in the queue of {pool.name}", queue._peers)
    yield from _must_be_empty(f"groups in the queue of {pool.name}", queue._groups)


def _direct(direct: DirectServer) -> Iterator[str]:
    yield from _must_be_empty("handshakes", {"": direct._handshakes} if direct._handshakes else {})
    for server_link in list(direct._links):
        link = server_link.link
        if link.closed or link._sock.fileno() < 0:
            yield f"a link of {link.peer} that is closed"
        for name in ("_arriving", "_serving"):
            yield from _must_be_empty(f"{name[1:]} calls of a link of {link.peer}", getattr(server_link, name))
        for name in ("_incoming", "_outgoing", "_urgent", "_writing"):
            yield from _must_be_empty(f"{name[1:]} of a link of {link.peer}", getattr(link, name))


def _must_be_empty(name: str, what: Any) -> Iterator[str]:
    if what:
        shown = dict(list(what.items())[:5]) if isinstance(what, dict) else len(what)
        yield f"{name}: {shown}"


def _must_equal(name: str, counted: object, there: object) -> Iterator[str]:
    if counted != there:
        yield f"{name}: {counted} counted, {there} there"
