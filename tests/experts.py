"""Tiny experts with a local twin each, and calls with all their gradients. Owns: what the unit tests serve and compare.

Legend: B = rows, T = length, D = hidden size, R = rank of an adapter.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import nn

from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend

HIDDEN = 6
LORA_KWARGS = {
    "lora_a": TensorProto(HIDDEN, None),
    "lora_b": TensorProto(None, HIDDEN),
    "mask": BatchTensorProto(None, dtype=torch.bool),
}


class LoraExpert(nn.Module):
    """x (B, T, D), mask (B, T), lora_a (D, R), lora_b (R, D) -> (B, T, D). Counts its launches."""

    def __init__(self, hidden: int = HIDDEN):
        super().__init__()
        self.linear, self.norm = nn.Linear(hidden, hidden), nn.LayerNorm(hidden)
        self.launches = 0

    def forward(
        self,
        x: torch.Tensor,
        mask: torch.Tensor | None = None,
        lora_a: torch.Tensor | None = None,
        lora_b: torch.Tensor | None = None,
    ) -> torch.Tensor:
        self.launches += 1
        y = self.linear(x)
        if lora_a is not None and lora_b is not None:
            y = y + x @ lora_a @ lora_b
        if mask is not None:
            y = y * mask[..., None]
        normal: torch.Tensor = self.norm(x + torch.tanh(y))
        return normal


class UnstackableExpert(LoraExpert):
    """The same, but it looks at its data, which torch.func.vmap does not allow."""

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if bool((x > 1e6).any()):
            raise ValueError("too large")
        return super().forward(x, *args, **kwargs)


def lora_backend(module: nn.Module, optimizer: Any = None, *, name: str = "lora.0", **options: Any) -> ExpertBackend:
    """A backend of LoraExpert's schema: x of any length; mask and adapter optional."""
    return ExpertBackend(
        name,
        module,
        optimizer,
        args_schema=(BatchTensorProto(None, HIDDEN),),
        kwargs_schema=LORA_KWARGS,
        optional_kwargs=tuple(LORA_KWARGS),
        **options,
    )


def linear_backend(name: str = "linear.0", *, lr: float | None = None, **options: Any) -> ExpertBackend:
    """One linear layer (B, D) -> (B, D), with SGD if ``lr`` is given."""
    module = seeded(lambda: nn.Linear(HIDDEN, HIDDEN))
    optimizer = None if lr is None else torch.optim.SGD(module.parameters(), lr=lr)
    return ExpertBackend(name, module, optimizer, args_schema=(BatchTensorProto(HIDDEN),), **options)


def seeded(make: Callable[[], Any], seed: int = 0) -> Any:
    """Make something with random values that are always the same."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return make()


def parameters_of(module: nn.Module) -> list[torch.Tensor]:
    """Copies, to compare with later."""
    return [parameter.detach().clone() for parameter in module.parameters()]


def unchanged(module: nn.Module, before: Sequence[torch.Tensor]) -> bool:
    """True if the parameters are bit-identical to the copies."""
    return all(torch.equal(now, then) for now, then in zip(module.parameters(), before, strict=True))


def local_twin(module: nn.Module) -> nn.Module:
    """The same module with the same parameters, for the local answer."""
    return copy.deepcopy(module)


def run_with_gradients(
    module: Callable[..., Any], args: Sequence[torch.Tensor], kwargs: Mapping[str, torch.Tensor], grad: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Output of a module (local or remote), and the gradients of its floating-point inputs, for one output gradient."""
    leaves = {str(i): arg.detach().clone() for i, arg in enumerate(args)}
    leaves |= {name: value.detach().clone() for name, value in kwargs.items()}
    for leaf in leaves.values():
        leaf.requires_grad_(leaf.is_floating_point())
    output = module(*(leaves[str(i)] for i in range(len(args))), **{name: leaves[name] for name in kwargs})
    output.backward(grad)
    return output.detach(), {name: leaf.grad for name, leaf in leaves.items()}


def assert_same(
    got: tuple[torch.Tensor, Mapping[str, torch.Tensor | None]],
    expected: tuple[torch.Tensor, Mapping[str, torch.Tensor | None]],
    tolerance: float = 1e-5,
) -> None:
    """Outputs and all gradients agree."""
    torch.testing.assert_close(got[0], expected[0], atol=tolerance, rtol=tolerance)
    assert got[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        other = got[1][name]
        if gradient is None:
            assert other is None, f"{name} has a gradient"
        else:
            assert other is not None, f"{name} has no gradient"
            torch.testing.assert_close(other, gradient, atol=tolerance, rtol=tolerance)


def in_parallel(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results of calls made at the same time, in order; an exception takes the place of a result."""

    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except Exception as e:
            return e

    with ThreadPoolExecutor(max_workers=max(1, len(calls))) as pool:
        return list(pool.map(outcome, calls))
