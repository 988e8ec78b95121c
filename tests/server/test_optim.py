"""Optimizer wrappers: hivemind's numbers, usable by torch's schedulers, interchangeable states; optimizers by name."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hivemind.moe.server.layers.optim import ClippingWrapper as StockClippingWrapper
from torch.optim.lr_scheduler import LambdaLR

from moe.config import OPTIMIZERS
from moe.errors import ConfigError
from moe.server.layers import optim as hiveminds_path
from moe.server.optim import ClippingWrapper, MoEOptimizer, OptimizerWrapper, make_optimizer_factory


def make_module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Linear(8, 2))


def train(
    module: torch.nn.Module, optimizer: Any, steps: int = 5, scheduler: LambdaLR | None = None
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        module(torch.randn(16, 4, generator=generator)).pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    return [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("clip_grad_norm", [0.1, 1e9])
def test_clipping_is_hiveminds(clip_grad_norm: float) -> None:
    results = []
    for wrapper in (ClippingWrapper, StockClippingWrapper):
        module = make_module()
        results.append(train(module, wrapper(torch.optim.Adam(module.parameters()), clip_grad_norm)))
    assert all(map(torch.equal, *results))


def test_update_norm_is_bounded() -> None:
    module = make_module()
    before = [parameter.detach().clone() for parameter in module.parameters()]
    optimizer = ClippingWrapper(torch.optim.SGD(module.parameters(), lr=0.5), clip_grad_norm=0.1)
    after = train(module, optimizer, steps=1)
    norm = torch.cat([(a - b).flatten() for a, b in zip(after, before)]).norm().item()
    assert norm == pytest.approx(0.5 * 0.1, rel=1e-4)


def test_torch_schedulers_take_wrappers() -> None:
    results = []
    for schedule_inner in (False, True):
        module = make_module()
        inner = torch.optim.Adam(module.parameters())
        wrapper = ClippingWrapper(inner, 1.0)
        scheduler = LambdaLR(inner if schedule_inner else wrapper, lambda step: 1 / (1 + step))
        results.append(train(module, wrapper, scheduler=scheduler))
        assert inner.param_groups[0]["lr"] == pytest.approx(0.001 / 6)
    assert all(map(torch.equal, *results))


def test_wrapper_forwards_everything() -> None:
    module = make_module()
    inner = torch.optim.Adam(module.parameters())
    wrapper = ClippingWrapper(inner, 1.0)
    assert isinstance(wrapper, MoEOptimizer) and isinstance(wrapper, torch.optim.Optimizer)
    assert wrapper.param_groups is inner.param_groups and wrapper.state is inner.state
    assert wrapper.defaults is inner.defaults and repr(inner) in repr(wrapper)
    train(module, wrapper)
    assert len(wrapper.state) == 4
    other = OptimizerWrapper(torch.optim.Adam(make_module().parameters()))
    other.load_state_dict(copy.deepcopy(wrapper.state_dict()))
    inner.load_state_dict(other.state_dict())  # rebinds the inner optimizer's param_groups and state
    assert wrapper.param_groups is inner.param_groups and wrapper.state is inner.state

    wrapper.add_param_group({"params": [torch.nn.Parameter(torch.zeros(1))]})
    assert len(inner.param_groups) == 2
    calls = []
    wrapper.register_step_post_hook(lambda *args: calls.append(args))
    train(module, wrapper, steps=2)
    assert len(calls) == 2
    with pytest.raises(AttributeError, match="there_is_no_such_thing"):
        _ = wrapper.there_is_no_such_thing


def test_wrapper_can_be_copied_and_pickled() -> None:
    module = make_module()
    wrapper = ClippingWrapper(torch.optim.Adam(module.parameters()), 0.25)
    train(module, wrapper, scheduler=LambdaLR(wrapper, lambda step: 1.0))
    for duplicate in (copy.deepcopy(wrapper), pickle.loads(pickle.dumps(wrapper))):
        assert isinstance(duplicate, ClippingWrapper) and duplicate.clip_grad_norm == 0.25
        assert duplicate.state_dict()["param_groups"] == wrapper.state_dict()["param_groups"]
        duplicate.step()


def test_closure_is_clipped() -> None:
    parameter = torch.nn.Parameter(torch.ones(4))
    optimizer = ClippingWrapper(torch.optim.SGD([parameter], lr=1.0), clip_grad_norm=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = 100 * parameter.sum()
        torch.autograd.backward(loss)
        return loss

    assert optimizer.step(closure).item() == 400
    assert (parameter.detach() - 1).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_wrappers_refuse_nonsense() -> None:
    with pytest.raises(ConfigError, match="ClippingWrapper: expected an optimizer to wrap, got None"):
        ClippingWrapper(None, 1.0)  # type: ignore[arg-type]
    norms: tuple[Any, ...] = (0.0, -1.0, math.nan, None, "1")
    for norm in norms:
        with pytest.raises(ConfigError, match="clip_grad_norm"):
            ClippingWrapper(torch.optim.SGD(make_module().parameters(), lr=0.1), norm)


@pytest.mark.parametrize(
    ("name", "lr", "expected_lr"), [("adam", None, 0.001), ("sgd", None, 0.01), ("adam", 0.5, 0.5), ("sgd", 0.5, 0.5)]
)
def test_optimizers_by_name(name: str, lr: float | None, expected_lr: float) -> None:
    factory = pickle.loads(pickle.dumps(make_optimizer_factory(name, lr)))
    kind = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    results = []
    for make in (factory, lambda parameters: kind(parameters, lr=expected_lr)):
        module = make_module()
        optimizer = make(module.parameters())
        assert type(optimizer) is kind
        results.append(train(module, optimizer))
    assert all(map(torch.equal, *results))


def test_factory_refuses_nonsense() -> None:
    assert make_optimizer_factory("none") is None
    assert all(make_optimizer_factory(name) is not None for name in OPTIMIZERS if name != "none")
    with pytest.raises(ConfigError, match="adam, sgd, none"):
        make_optimizer_factory("adamw")
    with pytest.raises(ConfigError, match="of no use"):
        make_optimizer_factory("none", 0.1)
    for lr in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ConfigError, match="learning rate"):
            make_optimizer_factory("adam", lr)


def test_hiveminds_import_path() -> None:
    assert hiveminds_path.ClippingWrapper is ClippingWrapper and hiveminds_path.OptimizerWrapper is OptimizerWrapper
