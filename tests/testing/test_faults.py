"""FaultPlan: what is scripted happens, to the very calls it was scripted for, and nothing else does."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

from moe.errors import CallTimeout, ConnectError, ExpertFailed, PeerGone, ProtocolError
from moe.expert_uid import PeerIDLike
from moe.schema import BatchTensorProto, ExpertSchema
from moe.server.task_pool import TaskPool
from moe.testing import FakeClock, FaultPlan, FaultyTransport, FiredFault, InjectedFault, MemoryPeer
from moe.transport.base import BACKWARD, FORWARD, Call, Reply
from moe.wire.messages import ExpertDescription, ReplyHeader

PEER = MemoryPeer("peer")


class Inner:
    """Answers at once; counts its work."""

    def __init__(self) -> None:
        self.done: list[str] = []
        self.closed = False

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        self.done.append("info")
        return ExpertDescription(schema=ExpertSchema((BatchTensorProto(),)).to_plain(), max_batch_size=1)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        self.done.append(call.method)
        return Reply(ReplyHeader(), [torch.ones(2)])

    async def close(self) -> None:
        self.closed = True


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


def call(transport: FaultyTransport, method: str = FORWARD, timeout_s: float | None = 5.0, uid: str = "e.0") -> Any:
    if method == "info":
        return run(transport.info(PEER, uid, timeout_s=timeout_s))
    return run(transport.call(PEER, Call(method, uid, None, [], []), timeout_s=timeout_s))


def outcomes(transport: FaultyTransport, *methods: str, **options: Any) -> list[str]:
    """The name of each call's error, or "ok"."""
    seen = []
    for method in methods:
        try:
            call(transport, method, **options)
        except Exception as e:
            seen.append(type(e).__name__)
        else:
            seen.append("ok")
    return seen


def test_without_rules_nothing_happens() -> None:
    plan, inner = FaultPlan(), Inner()
    transport = FaultyTransport(inner, plan)
    assert outcomes(transport, FORWARD, BACKWARD, "info") == ["ok"] * 3
    assert plan.fired == []
    run(transport.close())
    assert inner.closed


def test_rules_count_the_calls_that_match_them() -> None:
    plan, inner = FaultPlan(), Inner()
    plan.on(BACKWARD, at=2).close()
    transport = FaultyTransport(inner, plan)
    assert plan.unfired == ["close at backward 2 (seen 0)"]
    assert outcomes(transport, BACKWARD, FORWARD, BACKWARD, BACKWARD) == ["ok", "ok", "PeerGone", "ok"]
    assert plan.fired == [FiredFault("close", BACKWARD, "e.0", "peer")]
    assert plan.unfired == []
    assert inner.done == [BACKWARD, FORWARD, BACKWARD]


def test_rules_may_hold_for_several_calls_some_experts_or_peers() -> None:
    plan = FaultPlan()
    plan.on(at=2, times=2).refuse_connection()
    transport = FaultyTransport(Inner(), plan)
    assert outcomes(transport, FORWARD, "info", BACKWARD, FORWARD) == ["ok", "ConnectError", "ConnectError", "ok"]
    plan = FaultPlan()
    plan.on(uid="e.1", times=None).close()
    plan.on(peer="another", times=None).close()
    transport = FaultyTransport(Inner(), plan)
    assert outcomes(transport, FORWARD, "info", uid="e.0") == ["ok", "ok"]
    assert outcomes(transport, FORWARD, "info", FORWARD, uid="e.1") == ["PeerGone"] * 3


@pytest.mark.parametrize("wrong", [{"at": 0}, {"times": 0}])
def test_calls_are_counted_from_one(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="counted from 1"):
        FaultPlan().on(FORWARD, **wrong)


@pytest.mark.parametrize(
    "fault, error, work",
    [
        ("refuse_connection", ConnectError, False),
        ("close", PeerGone, False),
        ("close_after_work", PeerGone, True),
        ("stall", CallTimeout, False),
        ("drop_reply", CallTimeout, True),
    ],
)
def test_what_each_fault_does(fault: str, error: type[Exception], work: bool) -> None:
    plan, inner = FaultPlan(), Inner()
    getattr(plan.on(FORWARD), fault)()
    transport = FaultyTransport(inner, plan)
    with pytest.raises(error):
        call(transport, timeout_s=0.05)
    assert inner.done == ([FORWARD] if work else [])
    assert call(transport).tensors[0].shape == (2,)


def test_a_reply_is_lost_also_if_it_would_have_been_an_error() -> None:
    class Failing(Inner):
        async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
            raise ExpertFailed("no")

    plan = FaultPlan()
    plan.on(FORWARD).close_after_work()
    with pytest.raises(PeerGone):
        call(FaultyTransport(Failing(), plan))


def test_a_stall_of_some_seconds_goes_on() -> None:
    plan = FaultPlan()
    plan.on(FORWARD).stall(seconds=0.05)
    start = time.monotonic()
    assert call(FaultyTransport(Inner(), plan))
    assert time.monotonic() - start >= 0.04


def test_errors_and_callbacks_of_ones_own() -> None:
    plan, inner = FaultPlan(), Inner()
    seen: list[list[str]] = []
    plan.on(FORWARD).fail(ProtocolError("own"))
    plan.on(FORWARD, at=2).run(lambda: seen.append(list(inner.done)))
    plan.on(FORWARD, at=3).run(lambda: seen.append(list(inner.done)), after_work=True)
    transport = FaultyTransport(inner, plan)
    assert outcomes(transport, FORWARD, FORWARD, FORWARD) == ["ProtocolError", "ok", "ok"]
    assert seen == [[], [FORWARD, FORWARD]]


def test_answers_can_be_changed() -> None:
    plan = FaultPlan()
    plan.on(FORWARD).corrupt_reply()
    plan.on("info").corrupt_reply(lambda description: "nonsense")
    transport = FaultyTransport(Inner(), plan)
    assert call(transport).tensors[0].shape == (1, 1, 3)
    assert call(transport, "info") == "nonsense"
    assert call(transport).tensors[0].shape == (2,)


def test_several_rules_may_act_on_one_call() -> None:
    plan, inner = FaultPlan(), Inner()
    order: list[str] = []
    plan.on(FORWARD).run(lambda: order.append("first"))
    plan.on(FORWARD).close_after_work()
    with pytest.raises(PeerGone):
        call(FaultyTransport(inner, plan))
    assert order == ["first"]
    assert inner.done == [FORWARD]


def test_a_runtime_crashes_at_the_batch_that_was_scripted() -> None:
    plan = FaultPlan()
    plan.crash_runtime(at_batch=2, pool="e.0_backward")
    forward, backward = (TaskPool(lambda tasks: [], 1, f"e.0_{name}") for name in (FORWARD, BACKWARD))
    for pool in (forward, backward, forward):
        plan.on_batch(pool, [])
    with pytest.raises(InjectedFault, match="e.0_backward"):
        plan.on_batch(backward, [])
    plan.on_batch(backward, [])
    assert plan.fired == [FiredFault("crash_runtime", "e.0_backward")]
    assert "1 fired" in repr(plan)


def test_the_clock_stands_still_until_told_otherwise() -> None:
    clock = FakeClock(5.0)
    assert clock() == clock() == 5.0
    assert clock.advance(1.5) == clock() == 6.5
    assert repr(clock) == "FakeClock(6.5)"
    with pytest.raises(ValueError, match="forward only"):
        clock.advance(-1.0)
