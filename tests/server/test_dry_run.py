"""Answers to calls of no rows: of the right shape, at no cost, whatever lengths a caller names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe.errors import ExpertFailed, SchemaError
from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend

B = BatchTensorProto
HUGE = 10**6


class Calls(nn.Module):
    """Calls a function; remembers the largest input."""

    def __init__(self, func: Callable[..., Any]):
        super().__init__()
        self.func, self.largest = func, 0

    def forward(self, *args: torch.Tensor, **kwargs: torch.Tensor) -> Any:
        self.largest = max([self.largest, *(t.numel() for t in (*args, *kwargs.values()))])
        return self.func(*args, **kwargs)


def backend_of(func: Callable[..., Any], *protos: Any, **options: Any) -> tuple[ExpertBackend, Calls]:
    module = Calls(func)
    backend = ExpertBackend("e.0", module, args_schema=protos, **options)
    module.largest = 0
    return backend, module


def forward(backend: ExpertBackend, *tensors: torch.Tensor, present: Any = ()) -> list[tuple[int, ...]]:
    (outcome,) = backend._run_forward([backend.make_task("forward", tensors, present)])
    if isinstance(outcome, BaseException):
        raise outcome
    return [tuple(t.shape) for t in outcome if t is not None]


SHAPES: dict[str, tuple[Callable[..., Any], list[Any], list[tuple[int, ...]], list[tuple[int, ...]]]] = {
    "one length": (lambda x: x * 2, [B(None, 8)], [(0, HUGE, 8)], [(0, HUGE, 8)]),
    "fixed": (lambda x: x * 2, [B(8)], [(0, 8)], [(0, 8)]),
    "reduced": (lambda x: x.sum(1), [B(None, 8)], [(0, HUGE, 8)], [(0, 8)]),
    "one more": (lambda x: torch.cat([x, x[:, :1]], 1), [B(None, 8)], [(0, HUGE, 8)], [(0, HUGE + 1, 8)]),
    "twice": (lambda x: torch.cat([x, x], 1), [B(None, 8)], [(0, HUGE, 8)], [(0, 2 * HUGE, 8)]),
    "squares": (lambda x: x @ x.mT, [B(None, 8)], [(0, HUGE, 8)], [(0, HUGE, HUGE)]),
    "two lengths": (
        lambda x, y: (torch.cat([x, y], 1), x @ y.mT),
        [B(None, 4), B(None, 4)],
        [(0, HUGE, 4), (0, 7, 4)],
        [(0, HUGE + 7, 4), (0, HUGE, 7)],
    ),
    "the same length": (
        lambda x, m: x * m[..., None],
        [B(None, 4), B(None)],
        [(0, HUGE, 4), (0, HUGE)],
        [(0, HUGE, 4)],
    ),
    "length one": (lambda x, m: x * m[..., None], [B(None, 4), B(None)], [(0, HUGE, 4), (0, 1)], [(0, HUGE, 4)]),
    "length zero": (lambda x: x * 2, [B(None, 4)], [(0, 0, 4)], [(0, 0, 4)]),
    "a global's": (
        lambda x, p: torch.cat([p.expand(len(x), -1, -1), x], 1),
        [B(None, 4), TensorProto(None, 4)],
        [(0, HUGE, 4), (3, 4)],
        [(0, HUGE + 3, 4)],
    ),
}


@pytest.mark.parametrize("what", SHAPES)
def test_shapes_follow_from_small_runs(what: str) -> None:
    func, protos, shapes, expected = SHAPES[what]
    backend, module = backend_of(func, *protos)
    inputs = [torch.zeros(shape) for shape in shapes]
    for _ in range(2):
        assert forward(backend, *inputs) == expected
        assert module.largest < 2000
    module.largest = 0
    assert forward(backend, *inputs) == expected
    assert module.largest == 0  # it is known now


def test_they_equal_the_modules_with_rows() -> None:
    conv = nn.Conv1d(4, 4, 3, padding=1)
    backend, _ = backend_of(lambda x: conv(x.mT).mT, B(None, 4))
    for length in (1, 2, 5, 100):
        some, none = torch.zeros(2, length, 4), torch.zeros(0, length, 4)
        assert forward(backend, none) == [(0, *forward(backend, some)[0][1:])]


def test_lengths_that_follow_no_simple_rule_are_run_if_they_are_small_and_refused_else() -> None:
    backend, module = backend_of(lambda x: x[:, ::3], B(None, 4))
    assert forward(backend, torch.zeros(0, 10, 4)) == [(0, 4, 4)]
    with pytest.raises(SchemaError, match="send at least one row"):
        forward(backend, torch.zeros(0, HUGE, 4))
    assert module.largest < 2000


def test_global_outputs_are_computed_if_that_is_small() -> None:
    backend, module = backend_of(lambda x: (x * 2, x.shape[1] * torch.ones(2)), B(None, 4))
    assert forward(backend, torch.zeros(0, 10, 4)) == [(0, 10, 4), (2,)]
    with pytest.raises(SchemaError, match="send at least one row"):
        forward(backend, torch.zeros(0, HUGE, 4))
    assert module.largest < 2000


def test_patterns_of_lengths_are_many_and_what_is_known_of_them_is_bounded() -> None:
    backend, module = backend_of(lambda *xs: xs[0], *[B(None)] * 6)
    for code in range(300):
        lengths = [1 + (code >> i) % 3 for i in range(6)]
        assert forward(backend, *(torch.zeros(0, length) for length in lengths)) == [(0, lengths[0])]
    assert len(backend._empty._known) <= 256
    assert module.largest < 200
    many, _ = backend_of(lambda *xs: xs[0], *[B(None)] * 12)
    assert forward(many, *(torch.zeros(0, i + 2) for i in range(12))) == [(0, 2)]  # too many: run as they are


def test_no_rows_leave_no_trace_and_errors_are_their_callers() -> None:
    norm = nn.BatchNorm1d(4)
    module = nn.Sequential(norm)
    backend = ExpertBackend("e.0", module, args_schema=(B(4),))
    forward(backend, torch.zeros(0, 4))
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]
    broken, calls = backend_of(lambda x: x, B(None, 4))

    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("no")

    calls.func = fail
    with pytest.raises(ExpertFailed, match="ValueError: no"):
        forward(broken, torch.zeros(0, 5, 4))


def test_backwards_of_no_rows_run_nothing() -> None:
    backend, module = backend_of(lambda x, w: x @ w, B(None, 4), TensorProto(4, 4))
    tensors = [torch.zeros(0, HUGE, 4), torch.randn(4, 4), torch.zeros(0, HUGE, 4)]
    (outcome,) = backend._run_backward([backend.make_task("backward", tensors)])
    assert isinstance(outcome, list)
    assert [tuple(g.shape) for g in outcome if g is not None] == [(0, HUGE, 4), (4, 4)]
    assert outcome[1] is not None
    assert not outcome[1].any()
    assert module.largest == 0
