"""The walk over a chain's blocks. Owns: in which order blocks are asked, and whose gradient becomes whose.

Must not know: pools, deadlines, the network. It asks each block through a callback, so that every block's task waits in the
block's own pool, where it forms batches with other callers' tasks.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import torch

from moe.chains import Chain
from moe.errors import Refused
from moe.schema import TensorProto
from moe.transport.base import BACKWARD, FORWARD

Answer = list["torch.Tensor | None"]
Ask = Callable[[int, str, list[torch.Tensor], "tuple[bool, ...] | None"], Awaitable[Answer]]
"""(which block, method, its flat tensors, for backward which inputs want a gradient) -> what its pool gives."""


async def forward_chain(chain: Chain, tensors: Sequence[torch.Tensor], ask: Ask) -> list[torch.Tensor]:
    """What the last block returns, flat.

    :param tensors: the request's
    """
    values = list(tensors[: chain.args])
    for index in range(len(chain)):
        values = all_of(await ask(index, FORWARD, chain.inputs_of(index, values, tensors), None))
    return values


async def backward_chain(
    chain: Chain, tensors: Sequence[torch.Tensor], wants: Sequence[bool], trainable: Sequence[bool], ask: Ask
) -> Answer:
    """Gradients of the request's tensors: forward to learn each block's inputs, then backward from the last to the first.

    The last block is always asked; those before the first one that needs it are not.

    :param tensors: the request's, gradients of the outputs at the end
    :param wants: which tensors want a gradient
    :param trainable: which blocks have an optimizer
    :returns: a gradient for each tensor that wants one, None for the others; summed where several blocks take one tensor
    """
    inputs = []
    values = list(tensors[: chain.args])
    for index in range(len(chain)):
        inputs.append(chain.inputs_of(index, values, tensors))
        if index + 1 < len(chain):
            values = all_of(await ask(index, FORWARD, inputs[index], None))
    grads = list(tensors[len(chain.users) :])
    total: Answer = [None] * len(chain.users)
    first = min(chain.first_needed(wants, trainable), len(chain) - 1)
    for index in range(len(chain) - 1, first - 1, -1):
        flags = chain.wants_of(index, wants, first)
        answer = await ask(index, BACKWARD, [*inputs[index], *grads], flags)
        inputs[index] = []
        if any(wanted and grad is None for wanted, grad in zip(flags, answer)):
            raise Refused("a repeated backward asks for gradients that the first one did not")
        args = len(chain.blocks[index].schema.arg_entries)
        for position, wanted, grad in zip(chain.blocks[index].kwargs, flags[args:], answer[args:]):
            if wanted and grad is not None:  # never in place: the block's answer is kept for repeats
                earlier = total[position]
                total[position] = grad if earlier is None else earlier + grad
        if index == 0:
            total[:args] = [grad if wanted else None for wanted, grad in zip(flags, answer[:args])]
        elif index > first:
            returned = chain.blocks[index - 1].schema.output_entries
            pairs = zip(returned, answer[:args])
            grads = [grad.to(entry.proto.dtype) for entry, grad in pairs if grad is not None]
    return total


def returned_bytes(chain: Chain, method: str, rows: int) -> int:
    """Most memory that what blocks return takes at one time, as far as their schemas tell. (Axes of any length do not.)

    Of a backward, without the gradients of the request's tensors, which are as large as those.
    """
    sizes = [sum(_size_bytes(entry.proto, rows) for entry in block.schema.output_entries) for block in chain.blocks]
    if method == FORWARD:
        return max(before + after for before, after in zip([0, *sizes], sizes))
    return sum(sizes[:-1]) + 2 * max(sizes[:-1], default=0)  # each block's inputs, and gradients between two blocks


def _size_bytes(proto: TensorProto, rows: int) -> int:
    values = rows if proto.batched else 1
    for size in proto.sizes:
        values *= size or 0
    return values * proto.itemsize


def all_of(answer: Answer) -> list[torch.Tensor]:
    """Outputs, none of which is missing."""
    return [tensor for tensor in answer if tensor is not None]
