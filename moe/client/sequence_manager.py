"""Where the blocks of a sequence are, kept up to date. Owns: looking servers up, pinging them, and when.

What follows from it is decided by ``routing``. Coroutines and ``on_request_...`` run in the client's event loop; the DHT, which
blocks, is asked in threads that the interpreter does not wait for. Must not know: what a block computes, or how it is called.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import math
import random
import time
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from moe.client.background import in_thread
from moe.client.routing import (
    Bans,
    BlockIndex,
    Conditions,
    PingTable,
    ServerTable,
    ServerView,
    Span,
    choose_to_ping,
    plan_max_throughput,
    plan_min_latency,
)
from moe.config import ClientConfig
from moe.dht import PeerID, find_servers, get_dht_time, ping_peers
from moe.errors import ConfigError, ExpertNotFound, LifecycleError, MissingBlocks, MoEError, ProtocolError
from moe.expert_uid import PeerIDLike
from moe.transport.base import Budget, within

logger = logging.getLogger(__name__)

T = TypeVar("T")

LOOKUP_TIMEOUT_S = 15.0  # of one look into the DHT
PING_TIMEOUT_S = 2.0  # Petals
MIN_PAUSE_S = 1.0  # between looks in the background, whoever asks for them; ours
STALE_AFTER_PERIODS = 2.0  # then the background has failed, and a route waits for a look of its own; ours

_PLANS = {"max_throughput": plan_max_throughput, "min_latency": plan_min_latency}


class ServerSource(Protocol):
    """Where a SequenceManager learns about servers. Both methods block, and run in threads of their own."""

    def find(self, timeout_s: float) -> Sequence[ServerView]:
        """All live servers of the sequence; times by the manager's clock."""
        ...

    def ping(self, names: Sequence[str], timeout_s: float) -> Mapping[str, float]:
        """Round trips in seconds, infinity for no answer.

        :param names: base58 peer ids
        :param timeout_s: for each of them
        """
        ...


class DHTServers:
    """Servers as the DHT knows them. A ServerSource.

    :param dht: a running DHT node
    :param uids: the blocks in order
    :param clock: what the times of its answers refer to
    """

    def __init__(self, dht: Any, uids: Sequence[str], clock: Callable[[], float] = time.monotonic):
        self._dht, self._uids, self._clock = dht, list(dict.fromkeys(uids)), clock
        self._index = BlockIndex(uids)
        self._peer_ids: dict[str, PeerID] = {}  # decoded once

    def find(self, timeout_s: float) -> list[ServerView]:
        """See ServerSource."""
        found = find_servers(self._dht, self._uids, timeout_s=timeout_s)
        offset_s = self._clock() - get_dht_time()
        known = self._peer_ids
        self._peer_ids = {
            server.peer_id: known.get(server.peer_id) or PeerID.from_base58(server.peer_id)
            for server in found
            if server.peer_id is not None
        }
        return [
            ServerView(
                peer_id=self._peer_ids[server.peer_id],
                ranges=self._index.ranges(server.uids),
                throughput_rows_per_s=server.throughput_rows_per_s,
                pending_tasks=server.pending_tasks,
                expires_at=math.inf if server.expiration_time is None else server.expiration_time + offset_s,
            )
            for server in found
            if server.peer_id is not None
        ]

    def ping(self, names: Sequence[str], timeout_s: float) -> Mapping[str, float]:
        """See ServerSource."""
        return ping_peers(self._dht, names, timeout_s)


