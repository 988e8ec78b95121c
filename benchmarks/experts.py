"""Experts that only benchmarks need, and that only this project can serve. Owns: their classes and schemas.

Legend: B = rows, S = sequence length (any), D = hidden size, R = rank of an adapter (any).
"""

from __future__ import annotations

from typing import Any

import torch

from moe import BatchTensorProto, TensorProto, register_expert_class
from moe.server.layers.adapted import AdaptedFeedforwardBlock
from moe.server.layers.common import FeedforwardBlock, NopExpert


@register_expert_class(
    "ffn_bfloat16", schema=lambda hidden_dim: {"args": (BatchTensorProto(hidden_dim, dtype=torch.bfloat16),)}
)
class BFloat16FeedforwardBlock(FeedforwardBlock):
    """The ffn expert, its parameters, inputs and outputs in bfloat16."""

    def __init__(self, hidden_dim: int):
        super().__init__(hidden_dim)
        self.bfloat16()


def adapted_sequence_schema(hidden_dim: int) -> dict[str, Any]:
    """x (B, S, D); optional and global: lora_a (D, R), lora_b (R, 4 D)."""
    return {
        "args": (BatchTensorProto(None, hidden_dim),),
        "kwargs": {"lora_a": TensorProto(hidden_dim, None), "lora_b": TensorProto(None, 4 * hidden_dim)},
        "optional": ("lora_a", "lora_b"),
    }


@register_expert_class("adapted_sequence", schema=adapted_sequence_schema)
class AdaptedSequenceBlock(AdaptedFeedforwardBlock):
    """The adapted ffn expert, for sequences."""


@register_expert_class("nop_sequence", schema=lambda hidden_dim: {"args": (BatchTensorProto(None, hidden_dim),)})
class NopSequence(NopExpert):
    """Returns its sequences."""
