"""What a module returns, found by running it on zeros. Owns: dry runs that leave no trace, and output shapes found with them.

Small ones only: what a peer says about lengths is never run, since a call of no rows has no bytes, whatever its other axes
say. Must not know: tasks, optimizers, batches.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import optree
import torch
from torch import nn

from moe.errors import SchemaError
from moe.schema import DUMMY_BATCH_SIZE, BatchTensorProto, Entry, ExpertSchema, Nested, TensorProto
from moe.server.module_state import Attributes

_LENGTHS = (8, 5)  # of "any length" axes; two, to see which output axes follow them
_STEP = 3  # between lengths that are tried
_MAX_LENGTHS = 8  # different ones in one call
_SMALL_ROW = 2**14  # values of one row: so much is run at the caller's own lengths, if nothing else helps
_MAX_KNOWN = 256

Run = Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]


@contextlib.contextmanager
def no_trace(module: nn.Module) -> Iterator[None]:
    """Run a module without leaving a trace in it: attributes, buffers and random state as before, no gradients."""
    attributes = Attributes(module)
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    devices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        attributes.restore()  # also buffers that were made or replaced
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def zeros_for(module: nn.Module, schema: ExpertSchema, rows: int, any_length: int) -> list[torch.Tensor]:
    """Flat inputs without the optional ones, where the module is."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return [
        proto.make_zeros(rows, any_length=any_length, device=device)
        if isinstance(proto, BatchTensorProto)
        else proto.make_zeros(any_length=any_length, device=device)
        for _, proto in schema.input_entries(())
    ]


def infer_outputs(name: str, module: nn.Module, schema: ExpertSchema) -> Nested:
    """Find what a module returns from two dry runs of different batch size and different "any" lengths.

    An axis that follows the batch size is the batch axis, one that follows the lengths is any length. Optional kwargs are
    left out.
    """
    shapes: list[list[torch.Tensor]] = []
    structure: Any = None
    for rows, length in zip((DUMMY_BATCH_SIZE, DUMMY_BATCH_SIZE - 1), _LENGTHS):
        args, kwargs = schema.pack_inputs(zeros_for(module, schema, rows, length), ())
        try:
            with no_trace(module):
                outputs = module(*args, **kwargs)
        except Exception as e:
            raise SchemaError(
                f"{name}: the dry run that finds outputs_schema failed with {type(e).__name__}: {e}. Check args_schema "
                f"and kwargs_schema, or pass outputs_schema"
            ) from e
        leaves, structure = optree.tree_flatten(outputs)
        if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise SchemaError(f"{name}: the module must return tensors, got {type(outputs).__name__}")
        shapes.append(leaves)
    protos: list[TensorProto] = []
    has_rows = any(entry.proto.batched for entry in schema.input_entries(()))
    if len(shapes[0]) != len(shapes[1]):
        raise SchemaError(f"{name}: {len(shapes[0])} outputs for 3 rows and {len(shapes[1])} for 2")
    for first, second in zip(*shapes):
        if first.ndim != second.ndim:
            raise SchemaError(f"{name}: an output has {first.ndim} axes for 3 rows and {second.ndim} for 2")
        batched = (
            has_rows
            and first.ndim > 0
            and (first.shape[0], second.shape[0]) == (DUMMY_BATCH_SIZE, DUMMY_BATCH_SIZE - 1)
        )
        kind = BatchTensorProto if batched else TensorProto
        pairs = zip(first.shape[batched:], second.shape[batched:])
        protos.append(kind(*(a if a == b else None for a, b in pairs), dtype=first.dtype))
    return optree.tree_unflatten(structure, cast(Any, protos))


