"""Many callers at once over the network, each with its own adapter, lengths and mask, and a mixture over eight experts: all
exact, whatever is batched with what, and no more requests than experts."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe.client.expert import get_experts
from moe.client.moe import RemoteMixtureOfExperts
from moe.config import ClientConfig
from moe.dht import DHT
from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.layers import build_expert
from moe.transport.auto import AutoTransport
from tests.experts import HIDDEN, LoraExpert, UnstackableExpert, lora_backend
from tests.swarm.tools import serving

CALLERS = 12
ROUNDS = 3


@pytest.mark.parametrize("transport", ["unix", "tls", "libp2p"])
@pytest.mark.parametrize("expert_class", [LoraExpert, UnstackableExpert])
def test_twelve_callers_with_adapters_lengths_and_masks_of_their_own(
    dht: DHT, transport: str, expert_class: type[LoraExpert]
) -> None:
    module = expert_class()
    reference = copy.deepcopy(module)
    uid = f"{transport}_{expert_class.__name__}.0"

    def call(number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        (expert,) = get_experts(dht, [uid], config=ClientConfig(transport=transport))
        # callers 0 to 3: the rank of the adapter equals the rows, the length, and the hidden size
        same = (4, HIDDEN, 3, 1)
        sizes = (1 + number % 5, 2 + number % 3, 1 + number % 4)
        rows, length, rank = (same[number],) * 3 if number < len(same) else sizes
        for _ in range(ROUNDS):
            x, a, b = (
                torch.randn(sizes, generator=generator, requires_grad=True)
                for sizes in ((rows, length, HIDDEN), (HIDDEN, rank), (rank, HIDDEN))
            )
            mask = torch.rand(rows, length, generator=generator) > 0.3 if number % 3 else None
            kwargs = {} if mask is None else {"mask": mask}
            weights = torch.randn(rows, length, HIDDEN, generator=generator)
            y = expert(x, lora_a=a, lora_b=b, **kwargs)
            grads = torch.autograd.grad((y * weights).sum(), [x, a, b])
            y_local = reference(x, lora_a=a, lora_b=b, **kwargs)
            local = torch.autograd.grad((y_local * weights).sum(), [x, a, b])
            assert torch.allclose(y, y_local, atol=1e-5)
            for grad, expected in zip(grads, local, strict=True):
                assert torch.allclose(grad, expected, atol=1e-5)

    with serving(dht, lora_backend(module, name=uid)), ThreadPoolExecutor(CALLERS) as callers:
        list(callers.map(call, range(CALLERS)))


def test_a_mixture_makes_one_request_per_expert_and_equals_a_dense_computation(
    dht: DHT, monkeypatch: pytest.MonkeyPatch
) -> None:
    dim, rows = 16, 64
    uids = [f"dense.{i}.{j}" for i in range(2) for j in range(4)]
    modules = {uid: build_expert("ffn", dim) for uid in uids}
    local = copy.deepcopy(modules)
    backends = [
        ExpertBackend(uid, module, torch.optim.SGD(module.parameters(), lr=0.0), args_schema=(BatchTensorProto(dim),))
        for uid, module in modules.items()
    ]
    methods: list[str] = []
    original = AutoTransport.call

    async def counted(self: AutoTransport, peer: object, call: object, **options: object) -> object:
        methods.append(call.method)  # type: ignore[attr-defined]
        return await original(self, peer, call, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(AutoTransport, "call", counted)
    with serving(dht, *backends):
        mixture = RemoteMixtureOfExperts(in_features=dim, grid_size=(2, 4), dht=dht, uid_prefix="dense.", k_best=4)
        x = torch.randn(rows, dim, requires_grad=True)
        weights = torch.randn(rows, dim)
        y = mixture(x)
        grads = torch.autograd.grad((y * weights).sum(), [x, *mixture.proj.parameters()])
    assert methods.count("forward") <= len(uids)
    assert methods.count("backward") <= len(uids)

    first, second = mixture.proj(x).split([2, 4], dim=-1)
    scores = (first[:, :, None] + second[:, None, :]).flatten(1)  # (rows, experts)
    best = scores.topk(4, dim=-1)
    outputs = torch.stack([local[uid](x) for uid in uids], dim=1)  # (rows, experts, dim)
    chosen = outputs.gather(1, best.indices[..., None].expand(-1, -1, dim))
    y_local = (torch.softmax(best.values, dim=-1)[..., None] * chosen).sum(1)
    expected = torch.autograd.grad((y_local * weights).sum(), [x, *mixture.proj.parameters()])
    assert torch.allclose(y, y_local, atol=1e-5)
    for grad, reference in zip(grads, expected, strict=True):
        assert torch.allclose(grad, reference, atol=1e-4)
