"""Dropout whose mask is an input, so that forward and the recomputed backward agree; and the expert det_dropout.

Legend: B = rows, D = hidden size.
"""

from __future__ import annotations

import torch
from torch import nn

from moe.server.layers.custom_experts import register_expert_class


class DeterministicDropout(nn.Module):
    """Dropout by a mask that the caller draws. Does nothing in eval mode.

    :param drop_prob: the probability the caller draws with; it only scales the activations here
    """

    def __init__(self, drop_prob: float):
        super().__init__()
        self.keep_prob = 1 - drop_prob

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """``x`` where the mask is 1, scaled; 0 where it is 0. The shape of x."""
        return x * mask / self.keep_prob if self.training else x


def dropout_sample_input(batch_size: int, hid_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, D) and a mask (B, D) of zeros and ones: int64, as stock clients send it."""
    return torch.empty((batch_size, hid_dim)), torch.randint(0, 2, (batch_size, hid_dim))


@register_expert_class("det_dropout", dropout_sample_input)
class DeterministicDropoutNetwork(nn.Module):
    """Dropout by the caller's mask, then two linear layers."""

    def __init__(self, hid_dim: int, dropout_prob: float = 0.2):
        super().__init__()
        self.linear_in = nn.Linear(hid_dim, 2 * hid_dim)
        self.activation = nn.ReLU()
        self.dropout = DeterministicDropout(dropout_prob)
        self.linear_out = nn.Linear(2 * hid_dim, hid_dim)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """(B, D) and a mask (B, D) -> (B, D)"""
        output: torch.Tensor = self.linear_out(self.activation(self.linear_in(self.dropout(x, mask))))
        return output
