"""Experts that stock servers and ours host alike: the same modules, described by stock hivemind's descriptors.

Everything here is within what stock hivemind 1.1.12 can express; what only we can is in the tests that need it.
Legend: B = rows, D = HIDDEN.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from hivemind.proto.runtime_pb2 import CompressionType
from hivemind.utils.nested import nested_flatten, nested_map
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import nn

HIDDEN = 16
WIDE = 2**18  # values in one row of what the wide expert returns: 1 MiB
LEARNING_RATE = 0.05
MAX_BATCH_SIZE = 2**17


class FeedForward(nn.Module):
    """(B, D) -> (B, D)"""

    def __init__(self, hidden_dim: int = HIDDEN):
        super().__init__()
        self.inner, self.outer = nn.Linear(hidden_dim, 2 * hidden_dim), nn.Linear(2 * hidden_dim, hidden_dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = x + self.outer(torch.tanh(self.inner(x)))
        return result


class Modulated(nn.Module):
    """(B, D), and by keyword a scale (B, D) and a shift (B) -> (B, D)"""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, *, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x) * scale + shift.unsqueeze(-1)
        return result


class Masked(nn.Module):
    """(B, D), an int64 mask (B, D) of zeros and ones, and by keyword bool flags (B) -> (B, D)"""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor, mask: torch.Tensor, *, negate: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = torch.where(negate.unsqueeze(-1), -self.linear(x * mask), self.linear(x * mask))
        return result


class Nested(nn.Module):
    """(B, D) -> {"sum": (B), "parts": ((B, D), (B, D))}"""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        parts = (self.left(x), self.right(x))
        return {"sum": parts[0].sum(-1), "parts": parts}


class Wide(nn.Module):
    """(B, 1) -> (B, WIDE): small requests, large replies"""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, WIDE))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


@dataclass(frozen=True)
class Kind:
    """A kind of expert.

    :ivar make: a new module
    :ivar args: descriptors of its positional arguments
    :ivar kwargs: descriptors of its keyword arguments
    :ivar outputs: descriptors of what it returns; None: to be found by a dry run
    :ivar tolerance: of its results: 0 where only rounding of float32 makes a difference
    """

    make: Callable[[], nn.Module]
    args: tuple[BatchTensorDescriptor, ...] = (BatchTensorDescriptor(HIDDEN),)
    kwargs: dict[str, BatchTensorDescriptor] = field(default_factory=dict)
    outputs: Any = None
    tolerance: float = 0.0

    def backend_options(self, trained: bool = True) -> dict[str, Any]:
        """Keyword arguments of stock hivemind's ModuleBackend, and of ours."""
        module = self.make()
        return {
            "module": module,
            "optimizer": torch.optim.SGD(module.parameters(), lr=LEARNING_RATE) if trained else None,
            "args_schema": self.args,
            "kwargs_schema": self.kwargs,
            "outputs_schema": self.outputs,
            "max_batch_size": MAX_BATCH_SIZE,
        }

    def inputs(self, rows: int) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
        """Random inputs."""
        return tuple(_random(d, rows) for d in self.args), {name: _random(d, rows) for name, d in self.kwargs.items()}


