"""Which servers run which blocks. Owns: what is known of servers, bans, round trips, and the choice of a route.

Pure: ``now`` is passed in, in seconds of any one monotonic clock, and chance as ``rng``. What is known is indexed once, in a
``ServerTable`` that never changes, so that a route among thousands of servers takes milliseconds. Must not know: how servers
are found, pinged or called.

A route returns to the client between any two servers, so that a span costs its server's round trip once. Constants marked
Petals are those of its ``sequence_manager.py`` and ``ping.py`` (bigscience-workshop/petals, 2.3).
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moe.errors import MissingBlocks
from moe.expert_uid import ExpertUID, PeerIDLike

Indices = NDArray[np.int64]
Floats = NDArray[np.float64]

OVERHEAD_S = 0.018  # of one request, besides network and compute; Petals, measured there
DEFAULT_DELAY_S = 0.15  # one way to a server whose round trip is not known; Petals
MAX_DELAY_S = 5.0  # one way to a server that does not answer pings: the very last choice, but one; Petals
DEFAULT_ROWS_PER_S = 300.0  # if no server tells; Petals
MAX_ADVANTAGE = 100.0  # a server that claims to be faster than this many medians is taken for that fast; ours
MIN_ROWS_PER_S, MAX_ROWS_PER_S = 1e-3, 1e12  # that are believed; ours
MAX_PENDING = 1e6  # likewise, of tasks
UNREACHABLE_WEIGHT = 1e-6  # in a random choice, of a server that does not answer pings; Petals

BAN_GROWTH = 2.0  # Petals, by hivemind's Blacklist
MAX_BAN_S = 900.0  # or the first ban, if that is longer; ours
PING_SMOOTHING = 0.2  # weight of the latest round trip; Petals
PING_EXPIRATION_S = 300.0  # Petals
PINGS_PER_BLOCK = 3  # Petals
MAX_PINGED = 64  # servers in one go; ours

_FREE, _BANNED, _AVOIDED, _DEAD = range(4)  # the lowest of a block's servers are used; the dead never


@dataclass(frozen=True)
class Span:
    """Consecutive blocks that one server runs in one request.

    :ivar peer_id: the server
    :ivar start: its first block
    :ivar end: the block after its last one
    """

    peer_id: PeerIDLike
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end} via ...{self.peer_id.to_base58()[-6:]}"


# --- what is known of servers ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ServerView:
    """One server, as a sequence of blocks sees it.

    :ivar peer_id: whose it is
    :ivar ranges: which blocks of the sequence it hosts: [start, end) each, in order, with gaps between them
    :ivar throughput_rows_per_s: rows that it runs through a block in a second; 0: it does not tell
    :ivar pending_tasks: how many waited there when it last told
    :ivar expires_at: until when it is believed to live
    """

    peer_id: PeerIDLike
    ranges: tuple[tuple[int, int], ...]
    throughput_rows_per_s: float = 0.0
    pending_tasks: int = 0
    expires_at: float = math.inf


class BlockIndex:
    """Where the experts of a sequence stand in it; one can stand in several places.

    :param uids: the blocks in order
    """

    def __init__(self, uids: Sequence[ExpertUID]):
        self._places: dict[ExpertUID, list[int]] = {}
        for place, uid in enumerate(uids):
            self._places.setdefault(uid, []).append(place)

    def ranges(self, hosted: Iterable[ExpertUID]) -> tuple[tuple[int, int], ...]:
        """The ranges of blocks that a server of these experts hosts."""
        ranges: list[tuple[int, int]] = []
        for place in sorted(place for uid in set(hosted) for place in self._places.get(uid, ())):
            if ranges and ranges[-1][1] == place:
                ranges[-1] = (ranges[-1][0], place + 1)
            else:
                ranges.append((place, place + 1))
        return tuple(ranges)


class ServerTable:
    """All servers of a sequence, indexed for planning. Never changes.

    :param servers: each peer once
    :param uids: the blocks of the sequence
    :param allowed: base58 peer ids of the only servers to use; None: all
    :param blocked: base58 peer ids of servers not to use
    """

    def __init__(
        self,
        servers: Sequence[ServerView],
        uids: Sequence[ExpertUID],
        *,
        allowed: Collection[str] | None = None,
        blocked: Collection[str] | None = None,
    ):
        used = {server.peer_id.to_base58(): server for server in servers if server.ranges}
        excluded = {name for name in used if (allowed is not None and name not in allowed) or name in (blocked or ())}
        self.uids = tuple(uids)
        self.excluded = len(excluded)
        self.names = tuple(name for name in used if name not in excluded)
        self.servers = tuple(used[name] for name in self.names)
        self.places = {name: place for place, name in enumerate(self.names)}
        # one entry for each range of each server
        segments = [(i, start, end) for i, server in enumerate(self.servers) for start, end in server.ranges]
        self.server_of, self.start_of, self.end_of = np.array(segments, np.int64).reshape(-1, 3).T.copy()
        expires_at: Floats = np.array([server.expires_at for server in self.servers], np.float64)
        self.expires_at: Floats = np.where(np.isnan(expires_at), -np.inf, expires_at)
        self.rows_per_s = _believed_rates(self.servers)
        pending: Floats = np.array([server.pending_tasks for server in self.servers], np.float64)
        self.queue_s: Floats = np.clip(np.nan_to_num(pending, nan=MAX_PENDING), 0.0, MAX_PENDING) / self.rows_per_s
        self.holders: tuple[Indices, ...] = tuple(
            np.flatnonzero((self.start_of <= block) & (block < self.end_of)) for block in range(len(self.uids))
        )

    def __len__(self) -> int:
        return len(self.servers)

    def __repr__(self) -> str:
        return f"ServerTable({len(self)} servers of {len(self.uids)} blocks)"

    @cached_property
    def good_until(self) -> float:
        """When half of what is known of some block has expired: a good time to have looked again."""
        medians = [
            np.partition(self.expires_at[self.server_of[holders]], len(holders) // 2)[len(holders) // 2]
            for holders in self.holders
            if len(holders)
        ]
        return float(min(medians, default=math.inf))

    def missing(self, blocks: Collection[int]) -> MissingBlocks:
        """The error to raise as nobody hosts these blocks."""
        uids = dict.fromkeys(self.uids[block] for block in blocks)
        hint = f" ({self.excluded} servers are not allowed by the client's configuration)" if self.excluded else ""
        return MissingBlocks(f"no live server for {len(uids)} of {len(self.uids)} blocks: {', '.join(uids)}{hint}")


def _believed_rates(servers: Sequence[ServerView]) -> Floats:
    """Rows per second of each: as announced, within reason; the median for those who do not tell, or no number."""
    rates: Floats = np.array([server.throughput_rows_per_s for server in servers], np.float64)
    told = np.isfinite(rates) & (rates > 0)
    rates = np.clip(np.where(told, rates, 0.0), MIN_ROWS_PER_S, MAX_ROWS_PER_S)
    median = float(np.median(rates[told])) if told.any() else DEFAULT_ROWS_PER_S
    return np.where(told, np.minimum(rates, MAX_ADVANTAGE * median), median)


class Bans:
    """Servers that failed, to be avoided for a while. Names are base58 peer ids.

    :param first_s: how long the first time; doubles with each failure in a row. 0: never
    """

    def __init__(self, first_s: float = 15.0):
        self.first_s, self.longest_s = first_s, max(first_s, MAX_BAN_S)
        self._failures: dict[str, int] = {}
        self._ends: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"Bans({len(self._ends)} servers)"

    def on_failure(self, name: str, now: float) -> None:
        """Ban it, longer than the last time. One that is banned stays so: many requests fail at once when a server dies."""
        if self.first_s <= 0 or self._ends.get(name, -math.inf) > now:
            return
        self._forget(now)
        failures = self._failures.get(name, 0)
        self._failures[name] = failures + 1
        self._ends[name] = now + min(self.longest_s, self.first_s * BAN_GROWTH ** min(failures, 64))

    def on_success(self, name: str) -> None:
        """It answered: as if it had never failed."""
        self._failures.pop(name, None)
        self._ends.pop(name, None)

    def banned(self, now: float) -> frozenset[str]:
        """Who is."""
        return frozenset(name for name, end in self._ends.items() if end > now)

    def _forget(self, now: float) -> None:
        """Those that have not failed for long after their ban."""
        for name in [name for name, end in self._ends.items() if end + self.longest_s < now]:
            self.on_success(name)


class PingTable:
    """Round trips, smoothed. Names are base58 peer ids; infinity: no answer."""

    def __init__(self) -> None:
        self._entries: dict[str, tuple[float, float]] = {}  # round trip, expiration

    def __repr__(self) -> str:
        return f"PingTable({len(self._entries)} servers)"

    def add(self, name: str, rtt_s: float, now: float) -> None:
        """Take note of one measurement."""
        before, expires_at = self._entries.get(name, (math.inf, -math.inf))
        if expires_at > now and before != math.inf:
            rtt_s = PING_SMOOTHING * rtt_s + (1 - PING_SMOOTHING) * before
        self._entries[name] = (rtt_s, now + PING_EXPIRATION_S)

    def rtts_s(self, now: float) -> dict[str, float]:
        """What was measured not too long ago."""
        self._entries = {name: entry for name, entry in self._entries.items() if entry[1] > now}
        return {name: rtt_s for name, (rtt_s, _) in self._entries.items()}


def choose_to_ping(
    table: ServerTable, rtts_s: Mapping[str, float], rng: random.Random, *, at_most: int = MAX_PINGED
) -> list[str]:
    """Whose round trip to measure: everybody's, if they are few; else for each block the nearest known server and some at
    random, so that good servers stay known and others are found.
    """
    if len(table) <= at_most:
        return list(table.names)
    nearest = sorted((rtt_s, table.places[name]) for name, rtt_s in rtts_s.items() if name in table.places)
    chosen: dict[int, None] = {}
    for block in rng.sample(range(len(table.uids)), len(table.uids)):
        hosts = table.server_of[table.holders[block]]
        here = set(hosts.tolist())
        chosen.update(dict.fromkeys([place for _, place in nearest if place in here][:1]))
        chosen.update(dict.fromkeys(rng.sample(hosts.tolist(), min(PINGS_PER_BLOCK - 1, len(hosts)))))
        if len(chosen) >= at_most:
            break
    return [table.names[place] for place in list(chosen)[:at_most]]


# --- choosing a route ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What holds at the moment, besides the table. Names are base58 peer ids.

    A banned or avoided server is used for the blocks that nobody else hosts, and for these only; one to be avoided only if
    there is not even a banned one.

    :ivar now: servers that have expired by then are dead
    :ivar banned: see ``Bans``
    :ivar avoid: servers that just failed
    :ivar rtts_s: round trips as far as known; infinity: no answer
    """

    now: float = 0.0
    banned: Collection[str] = ()
    avoid: Collection[str] = ()
    rtts_s: Mapping[str, float] = field(default_factory=dict)


