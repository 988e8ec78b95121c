"""A mixture over the network against the same mixture computed here: every output, every gradient, every update."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch

from moe.client.moe import RemoteMixtureOfExperts
from moe.config import ClientConfig
from moe.dht import DHT
from moe.server.expert_backend import ExpertBackend
from moe.server.server import Server
from tests.swarm.experts import make_backend
from tests.swarm.tools import Host, peers_of, report, serving

GRID = (2, 4)
WIDTH, ROWS, K, RANK = 16, 64, 4, 3
LR = 0.05
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def backends(prefix: str) -> list[ExpertBackend]:
    return [
        make_backend("adapted", f"{prefix}.{i}.{j}", lr=LR, width=WIDTH, seed=10 * i + j)
        for i, j in itertools.product(*map(range, GRID))
    ]


@pytest.fixture(scope="module")
def server(dht: DHT) -> Iterator[Server]:
    with serving(dht, *backends("mix"), update_period=30) as server:
        yield server


class DenseMixture:
    """The same computation without a network: all experts for all rows, then the K best of each row."""

    def __init__(self, experts: list[ExpertBackend], gate: torch.nn.Linear):
        self.experts, self.gate = experts, gate

    def __call__(self, x: torch.Tensor, **adapter: torch.Tensor) -> torch.Tensor:
        first, second = self.gate(x).split(GRID, dim=-1)
        scores = (first[:, :, None] + second[:, None, :]).flatten(1)  # (B, E)
        best = scores.topk(K, dim=-1)
        outputs = torch.stack([expert.module(x, **adapter) for expert in self.experts], dim=1)  # (B, E, D)
        chosen = outputs.gather(1, best.indices[..., None].expand(-1, -1, x.shape[-1]))
        return (best.values.softmax(-1)[..., None] * chosen).sum(1)


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "adapted"])
def test_a_step_equals_the_dense_computation(dht: DHT, server: Server, transport: str, adapted: bool) -> None:
    torch.manual_seed(0)
    config = ClientConfig(transport=transport)
    mixture = RemoteMixtureOfExperts(
        in_features=WIDTH, grid_size=GRID, dht=dht, uid_prefix="mix.", k_best=K, config=config
    )
    local = backends("local")
    for expert, served in zip(local, server.expert_backends.values()):
        expert.module.load_state_dict(served.module.state_dict())
    gate = torch.nn.Linear(WIDTH, sum(GRID))
    gate.load_state_dict(mixture.proj.state_dict())
    x, weights = torch.randn(ROWS, WIDTH), torch.randn(ROWS, WIDTH)
    adapter = {"lora_a": torch.randn(WIDTH, RANK), "lora_b": torch.randn(RANK, 4 * WIDTH)} if adapted else {}
    _ = mixture.info  # so that the requests below are calls

    def step(model: object, x: torch.Tensor, adapter: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        inputs = [tensor.clone().requires_grad_() for tensor in (x, *adapter.values())]
        y = model(inputs[0], **dict(zip(adapter, inputs[1:])))  # type: ignore[operator]
        (y * weights).sum().backward()
        return [y.detach(), *(tensor.grad for tensor in inputs if tensor.grad is not None)]

    before = server.handler.requests
    received = step(mixture, x, adapter)
    requests = server.handler.requests - before
    expected = step(DenseMixture(local, gate), x, adapter)

    report(f"{requests} requests for both ways; {mixture.statistics()}")
    assert requests <= 16
    assert sum(mixture.statistics().rows_per_expert.values()) == ROWS * K
    assert len(received) == len(expected) == 2 + len(adapter)
    for got, wanted in zip(received, expected):
        torch.testing.assert_close(got, wanted, **TOLERANCE)
    for got, wanted in zip(mixture.proj.parameters(), gate.parameters()):
        assert got.grad is not None and wanted.grad is not None
        torch.testing.assert_close(got.grad, wanted.grad, **TOLERANCE)
    for served, expert in zip(server.expert_backends.values(), local):
        assert expert.optimizer is not None
        expert.optimizer.step()
        for got, wanted in zip(served.module.parameters(), expert.module.parameters()):
            torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_a_step_goes_on_without_a_server_that_is_killed(dht: DHT, server: Server) -> None:
    """Half of the grid is gone in the middle of training: the other half answers, and nobody waits long."""
    lost = [{"kind": "adapted", "uid": f"mix.2.{j}", "width": WIDTH, "lr": LR} for j in range(4)]
    config = ClientConfig(request_timeout_s=5.0, total_timeout_s=20.0)
    with Host(peers_of(dht), experts=lost) as host:
        mixture = RemoteMixtureOfExperts(
            in_features=WIDTH, grid_size=(3, 4), dht=dht, uid_prefix="mix.", k_best=12, k_min=8, config=config
        )
        x = torch.randn(8, WIDTH)
        mixture(x).sum().backward()
        assert len(mixture.statistics().rows_per_expert) == 12
        y = mixture(x)
        host.kill()
        y.sum().backward()
        statistics = mixture.statistics()
        assert set(statistics.backward_failures) == {f"mix.2.{j}" for j in range(4)}
        report(f"backward without them: {statistics.backward_s:.2f} s")
        for _ in range(2):
            mixture(x).sum().backward()
