"""Forwards that are kept for their backwards: computed once, exact, never stale, freed, and bounded."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe.config import HandlerConfig
from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.held_tensors import HeldTensors
from moe.server.kept_forwards import KeptForward, Thrift
from moe.server.task_pool import Task
from moe.testing import MemorySwarm, memory_swarm
from tests.experts import HIDDEN, LoraExpert, assert_same, local_twin, lora_backend, run_with_gradients, seeded

ROWS, WIDTH = 1024, 300  # more than a client sends twice


class Counted(nn.Module):
    """Saves an output (tanh), an input and a parameter; counts how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return x * self.outer(torch.tanh(self.inner(x)))


def backend_of(module: nn.Module, lr: float | None = None, **options: Any) -> ExpertBackend:
    optimizer = None if lr is None else torch.optim.SGD(module.parameters(), lr=lr)
    return ExpertBackend(
        "e.0", module, optimizer, args_schema=(BatchTensorProto(WIDTH),), max_batch_size=4096, **options
    )


def calls(backend: ExpertBackend) -> int:
    assert isinstance(backend.module, Counted)
    return backend.module.calls


def keep(module: nn.Module, x: torch.Tensor) -> KeptForward:
    return KeptForward(lambda leaves: [module(leaves[0])], [x], module.parameters())


def data(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, WIDTH)


# --- one of them -----------------------------------------------------------------------------------------------------------


def test_its_size_is_that_of_what_is_saved_without_parameters() -> None:
    x = data()
    kept = keep(Counted(), x)
    assert kept.size_bytes == 3 * x.nbytes  # x, tanh, and what x is multiplied by
    assert repr(kept) == f"KeptForward(1 inputs, {3 * x.nbytes} bytes saved)"


def test_nothing_of_it_lives_on_when_it_is_dropped() -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    class Watched(Counted):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = torch.tanh(self.inner(x))
            seen.append(weakref.ref(hidden))
            return self.outer(hidden)

    gc.collect()
    gc.disable()
    try:
        kept = keep(Watched(), data())
        assert seen[0]() is None or kept.outputs
        del kept
        assert seen[0]() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("what", ["a parameter", "an input", "an activation"])
def test_it_notices_who_has_written_to_what_it_saved(what: str) -> None:
    module, x = Counted(), data()
    kept = keep(module, x)
    assert kept.unchanged
    with torch.no_grad():
        if what == "a parameter":
            module.outer.weight.add_(1)
        elif what == "an input":
            x.add_(1)
        else:
            kept._saved[-1][0].add_(1)
    assert not kept.unchanged


def test_it_is_of_equal_inputs_only() -> None:
    x = data()
    kept = keep(Counted(), x)
    assert kept.is_of([x])
    assert kept.is_of([x.clone()])
    assert not kept.is_of([x + 1])
    assert not kept.is_of([x[:2]])
    assert not kept.is_of([x.double()])
    assert not kept.is_of([])


def test_those_held_are_bounded_and_stale_ones_not_found() -> None:
    module, x = Counted(), data()
    size = keep(module, x).size_bytes
    store: HeldTensors[KeptForward] = HeldTensors(2 * size, 2 * size, 10.0)
    for key in (b"a", b"b", b"c"):
        store.hold("anna", key, keep(module, x), 0.0)
    assert store.bytes == 2 * size
    assert store.find("anna", b"a", 1.0) is None
    assert store.find("anna", b"b", 1.0) is not None
    with torch.no_grad():
        module.inner.bias.add_(1)
        module.inner.weight.add_(1)
        module.outer.weight.add_(1)
    assert store.find("anna", b"c", 1.0) is None
    store.hold("anna", b"d", keep(module, x), 1.0)
    store.clear()
    assert (len(store), store.bytes) == (0, 0)
    store.hold("anna", b"e", keep(module, x), 1.0)
    assert store.expire(20.0) is None
    assert store.bytes == 0


@given(st.lists(st.booleans(), max_size=60))
def test_keeping_that_never_pays_becomes_rare_and_starts_again_when_it_does(used: list[bool]) -> None:
    thrift = Thrift()
    for pays in used:
        thrift.keeps()
        if pays:
            thrift.used()
    for _ in range(20):
        thrift.keeps()
    assert sum(thrift.keeps() for _ in range(160)) == 10
    thrift.used()
    assert all(thrift.keeps() for _ in range(16))


