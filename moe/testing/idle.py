"""What a server may not have when nobody calls it. Owns: which of its counters must be zero, and which equal what exists.

Looks into the parts from any thread and changes nothing. A number that never returns to zero is memory, or a place in a queue,
that is lost until the server is started again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, Protocol

from moe.server.connection_handler import ConnectionHandler
from moe.server.held_tensors import HeldTensors
from moe.server.runtime import Runtime
from moe.server.task_pool import TaskPool
from moe.transport.direct import DirectServer
from moe.transport.inflight import InflightBytes

_POLL_S = 0.02


class HasParts(Protocol):
    """A server: ``moe.Server``, or a MemoryServer."""

    handler: ConnectionHandler
    runtime: Runtime


def check_idle(server: HasParts, timeout_s: float = 2.0) -> None:
    """Check that a server of which nobody wants anything has nothing left of any request.

    :param timeout_s: for what is ending by itself; nothing is waited for if there is nothing left
    :raises AssertionError: something is left; names the counters
    """
    deadline = time.monotonic() + timeout_s
    while busy := find_busy(server):
        if time.monotonic() > deadline:
            raise AssertionError(f"{server!r} is not idle: " + "; ".join(busy))
        time.sleep(_POLL_S)


def find_busy(server: HasParts) -> list[str]:
    """What keeps a server from being idle, in words; see ``check_idle``. Nothing is waited for."""
    parts = [_handler(server.handler), *map(_pool, server.runtime.pools)]
    direct = getattr(server, "direct", None)
    if direct is not None:
        parts.append(_direct(direct))
    libp2p: Any = getattr(server, "_libp2p", None)
    if libp2p is not None:
        parts.append(_must_be_empty("requests over libp2p", libp2p._requests))
    return [problem for part in parts for problem in part]


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
