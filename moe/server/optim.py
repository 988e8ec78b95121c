"""Optimizers of experts. Owns: wrappers around torch optimizers, how they compute, their state. Knows nothing of experts."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from moe.config import check_positive
from moe.errors import ConfigError


class MoEOptimizer:
    """Empty base of every optimizer that this package defines, for ``isinstance``."""


class OptimizerWrapper(MoEOptimizer, Optimizer):
    """Forwards everything to the wrapped optimizer; subclasses change what they need.

    Is an ``Optimizer`` in name only (torch's learning-rate schedulers insist): it has no parameters or state of its own,
    so its checkpoints are those of the wrapped optimizer and either loads the other's.

    :param optim: the optimizer to wrap
    :raises ConfigError: if it is not an optimizer
    """

    def __init__(self, optim: Optimizer):
        if not isinstance(optim, Optimizer):
            raise ConfigError(f"{type(self).__name__}: expected an optimizer to wrap, got {optim!r}")
        self.optim = optim  # deliberately no super().__init__(): param_groups, state and hooks are the inner one's

    def __getattr__(self, name: str) -> Any:
        if name == "optim":  # not set yet: being unpickled or copied
            raise AttributeError(name)
        return getattr(self.optim, name)

    def __getstate__(self) -> dict[str, Any]:
        # torch's schedulers put a counting ``step`` into the instance; like torch's own optimizers we leave it behind
        return {name: value for name, value in self.__dict__.items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.optim!r})"

    def state_dict(self) -> dict[str, Any]:
        """The wrapped optimizer's state."""
        return self.optim.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the wrapped optimizer's state."""
        self.optim.load_state_dict(state_dict)

    def step(self, *args: Any, **kwargs: Any) -> Any:
        """One step of the wrapped optimizer."""
        return self.optim.step(*args, **kwargs)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optim.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Give the wrapped optimizer more parameters."""
        self.optim.add_param_group(param_group)


class ClippingWrapper(OptimizerWrapper):
    """Clips the gradients of all parameters together by their global norm before each step.

    :param optim: the optimizer to wrap
    :param clip_grad_norm: the largest global norm a step may see
    :raises ConfigError: if there is no optimizer, or the norm is not positive
    """

    def __init__(self, optim: Optimizer, clip_grad_norm: float):
        super().__init__(optim)
        self.clip_grad_norm = clip_grad_norm
        check_positive(self, "clip_grad_norm", allow_none=False)

    def step(self, closure: Callable[[], Any] | None = None, **kwargs: Any) -> Any:
        """Clip, then step. A closure's gradients are clipped each time it has computed them."""
        if closure is None:
            self._clip()
            return super().step(**kwargs)

        def compute_and_clip() -> Any:
            loss = closure()
            self._clip()
            return loss

        return super().step(compute_and_clip, **kwargs)

    def _clip(self) -> None:
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, self.clip_grad_norm)


# --- how an optimizer computes: a choice of who runs it, and no part of its state ------------------------------------

_HOW = ("fused", "foreach")


def fuse(optimizer: Optimizer) -> None:
    """Let Adam and AdamW update all parameters in one pass over memory, unless somebody chose how they compute.

    torch's default on CPU is a dozen passes, which took three times as long (docs/performance.md). Equal to that to 1e-6 a
    step. SGD gains nothing. What is fused counts no version of what it writes to: nobody may rely on these.
    """
    while isinstance(optimizer, OptimizerWrapper):
        optimizer = optimizer.optim
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW) or not _fused_adam_works():
        return  # a subclass may compute otherwise
    for group in optimizer.param_groups:
        chosen = any(group[how] is not None for how in _HOW) or group["differentiable"]
        if not chosen and all(parameter.is_floating_point() and _is_dense(parameter) for parameter in group["params"]):
            group["fused"] = True


def _is_dense(tensor: torch.Tensor) -> bool:
    """Does it fill its piece of memory? torch's fused kernels take that for granted, and compute nonsense where it is not so
    (a parameter made of some columns of another tensor)."""
    length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.numel() == 0 or length == tensor.numel()


@functools.cache
def _fused_adam_works() -> bool:
    """False on CPU before torch 2.4."""
    parameter = torch.nn.Parameter(torch.ones(1))
    parameter.grad = torch.ones(1)
    try:
        torch.optim.Adam([parameter], fused=True).step()
    except RuntimeError:
        return False
    return True


def portable_state(optimizer: Optimizer) -> dict[str, Any]:
    """The optimizer's ``state_dict``; whoever loads it decides how to compute."""
    state = optimizer.state_dict()
    undecided = [
        {key: None if key in _HOW else value for key, value in group.items()} for group in state["param_groups"]
    ]
    return {**state, "param_groups": undecided}


def load_state(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    """``load_state_dict`` that leaves it to this optimizer how it computes."""
    groups = list(state["param_groups"])
    for i, own in enumerate(optimizer.param_groups[: len(groups)]):  # torch says what is wrong with more or fewer
        groups[i] = {**groups[i], **{key: own[key] for key in _HOW if key in own}}
    optimizer.load_state_dict({**state, "param_groups": groups})


def move_state(optimizer: Optimizer, device: torch.device | str) -> None:
    """Move what an optimizer remembers to a device, in place; its parameters are there already.

    Step counts stay on the CPU, as torch has them, except where a fused or captured update reads them on the device.
    """
    for group in optimizer.param_groups:
        counts_too = group.get("fused") or group.get("capturable")
        for parameter in group["params"]:
            remembered = optimizer.state.get(parameter, {})
            for key, value in remembered.items():
                if isinstance(value, torch.Tensor) and (value.ndim > 0 or counts_too):
                    remembered[key] = value.to(device)
