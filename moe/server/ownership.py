"""Whose memory a tensor is. Owns: that a module's writes to its inputs reach nobody else, and that an answer is nobody else's.

A module may write to what it is given, and may return what it holds: its buffers, parameters, inputs, caches, or views of
these. So it is lent tensors that share memory only until somebody writes (``lend``), and what it returns is copied if
anything but the answer refers to the memory (``own``). References are counted, of Python objects, tensors and storages
alike: there is no list of places to look at that would be complete. Memory that torch has not allocated (NumPy's) may
have owners that nobody can count: it is copied. Must not know: tasks, modules, schemas.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar, cast

import torch

T = TypeVar("T", torch.Tensor, torch.Tensor | None)

SMALL_BYTES = 2**16  # a tensor up to this is copied in a few microseconds

_NOTHING: Mapping[int, int] = MappingProxyType({})
_share_until_written: Callable[[torch.Tensor], torch.Tensor] | None = getattr(torch, "_lazy_clone", None)


def lend(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of equal contents that may be written to, without effect on this one: a copy, which is made when the first
    of the two is written to, if torch has allocated the memory, else at once. Gradients flow through it; it is no leaf."""
    if _share_until_written is not None and tensor.untyped_storage().resizable() and not tensor.is_inference():
        try:
            return _share_until_written(tensor)
        except RuntimeError:  # memory that torch shares in another way
            pass
    return tensor.clone()


def lends_for_nothing(tensor: torch.Tensor) -> bool:
    """Is ``lend`` cheap?"""
    storage = tensor.untyped_storage()
    return storage.nbytes() <= SMALL_BYTES or (storage.resizable() and _share_until_written is not None)


def plain(tensor: torch.Tensor) -> torch.Tensor:
    """The same tensor as one of class ``torch.Tensor``, whose memory can be read as it is.

    :raises ValueError: it has no such memory (sparse, nested, quantized, without storage)
    """
    if type(tensor) is not torch.Tensor:
        try:
            with torch._C.DisableTorchFunctionSubclass():
                same = tensor.as_subclass(torch.Tensor)
        except Exception as e:  # of the subclass's own
            raise ValueError(f"a {type(tensor).__name__}") from e
        if type(same) is not torch.Tensor:
            raise ValueError(f"a {type(tensor).__name__}")
        tensor = same
    if tensor.layout is not torch.strided or tensor.is_nested or tensor.is_quantized or tensor.is_meta:
        kind = (
            "nested"
            if tensor.is_nested
            else "quantized"
            if tensor.is_quantized
            else "meta"
            if tensor.is_meta
            else tensor.layout
        )
        raise ValueError(f"a {kind} tensor")
    if tensor.is_conj() or tensor.is_neg():
        tensor = tensor.resolve_conj().resolve_neg()
    if tensor.untyped_storage().nbytes() == 0 and tensor.numel():
        raise ValueError("a tensor without memory")
    return tensor


def own(tensors: list[T], *, apart: bool = False, contiguous: bool = True) -> list[T]:
    """The tensors, in memory that nothing else refers to: those that are not are copied, in place.

    :param tensors: the only reference to them that the caller has
    :param apart: no two of them may share memory either
    :param contiguous: those that are not contiguous are copied, too
    """
    if _all_alone(tensors):
        return tensors
    copies: dict[int, torch.Tensor] = {}
    for i, held in enumerate(held_elsewhere(tensors, apart=apart)):
        tensor = tensors[i]
        if tensor is not None and (held or (contiguous and not tensor.is_contiguous())):
            if apart or id(tensor) not in copies:
                copies[id(tensor)] = tensor.detach().clone(
                    memory_format=torch.contiguous_format if contiguous else torch.preserve_format
                )
            tensors[i] = copies[id(tensor)]
    return tensors


def _all_alone(tensors: Sequence[torch.Tensor | None]) -> bool:
    """The most common case, told at less cost: each is contiguous, no view, and nobody else's."""
    storages = set()
    count = 0
    for i in range(len(tensors)):
        if tensors[i] is not None:
            references = _references(tensors, i)
            if references[2:] != _ALONE_NO_VIEW[2:]:
                return False
            storages.add(references.storage)
            count += 1
    return len(storages) == count


def held_elsewhere(
    tensors: Sequence[torch.Tensor | None], known: Mapping[int, int] = _NOTHING, *, apart: bool = False
) -> list[bool]:
    """Which of the tensors lie in memory that something else refers to.

    :param tensors: the only reference to them that the caller has
    :param known: how many other tensors may refer to a storage, by its address (``storage_of``)
    :param apart: not even two of them
    """
    found = [None if tensors[i] is None else _references(tensors, i) for i in range(len(tensors))]
    counted = {r.tensor: r for r in found if r is not None}  # each tensor once
    users: dict[int, set[int | None]] = {}  # of a storage: tensors, and those that they are views of
    for r in counted.values():
        users.setdefault(r.storage, set()).update((r.tensor, r.base) if r.base is not None else (r.tensor,))
    times = Counter(r.tensor for r in found if r is not None)
    views = Counter(r.base for r in counted.values())
    sharing = Counter(r.storage for r in counted.values())
    held = {  # storages: whoever has one of the tensors in it has the memory of all
        r.storage
        for r in counted.values()
        if r.by_python - times[r.tensor] > _ALONE.by_python - 1
        or r.by_torch > _ALONE.by_torch
        or r.to_storage - len(users[r.storage]) - known.get(r.storage, 0) > _ALONE.to_storage - 2
        or not r.torchs_own
        or (r.base is not None and r.base_by_python > _ALONE.base_by_python)
        or (r.base is not None and r.base_by_torch - views[r.base] > _ALONE.base_by_torch - 1)
        or (apart and (times[r.tensor] > 1 or sharing[r.storage] > 1))
    }
    return [r is not None and r.storage in held for r in found]


def storage_of(tensor: torch.Tensor) -> int:
    """The address of a tensor's storage: the same for tensors that share memory. (That of the memory itself is no good: to
    ask for it makes a copy of what is lent.)"""
    address: int = tensor.untyped_storage()._cdata
    return address


class _References(NamedTuple):
    """Who refers to a tensor, to its storage, and to the tensor that it is a view of."""

    tensor: int
    storage: int
    contiguous: bool
    base: int | None
    by_python: int
    by_torch: int
    to_storage: int
    torchs_own: bool  # memory
    base_by_python: int
    base_by_torch: int


def _references(tensors: Sequence[torch.Tensor | None], i: int) -> _References:
    tensor = cast(Any, tensors[i])
    base, storage = cast(Any, tensor._base), tensor.untyped_storage()
    return _References(
        id(tensor),
        storage._cdata,
        tensor.is_contiguous(),
        None if base is None else id(base),
        sys.getrefcount(tensor),
        tensor._use_count(),
        torch._C._storage_Use_Count(storage._cdata),
        storage.resizable(),
        0 if base is None else sys.getrefcount(base),
        0 if base is None else base._use_count(),
    )


_ALONE = _references([torch.empty(2)[:1]], 0)  # nobody else refers to this one, nor to what it is a view of
_ALONE_NO_VIEW = _references([torch.empty(1)], 0)
