"""Many callers at once over the network, each with its own adapter, lengths and mask: all exact, whatever is batched with
what."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe.client.expert import get_experts
from moe.config import ClientConfig
from moe.dht import DHT
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
