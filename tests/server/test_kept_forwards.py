"""Forwards that are kept for their backwards: computed once, exact, never stale, freed, and bounded."""

from __future__ import annotations

import gc
import random
import weakref
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from moe.config import HandlerConfig
from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.held_tensors import HeldTensors
from moe.server.kept_forwards import KeptForward, Thrift
from moe.server.optim import ClippingWrapper
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
    return KeptForward(lambda leaves: [module(leaves[0])], [x], module)


def data(rows: int = 4) -> torch.Tensor:
    return torch.randn(rows, WIDTH)


# --- one of them -----------------------------------------------------------------------------------------------------------


def test_its_size_is_that_of_all_it_holds_without_what_is_the_modules() -> None:
    x = data()
    kept = keep(Counted(), x)
    # x as it came and as it was lent, tanh, what x is multiplied by, and the output
    assert kept.size_bytes == 5 * x.nbytes
    assert repr(kept) == f"KeptForward(1 inputs, {5 * x.nbytes} bytes)"
    assert keep(nn.Identity(), x).size_bytes >= 2 * x.nbytes  # its graph has saved nothing


class Product(nn.Module):
    """Saves its input itself."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@pytest.mark.parametrize("make", [Counted, Product, nn.ReLU, nn.Softplus])
def test_what_was_kept_in_vain_is_freed(make: Callable[[], nn.Module]) -> None:
    """The graph of a forward that no backward comes for is in no cycle, not even one that torch and Python each see half of."""

    def alive() -> int:
        gc.collect()
        return sum(type(found) is torch.Tensor and found.numel() == ROWS * WIDTH for found in gc.get_objects())

    module, before = make(), alive()
    for _ in range(3):
        keep(module, torch.randn(ROWS, WIDTH))
    assert alive() == before


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


def test_modules_that_write_to_their_inputs_are_kept_like_others() -> None:
    backend = backend_of(WritesToItsInput())
    x = data()
    before = x.clone()
    output, kept = forward(backend, x)
    assert kept is not None
    assert torch.equal(output, before + 1)
    assert torch.equal(x, before)
    assert torch.equal(backward(backend, x, torch.ones_like(x), kept), torch.ones_like(x))


class NeedsNoGradients(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, 2, out=torch.empty_like(x))


def test_what_autograd_does_not_like_is_not_kept() -> None:
    backend = backend_of(NeedsNoGradients())
    x = data()
    output, kept = forward(backend, x)
    assert kept is None
    assert torch.equal(output, x * 2)


def test_tasks_that_share_a_batch_are_not_kept() -> None:
    backend = backend_of(seeded(Counted))
    tasks = [backend.make_task("forward", [data()]) for _ in range(2)]
    for task in tasks:
        task.keep = True
    backend._run_forward(tasks)
    assert [task.kept for task in tasks] == [None, None]


class Dropping(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(x, 0.5)


class Noisy(nn.Module):
    """Random numbers that are not torch's own."""

    def __init__(self, source: Callable[[], float]) -> None:
        super().__init__()
        self.source = source

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.source()


class OwnGenerator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rand(len(x), 1, generator=self.generator)


class Counts(nn.Module):
    """Remembers in ``how`` way how often it was called, and computes with it."""

    seen: torch.Tensor

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.register_buffer("seen", torch.zeros(()))
        self.plain = torch.zeros(1)
        self.weight = nn.Parameter(torch.zeros(1))
        self.history: dict[str, Any] = {"seen": [torch.zeros(1)]}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            if self.how == "a buffer":
                self.seen += 1
            elif self.how == "a buffer's data":
                self.seen.data += 1
            elif self.how == "another buffer":
                self.seen = self.seen + 1
            elif self.how == "an attribute":
                self.plain = self.plain + 1
            elif self.how == "an attribute's memory":
                self.plain.numpy()[0] += 1
            elif self.how == "a parameter's data":
                self.weight.data += 1
            else:
                self.history["seen"][0] = self.history["seen"][0] + 1
        count = self.seen + self.plain + self.history["seen"][0] + self.weight.detach()
        return x * count


UNSTEADY: dict[str, Callable[[], nn.Module]] = {
    "dropout": Dropping,
    "Python's numbers": lambda: Noisy(random.random),
    "NumPy's numbers": lambda: Noisy(lambda: float(np.random.rand())),
    "a generator": OwnGenerator,
    "batch norm": lambda: nn.BatchNorm1d(WIDTH),
    **{
        how: (lambda how=how: Counts(how))  # type: ignore[misc]
        for how in (
            "a buffer",
            "a buffer's data",
            "another buffer",
            "an attribute",
            "an attribute's memory",
            "a parameter's data",
            "a nested attribute",
        )
    },
}


