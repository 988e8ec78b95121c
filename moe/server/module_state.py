"""What a module holds besides its code. Owns: to tell whether it has changed, and to put it back as it was.

That is parameters, buffers, and whatever lies in its attributes: tensors, numbers, dicts and lists of such, plain objects.
What code holds elsewhere (globals, closures) is not found. Tensors are recognized by identity and contents: versions alone
do not tell what fused optimizers, ``.data`` and NumPy write. Must not know: tasks, optimizers, why somebody asks.
"""

from __future__ import annotations

import hashlib
import operator
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

MAX_PLACES = 2**14  # of which a module's state may consist; ours, bounds what it costs to look at
_MAX_DEPTH = 4  # of containers in attributes
_MAX_ITEMS = 2**12  # of one container
_SMALL_BYTES = 2**14  # tensors up to this are digested together
# Sums over 64-bit words at distances of these: different positions of a chunk agree in two of them only if they are 4 million
# words apart, so no swap, permutation or change that cancels out over a matrix leaves all of the sums as they were.
_DISTANCES = (2029, 2039, 2053)
_CHUNK = 2**19  # words, 4 MiB: read from memory once, then from the cache
_EVERY_MODULE_HAS = frozenset(vars(nn.Module()))
_OF_MODULES = _EVERY_MODULE_HAS - {"_parameters", "_buffers"}  # hooks and parts, which modules do not change
_SCALARS_ONLY = frozenset((int, float, str, bool, type(None)))
_SIMPLE = frozenset((int, float, str, bool, type(None), tuple, torch.Tensor, nn.Parameter))
Place = tuple[Any, Any]  # a container, and the key in it
_SCALARS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device, torch.Size)


class Attributes:
    """The attributes of a module and its parts, down to nested dicts, lists and sets, as they are now. Tensors are not copied.

    :raises ValueError: there is too much of it
    """

    def __init__(self, module: nn.Module):
        self._copies: list[tuple[Any, Any]] = []  # containers, with shallow copies
        seen: set[int] = set()
        for part in module.modules():
            self._copy(vars(part), 0, seen)

    def _copy(self, container: Any, depth: int, seen: set[int]) -> None:
        if len(container) > _MAX_ITEMS or id(container) in seen:  # a vocabulary, say
            return
        seen.add(id(container))
        copy = _shallow(container)
        self._copies.append((container, copy))
        if len(self._copies) > MAX_PLACES:
            raise ValueError("too many containers in a module's attributes")
        if depth == _MAX_DEPTH or isinstance(container, set):
            return
        values: Any
        if depth == 0:
            values = [value for name, value in copy.items() if name not in _OF_MODULES]
        else:
            values = copy.values() if isinstance(copy, dict) else copy
        for value in values:
            kind = type(value)
            if kind in _SIMPLE:
                continue
            if isinstance(value, (dict, list, set)):
                self._copy(value, depth + 1, seen)
            elif (inside := _plain_object(value)) is not None:
                self._copy(inside, depth + 1, seen)

    def restore(self) -> None:
        """Put everything back in its place, except whole numbers and lists without tensors: they count or note what happens.
        What tensors contain is not touched."""
        for container, copy in self._copies:
            if _same(container, copy):
                continue
            if isinstance(container, list):
                if any(map(_holds_tensor, (*container, *copy))):
                    container[:] = copy
            elif isinstance(container, dict):
                for key in [key for key in container if key not in copy]:
                    del container[key]
                for key, value in copy.items():
                    now = container.get(key)
                    if now is not value and not (type(now) is int and type(value) is int):
                        container[key] = value

    def forget(self, places: Iterable[Place]) -> None:
        """Put back only what has come to these places since; what was not there is taken away."""
        kept = {id(container): copy for container, copy in self._copies}
        for container, key in places:
            copy = kept.get(id(container))
            if isinstance(container, dict):
                if copy is not None and key in copy:
                    container[key] = copy[key]
                else:
                    container.pop(key, None)
            elif isinstance(container, list):
                container[:] = copy if copy is not None else []
            else:
                container.clear()


