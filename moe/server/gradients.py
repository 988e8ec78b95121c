"""Gradients of parameters. Owns: whether one may train with them. Must not know: modules, optimizers, callers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# A gradient of a larger norm is as good as infinite: a thousand of them add up to one whose square is, which Adam computes.
MAX_NORM = 1e16


def usable(gradients: Iterable[torch.Tensor]) -> bool:
    """True if they are finite, and stay so when an optimizer squares or adds them. One pass over memory."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
    for gradient in gradients:
        dense = gradient if gradient.layout is torch.strided else gradient.detach().coalesce().values()
        if dense.numel():
            groups.setdefault((dense.device, dense.dtype), []).append(dense)
    for (device, dtype), group in groups.items():
        if dtype.itemsize == 2:  # whose own largest number is soon reached
            norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32) for gradient in group]
        else:
            norms = list(torch._foreach_norm(group, 2.0))
        if device.type != "cpu":
            norms = [torch.stack(norms).max()]
        if not all(norm.item() <= MAX_NORM for norm in norms):  # nor if one is nan
            return False
    return True


def add(gradient: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum; the first is changed."""
    if gradient is None or more is None:
        return more if gradient is None else gradient
    if gradient.layout is torch.strided:
        return gradient.add_(more)
    return more + gradient if more.layout is torch.strided else gradient + more
