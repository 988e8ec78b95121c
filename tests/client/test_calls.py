"""ExpertCaller: retries, deadlines, splitting, and checks of what comes back. Failures are scripted, not slept for."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from moe.client.calls import ExpertCaller, retry_delay_s
from moe.config import ClientConfig, HandlerConfig
from moe.errors import (
    CallTimeout,
    ConnectError,
    ExpertFailed,
    ExpertNotFound,
    LifecycleError,
    MoEError,
    NonFiniteError,
    Overloaded,
    PeerGone,
    ProtocolError,
    Refused,
    RemoteSchemaError,
    SchemaError,
)
from moe.expert_uid import PeerIDLike
from moe.schema import BatchTensorProto, ExpertSchema
from moe.server.expert_backend import ExpertBackend
from moe.testing import FaultPlan, FaultyTransport, MemoryPeer, MemorySwarm, memory_swarm
from moe.transport.base import BACKWARD, FORWARD, Budget, Call, Reply
from moe.transport.event_loop import client_loop
from moe.wire.messages import ExpertDescription
from tests.client.memory_swarm import Blocking
from tests.experts import (
    HIDDEN,
    LoraExpert,
    assert_same,
    in_parallel,
    linear_backend,
    local_twin,
    lora_backend,
    parameters_of,
    run_with_gradients,
    seeded,
    unchanged,
)

B = BatchTensorProto
WAIT_S = 20.0
UID = "linear.0"
QUICK = ClientConfig(min_backoff_s=0.0, total_timeout_s=WAIT_S)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return client_loop().run(coroutine, WAIT_S)


@pytest.fixture(params=["of the event loop", "of the thread that waits"], autouse=True)
def whose(request: pytest.FixtureRequest) -> str:
    """Whose calls they are: all that is said here of one way holds for both."""
    Way.blocking = request.param == "of the thread that waits"
    return str(request.param)


class Way:
    blocking = False


def caller_of(swarm: MemorySwarm, config: ClientConfig = QUICK, uid: str = UID) -> ExpertCaller:
    transport = Blocking(swarm.transport) if Way.blocking else swarm.transport
    return ExpertCaller(uid, [server.peer for server in swarm.servers], transport, config)


def forward(
    caller: ExpertCaller, *tensors: torch.Tensor, present: tuple[str, ...] = (), total_s: float = WAIT_S
) -> Any:
    if Way.blocking:
        run(caller.describe(Budget(total_s)))
        return caller.forward_blocking(tensors, present, Budget(total_s))
    return run(caller.forward(tensors, present, Budget(total_s)))


def backward(
    caller: ExpertCaller,
    inputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    present: tuple[str, ...] = (),
    wants: Sequence[bool] | None = None,
    total_s: float = WAIT_S,
) -> Any:
    wanted = [t.is_floating_point() for t in inputs] if wants is None else wants
    if Way.blocking:
        run(caller.describe(Budget(total_s)))
        return caller.backward_blocking(inputs, grads, present, wanted, Budget(total_s))
    return run(caller.backward(inputs, grads, present, wanted, Budget(total_s)))


def methods(swarm: MemorySwarm) -> list[str]:
    return [f"{peer[-1]}:{method}" for peer, method, _ in swarm.calls]


DATA, GRAD = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)


# --- what the expert takes ---------------------------------------------------------------------------------------------


def test_a_description_is_asked_for_once() -> None:
    with memory_swarm({UID: linear_backend()}) as swarm:
        caller = caller_of(swarm)
        assert caller.known is None

        async def several() -> None:
            await asyncio.gather(*(caller.describe(Budget(WAIT_S)) for _ in range(5)))

        run(several())
        forward(caller, DATA)
        assert methods(swarm) == ["0:info", "0:forward"]
        assert caller.known is not None
        caller.forget_description()
        assert caller.known is None
        forward(caller, DATA)
        assert methods(swarm)[2:] == ["0:info", "0:forward"]


def test_an_expert_without_servers_cannot_be_called() -> None:
    with pytest.raises(LifecycleError, match="at least one server"):
        ExpertCaller(UID, [], MemorySwarm([]).transport, QUICK)


def test_inputs_are_checked_before_anything_is_sent() -> None:
    with memory_swarm({UID: linear_backend()}) as swarm:
        caller = caller_of(swarm)
        for wrong in ([], [DATA, DATA], [DATA[0]], [DATA.double()], [DATA[:, 1:]]):
            with pytest.raises(SchemaError):
                forward(caller, *wrong)
        for grads in ([], [GRAD, GRAD], [GRAD[:2]], [GRAD.half()], [GRAD[:, 1:]]):
            with pytest.raises(SchemaError, match="grad_outputs"):
                backward(caller, [DATA], grads)
        with pytest.raises(SchemaError):
            forward(caller, DATA, present=("nonsense",))
        assert methods(swarm) == ["0:info"]


# --- retries -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["refuse_connection", "close", "close_after_work"])
@pytest.mark.parametrize("method", ["info", FORWARD, BACKWARD])
def test_a_transient_failure_is_tried_again(fault: str, method: str) -> None:
    plan = FaultPlan()
    getattr(plan.on(method), fault)()
    backend = linear_backend(lr=0.1)
    twin = local_twin(backend.module)
    with memory_swarm({UID: backend}, plan=plan) as swarm:
        caller = caller_of(swarm)
        expected, gradients = run_with_gradients(twin, [DATA], {}, GRAD)
        torch.testing.assert_close(forward(caller, DATA)[0], expected)
        torch.testing.assert_close(backward(caller, [DATA], [GRAD])[0], gradients["0"])
    assert plan.unfired == []
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert unchanged(backend.module, parameters_of(twin))  # also where the first one had been done already
    assert backend.updates == 1


def test_a_dropped_reply_is_asked_for_again_and_trained_once() -> None:
    plan = FaultPlan()
    plan.on(BACKWARD, at=2).drop_reply()
    backend = linear_backend(lr=0.1)
    twin = local_twin(backend.module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    config = dataclasses.replace(QUICK, request_timeout_s=0.3)
    with memory_swarm({UID: backend}, plan=plan) as swarm:
        caller = caller_of(swarm, config)
        for _ in range(3):
            _, gradients = run_with_gradients(twin, [DATA], {}, GRAD)
            optimizer.step()
            optimizer.zero_grad()
            torch.testing.assert_close(backward(caller, [DATA], [GRAD])[0], gradients["0"])
        assert methods(swarm).count("0:backward") == 4
    assert unchanged(backend.module, parameters_of(twin))


@pytest.mark.parametrize(
    "error",
    [
        RemoteSchemaError("s"),
        ExpertFailed("f"),
        NonFiniteError("n"),
        Refused("r"),
        ProtocolError("p"),
        ExpertNotFound("e"),
    ],
)
def test_what_another_try_cannot_help_is_told_at_once(error: MoEError) -> None:
    plan = FaultPlan()
    plan.on(FORWARD, times=None).fail(error)
    with memory_swarm({UID: linear_backend()}, plan=plan) as swarm:
        with pytest.raises(type(error)) as caught:
            forward(caller_of(swarm), DATA)
        assert (caught.value.uid, caught.value.peer) == (UID, "server0")
        assert len(plan.fired) == 1


def test_retries_are_bounded_and_the_last_error_tells_of_all() -> None:
    plan = FaultPlan()
    plan.on(FORWARD).refuse_connection()
    plan.on(FORWARD, at=2).fail(Overloaded("full"))
    plan.on(FORWARD, at=3, times=None).close()
    with memory_swarm({UID: linear_backend()}, plan=plan) as swarm:
        with pytest.raises(PeerGone) as caught:
            forward(caller_of(swarm, dataclasses.replace(QUICK, max_retries=2)), DATA)
        assert len(plan.fired) == 3
        for part in ("ConnectError: injected", "Overloaded: full", "PeerGone: injected", "server0"):
            assert part in str(caught.value)
        plan.fired.clear()
        with pytest.raises(PeerGone):
            forward(caller_of(swarm, dataclasses.replace(QUICK, max_retries=0)), DATA)
        assert len(plan.fired) == 1


def test_the_next_server_is_tried_first_and_kept() -> None:
    plan = FaultPlan()
    plan.on(peer="server0", times=None).refuse_connection()
    backends = [{UID: linear_backend()} for _ in range(3)]
    with memory_swarm(*backends, plan=plan) as swarm:
        caller = caller_of(swarm)
        for _ in range(2):
            forward(caller, DATA)
        assert methods(swarm) == ["1:info", "1:forward", "1:forward"]
        assert [fired.method for fired in plan.fired] == ["info"]
        assert repr(caller) == "ExpertCaller('linear.0' on 3 servers)"


def test_a_killed_server_is_replaced_by_another_in_the_middle_of_a_call() -> None:
    plan = FaultPlan()
    backends = [{UID: linear_backend()} for _ in range(2)]
    with memory_swarm(*backends, plan=plan) as swarm:
        plan.on(FORWARD).run(lambda: swarm.kill(0))
        torch.testing.assert_close(forward(caller_of(swarm), DATA)[0], backends[1][UID].module(DATA))
        assert methods(swarm) == ["0:info", "0:forward", "1:forward"]


@pytest.mark.parametrize("error", [ProtocolError("garbled"), ExpertNotFound("gone")])
def test_a_server_that_talks_nonsense_or_lost_the_expert_is_left_for_another(error: MoEError) -> None:
    plan = FaultPlan()
    plan.on(FORWARD, peer="server0").fail(error)
    with memory_swarm({UID: linear_backend()}, {UID: linear_backend()}, plan=plan) as swarm:
        assert forward(caller_of(swarm), DATA)
        assert methods(swarm)[-1] == "1:forward"


def test_parts_of_a_split_call_leave_a_dead_server_together() -> None:
    plan = FaultPlan()
    plan.on(FORWARD, peer="server0", times=None).refuse_connection()
    backends = [{UID: linear_backend(max_batch_size=1)} for _ in range(2)]
    with memory_swarm(*backends, plan=plan) as swarm:
        caller = caller_of(swarm, dataclasses.replace(QUICK, max_retries=1))
        torch.testing.assert_close(forward(caller, DATA[:2])[0], backends[0][UID].module(DATA[:2]))


def test_waits_between_attempts_double_up_to_a_limit() -> None:
    config = ClientConfig(min_backoff_s=0.2, max_backoff_s=1.0)
    assert [retry_delay_s(i, config, other_server=False) for i in range(5)] == [0.2, 0.4, 0.8, 1.0, 1.0]
    assert [retry_delay_s(i, config, other_server=True) for i in range(3)] == [0.0, 0.4, 0.8]
    assert retry_delay_s(10_000, config, other_server=True) == 1.0


# --- deadlines ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["info", FORWARD, BACKWARD])
@pytest.mark.parametrize("fault", ["stall", "drop_reply"])
def test_one_budget_covers_everything(method: str, fault: str) -> None:
    plan = FaultPlan()
    getattr(plan.on(method, times=None), fault)()
    with memory_swarm({UID: linear_backend()}, plan=plan) as swarm:
        start = time.monotonic()
        with pytest.raises(CallTimeout):
            if method == BACKWARD:
                backward(caller_of(swarm), [DATA], [GRAD], total_s=0.3)
            else:
                forward(caller_of(swarm), DATA, total_s=0.3)
        assert time.monotonic() - start < 5.0


def test_a_stalled_server_costs_only_its_own_timeout_if_there_is_another() -> None:
    plan = FaultPlan()
    plan.on("info", peer="server0", times=None).stall()
    plan.on(FORWARD, peer="server1").stall()
    config = dataclasses.replace(QUICK, connect_timeout_s=0.1, request_timeout_s=0.1)
    with memory_swarm({UID: linear_backend()}, {UID: linear_backend()}, plan=plan) as swarm:
        assert forward(caller_of(swarm, config), DATA)
        assert methods(swarm) == ["1:info", "0:forward"]


def test_no_attempt_is_made_when_there_is_no_time_for_it() -> None:
    plan = FaultPlan()
    plan.on(FORWARD, times=None).close()
    with memory_swarm({UID: linear_backend()}, plan=plan) as swarm:
        caller = caller_of(swarm, ClientConfig(min_backoff_s=30.0, max_backoff_s=30.0))
        start = time.monotonic()
        with pytest.raises(PeerGone):
            forward(caller, DATA, total_s=10.0)
        assert time.monotonic() - start < 5.0


def test_when_time_is_over_the_error_that_used_it_up_is_told() -> None:
    class Slow(FaultyTransport):
        async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
            await asyncio.sleep(0.2)
            raise Overloaded("full")

    with memory_swarm({UID: linear_backend()}) as swarm:
        caller = ExpertCaller(UID, [swarm.server.peer], Slow(swarm.transport, FaultPlan()), QUICK)
        with pytest.raises(Overloaded, match="full"):
            forward(caller, DATA, total_s=0.1)


def test_the_time_left_travels_in_the_header() -> None:
    sent: list[Call] = []

    class Recording(FaultyTransport):
        async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
            sent.append(call)
            assert call.header is not None
            assert call.header.time_left_s == timeout_s
            return await super().call(peer, call, timeout_s=timeout_s)

    with memory_swarm({UID: linear_backend()}) as swarm:
        transport = Recording(swarm.transport, FaultPlan())
        for config, total_s, expected in (
            (QUICK, 5.0, 5.0),
            (dataclasses.replace(QUICK, request_timeout_s=2.0), 5.0, 2.0),
            (dataclasses.replace(QUICK, request_timeout_s=None), None, None),
        ):
            caller = ExpertCaller(UID, [swarm.server.peer], transport, config)
            run(caller.forward([DATA], (), Budget(total_s)))
            run(caller.backward([DATA], [GRAD], (), [True], Budget(total_s)))
            for call in sent[-2:]:
                assert call.header is not None
                assert call.header.time_left_s == pytest.approx(expected, abs=1.0)


# --- large calls -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["rows", "bytes"])
@pytest.mark.parametrize("rows", [7, 8, 9, 31])
def test_a_call_larger_than_the_server_takes_equals_the_unsplit_one(limit: str, rows: int) -> None:
    module = seeded(LoraExpert)
    backend = lora_backend(module, max_batch_size=8 if limit == "rows" else 4096)
    kwargs = {"lora_a": torch.randn(HIDDEN, 2), "lora_b": torch.randn(2, HIDDEN), "mask": torch.rand(rows, 3) > 0.3}
    x, grad = torch.randn(rows, 3, HIDDEN), torch.randn(rows, 3, HIDDEN)
    config = HandlerConfig(max_request_bytes=2000) if limit == "bytes" else None
    with memory_swarm({"lora.0": backend}, handler_config=config) as swarm:
        expert = swarm.expert("lora.0")
        assert_same(
            run_with_gradients(expert, [x], kwargs, grad), run_with_gradients(local_twin(module), [x], kwargs, grad)
        )
        pieces = -(-rows // 8) if limit == "rows" else None
        forwards, backwards = methods(swarm).count("0:forward"), methods(swarm).count("0:backward")
        assert forwards == (pieces or forwards) >= 1
        assert backwards == (pieces or backwards) >= forwards


def test_a_call_that_cannot_be_split_is_refused_before_it_is_sent() -> None:
    class Total(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, x.sum()

    backend = ExpertBackend(UID, Total(), args_schema=(B(2),), max_batch_size=4)
    with memory_swarm({UID: backend}) as swarm:
        with pytest.raises(SchemaError, match="5 rows is larger than the server takes .*4 rows.*cannot be split"):
            forward(caller_of(swarm), torch.zeros(5, 2))
        assert methods(swarm) == ["0:info"]


def test_a_global_that_fills_a_request_alone_is_refused_before_it_is_sent() -> None:
    module = seeded(LoraExpert)
    config = HandlerConfig(max_request_bytes=1000)
    with memory_swarm({"lora.0": lora_backend(module)}, handler_config=config) as swarm:
        caller = caller_of(swarm, uid="lora.0")
        large = [torch.randn(2, 3, HIDDEN), torch.randn(HIDDEN, 100), torch.randn(100, HIDDEN)]
        with pytest.raises(SchemaError, match="larger than the server takes"):
            forward(caller, *large, present=("lora_a", "lora_b"))
        assert methods(swarm) == ["0:info"]


def test_when_a_part_fails_the_others_do_not_go_on_for_nobody() -> None:
    plan = FaultPlan()
    plan.on(FORWARD, at=2).fail(ExpertFailed("part two"))
    plan.on(FORWARD, at=3, times=None).stall()
    with memory_swarm({UID: linear_backend(max_batch_size=1)}, plan=plan) as swarm:
        start = time.monotonic()
        with pytest.raises(ExpertFailed, match="part two"):
            forward(caller_of(swarm), DATA)
        assert time.monotonic() - start < 5.0


# --- what comes back ---------------------------------------------------------------------------------------------------


def drop_header(reply: Reply) -> Reply:
    return dataclasses.replace(reply, header=None)


def change_header(**changes: Any) -> Callable[[Reply], Reply]:
    def change(reply: Reply) -> Reply:
        assert reply.header is not None
        fields = {name: getattr(reply.header, name) for name in reply.header.__struct_fields__}
        return dataclasses.replace(reply, header=type(reply.header)(**{**fields, **changes}))

    return change


def change_tensors(change: Callable[[list[torch.Tensor]], list[torch.Tensor]]) -> Callable[[Reply], Reply]:
    return lambda reply: dataclasses.replace(reply, tensors=change(list(reply.tensors)))


@pytest.mark.parametrize(
    "change",
    [
        None,
        change_tensors(lambda t: []),
        change_tensors(lambda t: [*t, *t]),
        change_tensors(lambda t: [t[0][:-1]]),
        change_tensors(lambda t: [t[0].double()]),
    ],
)
@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
def test_a_reply_that_does_not_fit_is_an_error_never_a_result(method: str, change: Any) -> None:
    plan = FaultPlan()
    plan.on(method, times=None).corrupt_reply(change)
    with memory_swarm({UID: linear_backend()}, plan=plan) as swarm:
        with pytest.raises(ProtocolError) as caught:
            if method == FORWARD:
                forward(caller_of(swarm), DATA)
            else:
                backward(caller_of(swarm), [DATA], [GRAD])
        assert caught.value.peer == "server0"


@pytest.mark.parametrize(
    "change",
    [
        change_header(has_grad=None),
        change_header(has_grad=()),
        change_header(has_grad=(False,)),
        change_header(has_grad=(True, True)),
        lambda reply: change_header(has_grad=(False,))(dataclasses.replace(reply, tensors=[])),
    ],
)
def test_gradients_that_are_announced_wrongly_are_an_error(change: Any) -> None:
    plan = FaultPlan()
    plan.on(BACKWARD, times=None).corrupt_reply(change)
    with memory_swarm({UID: linear_backend()}, plan=plan) as swarm, pytest.raises(ProtocolError, match="gradient"):
        backward(caller_of(swarm), [DATA], [GRAD])


def test_a_reply_that_does_not_fit_is_asked_for_elsewhere() -> None:
    plan = FaultPlan()
    plan.on(FORWARD, peer="server0").corrupt_reply()
    with memory_swarm({UID: linear_backend()}, {UID: linear_backend()}, plan=plan) as swarm:
        assert forward(caller_of(swarm), DATA)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_anomaly_detection_of_the_client(value: float) -> None:
    config = dataclasses.replace(QUICK, detect_anomalies=True)
    bad = DATA.clone()
    bad[0, 0] = value
    plan = FaultPlan()
    with memory_swarm({UID: linear_backend()}, plan=plan) as swarm:
        caller = caller_of(swarm, config)
        with pytest.raises(NonFiniteError, match=r"args\[0\]"):
            forward(caller, bad)
        with pytest.raises(NonFiniteError, match="grad_outputs"):
            backward(caller, [DATA], [bad])
        assert methods(swarm) == ["0:info"]
        for method, path in ((FORWARD, "outputs"), (BACKWARD, r"args\[0\]")):
            plan.on(method).corrupt_reply(change_tensors(lambda t: [t[0] * value]))
            with pytest.raises(NonFiniteError, match=path) as caught:
                forward(caller, DATA) if method == FORWARD else backward(caller, [DATA], [GRAD])
            assert caught.value.peer == "server0"
        assert forward(caller, DATA)
        assert forward(caller_of(swarm), bad)


def test_only_wanted_gradients_are_asked_for_and_given() -> None:
    module = seeded(LoraExpert)
    present = ("lora_a", "lora_b", "mask")
    inputs = [torch.randn(2, 3, HIDDEN), torch.randn(HIDDEN, 2), torch.randn(2, HIDDEN), torch.ones(2, 3).bool()]
    grad = torch.randn(2, 3, HIDDEN)
    with memory_swarm({"lora.0": lora_backend(module)}) as swarm:
        caller = caller_of(swarm, uid="lora.0")
        everything = backward(caller, inputs, [grad], present)
        assert [gradient is None for gradient in everything] == [False, False, False, True]
        some = backward(caller, inputs, [grad], present, wants=[False, True, False, False])
        assert [gradient is None for gradient in some] == [True, False, True, True]
        torch.testing.assert_close(some[1], everything[1])


# --- stock servers -----------------------------------------------------------------------------------------------------


class StockServer:
    """Speaks as a stock server does: no header, gradients for everything. Keeps what it was sent."""

    def __init__(self) -> None:
        self.sent: list[Call] = []
        self.schema = ExpertSchema((B(dtype=torch.int64), B(2)), outputs=(B(2), B(dtype=torch.int64)))

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        return ExpertDescription(schema=self.schema.to_plain(), max_batch_size=2**31 - 1, features=(), native=False)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        self.sent.append(call)
        ids, x = call.tensors[:2]
        if call.method == FORWARD:
            return Reply(None, [x * ids[:, None], ids + 1])
        return Reply(None, [torch.zeros_like(ids), call.tensors[2] * ids[:, None]])

    async def close(self) -> None: ...


def test_a_stock_server_is_spoken_to_in_its_own_way() -> None:
    stock = StockServer()
    caller = ExpertCaller(UID, [MemoryPeer("stock")], stock, QUICK)
    ids, x, grad = torch.tensor([1, 2]), torch.randn(2, 2), torch.randn(2, 2)
    assert torch.equal(forward(caller, ids, x)[0], x * ids[:, None])
    gradients = backward(caller, [ids, x], [grad])
    assert gradients[0] is None
    assert torch.equal(gradients[1], grad * ids[:, None])
    assert all(call.header is None for call in stock.sent)
    sent = stock.sent[-1]
    assert [(t.dtype, tuple(t.shape)) for t in sent.tensors[2:]] == [(torch.float32, (2, 2)), (torch.int64, (2,))]
    assert not sent.tensors[3].any()
    assert len(sent.codecs) == len(sent.tensors)


def test_concurrent_calls_of_one_caller() -> None:
    backend = linear_backend()
    with memory_swarm({UID: backend}) as swarm:
        caller = caller_of(swarm)
        inputs = [torch.randn(1 + i % 3, HIDDEN) for i in range(12)]
        outputs = in_parallel([functools.partial(forward, caller, x) for x in inputs])
        for x, (output,) in zip(inputs, outputs):
            torch.testing.assert_close(output, backend.module(x))


def test_an_unreachable_expert_says_so() -> None:
    with memory_swarm({UID: linear_backend()}) as swarm:
        caller = caller_of(swarm, dataclasses.replace(QUICK, max_retries=1))
        swarm.kill(0)
        with pytest.raises(ConnectError, match="cannot be reached"):
            forward(caller, DATA)


def test_a_server_that_takes_less_than_it_said_is_asked_again_and_given_less() -> None:
    backend = linear_backend()
    with memory_swarm({UID: backend}) as swarm:
        caller = caller_of(swarm)
        expected = forward(caller, DATA)
        for pool in backend.get_pools():
            pool.config = type(pool.config)(max_batch_size=2)
        torch.testing.assert_close(forward(caller, DATA), expected)
        assert methods(swarm) == ["0:info", "0:forward", "0:forward", "0:info", "0:forward", "0:forward"]
        caller.forget_description()
        for pool in backend.get_pools():
            pool.config = type(pool.config)(max_batch_size=4)
        forward(caller, DATA)
        for pool in backend.get_pools():
            pool.config = type(pool.config)(max_batch_size=2)
        (grad,) = backward(caller, [DATA], [GRAD])
        torch.testing.assert_close(grad, GRAD @ backend.module.weight)


class OldStockServer(StockServer):
    """Refuses more rows than it takes, which it tells nobody before, as hivemind's TaskPool does."""

    def __init__(self, max_rows: int) -> None:
        super().__init__()
        self.max_rows, self.trained = max_rows, 0

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        if len(call.tensors[0]) > self.max_rows:
            self.sent.append(call)
            text = f"Task size greater than max_batch_size ({self.max_rows}), it can't be processed"
            raise ExpertFailed(f"ValueError({text!r})")
        self.trained += len(call.tensors[0]) if call.method == BACKWARD else 0
        return await super().call(peer, call, timeout_s=timeout_s)


