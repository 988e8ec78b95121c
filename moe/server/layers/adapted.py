"""Experts that a caller adapts with its own LoRA tensors, sent along with each call as global kwargs.

Nothing of an adapter stays in the module: callers with different adapters, or none, share one expert.
Legend: B = rows, D = hidden size, R = rank of the adapter (any).
"""

from __future__ import annotations

from typing import Any

import torch

from moe.errors import SchemaError
from moe.schema import BatchTensorProto, TensorProto
from moe.server.layers.common import FeedforwardBlock
from moe.server.layers.custom_experts import register_expert_class


def adapted_ffn_schema(hidden_dim: int) -> dict[str, Any]:
    """x (B, D); optional and global: lora_a (D, R), lora_b (R, 4 D)."""
    return {
        "args": (BatchTensorProto(hidden_dim),),
        "kwargs": {"lora_a": TensorProto(hidden_dim, None), "lora_b": TensorProto(None, 4 * hidden_dim)},
        "optional": ("lora_a", "lora_b"),
    }


@register_expert_class("adapted_ffn", schema=adapted_ffn_schema)
class AdaptedFeedforwardBlock(FeedforwardBlock):
    """The ffn expert, with ``x @ lora_a @ lora_b`` added to what its first linear layer gives."""

    def forward(
        self, x: torch.Tensor, lora_a: torch.Tensor | None = None, lora_b: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, D) -> (B, D)

        :raises SchemaError: if one half of the adapter is missing
        """
        hidden = self.ffn(x)
        if lora_a is not None and lora_b is not None:
            hidden = hidden + (x @ lora_a) @ lora_b
        elif lora_a is not None or lora_b is not None:
            raise SchemaError("lora_a and lora_b are given together or not at all")
        return self._finish(x, hidden)
