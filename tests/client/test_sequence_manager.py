"""When a SequenceManager looks for servers, pings and avoids them, and that it ends; scripted first, then on a DHT."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import random
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import pytest

import moe.client.sequence_manager as sequence_manager
from moe.client.routing import ServerView, Span
from moe.client.sequence_manager import SequenceManager
from moe.config import ClientConfig
from moe.dht import PeerID, ServerInfo, declare_experts, get_dht_time, start_dht, stop_dht, visible_addresses
from moe.errors import (
    CallTimeout,
    ConfigError,
    ConnectError,
    ExpertFailed,
    ExpertNotFound,
    LifecycleError,
    MissingBlocks,
    MoEError,
    Overloaded,
    ProtocolError,
    Refused,
    SchemaError,
    TransportError,
)
from moe.testing import FakeClock
from moe.transport.base import Budget
from moe.transport.event_loop import EventLoopThread, client_loop
from moe.transport.memory import MemoryPeer

UIDS = ["block.0", "block.1", "block.2", "block.3"]


def view(name: str, *ranges: tuple[int, int], **facts: Any) -> ServerView:
    return ServerView(peer_id=MemoryPeer(name), ranges=ranges, **facts)


class Source:
    """A scripted ServerSource.

    :ivar servers: what the next look finds, or why it fails
    :ivar rtts_s: what pings measure; others do not answer
    :ivar open: cleared: looks and pings hang
    """

    def __init__(self, *servers: ServerView) -> None:
        self.servers: Sequence[ServerView] | Exception = servers
        self.rtts_s: dict[str, float] = {}
        self.open = threading.Event()
        self.open.set()
        self.looks = 0
        self.pinged: list[list[str]] = []

    def find(self, timeout_s: float) -> Sequence[ServerView]:
        self.looks += 1
        assert self.open.wait(30.0)
        if isinstance(self.servers, Exception):
            raise self.servers
        return self.servers

    def ping(self, names: Sequence[str], timeout_s: float) -> Mapping[str, float]:
        self.pinged.append(list(names))
        assert self.open.wait(30.0)
        return {name: self.rtts_s.get(name, math.inf) for name in names}


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source(view("a", (0, 4)), view("b", (0, 4)), view("c", (2, 4)))
    yield made
    made.open.set()


Make = Callable[..., SequenceManager]


@pytest.fixture
def make(source: Source) -> Iterator[Make]:
    """Makes managers over the source, with a clock that stands still."""
    made: list[weakref.ref[SequenceManager]] = []

    def create(*, clock: Callable[[], float] | None = None, **settings: Any) -> SequenceManager:
        chance = random.Random(0)
        config = ClientConfig(**settings)
        manager = SequenceManager(None, UIDS, config, source=source, clock=clock or FakeClock(), rng=chance)
        made.append(weakref.ref(manager))
        return manager

    yield create
    for manager in made:
        if (left := manager()) is not None:
            left.close()


def route(
    manager: SequenceManager, start: int = 0, end: int = 4, timeout_s: float = 10.0, **options: Any
) -> list[Span]:
    return client_loop().run(manager.make_route(start, end, Budget(timeout_s), **options), 30.0)


def peers(spans: Sequence[Span]) -> list[str]:
    assert spans[0].start == 0
    assert spans[-1].end == 4
    return [span.peer_id.to_base58() for span in spans]


def call(function: Callable[..., None], *args: Any) -> None:
    """Where callers of a manager are."""

    async def run() -> None:
        function(*args)

    client_loop().run(run(), 10.0)


def eventually(condition: Callable[[], Any], within_s: float = 20.0) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "this has not happened in time"
        time.sleep(0.01)


def background_tasks() -> int:
    async def count() -> int:
        tasks = asyncio.all_tasks()
        return sum("_keep_fresh" in repr(task.get_coro()) for task in tasks)

    return client_loop().run(count(), 10.0)


# --- looking -----------------------------------------------------------------------------------------------------------


def test_servers_are_looked_for_once_for_many_routes_at_a_time_and_later(make: Make, source: Source) -> None:
    manager = make()

    async def many() -> list[list[Span]]:
        return await asyncio.gather(*(manager.make_route(0, 4, Budget(10.0)) for _ in range(20)))

    assert source.looks == 0, "nothing is looked for before it is needed"
    for spans in client_loop().run(many(), 30.0):
        assert set(peers(spans)) <= {"a", "b", "c"}
    route(manager, 1, 3)
    assert route(manager, 2, 2) == []
    assert source.looks == 1


def test_a_missing_block_is_looked_for_once_more_before_it_is_an_error(make: Make, source: Source) -> None:
    manager = make()
    source.servers = [view("a", (0, 2))]
    route(manager, 0, 2)
    source.servers = [view("a", (0, 2)), view("late", (2, 3))]
    assert route(manager, 0, 3)[-1].peer_id == MemoryPeer("late")
    assert source.looks == 2
    with pytest.raises(MissingBlocks, match=r"1 of 4 blocks: block\.3$"):
        route(manager)
    assert source.looks == 3
    with pytest.raises(MissingBlocks):
        route(make())
    assert source.looks == 4, "the first look is a fresh one"


def test_expired_servers_are_dead_and_looked_for_again(make: Make, source: Source) -> None:
    clock = FakeClock()
    source.servers = [view("a", (0, 4), expires_at=clock() + 30), view("b", (0, 2))]
    manager = make(clock=clock)
    route(manager)
    clock.advance(31)
    assert peers([*route(manager, 0, 2), Span(MemoryPeer("x"), 2, 4)]) == ["b", "x"]
    assert source.looks == 1
    source.servers = [view("new", (0, 4))]
    assert peers(route(manager)) == ["new"]
    assert source.looks == 2


def test_what_is_stale_is_looked_for_again_first(make: Make, source: Source) -> None:
    clock = FakeClock()
    manager = make(clock=clock, update_period_s=60)
    route(manager)
    source.servers = [view("new", (0, 4))]
    clock.advance(120.1)
    assert peers(route(manager)) == ["new"]


def test_without_the_dht_what_is_known_may_do(make: Make, source: Source) -> None:
    clock = FakeClock()
    manager = make(clock=clock)
    source.servers = TransportError("the DHT is gone")
    with pytest.raises(TransportError, match="the DHT is gone"):
        route(manager)
    source.servers = [view("a", (0, 3))]
    route(manager, 0, 3)
    source.servers = TransportError("the DHT is gone")
    clock.advance(1000.0)
    assert route(manager, 0, 3) == [Span(MemoryPeer("a"), 0, 3)]
    with pytest.raises(TransportError, match="the DHT is gone"):
        route(manager)


def test_a_look_takes_no_longer_than_the_budget(make: Make, source: Source) -> None:
    manager = make()
    source.open.clear()
    with pytest.raises(CallTimeout):
        route(manager, timeout_s=0.1)
    source.open.set()
    assert peers(route(manager))


def test_wrong_use(make: Make, source: Source) -> None:
    manager = make()
    for start, end in ((-1, 2), (2, 1), (0, 5)):
        with pytest.raises(ConfigError, match=f"no blocks {start}:{end} in a sequence of 4"):
            route(manager, start, end)
    assert source.looks == 0


# --- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("routing", ["max_throughput", "min_latency"])
def test_after_one_failure_the_next_route_avoids_the_server_at_once(make: Make, source: Source, routing: str) -> None:
    clock = FakeClock()
    manager = make(clock=clock, routing=routing, ban_timeout_s=15.0)
    source.servers = [view("a", (0, 4), throughput_rows_per_s=1e3), view("b", (0, 4)), view("c", (0, 4))]
    route(manager)
    for failed, error in (("a", ConnectError("no")), ("b", Overloaded("full"))):
        call(manager.on_request_failure, MemoryPeer(failed), error)
    assert {peers(route(manager))[0] for _ in range(50)} == {"c"}
    clock.advance(14.9)
    assert {peers(route(manager))[0] for _ in range(50)} == {"c"}
    call(manager.on_request_success, MemoryPeer("b"))
    assert {peers(route(manager))[0] for _ in range(50)} <= {"b", "c"}
    clock.advance(0.1)
    assert "a" in {peers(route(manager))[0] for _ in range(50)}


@pytest.mark.parametrize("error", [ProtocolError("garbage"), ExpertNotFound("moved away")])
def test_a_server_that_answers_garbage_or_lacks_the_block_is_avoided(make: Make, error: MoEError) -> None:
    manager = make()
    route(manager)
    call(manager.on_request_failure, MemoryPeer("a"), error)
    assert "a" not in {name for _ in range(50) for name in peers(route(manager))}


@pytest.mark.parametrize(
    "error", [SchemaError("x"), ExpertFailed("x"), Refused("x"), MissingBlocks("x"), LifecycleError()]
)
def test_our_own_mistakes_ban_nobody(make: Make, error: MoEError) -> None:
    manager = make()
    route(manager)
    call(manager.on_request_failure, MemoryPeer("a"), error)
    assert "a" in {name for _ in range(50) for name in peers(route(manager))}


def test_the_last_server_of_a_block_is_used_even_if_it_just_failed(make: Make, source: Source) -> None:
    manager = make()
    source.servers = [view("only", (0, 4)), view("other", (0, 2))]
    route(manager)
    call(manager.on_request_failure, MemoryPeer("only"), ConnectError("no"))
    assert peers(route(manager, avoid=["only"])) == ["other", "only"]


def test_a_failure_makes_it_look_for_other_servers_in_the_background(make: Make, source: Source) -> None:
    manager = make(clock=time.monotonic, update_period_s=600)
    source.servers = [view("a", (0, 4))]
    route(manager)
    source.servers = [view("a", (0, 4)), view("new", (0, 4))]
    call(manager.on_request_failure, MemoryPeer("a"), ConnectError("no"))
    eventually(lambda: peers(route(manager)) == ["new"])
    assert source.looks == 2


# --- the background ------------------------------------------------------------------------------------------------------


def test_it_looks_in_the_background_every_period_and_whenever_asked(make: Make, source: Source) -> None:
    manager = make(clock=time.monotonic, update_period_s=0.02)
    manager.request_refresh()  # before there is anything to refresh
    route(manager)
    eventually(lambda: source.looks >= 4)
    slow = make(clock=time.monotonic, update_period_s=600)
    route(slow)
    manager.close()
    eventually(lambda: background_tasks() == 1)
    before = source.looks
    slow.request_refresh()
    eventually(lambda: source.looks == before + 1)


def test_it_looks_before_what_it_knows_has_expired(make: Make, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_manager, "MIN_PAUSE_S", 0.01)
    source.servers = [view("a", (0, 4), expires_at=time.monotonic() + 0.3)]
    manager = make(clock=time.monotonic, update_period_s=600)
    route(manager)
    source.servers = [view("a", (0, 4), expires_at=math.inf)]
    eventually(lambda: source.looks == 2)


def test_many_requests_to_look_are_few_looks(make: Make, source: Source) -> None:
    manager = make(clock=time.monotonic, update_period_s=600)
    route(manager)
    for _ in range(1000):
        manager.request_refresh()
    eventually(lambda: source.looks == 2)
    assert not manager._asked, "nor is another one to come"
    assert source.looks == 2


def test_it_goes_on_after_failed_looks_and_says_so(
    make: Make, source: Source, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sequence_manager, "MIN_PAUSE_S", 0.01)
    manager = make(clock=time.monotonic, update_period_s=0.05)
    route(manager)
    source.servers = TransportError("the DHT is gone")
    before = source.looks
    eventually(lambda: source.looks >= before + 4)
    assert "the DHT is gone" in caplog.text
    source.servers = [view("new", (0, 4))]
    eventually(lambda: peers(route(manager)) == ["new"])


@pytest.mark.parametrize("hanging", [False, True], ids=["waiting", "in a look that hangs"])
def test_the_background_ends_with_its_owner(make: Make, source: Source, hanging: bool) -> None:
    manager = make(clock=time.monotonic, update_period_s=600)
    route(manager)
    eventually(lambda: background_tasks() == 1)
    if hanging:
        source.open.clear()
        manager.request_refresh()
        eventually(lambda: source.looks == 2)
    gone = weakref.ref(manager)
    del manager
    gc.collect()
    assert gone() is None, "nothing in the background holds it"
    eventually(lambda: background_tasks() == 0, within_s=5.0)


def test_closing_ends_the_background(make: Make) -> None:
    manager = make()
    route(manager)
    manager.close()
    manager.close()
    eventually(lambda: background_tasks() == 0, within_s=5.0)
    manager.request_refresh()
    with pytest.raises(LifecycleError):
        route(manager)
    make().close()


def test_the_interpreter_does_not_wait_for_the_background() -> None:
    script = """
