"""An expert of your own that every caller can adapt with its own LoRA tensors, hosted in another process.

The part between the two lines is all there is to it: the expert, the server, the call, the gradients.
"""

from __future__ import annotations

# --------------------------------------------------------------------------------------------------------------------
import torch

from moe import DHT, BatchTensorProto, TensorProto, background_server, get_experts, register_expert_class


@register_expert_class("adapted_linear", schema=lambda hidden_dim: dict(
    args=(BatchTensorProto(hidden_dim),),                                                  # one row per example
    kwargs={"lora_a": TensorProto(hidden_dim, None), "lora_b": TensorProto(None, hidden_dim)},    # of the whole call
    optional=("lora_a", "lora_b"),
))  # fmt: skip
class AdaptedLinear(torch.nn.Module):
    def __init__(self, hidden_dim: int):
        super().__init__()
        self.linear = torch.nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: torch.Tensor, lora_a=None, lora_b=None) -> torch.Tensor:
        return self.linear(x) if lora_a is None else self.linear(x) + x @ lora_a @ lora_b


def main() -> None:
    with background_server(expert_uids=["adapted.0"], expert_cls="adapted_linear", hidden_dim=64) as server:
        dht = DHT(initial_peers=server.addrs, start=True)
        (expert,) = get_experts(dht, ["adapted.0"])
        x = torch.randn(16, 64, requires_grad=True)
        lora_a, lora_b = (torch.randn(shape, requires_grad=True) for shape in ((64, 8), (8, 64)))
        y = expert(x, lora_a=lora_a, lora_b=lora_b)
        y.sum().backward()
        print("output", tuple(y.shape), "gradients", [tuple(t.grad.shape) for t in (x, lora_a, lora_b)])
        # ------------------------------------------------------------------------------------------------------------
        plain = expert(x)  # the same expert for a caller without an adapter
        print(f"the adapter changed the output by {(y - plain).abs().mean().item():.1f} on average")
        dht.shutdown()


if __name__ == "__main__":
    main()