class EmptyOutputs:
    """Answers to calls of no rows, of the shape that they would have with rows.

    Where the schema leaves a length open, the module is run at a few small lengths: an output's length is taken to be a sum of
    multiples of the inputs' lengths.

    :param outputs: the flat schema of what the module returns
    """

    def __init__(self, outputs: Sequence[Entry]):
        self._outputs = outputs
        self._known: dict[Any, list[list[_Length]] | None] = {}

    def __repr__(self) -> str:
        return f"EmptyOutputs({len(self._outputs)} outputs)"

    def answer(
        self, key: Any, entries: Sequence[Entry], inputs: Sequence[torch.Tensor], run: Run
    ) -> list[torch.Tensor]:
        """The outputs.

        :param key: the same for inputs of the same entries
        :param run: the module, on some rows; leaves no trace
        :raises SchemaError: their shape cannot be told
        """
        call = _Lengths(entries, inputs)
        if all(entry.proto.batched for entry in self._outputs):
            if not any(None in entry.proto.sizes for entry in self._outputs):
                return self._empty([[cast(int, size) for size in entry.proto.sizes] for entry in self._outputs])
            shapes = self._shapes((key, call.pattern), call, run)
            if shapes is not None:
                return self._empty(shapes)
        if call.values_per_row > _SMALL_ROW:
            raise SchemaError("what it returns for no rows of this length cannot be told; send at least one row")
        outputs = run(call.zeros(call.lengths, given=inputs))
        return [t[:0].cpu() if e.proto.batched else t.cpu() for e, t in zip(self._outputs, outputs)]

    def _empty(self, shapes: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        return [torch.empty((0, *shape), dtype=entry.proto.dtype) for entry, shape in zip(self._outputs, shapes)]

    def _shapes(self, key: Any, call: _Lengths, run: Run) -> list[list[int]] | None:
        if len(call.lengths) > _MAX_LENGTHS:
            return None
        if key not in self._known:
            if len(self._known) >= _MAX_KNOWN:  # a peer may try all patterns
                self._known.clear()
            try:
                self._known[key] = self._measure(call, run)
            except Exception:  # a module that does not take these lengths
                self._known[key] = None
        known = self._known[key]
        if known is None:
            return None
        shapes = [[length.at(call.lengths) for length in output] for output in known]
        return None if any(size < 0 for shape in shapes for size in shape) else shapes

    def _measure(self, call: _Lengths, run: Run) -> list[list[_Length]] | None:
        """How the lengths of outputs follow from those of inputs; None if not in this simple way."""
        base = [length if length <= 1 else _LENGTHS[0] + i for i, length in enumerate(call.lengths)]  # 1 is broadcast
        moves = [i for i, length in enumerate(call.lengths) if length > 1]
        tried = [base] + [[b + _STEP * (i == j) for j, b in enumerate(base)] for i in moves]
        check = [b + _STEP + 1 if i in moves else b for i, b in enumerate(base)]
        shapes = [[t.shape[1:] for t in run(call.zeros(lengths))] for lengths in (*tried, check)]
        result = []
        for output in range(len(self._outputs)):
            axes = []
            for axis in range(len(self._outputs[output].proto.sizes)):
                start, *moved, checked = (shape[output][axis] for shape in shapes)
                slopes = {i: (there - start) // _STEP for i, there in zip(moves, moved)}
                length = _Length(start, tuple(base), tuple(slopes.get(i, 0) for i in range(len(base))))
                if length.at(check) != checked or any(length.at(at) != m for at, m in zip(tried[1:], moved)):
                    return None
                axes.append(length)
            result.append(axes)
        return result


class _Length:
    """A length that is a sum of multiples of others."""

    def __init__(self, start: int, base: tuple[int, ...], slopes: tuple[int, ...]):
        self._start, self._base, self._slopes = start, base, slopes

    def at(self, lengths: Sequence[int]) -> int:
        return self._start + sum(s * (at - b) for s, at, b in zip(self._slopes, lengths, self._base))


class _Lengths:
    """The lengths that a call's inputs have where the schema leaves them open.

    :ivar lengths: different ones
    :ivar pattern: which of them are equal, and which are 0 or 1
    :ivar values_per_row: values in one row of all inputs together
    """

    def __init__(self, entries: Sequence[Entry], inputs: Sequence[torch.Tensor]):
        self._entries = entries
        self._device = inputs[0].device if inputs else torch.device("cpu")
        found = [tuple(t.shape[entry.proto.batched :]) for entry, t in zip(entries, inputs)]
        opened = [
            size for entry, shape in zip(entries, found) for own, size in zip(entry.proto.sizes, shape) if own is None
        ]
        self.lengths = list(dict.fromkeys(opened))
        self._at = [self.lengths.index(size) for size in opened]
        self.pattern = tuple(self._at), tuple(min(length, 2) for length in self.lengths)
        self.values_per_row = sum(torch.Size(shape).numel() for shape in found)

    def zeros(self, lengths: Sequence[int], given: Sequence[torch.Tensor] | None = None) -> list[torch.Tensor]:
        """Inputs of some rows, with other lengths.

        :param given: the global ones are taken from here
        """
        positions = iter(self._at)
        made = []
        for i, (_, proto) in enumerate(self._entries):
            sizes = [lengths[next(positions)] if size is None else size for size in proto.sizes]
            if proto.batched:
                made.append(torch.zeros([DUMMY_BATCH_SIZE, *sizes], dtype=proto.dtype, device=self._device))
            else:
                made.append(
                    given[i] if given is not None else torch.zeros(sizes, dtype=proto.dtype, device=self._device)
                )
        return made
