"""Random modules, optimizers, callers and calls: what a client gets, and what an expert learns, equals the module run locally.

Everything is made from one seed, which a failure tells. ``FUZZ_SEED=123 pytest tests/server/test_results_fuzz.py`` runs that
again, ``FUZZ_SECONDS=1800`` runs for longer than in the suite.
"""

from __future__ import annotations

import copy
import functools
import itertools
import os
import random
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

import moe.client.references
from moe.config import ClientConfig
from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.optim import ClippingWrapper
from moe.testing import MemorySwarm, memory_swarm

D = 16  # width of everything
SECONDS = float(os.environ.get("FUZZ_SECONDS", "10"))
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 1e-1}

# --- modules ---------------------------------------------------------------------------------------------------------------

WRITES = ("nothing", "x", "a part of x", "x.data", "the scale", "the scale's memory", "ids", "hidden")
CACHES = (
    "nothing",
    "an attribute",
    "a dict",
    "a list",
    "a tuple",
    "a function",
    "a global",
    "an object",
    "a small function",
)
RETURNS = (
    "y",
    "its own memory",
    "a view",
    "a transposed view",
    "y twice",
    "y and its input",
    "y and its bias",
    "y and its buffer",
)
GRADIENTS = ("autograd", "a function's memory", "a function's attribute")
STATES = ("nothing", "counts", "a buffer that is replaced", "a running mean", "a running mean's data")
DRAWS = ("nothing", "nothing", "dropout", "Python's numbers")
_masks: dict[Any, torch.Tensor] = {}


