"""Where the blocks of a sequence are, kept up to date. Owns: looking servers up, pinging them, and when.

What follows from it is decided by ``routing``. Everything but ``request_refresh`` and ``close`` runs in the client's event
loop. Must not know: what a block computes, or how it is called.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from moe.client.routing import Span
from moe.config import ClientConfig
from moe.dht import find_experts
from moe.errors import MissingBlocks, MoEError
from moe.expert_uid import PeerIDLike
from moe.transport.base import Budget

LOOKUP_TIMEOUT_S = 15.0


class SequenceManager:
    """Knows the servers of a sequence of blocks and chooses among them.

    :param dht: a running DHT node
    :param uids: the blocks in order
    :param config: how to choose, how often to look
    """

    def __init__(self, dht: Any, uids: Sequence[str], config: ClientConfig):
        self.dht, self.uids, self.config = dht, tuple(uids), config

    async def make_route(self, start: int, end: int, budget: Budget, *, avoid: Collection[str] = ()) -> list[Span]:
        """Servers for the blocks from ``start`` to before ``end``, in order.

        :param avoid: base58 peer ids that just failed; used only where there is no other
        :raises MissingBlocks: nobody hosts some of the blocks; names exactly these
        :raises MoEError: the DHT could not be asked within the budget
        """
        uids = list(self.uids[start:end])
        timeout_s = budget.left_s(LOOKUP_TIMEOUT_S) or LOOKUP_TIMEOUT_S
        found = await asyncio.get_running_loop().run_in_executor(
            None, lambda: find_experts(self.dht, uids, timeout_s=timeout_s)
        )
        missing = [uid for uid, expert in zip(uids, found) if expert is None]
        if missing:
            raise MissingBlocks(f"no live server for {len(missing)} of {len(uids)} blocks: {', '.join(missing)}")
        spans: list[Span] = []
        for block, expert in enumerate(found, start):
            assert expert is not None
            peer = next((p for p in expert.peer_ids if p.to_base58() not in avoid), expert.peer_ids[0])
            if spans and spans[-1].peer_id == peer:
                spans[-1] = Span(peer, spans[-1].start, block + 1)
            else:
                spans.append(Span(peer, block, block + 1))
        return spans

    def on_request_failure(self, peer_id: PeerIDLike, error: MoEError) -> None:
        """A request to this server failed; avoid it from now on, if another try elsewhere can help."""

    def on_request_success(self, peer_id: PeerIDLike) -> None:
        """A server answered: its earlier failures count no more."""

    def request_refresh(self) -> None:
        """Look for servers now, in the background. From any thread."""

    def close(self) -> None:
        """End the background work. From any thread; may be called twice."""
