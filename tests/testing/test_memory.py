"""Servers in this process: everything but the network is real, and the Runtime can be held."""

from __future__ import annotations

import threading

import pytest
import torch

from moe.config import ClientConfig, HandlerConfig
from moe.errors import CallTimeout, ConnectError, NoExpertsFound, RemoteError, Unavailable
from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.testing import FaultPlan, MemoryPeer, MemoryServer, memory_swarm
from tests.experts import HIDDEN, in_parallel, linear_backend

WAIT_S = 20.0
DATA = torch.randn(2, HIDDEN)


def test_a_served_expert_is_called_like_a_remote_one() -> None:
    backend = linear_backend("e.0")
    config = ClientConfig(total_timeout_s=7.0)
    with memory_swarm({"e.0": backend}, config=config) as swarm:
        expert = swarm.expert("e.0")
        torch.testing.assert_close(expert(DATA), backend.module(DATA))
        assert expert.config is config
        assert swarm.calls == [("server0", "info", "e.0"), ("server0", "forward", "e.0")]
        assert swarm.server.peer == MemoryPeer("server0")
        assert swarm.server.peer.to_bytes() == b"server0"
        assert "server0" in repr(swarm)
    assert not swarm.server.runtime.is_alive()
    with pytest.raises(Unavailable, match="stopping"):
        swarm.expert("e.0", config=ClientConfig(max_retries=0))(DATA)


def test_tensors_are_copied_as_a_network_would() -> None:
    seen = []

    class Keeping(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(x)
            return x

    backend = ExpertBackend("e.0", Keeping(), args_schema=(BatchTensorProto(2),))
    with memory_swarm({"e.0": backend}) as swarm:
        x = torch.ones(1, 2)
        y = swarm.expert("e.0")(x)
        assert len({t.data_ptr() for t in (x, y, seen[-1])}) == 3


def test_a_held_runtime_lets_requests_gather_into_one_batch() -> None:
    backend = linear_backend("e.0")
    with memory_swarm({"e.0": backend}) as swarm:
        expert = swarm.expert("e.0")
        expert(DATA)
        outputs: list[torch.Tensor] = []
        with swarm.server.paused():
            calls = threading.Thread(target=lambda: outputs.extend(in_parallel([lambda: expert(DATA)] * 5)))
            calls.start()
            swarm.server.wait_pending(5)
            assert swarm.server.pending == 5
        calls.join(WAIT_S)
        assert len(outputs) == 5
        assert backend.forward_pool.statistics().batches == 2
        with pytest.raises(CallTimeout, match="only 0 of 1"):
            swarm.server.wait_pending(1, timeout_s=0.02)


def test_a_runtime_that_is_not_there_cannot_be_held() -> None:
    server = MemoryServer({"e.0": linear_backend("e.0")})
    with pytest.raises(CallTimeout, match="took up nothing new"), server.paused(timeout_s=0.02):
        pass
    assert server.pending == 0
    server.stop()


def test_several_servers_of_one_expert() -> None:
    config = ClientConfig(min_backoff_s=0.0)
    with memory_swarm({"e.0": linear_backend("e.0")}, {"e.0": linear_backend("e.0")}, config=config) as swarm:
        expert = swarm.expert("e.0")
        swarm.kill(0)
        assert expert(DATA).shape == DATA.shape
        assert [server for server, method, _ in swarm.calls if method == "forward"] == ["server1"]
        swarm.kill(1)
        with pytest.raises(NoExpertsFound):
            swarm.expert("e.0")
        with pytest.raises(ConnectError):
            expert(DATA)


def test_a_plan_reaches_transport_and_runtime() -> None:
    plan = FaultPlan()
    plan.on("forward").close()
    plan.crash_runtime(pool="e.0_forward", at_batch=2)
    config = ClientConfig(min_backoff_s=0.0, max_retries=1)
    with memory_swarm({"e.0": linear_backend("e.0")}, plan=plan, config=config) as swarm:
        expert = swarm.expert("e.0")
        assert expert(DATA).shape == DATA.shape
        with pytest.raises(Unavailable, match="has died"):
            expert(DATA)
    assert plan.unfired == []


def test_options_reach_handler_and_runtime() -> None:
    config = HandlerConfig(max_request_bytes=10)
    with memory_swarm({"e.0": linear_backend("e.0")}, handler_config=config, prefetch_batches=2) as swarm:
        assert swarm.server.runtime.prefetch_batches == 2
        with pytest.raises((RemoteError, ValueError), match="10 bytes"):
            swarm.expert("e.0")(DATA[:1])
