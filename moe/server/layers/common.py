"""hivemind's experts: ffn, transformer, nop, nop_delay. Same parameters, same numbers to 1e-5.

Legend: B = rows, S = sequence length, D = hidden size.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from moe.server.layers.custom_experts import register_expert_class

TRANSFORMER_LENGTH = 128  # fixed, so that the schema equals stock hivemind's
TRANSFORMER_HEADS = 16


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    """hivemind's (and BERT's) tanh approximation of GELU, in torch's one kernel.

    Written out in eight operations, as hivemind has it, each of them fills new memory: on a CPU a fourth of the time of a
    whole ffn, mostly spent in the kernel's page faults (docs/performance.md).
    """
    return nn.functional.gelu(x, approximate="tanh")


def ffn_sample_input(batch_size: int, hid_dim: int) -> torch.Tensor:
    """(B, D)"""
    return torch.empty((batch_size, hid_dim))


nop_sample_input = ffn_sample_input


def transformer_sample_input(batch_size: int, hid_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, S, D) and a padding mask (B, S)."""
    length = TRANSFORMER_LENGTH
    return torch.empty((batch_size, length, hid_dim)), torch.empty((batch_size, length), dtype=torch.bool)


@register_expert_class("ffn", ffn_sample_input)
class FeedforwardBlock(nn.Module):
    """Two linear layers with a GELU between them, residual connection, layer norm."""

    def __init__(self, hid_dim: int):
        super().__init__()
        self.ffn = nn.Linear(hid_dim, 4 * hid_dim)
        self.ffn_output = nn.Linear(4 * hid_dim, hid_dim)
        self.layer_norm = nn.LayerNorm(hid_dim, eps=1e-12)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D)"""
        return self._finish(x, self.ffn(x))

    def _finish(self, x: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.layer_norm(x + self.ffn_output(gelu_fast(hidden)))
        return output


class TransformerEncoderLayer(nn.Module):
    """A post-norm encoder layer with this package's GELU.

    :param d_model: D
    :param nhead: attention heads, a divisor of D
    :param dim_feedforward: width of the hidden layer
    :param dropout: probability; note that a remote expert draws other numbers in backward than in forward
    """

    def __init__(self, d_model: int, nhead: int, dim_feedforward: int = 2048, dropout: float = 0.1):
        super().__init__()
        self.self_attn = nn.MultiheadAttention(d_model, nhead, dropout=dropout)
        self.linear1 = nn.Linear(d_model, dim_feedforward)
        self.dropout = nn.Dropout(dropout)
        self.linear2 = nn.Linear(dim_feedforward, d_model)
        self.norm1 = nn.LayerNorm(d_model)
        self.norm2 = nn.LayerNorm(d_model)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)

    def forward(self, src: torch.Tensor, src_key_padding_mask: torch.Tensor | None = None) -> torch.Tensor:
        """(B, S, D) and a mask (B, S), true where a position is ignored -> (B, S, D)"""
        x = src.transpose(0, 1)  # (S, B, D)
        attended = self.self_attn(x, x, x, key_padding_mask=src_key_padding_mask)[0]
        x = self.norm1(x + self.dropout1(attended))
        hidden = self.linear2(self.dropout(gelu_fast(self.linear1(x))))
        output: torch.Tensor = self.norm2(x + self.dropout2(hidden))
        return output.transpose(0, 1)


@register_expert_class("transformer", transformer_sample_input)
class TunedTransformer(TransformerEncoderLayer):
    """An encoder layer with 16 heads and a four times wider hidden layer."""

    def __init__(self, hid_dim: int):
        super().__init__(hid_dim, dim_feedforward=4 * hid_dim, nhead=TRANSFORMER_HEADS)


@register_expert_class("nop", nop_sample_input)
class NopExpert(nn.Module):
    """Returns its input; for measuring everything else. Has an empty parameter so that an optimizer accepts it."""

    def __init__(self, hid_dim: int):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D)"""
        return x.clone()


@register_expert_class("nop_delay", nop_sample_input)
class DelayedNopExpert(NopExpert):
    """Like nop, but slow.

    :param delay: seconds
    """

    def __init__(self, hid_dim: int, delay: float = 0.5):
        super().__init__(hid_dim)
        self.delay = delay

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D)"""
        time.sleep(self.delay)
        return super().forward(x)
