"""Forwards whose activations are kept for the backward that follows, which then need not compute them again. Owns: the graph of
such a forward, whether a backward may use it, and whether keeping pays.

Must not know: who called, requests, optimizers, where it is held in between (``HeldTensors``). A forward is used at most once,
for a backward of the very same inputs, and only if to compute it again would give the same, bit by bit: neither the module's
parameters nor anything else it holds has changed since, and the forward itself has changed nothing and drawn no random numbers.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import nn

from moe.server.module_state import Attributes, Mark, RandomState, has_graph, places_of
from moe.server.ownership import lend, storage_of

_MAX_IN_VAIN = 16  # forwards kept since one was of use, before keeping becomes rare; ours
_PROBE_EVERY = 16  # one forward of so many is kept then, to see whether it has become of use
_MAX_STATE_PER_INPUT = (
    64  # bytes of a module's state that are looked at for a byte of input: more costs more than it saves
)
_SMALL_STATE_BYTES = 2**22  # this much is always looked at
_FAST_PATHS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


class NotKept(Exception):
    """A forward that cannot be kept.

    :ivar outputs: which are good all the same; None: compute them again
    """

    def __init__(self, why: str, outputs: list[torch.Tensor] | None = None):
        super().__init__(why)
        self.outputs = outputs


class KeptForward:
    """A module's outputs with their graph.

    :ivar leaves: the flat inputs; floating-point ones require a gradient
    :ivar outputs: flat, with their graph
    :ivar saved: how many tensors the graph has saved in each storage
    :ivar size_bytes: of inputs, outputs and what the graph has saved, without what is the module's
    """

    def __init__(
        self,
        call: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        module: nn.Module,
        generation: Callable[[], int] = lambda: 0,
    ):
        """Compute a forward.

        :param call: the module, flat inputs to flat outputs
        :param generation: another number after each change to the module that its owner knows of
        :raises NotKept: it would not be the same if it was computed again, or one could not tell
        :raises Exception: what the module raises
        """
        check_worth_looking(module, inputs)
        self._generation, self._generation_then = generation, generation()
        self._module, self._saved = module, list[tuple[torch.Tensor, int]]()
        self._inputs = [(t, t._version) for t in inputs]
        attributes = _or_not_kept(lambda: Attributes(module))
        before, randomness = _or_not_kept(lambda: Mark(module)), RandomState()
        self.leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        try:
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(_pack_into(self._saved), _unpack):
                self.outputs = call([lend(leaf) for leaf in self.leaves])
            if places_of(module, has_graph):
                raise NotKept("the module keeps tensors of a graph")
        except BaseException:  # it will be computed in another way, as if this had not been
            attributes.restore()
            randomness.restore()
            raise
        self._mark = _or_not_kept(lambda: Mark(module), self.outputs)
        self._counters = before.counters(self._mark)
        if not before.same_as(self._mark, self._counters) or RandomState() != randomness:
            raise NotKept("the forward has changed the module, or drawn random numbers", self.outputs)
        nodes = list(_nodes(self.outputs))
        if any(map(_hides_something, nodes)) or sum(map(_count_unknown, nodes)) > 0:
            raise NotKept("the graph has saved what cannot be looked at", self.outputs)
        self.saved = Counter(storage_of(saved) for saved, _ in self._saved)
        everything = [*inputs, *self.outputs, *(saved for saved, _ in self._saved)]
        sizes = {storage_of(tensor): tensor.untyped_storage().nbytes() for tensor in everything}
        of_module = {storage_of(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self.size_bytes = sum(size for storage, size in sizes.items() if storage not in of_module)

    def __repr__(self) -> str:
        return f"KeptForward({len(self.leaves)} inputs, {self.size_bytes} bytes)"

    @property
    def unchanged(self) -> bool:
        """False if it is known to be of no use any more. Takes no time; any thread."""
        return self._generation() == self._generation_then and all(
            tensor._version == version for tensors in (self._saved, self._inputs) for tensor, version in tensors
        )

    def is_of(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Would these inputs give the same now, bit by bit? Looks at all that the module holds, since not everybody who
        changes a parameter tells (fused optimizers, ``.data``)."""
        try:
            return (
                self.unchanged
                and len(inputs) == len(self._inputs)
                and all(_equal(mine, given) for (mine, _), given in zip(self._inputs, inputs))
                and self._mark.same_as(Mark(self._module), self._counters)
            )
        except (ValueError, RuntimeError):  # it holds something by now that cannot be looked at
            return False


