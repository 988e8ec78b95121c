"""Blocks that move, on real servers: gaps are filled, nobody's request fails meanwhile, and nothing stays behind."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from moe.client.expert import get_experts
from moe.client.sequential import RemoteSequential
from moe.config import ClientConfig, ServerConfig
from moe.dht import DHT, find_experts, list_servers, stop_dht
from moe.errors import ExpertNotFound
from moe.schema import BatchTensorProto
from moe.server.assembly import assemble
from moe.server.blocks import BlockSource, seed_of, seeded
from moe.server.expert_backend import ExpertBackend
from moe.server.server import Server
from moe.testing.swarm import LocalSwarm
from tests.leaks import Snapshot
from tests.swarm.tools import LOOPBACK, serving, wait_until

WIDTH, TOTAL, HOSTED = 8, 8, 4
PATIENT = ClientConfig(total_timeout_s=60.0)


def make_block(index: int) -> ExpertBackend:
    uid = f"block.{index}"
    return seeded(
        seed_of(uid), lambda: ExpertBackend(uid, torch.nn.Linear(WIDTH, WIDTH), args_schema=(BatchTensorProto(WIDTH),))
    )


def command_blocks(blocks: range) -> dict[str, ExpertBackend]:
    """Blocks as ``hivemind-server`` makes them."""
    parts = assemble(
        block_indices=f"{blocks.start}:{blocks.stop}", hidden_dim=WIDTH, optim_cls=None, throughput=None, **LOOPBACK
    )
    stop_dht(parts.dht)
    return parts.backends


SOURCE = BlockSource(prefix="block.", total=TOTAL, make=make_block)
LOCAL = torch.nn.Sequential(*(make_block(index).module for index in range(TOTAL)))


def settings(**changes: Any) -> ServerConfig:
    return ServerConfig(
        update_period_s=5.0, drain_quiet_s=0.3, drain_timeout_s=3.0, **{"balance_period_s": 0.5, **changes}
    )


def holders(dht: DHT) -> list[int]:
    """How many servers can be found for each block."""
    return [
        0 if found is None else len(found.peer_ids) for found in find_experts(dht, [f"block.{i}" for i in range(TOTAL)])
    ]


@contextlib.contextmanager
def callers(dht: DHT, uids: list[str]) -> Iterator[list[int]]:
    """Call experts all the time, one thread for each, until the end of the body; fails if any call does."""
    ending, calls = threading.Event(), [0] * len(uids)

    def call(i: int) -> None:
        (expert,) = get_experts(dht, [uids[i]], config=PATIENT)
        while not ending.is_set():
            x = torch.randn(2, WIDTH, requires_grad=True)
            try:
                y = expert(x)
            except ExpertNotFound:  # the only server it knew has moved: look again
                (expert,) = get_experts(dht, [uids[i]], config=PATIENT)
                continue
            torch.testing.assert_close(y, LOCAL[int(uids[i].removeprefix("block."))](x))
            y.sum().backward()
            calls[i] += 1

    with ThreadPoolExecutor(len(uids)) as threads:
        calling = [threads.submit(call, i) for i in range(len(uids))]
        try:
            wait_until(lambda: all(calls) or any(one.done() for one in calling), 60, "the first calls")
            yield calls
        finally:
            ending.set()
            for one in calling:
                one.result(60)


def test_one_of_two_servers_on_the_same_blocks_fills_the_gap_and_no_request_fails(dht: DHT) -> None:
    still = settings(balance_quality=0.0)
    twins = SOURCE.make_all(range(HOSTED)).values()
    with (
        serving(dht, *twins, config=still, throughput=100.0, blocks=SOURCE) as first,
        serving(
            dht, *SOURCE.make_all(range(HOSTED)).values(), config=settings(), throughput=100.0, blocks=SOURCE
        ) as second,
    ):
        assert second.rebalancer is not None
        with callers(dht, ["block.0", "block.3"]):
            wait_until(lambda: second.rebalancer.moves == 1, 60, "the move")  # type: ignore[union-attr]
        assert holders(dht) == [1] * TOTAL
        assert list(first.expert_backends) == [f"block.{i}" for i in range(HOSTED)]
        assert list(second.expert_backends) == [f"block.{i}" for i in range(HOSTED, TOTAL)]


def test_two_servers_that_both_may_move(dht: DHT) -> None:
    """Both see the same gap. One goes, one stays, while all blocks are called; then neither moves any more. What they had
    before is what they have afterwards: pools, threads, processes, descriptors."""
    servers: list[Server] = []
    with contextlib.ExitStack() as stack:
        for _ in range(2):
            backends = SOURCE.make_all(range(HOSTED)).values()
            servers.append(
                stack.enter_context(
                    serving(dht, *backends, config=settings(balance_period_s=1e6), throughput=100.0, blocks=SOURCE)
                )
            )
        sequence = RemoteSequential(dht, prefix="block.", num_blocks=TOTAL, config=PATIENT)
        rebalancers = [server.rebalancer for server in servers]
        assert all(rebalancer is not None for rebalancer in rebalancers)
        with callers(dht, [f"block.{i}" for i in range(HOSTED)]) as calls:
            before = Snapshot.take()
            pools = [len(server.runtime.pools) for server in servers]
            earlier = list(calls)
            with ThreadPoolExecutor(
                2
            ) as threads:  # their periods would let them look at any time; here at the same time
                moved = list(threads.map(lambda rebalancer: rebalancer.look_and_move(), rebalancers))
            if not any(moved):  # each saw that the other one was leaving
                moved = [rebalancers[0].look_and_move(), False]  # type: ignore[union-attr]
            assert sorted(moved) == [False, True]
            assert holders(dht) == [1] * TOTAL
            assert not any(rebalancer.look_and_move() for rebalancer in rebalancers)  # type: ignore[union-attr]
            wait_until(lambda: all(now > then for now, then in zip(calls, earlier)), 60, "calls after the move")
            after = Snapshot.take()
            assert [len(server.runtime.pools) for server in servers] == pools
            assert after.children == before.children
            assert {thread.name for thread in after.threads} - {thread.name for thread in before.threads} == set()
            assert after.descriptor_count <= before.descriptor_count
        x = torch.randn(3, WIDTH)
        torch.testing.assert_close(sequence(x), LOCAL(x))
        assert not any(info.moving_from or info.moving_to for info in list_servers(dht))
        del sequence


def test_s5_experts_come_and_go_while_others_are_called(dht: DHT) -> None:
    with serving(dht, make_block(0), config=settings()) as server, callers(dht, ["block.0"]) as calls:
        for _ in range(2):
            server.add_backends(SOURCE.make_all([5]))
            (expert,) = get_experts(dht, ["block.5"])
            x = torch.randn(2, WIDTH)
            torch.testing.assert_close(expert(x), LOCAL[5](x))
            server.remove_backends(["block.5"])
            assert find_experts(dht, ["block.5"]) == [None]
            with pytest.raises(ExpertNotFound):
                expert(x)
        before = calls[0]
        wait_until(lambda: calls[0] > before, 30, "another call")


def test_a_server_that_stops_in_the_middle_of_a_move_stops_at_once_and_leaves_no_records(dht: DHT) -> None:
    loading, go_on = threading.Event(), threading.Event()

    def make_slowly(index: int) -> ExpertBackend:
        loading.set()
        go_on.wait(60)
        return make_block(index)

    slow = BlockSource(prefix="block.", total=TOTAL, make=make_slowly)
    try:
        with serving(
            dht, *SOURCE.make_all(range(HOSTED)).values(), config=settings(balance_quality=0.0), throughput=1.0
        ):
            with serving(
                dht, *SOURCE.make_all(range(HOSTED)).values(), config=settings(), throughput=1.0, blocks=slow
            ) as server:
                assert loading.wait(60)
                stopping = threading.Thread(target=server.shutdown)
                stopping.start()
                stopping.join(15)
                assert not stopping.is_alive()
            go_on.set()
            assert holders(dht) == [1] * HOSTED + [0] * (TOTAL - HOSTED)
            for left in [thread for thread in threading.enumerate() if thread.name == "moe-rebalancer"]:
                left.join(30)
                assert not left.is_alive()
            assert holders(dht) == [1] * HOSTED + [0] * (TOTAL - HOSTED)
    finally:
        go_on.set()


def test_the_command_joins_where_blocks_are_missing_and_moves_when_a_server_dies() -> None:
    common = ["--total_blocks", "8", "--hidden_dim", str(WIDTH), "--throughput", "100", "--update_period", "1.5"]
    moving = [*common, "--num_blocks", "4", "--balance_period", "0.5", "--torch_threads", "1"]
    with LocalSwarm([*common, "--block_indices", "0:4", "--optimizer", "none"], moving) as swarm:
        dht = swarm.dht(client_mode=False, **LOOPBACK)
        assert holders(dht) == [1] * 8
        assert {info.throughput_rows_per_s for info in list_servers(dht)} == {100.0}
        x = torch.randn(2, WIDTH)
        expected = RemoteSequential(dht, prefix="block.", num_blocks=8, config=PATIENT)(x)
        main = psutil.Process(swarm.processes(1)[0])
        threads, children = main.num_threads(), len(main.children(recursive=True))
        backends = command_blocks(range(4, 8))
        with serving(dht, *backends.values(), throughput=100.0):
            swarm.kill(0)
            wait_until(lambda: holders(dht) == [1] * 8, 60, "one of two servers in the place of the dead one")
            again = RemoteSequential(dht, prefix="block.", num_blocks=8, config=PATIENT)(x)
            torch.testing.assert_close(again, expected)
            assert len(main.children(recursive=True)) == children
            wait_until(lambda: main.num_threads() <= threads, 20, "threads as before")