@pytest.mark.parametrize("rows,max_rows", [(7, 3), (4, 1), (5, 4), (4, 4)])
def test_a_stock_server_teaches_how_many_rows_it_takes(rows: int, max_rows: int) -> None:
    stock = OldStockServer(max_rows)
    caller = ExpertCaller(UID, [MemoryPeer("stock")], stock, QUICK)
    ids, x, grad = torch.arange(rows), torch.randn(rows, 2), torch.randn(rows, 2)
    assert torch.equal(backward(caller, [ids, x], [grad])[1], grad * ids[:, None])
    assert stock.trained == rows  # each row once
    assert torch.equal(forward(caller, ids, x)[0], x * ids[:, None])
    assert [len(call.tensors[0]) > max_rows for call in stock.sent].count(True) == (rows > max_rows)  # it is told once


@pytest.mark.parametrize("said", [0, 7, 99])
def test_a_stock_server_that_says_it_takes_fewer_rows_than_none_is_not_believed(said: int) -> None:
    stock = OldStockServer(6)
    stock.max_rows = 6

    async def lie(peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        stock.sent.append(call)
        raise ExpertFailed(f"ValueError('Task size greater than max_batch_size ({said})')")

    stock.call = lie  # type: ignore[method-assign]
    caller = ExpertCaller(UID, [MemoryPeer("stock")], stock, QUICK)
    with pytest.raises(ExpertFailed):
        forward(caller, torch.arange(7), torch.randn(7, 2))
    assert len(stock.sent) == 1


def test_a_stock_server_that_takes_fewer_and_fewer_rows_ends() -> None:
    class Lying(StockServer):
        async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
            self.sent.append(call)
            rows = len(call.tensors[0])
            raise ExpertFailed(f"Task size greater than max_batch_size ({rows - 1})")

    stock = Lying()
    with pytest.raises(ExpertFailed):
        forward(ExpertCaller(UID, [MemoryPeer("stock")], stock, QUICK), torch.arange(64), torch.randn(64, 2))
    assert len(stock.sent) < 2 * 64


def test_any_servers_error_is_tried_at_the_others_each_once() -> None:
    plan = FaultPlan()
    for peer, error in (
        ("server0", RemoteSchemaError("no")),
        ("server1", ExpertFailed("f")),
        ("server2", Refused("r")),
    ):
        plan.on(FORWARD, peer=peer, times=None).fail(error)
    with memory_swarm(*({UID: linear_backend()} for _ in range(4)), plan=plan) as swarm:
        assert forward(caller_of(swarm), DATA)
        assert [fired.peer for fired in plan.fired] == ["server0", "server1", "server2"]


def test_servers_are_tried_in_turn_while_other_threads_look_who_is_first() -> None:
    caller = ExpertCaller(UID, [MemoryPeer("a")], StockServer(), dataclasses.replace(QUICK, max_retries=200))
    ended, wrong = threading.Event(), []

    def watch() -> None:
        while not ended.is_set():
            try:
                assert caller.peers[0]
            except IndexError as e:
                wrong.append(e)
                return

    async def fail(peer: PeerIDLike, timeout_s: float | None) -> None:
        raise Overloaded("full")

    switching = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        for _ in range(20):
            with pytest.raises(Overloaded):
                run(caller._attempts(fail, None, Budget(WAIT_S)))
    finally:
        ended.set()
        watcher.join()
        sys.setswitchinterval(switching)
    assert not wrong