def places_of(module: nn.Module, wanted: Callable[[torch.Tensor], bool]) -> list[Place]:
    """Where in a module's attributes such tensors are."""
    places: list[Place] = []
    seen: set[int] = set()
    parts = [module]
    while parts:
        part = parts.pop()
        attributes = vars(part)
        parts += [child for child in part._modules.values() if child is not None]
        for name in attributes.keys() - _EVERY_MODULE_HAS:
            _find(attributes[name], (attributes, name), wanted, places, seen, 1)
        if part._buffers:
            _find(part._buffers, (attributes, "_buffers"), wanted, places, seen, 1)
    return places


def has_graph(tensor: torch.Tensor) -> bool:
    """Is it a result that autograd could go back from? Not if it is an input, as it was lent."""
    node = tensor.grad_fn
    return node is not None and node.name() not in ("LazyCloneBackward0", "CloneBackward0")


def _find(
    value: Any, place: Place, wanted: Callable[[torch.Tensor], bool], places: list[Place], seen: set[int], depth: int
) -> None:
    if type(value) in _SCALARS_ONLY:
        return
    if isinstance(value, torch.Tensor):
        if wanted(value):
            places.append(place)
        return
    inside = value if isinstance(value, (dict, list, tuple, set)) else _plain_object(value)
    if inside is None or depth > _MAX_DEPTH or len(inside) > _MAX_ITEMS or id(inside) in seen:
        return
    seen.add(id(inside))
    for key, item in inside.items() if isinstance(inside, dict) else enumerate(inside):
        # Whoever has a tuple has to give it up.
        _find(item, place if isinstance(inside, tuple) else (inside, key), wanted, places, seen, depth + 1)


class Mark:
    """What a module holds, to compare.

    :raises ValueError: there is too much of it
    :raises RuntimeError: it holds tensors without ordinary memory (sparse ones, say)
    """

    def __init__(self, module: nn.Module):
        self._scalars: dict[Any, Any] = {}
        self._objects: dict[Any, Any] = {}  # held, so that no other object gets their address
        tensors: dict[int, torch.Tensor] = {}
        self._seen: set[int] = set()
        for name, part in module.named_modules():
            self._look(vars(part), (name,), tensors)
        for tensor in (*module.parameters(), *module.buffers()):  # those of scripted modules are no attributes
            tensors[id(tensor)] = tensor
        self._contents = [(key, t.data_ptr(), t._version, tuple(t.shape), t.stride()) for key, t in tensors.items()]
        self._sums = contents(tensors.values())

    def _look(self, value: Any, place: tuple[Any, ...], tensors: dict[int, torch.Tensor]) -> None:
        if isinstance(value, torch.Tensor):
            tensors[id(value)] = value
            self._scalars[place] = ("tensor", id(value))
        elif isinstance(value, _SCALARS):
            self._scalars[place] = (type(value), value)
        elif isinstance(value, torch.Generator):
            self._scalars[place] = ("generator", bytes(value.get_state().numpy()))
        elif isinstance(value, np.ndarray):
            self._scalars[place] = ("array", value.dtype, value.shape, value.tobytes())
        elif isinstance(value, (set, frozenset)):
            self._scalars[place] = ("set", frozenset(map(_name, value)))
        else:
            self._objects[place] = value
            inside = value if isinstance(value, (dict, list, tuple)) else _plain_object(value)
            if inside is None or id(value) in self._seen or len(place) > _MAX_DEPTH + 1:
                return
            self._seen.add(id(value))
            for key, item in inside.items() if isinstance(inside, dict) else enumerate(inside):
                self._look(item, (*place, _name(key)), tensors)
        if len(self._scalars) + len(self._objects) > MAX_PLACES:
            raise ValueError("too many values in a module's attributes")

    def same_as(self, other: Mark, counters: Iterable[Any] = ()) -> bool:
        """Does the module hold the same?

        :param counters: places of numbers that may differ
        """
        return (
            self._contents == other._contents
            and self._objects.keys() == other._objects.keys()
            and all(value is other._objects[place] for place, value in self._objects.items())
            and self._changed(other) <= set(counters)
            and self._sums == other._sums
        )

    def counters(self, later: Mark) -> list[Any]:
        """Places of whole numbers that have changed: they count something."""
        return [p for p in self._changed(later) if self._is_count(p) and later._is_count(p)]

    def _is_count(self, place: Any) -> bool:
        return self._scalars.get(place, (None,))[0] is int

    def _changed(self, other: Mark) -> set[Any]:
        places = self._scalars.keys() | other._scalars.keys()
        return {p for p in places if self._scalars.get(p) != other._scalars.get(p)}


