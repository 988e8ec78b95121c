"""How good are routes through a sequence of blocks, and how long does planning one take, by number of servers?

    python -m benchmarks.benchmark_routing --servers 10 100 1000 10000

No network: swarms are drawn at random, a new one each round, the same for all ways to choose. The servers' blocks, speeds and
round trips differ as on volunteers' machines; one in twenty is banned while planning is timed. Measured of each way:

- *time*: to plan one route; and, once per look into the DHT, to index all servers;
- *latency*: expected time of one row, in multiples of that of the best of all routes, which is found by trying every span of
  every server. "pinged" knows only the round trips that a client has measured in five minutes, the others know all;
- *capacity*: rows/s until one server in twenty is overloaded, if all clients choose so, as a share of what no choice that
  overloads nobody can exceed (for any blocks in a row: the speed of all servers of any of them, divided by their number).

Compared with: each next server drawn uniformly.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse
from moe.client.routing import (
    DEFAULT_DELAY_S,
    OVERHEAD_S,
    Conditions,
    PingTable,
    ServerTable,
    ServerView,
    Span,
    choose_to_ping,
    plan_max_throughput,
    plan_min_latency,
)
from moe.transport.memory import MemoryPeer

SERVERS = (10, 100, 1000, 10_000)
BLOCKS = 32
MOST_BLOCKS = 12  # of one server
LOOKS = 5  # that a client has pinged after
BANNED_SHARE = 0.05
OVERLOADED_SHARE = 0.05  # of servers, which others stand in for
ROUTES_PER_SERVER = 50  # drawn to load the swarm
LOADED_UP_TO = 1000  # servers; with more the load would take minutes to draw
LATENCY_ROUTES = 20  # their mean is one value
UNIFORM, THROUGHPUT, LATENCY, PINGED = "uniform", "max_throughput", "min_latency", "min_latency, pinged"

Plan = Callable[[ServerTable, int, int, random.Random, Conditions], "list[Span]"]


def plan_uniformly(table: ServerTable, start: int, end: int, rng: random.Random, conditions: Conditions) -> list[Span]:
    """From each block on, any server that hosts it."""
    spans: list[Span] = []
    while start < end:
        drawn = rng.choice(table.holders[start])
        leave = min(int(table.end_of[drawn]), end)
        spans.append(Span(table.servers[table.server_of[drawn]].peer_id, start, leave))
        start = leave
    return spans


@dataclass
class Swarm:
    """A random swarm in which every block has a server."""

    count: int
    seed: int

    @cached_property
    def servers(self) -> list[ServerView]:
        """Some side by side, so that no block is without, the others anywhere."""
        rng = random.Random(self.seed)
        servers = []
        for i in range(self.count):
            length = rng.randint(2, MOST_BLOCKS)
            start = i * MOST_BLOCKS if i * MOST_BLOCKS < BLOCKS else rng.randrange(BLOCKS - length + 1)
            end = min(BLOCKS, start + (MOST_BLOCKS if i * MOST_BLOCKS < BLOCKS else length))
            rate = rng.lognormvariate(5.0, 1.0)
            servers.append(ServerView(peer_id=MemoryPeer(f"s{i}"), ranges=((start, end),), throughput_rows_per_s=rate))
        return servers

    @cached_property
    def rtts_s(self) -> dict[str, float]:
        """Of all servers: half of them below 80 ms."""
        rng = random.Random(self.seed + 1)
        return {f"s{i}": 0.08 * rng.lognormvariate(0.0, 0.7) for i in range(self.count)}

    @cached_property
    def pinged_rtts_s(self) -> Mapping[str, float]:
        """What a client knows after some minutes."""
        rng, pings = random.Random(self.seed + 2), PingTable()
        for look in range(LOOKS):
            now = 60.0 * look
            for name in choose_to_ping(self.table, pings.rtts_s(now), rng):
                pings.add(name, self.rtts_s[name], now)
        return pings.rtts_s(60.0 * (LOOKS - 1))

    @cached_property
    def table(self) -> ServerTable:
        """The same for planning."""
        return ServerTable(self.servers, [f"block.{i}" for i in range(BLOCKS)])

    def latency_s(self, route: Sequence[Span]) -> float:
        """Expected time of one row."""
        rates = (self.servers[self.table.places[span.peer_id.to_base58()]].throughput_rows_per_s for span in route)
        return sum(
            self.rtts_s[span.peer_id.to_base58()] + OVERHEAD_S + len(span) / rate for span, rate in zip(route, rates)
        )

    @cached_property
    def shortest_s(self) -> float:
        """Latency of the best route, by trying every span of every server."""
        best = [0.0] + [float("inf")] * BLOCKS
        at: list[list[tuple[int, float, float]]] = [[] for _ in range(BLOCKS)]
        for name, server in zip(self.rtts_s, self.servers):
            ((start, end),) = server.ranges
            for block in range(start, end):
                at[block].append((end, self.rtts_s[name] + OVERHEAD_S, 1 / server.throughput_rows_per_s))
        for block in range(BLOCKS):
            for end, request_s, block_s in at[block]:
                for leave in range(block + 1, end + 1):
                    best[leave] = min(best[leave], best[block] + request_s + (leave - block) * block_s)
        return best[BLOCKS]

    @cached_property
    def most_rows_per_s(self) -> float:
        """No choice of routes that overloads nobody gets more through the swarm."""
        return min(
            sum(
                server.throughput_rows_per_s
                for server in self.servers
                if server.ranges[0][0] < end and start < server.ranges[0][1]
            )
            / (end - start)
            for start, end in itertools.combinations(range(BLOCKS + 1), 2)
        )

    def capacity(self, plan: Plan, rng: random.Random) -> float:
        """Rows/s until one server in twenty is overloaded, when many clients choose so, as a share of the most."""
        routes = ROUTES_PER_SERVER * self.count
        blocks_run = dict.fromkeys(self.table.names, 0)
        conditions = Conditions(rtts_s=self.rtts_s)
        for _ in range(routes):
            for span in plan(self.table, 0, BLOCKS, rng, conditions):
                blocks_run[span.peer_id.to_base58()] += len(span)
        rates = {server.peer_id.to_base58(): server.throughput_rows_per_s for server in self.servers}
        bearable = sorted(rates[name] * routes / blocks for name, blocks in blocks_run.items() if blocks)
        return bearable[int(OVERLOADED_SHARE * len(bearable))] / self.most_rows_per_s


@dataclass
class Router:
    """One way to choose. Rounds have the same swarms for all of them."""

    name: str
    plan: Plan
    swarms: Sequence[Swarm]
    seconds: float
    round: int = 0

    def restart(self) -> None:
        """Nothing to start."""

    def measure(self) -> Mapping[str, float]:
        """Time, latency and capacity in the next swarm."""
        swarm = self.swarms[self.round]
        self.round += 1
        rng = random.Random(self.round)
        rtts_s = swarm.pinged_rtts_s if self.name == PINGED else swarm.rtts_s
        conditions = Conditions(rtts_s=rtts_s)
        latencies_s = [
            swarm.latency_s(self.plan(swarm.table, 0, BLOCKS, rng, conditions)) for _ in range(LATENCY_ROUTES)
        ]
        values = {"latency": sum(latencies_s) / len(latencies_s) / swarm.shortest_s}
        if self.name in (UNIFORM, THROUGHPUT) and swarm.count <= LOADED_UP_TO:
            values["capacity"] = swarm.capacity(self.plan, rng)
        if self.name != UNIFORM:
            banned = frozenset(rng.sample(swarm.table.names, int(BANNED_SHARE * swarm.count)))
            conditions = Conditions(rtts_s=swarm.pinged_rtts_s, banned=banned)
            values["plan"] = 1e3 * _time(lambda: self.plan(swarm.table, 0, BLOCKS, rng, conditions), self.seconds)
        if self.name == THROUGHPUT:
            uids, servers = swarm.table.uids, swarm.servers
            values["index"] = 1e3 * _time(lambda: ServerTable(servers, uids), self.seconds)
        return values


def _time(function: Callable[[], object], seconds: float) -> float:
    """Mean seconds of one call, over about ``seconds``."""
    begin, calls = time.perf_counter(), 0
    while (elapsed_s := time.perf_counter() - begin) < seconds or not calls:
        function()
        calls += 1
    return elapsed_s / calls


def measure(servers: int, rounds: int, seconds: float) -> list[Case]:
    """All quantities with one number of servers."""
    swarms = [Swarm(servers, 1000 * number) for number in range(rounds + 1)]  # the first one for the warm-up
    plans = {
        UNIFORM: plan_uniformly,
        THROUGHPUT: plan_max_throughput,
        LATENCY: plan_min_latency,
        PINGED: plan_min_latency,
    }
    routers = [Router(name, plan, swarms, seconds) for name, plan in plans.items()]
    found = interleave(routers, rounds, Router.measure)
    settings = {"servers": servers, "blocks": BLOCKS, "default_delay_s": DEFAULT_DELAY_S, "overhead_s": OVERHEAD_S}
    index = {OURS: found.of("index")[THROUGHPUT]}
    planning = {name: values for name, values in found.of("plan").items() if name != PINGED}
    titles = [
        ("planning a route", "ms", False, planning, {"banned_share": BANNED_SHARE}),
        ("indexing a look", "ms", False, index, {}),
        ("latency of a route", "times the best possible", False, found.of("latency"), {"looks": LOOKS}),
        ("capacity", "share of the upper bound", True, found.of("capacity"), {"routes": ROUTES_PER_SERVER * servers}),
    ]
    return [
        Case(
            f"{servers} servers: {title}",
            metric,
            higher_is_better,
            values,
            {**settings, **more},
            panel=title,
            x=servers,
            x_label="servers",
        )
        for title, metric, higher_is_better, values, more in titles
        if values
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, seconds=0.3)
    parser.add_argument("--servers", type=int, nargs="+", default=list(SERVERS), help="numbers (default %(default)s)")
    options = parse(parser, argv, {"servers": [4, 12], "rounds": 1, "seconds": 0.01})
    record = Record("routing", options.smoke)
    for servers in options.servers:
        record.cases += measure(servers, options.rounds, options.seconds)
    record.publish(options.out)


if __name__ == "__main__":
    main()
