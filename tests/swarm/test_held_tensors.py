"""What a server process holds is not sent again: the bytes of tensors are counted on their way into each kind of transport."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from moe.client.expert import RemoteExpert, get_experts, transport_of
from moe.config import ClientConfig
from moe.dht import DHT
from moe.expert_uid import ExpertInfo, PeerIDLike
from moe.schema import Compression
from moe.testing import LocalSwarm
from moe.transport.base import Call, ExpertTransport, Reply
from moe.wire.messages import ExpertDescription

WIDTH, RANK, ROWS = 64, 512, 4096
TRANSPORTS = ("unix", "tls", "libp2p")
ARGUMENTS = [
    "--expert_uids", "adapted.0", "--expert_cls", "adapted_ffn", "--hidden_dim", str(WIDTH), "--optimizer", "none",
]  # fmt: skip


@pytest.fixture(scope="module")
def swarm() -> Iterator[LocalSwarm]:
    with LocalSwarm(ARGUMENTS) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def dht(swarm: LocalSwarm) -> DHT:
    dht = swarm.dht()
    for transport in TRANSPORTS:  # open the links now, not in a test that counts descriptors
        connect(dht, transport)[0](torch.zeros(1, WIDTH))
    return dht


class Counting:
    """Counts the bytes of tensors that each call has."""

    def __init__(self, inner: ExpertTransport):
        self._inner = inner
        self._sent: list[int] = []

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        return await self._inner.info(peer, uid, timeout_s=timeout_s)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        assert all(codec == Compression.NONE for codec in call.codecs)
        self._sent.append(call.request_bytes)
        return await self._inner.call(peer, call, timeout_s=timeout_s)

    async def close(self) -> None:
        await self._inner.close()

    def take(self) -> list[int]:
        """Bytes of each call since the last time."""
        taken, self._sent = self._sent, []
        return taken


def connect(dht: DHT, transport: str, **config: Any) -> tuple[RemoteExpert, Counting]:
    (found,) = get_experts(dht, ["adapted.0"])
    counting = Counting(transport_of(dht, transport))
    info = ExpertInfo(found.uid, found.peer_id)
    return RemoteExpert(info, counting, config=ClientConfig(transport=transport, **config)), counting


def leaves(rows: int = 2, rank: int = RANK) -> dict[str, torch.Tensor]:
    tensors = {
        "x": torch.randn(rows, WIDTH),
        "lora_a": torch.randn(WIDTH, rank) / rank,
        "lora_b": torch.randn(rank, 4 * WIDTH) / rank,
    }
    return {name: tensor.requires_grad_() for name, tensor in tensors.items()}


def run(expert: RemoteExpert, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Output and gradients of one call."""
    for tensor in inputs.values():
        tensor.grad = None
    output = expert(inputs["x"], lora_a=inputs["lora_a"], lora_b=inputs["lora_b"])
    output.square().mean().backward()
    grads = [tensor.grad for tensor in inputs.values() if tensor.grad is not None]
    assert len(grads) == 3
    return [output.detach(), *grads]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_an_adapter_is_sent_once_and_the_results_are_the_same(dht: DHT, transport: str) -> None:
    (holding, counted), (plain, all_sent) = connect(dht, transport), connect(dht, transport, hold_tensors=False)
    inputs = leaves()
    adapter = sum(inputs[name].nbytes for name in ("lora_a", "lora_b"))
    results = [run(expert, inputs) for expert in (holding,) * 10 + (plain,)]
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))
    x = inputs["x"].nbytes
    assert sum(counted.take()) == adapter + 30 * x
    assert sum(all_sent.take()) == 2 * adapter + 3 * x
    inputs["lora_a"].data -= 0.1
    changed = [run(expert, inputs) for expert in (holding, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*changed))
    assert not torch.equal(changed[0][0], results[0][0])
    assert counted.take() == [x + inputs["lora_a"].nbytes, 2 * x]


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_inputs_of_a_forward_are_not_sent_again(dht: DHT, transport: str) -> None:
    (holding, counted), (plain, all_sent) = connect(dht, transport), connect(dht, transport, hold_tensors=False)
    inputs = leaves(ROWS, rank=2)
    results = [run(expert, inputs) for expert in (holding, plain)]
    assert all(torch.equal(a, b) for a, b in zip(*results))
    x, adapter = inputs["x"].nbytes, sum(inputs[name].nbytes for name in ("lora_a", "lora_b"))
    assert counted.take() == [x + adapter, x + adapter]
    assert all_sent.take() == [x + adapter, 2 * x + adapter]


def test_a_server_that_is_started_again_is_sent_everything_again() -> None:
    with LocalSwarm(ARGUMENTS) as swarm:
        holding, counted = connect(swarm.dht(), "auto")
        inputs = leaves()
        adapter, x = sum(inputs[name].nbytes for name in ("lora_a", "lora_b")), inputs["x"].nbytes
        run(holding, inputs)
        assert counted.take() == [adapter + x, 2 * x]
        swarm.restart(0)
        results = [run(holding, inputs) for _ in range(3)]
        sent = counted.take()
    assert adapter + x in sent
    assert sent[-4:] == [x, 2 * x] * 2
    assert all(torch.equal(a, b) for result in results for a, b in zip(result, results[0]))
