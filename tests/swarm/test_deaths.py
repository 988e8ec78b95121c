"""Processes that are killed, threads that die: those who wait are told, and nothing stays behind."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil
import pytest
import torch

from moe.client.expert import RemoteExpert, get_experts
from moe.config import ClientConfig, ServerConfig
from moe.dht import DHT, find_experts, start_dht, stop_dht
from moe.errors import ConnectError, LifecycleError, MoEError, PeerGone, TransportError, Unavailable
from moe.expert_uid import ExpertInfo
from moe.server.task_pool import Task, TaskPool
from tests.swarm.experts import WIDTH, make_backend
from tests.swarm.host import call_slowly
from tests.swarm.tools import (
    LOOPBACK,
    Child,
    Host,
    connect,
    peers_of,
    refused,
    report,
    serving,
    wait_until,
)

SLOW: dict[str, Any] = {"kind": "slow", "uid": "slow.0", "max_batch_size": 2**18}
LINEAR = {"kind": "linear", "uid": "linear.0"}
IMPATIENT = ClientConfig(request_timeout_s=8.0, total_timeout_s=10.0, max_retries=0)
ways = pytest.mark.parametrize("transport", ["auto", "libp2p"])
SMALL, LARGE = 2, 2**17  # rows; 4 MiB go as a stream


def lasting(seconds: float, rows: int = 2) -> torch.Tensor:
    x = torch.zeros(rows, WIDTH)
    x[0, 0] = seconds
    return x


def remote(dht: DHT, peer_id: object, uid: str = "slow.0", config: ClientConfig = IMPATIENT) -> RemoteExpert:
    expert = RemoteExpert(ExpertInfo(uid, peer_id), dht, config=config)  # type: ignore[arg-type]
    expert.describe()
    return expert


@pytest.fixture
def dht() -> Iterator[DHT]:
    """A new swarm for each test: in the old one there are too many dead."""
    dht = start_dht(**LOOPBACK)
    connect(dht)
    yield dht
    stop_dht(dht)


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


# --- the client --------------------------------------------------------------------------------------------------------


@ways
def test_nothing_is_left_of_a_client_that_is_killed(dht: DHT, transport: str) -> None:
    with serving(dht, make_backend(**SLOW, lr=0.0)) as server:
        backend = server.expert_backends["slow.0"]
        pools = backend.get_pools()
        expert = remote(dht, server.dht.peer_id, config=ClientConfig(transport=transport))
        expert(lasting(0.0))
        before = psutil.Process().num_fds()
        with Child(call_slowly, peers_of(server.dht), transport, [SMALL, LARGE, SMALL, LARGE]) as client:
            assert client.receive() == "calling"
            wait_until(lambda: sum(pool.statistics().pending for pool in pools) >= 2, what="a queue")
            client.kill()
            killed = time.monotonic()
        wait_until(lambda: all(pool.statistics().pending == 0 for pool in pools), what="withdrawing the calls")
        wait_until(lambda: server.handler.inflight_bytes == 0, what="forgetting the requests")
        report(f"forgotten {time.monotonic() - killed:.2f} s after the kill")
        wait_until(lambda: psutil.Process().num_fds() <= before, what="closing the connections")
        torch.testing.assert_close(expert(lasting(0.0)), lasting(0.0))
        assert server.is_healthy()


# --- the server --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "rows", "whole"),
    [("auto", SMALL, True), ("auto", LARGE, False), ("libp2p", SMALL, False), ("libp2p", LARGE, True)],
)
def test_a_server_that_is_killed_in_a_call(
    dht: DHT, pool: ThreadPoolExecutor, transport: str, rows: int, whole: bool
) -> None:
    """Either all of its processes at once, or the main one alone."""
    with Host(peers_of(dht), experts=[SLOW]) as host:
        config = ClientConfig(request_timeout_s=8.0, total_timeout_s=10.0, max_retries=0, transport=transport)
        expert = remote(dht, host.peer_id, config=config)
        expert(lasting(0.0))
        call = pool.submit(expert, lasting(5.0, rows))
        time.sleep(0.5)
        host.kill(alone=not whole)
        with refused((PeerGone, TransportError, ConnectError, Unavailable), within_s=8.5):
            call.result(30)
        with pytest.raises(MoEError):
            expert(lasting(0.0))
        assert host.wait(10) == -signal.SIGKILL
        assert host.survivors(10.0) == []


def test_the_libp2p_daemon_of_a_server_is_killed(dht: DHT) -> None:
    with Host(peers_of(dht), experts=[SLOW]) as host:
        (daemon,) = (process for process in host.family() if process.name().startswith("p2pd"))
        daemon.kill()
        assert host.wait(20) == 1
        assert host.survivors() == []


def test_the_dht_process_of_a_server_is_killed(dht: DHT) -> None:
    with Host(peers_of(dht), experts=[SLOW]) as host:
        (daemon,) = (process for process in host.family() if process.name().startswith("p2pd"))
        node = daemon.parent()
        assert node is not None and node != host.process
        node.kill()
        assert host.wait(20) == 1
        assert host.survivors() == []


def test_the_libp2p_daemon_of_a_client_is_killed(dht: DHT, pool: ThreadPoolExecutor) -> None:
    """Calls over it fail at once, instead of waiting for an answer that cannot come."""
    with serving(dht, make_backend(**SLOW)) as server:
        own = start_dht(peers_of(server.dht), **LOOPBACK)
        try:
            expert = remote(own, server.dht.peer_id, config=ClientConfig(transport="libp2p", max_retries=0))
            calls = [pool.submit(expert, lasting(3.0, rows)) for rows in (2, 2**17)]
            time.sleep(0.5)
            for process in psutil.Process(own.pid).children():
                process.kill()
            for call in calls:
                with refused((TransportError, PeerGone, ConnectError)):
                    call.result(30)
            with refused((ConnectError, TransportError)):
                expert(lasting(0.0))
        finally:
            stop_dht(own)


def test_the_runtime_dies(dht: DHT, pool: ThreadPoolExecutor) -> None:
    config = {"update_period_s": 2.0}
    with Host(peers_of(dht), experts=[SLOW, LINEAR], die_after=1, config=config) as host:
        slow = remote(dht, host.peer_id)
        linear = remote(dht, host.peer_id, "linear.0")
        assert find_experts(dht, ["slow.0", "linear.0"])[0] is not None
        running = pool.submit(slow, lasting(1.0))
        time.sleep(0.3)
        waiting = [pool.submit(linear, torch.ones(2, WIDTH)) for _ in range(5)]
        torch.testing.assert_close(running.result(30), lasting(1.0))
        for call in waiting:
            with refused((Unavailable, PeerGone, ConnectError)):
                call.result(30)
        assert host.wait(20) == 1
        assert host.survivors() == []
        assert find_experts(dht, ["slow.0", "linear.0"]) == [None, None]


def test_the_runtime_dies_with_batches_on_their_way_to_the_device(dht: DHT, pool: ThreadPoolExecutor) -> None:
    die = False

    def on_batch(pool: TaskPool, batch: list[Task]) -> None:
        if die:
            raise RuntimeError("told to die")

    backends = make_backend(**SLOW), *(make_backend("linear", f"linear.{i}") for i in range(4))
    with serving(dht, *backends, on_batch=on_batch, prefetch_batches=2) as server:
        slow, *others = (remote(dht, server.dht.peer_id, backend.name) for backend in backends)
        running = pool.submit(slow, lasting(1.0))
        time.sleep(0.3)
        waiting = [pool.submit(other, torch.ones(2, WIDTH)) for other in others]
        time.sleep(0.3)
        die = True
        running.result(30)
        for call in waiting:
            with refused((Unavailable, PeerGone)):
                call.result(30)
        server.join(20)
        assert isinstance(server.failure, LifecycleError) and not server.is_alive()


def test_while_a_batch_runs_for_long_callers_are_sent_elsewhere_and_nobody_else_is_hurt(
    dht: DHT, pool: ThreadPoolExecutor
) -> None:
    """Its own caller, who is patient, gets the answer; the server goes on."""
    config = ServerConfig(stuck_after_s=0.5)
    with serving(dht, make_backend(**SLOW), make_backend(**LINEAR), config=config) as server:
        slow, linear = remote(dht, server.dht.peer_id), remote(dht, server.dht.peer_id, "linear.0")
        long = pool.submit(slow, lasting(4.0))
        wait_until(lambda: server.runtime.busy_s() > 0, what="the batch")
        waiting = pool.submit(linear, torch.ones(2, WIDTH))
        with refused(Unavailable, "a batch has been running for"):
            waiting.result(30)
        with refused(Unavailable, "try another server"):
            linear(torch.ones(2, WIDTH))
        wait_until(lambda: find_experts(dht, ["slow.0", "linear.0"]) == [None, None], what="hiding the experts")
        assert not server.is_healthy() and server.is_alive()
        torch.testing.assert_close(long.result(30), lasting(4.0))
        wait_until(lambda: None not in find_experts(dht, ["slow.0", "linear.0"]), what="showing the experts")
        assert server.is_healthy() and server.failure is None
        linear(torch.ones(2, WIDTH))


def test_a_server_told_to_give_up_does_so_when_a_batch_never_ends(dht: DHT, pool: ThreadPoolExecutor) -> None:
    with Host(peers_of(dht), experts=[SLOW, LINEAR], config={"give_up_after_s": 0.5}) as host:
        slow, linear = remote(dht, host.peer_id), remote(dht, host.peer_id, "linear.0")
        stuck = pool.submit(slow, lasting(60.0))
        time.sleep(0.3)
        waiting = pool.submit(linear, torch.ones(2, WIDTH))
        with refused((Unavailable, PeerGone)):
            waiting.result(30)
        assert host.wait(20) == 1
        with pytest.raises(MoEError):
            stuck.result(30)
        assert find_experts(dht, ["slow.0"]) == [None]


# --- a server that stops ---------------------------------------------------------------------------------------------------


@ways
def test_a_server_that_stops_answers_everybody(dht: DHT, pool: ThreadPoolExecutor, transport: str) -> None:
    """The batch at hand is finished and its callers get their answers, also large ones; those who wait are told."""
    config = ClientConfig(max_retries=0, total_timeout_s=20.0, transport=transport)
    with serving(dht, make_backend(**SLOW), make_backend(**LINEAR)) as server:
        slow = remote(dht, server.dht.peer_id, config=config)
        linear = remote(dht, server.dht.peer_id, "linear.0", config=config)
        running = [pool.submit(slow, lasting(0.8, LARGE))]
        wait_until(lambda: server.runtime.busy_s() > 0, what="a batch")
        waiting = [pool.submit(linear, torch.ones(2, WIDTH)) for _ in range(4)]
        wait_until(lambda: server.expert_backends["linear.0"].forward_pool.statistics().pending == 4, what="a queue")
        server.shutdown()
        for call in running:
            torch.testing.assert_close(call.result(30), lasting(0.8, LARGE))
        for call in waiting:
            with refused(Unavailable, "stopping"):
                call.result(30)


# --- several servers of one expert ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("ending", "transport"), [("kill", "auto"), ("stop", "libp2p")])
def test_another_server_of_the_same_expert_goes_on(dht: DHT, ending: str, transport: str) -> None:
    uid = "twin.1"
    experts = [{"kind": "linear", "uid": uid, "lr": 0.0}]
    config = ClientConfig(request_timeout_s=5.0, total_timeout_s=20.0, transport=transport)
    with Host(peers_of(dht), experts=experts) as one, Host(peers_of(dht), experts=experts) as two:
        (expert,) = get_experts(dht, [uid], config=config)
        assert {peer.to_base58() for peer in expert.caller.peers} == {one.peer_id.to_base58(), two.peer_id.to_base58()}
        x = torch.randn(3, WIDTH, requires_grad=True)
        expected = expert(x)
        first, other = (one, two) if expert.peer_id == one.peer_id else (two, one)
        if ending == "kill":
            first.kill()
        else:
            first.terminate()
        for _ in range(5):
            y = expert(x)
            torch.testing.assert_close(y, expected)
            y.sum().backward()
        if ending == "stop":
            assert first.wait(10) == 0
            (found,) = find_experts(dht, [uid])
            assert found is not None and [peer.to_base58() for peer in found.peer_ids] == [other.peer_id.to_base58()]
        (again,) = get_experts(dht, [uid], config=config)
        torch.testing.assert_close(again(x), expected)