def plan_max_throughput(
    table: ServerTable, start: int, end: int, rng: random.Random, conditions: Conditions
) -> list[Span]:
    """A random route that spreads many clients' load as the servers can bear it.

    From each block on, a server is drawn that hosts it, with a weight of its rows per second times the blocks it can run
    from there. After Petals, which weights by length alone.

    :param start: first block
    :param end: the block after the last one
    :raises MissingBlocks: blocks without a live server
    """
    usable, ranks = _usable(table, start, end, conditions)
    weights = table.rows_per_s.copy()
    lost = [
        table.places[name] for name, rtt_s in conditions.rtts_s.items() if rtt_s == math.inf and name in table.places
    ]
    weights[lost] *= UNREACHABLE_WEIGHT
    chosen: list[tuple[int, int, int]] = []
    block = start
    while block < end:
        # a server that is used only because there is no other is left where there is one again
        better = (later for later in range(block + 1, end) if ranks[later - start] < ranks[block - start])
        ends = np.minimum(table.end_of[usable[block - start]], next(better, end))
        totals = np.cumsum((ends - block) * weights[table.server_of[usable[block - start]]])
        drawn = min(int(np.searchsorted(totals, rng.random() * totals[-1], side="right")), len(totals) - 1)
        chosen.append((int(table.server_of[usable[block - start][drawn]]), block, int(ends[drawn])))
        block = int(ends[drawn])
    return _to_spans(table, chosen)


