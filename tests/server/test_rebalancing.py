"""Moving to where the swarm needs a server: what it sees, the order of a move, what makes it stay, and many at once.

The swarm is a dict in this process; what a server says is seen by all others at once. Other servers act in the middle of a
server's move, wherever a test wants.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from moe.dht import ServerInfo, ServerState
from moe.errors import CallTimeout, ConfigError, TransportError
from moe.schema import BatchTensorProto
from moe.server.block_selection import Span
from moe.server.blocks import BlockSource
from moe.server.expert_backend import ExpertBackend
from moe.server.rebalancing import Rebalancer, SwarmView, blocks_of, choose_blocks, read_blocks, view_of, write_blocks

QUALITY = 0.75
LINEAR = torch.nn.Linear(2, 2)


def make_block(index: int) -> ExpertBackend:
    proto = BatchTensorProto(2)
    return ExpertBackend(f"block.{index}", LINEAR, args_schema=(proto,), outputs_schema=proto)


def source_of(total: int) -> BlockSource:
    return BlockSource(prefix="block.", total=total, make=make_block)


def uids(blocks: Collection[int]) -> tuple[str, ...]:
    return tuple(f"block.{block}" for block in blocks)


class World:
    """What the DHT would know, who lives, and a log of what happened. ``hook`` is called before each step of each server."""

    def __init__(self, total: int):
        self.source = source_of(total)
        self.servers: dict[str, ServerInfo] = {}
        self.dead: set[str] = set()
        self.log: list[str] = []
        self.hook: Callable[[str, str], None] = lambda peer, step: None

    def add(self, peer: str, blocks: Collection[int], rows_per_s: float = 100.0, **facts: Any) -> Node:
        self.servers[peer] = ServerInfo(peer_id=peer, uids=uids(blocks), throughput_rows_per_s=rows_per_s, **facts)
        return Node(self, peer)

    def online(self) -> list[ServerInfo]:
        """As find_servers: without what servers say about their plans."""
        return [
            ServerInfo(peer_id=peer, uids=info.uids, throughput_rows_per_s=info.throughput_rows_per_s)
            for peer, info in self.servers.items()
            if info.state == ServerState.ONLINE and info.uids
        ]

    def held(self) -> set[int]:
        """Blocks that can be called."""
        return {
            block
            for info in self.online()
            if info.peer_id not in self.dead
            for block in blocks_of(self.source, info.uids)
        }

    def hosts(self, peer: str) -> list[int]:
        return sorted(blocks_of(self.source, self.servers[peer].uids))


class Node:
    """One server: what a Rebalancer needs of it and of the swarm."""

    def __init__(self, world: World, peer: str):
        self.world, self.peer = world, peer
        self.fail: dict[str, Exception] = {}

    def _step(self, step: str) -> None:
        self.world.log.append(f"{self.peer} {step}")
        self.world.hook(self.peer, step)
        if step.split()[0] in self.fail:
            raise self.fail[step.split()[0]]

    def look(self) -> SwarmView:
        self._step("look")
        return view_of(self.world.source, self.peer, self.world.online(), self.world.servers.values())

    def answering(self, peers: Collection[str]) -> set[str]:
        self._step("ask")
        return set(peers) - self.world.dead

    def say(self, moving_from: str, moving_to: str) -> None:
        self._step("say" if moving_from else "end")
        info = self.world.servers[self.peer]
        self.world.servers[self.peer] = replace(info, moving_from=moving_from, moving_to=moving_to)

    def add_backends(self, backends: Mapping[str, ExpertBackend]) -> None:
        self._step(f"add {','.join(backends)}")
        info = self.world.servers[self.peer]
        assert not set(info.uids) & set(backends)
        self.world.servers[self.peer] = replace(info, uids=(*info.uids, *backends))

    def remove_backends(self, uids: Collection[str]) -> None:
        self._step(f"remove {','.join(uids)}")
        info = self.world.servers[self.peer]
        assert set(uids) <= set(info.uids)
        self.world.servers[self.peer] = replace(info, uids=tuple(uid for uid in info.uids if uid not in uids))

    def rebalancer(self, quality: float = QUALITY, period_s: float = 60.0, seed: int = 0) -> Rebalancer:
        blocks = self.world.hosts(self.peer)
        rows_per_s = self.world.servers[self.peer].throughput_rows_per_s
        return Rebalancer(
            self.world.source, range(blocks[0], blocks[-1] + 1), self, self,
            rows_per_s=lambda: rows_per_s, balance_quality=quality, period_s=period_s, rng=random.Random(seed),
        )  # fmt: skip


def run_interleaved(
    world: World, acts: Sequence[Callable[[], object]], rng: random.Random, check: Callable[[], None] = lambda: None
) -> None:
    """Run all at once, each in a thread, one step at a time: whose is next is drawn. ``check`` is called between steps."""
    turn = threading.Condition()
    waiting: dict[int, int] = {}  # thread -> which of acts
    chosen: list[int] = []
    ended: list[int] = []
    errors: list[BaseException] = []

    def pause(index: int) -> None:
        with turn:
            waiting[threading.get_ident()] = index
            turn.notify_all()
            assert turn.wait_for(lambda: chosen and chosen[0] == index, 20)
            chosen.clear()
            del waiting[threading.get_ident()]

    def run(index: int) -> None:
        indices[threading.get_ident()] = index
        try:
            pause(index)
            acts[index]()
        except BaseException as e:
            errors.append(e)
        with turn:
            ended.append(index)
            turn.notify_all()

    indices: dict[int, int] = {}
    world.hook = lambda peer, step: pause(indices[threading.get_ident()])
    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(acts))]
    for thread in threads:
        thread.start()
    with turn:
        while True:
            assert turn.wait_for(lambda: not chosen and len(waiting) + len(ended) == len(acts), 20)
            check()
            if not waiting:
                break
            chosen.append(rng.choice(sorted(waiting.values())))
            turn.notify_all()
    for thread in threads:
        thread.join(20)
    world.hook = lambda peer, step: None
    assert errors == []


# --- what is seen -----------------------------------------------------------------------------------------------------


def test_patterns_of_blocks() -> None:
    source = source_of(8)
    assert write_blocks("block.", range(2, 5)) == "block.[2:5]"
    assert write_blocks("block.", range(2, 2)) == ""
    assert read_blocks(source, "block.[2:5]") == range(2, 5)
    assert list(read_blocks(source, "block.[6:999999999]")) == [6, 7]
    for hostile in ("", "block.", "block.[0:4", "other.[0:4]", "blockx[0:4]", "block.[a:b]", "block.[0:4].[0:4]",
                    "block.[5:2]", "block.[9:12]", "block.[0:" + "9" * 40 + "]", "block.[-1:4]", "block.[٠:٤]"):  # fmt: skip  # noqa: RUF001
        assert list(read_blocks(source, hostile)) == []


def test_only_blocks_of_the_model_count() -> None:
    names = ["block.0", "block.7", "block.8", "block.0.1", "ffn.1", "block.", "block.x", "block.٣"]
    assert blocks_of(source_of(8), names) == {0, 7}


def test_what_others_host_and_plan() -> None:
    world = World(8)
    world.add("me", range(4))
    world.add("plain", range(2, 4), 5.0)
    world.add("moving", range(3), 7.0, moving_from="block.[0:2]", moving_to="block.[3:5]")
    world.add("joining", range(6, 8), 9.0, state=ServerState.JOINING)
    world.add("gone", range(4), state=ServerState.OFFLINE)
    world.add("pieces", [0, 5], 3.0)
    view = view_of(world.source, "me", world.online(), world.servers.values())
    assert sorted(view.spans) == [
        Span(0, 1, 3.0, False),
        Span(2, 4, 5.0, True),
        Span(2, 5, 7.0, True),
        Span(5, 6, 3.0, False),
        Span(6, 8, 9.0, True),
    ]
    assert view.holders == [{"pieces"}, set(), {"plain", "moving"}, {"plain"}, set(), {"pieces"}, set(), set()]
    assert view.held == [0, 2, 3, 5]


def test_servers_that_tell_nothing_about_themselves_count_and_do_not_move() -> None:
    stock = ServerInfo(peer_id="stock", uids=uids([1, 2]))
    view = view_of(source_of(4), "me", [stock], [])
    assert view.spans == [Span(1, 3, 0.0, False)]
    assert view.held == [1, 2]


def test_a_server_that_joins_goes_where_none_is_or_is_about_to_be() -> None:
    world = World(12)
    world.add("a", range(4))
    world.add("b", range(4, 8), state=ServerState.JOINING)
    view = view_of(world.source, "me", world.online(), world.servers.values())
    assert choose_blocks(view, 12, 4) == range(8, 12)
    assert choose_blocks(SwarmView([], []), 12, 4) == range(4)


# --- a move -----------------------------------------------------------------------------------------------------------


def test_the_order_of_a_move() -> None:
    world = World(6)
    world.add("twin", range(4))
    rebalancer = world.add("me", range(4)).rebalancer()
    while_moving = {}
    world.hook = lambda peer, step: while_moving.update({step.split()[0]: world.servers["me"]})
    assert rebalancer.look_and_move()
    assert world.log == [
        "me look", "me say", "me look", "me ask", "me add block.4,block.5", "me look", "me ask",
        "me remove block.0,block.1", "me end",
    ]  # fmt: skip
    assert while_moving["add"].moving_from == "block.[0:2]"
    assert while_moving["add"].moving_to == "block.[4:6]"
    assert while_moving["remove"].uids == uids(range(6))
    assert world.hosts("me") == [2, 3, 4, 5]
    assert rebalancer.place == range(2, 6)
    assert rebalancer.moves == 1
    assert world.servers["me"].moving_from == world.servers["me"].moving_to == ""
    assert not rebalancer.look_and_move()
    assert rebalancer.moves == 1


def test_a_server_in_a_good_place_says_nothing() -> None:
    world = World(8)
    world.add("other", range(4))
    assert not world.add("me", range(4, 8)).rebalancer().look_and_move()
    assert world.log == ["me look"]


def test_balance_quality() -> None:
    for quality, moved in ((0.0, False), (QUALITY, False), (2.0, True)):
        world = World(4)
        for i in range(9):
            world.add(f"left{i}", range(2))
            world.add(f"right{i}", range(2, 4))
        world.add("more", range(2, 4))
        assert world.add("me", range(2, 4)).rebalancer(quality).look_and_move() is moved


def test_a_block_whose_other_holder_is_dead_is_not_left() -> None:
    world = World(8)
    world.add("twin", range(4))
    world.dead.add("twin")  # killed, and its records have not ended yet
    assert not world.add("me", range(4)).rebalancer().look_and_move()
    assert world.hosts("me") == [0, 1, 2, 3]
    assert world.servers["me"].moving_from == ""


def test_one_living_holder_among_dead_ones_is_enough() -> None:
    world = World(8)
    for i in range(4):
        world.add(f"twin{i}", range(4))
    world.dead |= {"twin0", "twin2", "twin3"}
    assert world.add("me", range(4)).rebalancer(seed=1).look_and_move()


def test_a_holder_that_goes_while_blocks_are_loaded() -> None:
    world = World(8)
    world.add("twin", range(4))
    rebalancer = world.add("me", range(4)).rebalancer()
    world.hook = lambda peer, step: world.dead.add("twin") if step.startswith("add") else None
    assert not rebalancer.look_and_move()
    assert world.hosts("me") == [0, 1, 2, 3]  # the new ones are given back
    assert rebalancer.place == range(4)
    assert world.log[-2:] == ["me remove block.4,block.5,block.6,block.7", "me end"]


@pytest.mark.parametrize("seed", range(25))
def test_of_two_holders_never_both_leave(seed: int) -> None:
    """In whatever order their steps come: the second one to look sees that the first one is going, and stays."""
    world = World(8)
    rebalancers = [world.add(name, range(4)).rebalancer(seed=seed) for name in ("first", "second")]
    run_interleaved(world, [rebalancer.look_and_move for rebalancer in rebalancers], random.Random(seed))
    assert world.held() >= set(range(4))
    for rebalancer in rebalancers * 2:
        rebalancer.look_and_move()
    assert world.held() == set(range(8))  # one of them has gone, in the end
    assert sum(rebalancer.moves for rebalancer in rebalancers) == 1


@pytest.mark.parametrize("step", ["look", "say", "ask", "add", "remove", "end"])
def test_whatever_fails_the_blocks_stay_covered_and_it_is_tried_again(step: str) -> None:
    world = World(8)
    world.add("twin", range(4))
    node = world.add("me", range(4))
    rebalancer = node.rebalancer()
    node.fail = {step: CallTimeout("slow")}
    if step == "end":
        assert rebalancer.look_and_move()
    else:
        with pytest.raises(CallTimeout):
            rebalancer.look_and_move()
    assert world.held() >= {0, 1, 2, 3}
    node.fail = {}
    if step != "remove":  # a server that cannot even let go of blocks is stopping
        assert rebalancer.look_and_move() is (step != "end")
        assert world.held() == set(range(8))


def test_a_look_that_fails_while_blocks_are_loaded_counts_as_staying() -> None:
    world = World(8)
    world.add("twin", range(4))
    node = world.add("me", range(4))
    world.hook = lambda peer, step: node.fail.update(ask=TransportError("away")) if step.startswith("add") else None
    assert not node.rebalancer().look_and_move()
    assert world.hosts("me") == [0, 1, 2, 3]


def test_a_block_that_cannot_be_loaded() -> None:
    def fail(index: int) -> ExpertBackend:
        raise ConfigError(f"no weights of block {index}")

    world = World(8)
    world.add("twin", range(4))
    rebalancer = world.add("me", range(4)).rebalancer()
    rebalancer.source = replace(world.source, make=fail)
    with pytest.raises(ConfigError, match="block 4"):
        rebalancer.look_and_move()
    assert world.hosts("me") == [0, 1, 2, 3]
    assert world.servers["me"].moving_from == ""


# --- the background ---------------------------------------------------------------------------------------------------


def test_it_looks_now_and_then_through_failures_until_it_is_stopped(caplog: pytest.LogCaptureFixture) -> None:
    world = World(8)
    world.add("twin", range(4))
    node = world.add("me", range(4))
    node.fail = {"look": CallTimeout("the DHT is slow")}
    failed, moved = threading.Event(), threading.Event()

    def hook(peer: str, step: str) -> None:
        if step == "end":
            moved.set()
        elif len(world.log) > 3:
            failed.set()

    world.hook = hook
    rebalancer = node.rebalancer(period_s=0.01)
    rebalancer.start()
    assert failed.wait(20)
    node.fail = {}
    assert moved.wait(20)
    rebalancer.stop()
    assert "the DHT is slow" in caplog.text
    assert rebalancer.place == range(4, 8)
    assert not [thread for thread in threading.enumerate() if thread.name == "moe-rebalancer"]


def test_stopping_before_the_first_look() -> None:
    world = World(4)
    rebalancer = world.add("me", range(4)).rebalancer(period_s=1e6)
    rebalancer.start()
    rebalancer.stop()
    assert world.log == []
    assert repr(rebalancer) == "Rebalancer('block.[0:4]', 0 moves)"


# --- many at once -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_servers_that_move_at_the_same_time_never_uncover_a_block(seed: int) -> None:
    """Five servers move at once, their steps in random order; and now and then one dies."""
    rng = random.Random(seed)
    world = World(12)
    rebalancers = {}
    for i in range(24):
        length = rng.choice((2, 3, 4))
        start = rng.choice((0, 0, 1, 12 - length))
        node = world.add(f"s{i}", range(start, start + length), rng.choice((50.0, 100.0)))
        rebalancers[f"s{i}"] = node.rebalancer(rng.choice((QUALITY, 1.5)), seed=i)
    for turn in range(24):
        living = [name for name in rebalancers if name not in world.dead]
        covered = world.held()

        def check(covered: set[int] = covered) -> None:
            assert covered <= world.held()

        run_interleaved(world, [rebalancers[name].look_and_move for name in rng.sample(living, 5)], rng, check)
        if turn in (5, 11):
            world.dead.add(rng.choice(living))
    assert all(world.hosts(name) == list(rebalancer.place) for name, rebalancer in rebalancers.items())
    assert world.held() == set(range(12))
    assert sum(rebalancer.moves for rebalancer in rebalancers.values()) > 0
