"""What happens to a sequence when servers fail: results as if nothing had, and an end to it when it is too much.

Servers are in this process, their failures are scripted, and the router is one without chance.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from moe.client.routing import Span
from moe.errors import (
    CallTimeout,
    ExpertFailed,
    ExpertNotFound,
    LifecycleError,
    MissingBlocks,
    NonFiniteError,
    Overloaded,
    PeerGone,
    ProtocolError,
    RemoteSchemaError,
    SchemaError,
)
from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.testing import FaultPlan
from moe.transport.base import Reply
from moe.transport.event_loop import client_loop
from tests.client.sequence_swarm import PROMPT_LENGTH, SequenceSwarm, block_backend, sequence_swarm
from tests.experts import HIDDEN

B = BatchTensorProto
BLOCKS = 3
KILLED_AFTER_S = 0.4  # a request_timeout_s that a stalled call uses up


def leaf(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, requires_grad=True)


class Work:
    """A call with shared and per-block kwargs, and what it gives locally."""

    def __init__(self, swarm: SequenceSwarm, rows: int = 3) -> None:
        torch.manual_seed(0)
        self.swarm = swarm
        self.h = leaf(rows, 4, HIDDEN)
        self.shared = {"mask": torch.rand(rows, 4) > 0.3, "lora_a": leaf(HIDDEN, 2), "lora_b": leaf(2, HIDDEN)}
        self.own: list[dict[str, torch.Tensor]] = [
            {"scale": leaf(HIDDEN)},
            {"prompt": leaf(rows, PROMPT_LENGTH, HIDDEN)},
            {"scale": leaf(HIDDEN), "prompt": leaf(1, PROMPT_LENGTH, HIDDEN)},
        ]
        self.wanted = [self.h, self.shared["lora_a"], self.shared["lora_b"]]
        self.wanted += [tensor for extra in self.own for tensor in extra.values()]
        local = swarm.run_locally(self.h, per_block=[{**self.shared, **self._row(extra)} for extra in self.own])
        self.grad = torch.randn_like(local)
        self.expected = [local.detach(), *torch.autograd.grad(local, self.wanted, self.grad)]

    def _row(self, extra: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.expand(len(self.h), -1, -1) if name == "prompt" else value for name, value in extra.items()}

    def forward(self, **config: Any) -> torch.Tensor:
        output: torch.Tensor = self.swarm.sequence(**config)(self.h, block_kwargs=self.own, **self.shared)
        return output

    def check(self, output: torch.Tensor, **options: Any) -> None:
        got = [output.detach(), *torch.autograd.grad(output, self.wanted, self.grad, **options)]
        for mine, reference in zip(got, self.expected, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)


def nan_instead(reply: Reply) -> Reply:
    return Reply(reply.header, [torch.full_like(t, float("nan")) for t in reply.tensors])


def no_gradients(reply: Reply) -> Reply:
    return Reply(reply.header, reply.tensors[:-1])


FAULTS: dict[str, Any] = {
    "refuses": lambda point: point.refuse_connection(),
    "closes": lambda point: point.close(),
    "dies after the work": lambda point: point.close_after_work(),
    "stalls": lambda point: point.stall(),
    "never replies": lambda point: point.drop_reply(),
    "answers other shapes": lambda point: point.corrupt_reply(),
    "answers nan": lambda point: point.corrupt_reply(nan_instead),
    "answers too little": lambda point: point.corrupt_reply(no_gradients),
    "is full": lambda point: point.fail(Overloaded("full")),
    "hosts it no more": lambda point: point.fail(ExpertNotFound("moved")),
    "its module fails": lambda point: point.fail(ExpertFailed("its own fault")),
}


@pytest.mark.parametrize("method", ["forward", "backward"])
@pytest.mark.parametrize("fault", FAULTS)
def test_a_failing_server_costs_a_retry_and_changes_nothing(fault: str, method: str) -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1], [2], [1, 2], [0, 1], plan=plan) as swarm:
        FAULTS[fault](plan.on(method, peer="server0", times=None))
        work = Work(swarm)
        work.check(work.forward(request_timeout_s=KILLED_AFTER_S, detect_anomalies=True))
        assert not plan.unfired
        assert [peer for peer, _ in swarm.router.failures] == ["server0"]
        failed = {"stalls": "CallTimeout", "answers nan": "NonFiniteError", "answers too little": "ProtocolError"}
        assert swarm.router.failures[0][1] == failed.get(fault, swarm.router.failures[0][1])
        assert swarm.router.refreshed == (fault == "hosts it no more")


@pytest.mark.parametrize("hosted", [([0, 1, 2], [0], [1, 2]), ([0, 1, 2], [0, 1], [2]), ([0, 1, 2], [0], [1], [2])])
@pytest.mark.parametrize("tokens", [100, 4])
def test_a_server_lost_between_forward_and_backward_is_replaced_by_several(
    hosted: tuple[Sequence[int], ...], tokens: int
) -> None:
    """The forward of the pieces is computed again, with the kwargs."""
    with sequence_swarm(*hosted) as swarm:
        work = Work(swarm)
        output = work.forward(max_tokens_per_request=tokens)
        swarm.kill(0)
        work.check(output, retain_graph=True)
        parts = 3 if tokens == 4 else 1
        recomputed = [call for call in swarm.calls if call[1] == "forward" and call[0] != "server0"]
        assert len(recomputed) == parts * (len(hosted) - 2)  # of the last piece only the backward is needed
        work.check(output)  # and again


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_two_servers_lost_in_a_row(method: str) -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1, 2], [0, 1], [0], [1, 2], [2], plan=plan) as swarm:
        plan.on(method, peer="server0").run(lambda: swarm.kill(0))
        plan.on(None, uid="b.0 b.1", peer="server1").run(lambda: swarm.kill(1))
        work = Work(swarm)
        work.check(work.forward())
        assert [peer for peer, _ in swarm.router.failures] == ["server0", "server1"]


def test_a_server_lost_while_the_forward_is_computed_again() -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1, 2], [0, 1], [2], [0, 1], plan=plan) as swarm:
        work = Work(swarm)
        output = work.forward()
        plan.on("backward", peer="server0").run(lambda: swarm.kill(0))
        plan.on("forward", peer="server1").run(lambda: swarm.kill(1))
        work.check(output)
        assert [peer for peer, _ in swarm.router.failures] == ["server0", "server1"]


def test_servers_lost_in_forward_and_others_in_backward() -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1], [2], [1], [0, 1], [1, 2], plan=plan) as swarm:
        plan.on("forward", peer="server1").run(lambda: swarm.kill(1))
        plan.on("backward", peer="server0").run(lambda: swarm.kill(0))
        work = Work(swarm)
        work.check(work.forward())
        assert [peer for peer, _ in swarm.router.failures] == ["server1", "server0"]


def test_parts_of_a_batch_survive_their_servers_alike() -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1], [2], [0, 1, 2], plan=plan) as swarm:
        plan.on("forward", peer="server0", at=2).run(lambda: swarm.kill(0))
        work = Work(swarm, rows=6)
        work.check(work.forward(max_tokens_per_request=4))


def test_a_hiccup_of_the_only_server_is_waited_out() -> None:
    plan = FaultPlan()
    plan.on("forward", at=1, times=2).fail(Overloaded("busy"))
    plan.on("backward", at=1, times=2).close_after_work()
    with sequence_swarm([0, 1, 2], plan=plan) as swarm:
        work = Work(swarm)
        work.check(work.forward())
        assert len(swarm.router.failures) == 4


# --- training ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["dies after the work", "never replies", "closes"])
def test_a_retried_backward_trains_each_block_once(fault: str) -> None:
    plan = FaultPlan()
    FAULTS[fault](plan.on("backward", times=2))
    with sequence_swarm([0, 1, 2], plan=plan, lr=0.1) as swarm:
        swarm.sequence(request_timeout_s=KILLED_AFTER_S)(torch.randn(2, 3, HIDDEN)).sum().backward()
        assert len(swarm.router.failures) == 2
        assert [b.updates for b in swarm.swarm.server.backends.values()] == [1, 1, 1]


def test_a_backward_cut_otherwise_after_a_failure_trains_no_block_of_a_server_twice() -> None:
    """The first try trains blocks 2 and 1 of server0; then it is asked for block 2 alone."""
    plan = FaultPlan()
    with sequence_swarm([0, 1, 2], plan=plan, lr=0.1) as swarm:
        work = Work(swarm)
        output = work.forward()
        plan.on("backward").close_after_work()
        swarm.router.hosted = {"server0": {"b.2"}, "other": {"b.0", "b.1"}}
        swarm.swarm._services["other"] = swarm.swarm._services["server0"]
        work.wanted, work.expected = work.wanted[:0], work.expected[:0]
        torch.autograd.grad(output, [work.h], work.grad)
        assert swarm.router.routes[-1] == ["0:2@other", "2:3@server0"]
        assert [b.updates for b in swarm.swarm.server.backends.values()] == [1, 1, 1]


# --- the end of it -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["forward", "backward"])
def test_after_so_many_retries_the_error_lists_each_attempt(method: str) -> None:
    plan = FaultPlan()
    with sequence_swarm([0], [1, 2], [1, 2], plan=plan) as swarm:
        work = Work(swarm)
        plan.on(method, peer="server1", times=None).close()
        plan.on(method, peer="server2", times=None).fail(Overloaded("full to the brim"))
        with pytest.raises((PeerGone, Overloaded)) as caught:
            work.check(work.forward(max_retries=2))
        message = caught.value.message
        assert message.count("1:3 via ...") == 3
        assert "1:3 via ...erver1: PeerGone: injected: closed before the request" in message
        assert "1:3 via ...erver2: Overloaded: full to the brim" in message
        assert len(swarm.router.failures) == 3


def test_no_retries_is_a_choice() -> None:
    plan = FaultPlan()
    plan.on("forward").close()
    with sequence_swarm([0, 1, 2], [0, 1, 2], plan=plan) as swarm, pytest.raises(PeerGone, match="attempts: 0:3"):
        swarm.sequence(max_retries=0)(torch.randn(1, 2, HIDDEN))


@pytest.mark.parametrize("method", ["info", "forward", "backward"])
def test_one_time_budget_is_for_everything(method: str) -> None:
    plan = FaultPlan()
    plan.on(method, times=None).stall()
    with sequence_swarm([0, 1], [2], [0, 1, 2], plan=plan) as swarm:
        work = Work(swarm)
        start = time.monotonic()
        with pytest.raises(CallTimeout) as caught:
            work.check(
                work.forward(
                    total_timeout_s=0.5, request_timeout_s=0.2, connect_timeout_s=0.2, max_retries=100,
                    max_tokens_per_request=4,
                )
            )  # fmt: skip
        assert time.monotonic() - start < 5
        assert "attempts: " in caught.value.message


def test_blocks_that_nobody_hosts_any_more_are_waited_for_and_then_missing() -> None:
    with sequence_swarm([0, 1, 2]) as swarm:
        work = Work(swarm)
        output = work.forward()
        swarm.kill(0)
        swarm.router.hosted = {}
        with pytest.raises(MissingBlocks, match=r"attempts: 0:3 via .*ConnectError.*; no route: MissingBlocks"):
            work.check(output)


def test_blocks_that_come_back_are_found() -> None:
    with sequence_swarm([0, 1, 2], [0, 1, 2]) as swarm:
        work = Work(swarm)
        output = work.forward()
        swarm.kill(0)
        hosted, swarm.router.hosted = swarm.router.hosted, {}
        inner, asked = swarm.router.make_route, []

        async def later(*args: Any, **kwargs: Any) -> Any:
            asked.append(args)
            if len(asked) == 2:
                swarm.router.hosted = hosted
            return await inner(*args, **kwargs)

        swarm.router.make_route = later  # type: ignore[method-assign]
        work.check(output)


# --- what is nobody's failure ------------------------------------------------------------------------------------------


def test_mistakes_of_the_client_are_not_retried_and_ban_nobody() -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1, 2], [0, 1, 2], plan=plan) as swarm:
        seq = swarm.sequence()
        with pytest.raises(SchemaError):
            seq(torch.randn(2, 3, HIDDEN + 1))
        plan.on("forward", times=1).fail(LifecycleError("stopped"))
        with pytest.raises(LifecycleError, match="stopped"):
            seq(torch.randn(2, 3, HIDDEN))
        assert not swarm.calls  # it was injected before the server, once
        assert not swarm.router.failures


def test_what_servers_say_is_a_mistake_of_the_client_is_asked_elsewhere_and_bans_nobody() -> None:
    plan = FaultPlan()
    plan.on("forward", times=None).fail(SchemaError("too long for its position embedding"))
    with sequence_swarm([0, 1, 2], [0, 1, 2], plan=plan) as swarm:
        with pytest.raises(RemoteSchemaError, match=r"too long .*0:3 via \.\.\.erver0.*0:3 via \.\.\.erver1"):
            swarm.sequence()(torch.randn(2, 3, HIDDEN))
        assert len(plan.fired) == 4  # each is asked again what it takes, and called once more


def test_bugs_are_not_taken_for_failures_of_servers() -> None:
    with sequence_swarm([0, 1, 2], [0, 1, 2]) as swarm:

        async def fail(*_: Any, **__: Any) -> list[Span]:
            raise ZeroDivisionError("a bug")

        swarm.router.make_route = fail  # type: ignore[method-assign]
        with pytest.raises(ZeroDivisionError):
            swarm.sequence()(torch.randn(1, 2, HIDDEN))
        assert not swarm.router.failures


class Picky(nn.Module):
    """Raises for large numbers."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if bool((x > 100).any()):
            raise ValueError("too large")
        return x * 2


