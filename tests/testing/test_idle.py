"""check_idle: silent where requests have left nothing, and names what they have left."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.task_pool import Task
from moe.testing import MemoryServer, check_idle, memory_swarm
from moe.transport.base import FORWARD
from moe.wire.messages import RequestHeader


def linear() -> dict[str, ExpertBackend]:
    module = torch.nn.Linear(8, 8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return {"linear.0": ExpertBackend("linear.0", module, optimizer, args_schema=(BatchTensorProto(8),))}


def test_a_server_that_has_served_is_idle() -> None:
    with memory_swarm(linear()) as swarm:
        check_idle(swarm.server)
        expert = swarm.expert("linear.0")
        expert(torch.randn(40_000, 8, requires_grad=True)).sum().backward()  # large enough to be held for the backward
        check_idle(swarm.server)


def test_waits_for_what_is_ending() -> None:
    with memory_swarm(linear()) as swarm:
        reservation = swarm.server.handler.inflight.reserve("peer", 10, "test")
        begin = time.monotonic()
        with pytest.raises(AssertionError, match="10"):
            check_idle(swarm.server, timeout_s=0.1)
        assert time.monotonic() - begin >= 0.1
        reservation.done_with("test")
        check_idle(swarm.server)


def lose_bytes(server: MemoryServer) -> Callable[[], object]:
    reservation = server.handler.inflight.reserve("peer", 10, "test")
    return lambda: reservation.done_with("test")


def lose_an_empty_reservation(server: MemoryServer) -> Callable[[], object]:
    reservation = server.handler.inflight.reserve("peer", 0, "test")
    return lambda: reservation.done_with("test")


def lose_a_request(server: MemoryServer) -> Callable[[], object]:
    admission = server.handler.open("peer", FORWARD, "linear.0", RequestHeader())
    return admission.release


def lose_a_waiting_peer(server: MemoryServer) -> Callable[[], object]:
    inflight = server.handler.inflight
    inflight.when_given_back("peer", lambda: None)
    return lambda: inflight.reserve("peer", 0, "test").done_with("test")


def lose_a_task(server: MemoryServer) -> Callable[[], object]:
    pool = server.backends["linear.0"].forward_pool
    task = Task(FORWARD, (), (), [], 1, group=None)
    pool._tasks[task.number] = task
    return lambda: pool._tasks.clear()


def miscount_what_is_held(server: MemoryServer) -> Callable[[], object]:
    server.handler.held_inputs.bytes += 1
    return lambda: setattr(server.handler.held_inputs, "bytes", 0)


LOSSES: dict[str, Callable[[MemoryServer], Any]] = {
    "although no request is open": lose_bytes,
    "reservations": lose_an_empty_reservation,
    "open requests": lose_a_request,
    "links that wait": lose_a_waiting_peer,
    "self._tasks": lose_a_task,
    "self.bytes": miscount_what_is_held,
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_left_is_named(name: str) -> None:
    with MemoryServer(linear()) as server:
        find_again = LOSSES[name](server)
        with pytest.raises(AssertionError, match=re.escape(name)):
            check_idle(server, timeout_s=0.0)
        find_again()
        check_idle(server)


def test_a_swarm_looks_at_its_end() -> None:
    with pytest.raises(AssertionError, match="reservations"), memory_swarm(linear()) as swarm:
        swarm.server.handler.inflight.reserve("peer", 0, "lost")


def test_a_swarm_whose_test_has_failed_says_that_and_nothing_else() -> None:
    with pytest.raises(ValueError, match="mine"), memory_swarm(linear()) as swarm:
        swarm.server.handler.inflight.reserve("peer", 0, "lost")
        raise ValueError("mine")