class OwnFunction(torch.autograd.Function):
    """The sine. Its gradient lies in memory that it uses again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, memory: dict[Any, torch.Tensor], hides: bool) -> torch.Tensor:
        ctx.memory = memory
        if hides:
            ctx.x = memory.setdefault(("x", x.shape), torch.empty_like(x)).copy_(x)
        else:
            ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors or (ctx.x,)
        gradient = ctx.memory.setdefault(("grad", x.shape), torch.empty_like(x))
        return torch.mul(grads[0], x.cos(), out=gradient).detach(), None, None


class Strange(nn.Module):
    """x (B, T, D), ids (B, T), scale (D), lora {a (D, R), b (R, D)} -> y (B, T, D), and more. Does what its options say."""

    count: torch.Tensor
    mean: torch.Tensor
    steady: torch.Tensor

    def __init__(self, seed: int, options: dict[str, str], dtype: torch.dtype):
        super().__init__()
        torch.manual_seed(seed)
        self.seed, self.options = seed, options
        self.inner, self.outer = nn.Linear(D, D, dtype=dtype), nn.Linear(D, D, dtype=dtype)
        self.bias = nn.Parameter(torch.randn(D, dtype=dtype))
        self.register_buffer("steady", torch.randn(D, dtype=dtype))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(D, dtype=dtype))
        self.memory: dict[Any, torch.Tensor] = {}
        self.cached: Any = None
        self.by_length: dict[int, Any] = {}
        self.in_list: list[Any] = []
        self.in_object = SimpleNamespace(found={})
        latest: list[torch.Tensor] = []

        def made(length: int) -> torch.Tensor:
            return self._positions(latest[0])

        self.latest = latest
        self.made, self.made_last = functools.lru_cache(made), functools.lru_cache(maxsize=1)(made)

    def _positions(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ones_like(x[0, :, :1]).cumsum(0) / 10

    def positions(self, x: torch.Tensor) -> torch.Tensor:
        """(T, 1), computed once for each T and kept somewhere."""
        where, length = self.options["caches"], x.shape[1]
        if where == "nothing":
            return self._positions(x)
        if where == "an attribute":
            if self.cached is None or len(self.cached) != length:
                self.cached = self._positions(x)
            found: torch.Tensor = self.cached
            return found
        if where == "a tuple":
            if self.cached is None or self.cached[0] != length:
                self.cached = (length, [self._positions(x)])
            return self.cached[1][0]  # type: ignore[no-any-return]
        if where == "a list":
            for entry in self.in_list:
                if len(entry) == length:
                    return entry  # type: ignore[no-any-return]
            self.in_list.append(self._positions(x))
            return self.in_list[-1]  # type: ignore[no-any-return]
        if where in ("a function", "a small function"):
            self.latest[:] = [x]
            result = (self.made if where == "a function" else self.made_last)(length)
            self.latest.clear()
            return result
        known = {"a dict": self.by_length, "an object": self.in_object.found, "a global": _masks}[where]
        key: Any = (self.seed, id(self), length) if where == "a global" else length
        if key not in known:
            known[key] = self._positions(x)
        return known[key]

    def forward(
        self,
        x: torch.Tensor,
        ids: torch.Tensor | None = None,
        scale: torch.Tensor | None = None,
        lora: dict[str, torch.Tensor] | None = None,
    ) -> Any:
        options = self.options
        given = x
        if options["writes"] == "x":
            x.mul_(0.5)
        elif options["writes"] == "a part of x":
            x[:, :1] += 1
        elif options["writes"] == "x.data" and not x.requires_grad:
            x.data.mul_(0.5)
        elif options["writes"] == "x.data":
            x = given = x * 0.5
        elif options["writes"] == "the scale" and scale is not None:
            scale.mul_(2)
        elif options["writes"] == "the scale's memory" and scale is not None:
            scale = scale * 2 if scale.requires_grad or torch._C._functorch.is_batchedtensor(scale) else _doubled(scale)
        elif options["writes"] == "ids" and ids is not None:
            ids.add_(1)
        h = self.inner(x + self.positions(x))
        if lora is not None:
            h = h + x @ lora["a"] @ lora["b"]
        if ids is not None:
            h = h + ids[..., None].to(h.dtype) / 10
        h = torch.relu_(h) if options["writes"] == "hidden" else torch.tanh(h)
        if options["gradients"] != "autograd":
            h = OwnFunction.apply(h, self.memory, options["gradients"] == "a function's attribute")
        if options["draws"] == "dropout":
            h = nn.functional.dropout(h, 0.3)
        elif options["draws"] != "nothing":
            h = h * random.random()
        y = self.outer(h) + self.steady + self.bias
        if scale is not None:
            y = y * scale
        self._remember(y)
        return self._returned(y, given)

    def _remember(self, y: torch.Tensor) -> None:
        state = self.options["state"]
        with torch.no_grad():
            if state == "counts":
                self.count += 1
            elif state == "a buffer that is replaced":
                self.count = self.count + 1
            elif state == "a running mean":
                self.mean.lerp_(y.detach().mean((0, 1)), 0.1)
            elif state == "a running mean's data":
                self.mean.data = self.mean.data * 0.9 + y.detach().mean((0, 1)) * 0.1

    def _returned(self, y: torch.Tensor, x: torch.Tensor) -> Any:
        returns = self.options["returns"]
        if returns == "its own memory" and not torch.is_grad_enabled():
            memory = self.memory.get(("out", y.dtype))
            if memory is None or len(memory) < len(y) or memory.shape[1:] != y.shape[1:]:
                memory = self.memory["out", y.dtype] = torch.empty_like(y)
            y = memory[: len(y)].copy_(y)
        elif returns == "a view":
            y = torch.cat([y, y], 1)[:, : y.shape[1]]
        elif returns == "a transposed view":
            y = y.transpose(0, 2).contiguous().transpose(0, 2)
        more = {"y twice": y, "y and its input": x, "y and its bias": self.bias, "y and its buffer": self.steady}
        extra = more.get(returns, y.detach())
        return {"y": y, "more": extra.expand_as(y), "best": y.detach().argmax(-1)}


def _doubled(tensor: torch.Tensor) -> torch.Tensor:
    memory: Any = tensor.detach().view(torch.uint8).numpy().view("uint8")
    copied = tensor.clone()
    memory[:] = 0  # whoever uses it after us is lost
    return copied * 2


# --- optimizers --------------------------------------------------------------------------------------------------------------


class DataSGD(torch.optim.Optimizer):
    """Writes through ``.data``."""

    def __init__(self, parameters: Any, lr: float):
        super().__init__(parameters, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.change(parameter, group["lr"])

    def change(self, parameter: torch.Tensor, lr: float) -> None:
        parameter.data.add_(parameter.grad, alpha=-lr)


class NewMemorySGD(DataSGD):
    """Gives parameters new memory."""

    def change(self, parameter: torch.Tensor, lr: float) -> None:
        assert parameter.grad is not None
        parameter.data = parameter.data - lr * parameter.grad


class ReplacingSGD(DataSGD):
    """Puts other parameters into the module."""

    def __init__(self, module: nn.Module, lr: float):
        super().__init__(module.parameters(), lr)
        self.module = module

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for part in self.module.modules():
            for name, parameter in list(part._parameters.items()):
                if parameter is not None and parameter.grad is not None:
                    part._parameters[name] = nn.Parameter(parameter.detach() - 0.002 * parameter.grad)
        self.param_groups[0]["params"] = list(self.module.parameters())


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.002),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.002, momentum=0.9, nesterov=True),
    "foreach SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.002, foreach=True),
    "fused SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.002, fused=True),
    "Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.002, eps=1e-3),
    "AMSGrad": lambda m: torch.optim.Adam(m.parameters(), lr=0.002, eps=1e-3, amsgrad=True),
    "foreach Adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.002, eps=1e-3, foreach=True),
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), lr=0.002, eps=1e-3),
    "clipped AdamW": lambda m: ClippingWrapper(torch.optim.AdamW(m.parameters(), lr=0.002, eps=1e-3), 1.0),
    "data": lambda m: DataSGD(m.parameters(), 0.002),
    "new memory": lambda m: NewMemorySGD(m.parameters(), 0.002),
    "other parameters": lambda m: ReplacingSGD(m, 0.002),
}


# --- one round: a module, an optimizer, some callers --------------------------------------------------------------------------


class Expert:
    """A server's expert and its local twin."""

    def __init__(self, rng: random.Random, *, draws: bool = False):
        seed = rng.randrange(2**31)
        self.dtype = rng.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16])
        kinds = {"writes": WRITES, "caches": CACHES, "returns": RETURNS, "gradients": GRADIENTS, "state": STATES}
        self.options = {name: kind[0] if rng.random() < 0.65 else rng.choice(kind) for name, kind in kinds.items()}
        self.options["draws"] = rng.choice(DRAWS) if draws else "nothing"
        self.optimizer_name = rng.choice([None, *OPTIMIZERS])
        self.accumulate_steps = rng.choice([1, 1, 1, 3])
        module, self.twin = (Strange(seed, dict(self.options), self.dtype) for _ in range(2))
        optimizer = OPTIMIZERS[self.optimizer_name](module) if self.optimizer_name else None
        self.twin_optimizer = OPTIMIZERS[self.optimizer_name](self.twin) if self.optimizer_name else None
        x = BatchTensorProto(None, D, dtype=self.dtype)
        self.backend = ExpertBackend(
            "e.0",
            module,
            optimizer,
            args_schema=(x,),
            kwargs_schema={
                "ids": BatchTensorProto(None, dtype=torch.int64),
                "scale": TensorProto(D, dtype=self.dtype),
                "lora": {"a": TensorProto(D, None, dtype=self.dtype), "b": TensorProto(None, D, dtype=self.dtype)},
            },
            optional_kwargs=("ids", "scale", "lora"),
            accumulate_steps=self.accumulate_steps,
            max_batch_size=rng.choice([64, 4096]),
        )
        self._since_step = 0

    def __repr__(self) -> str:
        return f"Expert({self.dtype}, {self.options}, {self.optimizer_name}, accumulate {self.accumulate_steps})"

    def step(self) -> None:
        """What the server does after a backward batch."""
        self._since_step += 1
        if self.twin_optimizer is None:
            self.twin.zero_grad()
        elif self._since_step == self.accumulate_steps:
            self._since_step = 0
            self.twin_optimizer.step()
            self.twin_optimizer.zero_grad()

    def check_parameters(self) -> None:
        for (name, mine), theirs in zip(self.backend.module.named_parameters(), self.twin.parameters(), strict=True):
            _close(mine, theirs, f"parameter {name}", 5)


