"""What torch may do with modules whose work is done elsewhere, and what it may not. Owns: copies, pickles, kinds of
differentiation.

Must not know: what a call consists of.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any, ClassVar, NoReturn, TypeVar

import torch
from torch import nn
from torch.autograd import forward_ad

from moe.errors import Unsupported

Self = TypeVar("Self", bound="RemoteModule")


class RemoteModule(nn.Module):
    """A module that calls other machines. A copy shares the connections and all that was learned through them, and has
    parameters of its own; there are no pickles, since connections cannot leave their process.

    :cvar shared: names of the attributes that copies have in common
    """

    shared: ClassVar[tuple[str, ...]] = ()

    def __copy__(self: Self) -> Self:
        copied = type(self).__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self: Self, memo: dict[int, Any]) -> Self:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        memo.update({id(value): value for name, value in self.__dict__.items() if name in self.shared})
        copied.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        name = type(self).__name__
        raise Unsupported(
            f"a {name} cannot be pickled: it calls others through connections of this process. Save its state_dict(), and make "
            f"a new {name} with the DHT of the other process; a process that was forked can use this one"
        )


def check_differentiable(tensors: Iterable[torch.Tensor], *, grad: bool) -> None:
    """Refuse what a remote module cannot differentiate: remotely, there are only vector-Jacobian products, once.

    :param grad: gradients will be asked for
    :raises Unsupported: the call is part of a forward-mode derivative, or of a transformation of torch.func
    """
    functorch = torch._C._functorch  # type: ignore[attr-defined]
    if functorch.maybe_current_level() is not None and (
        grad or any(functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
    ):
        raise Unsupported(
            "a remote expert cannot be part of what torch.func transforms (grad, vmap, jvp, jacrev, ...): its derivatives are "
            "computed elsewhere. Use torch.autograd: tensor.requires_grad_() and backward(), or torch.autograd.grad"
        )
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(tensor).tangent is not None for tensor in tensors):
        raise Unsupported(
            "a remote expert has no forward-mode derivative (dual numbers, jvp): servers compute gradients in backward only. "
            "Use reverse mode, or detach() the input if its derivative shall be zero"
        )
