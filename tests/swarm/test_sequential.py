"""Sequences over servers in other processes, which are killed: results as if nothing had happened, and nothing left.

s.. in a test's name: see tests/client/test_sequential.py.
"""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from moe.client.expert import RemoteExpert, transport_of
from moe.client.sequence_manager import SequenceManager
from moe.client.sequential import RemoteSequential
from moe.config import ClientConfig
from moe.dht import DHT, find_servers
from moe.expert_uid import ExpertInfo, PeerIDLike
from moe.transport.base import BACKWARD, FORWARD, Call, ExpertTransport, Reply
from moe.wire.messages import ExpertDescription
from tests.client.sequence_swarm import PROMPT_LENGTH, Block, FixedRouter
from tests.experts import HIDDEN
from tests.swarm.experts import make_backend
from tests.swarm.tools import Host, peers_of, report, wait_until

pytestmark = pytest.mark.timeout(240)  # the first test starts everybody

MIB = 2**20
UIDS = ["block.0", "block.1", "block.2"]
CONFIG = ClientConfig(request_timeout_s=20.0, total_timeout_s=60.0, min_backoff_s=0.05)
LASTS_S, KILLED_AFTER_S = 1.5, 0.4  # a block's computation, and when in it its server is killed


def experts(*indices: int) -> list[dict[str, Any]]:
    return [{"kind": "block", "uid": UIDS[i], "seed": i} for i in indices]


def local_blocks() -> list[Block]:
    return [make_backend(**one).module for one in experts(0, 1, 2)]  # type: ignore[misc]


@contextlib.contextmanager
def hosts_of(dht: DHT, *hosted: list[dict[str, Any]], **spec: Any) -> Iterator[list[Host]]:
    """Servers, started all at once, and seen by all."""
    uids = sorted({one["uid"] for own in hosted for one in own})
    with contextlib.ExitStack() as stack:
        with ThreadPoolExecutor(len(hosted)) as pool:
            starting = [pool.submit(Host, peers_of(dht), experts=own, **spec) for own in hosted]
        for future in starting:
            if future.exception() is None:
                stack.enter_context(future.result())
        hosts = [future.result() for future in starting]
        wait_until(lambda: len(find_servers(dht, uids, timeout_s=10.0)) == len(hosted), 30.0, "announcing")
        yield hosts


@pytest.fixture(scope="module")
def hosts(dht: DHT) -> Iterator[list[Host]]:
    """Two servers of all blocks, one of the first two, two of the last. The tests kill, in this order, all but two."""
    hosted = [[0, 1, 2], [0, 1, 2], [0, 1], [2], [2]]
    with hosts_of(dht, *(experts(*indices) for indices in hosted)) as made:
        for host, indices in zip(
            made, hosted
        ):  # links to all of them, so that no test is said to have left those behind
            RemoteExpert(ExpertInfo(UIDS[indices[0]], host.peer_id), dht)(torch.zeros(1, 1, HIDDEN))
        yield made


class Killer:
    """A transport that kills servers at the calls that go to them.

    :ivar orders: what is to happen to the next calls: (method, "before", "during" or "after")
    :ivar killed: whom
    """

    def __init__(self, inner: ExpertTransport, hosts: Sequence[Host]):
        self.inner, self.orders = inner, list[tuple[str, str]]()
        self.killed: list[Host] = []
        self._hosts = {host.peer_id.to_base58(): host for host in hosts}
        self._lock = threading.Lock()

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        return await self.inner.info(peer, uid, timeout_s=timeout_s)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        host = self._hosts[peer.to_base58()]
        with self._lock:
            acts = bool(self.orders) and self.orders[0][0] == call.method and host not in self.killed
            moment = self.orders.pop(0)[1] if acts else ""
            self.killed += [host] if acts else []
        if moment == "before":
            host.kill()
        if moment == "during":
            threading.Timer(KILLED_AFTER_S, host.kill).start()
        reply = await self.inner.call(peer, call, timeout_s=timeout_s)
        assert moment != "during", "it was to die before it had an answer"
        if moment == "after":
            host.kill()
        return reply

    async def close(self) -> None:
        """The transport is not ours to close."""


