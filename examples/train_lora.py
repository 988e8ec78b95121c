"""Train a LoRA adapter on the client against an expert that never changes.

The adapter is two tensors of this process: they are sent along with each call, their gradients come back, and a local
optimizer steps them. The server here runs in the same process (behind a real network connection), so that its weights can be
looked at afterwards: they are the same to the last bit.
"""

from __future__ import annotations

import argparse

import torch
from torch.nn.functional import mse_loss

from moe import DHT, Server, get_experts

HIDDEN_DIM, RANK = 32, 4


def main() -> None:
    """Host a frozen expert, train an adapter against it, compare."""
    parser = argparse.ArgumentParser(description="Train a LoRA adapter against a frozen remote expert.")
    parser.add_argument("--steps", type=int, default=150, help="optimizer steps (default: 150)")
    steps = parser.parse_args().steps
    torch.manual_seed(0)

    # optim_cls=None: the expert is frozen. On the command line: hivemind-server --expert_cls adapted_ffn --optimizer none
    server = Server.create(
        expert_uids=["adapted.0"], expert_cls="adapted_ffn", hidden_dim=HIDDEN_DIM, optim_cls=None, start=True
    )
    dht = DHT(initial_peers=server.dht.get_visible_maddrs(), start=True)
    try:
        (expert,) = get_experts(dht, ["adapted.0"])
        weights_before = server.expert_backends["adapted.0"].state_dict()["module"]

        # what the adapter shall learn: to make the expert answer as if it had another, secret adapter
        inputs = torch.randn(64, HIDDEN_DIM)
        secret = {"lora_a": torch.randn(HIDDEN_DIM, RANK) / 4, "lora_b": torch.randn(RANK, 4 * HIDDEN_DIM) / 4}
        targets = expert(inputs, **secret)

        adapter = {
            "lora_a": torch.nn.Parameter(torch.randn(HIDDEN_DIM, RANK) / HIDDEN_DIM**0.5),
            "lora_b": torch.nn.Parameter(torch.zeros(RANK, 4 * HIDDEN_DIM)),  # at first the adapter changes nothing
        }
        optimizer = torch.optim.Adam(adapter.values(), lr=0.02)
        losses = []
        for step in range(steps):
            loss = mse_loss(expert(inputs, **adapter), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if step % 30 == 0:
                print(f"step {step:3}: loss {losses[-1]:.1e}")
        print(f"loss fell from {losses[0]:.1e} to {losses[-1]:.1e}")

        weights_after = server.expert_backends["adapted.0"].state_dict()["module"]
        same = all(torch.equal(weights_before[name], weights_after[name]) for name in weights_before)
        print(f"the server's weights are {'bit-identical' if same else 'CHANGED'} after {steps} backward calls")
        if not same or losses[-1] > losses[0] / 2:
            raise SystemExit("that should not have happened")
    finally:
        dht.shutdown()
        server.shutdown()


if __name__ == "__main__":
    main()