class Call:
    """One caller's inputs, with leaves for the remote and for the local call."""

    def __init__(
        self, rng: random.Random, dtype: torch.dtype, rows: int, length: int, rank: int, names: tuple[str, ...]
    ):
        x = torch.randn(rows, length, D, dtype=dtype)
        if rng.random() < 0.3:
            x = torch.randn(length, rows, D, dtype=dtype).transpose(0, 1)
        every = {
            "ids": torch.randint(0, 9, (rows, length)),
            "scale": torch.randn(D, dtype=dtype),
            "lora": {"a": torch.randn(D, rank, dtype=dtype), "b": torch.randn(rank, D, dtype=dtype)},
        }
        self.inputs = {"x": x, **{name: every[name] for name in names}}
        self.wants = [rng.random() < 0.7 for _ in range(4)]
        self.remote, self.local = self._leaves(), self._leaves()
        self.grads = torch.randn(rows, length, D, dtype=dtype), torch.randn(rows, length, D, dtype=dtype)
        self.outputs: Any = None

    def _leaves(self) -> dict[str, Any]:
        wants = iter(self.wants)

        def leaf(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.detach().clone().requires_grad_(next(wants) if tensor.is_floating_point() else False)

        return {
            k: {n: leaf(t) for n, t in v.items()} if isinstance(v, dict) else leaf(v) for k, v in self.inputs.items()
        }

    def forward(self, expert: Any) -> None:
        self.outputs = expert(self.remote["x"], **{k: v for k, v in self.remote.items() if k != "x"})

    def backward(self) -> None:
        _loss(self.outputs, self.grads).backward()

    def check(self, twin: nn.Module, *, backward: bool, trainable: bool) -> None:
        """The same locally: with copies, since the module may write to its inputs."""
        outputs = self._run(twin, grad=False)
        for name in ("y", "more"):
            _close(self.outputs[name], outputs[name], f"output {name}")
        if not backward:
            return
        loss = _loss(self._run(twin, grad=True), self.grads)
        if loss.requires_grad:
            loss.backward()
        for mine, theirs, given in zip(_flat(self.remote), _flat(self.local), _flat(self.inputs), strict=True):
            assert torch.equal(mine.detach(), given), "the caller's own tensor has changed"
            if mine.requires_grad:
                expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
                _close(mine.grad, expected, f"gradient of shape {tuple(mine.shape)}", 5)

    def _run(self, twin: nn.Module, grad: bool) -> Any:
        copies = {
            k: {n: t.clone() for n, t in v.items()} if isinstance(v, dict) else v.clone() for k, v in self.local.items()
        }
        with torch.set_grad_enabled(grad):
            if not grad:
                copies = {
                    k: {n: t.detach() for n, t in v.items()} if isinstance(v, dict) else v.detach()
                    for k, v in copies.items()
                }
            return twin(copies["x"], **{k: v for k, v in copies.items() if k != "x"})


def _loss(outputs: Any, grads: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    total: torch.Tensor = (outputs["y"] * grads[0]).sum() + (outputs["more"] * grads[1]).sum()
    return total


def _flat(inputs: dict[str, Any]) -> list[torch.Tensor]:
    return [t for value in inputs.values() for t in (value.values() if isinstance(value, dict) else (value,))]


def _close(mine: torch.Tensor | None, theirs: torch.Tensor, what: str, factor: float = 1) -> None:
    assert mine is not None, what
    assert mine.shape == theirs.shape, what
    mine, theirs = mine.detach().double(), theirs.detach().double()
    size = max(1.0, float(theirs.abs().max())) if theirs.numel() else 1.0
    error = float((mine - theirs).abs().max()) / size if theirs.numel() else 0.0
    dtype_tolerance = TOLERANCE[_dtype[0]]
    assert error <= factor * dtype_tolerance, f"{what}: {error:.3g}"


_dtype = [torch.float32]


def _calls(rng: random.Random, expert: Expert, count: int) -> Iterator[Call]:
    length, rank = rng.choice([1, 4, 8]), rng.choice([1, 3])
    names = tuple(name for name in ("ids", "scale", "lora") if rng.random() < 0.5)
    for _ in range(count):
        if rng.random() < 0.2:
            length = rng.choice([1, 4, 8])
        yield Call(rng, expert.dtype, rng.choice([1, 2, 7, 16, 40, 64]), length, rank, names)


def one_after_another(rng: random.Random, swarm: MemorySwarm, expert: Expert) -> None:
    """Some forwards, then their backwards in any order, each of them a step."""
    remote = swarm.expert("e.0", config=ClientConfig(hold_tensors=rng.random() < 0.8))
    calls = list(_calls(rng, expert, rng.choice([1, 1, 2, 3])))
    for call in calls:
        call.forward(remote)
        call.check(expert.twin, backward=False, trainable=False)
    rng.shuffle(calls)
    for call in calls:
        if rng.random() < 0.2:
            _change_behind_its_back(rng, expert)
        trains = expert.backend.optimizer is not None
        wants = any(call.outputs[name].requires_grad for name in ("y", "more"))
        if not wants:
            continue
        frozen = [p for p in expert.twin.parameters() if not trains]
        for parameter in frozen:
            parameter.requires_grad_(False)
        call.backward()
        outputs, call.outputs = call.outputs, call._run(expert.twin, grad=False)
        call.check(expert.twin, backward=True, trainable=trains)
        call.outputs = outputs
        for parameter in frozen:
            parameter.requires_grad_(True)
        expert.step()
        if trains:
            expert.check_parameters()


def _change_behind_its_back(rng: random.Random, expert: Expert) -> None:
    """What a user's thread may do between two calls."""
    how = rng.choice(["data", "in place", "swap", "state", "buffer"])
    for module in (expert.backend.module, expert.twin):
        weight: Any = cast(Any, module).inner.weight
        with torch.no_grad():
            if how == "data":
                weight.data.mul_(0.9)
            elif how == "in place":
                weight.mul_(0.9)
            elif how == "swap":
                weight.data[[0, 1]] = weight.data[[1, 0]]
            elif how == "state":
                module.load_state_dict({**module.state_dict(), "bias": torch.ones_like(module.bias)})
            else:
                module.steady.data.neg_()


def together(rng: random.Random, swarm: MemorySwarm, expert: Expert) -> None:
    """Several callers in one batch. Forwards only, or all of a frozen expert."""
    trains = expert.backend.optimizer is not None
    calls = list(_calls(rng, expert, rng.choice([2, 3, 5])))
    remotes = [swarm.expert("e.0", config=ClientConfig(hold_tensors=rng.random() < 0.8)) for _ in calls]
    for remote in remotes:
        remote.describe()
    with ThreadPoolExecutor(len(calls)) as pool:
        with swarm.server.paused():
            futures = [pool.submit(call.forward, remote) for call, remote in zip(calls, remotes)]
            swarm.server.wait_pending(1)
            time.sleep(0.005)
        for future in futures:
            future.result()
        backward = [c for c in calls if c.outputs["y"].requires_grad or c.outputs["more"].requires_grad]
        if not trains and backward:
            with swarm.server.paused():
                futures = [pool.submit(call.backward) for call in backward]
                swarm.server.wait_pending(1)
                time.sleep(0.005)
            for future in futures:
                future.result()
    for call in calls:
        call.check(expert.twin, backward=not trains and call in backward, trainable=False)
    if not trains:
        expert.twin.zero_grad()


def save_and_load(rng: random.Random, swarm: MemorySwarm, expert: Expert) -> None:
    """A restart in the middle changes nothing."""
    state = expert.backend.state_dict()
    with torch.no_grad():
        for parameter in expert.backend.module.parameters():
            parameter.add_(1)
    expert.backend.load_state_dict(copy.deepcopy(state))


def a_round(seed: int) -> None:
    rng = random.Random(seed)
    torch.manual_seed(seed)
    expert = Expert(rng)
    _dtype[0] = expert.dtype
    try:
        with memory_swarm({"e.0": expert.backend}) as swarm:
            for _ in range(6):
                actions = [one_after_another, one_after_another, together, save_and_load]
                if expert.optimizer_name == "other parameters":
                    actions.remove(
                        save_and_load
                    )  # its optimizer's state goes by position, ours by the first parameters
                rng.choice(actions)(rng, swarm, expert)
            assert swarm.server.handler.inflight.bytes == 0
    except BaseException as e:
        raise AssertionError(f"FUZZ_SEED={seed}: {expert}") from e
    finally:
        _masks.clear()


def program(seed: int, hold: bool) -> list[torch.Tensor]:
    """One caller's steps, in which everything is a matter of the seed: all outputs, gradients and parameters."""
    rng = random.Random(seed)
    torch.manual_seed(seed), random.seed(seed)
    expert = Expert(rng, draws=True)
    seen: list[torch.Tensor] = []
    with memory_swarm({"e.0": expert.backend}) as swarm:
        remote = swarm.expert("e.0", config=ClientConfig(hold_tensors=hold))
        for _ in range(6):
            calls = list(_calls(rng, expert, rng.choice([1, 1, 2])))
            for call in calls:
                call.forward(remote)
                seen += [call.outputs[name].detach().clone() for name in ("y", "more", "best")]
            rng.shuffle(calls)
            for call in calls:
                if rng.random() < 0.2:
                    _change_behind_its_back(rng, expert)
                if call.outputs["y"].requires_grad:
                    call.backward()
                seen += [leaf.grad for leaf in _flat(call.remote) if leaf.grad is not None]
            seen += [tensor.detach().clone() for tensor in expert.backend.module.state_dict().values()]
    _masks.clear()
    return seen


def keeping_changes_no_bit(seed: int) -> None:
    with_keeping, without = (program(seed, hold) for hold in (True, False))
    for i, (one, other) in enumerate(zip(with_keeping, without, strict=True)):
        assert torch.equal(one, other) or (one.isnan() & other.isnan()).any(), f"tensor {i}, FUZZ_SEED={seed}"


@pytest.mark.timeout(SECONDS + 120)
@pytest.mark.filterwarnings("ignore:.*batching rule")
@pytest.mark.parametrize("check", [a_round, keeping_changes_no_bit])
def test_results_equal_the_local_modules_and_keeping_changes_none(
    check: Callable[[int], None], monkeypatch: pytest.MonkeyPatch, record_property: Callable[[str, object], None]
) -> None:
    monkeypatch.setattr(moe.client.references, "KEEP_FROM_BYTES", 2**12)  # small calls are kept, too
    first = int(os.environ.get("FUZZ_SEED", "0"))
    end = time.monotonic() + SECONDS / 2
    for seed in itertools.count(first):
        check(seed)
        record_property("last seed", seed)
        if time.monotonic() > end or ("FUZZ_SEED" in os.environ and "FUZZ_SECONDS" not in os.environ):
            break