import threading, time
from moe.client.sequence_manager import SequenceManager
from moe.client.routing import ServerView
from moe.config import ClientConfig
from moe.transport.base import Budget
from moe.transport.event_loop import client_loop
from moe.transport.memory import MemoryPeer

looking = threading.Event()

class Source:
    looks = 0
    def find(self, timeout_s):
        self.looks += 1
        if self.looks > 1:
            looking.set()
            time.sleep(600)
        return [ServerView(peer_id=MemoryPeer("a"), ranges=((0, 1),))]
    def ping(self, names, timeout_s):
        time.sleep(600)

manager = SequenceManager(None, ["block.0"], ClientConfig(update_period_s=0.01), source=Source())
print(*client_loop().run(manager.make_route(0, 1, Budget(10.0))))
assert looking.wait(30.0)
print("the end", time.time(), flush=True)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=90)
    took_s = time.time() - float(ended.stdout.split()[-1])
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith("0:1 via ...a\n")
    assert took_s < 10.0, "not 600 s; torch alone takes some time to end"


def test_it_works_in_another_event_loop_as_after_a_fork(
    make: Make, source: Source, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sequence_manager, "MIN_PAUSE_S", 0.05)
    manager = make(clock=time.monotonic, update_period_s=600)
    for _ in range(2):
        loop = EventLoopThread("another")
        assert peers(loop.run(manager.make_route(0, 4, Budget(10.0)), 30.0))
        expected = source.looks + 1
        manager.request_refresh()
        eventually(partial(lambda looks: source.looks >= looks, expected))
        loop.stop()