class SequenceManager:
    """Knows the servers of a sequence of blocks, and chooses among them.

    Its background work begins with the first route, and ends when this is closed or garbage-collected, or with the
    interpreter.

    :param dht: a running DHT node
    :param uids: the blocks in order
    :param config: how to choose, whom not to, how often to look
    :param source: where to look instead of in the DHT
    :param clock: monotonic seconds
    :param rng: chance
    """

    def __init__(
        self,
        dht: Any,
        uids: Sequence[str],
        config: ClientConfig,
        *,
        source: ServerSource | None = None,
        clock: Callable[[], float] = time.monotonic,
        rng: random.Random | None = None,
    ):
        self.dht, self.uids, self.config = dht, tuple(uids), config
        self._source: ServerSource = source or DHTServers(dht, self.uids, clock)
        self._clock, self._rng = clock, rng or random.Random()
        self._bans, self._pings = Bans(config.ban_timeout_s), PingTable()
        self._table: ServerTable | None = None
        self._looked_at = self._tried_at = self._pinged_at = -math.inf
        self._failures = 0  # of looks, in a row
        self._loop: asyncio.AbstractEventLoop | None = None  # in which the following live
        self._looking: asyncio.Task[None] | None = None
        self._pinging: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._asked = False  # to look in the background
        self._end_background: Callable[[], object] = lambda: None
        self._closed = False

    def __repr__(self) -> str:
        return f"SequenceManager({len(self.uids)} blocks, {self._table})"

    # --- routes ------------------------------------------------------------------------------------------------------

    async def make_route(self, start: int, end: int, budget: Budget, *, avoid: Collection[str] = ()) -> list[Span]:
        """Servers for the blocks from ``start`` to before ``end``, in order.

        What is known is used at once; the DHT is asked before that only if nothing is known, if what is known is stale, or
        if a block has no server.

        :param avoid: base58 peer ids that just failed; used only where there is no other
        :raises MissingBlocks: nobody hosts some of the blocks, also after a fresh look; names exactly these
        :raises ConfigError: there are no such blocks
        :raises LifecycleError: this is closed, or the DHT not running
        :raises MoEError: the DHT could not be asked, or not within the budget
        """
        if not 0 <= start <= end <= len(self.uids):
            raise ConfigError(f"there are no blocks {start}:{end} in a sequence of {len(self.uids)}")
        self._start_background()
        problem: MoEError | None = None
        looked = False
        if self._clock() - self._looked_at > STALE_AFTER_PERIODS * self.config.update_period_s:
            looked = True
            try:
                await self._look(budget)
            except MoEError as e:
                if self._table is None:
                    raise
                problem = e  # what was known may still do
        try:
            route = await self._plan(start, end, budget, avoid)
        except MissingBlocks:
            if problem is not None:
                raise problem from None
            if looked:
                raise
            await self._look(budget)
            route = await self._plan(start, end, budget, avoid)
        if self.config.show_route:
            logger.info("route: %s", ", ".join(map(str, route)))
        return route

    async def _plan(self, start: int, end: int, budget: Budget, avoid: Collection[str]) -> list[Span]:
        now = self._clock()
        if self.config.routing == "min_latency" and self._pinging is not None and not self._pings.rtts_s(now):
            await asyncio.wait([self._pinging], timeout=budget.left_s(PING_TIMEOUT_S))
            now = self._clock()
        rtts_s = self._pings.rtts_s(now)
        conditions = Conditions(now=now, banned=self._bans.banned(now), avoid=avoid, rtts_s=rtts_s)
        assert self._table is not None
        return _PLANS[self.config.routing](self._table, start, end, self._rng, conditions)

    def on_request_failure(self, peer_id: PeerIDLike, error: MoEError) -> None:
        """A request to this server failed. If another one may do better, this one is avoided from now on for a while, and
        servers are looked for anew; a mistake of ours is nobody's fault.
        """
        if error.retryable or isinstance(error, (ProtocolError, ExpertNotFound)):
            logger.debug("avoiding ...%s for a while: %r", peer_id.to_base58()[-8:], error)
            self._bans.on_failure(peer_id.to_base58(), self._clock())
            self.request_refresh()

    def on_request_success(self, peer_id: PeerIDLike) -> None:
        """A server answered: its earlier failures count no more."""
        self._bans.on_success(peer_id.to_base58())

    # --- keeping up to date ------------------------------------------------------------------------------------------

    def request_refresh(self) -> None:
        """Look for servers in the background, now or, if that has just been done, in a moment. From any thread."""
        if self._loop is not None:
            self._asked = True
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._wake.set)

    def close(self) -> None:
        """End the background work. From any thread; may be called twice."""
        self._closed = True
        self._end_background()

    def _start_background(self) -> None:
        """In the running loop, which is another one after a fork."""
        if self._closed:
            raise LifecycleError("this SequenceManager is closed")
        loop = asyncio.get_running_loop()
        if self._loop is loop:
            return
        self._loop, self._wake = loop, asyncio.Event()
        self._looking = self._pinging = None
        self._asked = False
        keeper = loop.create_task(_keep_fresh(weakref.ref(self), self._wake))
        self._tried_at = self._clock()  # by the route that starts this
        ending = weakref.finalize(self, _cancel, loop, keeper)
        ending.atexit = False  # the loop ends by itself
        self._end_background = ending

    async def _look(self, budget: Budget) -> None:
        """Wait for a look into the DHT, one that is under way or a new one."""
        await within(asyncio.shield(self._begin_look()), budget.left_s(), "looking for the servers of blocks")

    def _begin_look(self) -> asyncio.Task[None]:
        if self._looking is None or self._looking.done():
            self._tried_at = self._clock()
            finding = in_thread(_find, self._source, self.uids, self.config)
            self._looking = asyncio.create_task(_take_found(weakref.ref(self), finding))
            self._looking.add_done_callback(_log_failure)
        return self._looking

    def _take_table(self, table: ServerTable) -> None:
        self._table, self._looked_at, self._failures = table, self._clock(), 0
        if self._looked_at - self._pinged_at >= self.config.update_period_s / 2 and len(table):
            self._pinged_at = self._looked_at
            names = choose_to_ping(table, self._pings.rtts_s(self._looked_at), self._rng)
            pinging = in_thread(self._source.ping, names, PING_TIMEOUT_S)
            self._pinging = asyncio.create_task(_take_pings(weakref.ref(self), pinging))
            self._pinging.add_done_callback(_log_failure)

    def _take_rtts(self, rtts_s: Mapping[str, float]) -> None:
        now = self._clock()
        for name, rtt_s in rtts_s.items():
            self._pings.add(name, rtt_s, now)

    def _pause_s(self) -> float:
        """Until the next look in the background."""
        period_s, pause_s = self.config.update_period_s, MIN_PAUSE_S * 2.0 ** min(self._failures, 32)
        due = self._tried_at + min(period_s, MIN_PAUSE_S if self._asked else pause_s)
        if not self._asked and self._table is not None and not self._failures:
            due = min(self._looked_at + period_s, max(due, self._table.good_until))
        return max(0.0, due - self._clock())