def plan_min_latency(
    table: ServerTable, start: int, end: int, rng: random.Random, conditions: Conditions
) -> list[Span]:
    """The route with the shortest expected time for one small request.

    A shortest path over (block, server): to enter a server costs half its round trip, the overhead of a request and the
    tasks that wait there, each block costs the server's time for a row, to leave costs the other half. All edges lead from
    one block to the next, so that Dijkstra's algorithm needs no queue: one pass over the blocks settles all nodes in order.
    Unlike in Petals, a server may be left before the last of its blocks.

    :param rng: decides between equally good servers, so that not all clients choose the same
    :param start: first block
    :param end: the block after the last one
    :raises MissingBlocks: blocks without a live server
    """
    usable, _ = _usable(table, start, end, conditions)
    one_way_s: Floats = np.full(len(table), DEFAULT_DELAY_S)
    for name, rtt_s in conditions.rtts_s.items():
        if name in table.places:
            one_way_s[table.places[name]] = min(rtt_s / 2, MAX_DELAY_S)
    chance = np.random.default_rng(rng.getrandbits(64)).random(len(table))
    leave_s = one_way_s[table.server_of]
    enter_s = leave_s + (OVERHEAD_S + table.queue_s + 1e-9 * chance)[table.server_of]
    block_s = (1 / table.rows_per_s)[table.server_of]

    at_client_s = 0.0  # shortest time until the client has what the blocks before this one made of its input
    inside_s: Floats = np.full(len(table.server_of), np.inf)  # the same for each server
    entered: Indices = np.zeros(len(table.server_of), np.int64)  # at which block
    best: list[tuple[int, int]] = []  # for each block: which server it is left from, and where that was entered
    for block, here in enumerate(usable, start):
        stay_s, come_s = inside_s[here], at_client_s + enter_s[here]
        entered[here] = np.where(come_s < stay_s, block, entered[here])
        after_s = np.minimum(come_s, stay_s) + block_s[here]
        inside_s.fill(np.inf)  # who does not run this block cannot run the next one without being entered anew
        inside_s[here] = after_s
        last = int(np.argmin(after_s + leave_s[here]))
        at_client_s = float(after_s[last] + leave_s[here[last]])
        best.append((int(here[last]), int(entered[here[last]])))
    chosen: list[tuple[int, int, int]] = []
    block = end
    while block > start:
        segment, since = best[block - 1 - start]
        chosen.append((int(table.server_of[segment]), since, block))
        block = since
    return _to_spans(table, chosen[::-1])