class Work:
    """A call with shared and per-block kwargs, one of which takes its time, and what it gives here."""

    def __init__(self, dht: DHT, hosts: Sequence[Host], manager: Any, *, slow: int) -> None:
        self.killer = Killer(transport_of(dht), hosts)
        self.sequence = RemoteSequential(self.killer, UIDS, config=CONFIG, manager=manager)
        self.h = torch.randn(3, 4, HIDDEN, requires_grad=True)
        self.shared = {
            "mask": torch.rand(3, 4) > 0.3,
            "lora_a": torch.randn(HIDDEN, 2, requires_grad=True),
            "lora_b": torch.randn(2, HIDDEN, requires_grad=True),
        }
        self.own: list[dict[str, torch.Tensor]] = [
            {"scale": torch.randn(HIDDEN, requires_grad=True)},
            {"prompt": torch.randn(3, PROMPT_LENGTH, HIDDEN, requires_grad=True)},
            {"scale": torch.randn(HIDDEN, requires_grad=True)},
        ]
        self.wanted = [self.h, self.shared["lora_a"], self.shared["lora_b"], *(t for o in self.own for t in o.values())]
        output = self.h
        for block, extra in zip(local_blocks(), self.own):
            output = block(output, **self.shared, **extra)
        self.grad = torch.randn_like(output)
        self.expected = [output.detach(), *torch.autograd.grad(output, self.wanted, self.grad)]
        self.own[slow]["delay"] = torch.tensor([0.0, LASTS_S, 0.0])

    def run(self, *orders: tuple[str, str]) -> None:
        """Forward and backward, with what is to happen in them."""
        self.killer.orders[:] = orders
        output = self.sequence(self.h, block_kwargs=self.own, **self.shared)
        got = [output.detach(), *torch.autograd.grad(output, self.wanted, self.grad)]
        for mine, reference in zip(got, self.expected, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
        assert not self.killer.orders
        assert len(self.killer.killed) == len(orders)


def test_two_servers_killed_in_a_row_in_the_middle_of_a_forward_and_before_the_backward(
    dht: DHT, hosts: list[Host]
) -> None:
    """The first two host all blocks; the backward takes other ways, for which the forward of some is computed again."""
    peers = {host.peer_id.to_base58(): host.peer_id for host in hosts}
    router = FixedRouter(UIDS, dict(zip(peers, [UIDS, UIDS, UIDS[:2], UIDS[2:], UIDS[2:]])), peers)
    work = Work(dht, hosts, router, slow=0)
    work.run((FORWARD, "during"), (FORWARD, "after"))
    assert work.killer.killed == hosts[:2]
    assert [stop.split("@")[0] for stop in router.routes[-1]] == ["0:2", "2:3"]


def test_a_server_killed_in_the_middle_of_a_backward(dht: DHT, hosts: list[Host]) -> None:
    """The last block is slow, the first that goes back. Records of those that died before are still there."""
    Work(dht, hosts, SequenceManager(dht, UIDS, CONFIG), slow=2).run((BACKWARD, "during"))


def test_blocks_are_found_by_their_prefix_and_parts_go_their_own_ways(dht: DHT, hosts: list[Host]) -> None:
    """Without anybody's help: what is left of the servers after the other tests."""
    sequence = RemoteSequential(dht, prefix="block", num_blocks=3, config=ClientConfig(max_tokens_per_request=4))
    h = torch.randn(5, 4, HIDDEN)
    local = h
    for block in local_blocks():
        local = block(local)
    torch.testing.assert_close(sequence(h), local, atol=1e-5, rtol=1e-5)
    assert [expert.uid for expert in sequence] == UIDS
    torch.testing.assert_close(sequence[2](sequence[:2](h)), local, atol=1e-5, rtol=1e-5)


def test_s10_five_hundred_steps_through_three_servers_leave_everything_flat(dht: DHT) -> None:
    uids = [f"step.{i}" for i in range(3)]
    hosted = [[{"kind": "block", "uid": uid, "seed": i, "lr": 1e-4}] for i, uid in enumerate(uids)]
    handler = {"once_max_replies": 16, "held_max_bytes_per_peer": MIB}  # what is kept on purpose is there soon
    with hosts_of(dht, *hosted, handler=handler) as hosts:
        sequence = RemoteSequential(dht, uids, config=ClientConfig(max_tokens_per_request=4096))
        lora = [torch.randn(HIDDEN, 2, requires_grad=True), torch.zeros(2, HIDDEN, requires_grad=True)]
        prompts = torch.zeros(3, 1, PROMPT_LENGTH, HIDDEN, requires_grad=True)
        optimizer = torch.optim.SGD([*lora, prompts], lr=0.1)
        h, target = torch.randn(2, 96, 32, HIDDEN)  # 72 KiB each: if one was kept of each step, 18 MiB
        mask = torch.rand(96, 32) > 0.2

        def steps(count: int) -> float:
            for _ in range(count):
                optimizer.zero_grad()
                own = [{"prompt": prompt} for prompt in prompts.unbind()]
                output = sequence(h, mask=mask, lora_a=lora[0], lora_b=lora[1], block_kwargs=own)
                loss = (output - target).square().mean()
                loss.backward()
                optimizer.step()
            return float(loss.detach())

        def measure() -> list[tuple[float, int, int]]:
            """(MiB, descriptors, threads) of the client and of each server with all its processes."""
            gc.collect()
            groups = [[psutil.Process()], *([host.process, *host.family()] for host in hosts)]
            return [
                (
                    sum(p.memory_info().rss for p in group) / MIB,
                    sum(p.num_fds() for p in group),
                    sum(p.num_threads() for p in group),
                )
                for group in groups
            ]

        first = steps(250)  # whatever is filled once
        before = measure()
        last = steps(250)
        after = measure()
        for name, then, now in zip(("client", *uids), before, after):
            report(f"{name}, MiB, descriptors, threads: {then} -> {now}")
            assert now[0] - then[0] < 5, name
            assert now[1] <= then[1] + 3, name
            assert now[2] <= then[2] + 3, name
        assert last < first
