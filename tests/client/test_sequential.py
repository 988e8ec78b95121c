"""RemoteSequential over a swarm in this process: the same outputs and gradients as the local blocks."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import moe.client.sequential as sequential
from moe.client.expert import RemoteExpert
from moe.client.sequential import RemoteSequential
from moe.config import ClientConfig
from moe.errors import ConfigError, MissingBlocks, MoEError, SchemaError
from moe.expert_uid import ExpertInfo
from moe.server.connection_handler import ConnectionHandler
from moe.server.runtime import Runtime
from moe.transport.memory import MemoryPeer, MemoryTransport
from tests.experts import HIDDEN, LoraExpert, lora_backend

BLOCKS = 3


class Swarm:
    """Blocks block.0 ... block.2, each on a peer of its own, and their local twins."""

    def __init__(self) -> None:
        modules = [LoraExpert() for _ in range(BLOCKS)]
        self.local = [copy.deepcopy(module) for module in modules]
        self.backends = {f"block.{i}": lora_backend(module) for i, module in enumerate(modules)}
        self.runtime = Runtime(self.backends)
        self.transport = MemoryTransport(
            {f"peer{uid}": ConnectionHandler({uid: backend}) for uid, backend in self.backends.items()}
        )
        self.searches: list[list[str]] = []

    def find(self, dht: Any, uids: list[str], timeout_s: float) -> list[ExpertInfo | None]:
        self.searches.append(list(uids))
        return [ExpertInfo(uid, MemoryPeer(f"peer{uid}")) if uid in self.backends else None for uid in uids]

    def create(self, infos: list[ExpertInfo], dht: Any, config: ClientConfig) -> list[RemoteExpert]:
        return [RemoteExpert(info, self.transport, config=config) for info in infos]

    def run_locally(self, h: torch.Tensor, per_block: list[dict[str, Any]]) -> torch.Tensor:
        for module, kwargs in zip(self.local, per_block, strict=True):
            h = module(h, **kwargs)
        return h


@pytest.fixture
def swarm(monkeypatch: pytest.MonkeyPatch) -> Iterator[Swarm]:
    made = Swarm()
    monkeypatch.setattr(sequential, "find_experts", made.find)
    monkeypatch.setattr(sequential, "create_remote_experts", made.create)
    made.runtime.start()
    yield made
    made.runtime.shutdown()


def leaf(*sizes: int) -> torch.Tensor:
    return torch.randn(*sizes, requires_grad=True)


def copied(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def check(swarm: Swarm, remote: torch.Tensor, local: torch.Tensor, ours: list[Any], theirs: list[Any]) -> None:
    assert torch.allclose(remote, local, atol=1e-5)
    weights = torch.randn_like(local)
    (remote * weights).sum().backward()
    (local * weights).sum().backward()
    for mine, reference in zip(ours, theirs, strict=True):
        assert torch.allclose(mine.grad, reference.grad, atol=1e-5)


@pytest.mark.parametrize("rank", [2, 4, 5, HIDDEN])  # 4 rows, length 5: a rank like any other size changes nothing
def test_shared_kwargs_have_their_gradients_summed_over_blocks(swarm: Swarm, rank: int) -> None:
    seq = RemoteSequential(None, prefix="block", num_blocks=BLOCKS)
    ours = [leaf(4, 5, HIDDEN), leaf(HIDDEN, rank), leaf(rank, HIDDEN)]
    h, a, b = copied(ours)
    mask = torch.rand(4, 5) > 0.3
    remote = seq(ours[0], mask=mask, lora_a=ours[1], lora_b=ours[2])
    local = swarm.run_locally(h, [dict(mask=mask, lora_a=a, lora_b=b)] * BLOCKS)
    check(swarm, remote, local, ours, [h, a, b])


def test_block_kwargs_have_gradients_of_their_own(swarm: Swarm) -> None:
    seq = RemoteSequential(None, ["block.0", "block.1", "block.2"])
    ours = [leaf(4, 5, HIDDEN), leaf(HIDDEN, 2), leaf(2, HIDDEN), leaf(HIDDEN, 3), leaf(3, HIDDEN)]
    h, a0, b0, a2, b2 = copied(ours)
    mask = torch.rand(4, 5) > 0.3
    own = [dict(lora_a=ours[1], lora_b=ours[2]), {}, dict(lora_a=ours[3], lora_b=ours[4])]
    remote = seq(ours[0], block_kwargs=own, batch_kwargs=dict(mask=mask))
    local = swarm.run_locally(
        h, [dict(mask=mask, lora_a=a0, lora_b=b0), dict(mask=mask), dict(mask=mask, lora_a=a2, lora_b=b2)]
    )
    check(swarm, remote, local, ours, [h, a0, b0, a2, b2])


def test_second_backward_gives_the_same_gradients(swarm: Swarm) -> None:
    seq = RemoteSequential(None, prefix="block.", num_blocks=BLOCKS)
    h, a, b = leaf(2, 3, HIDDEN), leaf(HIDDEN, 2), leaf(2, HIDDEN)
    y = seq(h, lora_a=a, lora_b=b).sum()
    first = torch.autograd.grad(y, [h, a, b], retain_graph=True)
    second = torch.autograd.grad(y, [h, a, b])
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_slices_compose_and_blocks_are_found_once(swarm: Swarm) -> None:
    seq = RemoteSequential(None, prefix="block", num_blocks=BLOCKS)
    h = torch.randn(2, 3, HIDDEN)
    assert torch.equal(seq[1:](seq[0](h)), seq(h))
    assert [expert.uid for expert in seq] == list(seq.uids)
    assert (len(seq), len(seq[:2]), seq[-1].uid) == (3, 2, "block.2")
    assert sum(map(len, swarm.searches)) == BLOCKS
    seq.refresh()
    seq(h)
    assert sum(map(len, swarm.searches)) == 2 * BLOCKS


def test_missing_blocks_are_named(swarm: Swarm) -> None:
    with pytest.raises(MissingBlocks, match=r"block\.3, block\.4"):
        RemoteSequential(None, prefix="block", num_blocks=5)(torch.randn(2, 3, HIDDEN))


def test_a_dead_server_is_an_error_within_the_budget(swarm: Swarm) -> None:
    config = ClientConfig(total_timeout_s=2.0, min_backoff_s=0.05)
    seq = RemoteSequential(None, prefix="block", num_blocks=BLOCKS, config=config)
    swarm.transport.services = {n: s for n, s in swarm.transport.services.items() if n != "peerblock.1"}
    with pytest.raises(MoEError, match=r"block\.1"):
        seq(torch.randn(2, 3, HIDDEN))


def test_wrong_use_is_refused_before_anything_is_sent(swarm: Swarm) -> None:
    seq = RemoteSequential(None, prefix="block", num_blocks=BLOCKS)
    h, a = torch.randn(2, 3, HIDDEN), torch.randn(HIDDEN, 2)
    with pytest.raises(SchemaError, match="3 dicts"):
        seq(h, block_kwargs=[{}])
    with pytest.raises(SchemaError, match="lora_a"):
        seq(h, lora_a=a, block_kwargs=[{"lora_a": a}, {}, {}])
    with pytest.raises(SchemaError, match="global"):
        seq(h, batch_kwargs={"lora_a": a})
    assert not [call for call in swarm.transport.calls if call[1] != "info"]


@pytest.mark.parametrize(
    "wrong", [{}, {"uids": ["a.0"], "prefix": "a"}, {"prefix": "a"}, {"uids": []}, {"uids": ["a"]}]
)
def test_which_blocks_must_be_clear(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RemoteSequential(None, **wrong)


def test_it_is_a_module_without_parameters(swarm: Swarm) -> None:
    assert isinstance(seq := RemoteSequential(None, ["block.0"]), nn.Module)
    assert not list(seq.parameters())
    assert "block.0" in repr(seq)