def picky_backend(uid: str, module: nn.Module, *, lr: float | None) -> ExpertBackend:
    return ExpertBackend(uid, module, args_schema=(B(2),))


def test_what_fails_wherever_it_is_tried_is_tried_once_everywhere() -> None:
    with sequence_swarm([0, 1], [0, 1], [0, 1], make=Picky, backend=picky_backend) as swarm:
        with pytest.raises(ExpertFailed, match="too large.*attempts: .*erver0.*erver1.*erver2"):
            swarm.sequence(max_retries=10)(torch.full((1, 2), 60.0))
        assert [peer for peer, _ in swarm.router.failures] == ["server0", "server1", "server2"]
        assert [peer for peer, *_ in swarm.calls] == ["server0", "server1", "server2"]


def test_a_block_of_another_kind_under_the_same_name_is_not_used_and_not_banned() -> None:
    def backend(uid: str, module: nn.Module, *, lr: float | None) -> ExpertBackend:
        made.append(uid)
        if len(made) == 3:  # that of server1
            return ExpertBackend(uid, nn.Linear(HIDDEN, HIDDEN), args_schema=(B(HIDDEN),))
        return block_backend(uid, module)

    made: list[str] = []
    with sequence_swarm([0, 1], [0], [0, 1], backend=backend) as swarm:
        seq, h = swarm.sequence(), torch.randn(1, 2, HIDDEN)
        expected = seq(h)
        swarm.router.hosted = {name: swarm.router.hosted[name] for name in ("server1", "server2")}
        torch.testing.assert_close(seq(h), expected)
        assert not swarm.router.failures
        swarm.router.hosted = {"server1": {"b.0", "b.1"}}
        with pytest.raises(SchemaError, match="b.0 takes .* there, which does not fit"):
            seq[:1](h)
        assert not swarm.router.failures


