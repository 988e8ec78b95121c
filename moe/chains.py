"""Chains: blocks that are run one after another for one request. Owns: which of the request's tensors each block takes.

Both sides use it, the client to know what it sends, the server what has arrived. Pure functions over schemas and flat lists;
must not know: how a request travels, where a block is, or what it computes.

A request's tensors are the args of the first block, then the tensors of all kwargs, **each once**, however many blocks take
it (a shared LoRA matrix has one position, to which every block refers), and for backward the gradients of the last block's
floating-point outputs. What a block returns are the args of the next. A call of a single expert is a chain of one.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from moe.errors import SchemaError
from moe.schema import MAX_TENSORS, Entry, ExpertSchema, cast_inputs, gradient_entries


class Block(NamedTuple):
    """One block of a chain.

    :ivar present: names of the optional kwargs it is given
    :ivar kwargs: positions, among the request's tensors, of the leaves of its kwargs, in its schema's order
    """

    uid: str
    schema: ExpertSchema
    present: tuple[str, ...]
    kwargs: tuple[int, ...]

    @property
    def entries(self) -> tuple[Entry, ...]:
        """Its inputs, flat."""
        return self.schema.input_entries(self.present)


class Chain:
    """Blocks, and which tensor goes where.

    :param blocks: in order, at least one
    :raises SchemaError: a block does not take what the one before it returns, or positions that make no sense
    """

    def __init__(self, blocks: Sequence[Block]):
        self.blocks = tuple(blocks)
        self.args = len(blocks[0].schema.arg_entries)
        for previous, following in zip(self.blocks, self.blocks[1:]):
            _check_joint(previous, following)
        users: dict[int, list[Entry]] = {i: [entry] for i, entry in enumerate(blocks[0].schema.arg_entries)}
        for block in self.blocks:
            entries = block.entries[len(block.schema.arg_entries) :]
            if len(block.kwargs) != len(entries):
                raise SchemaError(
                    f"{block.uid}: expected {len(entries)} tensors of kwargs, got positions of {len(block.kwargs)}"
                )
            for position, entry in zip(block.kwargs, entries):
                if position < self.args:
                    raise SchemaError(f"{block.uid}: {entry.path}: position {position} is an arg's")
                if len(self.blocks) > 1:
                    entry = Entry(f"{block.uid}: {entry.path}", entry.proto)
                users.setdefault(position, []).append(entry)
        if len(users) > MAX_TENSORS:
            raise SchemaError(f"{len(users)} tensors in one request; at most {MAX_TENSORS} are taken")
        if max(users, default=-1) >= len(users):
            raise SchemaError(f"a tensor at position {max(users)}, but only {len(users)} tensors are used")
        self.users: tuple[tuple[Entry, ...], ...] = tuple(tuple(users[i]) for i in range(len(users)))
        for first, *others in self.users:
            for other in others:
                if other.proto.batched != first.proto.batched:
                    raise SchemaError(f"{first.path} and {other.path} are one tensor, batched for one of them only")

    def __repr__(self) -> str:
        return f"Chain({' '.join(block.uid for block in self.blocks)}, {len(self.users)} tensors)"

    def __len__(self) -> int:
        return len(self.blocks)

    @classmethod
    def single(cls, uid: str, schema: ExpertSchema, present: Sequence[str] = ()) -> Chain:
        """A call of one expert: its tensors are its inputs, in its schema's order."""
        present = tuple(sorted(present))
        kwargs = range(len(schema.arg_entries), len(schema.input_entries(present)))
        return cls([Block(uid, schema, present, tuple(kwargs))])

    @functools.cached_property
    def entries(self) -> tuple[Entry, ...]:
        """The request's tensors without gradients, flat; where several blocks take one, as the first of them does."""
        return tuple(users[0] for users in self.users)

    @functools.cached_property
    def floating(self) -> tuple[bool, ...]:
        """Which of ``entries`` can have a gradient."""
        return tuple(entry.proto.is_floating_point for entry in self.entries)

    @property
    def output_entries(self) -> tuple[Entry, ...]:
        """What the last block returns."""
        return self.blocks[-1].schema.output_entries

    @functools.cached_property
    def gradient_entries(self) -> tuple[Entry, ...]:
        """What a backward request has after ``entries``."""
        return gradient_entries(self.output_entries)

    @functools.cached_property
    def returned_bytes(self) -> tuple[tuple[int, int], ...]:
        """What each block returns: bytes for each row, and bytes besides. Without what is of any length."""
        return tuple(_returned_bytes(block.schema.output_entries) for block in self.blocks)

    @functools.cached_property
    def mergeable(self) -> bool:
        """Can a call be split by rows? See ``ExpertSchema.mergeable``."""
        has_rows = any(users[0].proto.batched for users in self.users)
        return has_rows and all(e.proto.batched for block in self.blocks for e in block.schema.output_entries)

    def inputs_of(
        self, index: int, args: Sequence[torch.Tensor], tensors: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Flat inputs of one block.

        :param args: what the block before it returned, flat; of the first block, its args
        :param tensors: those of the request
        """
        block = self.blocks[index]
        return [*cast_inputs(block.schema.arg_entries, args), *(tensors[position] for position in block.kwargs)]

    def first_needed(self, wants: Sequence[bool], trainable: Sequence[bool]) -> int:
        """The first block that a backward has to reach: all before it have nothing to train and no gradient to give.

        :param wants: which of ``entries`` want a gradient
        :param trainable: which blocks have an optimizer
        :returns: its index; the number of blocks if there is none
        """
        if any(wants[: self.args]):
            return 0
        for index, (block, trains) in enumerate(zip(self.blocks, trainable)):
            if trains or any(wants[position] for position in block.kwargs):
                return index
        return len(self.blocks)

    def wants_of(self, index: int, wants: Sequence[bool], first_needed: int) -> tuple[bool, ...]:
        """Which inputs of one block want a gradient; ``first_needed``: where the backward will end."""
        block = self.blocks[index]
        if index > first_needed:
            args = tuple(entry.proto.is_floating_point for entry in block.schema.arg_entries)
        elif index == 0:
            args = tuple(wants[: self.args])
        else:
            args = (False,) * len(block.schema.arg_entries)
        return args + tuple(wants[position] for position in block.kwargs)

    def part(self, start: int, stop: int) -> tuple[Chain, tuple[int, ...]]:
        """Blocks ``start:stop`` as a chain of their own, and the positions of the kwarg tensors it takes, in its order.

        A single block is called as one expert, which has a place for each of its kwargs: what it takes twice is there twice.
        """
        blocks = self.blocks[start:stop]
        if len(blocks) == 1:
            return Chain.single(blocks[0].uid, blocks[0].schema, blocks[0].present), blocks[0].kwargs
        args = len(blocks[0].schema.arg_entries)
        used = tuple(dict.fromkeys(position for block in blocks for position in block.kwargs))
        moved = {position: args + i for i, position in enumerate(used)}
        return Chain([block._replace(kwargs=tuple(moved[p] for p in block.kwargs)) for block in blocks]), used


def _returned_bytes(entries: Sequence[Entry]) -> tuple[int, int]:
    sizes = [0, 0]
    for _, proto in entries:
        sizes[not proto.batched] += math.prod(size or 0 for size in proto.sizes) * proto.itemsize
    return sizes[0], sizes[1]


def _check_joint(previous: Block, following: Block) -> None:
    """Can one block take what the other returns? Lengths that only a call tells are not looked at."""
    returned, taken = previous.schema.output_entries, following.schema.arg_entries
    fits = len(returned) == len(taken) and all(
        a.proto.batched == b.proto.batched
        and (a.proto.dtype == b.proto.dtype or (a.proto.is_floating_point and b.proto.is_floating_point))
        and len(a.proto.sizes) == len(b.proto.sizes)
        and all(x is None or y is None or x == y for x, y in zip(a.proto.sizes, b.proto.sizes))
        for a, b in zip(returned, taken)
    )
    if not fits:
        raise SchemaError(
            f"{following.uid} takes {following.schema.args}, but {previous.uid} before it returns {previous.schema.outputs}"
        )