# --- a backend -------------------------------------------------------------------------------------------------------------


def forward(backend: ExpertBackend, x: torch.Tensor) -> tuple[torch.Tensor, KeptForward | None]:
    task = backend.make_task("forward", [x])
    task.keep = True
    (outcome,) = backend._run_forward([task])
    assert isinstance(outcome, list)
    assert isinstance(outcome[0], torch.Tensor)
    assert not outcome[0].requires_grad
    return outcome[0], task.kept


def backward(
    backend: ExpertBackend, x: torch.Tensor, grad: torch.Tensor, kept: KeptForward | None, **options: Any
) -> Any:
    task = backend.make_task("backward", [x, grad], **options)
    task.kept = kept
    (outcome,) = backend._run_backward([task])
    assert isinstance(outcome, list), outcome
    assert task.kept is None
    return outcome[0]


@pytest.mark.parametrize("lr", [None, 0.1])
def test_a_backward_of_a_kept_forward_is_bit_by_bit_that_of_a_new_one(lr: float | None) -> None:
    x, grad = data(), data()
    keeping, other = (backend_of(seeded(Counted), lr) for _ in range(2))
    for _ in range(3):  # steps in between
        output, kept = forward(keeping, x)
        assert kept is not None
        assert torch.equal(output, other.forward(x)[0])
        assert torch.equal(backward(keeping, x, grad, kept), backward(other, x, grad, None))
        for mine, theirs in zip(keeping.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)
            assert mine.grad is None
            assert mine.requires_grad
    assert calls(keeping) == 2 + 3  # two to find out what it returns
    assert calls(other) == 2 + 6
    assert (keeping.updates, other.updates) == ((0, 0) if lr is None else (3, 3))


