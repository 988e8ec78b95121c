"""What a server may not have when nobody calls it. Owns: which of its counters must be zero, and which equal what exists.

Looks into the parts, from any thread, and changes nothing. A number that never returns to zero is memory, or a place in a
queue, that is lost until the server is started again.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from typing import Any, Final, Protocol

from moe.server.connection_handler import ConnectionHandler
from moe.server.runtime import Runtime
from moe.transport.direct import DirectServer

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
    try:
        server.handler.check_idle()
    except AssertionError as e:
        yield str(e) or traceback.extract_tb(e.__traceback__)[-1].line or "a counter is wrong"
    except RuntimeError as e:  # a dict has changed while it was looked at: something is going on
        yield str(e)
    yield from _must_be_empty("reservations of bytes in flight", server.handler.inflight._shares)
    yield from _must_be_empty("links that wait for what nobody will give back", server.handler.inflight._waiting)
    for pool in server.runtime.pools:
        yield from _must_be_empty("tasks", list(range(pool.statistics().pending)), pool.name)
    direct, libp2p = getattr(server, "direct", None), getattr(server, "libp2p", None)
    if direct is not None:
        yield from _direct(direct)
    if libp2p is not None:
        yield from _must_be_empty("requests over libp2p", libp2p._requests)


def _direct(direct: DirectServer) -> Iterator[str]:
    yield from _must_be_empty("handshakes", range(direct._handshakes))
    for server_link in list(direct._links):
        link = server_link.link
        if link.closed or link._sock.fileno() < 0:
            yield f"a link that is closed, of {link.peer}"
        for name in ("_arriving", "_serving"):
            yield from _must_be_empty(f"{name[1:]} calls", getattr(server_link, name), link.peer)
        for name in ("_incoming", "_outgoing", "_urgent", "_writing"):
            yield from _must_be_empty(f"{name[1:]} of a link", getattr(link, name), link.peer)


def _must_be_empty(name: str, what: Any, whose: str = "") -> Iterator[str]:
    if what:
        shown = dict(list(what.items())[:5]) if isinstance(what, dict) else len(what)
        yield f"{name}{f' of {whose}' if whose else ''}: {shown!r:.200}"
