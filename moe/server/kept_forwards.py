"""Forwards whose activations are kept for the backward that follows, which then need not compute them again. Owns: the graph of
such a forward, whether a backward may use it, and whether keeping pays.

Must not know: who called, requests, optimizers, where it is held in between (``HeldTensors``). A forward is used at most once,
for a backward of the very same inputs, and only if nothing that its graph has saved was written to since: a step of the
optimizer, for another caller or an earlier backward, makes it worthless, and the backward computes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

_MAX_IN_VAIN = 16  # forwards kept since one was of use, before keeping becomes rare; ours
_PROBE_EVERY = 16  # one forward of so many is kept then, to see whether it has become of use


class KeptForward:
    """A module's outputs with their graph.

    :ivar leaves: the flat inputs; floating-point ones require a gradient
    :ivar outputs: flat, with their graph
    :ivar size_bytes: of what the graph has saved, without parameters
    """

    def __init__(
        self,
        call: Callable[[list[torch.Tensor]], list[torch.Tensor]],
        inputs: Sequence[torch.Tensor],
        parameters: Iterable[torch.Tensor],
    ):
        """Compute a forward.

        :param call: the module, flat inputs to flat outputs
        :raises Exception: what the module raises; also when it writes to its inputs, which autograd does not allow
        """
        self._saved: list[tuple[torch.Tensor, int]] = []
        self.leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in inputs]
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            self.outputs = call(self.leaves)
        others = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        storages = {saved.untyped_storage().data_ptr(): saved.untyped_storage().nbytes() for saved, _ in self._saved}
        self.size_bytes = sum(size for at, size in storages.items() if at not in others)

    def __repr__(self) -> str:
        return f"KeptForward({len(self.leaves)} inputs, {self.size_bytes} bytes saved)"

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        """Autograd does not look for writes to what hooks have packed, so we do. Detached: an output would hold its own
        graph, and neither would ever be freed."""
        packed = tensor.detach()
        self._saved.append((packed, packed._version))
        return packed

    @property
    def unchanged(self) -> bool:
        """False if somebody has written to what was saved, parameters included. (Writes that torch does not count, through
        ``.data`` or NumPy, are not noticed.)"""
        return all(saved._version == version for saved, version in self._saved)

    def is_of(self, inputs: Sequence[torch.Tensor]) -> bool:
        """Was it computed from these inputs?"""
        return len(inputs) == len(self.leaves) and all(
            leaf.data_ptr() == given.data_ptr() or torch.equal(leaf.to(given.device), given)
            if leaf.shape == given.shape and leaf.dtype == given.dtype
            else False
            for leaf, given in zip(self.leaves, inputs)
        )


def _unpack(packed: torch.Tensor) -> torch.Tensor:
    return packed


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
