"""Deep prompts: a learned tensor for each block of a sequence. Owns: the parameter, and how it becomes kwargs.

Nothing of it is special to a server: a block takes a prompt as a batched kwarg like any other, and adds it to the first
positions of its input. Idea: P-tuning v2 (Liu et al. 2021); shapes as Petals' ``prompts`` (bigscience-workshop/petals).
"""

from __future__ import annotations

import torch
from torch import nn


class DeepPrompts(nn.Module):
    """Prompts for all blocks, to be passed as ``blocks(h, block_kwargs=prompts())``.

    :param num_blocks: of the sequence
    :param length: positions of a prompt
    :param hidden_dim: of a position
    :param rows: 1: the same prompt for all rows of a batch, whatever their number; else one for each row
    :param name: of the blocks' kwarg, a ``BatchTensorProto(None, hidden_dim)``
    :param std: of the normal distribution that prompts begin with
    :ivar prompts: float (num_blocks, rows, length, hidden_dim)
    """

    def __init__(
        self,
        num_blocks: int,
        length: int,
        hidden_dim: int,
        *,
        rows: int = 1,
        name: str = "prompt",
        std: float = 0.02,  # as transformers begin their embeddings
    ):
        super().__init__()
        self.name = name
        self.prompts = nn.Parameter(torch.randn(num_blocks, rows, length, hidden_dim) * std)

    def extra_repr(self) -> str:
        """For repr."""
        return f"{self.name}: {tuple(self.prompts.shape)}"

    def forward(self) -> list[dict[str, torch.Tensor]]:
        """One dict of kwargs for each block; gradients flow back to ``prompts``."""
        return [{self.name: prompt} for prompt in self.prompts.unbind()]
