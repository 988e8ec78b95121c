"""Threads share remote modules, with default settings and optimizers whose writes autograd does not see."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe.client.expert import RemoteExpert
from moe.client.sequential import RemoteSequential
from moe.expert_uid import ExpertInfo
from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend
from moe.testing import MemoryPeer, memory_swarm
from tests.client.sequence_swarm import FixedRouter

DIM, RANK, ROWS = 64, 32, 4096  # inputs of 1 MiB are kept, adapters of 8 KiB are held
THREADS, STEPS = 4, 3


class Adapted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(DIM, DIM)

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.linear(x) + x @ a @ b)


def backend(uid: str, module: nn.Module) -> ExpertBackend:
    kwargs = {"a": TensorProto(DIM, None), "b": TensorProto(None, DIM)}
    return ExpertBackend(uid, module, args_schema=(BatchTensorProto(DIM),), kwargs_schema=kwargs)


def train(module: Callable[..., torch.Tensor], seed: int, make: Callable[[Any], torch.optim.Optimizer]) -> list[Any]:
    """Losses, and the adapter after some steps; each input is used for two steps' graphs at once."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, generator=generator) * 0.1 for shape in ((DIM, RANK), (RANK, DIM)))
    a.requires_grad_(), b.requires_grad_()  # type: ignore[func-returns-value]
    optimizer, losses = make([a, b]), []
    for step in range(STEPS):
        x = torch.randn(ROWS, DIM, generator=generator, requires_grad=True)
        loss = module(x, a=a, b=b).square().mean()
        (module(x[: 8 * (step + 1)], a=a, b=b).square().mean() + loss).backward()
        losses.append((loss.item(), x.grad))
        optimizer.step()
        optimizer.zero_grad()
    return [losses, a.detach(), b.detach()]


def in_threads(work: Callable[[int], Any]) -> list[Any]:
    results: dict[int, Any] = {}
    start = threading.Barrier(THREADS)

    def run(i: int) -> None:
        start.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [results[i] for i in range(THREADS)]


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "fused Adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, fused=True),
    "foreach AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("kind", ["expert", "sequence"])
def test_threads_with_adapters_of_their_own_train_as_each_would_alone(kind: str, optimizer: str) -> None:
    torch.manual_seed(0)
    modules = {f"e.{i}": Adapted() for i in range(1 if kind == "expert" else 2)}
    local = copy.deepcopy(list(modules.values()))

    def alone(x: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        for module in local:
            x = module(x, **kwargs)
        return x

    make = OPTIMIZERS[optimizer]
    with memory_swarm({uid: backend(uid, module) for uid, module in modules.items()}) as swarm:
        if kind == "expert":
            remote: Any = RemoteExpert(ExpertInfo("e.0", MemoryPeer("server0")), swarm.transport)
        else:
            router = FixedRouter(list(modules), {"server0": list(modules)})
            remote = RemoteSequential(swarm.transport, list(modules), manager=router)  # type: ignore[arg-type]
        got = in_threads(lambda i: train(remote, i, make))
    expected = [train(alone, i, make) for i in range(THREADS)]
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-3)


def test_one_expert_forgotten_and_asked_by_many_threads_at_once() -> None:
    torch.manual_seed(0)
    module = Adapted()
    with memory_swarm({"e.0": backend("e.0", module)}, {"e.0": backend("e.0", copy.deepcopy(module))}) as swarm:
        servers = [MemoryPeer("server0"), MemoryPeer("server1")]
        expert = RemoteExpert(ExpertInfo("e.0", servers[0]), swarm.transport, replicas=servers[1:])
        x, a, b = torch.randn(3, DIM), torch.randn(DIM, RANK) * 0.1, torch.randn(RANK, DIM) * 0.1
        expected = module(x, a, b).detach()

        def work(i: int) -> None:
            for _ in range(50):
                expert.refresh_info()
                torch.testing.assert_close(expert(x, a=a, b=b), expected, atol=1e-4, rtol=1e-4)
                assert expert.info["keyword_names"] == ("a", "b")

        in_threads(work)