def test_a_background_that_is_asked_to_look_as_it_ends_ends(make: Make) -> None:
    manager = make()
    route(manager)

    async def both() -> None:
        manager._wake.set()
        manager.close()

    client_loop().run(both(), 10.0)
    eventually(lambda: background_tasks() == 0, within_s=5.0)


# --- pings ---------------------------------------------------------------------------------------------------------------


def test_the_first_route_of_minimum_latency_knows_the_round_trips(make: Make, source: Source) -> None:
    source.rtts_s = {"a": 0.2, "b": 0.01, "c": 0.2}
    manager = make(routing="min_latency")
    assert peers(route(manager)) == ["b"]
    assert source.pinged == [["a", "b", "c"]], "servers of the first, the middle and the last blocks"
    source.rtts_s = {"a": 0.2, "b": math.inf, "c": 0.2}
    other = make(routing="min_latency")
    assert peers(route(other)) == ["a"]


def test_pings_that_hang_are_not_waited_for(make: Make, source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence_manager, "PING_TIMEOUT_S", 0.05)
    manager = make(routing="min_latency")
    original = source.find

    def find(timeout_s: float) -> Sequence[ServerView]:
        found = original(timeout_s)
        source.open.clear()
        return found

    monkeypatch.setattr(source, "find", find)
    assert peers(route(manager))
    assert len(source.pinged) == 1


