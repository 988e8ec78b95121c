"""Optimizer wrappers: hivemind's numbers, usable by torch's schedulers, interchangeable states; how they compute."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from hivemind.moe.server.layers.optim import ClippingWrapper as StockClippingWrapper
from torch.optim.lr_scheduler import LambdaLR
from torch.testing import assert_close

from moe.errors import ConfigError
from moe.server.layers import optim as hiveminds_path
from moe.server.optim import (
    ClippingWrapper,
    MoEOptimizer,
    OptimizerWrapper,
    fuse,
    load_state,
    move_state,
    portable_state,
)


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


# --- how an optimizer computes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_fused_steps_are_those_of_torchs_loop(kind: type[torch.optim.Adam]) -> None:
    modules = [make_module(), make_module()]
    loop, fused = (kind(module.parameters(), lr=0.1, weight_decay=0.01) for module in modules)
    fuse(fused)
    assert [group["fused"] for group in (*loop.param_groups, *fused.param_groups)] == [None, True]
    generator = torch.Generator().manual_seed(1)
    for _ in range(20):
        for ours, torchs in zip(*(module.parameters() for module in modules)):
            ours.grad = torch.randn(ours.shape, generator=generator)
            torchs.grad = ours.grad.clone()
        loop.step()
        fused.step()
    assert_close(list(modules[0].parameters()), list(modules[1].parameters()), rtol=1e-5, atol=1e-5)


def test_only_what_nobody_chose_and_torch_can_do_is_fused() -> None:
    def fused(*parameters: torch.nn.Parameter, kind: Any = torch.optim.Adam, **options: Any) -> list[Any]:
        optimizer = kind(parameters or make_module().parameters(), **options)
        fuse(optimizer)
        return [group.get("fused") for group in optimizer.param_groups]

    assert fused() == [True]
    assert fused(torch.nn.Parameter(torch.zeros(0))) == [True]  # the nop expert's
    assert fused(fused=False) == [False]
    assert fused(foreach=True) == fused(foreach=False) == fused(differentiable=True) == [None]
    assert fused(torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64))) == [None]
    assert fused(kind=torch.optim.SGD) == fused(kind=torch.optim.RMSprop) == [None]
    wrapped = ClippingWrapper(torch.optim.Adam(make_module().parameters()), 1.0)
    fuse(wrapped)
    assert wrapped.param_groups[0]["fused"] is True


def test_a_state_moves_between_fused_and_other_optimizers_and_each_keeps_its_way() -> None:
    saved = []
    for fused_first in (False, True):
        modules = [make_module(), make_module()]
        optimizers = [torch.optim.Adam(module.parameters(), lr=lr) for module, lr in zip(modules, (0.1, 0.2))]
        fuse(optimizers[0 if fused_first else 1])
        train(modules[0], optimizers[0])
        saved.append(portable_state(optimizers[0]))
        load_state(optimizers[1], copy.deepcopy(saved[-1]))
        assert [optimizer.param_groups[0]["fused"] for optimizer in optimizers] == (
            [True, None] if fused_first else [None, True]
        )
        modules[1].load_state_dict(modules[0].state_dict())
        results = [train(module, optimizer) for module, optimizer in zip(modules, optimizers)]
        assert_close(*results, rtol=1e-5, atol=1e-5)
    assert saved[0]["param_groups"] == saved[1]["param_groups"]  # it does not show who has written it
    with pytest.raises(ValueError, match="different number of parameter groups"):
        load_state(optimizers[0], {**saved[0], "param_groups": saved[0]["param_groups"] * 2})


def test_step_counts_follow_the_parameters_only_where_the_device_reads_them() -> None:
    for fused, expected in ((False, "cpu"), (True, "meta")):
        module = make_module()
        optimizer = torch.optim.Adam(module.parameters())
        if fused:
            fuse(optimizer)
        train(module, optimizer, steps=1)
        move_state(optimizer, "meta")
        for remembered in optimizer.state.values():
            assert remembered["exp_avg"].device.type == "meta"
            assert remembered["step"].device.type == expected


def test_hiveminds_import_path() -> None:
    assert hiveminds_path.ClippingWrapper is ClippingWrapper and hiveminds_path.OptimizerWrapper is OptimizerWrapper


@pytest.mark.parametrize("optimizer", [torch.optim.Adam, torch.optim.AdamW])
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.randn(6, 4),
        lambda: torch.randn(6, 4).T,
        lambda: torch.randn(6, 8)[:, ::2],
        lambda: torch.randn(6, 8)[:, :3],
        lambda: torch.randn(9)[1:],
        lambda: torch.randn(()),
        lambda: torch.randn(0, 3),
        lambda: torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        lambda: torch.randn(3, 3, dtype=torch.float64),
    ],
)
def test_to_fuse_changes_no_result_whatever_memory_parameters_lie_in(make: Any, optimizer: Any) -> None:
    results = []
    for fuses in (True, False):
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(make()), torch.nn.Parameter(torch.randn(3))]
        chosen = optimizer(parameters, lr=0.1)
        if fuses:
            fuse(chosen)
        for _ in range(3):
            for parameter in parameters:
                (parameter * torch.randn(parameter.shape)).sum().backward()
            chosen.step()
            chosen.zero_grad()
        results.append(parameters)
    for fused, plain in zip(*results, strict=True):
        torch.testing.assert_close(fused, plain)


def test_subclasses_compute_as_they_do() -> None:
    class Own(torch.optim.Adam):
        pass

    own = Own([torch.nn.Parameter(torch.ones(1))])
    fuse(own)
    assert own.param_groups[0]["fused"] is None
