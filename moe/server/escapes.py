"""Tensors of a ``torch.func.vmap`` that outlive it. Owns: finding them, and making them usable.

Inside vmap, what is computed from its inputs are wrappers around the tensors of all lanes. A module that keeps one (a mask made
once for each length, in an attribute, a global or a cache of a function) fails with it ever after. So all of them are watched,
and those that somebody still refers to afterwards are made, in their place, what the first lane would have made them. Must not
know: modules, tasks, lanes' contents.
"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_functorch: Any = torch._C._functorch
_swap: Callable[[torch.Tensor, torch.Tensor], None] = torch.utils.swap_tensors
_NO_KWARGS: Mapping[str, Any] = MappingProxyType({})


class Escapes(TorchFunctionMode):
    """A context, entered inside a vmap, that watches which wrappers come into being."""

    def __init__(self) -> None:
        super().__init__()
        self._made: list[weakref.ref[torch.Tensor]] = []

    def watch(self, tensors: Sequence[torch.Tensor]) -> None:
        """Watch these as well."""
        self._made += [weakref.ref(t) for t in tensors if _functorch.is_batchedtensor(t)]

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, and note what it has made."""
        result = func(*args, **(kwargs or _NO_KWARGS))
        if isinstance(result, torch.Tensor):
            if _functorch.is_batchedtensor(result):
                self._made.append(weakref.ref(result))
        elif isinstance(result, (tuple, list)):
            self.watch([item for item in result if isinstance(item, torch.Tensor)])
        return result

    def mend(self) -> bool:
        """Call when the vmap is over, and nothing of it is needed any more: make what somebody keeps ordinary tensors.

        :returns: was there any?
        """
        if not self._alive():
            return False
        gc.collect()  # those in cycles nobody keeps
        kept = self._alive()
        self._made.clear()  # a tensor with weak references cannot be swapped
        for tensor in kept:
            _unwrap(tensor)
        return bool(kept)

    def _alive(self) -> list[torch.Tensor]:
        return list({id(t): t for made in self._made if (t := made()) is not None}.values())


def is_wrapper(tensor: torch.Tensor) -> bool:
    """Is it one that only makes sense inside a vmap?"""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def is_told_by(error_text: str) -> bool:
    """Does torch say so that somebody has kept one?"""
    return "inside a function being vmapped" in error_text or "GradTrackingTensor" in error_text


def mend_all() -> bool:
    """Look for wrappers in all of the process's memory, which takes long. Call outside of any vmap.

    :returns: was there any?
    """
    kept = [found for found in gc.get_objects() if issubclass(type(found), torch.Tensor) and is_wrapper(found)]
    for tensor in kept:
        _unwrap(tensor)
    return bool(kept)


def _unwrap(tensor: torch.Tensor) -> None:
    """Let everybody who has this wrapper have its first lane instead."""
    value: torch.Tensor = tensor
    while _functorch.is_functorch_wrapped_tensor(value):
        lanes = _functorch.maybe_get_bdim(value) if _functorch.is_batchedtensor(value) else -1
        value = _functorch.get_unwrapped(value)
        if lanes >= 0:
            value = value.select(lanes, 0)
    with torch.no_grad():
        ordinary = value.detach().clone().requires_grad_(False)
    with contextlib.suppress(RuntimeError):  # C++ holds it too: whoever uses it is told so by torch
        _swap(tensor, ordinary)