def test_random_routes_wait_for_no_pings_but_heed_them(make: Make, source: Source) -> None:
    source.servers = [view("dead", (0, 4), throughput_rows_per_s=1e3), view("alive", (0, 4), throughput_rows_per_s=10)]
    source.rtts_s = {"alive": 0.01}
    manager = make()
    route(manager)
    eventually(lambda: {peers(route(manager))[0] for _ in range(20)} == {"alive"})


def test_servers_are_pinged_again_after_a_period(make: Make, source: Source) -> None:
    make_often = make(clock=time.monotonic, update_period_s=0.03)
    route(make_often)
    eventually(lambda: len(source.pinged) >= 3)


# --- settings --------------------------------------------------------------------------------------------------------------


def test_a_sequence_can_be_pinned_to_a_server_or_kept_from_one(make: Make) -> None:
    assert {peers(route(make(allowed_servers=["b"])))[0] for _ in range(5)} == {"b"}
    blocked = make(blocked_servers=("a", "c"))
    assert {tuple(peers(route(blocked))) for _ in range(20)} == {("b",)}
    with pytest.raises(MissingBlocks, match="not allowed by the client's configuration"):
        route(make(allowed_servers=["nobody"]))


def test_servers_are_given_by_name_or_peer_id() -> None:
    peer_id = PeerID(b"alice")
    config = ClientConfig(allowed_servers=[peer_id, "12D3Koo", peer_id.to_base58()], blocked_servers=[])
    assert config.allowed_servers == (peer_id.to_base58(), "12D3Koo")
    assert config.blocked_servers == ()
    assert ClientConfig().allowed_servers is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"allowed_servers": "12D3Koo"},
        {"allowed_servers": 7},
        {"blocked_servers": [7]},
        {"blocked_servers": [""]},
        {"blocked_servers": [b"alice"]},
        {"routing": "fast"},
        {"update_period_s": 0},
        {"update_period_s": None},
        {"ban_timeout_s": -1},
    ],
)
def test_wrong_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ClientConfig(**wrong)


