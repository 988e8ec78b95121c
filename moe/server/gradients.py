"""Gradients of parameters. Owns: whether one may train with them. Must not know: modules, optimizers, callers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

# A gradient of a larger norm is as good as infinite: a thousand of them add up to one whose square is, which Adam computes.
MAX_NORM = 1e16


def usable(gradients: Iterable[torch.Tensor]) -> bool:
    """True if they are finite, and stay so when an optimizer squares or adds them. One pass over memory."""
    on_devices: list[torch.Tensor] = []
    for gradient in gradients:
        values = gradient if gradient.layout is torch.strided else gradient.detach().coalesce().values()
        square = _square(values)
        if square.device.type != "cpu":
            on_devices.append(square)
        elif not square.item() <= MAX_NORM**2:  # nor if it is nan
            return False
    return not on_devices or bool(torch.stack(on_devices).max() <= MAX_NORM**2)


def _square(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the squares of all values."""
    if tensor.is_contiguous() and tensor.dtype in (torch.float32, torch.float64):
        flat = tensor.view(-1)
        return torch.dot(flat, flat)  # all cores, where vector_norm takes one
    half = tensor.dtype.itemsize == 2  # whose own largest number is soon reached
    norm: torch.Tensor = torch.linalg.vector_norm(tensor, dtype=torch.float32 if half else None)
    return torch.square(norm.double())


def add(gradient: torch.Tensor | None, more: torch.Tensor | None) -> torch.Tensor | None:
    """Their sum; the first is changed."""
    if gradient is None or more is None:
        return more if gradient is None else gradient
    if gradient.layout is torch.strided:
        return gradient.add_(more)
    return more + gradient if more.layout is torch.strided else gradient + more
