"""Tensors that a module keeps out of a vmap: found wherever they are, and of use afterwards."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from moe.server.escapes import Escapes, is_told_by, is_wrapper, mend_all

_global: dict[str, Any] = {}


def run(func: Callable[..., torch.Tensor], *tensors: torch.Tensor, grad: bool = False) -> Escapes:
    escapes = Escapes()

    def call(*inputs: torch.Tensor) -> torch.Tensor:
        escapes.watch(inputs)
        with escapes:
            return func(*inputs)

    with torch.set_grad_enabled(grad):
        output = torch.func.vmap(call)(*tensors)
        if output.requires_grad:
            output.sum().backward()
    return escapes


def places() -> dict[str, tuple[Callable[[torch.Tensor], object], Callable[[], torch.Tensor]]]:
    """Ways to keep a tensor, and to get it back."""
    latest: list[torch.Tensor] = []
    holder, box = SimpleNamespace(), list[Any]()

    @functools.cache
    def cached() -> torch.Tensor:
        return latest[0]

    def through_cache(tensor: torch.Tensor) -> None:
        latest[:] = [tensor]
        cached()
        latest.clear()

    return {
        "a global": (lambda t: _global.update(x=t), lambda: _global["x"]),
        "a function's cache": (through_cache, cached),
        "an object": (lambda t: setattr(holder, "x", t), lambda: holder.x),
        "a tuple in a list": (lambda t: box.append((t, 1)), lambda: box[0][0]),
        "a closure": (lambda t: box.append(lambda: t), lambda: box[0]()),
    }


MAKES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "ones_like": lambda x: torch.ones_like(x[0]),
    "new_ones": lambda x: x.new_ones(3),
    "the input": lambda x: x,
    "a view": lambda x: x[0],
    "one of several": lambda x: x.chunk(2)[1],
    "computed": lambda x: x.mul(2).cumsum(0),
}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("where", places())
@pytest.mark.parametrize("makes", MAKES)
def test_they_become_what_the_first_lane_would_have_made(makes: str, where: str, grad: bool) -> None:
    keep, get = places()[where]
    lanes = torch.randn(3, 4, 3, requires_grad=grad)

    def func(x: torch.Tensor) -> torch.Tensor:
        keep(MAKES[makes](x))
        return x * 2

    assert run(func, lanes, grad=grad).mend()
    mended = get()
    assert not is_wrapper(mended)
    assert torch.equal(mended, MAKES[makes](lanes[0].detach()))
    assert torch.equal(mended + 1, mended.clone() + 1)
    assert not mended.requires_grad


def test_functions_that_keep_nothing_have_none() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        local = [x * 2]
        local.append(local)  # type: ignore[arg-type]
        return local[0] + 1

    assert not run(func, torch.randn(3, 4)).mend()


def test_those_of_a_run_that_fails_are_found_too() -> None:
    escapes = Escapes()

    def func(x: torch.Tensor) -> torch.Tensor:
        escapes.watch([x])
        with escapes:
            _global["x"] = x * 2
            raise ValueError

    with pytest.raises(ValueError):
        torch.func.vmap(func)(torch.ones(2, 3))
    assert escapes.mend()
    assert torch.equal(_global.pop("x"), torch.full((3,), 2.0))


def test_those_that_were_not_watched_are_found_by_looking_everywhere() -> None:
    def func(x: torch.Tensor) -> torch.Tensor:
        _global["x"] = x * 2
        return x

    torch.func.vmap(func)(torch.ones(2, 3))
    with pytest.raises(RuntimeError) as told:
        _global["x"] + torch.ones(3)
    assert is_told_by(str(told.value))
    assert mend_all()
    assert torch.equal(_global.pop("x"), torch.full((3,), 2.0))
    assert not mend_all()