@pytest.mark.parametrize("what", UNSTEADY)
def test_what_is_not_the_same_twice_is_the_same_with_and_without_keeping(what: str) -> None:
    results = []
    for keeps in (True, False):
        torch.manual_seed(0), random.seed(0), np.random.seed(0)
        module = UNSTEADY[what]()
        backend = backend_of(module, outputs_schema=BatchTensorProto(WIDTH))
        seen = []
        for _ in range(3):
            x = torch.randn(64, WIDTH)
            if keeps:
                output, kept = forward(backend, x)
                assert kept is None
            else:
                (output,) = backend.forward(x)
            seen += [output, backward(backend, x, torch.ones_like(x), None)]
        results.append([*seen, *module.state_dict().values()])
    for with_keeping, without in zip(*results, strict=True):
        assert torch.equal(with_keeping, without)


class HidesInContext(torch.autograd.Function):
    """Saves in memory that is used again, where autograd's hooks do not look."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, workspace: torch.Tensor) -> torch.Tensor:
        ctx.hidden = torch.mul(x, 2, out=workspace[: len(x)])
        return ctx.hidden.sin()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.hidden.cos() * 2, None


class HasWorkspace(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.workspace = how, torch.zeros(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.how == "checkpoint":
            return checkpoint(torch.exp, x * 2, use_reentrant=False)  # type: ignore[no-any-return]
        if self.how == "reentrant checkpoint":
            return checkpoint(torch.exp, x * 2, use_reentrant=True)  # type: ignore[no-any-return]
        return HidesInContext.apply(x, self.workspace)  # type: ignore[no-any-return]


@pytest.mark.parametrize("how", ["function", "checkpoint", "reentrant checkpoint"])
def test_a_graph_that_hides_what_it_saves_is_not_kept(how: str) -> None:
    backend = backend_of(HasWorkspace(how), outputs_schema=BatchTensorProto(WIDTH))
    x, other = data(), data()
    output, kept = forward(backend, x)
    assert kept is None
    forward(backend, other)
    got = backward(backend, x, torch.ones_like(x), kept)
    leaf = x.clone().requires_grad_()
    expected = HasWorkspace(how)(leaf)
    expected.sum().backward()
    assert torch.equal(output, expected)
    assert torch.equal(got, leaf.grad)


class DataOptimizer(torch.optim.Optimizer):
    """Writes through ``.data``, as many do."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data.add_(parameter.grad, alpha=-group["lr"])