def _random(descriptor: BatchTensorDescriptor, rows: int) -> torch.Tensor:
    dtype = descriptor.dtype or torch.float32
    shape = (rows, *descriptor.size[1:])
    return torch.randn(shape).to(dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(dtype)


def _compressed(codec: str, tolerance: float) -> Kind:
    descriptor = BatchTensorDescriptor(HIDDEN, compression=CompressionType.Value(codec))
    return Kind(FeedForward, (descriptor,), outputs=descriptor, tolerance=tolerance)


KINDS = {
    "plain": Kind(FeedForward),
    "kwargs": Kind(Modulated, kwargs={"shift": BatchTensorDescriptor(), "scale": BatchTensorDescriptor(HIDDEN)}),
    "masks": Kind(
        Masked,
        (BatchTensorDescriptor(HIDDEN), BatchTensorDescriptor(HIDDEN, dtype=torch.int64)),
        {"negate": BatchTensorDescriptor(dtype=torch.bool)},
    ),
    "nested": Kind(Nested),
    "bfloat16": Kind(
        lambda: FeedForward().bfloat16(), (BatchTensorDescriptor(HIDDEN, dtype=torch.bfloat16),), tolerance=0.05
    ),
    "FLOAT16": _compressed("FLOAT16", 0.01),
    "MEANSTD_16BIT": _compressed("MEANSTD_16BIT", 0.01),
    "UNIFORM_8BIT": _compressed("UNIFORM_8BIT", 0.15),
    "QUANTILE_8BIT": _compressed("QUANTILE_8BIT", 1.0),  # its outermost bins are wide
    "wide": Kind(Wide, (BatchTensorDescriptor(1),)),
}


@dataclass(frozen=True)
class Pass:
    """One forward and backward through a module or an expert.

    :ivar outputs: flat
    :ivar input_grads: of the flat inputs (args, then kwargs by name); None where there is none
    """

    outputs: list[torch.Tensor]
    input_grads: list[torch.Tensor | None]


def run(
    expert: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    grad_outputs: Sequence[torch.Tensor] | None = None,
    *,
    inputs_require_grad: bool = True,
) -> Pass:
    """Call a module or an expert, and go backward if there are gradients of its floating-point outputs."""

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        tensor = tensor.detach().clone()
        return tensor.requires_grad_(inputs_require_grad and tensor.is_floating_point())

    args, kwargs = nested_map(leaf, (tuple(args), dict(kwargs)))
    outputs = list(nested_flatten(expert(*args, **kwargs)))
    if grad_outputs is not None:
        floating = [output for output in outputs if output.is_floating_point()]
        torch.autograd.backward(floating, list(grad_outputs))
    return Pass([output.detach() for output in outputs], [tensor.grad for tensor in nested_flatten((args, kwargs))])


@dataclass(frozen=True)
class Reference:
    """What a trained expert should answer, and become, by a copy of its module run here.

    :ivar result: outputs and gradients of the inputs
    :ivar grad_outputs: random ones, to go backward with
    :ivar trained: the module's state after one step
    """

    result: Pass
    grad_outputs: list[torch.Tensor]
    trained: dict[str, torch.Tensor]


def reference(module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> Reference:
    """Run a copy of a module on these inputs, and train it for one step."""
    module = copy.deepcopy(module)
    outputs = [output for output in run(module, args, kwargs).outputs if output.is_floating_point()]
    grad_outputs = [torch.randn(output.shape).to(output.dtype) / len(output) for output in outputs]
    result = run(module, args, kwargs, grad_outputs)
    torch.optim.SGD(module.parameters(), lr=LEARNING_RATE).step()
    return Reference(result, grad_outputs, dict(module.state_dict()))


def assert_close(
    actual: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None], tolerance: float = 0.0
) -> None:
    """Equal tensors, None where None is expected; up to rounding in float32 unless there is a tolerance."""
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected):
        if one is None or other is None:
            assert one is None
            assert other is None
        else:
            torch.testing.assert_close(one, other, rtol=tolerance or 1e-5, atol=tolerance or 1e-5)


def assert_state_close(
    actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 0.0
) -> None:
    """The same for the state of a module."""
    assert sorted(actual) == sorted(expected)
    assert_close([actual[name] for name in sorted(actual)], [expected[name] for name in sorted(expected)], tolerance)


# --- mixtures ------------------------------------------------------------------------------------------------------------


def best_experts(uids: Sequence[str], grid_scores: Sequence[torch.Tensor], k: int) -> list[list[str]]:
    """The k uids of highest score for each row, best first, by looking at all of them.

    :param grid_scores: of each grid dimension: (B, size)
    """
    coordinates = [tuple(map(int, uid.split(".")[1:])) for uid in uids]
    scores = torch.stack([_score(grid_scores, c) for c in coordinates], dim=1)  # (B, uids)
    return [[uids[i] for i in row] for row in scores.topk(min(k, len(uids)), dim=1).indices.tolist()]


def _score(grid_scores: Sequence[torch.Tensor], coordinates: Sequence[int]) -> torch.Tensor:
    """(B,): of the expert at these coordinates."""
    return torch.stack([scores[:, i] for scores, i in zip(grid_scores, coordinates)]).sum(0)


def dense_mixture(
    experts: dict[str, nn.Module],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    grid_size: Sequence[int],
    k: int,
) -> torch.Tensor:
    """What RemoteMixtureOfExperts computes, with all experts at hand: x (B, D) -> (B, D)."""
    grid_scores = torch.nn.functional.linear(x, weight, bias).split(list(grid_size), dim=-1)
    rows = []
    for i, uids in enumerate(best_experts(list(experts), grid_scores, k)):
        coordinates = [tuple(map(int, uid.split(".")[1:])) for uid in uids]
        logits = torch.stack([_score(grid_scores, c)[i] for c in coordinates])
        outputs = torch.stack([experts[uid](x[i]) for uid in uids])
        rows.append(torch.softmax(logits, 0) @ outputs)
    return torch.stack(rows)