def check_worth_looking(module: nn.Module, inputs: Sequence[torch.Tensor]) -> None:
    """Refuse modules of which one cannot tell, or not in less time than keeping saves.

    :raises NotKept: it is one
    """
    if any(t.is_inference() for t in inputs):
        raise NotKept("autograd does not take inference tensors")
    size = sum(t.nbytes for tensors in (module.parameters(), module.buffers()) for t in tensors)
    if size > max(_SMALL_STATE_BYTES, _MAX_STATE_PER_INPUT * sum(t.nbytes for t in inputs)):
        raise NotKept("the module is large, and the inputs are small")
    if any(isinstance(part, _FAST_PATHS) and not part.training for part in module.modules()):
        raise NotKept("without gradients, torch would compute it in another way")


def _or_not_kept(look: Callable[[], Any], outputs: list[torch.Tensor] | None = None) -> Any:
    try:
        return look()
    except (ValueError, RuntimeError) as e:
        raise NotKept(str(e), outputs) from e


def _equal(mine: torch.Tensor, given: torch.Tensor) -> bool:
    if mine is given:
        return True
    return mine.shape == given.shape and mine.dtype == given.dtype and torch.equal(mine.to(given.device), given)


def _pack_into(saved: list[tuple[torch.Tensor, int]]) -> Callable[[torch.Tensor], torch.Tensor]:
    """A hook that notes what autograd saves, which does not look for writes to what hooks have packed: so we do.

    The graph holds the hook, and neither Python nor torch finds cycles through it. So the hook must not lead to the graph: it
    is no method of who holds the outputs, and what it notes is detached, as an output would hold its own graph.
    """

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        packed = tensor.detach()
        saved.append((packed, packed._version))
        return packed

    return pack


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return packed


def _nodes(outputs: Sequence[Any]) -> Iterator[Any]:
    """All nodes of the graph of some tensors."""
    waiting = [output.grad_fn for output in outputs if isinstance(output, torch.Tensor)]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        waiting += [following for following, _ in node.next_functions]


def _hides_something(node: Any) -> bool:
    """Has a custom function put more into its context than ``save_for_backward`` and a few numbers? Autograd tells nobody who
    writes to that."""
    return any(not _is_plain(value) for value in getattr(node, "__dict__", {}).values())


def _count_unknown(node: Any) -> int:
    """Tensors that others' hooks have packed in it, those of torch.utils.checkpoint, say: nobody knows their size."""
    saved = itertools.chain.from_iterable(
        one if isinstance(one, (tuple, list)) else (one,)
        for one in (getattr(node, name) for name in _names_of_saved(cast(Hashable, type(node))))
    )
    return sum(getattr(one, "unpack_hook", None) not in (None, _unpack) for one in saved)


@functools.lru_cache(1024)
def _names_of_saved(node_type: Hashable) -> list[str]:
    return [name for name in dir(node_type) if name.startswith("_raw_saved_")]


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(map(_is_plain, value))
    plain = (int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
    return isinstance(value, plain) and not (isinstance(value, float) and math.isnan(value))


class Thrift:
    """Whether keeping forwards pays. Where several callers train one expert, each one's step spoils the others' forwards."""

    def __init__(self) -> None:
        self._in_vain = 0

    def keeps(self) -> bool:
        """Shall the next forward be kept? Counts as asked."""
        self._in_vain += 1
        return self._in_vain <= _MAX_IN_VAIN or self._in_vain % _PROBE_EVERY == 0

    def used(self) -> None:
        """A forward that was kept has been of use."""
        self._in_vain = 0
