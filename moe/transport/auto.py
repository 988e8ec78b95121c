"""The transport clients use: the direct link where it can be had, libp2p otherwise. Owns: that choice, per peer.

Falls back silently and correctly: a call that no link has begun to carry goes over libp2p. A link is dialed in the background;
only those who call meanwhile for the first time wait for it, for FIRST_DIAL_WAIT_S at most. Must not know: how either works.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from typing import Protocol

from moe.config import TRANSPORTS
from moe.errors import ConnectError, MoEError
from moe.expert_uid import PeerIDLike
from moe.transport.base import Call, CallBlocking, Reply, within
from moe.transport.direct import DirectClient
from moe.transport.handshakes import dial_in_thread
from moe.transport.tickets import Ticket
from moe.wire.messages import ExpertDescription

logger = logging.getLogger(__name__)

FIRST_DIAL_WAIT_S = 0.8  # a link that can be had at all is there sooner, as a rule
RETRY_DIRECT_AFTER_S = (
    60.0  # a peer that could not be dialed is tried again after this; twice as long after each failure
)
MAX_RETRY_DIRECT_AFTER_S = 960.0
DIAL_TIMEOUT_S = 10.0  # for ticket and dial


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


class _Dialing:
    """What is known about dialing one peer.

    :ivar attempt: that is going on, or was the last
    :ivar first: nothing is known about its direct link yet, so that it is worth to wait a little
    """

    def __init__(self) -> None:
        self.attempt: asyncio.Task[DirectClient] | None = None
        self.first = True
        self._began = 0.0
        self._failures = 0
        self._not_before = 0.0

    @property
    def going_on(self) -> bool:
        """True while it is being dialed."""
        return self.attempt is not None and not self.attempt.done()

    def may_begin(self, now: float) -> bool:
        """False for some time after a failure."""
        return not self.going_on and now >= self._not_before

    def begun(self, attempt: asyncio.Task[DirectClient], now: float) -> None:
        """It is being dialed."""
        self.attempt, self._began = attempt, now
        attempt.add_done_callback(lambda ended: ended.cancelled() or ended.exception())  # maybe nobody waits for it

    def patience_s(self, now: float) -> float:
        """How long a call may wait for it that has another way to go."""
        return max(0.0, self._began + FIRST_DIAL_WAIT_S - now) if self.first and self.going_on else 0.0

    def failed(self, now: float) -> None:
        """It could not be dialed, or the link was of no use."""
        self.first = False
        self._not_before = now + min(RETRY_DIRECT_AFTER_S * 2**self._failures, MAX_RETRY_DIRECT_AFTER_S)
        self._failures = min(self._failures + 1, 30)

    def succeeded(self) -> None:
        """A link has carried an answer."""
        self.first, self._failures = True, 0


class AutoTransport:
    """Carries calls over one direct link per peer, or over libp2p.

    :param fallback: libp2p
    :param mode: "auto"; "unix" or "tls": only a link of this kind, no fallback; "libp2p": no links
    """

    def __init__(self, fallback: TicketTransport, mode: str = "auto"):
        assert mode in TRANSPORTS
        self.mode = mode
        self.fallback = fallback
        self._strict = mode in ("unix", "tls")
        self._of_parent: list[object] = []  # never touched: their sockets and event loop are another process's
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._links: dict[str, DirectClient] = {}
        self._dialing: dict[str, _Dialing] = {}

    def _begin_again_if_forked(self) -> None:
        if self._pid != os.getpid():
            self._of_parent = [self._links, self._dialing]
            self._begin()

    def __repr__(self) -> str:
        return f"AutoTransport({self.mode}, {len(self._links)} direct links, else {self.fallback!r})"

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        return await self.fallback.info(peer, uid, timeout_s=timeout_s)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        if self.mode == "libp2p" or call.header is None:  # a stock peer has no direct link
            return await self.fallback.call(peer, call, timeout_s=timeout_s)
        self._begin_again_if_forked()
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
        self._begin_again_if_forked()
        for dialing in self._dialing.values():
            if dialing.attempt is not None:
                dialing.attempt.cancel()
        for link in list(self._links.values()):
            link.close()
        await self.fallback.close()

    async def _connect(self, peer: PeerIDLike, timeout_s: float | None) -> DirectClient | None:
        """A link to the peer; None if there is none for now.

        :raises MoEError: there is none, and no other way
        """
        name, now = peer.to_base58(), time.monotonic()
        dialing = self._dialing.setdefault(name, _Dialing())
        if dialing.may_begin(now) or (self._strict and not dialing.going_on):
            dialing.begun(asyncio.get_running_loop().create_task(self._dial(peer, dialing)), now)
        patience_s = DIAL_TIMEOUT_S if self._strict else dialing.patience_s(now)
        if timeout_s is not None:
            patience_s = min(patience_s, timeout_s / 2)
        if dialing.attempt is None or patience_s <= 0:
            return None
        try:
            link = await within(asyncio.shield(dialing.attempt), patience_s, "dialing a direct link", name)
            return None if link.link.closed else link
        except MoEError:
            if self._strict:
                raise
            return None
        except asyncio.CancelledError:
            if not dialing.attempt.cancelled():
                raise
            raise ConnectError("the transport was closed", peer=name) from None

    async def _dial(self, peer: PeerIDLike, dialing: _Dialing) -> DirectClient:
        name = peer.to_base58()
        try:
            ticket = await within(
                self.fallback.ticket(peer, timeout_s=DIAL_TIMEOUT_S), DIAL_TIMEOUT_S, "asking for a ticket", name
            )
            only = self.mode if self._strict else None
            sock = await within(dial_in_thread(ticket, only), DIAL_TIMEOUT_S, "dialing a direct link", name)
            link = DirectClient(sock, name, self._forget)
        except Exception as e:
            dialing.failed(time.monotonic())
            logger.debug("no direct link to ...%s: %r", name[-8:], e)
            if isinstance(e, MoEError):
                raise
            raise ConnectError(f"no direct link: {e!r:.300}", peer=name) from None
        self._links[name] = link
        return link

    def _forget(self, link: DirectClient) -> None:
        dialing = self._dialing.get(link.peer)
        if dialing is not None:
            if link.was_of_use:
                dialing.succeeded()
            else:
                dialing.failed(time.monotonic())
        if self._links.get(link.peer) is link:
            del self._links[link.peer]