def _usable(table: ServerTable, start: int, end: int, conditions: Conditions) -> tuple[list[Indices], list[int]]:
    """For each block, the ranges of servers (as indices of the table) that may run it, and how good these are."""
    ranks_of: NDArray[np.int8] = np.zeros(len(table), np.int8)
    for names, rank in ((conditions.banned, _BANNED), (conditions.avoid, _AVOIDED)):
        ranks_of[[table.places[name] for name in names if name in table.places]] = rank
    ranks_of[table.expires_at <= conditions.now] = _DEAD
    all_free = not ranks_of.any()
    usable, ranks, missing = [], [], []
    for block in range(start, end):
        holders, rank = table.holders[block], _FREE
        if not all_free and len(holders):
            ranks_here = ranks_of[table.server_of[holders]]
            rank = int(ranks_here.min())
            holders = holders[ranks_here == rank]
        if not len(holders) or rank == _DEAD:
            missing.append(block)
        usable.append(holders)
        ranks.append(rank)
    if missing:
        raise table.missing(missing)
    return usable, ranks


def _to_spans(table: ServerTable, chosen: Iterable[tuple[int, int, int]]) -> list[Span]:
    """Spans of (server, start, end); neighbours on one server become one."""
    spans: list[Span] = []
    for server, start, end in chosen:
        peer_id = table.servers[server].peer_id
        if spans and spans[-1].peer_id is peer_id:
            spans[-1] = Span(peer_id, spans[-1].start, end)
        else:
            spans.append(Span(peer_id, start, end))
    return spans
