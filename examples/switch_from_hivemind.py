"""A program for hivemind.moe, of which one import has been changed. Everything below it is hivemind's interface."""

from __future__ import annotations

import hivemind
import torch

# from hivemind.moe import RemoteMixtureOfExperts, background_server, get_experts
from moe import RemoteMixtureOfExperts, background_server, get_experts


def main() -> None:
    """Host five experts, call two of them by name, then train a mixture of all."""
    with background_server(num_experts=5, expert_pattern="expert.[0:5]", expert_cls="ffn", hidden_dim=64) as server:
        dht = hivemind.DHT(initial_peers=server.addrs, start=True, client_mode=True)

        expert1, expert4 = get_experts(dht, ["expert.1", "expert.4"])
        assert expert1 is not None and expert4 is not None, "experts not found. Please double-check initial peers"
        inputs = torch.randn(3, 64, requires_grad=True)
        outputs = expert4(expert1(inputs))
        (outputs * torch.randn(3, 64)).sum().backward()
        print(f"two experts in a row: outputs {tuple(outputs.shape)}, gradient norm {inputs.grad.norm().item():.3f}")

        dmoe = RemoteMixtureOfExperts(in_features=64, uid_prefix="expert.", grid_size=(5,), dht=dht, k_best=2)
        optimizer = torch.optim.Adam(dmoe.parameters(), lr=1e-3)
        images, targets = torch.randn(32, 64), torch.randn(32, 64)
        for step in range(5):
            loss = torch.nn.functional.mse_loss(dmoe(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            print(f"mixture, step {step}: loss {loss.item():.4f}")
        dht.shutdown()


if __name__ == "__main__":
    main()
