"""The check that requests leave nothing behind. What that means is ``moe.server.idle``'s."""

from __future__ import annotations

from moe.server.idle import HasParts, find_busy


def check_idle(server: HasParts, timeout_s: float = 2.0) -> None:
    """Check that a server of which nobody wants anything has nothing left of any request: no bytes in flight, no open calls,
    no waiting tasks, no links that are closed; and that what it keeps for later is what it counts.

    :param server: a ``moe.Server`` of this process, or a MemoryServer
    :param timeout_s: for what is ending by itself; nothing is waited for if there is nothing left
    :raises AssertionError: something is left; names the counters
    """
    busy = find_busy(server, timeout_s)
    if busy:
        raise AssertionError(f"{server!r} is not idle: " + "; ".join(busy))