def test_routes_are_shown_if_asked_for(make: Make, source: Source, caplog: pytest.LogCaptureFixture) -> None:
    source.servers = [view("the-first-one", (0, 3)), view("last-one", (3, 4))]
    with caplog.at_level(logging.INFO):
        route(make())
        assert "route:" not in caplog.text
        route(make(show_route=True))
    assert "route: 0:3 via ...st-one, 3:4 via ...st-one" in caplog.text


# --- on a real DHT -----------------------------------------------------------------------------------------------------------


def test_routes_among_servers_of_a_real_swarm() -> None:
    started = [start_dht()]
    try:
        started += [start_dht(visible_addresses(started[0])) for _ in range(2)]
        client, fast, stock = started
        until = get_dht_time() + 60
        info = ServerInfo(throughput_rows_per_s=500.0, pending_tasks=2)
        declare_experts(fast, ["block.0", "block.1"], until, info=info)
        declare_experts(stock, ["block.2"], until)
        manager = SequenceManager(client, UIDS, ClientConfig(routing="min_latency"))
        try:
            spans = route(manager, 0, 3)
            assert spans == [Span(fast.peer_id, 0, 2), Span(stock.peer_id, 2, 3)]
            rtts_s = manager._pings.rtts_s(time.monotonic())
            assert rtts_s.keys() == {fast.peer_id.to_base58(), stock.peer_id.to_base58()}
            assert all(0 < rtt_s < 2 for rtt_s in rtts_s.values())
            table = manager._table
            assert table is not None
            known = table.servers[table.places[fast.peer_id.to_base58()]]
            assert (known.throughput_rows_per_s, known.pending_tasks) == (500.0, 2)
            assert known.expires_at - time.monotonic() == pytest.approx(until - get_dht_time(), abs=1.0)
            with pytest.raises(MissingBlocks, match=r": block\.3$"):
                route(manager)
        finally:
            manager.close()
    finally:
        for dht in started:
            stop_dht(dht)
