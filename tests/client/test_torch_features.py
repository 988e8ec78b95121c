"""What torch does with modules: it works with remote ones, or says why not. Never silently another result."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from moe.client.moe import RemoteMixtureOfExperts
from moe.client.switch_moe import RemoteSwitchMixtureOfExperts
from moe.errors import Unsupported
from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.testing import memory_swarm
from tests.client.memory_swarm import DIM, PREFIX, Swarm, adapted_schema
from tests.client.sequence_swarm import sequence_swarm
from tests.experts import HIDDEN

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.trace"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf"),  # dynamo looks at it
]

KINDS = ["frozen expert", "trained expert", "mixture", "switch", "sequence"]


class Remote(NamedTuple):
    """A remote module, a function of it with one input and one output, and an input."""

    module: nn.Module
    call: Callable[[torch.Tensor], torch.Tensor]
    x: torch.Tensor


@pytest.fixture(params=KINDS, scope="module")
def remote(request: pytest.FixtureRequest):
    kind = request.param
    if kind.endswith("expert"):
        module = nn.Sequential(nn.Linear(DIM, DIM), nn.Tanh())
        optimizer = torch.optim.SGD(module.parameters(), lr=0.0) if kind == "trained expert" else None
        backend = ExpertBackend("e.0", module, optimizer, args_schema=(BatchTensorProto(DIM),))
        with memory_swarm({"e.0": backend}) as swarm:
            expert = swarm.expert("e.0")
            yield Remote(expert, expert, torch.randn(3, DIM))
    elif kind == "sequence":
        with sequence_swarm([0, 1], [1]) as swarm:
            sequence = swarm.sequence()
            yield Remote(sequence, sequence, torch.randn(2, 3, HIDDEN))
    else:
        with Swarm(grid_size=(2, 2), **adapted_schema()) as swarm:
            cls = RemoteSwitchMixtureOfExperts if kind == "switch" else RemoteMixtureOfExperts
            mixture = swarm.mixture(cls, k_best=2).eval()
            yield Remote(mixture, (lambda x: mixture(x)[0]) if kind == "switch" else mixture, torch.randn(3, DIM))


def value_and_grad(call: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x)
    return y.detach(), grad


# --- differentiation -----------------------------------------------------------------------------------------------------


def dual(remote: Remote) -> Any:
    with forward_ad.dual_level():
        return remote.call(forward_ad.make_dual(remote.x, torch.ones_like(remote.x)))


def dual_of_a_constant(remote: Remote) -> Any:
    with torch.no_grad():
        return dual(remote)


def second_order(remote: Remote) -> Any:
    x = remote.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(remote.call(x).sum(), x, create_graph=True)
    return torch.autograd.grad(grad.square().sum(), x)


def gradient_penalty(remote: Remote) -> Any:
    x = remote.x.clone().requires_grad_()
    y = remote.call(x)
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    return (y.sum() + grad.square().sum()).backward()  # the gradient is not of a constant


def batched(remote: Remote) -> Any:
    x = remote.x.clone().requires_grad_()
    y = remote.call(x)
    return torch.autograd.grad(y, x, torch.stack([torch.ones_like(y)] * 2), is_grads_batched=True)


def total(remote: Remote) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: remote.call(x).sum()


REFUSED: dict[str, Callable[[Remote], Any]] = {
    "dual numbers": dual,
    "dual numbers without gradients": dual_of_a_constant,
    "jvp": lambda r: torch.func.jvp(r.call, (r.x,), (torch.ones_like(r.x),)),
    "grad": lambda r: torch.func.grad(total(r))(r.x),
    "vjp": lambda r: torch.func.vjp(r.call, r.x),
    "vmap": lambda r: torch.func.vmap(r.call)(r.x[None].expand(2, *r.x.shape)),
    "jacrev": lambda r: torch.func.jacrev(r.call)(r.x),
    "jacfwd": lambda r: torch.func.jacfwd(r.call)(r.x),
    "hessian": lambda r: torch.func.hessian(total(r))(r.x),
    "jvp by two backwards": lambda r: torch.autograd.functional.jvp(r.call, r.x, torch.ones_like(r.x)),
    "hvp": lambda r: torch.autograd.functional.hvp(total(r), r.x, torch.ones_like(r.x)),
    "forward-mode jacobian": lambda r: torch.autograd.functional.jacobian(
        r.call, r.x, vectorize=True, strategy="forward-mode"
    ),
    "second order": second_order,
    "a gradient penalty": gradient_penalty,
    "batched gradients": batched,
    "a trace": lambda r: torch.jit.trace(r.module, r.x),
    "meta tensors": lambda r: r.call(r.x.to("meta")),
    "a pickle": lambda r: pickle.dumps(r.module),
    "a saved model": lambda r: torch.save(nn.Sequential(r.module), io.BytesIO()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_said_and_why(remote: Remote, what: str) -> None:
    remote.call(remote.x)
    with pytest.raises(
        (Unsupported, RuntimeError, NotImplementedError), match=r"remote expert|no values|cannot be pickled|meta"
    ):
        REFUSED[what](remote)
    value_and_grad(remote.call, remote.x)  # nothing is broken


def test_create_graph_without_using_the_graph_changes_nothing(remote: Remote) -> None:
    _, expected = value_and_grad(remote.call, remote.x)
    x = remote.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(remote.call(x).square().sum(), x, create_graph=True)
    torch.testing.assert_close(grad.detach(), expected)


def test_jacobians_row_by_row_work(remote: Remote) -> None:
    jacobian = torch.autograd.functional.jacobian(total(remote), remote.x)
    x = remote.x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(total(remote)(x), x)
    torch.testing.assert_close(jacobian, grad)


# --- copies --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, lambda module: copy.deepcopy(nn.Sequential(module))[0]])
def test_copies_work_and_share_their_connections(remote: Remote, how: Callable[[Any], Any]) -> None:
    before = value_and_grad(remote.call, remote.x)
    copied = how(remote.module)
    assert type(copied) is type(remote.module)
    assert repr(copied) == repr(remote.module)

    def call(x: torch.Tensor) -> torch.Tensor:
        y = copied(x)
        return y[0] if isinstance(y, tuple) else y

    torch.testing.assert_close(value_and_grad(call, remote.x), before)
    assert copied.config is remote.module.config
    for own, others in zip(copied.parameters(), remote.module.parameters()):
        assert torch.equal(own, others)
        assert (own is others) == (how is copy.copy)


def test_the_gate_of_a_deep_copy_is_its_own() -> None:
    with Swarm(grid_size=(2,), **adapted_schema()) as swarm:
        mixture = swarm.mixture(RemoteMixtureOfExperts, k_best=2)
        copied = copy.deepcopy(mixture)
        copied.proj.weight.data.zero_()
        assert mixture.proj.weight.abs().sum() > 0
        copied(torch.randn(2, DIM)).sum().backward()
        assert mixture.proj.weight.grad is None
        assert copied.beam_search is mixture.beam_search
        assert copied.beam_search.uid_prefix == PREFIX


# --- around a call -------------------------------------------------------------------------------------------------------


def test_compiled_models_give_the_same(remote: Remote) -> None:
    before = value_and_grad(remote.call, remote.x)
    torch._dynamo.reset()
    try:
        model = nn.Sequential(nn.Identity(), remote.module)
        compiled = torch.compile(model, backend="aot_eager")

        def call(x: torch.Tensor) -> torch.Tensor:
            y = compiled(x * 1.0)
            return (y[0] if isinstance(y, tuple) else y) * 1.0

        for _ in range(2):
            torch.testing.assert_close(value_and_grad(call, remote.x), before)
        with torch.no_grad():
            torch.testing.assert_close(call(remote.x), before[0])
    finally:
        torch._dynamo.reset()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoints_give_the_same(remote: Remote, reentrant: bool) -> None:
    before = value_and_grad(remote.call, remote.x)
    x = remote.x.clone().requires_grad_()
    y = checkpoint(remote.call, x, use_reentrant=reentrant)
    y.square().sum().backward()
    torch.testing.assert_close((y.detach(), x.grad), before)


def test_autocast_and_inference_mode(remote: Remote) -> None:
    expected = remote.call(remote.x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(remote.call(remote.x).float(), expected, atol=0.05, rtol=0.05)
    with torch.inference_mode():
        torch.testing.assert_close(remote.call(remote.x), expected)
    torch.testing.assert_close(remote.call(remote.x).detach(), expected)