def test_a_restarted_server_is_asked_again_what_it_takes() -> None:
    with sequence_swarm([0, 1]) as swarm:
        seq, h = swarm.sequence(max_retries=1), torch.randn(5, 2, HIDDEN)
        expected = seq(h)
        for backend in swarm.swarm.server.backends.values():
            for pool in backend.get_pools():
                pool.config = type(pool.config)(max_batch_size=2)
        called = len(swarm.swarm.calls)
        torch.testing.assert_close(seq(h), expected)
        assert [call[1] for call in swarm.swarm.calls[called:]].count("info") == 2


@pytest.mark.parametrize("garbage", ["other shapes", "nan"])
def test_when_every_answer_is_garbage_the_error_says_so(garbage: str) -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1, 2], [0, 1, 2], plan=plan) as swarm:
        plan.on("forward", times=None).corrupt_reply(None if garbage == "other shapes" else nan_instead)
        kind = ProtocolError if garbage == "other shapes" else NonFiniteError
        with pytest.raises(kind, match=r"attempts: .*erver0.*erver1"):
            swarm.sequence(detect_anomalies=True)(torch.randn(1, 2, HIDDEN))


# --- what is left behind -----------------------------------------------------------------------------------------------


def test_a_call_that_is_given_up_leaves_nothing() -> None:
    plan = FaultPlan()
    with sequence_swarm([0, 1, 2], plan=plan) as swarm:
        seq = swarm.sequence(max_tokens_per_request=2)
        h = torch.randn(4, 2, HIDDEN)
        seq(h)
        plan.on("forward", times=None).stall()
        with pytest.raises(CallTimeout):
            swarm.sequence(max_tokens_per_request=2, total_timeout_s=0.3)(h)

        async def left() -> list[asyncio.Task[Any]]:
            return [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]

        deadline = time.monotonic() + 10
        while client_loop().run(left()):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert swarm.swarm.server.handler.inflight.bytes == 0


def test_describing_survives_servers_that_do_not_answer() -> None:
    plan = FaultPlan()
    plan.on("info", peer="server0", times=None).stall()
    plan.on("info", peer="server1", times=1).close()
    with sequence_swarm([0, 1, 2], [0, 1], [1, 2], plan=plan) as swarm:
        with pytest.raises(CallTimeout, match="attempts: 0:3 via ...erver0"):
            swarm.sequence(connect_timeout_s=0.1, max_retries=0)(torch.randn(1, 2, HIDDEN))
        plan.on("info", peer="server1", times=1).close()
        work = Work(swarm)
        work.check(work.forward(connect_timeout_s=0.1))
