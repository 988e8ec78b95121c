"""The transport clients use: the direct link where it can be had, libp2p otherwise. Owns: that choice, per peer.

Falls back silently and correctly: a call that no link has begun to carry goes over libp2p. Must not know: how either works.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Protocol

from moe.config import TRANSPORTS
from moe.errors import MoEError
from moe.expert_uid import PeerIDLike
from moe.transport.base import Call, CallBlocking, Reply, within
from moe.transport.direct import DirectClient, dial
from moe.transport.link import LinkSocket
from moe.transport.tickets import Ticket
from moe.wire.messages import ExpertDescription

logger = logging.getLogger(__name__)

RETRY_DIRECT_AFTER_S = 60.0  # a peer that could not be dialed is tried again after this
DIAL_TIMEOUT_S = 10.0


class TicketTransport(Protocol):
    """The transport to fall back to, which can also ask for tickets."""

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        ...

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        ...

    async def ticket(self, peer: PeerIDLike, *, timeout_s: float | None) -> Ticket:
        """A ticket for a direct link to this peer."""
        ...

    async def close(self) -> None:
        """See ExpertTransport."""
        ...


class AutoTransport:
    """Carries calls over one direct link per peer, or over libp2p.

    :param fallback: libp2p
    :param mode: "auto"; "unix" or "tls": only a link of this kind, no fallback; "libp2p": no links
    """

    def __init__(self, fallback: TicketTransport, mode: str = "auto"):
        assert mode in TRANSPORTS
        self.mode = mode
        self.fallback = fallback
        self._of_parent: dict[
            str, DirectClient
        ] = {}  # never touched: their sockets and event loop are another process's
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._links: dict[str, DirectClient] = {}
        self._dialing: dict[str, asyncio.Lock] = {}
        self._not_before: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"AutoTransport({self.mode}, {len(self._links)} direct links, else {self.fallback!r})"

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        return await self.fallback.info(peer, uid, timeout_s=timeout_s)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        if self.mode == "libp2p" or call.header is None:  # a stock peer has no direct link
            return await self.fallback.call(peer, call, timeout_s=timeout_s)
        if self._pid != os.getpid():
            self._of_parent = self._links
            self._begin()
        link = self._links.get(peer.to_base58())
        if link is not None:
            return await link.call(call, timeout_s)
        begin = time.monotonic()
        link = await self._connect(peer, timeout_s)
        left_s = None if timeout_s is None else timeout_s - (time.monotonic() - begin)
        if link is not None:
            return await link.call(call, left_s)
        return await self.fallback.call(peer, call, timeout_s=left_s)

    def blocking(self, peer: PeerIDLike) -> CallBlocking | None:
        """See BlockingCalls: over a link that is there."""
        link = self._links.get(peer.to_base58())
        return link.call_blocking if link is not None and link.takes_blocking_calls else None

    async def close(self) -> None:
        """Close all links, and libp2p."""
        for link in list(self._links.values()):
            link.close()
        await self.fallback.close()

    async def _connect(self, peer: PeerIDLike, timeout_s: float | None) -> DirectClient | None:
        """A link to the peer; None if there can be none for now."""
        name, loop = peer.to_base58(), asyncio.get_running_loop()
        async with self._dialing.setdefault(name, asyncio.Lock()):
            if name in self._links:
                return self._links[name]
            strict = self.mode in ("unix", "tls")
            if self._not_before.get(name, 0.0) > loop.time() and not strict:
                return None
            patience_s = DIAL_TIMEOUT_S if timeout_s is None else min(DIAL_TIMEOUT_S, timeout_s / 2)
            try:
                ticket = await self.fallback.ticket(peer, timeout_s=patience_s)
                only = self.mode if strict else None
                dialing = loop.run_in_executor(None, dial, ticket, only)
                try:
                    sock = await within(asyncio.shield(dialing), patience_s, "dialing a direct link", name)
                except BaseException:
                    dialing.add_done_callback(_close_late)
                    raise
            except MoEError as e:
                if strict:
                    raise
                self._not_before[name] = loop.time() + RETRY_DIRECT_AFTER_S
                logger.debug("no direct link to ...%s: %r", name[-8:], e)
                return None
            link = self._links[name] = DirectClient(sock, name, self._forget)
            return link

    def _forget(self, link: DirectClient) -> None:
        if self._links.get(link.peer) is link:
            del self._links[link.peer]


def _close_late(dialing: asyncio.Future[LinkSocket]) -> None:
    """Nobody waited for this socket any more."""
    if not dialing.cancelled() and dialing.exception() is None:
        dialing.result().close()