def test_gradients_nobody_wants_are_not_computed_and_training_goes_on() -> None:
    x, grad = data(), data()
    keeping, other = (backend_of(seeded(Counted), 0.1) for _ in range(2))
    _, kept = forward(keeping, x)
    assert kept is not None
    assert backward(keeping, x, grad, kept, wants_grad=[False]) is None
    assert kept.leaves[0].grad is None
    backward(other, x, grad, None, wants_grad=[False])
    for mine, theirs in zip(keeping.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("spoiled", ["by a step", "by other inputs", "by a loaded state"])
def test_a_forward_of_no_use_is_computed_again(spoiled: str) -> None:
    x, grad = data(), data()
    backend = backend_of(seeded(Counted), 0.1)
    _, kept = forward(backend, x)
    if spoiled == "by a step":
        backward(backend, data(), grad, None)
    elif spoiled == "by a loaded state":
        backend.load_state_dict({**backend.state_dict(), "module": seeded(Counted, 1).state_dict()})
    else:
        x = data()
    twin = local_twin(backend.module)
    before = calls(backend)
    got = backward(backend, x, grad, kept)
    leaf = x.clone().requires_grad_(True)
    twin(leaf).backward(grad)
    assert leaf.grad is not None
    torch.testing.assert_close(got, leaf.grad)
    assert calls(backend) == before + 1


def test_a_graph_that_breaks_is_of_no_use_and_leaves_no_gradients_behind() -> None:
    x, grad = data(), data()
    keeping, other = (backend_of(seeded(Counted), 0.1) for _ in range(2))
    _, kept = forward(keeping, x)
    assert kept is not None
    for output in kept.outputs:
        output.backward(grad)  # frees it
    for parameter in keeping.module.parameters():
        parameter.grad = None
    assert torch.equal(backward(keeping, x, grad, kept), backward(other, x, grad, None))
    for mine, theirs in zip(keeping.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)


class WritesToItsInput(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(1)


def test_what_autograd_does_not_like_is_not_kept() -> None:
    backend = backend_of(WritesToItsInput(), outputs_schema=BatchTensorProto(WIDTH))
    x = data()
    expected = x + 1
    output, kept = forward(backend, x)
    assert kept is None
    assert torch.equal(output, expected)


def test_tasks_that_share_a_batch_are_not_kept() -> None:
    backend = backend_of(seeded(Counted))
    tasks = [backend.make_task("forward", [data()]) for _ in range(2)]
    for task in tasks:
        task.keep = True
    backend._run_forward(tasks)
    assert [task.kept for task in tasks] == [None, None]


def test_dropout_draws_once() -> None:
    class Dropping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.dropout(x, 0.5)

    backend = backend_of(Dropping())
    x = torch.ones(64, WIDTH)
    output, kept = forward(backend, x)
    grad = backward(backend, x, torch.ones_like(x), kept)
    assert torch.equal(output, grad)  # computed again, it would draw other numbers


# --- from end to end -------------------------------------------------------------------------------------------------------


def served(backend: ExpertBackend, **config: Any) -> Any:
    return memory_swarm({"e.0": backend}, handler_config=HandlerConfig(**config))


def step(swarm: MemorySwarm, x: torch.Tensor, grad: torch.Tensor) -> Any:
    return run_with_gradients(swarm.expert("e.0"), [x], {}, grad)


@pytest.mark.parametrize("lr", [None, 0.1])
def test_a_training_step_computes_the_forward_once(lr: float | None) -> None:
    backend = backend_of(seeded(Counted), lr)
    twin = local_twin(backend.module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=lr or 0.0)
    with served(backend) as swarm:
        before = calls(backend)
        for _ in range(3):
            x, grad = data(ROWS), data(ROWS)
            got = step(swarm, x, grad)
            assert_same(got, run_with_gradients(twin, [x], {}, grad))
            optimizer.step()
            optimizer.zero_grad()
        assert calls(backend) == before + 3
        assert swarm.server.handler.held_forwards.bytes == 0


def test_a_server_that_holds_nothing_keeps_nothing() -> None:
    backend = backend_of(seeded(Counted))
    with served(backend, held_max_bytes=0) as swarm:
        before = calls(backend)
        step(swarm, data(ROWS), data(ROWS))
        assert calls(backend) == before + 2


def test_what_would_take_too_much_is_not_kept() -> None:
    backend = backend_of(seeded(Counted))
    with served(backend, held_max_bytes=4 * 2**20) as swarm:  # 2 MiB of them of one caller: not 3.5
        before = calls(backend)
        step(swarm, data(ROWS), data(ROWS))
        assert calls(backend) == before + 2
        assert swarm.server.handler.held_forwards.bytes == 0


def test_steps_of_others_in_between_change_nothing_but_the_cost() -> None:
    backend = backend_of(seeded(Counted), 0.1)
    twin = local_twin(backend.module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    with served(backend) as swarm:
        expert = swarm.expert("e.0")
        inputs = [data(ROWS).requires_grad_(True) for _ in range(2)]
        outputs = [expert(x) for x in inputs]
        for x, output in zip(inputs, outputs):
            grad = data(ROWS)
            output.backward(grad)
            mine = x.detach().clone().requires_grad_(True)
            twin(mine).backward(grad)
            torch.testing.assert_close(x.grad, mine.grad)
            optimizer.step()
            optimizer.zero_grad()


def test_nothing_is_kept_of_experts_that_have_left() -> None:
    backend = backend_of(seeded(Counted))
    with served(backend) as swarm:
        handler = swarm.server.handler
        output = swarm.expert("e.0")(data(ROWS).requires_grad_(True))
        assert handler.held_forwards.bytes > 0
        handler.drop(["e.0"])
        assert handler.held_forwards.bytes == 0
        del output


def test_adapters_and_masks_too() -> None:
    module = seeded(LoraExpert)
    twin = local_twin(module)
    with memory_swarm({"lora.0": lora_backend(module, max_batch_size=4096)}) as swarm:
        x, grad = torch.randn(900, 60, HIDDEN), torch.randn(900, 60, HIDDEN)
        kwargs = {"mask": torch.rand(900, 60) > 0.3, "lora_a": torch.randn(HIDDEN, 2), "lora_b": torch.randn(2, HIDDEN)}
        got = run_with_gradients(swarm.expert("lora.0"), [x], kwargs, grad)
        assert_same(got, run_with_gradients(twin, [x], kwargs, grad), 1e-3)  # sums over 54,000 rows


def test_a_task_says_what_was_kept_by_default_nothing() -> None:
    task = Task("forward", (), (), [], 0, None)
    assert (task.keep, task.kept) == (False, None)
