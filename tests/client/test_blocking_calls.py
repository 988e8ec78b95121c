"""ExpertCaller by a thread that waits: what it sends itself, what the event loop does, and how both are one call. What
holds for calls of either kind is in test_calls.py.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe.client.calls import ExpertCaller
from moe.config import ClientConfig
from moe.errors import PeerGone, SchemaError
from moe.testing import FaultPlan, MemorySwarm, memory_swarm
from moe.transport.base import BACKWARD, FORWARD, Budget
from moe.transport.event_loop import client_loop
from tests.client.memory_swarm import Blocking
from tests.experts import HIDDEN, LoraExpert, linear_backend, lora_backend

WAIT_S = 20.0
UID = "linear.0"
QUICK = ClientConfig(min_backoff_s=0.0, total_timeout_s=WAIT_S)
DATA, GRAD = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)


def methods(swarm: MemorySwarm) -> list[str]:
    return [f"{peer[-1]}:{method}" for peer, method, _ in swarm.calls]


def blocking_caller(swarm: MemorySwarm, config: ClientConfig = QUICK) -> tuple[ExpertCaller, Blocking]:
    transport = Blocking(swarm.transport)
    caller = ExpertCaller(UID, [server.peer for server in swarm.servers], transport, config)
    client_loop().run(caller.describe(Budget(WAIT_S)))
    return caller, transport


def test_a_thread_sends_itself_what_takes_one_request() -> None:
    with memory_swarm({UID: linear_backend()}) as swarm:
        caller, transport = blocking_caller(swarm)
        (output,) = caller.forward_blocking([DATA], (), Budget(WAIT_S))
        torch.testing.assert_close(output, swarm.server.backends[UID].module(DATA))
        (grad,) = caller.backward_blocking([DATA], [GRAD], (), [True], Budget(WAIT_S))
        assert grad is not None
        assert [call.method for call in transport.carried] == [FORWARD, BACKWARD]
        assert methods(swarm) == ["0:info", "0:forward", "0:backward"]


def test_what_is_not_known_or_takes_several_requests_is_for_the_event_loop() -> None:
    with memory_swarm({UID: linear_backend(max_batch_size=2)}) as swarm:
        transport = Blocking(swarm.transport)
        caller = ExpertCaller(UID, [swarm.server.peer], transport, QUICK)
        assert caller.forward_blocking([DATA[:1]], (), Budget(WAIT_S))  # what it takes is asked for
        assert caller.forward_blocking([DATA], (), Budget(WAIT_S))
        assert transport.carried == []
        assert methods(swarm) == ["0:info", "0:forward", "0:forward", "0:forward"]


def test_what_a_server_may_hold_is_for_the_event_loop() -> None:
    with memory_swarm({"lora.0": lora_backend(LoraExpert())}) as swarm:
        transport = Blocking(swarm.transport)
        caller = ExpertCaller("lora.0", [swarm.server.peer], transport, QUICK)
        client_loop().run(caller.describe(Budget(WAIT_S)))
        present = ("lora_a", "lora_b")
        for rank in (1, 1024):  # small ones are always sent
            tensors = [torch.randn(2, 3, HIDDEN), torch.randn(HIDDEN, rank), torch.randn(rank, HIDDEN)]
            assert caller.forward_blocking(tensors, present, Budget(WAIT_S))
        assert [call.tensors[1].shape[1] for call in transport.carried] == [1]


def test_a_failed_call_of_a_thread_counts_as_the_first_attempt() -> None:
    plan = FaultPlan()
    plan.on(FORWARD, times=None).close()
    with memory_swarm({UID: linear_backend()}, {UID: linear_backend()}, plan=plan) as swarm:
        caller, transport = blocking_caller(swarm, dataclasses.replace(QUICK, max_retries=2))
        with pytest.raises(PeerGone, match="attempts"):
            caller.forward_blocking([DATA], (), Budget(WAIT_S))
        assert [fired.peer for fired in plan.fired] == ["server0", "server1", "server0"]
        assert len(transport.carried) == 1


def test_a_backward_whose_answer_a_thread_has_lost_trains_once() -> None:
    plan = FaultPlan()
    plan.on(BACKWARD).close_after_work()
    with memory_swarm({UID: linear_backend(lr=0.1)}, plan=plan) as swarm:
        caller, transport = blocking_caller(swarm)
        assert caller.backward_blocking([DATA], [GRAD], (), [True], Budget(WAIT_S))[0] is not None
        assert len(transport.carried) == 1
        assert methods(swarm) == ["0:info", "0:backward", "0:backward"]
        assert swarm.server.backends[UID].updates == 1


def test_a_schema_error_is_told_before_a_thread_sends_anything() -> None:
    with memory_swarm({UID: linear_backend()}) as swarm:
        caller, transport = blocking_caller(swarm)
        with pytest.raises(SchemaError, match=r"args\[0\]"):
            caller.forward_blocking([torch.randn(2, HIDDEN + 1)], (), Budget(WAIT_S))
        assert transport.carried == []
