"""Tensors to and from the device. Owns: pinned memory, the copy stream, and that nobody reads what is still being copied.

On CUDA a batch is copied from pinned memory on a stream of its own, while the batch before it is computed; results go back into
pinned memory, all of a batch before one synchronization. Elsewhere ``Tensor.to`` does it. Must not know: tasks, batches.

After NVIDIA's "How to Overlap Data Transfers in CUDA C/C++" and torch's notes on CUDA semantics.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch


class Loader:
    """Copies to one device ahead of the computation.

    :param cuda: torch.cuda, or something like it
    """

    def __init__(self, device: torch.device, cuda: Any = torch.cuda):
        self._device, self._cuda = device, cuda
        self._stream = cuda.Stream(device) if device.type == "cuda" else None

    def load(self, calls: Sequence[Sequence[torch.Tensor]]) -> Loaded:
        """Begin to copy the tensors of some calls.

        :raises torch.OutOfMemoryError: no room on the device
        """
        if self._stream is None:
            return Loaded([[tensor.to(self._device) for tensor in call] for call in calls])
        with self._cuda.stream(self._stream):
            tensors = [[self._begin_copy(tensor) for tensor in call] for call in calls]
            copied = self._stream.record_event()
        return Loaded(tensors, copied, lambda: self._cuda.current_stream(self._device))

    def _begin_copy(self, tensor: torch.Tensor) -> torch.Tensor:
        staged = _pinned(tensor) if tensor.device.type == "cpu" else tensor
        return staged.to(self._device, non_blocking=True)


class Loaded:
    """Tensors that are on the device, or on their way.

    :param copied: event after which they are there; None: they are
    :param current_stream: of the computing thread
    """

    def __init__(
        self, tensors: list[list[torch.Tensor]], copied: Any = None, current_stream: Callable[[], Any] | None = None
    ):
        self._tensors, self._copied, self._current_stream = tensors, copied, current_stream

    def take(self) -> list[list[torch.Tensor]]:
        """The tensors, for the stream that is current here: what it is given from now on begins after the copy."""
        if self._current_stream is not None:
            computing = self._current_stream()
            computing.wait_event(self._copied)
            for tensor in itertools.chain.from_iterable(self._tensors):
                tensor.record_stream(computing)  # else its memory is free for the next copy before it has been read
        return self._tensors


def to_cpu(results: Sequence[Sequence[torch.Tensor | None]], cuda: Any = torch.cuda) -> list[list[torch.Tensor | None]]:
    """Results on the CPU, complete."""
    computed_on = next(
        (t.device for result in results for t in result if t is not None and t.device.type == "cuda"), None
    )
    if computed_on is None:
        return [[None if tensor is None else tensor.cpu() for tensor in result] for result in results]
    copies = [[None if tensor is None else _pinned(tensor) for tensor in result] for result in results]
    cuda.current_stream(computed_on).synchronize()
    return copies


def _pinned(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in memory that the device reads and writes by itself, from the device on the current stream; where there is no
    more of it, in ordinary memory. torch keeps such memory until the stream is done with it, then uses it again."""
    try:
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    except RuntimeError as e:
        if "out of memory" not in str(e):
            raise
        copy = torch.empty(tensor.shape, dtype=tensor.dtype)
    return copy.copy_(tensor, non_blocking=True)