class NewMemory(DataOptimizer):
    """Gives parameters other memory."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.data = parameter.data - group["lr"] * parameter.grad


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "fused SGD": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "foreach Adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=True),
    "single Adam": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "clipped Adam": lambda p: ClippingWrapper(torch.optim.Adam(p, lr=0.01), 0.1),
    "writes to data": lambda p: DataOptimizer(p, 0.1),
    "new memory": lambda p: NewMemory(p, 0.1),
}


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_of_any_optimizer_make_it_stale(name: str, accumulate: int) -> None:
    """Two forwards, then their backwards, as of an expert that a model uses twice: bit by bit as without keeping."""

    def make() -> ExpertBackend:
        module = seeded(Counted)
        optimizer = OPTIMIZERS[name](module.parameters())
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return ExpertBackend(
            "e.0",
            module,
            optimizer,
            scheduler=scheduler,
            args_schema=(BatchTensorProto(WIDTH),),
            accumulate_steps=accumulate,
        )

    keeping, other = make(), make()
    for _ in range(3):
        xs, grads = [data(), data()], [data(), data()]
        kept = [forward(keeping, x) for x in xs]
        for x, grad, (output, forward_kept) in zip(xs, grads, kept):
            assert torch.equal(output, forward_before(other, x) if grad is grads[0] else output)
            got = backward(keeping, x, grad, forward_kept)
            assert torch.equal(got, backward(other, x, grad, None))
        for mine, theirs in zip(keeping.module.parameters(), other.module.parameters(), strict=True):
            assert torch.equal(mine, theirs)


def forward_before(backend: ExpertBackend, x: torch.Tensor) -> torch.Tensor:
    return backend.forward(x)[0]


def _swap(matrix: torch.Tensor) -> None:
    matrix.data[[0, 1]] = matrix.data[[1, 0]]


def _rectangle(matrix: torch.Tensor) -> None:
    rows, columns = [0, 0, 7, 7], [3, 9, 3, 9]
    matrix.data[rows, columns] += torch.tensor([1.0, -1.0, -1.0, 1.0])


def _replace(module: Any) -> None:
    module.outer.weight = nn.Parameter(module.outer.weight.detach() * 2)


BEHIND_ITS_BACK: dict[str, Callable[[Any], object]] = {
    "data": lambda m: m.inner.weight.data.mul_(1.001),
    "one value": lambda m: m.inner.weight.data.view(-1)[12345].add_(1e-7),
    "NumPy": lambda m: m.outer.bias.detach().numpy().__iadd__(1),
    "swapped rows": lambda m: _swap(m.inner.weight),
    "a rectangle": lambda m: _rectangle(m.inner.weight),
    "signs": lambda m: m.inner.weight.data.neg_(),
    "another parameter": _replace,
    "other memory": lambda m: setattr(m.inner.weight, "data", m.inner.weight.data + 1),
    "load_state_dict": lambda m: m.load_state_dict(seeded(Counted, 1).state_dict()),
    "load_state_dict, assigned": lambda m: m.load_state_dict(seeded(Counted, 1).state_dict(), assign=True),
    "a number": lambda m: setattr(m, "scale", 2.0),
    "a hook": lambda m: m.outer.register_forward_hook(lambda module, args, output: output * 2),
    "a forward of its own": lambda m: setattr(m.inner, "forward", lambda x: x * 3),
    "another part": lambda m: setattr(m, "inner", nn.Linear(WIDTH, WIDTH)),
    "its mode": lambda m: m.eval(),
    "a tensor in a dict": lambda m: m.more["bias"].data.add_(1),
    "a number in an object": lambda m: setattr(m.config, "bias", 1.0),
}


class Configured(Counted):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.more, self.config = 1.0, {"bias": torch.zeros(1)}, SimpleNamespace(bias=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x) * self.scale + x * self.more["bias"] + x * self.config.bias
        return y if self.training else y * 2


@pytest.mark.parametrize("how", BEHIND_ITS_BACK)
@pytest.mark.parametrize("lr", [None, 0.1])
def test_what_users_change_between_two_calls_is_noticed(how: str, lr: float | None) -> None:
    backend = backend_of(seeded(Configured), lr)
    x, grad = data(), data()
    _, kept = forward(backend, x)
    assert kept is not None
    BEHIND_ITS_BACK[how](backend.module)
    twin = local_twin(backend.module)
    got = backward(backend, x, grad, kept)
    leaf = x.clone().requires_grad_(True)
    twin(leaf).backward(grad)
    assert torch.equal(got, leaf.grad)


def test_fast_paths_without_gradients_are_not_mixed_with_those_with() -> None:
    module = nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0, batch_first=True).eval()
    backend = ExpertBackend("e.0", module, args_schema=(BatchTensorProto(4, WIDTH),))
    x = torch.randn(2, 4, WIDTH)
    output, kept = forward(backend, x)
    assert kept is None
    assert torch.equal(output, backend.forward(x)[0])


def test_optimizers_may_train_what_the_module_does_not_register() -> None:
    def make() -> ExpertBackend:
        module = seeded(Counted)
        module.hidden = [torch.ones(WIDTH, requires_grad=True)]
        module.forward = lambda x: Counted.forward(module, x) * module.hidden[0]
        optimizer = torch.optim.SGD([*module.parameters(), *module.hidden], lr=0.1)
        return ExpertBackend("e.0", module, optimizer, args_schema=(BatchTensorProto(WIDTH),))

    keeping, other = make(), make()
    x, grad = data(), data()
    _, kept = forward(keeping, x)
    assert kept is not None
    assert torch.equal(backward(keeping, x, grad, kept), backward(other, x, grad, None))
    hidden = [cast(Any, backend.module).hidden[0] for backend in (keeping, other)]
    assert torch.equal(*hidden)
    assert not torch.equal(hidden[0], torch.ones(WIDTH))


def test_large_modules_are_not_looked_at_for_small_inputs() -> None:
    backend = backend_of(nn.Sequential(nn.Linear(WIDTH, 4096), nn.Linear(4096, WIDTH)))
    assert forward(backend, data(2))[1] is None
    assert forward(backend, data(1024))[1] is not None


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
