"""Linear layers on a CPU: oneDNN's matrix product instead of MKL's, where that is faster. Owns: finding out, and the layers.

torch multiplies float32 matrices with MKL, which does not use the AVX-512 units of AMD's processors; oneDNN, part of torch as
well, does, and takes half the time or less there (decision 0011). Results are equal to 1e-6. Must not know: experts.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

logger = logging.getLogger(__name__)

_Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]

# Multiply-adds in a product from which oneDNN is used: its preparations take it about 1 ms for each new number of rows.
MIN_PRODUCT = 2**25
MIN_SPEEDUP = 1.2  # what it must gain to be used at all


def speed_up_linear(module: nn.Module) -> None:
    """Let the ``nn.Linear`` layers of a module use oneDNN, if that is faster on this machine. Subclasses are left alone."""
    if onednn_is_faster():
        for layer in module.modules():
            if type(layer) is nn.Linear:
                layer.__class__ = OneDnnLinear


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` whose large float32 products on a CPU are computed by oneDNN."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., in_features) -> (..., out_features)"""
        weight = self.weight
        if (
            (x.numel() * self.out_features >= MIN_PRODUCT or torch._C._functorch.is_batchedtensor(x))
            and x.dtype == weight.dtype == torch.float32
            and x.device.type == weight.device.type == "cpu"
            and x.ndim > 1
            and x.shape[-1] == self.in_features  # else nn.Linear says what is wrong
            and not torch.is_autocast_enabled("cpu")
            and not torch.compiler.is_compiling()
        ):
            return _product(x, weight, self.bias)
        return super().forward(x)


class _Product(torch.autograd.Function):
    """x (..., I), weight (O, I), bias (O) or None -> x @ weight.T + bias (..., O)"""

    @staticmethod
    def forward(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return _multiply(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = grad.reshape(-1, grad.shape[-1]).contiguous()
        return (  # itself made of what can be differentiated
            _product(rows, weight.T, None).reshape(x.shape) if wants_x else None,
            _product(rows.T, x.reshape(-1, x.shape[-1]).T, None) if wants_weight else None,
            rows.sum(0) if wants_bias else None,
        )

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], x: Any, weight: Any, bias: Any) -> tuple[Any, int]:
        if in_dims[1] is None and in_dims[2] is None:  # many callers, one layer: as many rows
            return _product(x.movedim(in_dims[0], 0), weight, bias), 0
        return torch.func.vmap(nn.functional.linear, in_dims)(x, weight, bias), 0


def _product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    apply: _Multiply = _Product.apply
    return apply(x, weight, bias)


def _multiply(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.numel() * len(weight) < MIN_PRODUCT:
        return nn.functional.linear(x, weight, bias)
    if not (x.is_contiguous() or x.mT.is_contiguous()):
        x = x.contiguous()
    return _onednn(x, weight, bias)


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


@functools.cache
def onednn_is_faster() -> bool:
    """Found out once, with a product that takes each of them less than a millisecond."""
    own = torch.Generator().manual_seed(0)  # whoever has seeded torch's own gets the numbers that follow there
    x, weight, bias = (torch.randn(sizes, generator=own) for sizes in ((128, 512), (512, 512), (512,)))
    theirs: _Multiply = nn.functional.linear
    best_s = {_onednn: math.inf, theirs: math.inf}
    try:
        with torch.no_grad():
            if not torch.allclose(_onednn(x, weight, bias), theirs(x, weight, bias), rtol=1e-4, atol=1e-4):
                return False
            for _ in range(10):
                for product in best_s:
                    start = time.perf_counter()
                    product(x, weight, bias)
                    best_s[product] = min(best_s[product], time.perf_counter() - start)
    except (AttributeError, RuntimeError) as e:  # a torch without oneDNN, or whose oneDNN is called in another way
        logger.debug("no oneDNN: %r", e)
        return False
    speedup = best_s[theirs] / best_s[_onednn]
    logger.debug("oneDNN multiplies matrices %.1f times as fast as torch's default", speedup)
    return speedup >= MIN_SPEEDUP
