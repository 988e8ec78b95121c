"""What torch may do with modules whose work is done elsewhere, and what it may not. Owns: copies, pickles, kinds of
differentiation.

Must not know: what a call consists of.
"""

from __future__ import annotations

import copy
import functools
import inspect
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, NoReturn, TypeVar, cast

import torch
from torch import nn
from torch.autograd import forward_ad

from moe.errors import Unsupported

Self = TypeVar("Self", bound="RemoteModule")
Function = TypeVar("Function", bound=Callable[..., Any])


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


def untraced(function: Function) -> Function:
    """A method that torch.compile leaves out of its graphs, with all that it calls: asking others is nothing to compile."""
    known: list[Callable[..., Any]] = []

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not known:
            if "torch._dynamo" not in sys.modules:  # to import it takes seconds
                return function(*args, **kwargs)
            known.append(_disabled(function))
        return known[0](*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]  # else it is traced up to the call of ``function``
    return cast(Function, run)


def _disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    takes_reason = "reason" in inspect.signature(torch.compiler.disable).parameters
    why = {"reason": "a remote expert is called, there is nothing to compile"} if takes_reason else {}
    return cast("Callable[..., Any]", torch.compiler.disable(function, **why))  # type: ignore[no-untyped-call]


def check_differentiable(tensors: Iterable[torch.Tensor], *, grad: bool) -> None:
    """Refuse what cannot be computed elsewhere: remotely, there are only values, and vector-Jacobian products, once.

    :param grad: gradients will be asked for
    :raises Unsupported: the call is part of a forward-mode derivative, of a transformation of torch.func, or of an export
    """
    functorch = torch._C._functorch
    if functorch.maybe_current_level() is not None and (
        grad or any(functorch.is_functorch_wrapped_tensor(tensor) for tensor in tensors)
    ):
        raise Unsupported(
            "a remote expert cannot be part of what torch.func transforms (grad, vmap, jvp, jacrev, ...): its derivatives are "
            "computed elsewhere. Use torch.autograd: tensor.requires_grad_() and backward(), or torch.autograd.grad"
        )
    if forward_ad._current_level >= 0 and any(map(_is_dual, tensors)):
        raise Unsupported(
            "a remote expert has no forward-mode derivative (dual numbers, jvp): servers compute gradients in backward only. "
            "Use reverse mode, or detach() the input if its derivative shall be zero"
        )
    if torch._C._get_tracing_state() is not None:
        raise Unsupported("a remote expert cannot be traced (torch.jit.trace): its answers would become constants")
    for tensor in tensors:
        if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ or tensor.is_meta:
            raise Unsupported(
                f"a {type(tensor).__name__} on {tensor.device} has no values that could be sent to an expert (a remote expert "
                f"cannot be exported)"
            )


def _is_dual(tensor: torch.Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


def differentiable_once(backward: Callable[..., tuple[Any, ...]]) -> Callable[..., tuple[Any, ...]]:
    """The backward of an autograd.Function of a remote module. Unlike torch's ``once_differentiable``, by which gradients are
    constants unless the gradients given to it require some, whoever differentiates them again is told that this cannot be.

    :param backward: called with the context, the saved tensors (to be unpacked only once), and the gradients
    """

    @functools.wraps(backward)
    def run(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        is_batched = torch._C._functorch.is_legacy_batchedtensor
        if any(is_batched(grad) for grad in grad_outputs):
            raise Unsupported(
                "gradients of a remote expert are computed for one vector at a time (no is_grads_batched, no vectorize=True)"
            )
        saved = ctx.saved_tensors
        with torch.no_grad():
            grads = backward(ctx, saved, *grad_outputs)
        if not torch.is_grad_enabled():  # else with create_graph=True
            return grads
        some = [i for i, grad in enumerate(grads) if grad is not None]
        apply: Callable[..., Sequence[torch.Tensor]] = _NotAgain.apply
        guarded = apply(len(some), *(grads[i] for i in some), *saved, *grad_outputs)
        result = list(grads)
        for i, grad in zip(some, guarded):
            result[i] = grad
        return tuple(result)

    return run


class _NotAgain(torch.autograd.Function):
    """Gradients, as functions of what they depend on, that cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> NoReturn:
        raise Unsupported(
            "the gradients of a remote expert cannot be differentiated again (gradient penalties, Hessians, jvp): servers "
            "compute first derivatives only"
        )
