"""Routes on handmade topologies whose best route is known, on random ones, and in simulated swarms of thousands of servers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.client.routing import (
    DEFAULT_DELAY_S,
    MAX_BAN_S,
    MAX_DELAY_S,
    MAX_PINGED,
    OVERHEAD_S,
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
from moe.errors import MissingBlocks
from moe.transport.memory import MemoryPeer

PLANS = [plan_max_throughput, plan_min_latency]
Plan = Callable[..., list[Span]]


def view(
    name: str, *ranges: tuple[int, int], rate: float = 0.0, pending: int = 0, ends: float = math.inf
) -> ServerView:
    return ServerView(
        peer_id=MemoryPeer(name), ranges=ranges, throughput_rows_per_s=rate, pending_tasks=pending, expires_at=ends
    )


def table_of(blocks: int, *servers: ServerView, **options: Any) -> ServerTable:
    return ServerTable(servers, [f"block.{i}" for i in range(blocks)], **options)


def names(route: Sequence[Span]) -> list[tuple[str, int, int]]:
    return [(span.peer_id.to_base58(), span.start, span.end) for span in route]


def fastest(
    table: ServerTable, start: int = 0, end: int | None = None, **conditions: Any
) -> list[tuple[str, int, int]]:
    end = len(table.uids) if end is None else end
    return names(plan_min_latency(table, start, end, random.Random(0), Conditions(**conditions)))


def draw(table: ServerTable, count: int, **conditions: Any) -> Counter[str]:
    """How often each server is the first of a random route."""
    rng = random.Random(0)
    routes = (plan_max_throughput(table, 0, len(table.uids), rng, Conditions(**conditions)) for _ in range(count))
    return Counter(route[0].peer_id.to_base58() for route in routes)


# --- minimum latency ---------------------------------------------------------------------------------------------------


def test_min_latency_takes_the_near_server_and_not_the_far_one() -> None:
    table = table_of(4, view("far", (0, 4), rate=100), view("near", (0, 4), rate=100))
    assert fastest(table, rtts_s={"far": 0.2, "near": 0.01}) == [("near", 0, 4)]
    assert fastest(table, rtts_s={"far": 0.01, "near": 0.2}) == [("far", 0, 4)]


def test_min_latency_stays_on_a_slower_server_when_a_round_trip_costs_more() -> None:
    # 4 blocks of 10 ms on one server, or 2 of 10 ms and 2 of 1 ms and a second request of 18 ms and its round trip
    table = table_of(4, view("whole", (0, 4), rate=100), view("tail", (2, 4), rate=1000))
    assert fastest(table, rtts_s={"whole": 0.001, "tail": 0.001}) == [("whole", 0, 4)]


def test_min_latency_leaves_a_server_before_its_end_when_the_next_one_is_faster() -> None:
    # the last 10 blocks take 100 ms on one server and 10 ms on the other, whose request costs 18 ms and 1 ms
    table = table_of(20, view("slow", (0, 20), rate=100), view("fast", (10, 20), rate=1000))
    assert fastest(table, rtts_s={"slow": 0.001, "fast": 0.001}) == [("slow", 0, 10), ("fast", 10, 20)]
    assert fastest(table, rtts_s={"slow": 0.001, "fast": 0.2}) == [("slow", 0, 20)]


def test_min_latency_returns_to_a_server_that_lacks_blocks_in_the_middle() -> None:
    table = table_of(6, view("ends", (0, 2), (4, 6), rate=100), view("middle", (2, 4), rate=100), view("far", (0, 6)))
    rtts_s = {"ends": 0.001, "middle": 0.001, "far": 9.0}
    assert fastest(table, rtts_s=rtts_s) == [("ends", 0, 2), ("middle", 2, 4), ("ends", 4, 6)]


def test_min_latency_of_an_unknown_round_trip_is_that_of_a_distant_server() -> None:
    table = table_of(2, view("known", (0, 2), rate=100), view("unknown", (0, 2), rate=100))
    assert fastest(table, rtts_s={"known": 2 * DEFAULT_DELAY_S - 0.01}) == [("known", 0, 2)]
    assert fastest(table, rtts_s={"known": 2 * DEFAULT_DELAY_S + 0.01}) == [("unknown", 0, 2)]


def test_min_latency_uses_a_server_that_does_not_answer_pings_only_if_it_must() -> None:
    table = table_of(3, view("dead", (0, 3), rate=100), view("far", (0, 2), rate=100))
    assert fastest(table, 0, 2, rtts_s={"dead": math.inf, "far": 2 * MAX_DELAY_S - 0.1}) == [("far", 0, 2)]
    assert fastest(table, rtts_s={"dead": math.inf, "far": 1.0})[-1] == ("dead", 0, 3)


def test_min_latency_goes_around_a_server_with_a_queue() -> None:
    table = table_of(2, view("busy", (0, 2), rate=100, pending=50), view("idle", (0, 2), rate=100))
    assert fastest(table, rtts_s={"busy": 0.001, "idle": 0.1}) == [("idle", 0, 2)]
    assert fastest(table, rtts_s={"busy": 0.001, "idle": 1.0}) == [("busy", 0, 2)]


def test_min_latency_chooses_at_random_between_equal_servers() -> None:
    table = table_of(2, *(view(f"s{i}", (0, 2)) for i in range(8)))
    rng = random.Random(0)
    chosen = {names(plan_min_latency(table, 0, 2, rng, Conditions()))[0][0] for _ in range(200)}
    assert chosen == set(table.names)


def expected_s(table: ServerTable, route: Sequence[tuple[str, int, int]], conditions: Conditions) -> float:
    """Time of a route, straight from the definition."""
    total = 0.0
    told = [server.throughput_rows_per_s for server in table.servers if server.throughput_rows_per_s]
    for name, start, end in route:
        server = table.servers[table.places[name]]
        rate = server.throughput_rows_per_s or (statistics.median(told) if told else 300.0)
        rtt_s = min(conditions.rtts_s.get(name, 2 * DEFAULT_DELAY_S), 2 * MAX_DELAY_S)
        total += rtt_s + OVERHEAD_S + server.pending_tasks / rate + (end - start) / rate
    return total


def shortest_s(table: ServerTable, start: int, end: int, conditions: Conditions) -> float:
    """Time of the best of all routes, found by trying every span of every server from every block."""

    @functools.cache
    def rest(block: int) -> float:
        if block == end:
            return 0.0
        return min(
            expected_s(table, [(name, block, leave)], conditions) + rest(leave)
            for name, server in zip(table.names, table.servers)
            for a, b in server.ranges
            if a <= block < b
            for leave in range(block + 1, min(b, end) + 1)
        )

    return rest(start)


@st.composite
def topologies(draw: Any) -> ServerTable:
    """Swarms in which every block has a server."""
    blocks = draw(st.integers(1, 8))
    servers = [view("s0", (0, blocks), rate=draw(st.sampled_from([0, 10, 100])), ends=draw(st.sampled_from([5, 50])))]
    for i in range(1, draw(st.integers(1, 7))):
        hosted = draw(st.sets(st.integers(0, blocks - 1)))
        ranges = BlockIndex([str(block) for block in range(blocks)]).ranges(map(str, hosted))
        rate, pending = draw(st.sampled_from([0, 10, 60, 500])), draw(st.sampled_from([0, 0, 3]))
        servers.append(view(f"s{i}", *ranges, rate=rate, pending=pending, ends=draw(st.sampled_from([5, 50]))))
    return table_of(blocks, *servers)


some_names = st.sets(st.sampled_from([f"s{i}" for i in range(7)]))
round_trips = st.dictionaries(
    st.sampled_from([f"s{i}" for i in range(7)]), st.sampled_from([0.001, 0.03, 0.2, math.inf])
)


@settings(deadline=None)
@given(topologies(), round_trips, st.data())
def test_min_latency_is_the_optimum_of_all_routes(table: ServerTable, rtts_s: dict[str, float], data: Any) -> None:
    start = data.draw(st.integers(0, len(table.uids) - 1))
    end = data.draw(st.integers(start + 1, len(table.uids)))
    conditions = Conditions(rtts_s=rtts_s)
    route = names(plan_min_latency(table, start, end, random.Random(0), conditions))
    assert expected_s(table, route, conditions) == pytest.approx(shortest_s(table, start, end, conditions), abs=1e-6)


# --- maximum throughput ------------------------------------------------------------------------------------------------


def test_max_throughput_draws_servers_by_their_rows_per_second() -> None:
    drawn = draw(table_of(4, view("slow", (0, 4), rate=10), view("fast", (0, 4), rate=30)), 4000)
    assert drawn["fast"] / drawn["slow"] == pytest.approx(3, rel=0.1)


def test_max_throughput_draws_servers_by_the_blocks_they_can_run() -> None:
    drawn = draw(table_of(4, view("short", (0, 1)), view("long", (0, 3)), view("rest", (1, 4))), 4000)
    assert drawn["long"] / drawn["short"] == pytest.approx(3, rel=0.1)


def test_max_throughput_counts_no_blocks_outside_of_what_is_asked_for() -> None:
    table = table_of(8, view("left", (0, 6)), view("right", (4, 8)))
    rng = random.Random(0)
    routes = [names(plan_max_throughput(table, 4, 6, rng, Conditions())) for _ in range(1000)]
    assert {tuple(route) for route in routes} == {(("left", 4, 6),), (("right", 4, 6),)}
    assert sum(route[0][0] == "left" for route in routes) == pytest.approx(500, abs=60)


def test_max_throughput_avoids_servers_that_do_not_answer_pings() -> None:
    table = table_of(2, view("dead", (0, 2), rate=1000), view("alive", (0, 2), rate=10))
    assert draw(table, 1000, rtts_s={"dead": math.inf}) == {"alive": 1000}
    assert draw(table, 2000, rtts_s={"dead": math.inf, "alive": math.inf}).keys() == {"dead", "alive"}


def test_a_server_that_does_not_tell_its_speed_counts_as_an_average_one() -> None:
    servers = [
        view("a", (0, 1), rate=10),
        view("b", (0, 1), rate=20),
        view("c", (0, 1), rate=60),
        view("stock", (0, 1)),
    ]
    assert table_of(1, *servers).rows_per_s.tolist() == [10, 20, 60, 20]
    assert len(set(table_of(1, view("x", (0, 1)), view("y", (0, 1))).rows_per_s.tolist())) == 1


def test_a_server_that_exaggerates_its_speed_does_not_get_all_the_load() -> None:
    honest = [view(f"honest{i}", (0, 1), rate=100) for i in range(199)]
    drawn = draw(table_of(1, *honest, view("liar", (0, 1), rate=1e18)), 3000)
    assert drawn["liar"] / 3000 == pytest.approx(1 / 3, rel=0.1), "100 times the median among 199"


# --- bans --------------------------------------------------------------------------------------------------------------


def test_a_ban_doubles_with_each_failure_up_to_a_limit_and_success_ends_it() -> None:
    bans = Bans(15.0)
    now = 100.0
    for length in (15, 30, 60, 120, 240, 480, MAX_BAN_S, MAX_BAN_S):
        bans.on_failure("x", now)
        assert bans.banned(now + length - 0.1) == {"x"}
        now += length
        assert bans.banned(now) == frozenset()
    bans.on_failure("x", now)
    bans.on_success("x")
    assert bans.banned(now) == frozenset()
    bans.on_failure("x", now)
    assert bans.banned(now + 14.9) == {"x"}
    assert bans.banned(now + 15) == frozenset(), "as the first time"


def test_many_requests_that_fail_at_once_are_one_failure() -> None:
    bans = Bans(15.0)
    for _ in range(50):
        bans.on_failure("x", 0.0)
    assert bans.banned(15.0) == frozenset()


def test_old_failures_are_forgotten() -> None:
    bans = Bans(15.0)
    for i in range(1000):
        bans.on_failure(f"gone{i}", float(i))
    bans.on_failure("x", 1e6)
    assert len(bans._failures) == len(bans._ends) == 1


def test_bans_can_be_turned_off() -> None:
    bans = Bans(0.0)
    bans.on_failure("x", 0.0)
    assert bans.banned(0.0) == frozenset()


@pytest.mark.parametrize("plan", PLANS)
def test_a_ban_never_removes_the_last_server_of_a_block_and_covers_its_other_blocks(plan: Plan) -> None:
    # only "banned" has block 2; blocks 0, 1, 3 and 4 have another server
    table = table_of(5, view("banned", (0, 5), rate=1e4), view("left", (0, 2)), view("right", (3, 5)))
    for seed in range(20):
        route = plan(table, 0, 5, random.Random(seed), Conditions(banned={"banned"}))
        assert names(route) == [("left", 0, 2), ("banned", 2, 3), ("right", 3, 5)]


@pytest.mark.parametrize("plan", PLANS)
def test_a_banned_server_is_left_and_entered_again_around_a_block_of_another_one(plan: Plan) -> None:
    table = table_of(3, view("banned", (0, 3), rate=1e4), view("other", (1, 2)))
    route = plan(table, 0, 3, random.Random(0), Conditions(banned={"banned"}))
    assert names(route) == [("banned", 0, 1), ("other", 1, 2), ("banned", 2, 3)]


@pytest.mark.parametrize("plan", PLANS)
def test_all_servers_banned_are_as_good_as_none_banned(plan: Plan) -> None:
    table = table_of(3, view("a", (0, 3)), view("b", (0, 3)))
    route = plan(table, 0, 3, random.Random(0), Conditions(banned={"a", "b", "unheard of"}))
    assert names(route) in ([("a", 0, 3)], [("b", 0, 3)])


@pytest.mark.parametrize("plan", PLANS)
def test_the_server_that_just_failed_is_the_very_last_choice(plan: Plan) -> None:
    table = table_of(3, view("failed", (0, 3), rate=1e4), view("banned", (0, 2)))
    for seed in range(20):
        route = plan(table, 0, 3, random.Random(seed), Conditions(banned={"banned", "failed"}, avoid=["failed"]))
        assert names(route) == [("banned", 0, 2), ("failed", 2, 3)]


# --- round trips -------------------------------------------------------------------------------------------------------


def test_round_trips_are_smoothed_and_expire() -> None:
    pings = PingTable()
    pings.add("x", 0.1, 0.0)
    pings.add("x", 0.2, 100.0)
    assert pings.rtts_s(101.0) == {"x": pytest.approx(0.12)}
    assert pings.rtts_s(399.0) == {"x": pytest.approx(0.12)}
    assert pings.rtts_s(400.0) == {}
    pings.add("x", 0.5, 401.0)
    pings.add("x", 0.7, 702.0)
    assert pings.rtts_s(702.0) == {"x": 0.7}, "what has expired counts no more"


def test_a_server_that_stops_answering_is_unreachable_at_once_and_back_at_once() -> None:
    pings = PingTable()
    pings.add("x", 0.1, 0.0)
    pings.add("x", math.inf, 1.0)
    assert pings.rtts_s(1.0) == {"x": math.inf}
    pings.add("x", 0.3, 2.0)
    assert pings.rtts_s(2.0) == {"x": 0.3}


def test_everybody_is_pinged_in_a_small_swarm() -> None:
    table = table_of(4, view("first", (0, 1)), view("middle", (1, 3)), view("last", (3, 4)))
    assert choose_to_ping(table, {}, random.Random(0)) == ["first", "middle", "last"]


def test_in_a_large_swarm_a_few_servers_of_every_block_are_pinged_and_the_nearest_again() -> None:
    table = table_of(20, *(view(f"s{i}", (i % 20, i % 20 + 1)) for i in range(2000)))
    known = {f"s{i}": 0.01 + i / 1e6 for i in range(400)}
    chosen = choose_to_ping(table, known, random.Random(0))
    assert len(chosen) == len(set(chosen)) <= MAX_PINGED
    assert {int(name[1:]) % 20 for name in chosen} == set(range(20)), "the servers of the first block too"
    assert {f"s{i}" for i in range(20)} <= set(chosen), "the nearest of each block"
    assert len(set(chosen) - known.keys()) >= 20, "and unknown ones"
    assert len(choose_to_ping(table, known, random.Random(0), at_most=10)) == 10


# --- what is known of servers --------------------------------------------------------------------------------------------


def test_missing_blocks_are_named_exactly() -> None:
    table = table_of(6, view("a", (0, 2)), view("b", (3, 4)), view("expired", (4, 5), ends=10.0))
    for plan in PLANS:
        with pytest.raises(MissingBlocks, match=r"3 of 6 blocks: block\.2, block\.4, block\.5$"):
            plan(table, 0, 6, random.Random(0), Conditions(now=10.0))
        with pytest.raises(MissingBlocks, match=r": block\.2$"):
            plan(table, 1, 5, random.Random(0), Conditions(now=9.0))
        assert plan(table, 0, 2, random.Random(0), Conditions(now=10.0))
        assert plan(table, 2, 2, random.Random(0), Conditions()) == []
    with pytest.raises(MissingBlocks, match=r"2 of 2 blocks"):
        plan_min_latency(table_of(2), 0, 2, random.Random(0), Conditions())


@pytest.mark.parametrize("plan", PLANS)
def test_allowed_and_blocked_servers(plan: Plan) -> None:
    servers = [view("a", (0, 3), rate=1e3), view("b", (0, 3), rate=1e3), view("c", (0, 2), rate=1)]
    rng = random.Random(0)
    assert names(plan(table_of(3, *servers, allowed=["b"]), 0, 3, rng, Conditions())) == [("b", 0, 3)]
    assert names(plan(table_of(3, *servers, blocked=["a", "c"]), 0, 3, rng, Conditions())) == [("b", 0, 3)]
    for options in ({"allowed": ["c"]}, {"allowed": ["a", "c"], "blocked": ["a"]}):
        with pytest.raises(MissingBlocks, match=r"block\.2 \(2 servers are not allowed"):
            plan(table_of(3, *servers, **options), 0, 3, rng, Conditions(banned={"c"}))


def test_blocks_of_a_server_from_the_names_of_its_experts() -> None:
    index = BlockIndex(["a.0", "a.1", "shared.0", "a.2", "shared.0", "shared.0"])
    assert index.ranges(["a.1", "a.0", "elsewhere.7"]) == ((0, 2),)
    assert index.ranges(["shared.0"]) == ((2, 3), (4, 6))
    assert index.ranges(["a.2", "shared.0", "a.2"]) == ((2, 6),)
    assert index.ranges([]) == ()


def test_it_is_time_to_look_again_when_half_of_a_block_s_servers_have_expired() -> None:
    assert table_of(2, view("a", (0, 2), ends=50.0)).good_until == 50.0
    servers = [view("a", (0, 2), ends=50.0), view("b", (0, 1), ends=30.0), view("c", (1, 2), ends=70.0)]
    assert table_of(3, *servers).good_until == 50.0
    assert table_of(1, view("short", (0, 1), ends=1.0), view("b", (0, 1), ends=9.0)).good_until == 9.0
    assert table_of(3).good_until == math.inf


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_known_of_servers_is_never_changed_by_a_plan(plan: Plan) -> None:
    table = table_of(6, view("a", (0, 6), rate=5, pending=2), view("b", (2, 4), rate=50), view("c", (3, 6)))
    before = {name: np.copy(value) for name, value in vars(table).items() if isinstance(value, np.ndarray)}
    servers, holders = table.servers, [block.tolist() for block in table.holders]
    for seed in range(10):
        conditions = Conditions(banned={"a"}, avoid={"b"}, rtts_s={"c": math.inf, "a": 0.1})
        for span in plan(table, 1, 5, random.Random(seed), conditions):
            with pytest.raises(dataclasses.FrozenInstanceError):
                span.end = 3  # type: ignore[misc]
    assert all(np.array_equal(value, getattr(table, name)) for name, value in before.items())
    assert table.servers is servers
    assert [block.tolist() for block in table.holders] == holders


# --- any topology --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
@settings(deadline=None)
@given(topologies(), some_names, some_names, round_trips, st.sampled_from([0.0, 10.0]), st.data())
def test_a_plan_covers_the_blocks_exactly_with_the_best_servers_there_are(
    plan: Plan, table: ServerTable, banned: set[str], avoid: set[str], rtts_s: dict[str, float], now: float, data: Any
) -> None:
    start = data.draw(st.integers(0, len(table.uids)))
    end = data.draw(st.integers(start, len(table.uids)))
    alive = {name: server for name, server in zip(table.names, table.servers) if server.expires_at > now}
    holders = [
        {name for name, server in alive.items() if any(a <= block < b for a, b in server.ranges)}
        for block in range(len(table.uids))
    ]
    conditions = Conditions(now=now, banned=banned, avoid=avoid, rtts_s=rtts_s)
    missing = [f"block.{block}" for block in range(start, end) if not holders[block]]
    if missing:
        with pytest.raises(MissingBlocks) as raised:
            plan(table, start, end, random.Random(0), conditions)
        assert str(raised.value).partition(": ")[2].split(", ") == missing
        return
    route = plan(table, start, end, random.Random(0), conditions)
    assert [block for span in route for block in range(span.start, span.end)] == list(range(start, end))
    assert all(len(span) > 0 for span in route)
    assert all(a.peer_id != b.peer_id for a, b in itertools.pairwise(route)), "one request where one is enough"
    for span in route:
        name = span.peer_id.to_base58()
        for block in range(span.start, span.end):
            assert name in holders[block]
            if name in avoid:
                assert holders[block] <= avoid
            elif name in banned:
                assert holders[block] <= avoid | banned


# --- thousands of servers that come and go -------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", PLANS)
def test_a_client_gets_through_a_swarm_of_thousands_of_servers_that_come_and_go(plan: Plan) -> None:
    """Every 10 s, 5 % of 3000 servers vanish without a word and as many join; the client looks once in a minute."""
    blocks, count, rng = 60, 3000, random.Random(7)
    serial = iter(range(10**6))

    def join() -> ServerView:
        start = rng.randrange(blocks)
        length = rng.randint(1, min(12, blocks - start))
        return view(f"s{next(serial)}", (start, start + length), rate=rng.lognormvariate(5, 1))

    swarm = {server.peer_id.to_base58(): server for server in (join() for _ in range(count))}
    bans, now, attempts, requests = Bans(15.0), 0.0, 0, 0
    table = table_of(blocks, *swarm.values())
    for step in range(60):
        now += 10.0
        for name in rng.sample(sorted(swarm), count // 20):
            del swarm[name]
        swarm.update((server.peer_id.to_base58(), server) for server in (join() for _ in range(count // 20)))
        if step % 6 == 0:
            table = table_of(blocks, *swarm.values())
        block = 0
        failed: set[str] = set()
        while block < blocks:  # as a sequence does it: span by span, a new route for the rest after a failure
            attempts += 1
            conditions = Conditions(now=now, banned=bans.banned(now), avoid=failed)
            for span in plan(table, block, blocks, rng, conditions):
                name = span.peer_id.to_base58()
                requests += 1
                assert name not in failed, "there are others"
                if name not in swarm:
                    bans.on_failure(name, now)
                    failed.add(name)
                    break
                bans.on_success(name)
                block = span.end
    assert attempts < 60 * 5, "dead servers are tried, but not again and again"
    assert requests >= 60 * blocks / 12


# --- servers that say anything -----------------------------------------------------------------------------------------


ODD = [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e-300, 1e300, 1.7e308]


@pytest.mark.parametrize("plan", [plan_max_throughput, plan_min_latency])
@pytest.mark.parametrize("field", ["throughput_rows_per_s", "pending_tasks", "expires_at"])
@pytest.mark.parametrize("odd", ODD)
def test_numbers_that_make_no_sense_keep_nobody_from_being_chosen(plan: Any, field: str, odd: float) -> None:
    liars = [
        ServerView(peer_id=MemoryPeer(f"liar{i}"), ranges=((0, 4),), **{field: odd})  # type: ignore[arg-type]
        for i in range(2)
    ]
    honest = [
        ServerView(peer_id=MemoryPeer(f"honest{i}"), ranges=((0, 4),), throughput_rows_per_s=100.0, expires_at=1e9)
        for i in range(3)
    ]
    table = ServerTable([*liars, *honest], ["b.0", "b.1", "b.2", "b.3"])
    assert np.isfinite(table.rows_per_s).all() and (table.rows_per_s > 0).all() and np.isfinite(table.queue_s).all()
    chosen = set()
    for seed in range(200):
        route = plan(table, 0, 4, random.Random(seed), Conditions(now=0.0))
        assert [(span.start, span.end) for span in route] == [(0, 4)]
        chosen.add(route[0].peer_id.to_base58())
    assert chosen <= {"liar0", "liar1", "honest0", "honest1", "honest2"}
    if plan is plan_max_throughput and not (field == "throughput_rows_per_s" and odd > 1e200):
        assert chosen & {"honest0", "honest1", "honest2"}
    if field == "expires_at" and not odd > 0:
        assert chosen <= {"honest0", "honest1", "honest2"}