async def _keep_fresh(owner: weakref.ref[SequenceManager], wake: asyncio.Event) -> None:
    """Look again and again. Holds the owner only for moments, so that it can be collected; then this is cancelled."""
    while (manager := owner()) is not None:
        wake.clear()
        pause_s = manager._pause_s()
        if pause_s > 0:
            del manager
            # not asyncio.wait_for: before Python 3.12, that forgets to be cancelled when it is woken at the same time
            timer = asyncio.get_running_loop().call_later(pause_s, wake.set)
            try:
                await wake.wait()
            finally:
                timer.cancel()
            continue
        manager._asked = False
        looking = manager._begin_look()
        del manager
        await asyncio.wait([looking])


async def _take_found(owner: weakref.ref[SequenceManager], finding: concurrent.futures.Future[ServerTable]) -> None:
    try:
        table = await asyncio.wrap_future(finding)
    except Exception:
        if (manager := owner()) is not None:
            manager._failures += 1
        raise
    if (manager := owner()) is not None:
        manager._take_table(table)


async def _take_pings(
    owner: weakref.ref[SequenceManager], pinging: concurrent.futures.Future[Mapping[str, float]]
) -> None:
    rtts_s = await asyncio.wrap_future(pinging)
    if (manager := owner()) is not None:
        manager._take_rtts(rtts_s)


def _find(source: ServerSource, uids: Sequence[str], config: ClientConfig) -> ServerTable:
    found = source.find(LOOKUP_TIMEOUT_S)
    return ServerTable(found, uids, allowed=config.allowed_servers, blocked=config.blocked_servers)


def _log_failure(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        logger.warning(
            "could not learn about the servers of blocks: %s", error, exc_info=not isinstance(error, MoEError)
        )


def _cancel(loop: asyncio.AbstractEventLoop, task: asyncio.Task[None]) -> None:
    with contextlib.suppress(RuntimeError):  # the loop has ended, and the task with it
        loop.call_soon_threadsafe(task.cancel)
