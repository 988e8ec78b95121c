"""Chains on the server: what a span of blocks computes in one request, trains once, and refuses. Requests are made by hand."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import time
import weakref
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe.config import HandlerConfig
from moe.errors import (
    DeadlineExceeded,
    ExpertFailed,
    ExpertNotFound,
    MoEError,
    Overloaded,
    Refused,
    RemoteSchemaError,
    SchemaError,
)
from moe.expert_uid import join_chain
from moe.schema import BatchTensorProto, Compression, TensorProto
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.testing import MemorySwarm, memory_swarm
from moe.transport.base import BACKWARD, FORWARD, Call, Reply
from moe.transport.event_loop import client_loop
from moe.wire.messages import BlockInputs, RequestHeader, new_request_id
from tests.experts import (
    HIDDEN,
    LoraExpert,
    linear_backend,
    local_twin,
    lora_backend,
    parameters_of,
    seeded,
    unchanged,
)

WAIT_S = 20.0  # generous: the machine may be busy
LORA = ("lora_a", "lora_b")


def lora_blocks(count: int = 3, lr: float | None = None) -> dict[str, ExpertBackend]:
    """Blocks b.0, b.1, ... with parameters of their own."""
    backends = {}
    for i in range(count):
        module = seeded(LoraExpert, seed=i)
        optimizer = None if lr is None else torch.optim.SGD(module.parameters(), lr=lr)
        backends[f"b.{i}"] = lora_backend(module, optimizer, name=f"b.{i}")
    return backends


def twins(backends: dict[str, ExpertBackend]) -> list[nn.Module]:
    return [local_twin(backend.module) for backend in backends.values()]


def header_of(*blocks: BlockInputs, **fields: Any) -> RequestHeader:
    return RequestHeader(chain=blocks, **fields)


def ids(header: RequestHeader) -> RequestHeader:
    """The same, with ids for a backward."""
    assert header.chain is not None
    blocks = tuple(BlockInputs(present=b.present, tensors=b.tensors, request_id=new_request_id()) for b in header.chain)
    return RequestHeader(chain=blocks, wants_grad=header.wants_grad, time_left_s=header.time_left_s)


def make_call(method: str, uids: Sequence[str], tensors: Sequence[torch.Tensor], header: RequestHeader | None) -> Call:
    return Call(method, join_chain(list(uids)), header, list(tensors), [Compression.NONE] * len(tensors))


def send(
    swarm: MemorySwarm, method: str, uids: Sequence[str], tensors: Sequence[torch.Tensor], header: RequestHeader | None
) -> Reply:
    call = make_call(method, uids, tensors, header)
    return client_loop().run(swarm.transport.call(swarm.server.peer, call, timeout_s=WAIT_S), WAIT_S)


def x(rows: int = 2, length: int = 3) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN)


def adapter(rank: int = 2) -> list[torch.Tensor]:
    return [torch.randn(HIDDEN, rank), torch.randn(rank, HIDDEN)]


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def close(got: torch.Tensor, expected: torch.Tensor | None) -> None:
    assert expected is not None
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


PLAIN3 = header_of(BlockInputs(), BlockInputs(), BlockInputs())


# --- what it computes --------------------------------------------------------------------------------------------------


def test_blocks_run_one_after_another_with_shared_and_own_kwargs() -> None:
    backends = lora_blocks()
    data, (a, b), (own_a, own_b), mask = x(), adapter(), adapter(4), torch.rand(2, 3) > 0.3
    header = header_of(
        BlockInputs(present=(*LORA, "mask"), tensors=(1, 2, 5)),
        BlockInputs(present=("mask",), tensors=(5,)),
        BlockInputs(present=("mask", *LORA), tensors=(3, 4, 5)),
    )
    tensors = [data, a, b, own_a, own_b, mask]
    mine = leaves(*tensors)
    h, ma, mb, moa, mob, mm = mine
    first, second, third = twins(backends)
    local = third(second(first(h, mm, ma, mb), mm), mm, moa, mob)
    grad = torch.randn_like(local)
    local.backward(grad)
    with memory_swarm(backends) as swarm:
        close(send(swarm, FORWARD, backends, tensors, header).tensors[0], local.detach())
        reply = send(swarm, BACKWARD, backends, [*tensors, grad], ids(header))
    assert reply.header is not None
    assert reply.header.has_grad == (True, True, True, True, True, False)
    assert reply.header.compute_s > 0
    for got, leaf in zip(reply.tensors, mine):
        close(got, leaf.grad)
    assert swarm.server.handler.inflight.bytes == 0


@pytest.mark.parametrize("rank", [2, 3, HIDDEN])  # as many as rows, as the length, as the hidden size
def test_the_gradient_of_a_shared_tensor_is_summed_over_blocks(rank: int) -> None:
    backends = lora_blocks()
    tensors = [x(), *adapter(rank)]
    mine = leaves(*tensors)
    h = mine[0]
    for module in twins(backends):
        h = module(h, None, mine[1], mine[2])
    grad = torch.randn_like(h)
    h.backward(grad)
    header = header_of(*[BlockInputs(present=LORA, tensors=(1, 2))] * 3, wants_grad=(False, True, True))
    with memory_swarm(backends) as swarm:
        reply = send(swarm, BACKWARD, backends, [*tensors, grad], ids(header))
    assert reply.header is not None
    assert reply.header.has_grad == (False, True, True)
    close(reply.tensors[0], mine[1].grad)
    close(reply.tensors[1], mine[2].grad)


class Widen(nn.Module):
    """(B, 2) -> (B, 5), and per row a number and a count, which is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 5)

    def forward(self, data: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.linear(data), data.sum(-1), torch.full((len(data),), 3)


class Narrow(nn.Module):
    """(B, 5), (B,), (B,) -> (B, 1) in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(5, 1)

    def forward(self, wide: torch.Tensor, total: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
        return self.linear(wide) * total[:, None].float() + count[:, None]


def test_blocks_change_shapes_and_dtypes_and_return_several_tensors() -> None:
    B = BatchTensorProto
    widen, narrow = seeded(Widen), seeded(Narrow)
    backends = {
        "b.0": ExpertBackend("b.0", widen, args_schema=(B(2),)),
        "b.1": ExpertBackend(
            "b.1",
            narrow,
            args_schema=(B(5), B(dtype=torch.float64), B(dtype=torch.int64)),
        ),
    }
    data = torch.randn(4, 2)
    (mine,) = leaves(data)
    local = local_twin(narrow)(*local_twin(widen)(mine))
    local.sum().backward()
    header = header_of(BlockInputs(), BlockInputs())
    with memory_swarm(backends) as swarm:
        close(send(swarm, FORWARD, backends, [data], header).tensors[0], local.detach())
        reply = send(swarm, BACKWARD, backends, [data, torch.ones(4, 1)], ids(header))
        close(reply.tensors[0], mine.grad)
        empty = send(swarm, FORWARD, backends, [data[:0]], header)
        assert empty.tensors[0].shape == (0, 1)
        gone = send(swarm, BACKWARD, backends, [data[:0], torch.ones(0, 1)], ids(header))
        assert gone.tensors[0].shape == (0, 2)


def test_a_block_may_come_twice_and_is_trained_twice() -> None:
    backends = lora_blocks(1, lr=0.1)
    (module,) = twins(backends)
    (data,) = leaves(x())
    local = module(module(data))
    local.sum().backward()
    header = ids(header_of(BlockInputs(), BlockInputs()))
    with memory_swarm(backends) as swarm:
        reply = send(swarm, BACKWARD, ["b.0", "b.0"], [data.detach(), torch.ones_like(local)], header)
    assert backends["b.0"].updates == 2
    assert reply.tensors[0].shape == data.shape  # not the local gradient: the block has learned in between


def test_a_chain_of_one_is_a_call_of_one() -> None:
    backends = lora_blocks(1)
    tensors = [x(), *adapter()]
    with memory_swarm(backends) as swarm:
        chained = send(swarm, FORWARD, ["b.0"], tensors, header_of(BlockInputs(present=LORA, tensors=(1, 2))))
        single = send(swarm, FORWARD, ["b.0"], tensors, RequestHeader(present=LORA))
    assert torch.equal(chained.tensors[0], single.tensors[0])


def test_backward_ends_where_nothing_is_needed_any_more() -> None:
    """An adapter of the last block of a frozen model costs no backward of the blocks before it."""
    backends = lora_blocks()
    header = header_of(
        BlockInputs(), BlockInputs(), BlockInputs(present=LORA, tensors=(1, 2)), wants_grad=(False, True, True)
    )
    launches = {uid: backend.module.launches for uid, backend in backends.items()}
    with memory_swarm(backends) as swarm:
        send(swarm, BACKWARD, backends, [x(), *adapter(), x()], ids(header))
    assert [backends[uid].module.launches - before for uid, before in launches.items()] == [1, 1, 1]
    assert [backend.backward_pool.statistics().tasks for backend in backends.values()] == [0, 0, 1]


def test_blocks_with_an_optimizer_are_trained_though_no_gradient_is_wanted() -> None:
    backends = lora_blocks(lr=0.1)
    before = {uid: parameters_of(backend.module) for uid, backend in backends.items()}
    header = ids(header_of(*PLAIN3.chain or (), wants_grad=(False,)))
    with memory_swarm(backends) as swarm:
        assert not send(swarm, BACKWARD, backends, [x(), x()], header).tensors
    assert not any(unchanged(backends[uid].module, parameters) for uid, parameters in before.items())


def test_chains_of_different_callers_share_the_batches_of_each_block() -> None:
    backends = lora_blocks()
    batches: list[tuple[str, int]] = []
    data = [x() for _ in range(3)]
    expected = []
    for h in data:
        for module in twins(backends):
            h = module(h)
        expected.append(h)
    with memory_swarm(backends, on_batch=lambda pool, batch: batches.append((pool.name, len(batch)))) as swarm:
        with swarm.server.paused():
            futures = [
                client_loop().submit(
                    swarm.transport.call(
                        swarm.server.peer, make_call(FORWARD, list(backends), [h], PLAIN3), timeout_s=WAIT_S
                    )
                )
                for h in data
            ]
            swarm.server.wait_pending(3)
        for future, h in zip(futures, expected):
            close(future.result(WAIT_S).tensors[0], h)
        assert [entry for entry in batches if entry[0] == "b.0_forward"] == [("b.0_forward", 3)]


# --- once --------------------------------------------------------------------------------------------------------------


def test_a_repeated_chain_trains_each_block_once_and_gets_the_same_answer() -> None:
    backends = lora_blocks(lr=0.1)
    tensors, header = [x(), x()], ids(PLAIN3)
    with memory_swarm(backends) as swarm:
        first = send(swarm, BACKWARD, backends, tensors, header)
        again = send(swarm, BACKWARD, backends, tensors, header)
        assert torch.equal(first.tensors[0], again.tensors[0])
        assert [backend.updates for backend in backends.values()] == [1, 1, 1]
        parts = [BlockInputs(request_id=block.request_id) for block in header.chain or ()]
        send(swarm, BACKWARD, ["b.1", "b.2"], tensors, header_of(*parts[1:]))  # cut otherwise, as after a new route
        assert [backend.updates for backend in backends.values()] == [1, 1, 1]


def test_a_repeat_while_the_first_runs_joins_it() -> None:
    backends = lora_blocks(lr=0.1)
    tensors, header = [x(), x()], ids(PLAIN3)
    with memory_swarm(backends) as swarm:
        with swarm.server.paused():
            call = make_call(BACKWARD, list(backends), tensors, header)
            futures = [
                client_loop().submit(swarm.transport.call(swarm.server.peer, call, timeout_s=WAIT_S)) for _ in range(3)
            ]
            swarm.server.wait_pending(3)
        first, *others = [future.result(WAIT_S).tensors[0] for future in futures]
    assert all(torch.equal(first, other) for other in others)
    assert [backend.updates for backend in backends.values()] == [1, 1, 1]


def test_a_chain_that_failed_halfway_goes_on_where_it_failed() -> None:
    backends = lora_blocks(lr=0.1)
    tensors, header = [x(), x()], ids(PLAIN3)
    broken = backends["b.1"].backward_pool
    limit = broken.config
    with memory_swarm(backends) as swarm:
        broken.config = dataclasses.replace(limit, max_pending_tasks=1)
        broken._queue.config = dataclasses.replace(limit, max_pending_tasks=1)
        broken._queue.config = dataclasses.replace(broken._queue.config, max_batch_size=1)
        with pytest.raises(RemoteSchemaError, match="b.1: "):
            send(swarm, BACKWARD, backends, tensors, header)
        assert [backend.updates for backend in backends.values()] == [0, 0, 1]
        broken.config = broken._queue.config = limit
        send(swarm, BACKWARD, backends, tensors, header)
    assert [backend.updates for backend in backends.values()] == [1, 1, 1]


def test_a_repeat_that_asks_for_more_is_refused_and_trains_nothing() -> None:
    backends = lora_blocks(lr=0.1)
    header = ids(header_of(*PLAIN3.chain or (), wants_grad=(False,)))
    with memory_swarm(backends) as swarm:
        send(swarm, BACKWARD, backends, [x(), x()], header)
        more = RequestHeader(chain=header.chain, wants_grad=(True,))
        with pytest.raises(Refused, match="asks for gradients"):
            send(swarm, BACKWARD, backends, [x(), x()], more)
    assert [backend.updates for backend in backends.values()] == [1, 1, 1]


def test_an_answer_that_is_dropped_is_gone_at_once() -> None:
    """And not when the garbage collector next looks at old objects, which may be after thousands of steps."""
    backends, header = lora_blocks(1, lr=0.1), RequestHeader(request_id=new_request_id())
    with memory_swarm(backends, handler_config=HandlerConfig(once_max_replies=1)) as swarm:
        send(swarm, BACKWARD, ["b.0"], [x(), x()], header)
        once = swarm.server.handler.once
        deadline = time.monotonic() + WAIT_S
        while "1 answers" not in repr(once):
            assert time.monotonic() < deadline
            time.sleep(0.005)
        first = once.find("client", ("b.0", header.request_id), 0.0)
        assert first is not None
        (gradient,) = first.answer
        del first
        answer = weakref.ref(gradient)
        del gradient
        gc.disable()
        try:
            for _ in range(2):
                send(swarm, BACKWARD, ["b.0"], [x(), x()], RequestHeader(request_id=new_request_id()))
            while answer() is not None:  # the Runtime lets go of its batch a moment after it has answered
                assert time.monotonic() < deadline
                time.sleep(0.005)
        finally:
            gc.enable()


# --- what is refused ---------------------------------------------------------------------------------------------------

SHARED = header_of(*[BlockInputs(present=LORA, tensors=(1, 2))] * 3)
REFUSED: dict[str, tuple[str, Sequence[torch.Tensor], RequestHeader, str]] = {
    "fewer inputs than uids": (FORWARD, [x()], header_of(BlockInputs()), "3 uids, with inputs of 1 blocks"),
    "an unknown kwarg": (FORWARD, [x()], header_of(BlockInputs(present=("no",)), BlockInputs(), BlockInputs()), "no"),
    "too few positions": (
        FORWARD, [x()], header_of(BlockInputs(), BlockInputs(present=LORA, tensors=(1,)), BlockInputs()),
        "b.1: expected 2 tensors of kwargs, got positions of 1",
    ),
    "a tensor nobody takes": (FORWARD, [x(), x()], PLAIN3, "expected 1 tensors .*got more"),
    "a position nobody fills": (
        FORWARD, [x()], header_of(BlockInputs(present=LORA, tensors=(1, 3)), BlockInputs(), BlockInputs()),
        "position 3, but only 3 tensors are used",
    ),
    "a tensor missing": (FORWARD, [x(), adapter()[0]], SHARED, "expected 3 tensors .*got 2"),
    "a shape that one of its users does not take": (
        FORWARD, [x(), torch.ones(5, 2), adapter()[1]], SHARED, r"b.0: kwargs\['lora_a'\]: expected float32\(6, any\)",
    ),
    "a gradient missing": (BACKWARD, [x()], PLAIN3, "expected 2 tensors"),
    "flags of other tensors": (
        BACKWARD, [x(), x()], header_of(*PLAIN3.chain or (), wants_grad=(True, True)), "wants_grad: expected 1 flags",
    ),
    "too many rows": (FORWARD, [x(33)], PLAIN3, "33 rows, at most 32"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_chain_that_makes_no_sense_is_refused_before_it_is_computed(case: str) -> None:
    method, tensors, header, problem = REFUSED[case]
    backends = lora_blocks()
    backends["b.2"] = lora_backend(LoraExpert(), name="b.2", max_batch_size=32)
    with memory_swarm(backends) as swarm:
        launches = [backend.module.launches for backend in backends.values()]
        with pytest.raises(RemoteSchemaError, match=problem):
            send(swarm, method, list(backends), tensors, header)
        assert [backend.module.launches for backend in backends.values()] == launches
    assert swarm.server.handler.inflight.bytes == 0


def test_blocks_that_do_not_fit_together_are_refused() -> None:
    backends = {"b.0": lora_blocks(1)["b.0"], "b.1": linear_backend("b.1")}
    with (
        memory_swarm(backends) as swarm,
        pytest.raises(RemoteSchemaError, match=r"b.1 takes .* but b.0 before it returns"),
    ):
        send(swarm, FORWARD, backends, [x()], header_of(BlockInputs(), BlockInputs()))


@pytest.mark.parametrize("uid", ["b.0 b.7", "b.7 b.0", "", " "])
def test_a_block_that_is_not_here_is_named(uid: str) -> None:
    handler = ConnectionHandler(lora_blocks(2))
    with pytest.raises((ExpertNotFound, SchemaError)) as caught:
        handler.open("peer", FORWARD, uid, header_of(BlockInputs(), BlockInputs()))
    assert not uid.strip() or "b.7" in caught.value.message


def test_every_block_of_a_chain_must_be_allowed() -> None:
    asked = []

    def authorize(peer: str, method: str, uid: str) -> bool:
        asked.append(uid)
        return uid != "b.1"

    handler = ConnectionHandler(lora_blocks(), authorize=authorize)
    with pytest.raises(Refused, match="not allowed") as caught:
        handler.open("mallory", FORWARD, "b.0 b.1 b.2", PLAIN3)
    assert (caught.value.uid, asked) == ("b.1", ["b.0", "b.1"])


def test_each_tensor_is_counted_once_and_before_memory_is_taken() -> None:
    handler = ConnectionHandler(lora_blocks(), HandlerConfig(max_request_bytes=400))
    admission = handler.open("peer", FORWARD, "b.0 b.1 b.2", SHARED)
    before = handler.inflight.bytes  # what a request takes besides its tensors
    admission.admit(0, (1, 5, HIDDEN), "float32", Compression.NONE)
    admission.admit(1, (HIDDEN, 5), "float32", Compression.NONE)
    assert handler.inflight.bytes - before == 240
    with pytest.raises(SchemaError, match="exceeds 400 bytes"):
        admission.admit(2, (10, HIDDEN), "float32", Compression.NONE)
    admission.release()
    assert handler.inflight.bytes == 0


@pytest.mark.parametrize("fixed", [True, False])
def test_what_a_backward_keeps_in_between_counts_too(fixed: bool) -> None:
    """Of blocks that return any length, when it is there; of others, before."""
    if fixed:
        backends = {f"b.{i}": linear_backend(f"b.{i}") for i in range(3)}
        data = torch.randn(2048, HIDDEN)
    else:
        backends, data = lora_blocks(), x(64, 32)
    # a request of two tensors and the gradient of one; two blocks' inputs are two more, and the reply of the middle one
    config = HandlerConfig(max_inflight_bytes=20_000 + int(4.5 * data.nbytes))
    with memory_swarm(backends, handler_config=config) as swarm:
        send(swarm, FORWARD, backends, [data], PLAIN3)
        send(swarm, BACKWARD, ["b.0"], [data, data], ids(header_of(BlockInputs())))
        with pytest.raises(Overloaded, match="in flight"):
            send(swarm, BACKWARD, backends, [data, data], ids(PLAIN3))
        swarm.server.handler.check_idle()


def test_a_chain_that_names_one_expert_often_costs_as_much_as_many() -> None:
    """A backward keeps what each block was given: the more blocks, the more memory, whoever they are."""
    handler = ConnectionHandler({"b.0": linear_backend("b.0")})
    taken = []
    for count in (1, 2, 256):
        admission = handler.open("peer", BACKWARD, " ".join(["b.0"] * count), ids(header_of(*[BlockInputs()] * count)))
        before = handler.inflight.bytes
        for index in range(2):
            admission.admit(index, (100, HIDDEN), "float32", Compression.NONE)
        taken.append((handler.inflight.bytes - before) / (100 * HIDDEN * 4))
        admission.release()
    assert taken == [3, 6, 3 + 255 + 2]
    handler.check_idle()


# --- deadlines, errors, callers that go --------------------------------------------------------------------------------


class Late(nn.Module):
    """Takes its time."""

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        time.sleep(0.15)
        return data * 2


def test_the_deadline_is_that_of_the_whole_chain() -> None:
    backends = {
        f"b.{i}": ExpertBackend(
            f"b.{i}", Late(), args_schema=(BatchTensorProto(2),), outputs_schema=BatchTensorProto(2)
        )
        for i in range(4)
    }
    header = header_of(*[BlockInputs()] * 4, time_left_s=0.25)
    with memory_swarm(backends) as swarm:
        start = time.monotonic()
        with pytest.raises(DeadlineExceeded, match=r"b.1: |b.2: "):
            send(swarm, FORWARD, backends, [torch.ones(1, 2)], header)
        assert time.monotonic() - start < 4 * 0.15
        assert backends["b.3"].forward_pool.statistics().tasks == 0


class Picky(nn.Module):
    """Raises for a negative number."""

    def forward(self, data: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        if bool((scale < 0).any()):
            raise ValueError("negative")
        return data * scale


def test_an_error_says_which_block_it_is_from() -> None:
    backends = {
        f"b.{i}": ExpertBackend(
            f"b.{i}", Picky(), args_schema=(BatchTensorProto(2),), kwargs_schema={"scale": TensorProto()}
        )
        for i in range(3)
    }
    header = header_of(*[BlockInputs(tensors=(1 + i,)) for i in range(3)])
    with memory_swarm(backends) as swarm:
        scales = [torch.tensor(1.0), torch.tensor(-1.0), torch.tensor(1.0)]
        for method, more in ((FORWARD, []), (BACKWARD, [torch.ones(1, 2)])):
            with pytest.raises(ExpertFailed, match="^b.1: .*negative"):
                send(swarm, method, backends, [torch.ones(1, 2), *scales, *more], header)


def test_a_chain_whose_caller_has_gone_stops_at_its_next_block() -> None:
    backends = lora_blocks()
    with memory_swarm(backends) as swarm:
        with swarm.server.paused():
            call = make_call(FORWARD, list(backends), [x()], PLAIN3)
            future = client_loop().submit(swarm.transport.call(swarm.server.peer, call, timeout_s=WAIT_S))
            swarm.server.wait_pending(1)
            future.cancel()
            deadline = time.monotonic() + WAIT_S
            while swarm.server.pending or swarm.server.handler.inflight.bytes:
                assert time.monotonic() < deadline
                time.sleep(0.005)
        assert sum(backend.forward_pool.statistics().tasks for backend in backends.values()) == 0


# --- whatever a peer may say -------------------------------------------------------------------------------------------

_FUZZED = ConnectionHandler(lora_blocks(2))
_inputs = st.builds(
    BlockInputs,
    present=st.lists(st.sampled_from(["mask", *LORA, "no"]), max_size=4).map(tuple),
    tensors=st.lists(st.integers(0, 6), max_size=5).map(tuple),
)
_shapes = st.lists(
    st.tuples(st.lists(st.integers(0, 7), max_size=3).map(tuple), st.sampled_from(["float32", "bool"])), max_size=6
)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(["b.0", "b.1"]), min_size=1, max_size=3),
    st.lists(_inputs, min_size=1, max_size=3).map(tuple),
    _shapes,
    st.sampled_from([FORWARD, BACKWARD]),
)
def test_any_chain_is_admitted_or_a_typed_error(
    uids: list[str], chain: tuple[BlockInputs, ...], shapes: list[tuple[tuple[int, ...], str]], method: str
) -> None:
    try:
        admission = _FUZZED.open("fuzz", method, join_chain(uids), RequestHeader(chain=chain))
    except MoEError:
        return
    try:
        for i, (shape, dtype) in enumerate(shapes):
            admission.admit(i, shape, dtype, Compression.NONE)
        if len(shapes) < len(admission._entries):
            with pytest.raises(RemoteSchemaError):
                asyncio.run(admission.run([torch.zeros(shape) for shape, _ in shapes]))
    except MoEError:
        pass
    finally:
        admission.release()
    assert _FUZZED.inflight.bytes == 0