class RandomState:
    """The state of all global random number generators, as it is now."""

    def __init__(self) -> None:
        cuda: Any = torch.cuda
        self._torch = torch.random.get_rng_state()
        self._cuda: list[torch.Tensor] = cuda.get_rng_state_all() if cuda.is_initialized() else []
        self._python = random.getstate()
        self._numpy: Any = np.random.get_state(legacy=True)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, RandomState)
            and torch.equal(self._torch, other._torch)
            and all(map(torch.equal, self._cuda, other._cuda))
            and self._python == other._python
            and bytes(self._numpy[1]) == bytes(other._numpy[1])
            and self._numpy[2:] == other._numpy[2:]
        )

    __hash__ = None  # type: ignore[assignment]

    def restore(self) -> None:
        """Draw the same numbers again."""
        torch.random.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)
        random.setstate(self._python)
        np.random.set_state(self._numpy)


def contents(tensors: Iterable[torch.Tensor]) -> bytes:
    """The same for tensors with the same bytes only, on any device: for others with a probability that nobody need mind, and
    never if one or two words differ, or four at the corners of a rectangle. A fifth of the time that a hash function takes."""
    sums: list[torch.Tensor] = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
        whole = len(flat) // 8 * 8 if len(flat) > _SMALL_BYTES and flat.data_ptr() % 8 == 0 else 0
        sums.append(flat[whole:])
        for words in torch.split(flat[:whole].view(torch.int64), _CHUNK) if whole else ():
            for distance in _DISTANCES:
                even = len(words) // distance * distance
                sums += [words[:even].view(-1, distance).sum(0).view(torch.uint8)] if even else []
                sums.append(words[even:].view(torch.uint8))
    state = hashlib.blake2b()
    for device in dict.fromkeys(part.device for part in sums):
        state.update(torch.cat([part for part in sums if part.device == device]).cpu().numpy().data)
    return state.digest()


# --- helpers -----------------------------------------------------------------------------------------------------------------


def _plain_object(value: Any) -> dict[str, Any] | None:
    """The attributes of a plain object (a config, say)."""
    if isinstance(value, (nn.Module, torch.Tensor, type)) or callable(value):
        return None
    if type(value).__module__.partition(".")[0] in ("builtins", "torch", "threading", "logging", "_thread"):
        return None
    inside = getattr(value, "__dict__", None)
    return inside if isinstance(inside, dict) else None


def _shallow(container: Any) -> Any:
    return (
        dict(container)
        if isinstance(container, dict)
        else set(container)
        if isinstance(container, set)
        else list(container)
    )


def _same(container: Any, copy: Any) -> bool:
    """Are the very same objects in them?"""
    if len(container) != len(copy):
        return False
    if isinstance(container, dict):
        return all(map(operator.is_, container.values(), copy.values())) and all(map(operator.eq, container, copy))
    if isinstance(container, set):
        return bool(container == copy)
    return all(map(operator.is_, container, copy))


def _holds_tensor(value: Any) -> bool:
    return next(_tensors_in(value), None) is not None


def _tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
        return
    inside = value if isinstance(value, (dict, list, tuple, set)) else _plain_object(value)
    if inside is not None and depth < _MAX_DEPTH and len(inside) <= _MAX_ITEMS:
        for item in inside.values() if isinstance(inside, dict) else inside:
            yield from _tensors_in(item, depth + 1)


def _name(key: Any) -> Any:
    """What tells a key, or an item of a set, from others."""
    return (type(key), key) if isinstance(key, _SCALARS) else id(key)
