"""RemoteSwitchMixtureOfExperts: Switch Transformers' routing over remote experts. Owns: jitter, grid dropout, the
utilization of the grid, the balancing loss.

Calls and mixing are RemoteMixtureOfExperts'. The idea: Fedus, Zoph, Shazeer, "Switch Transformers: Scaling to Trillion
Parameter Models with Simple and Efficient Sparsity", https://arxiv.org/abs/2101.03961.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from moe.client.fan_out import Assignment
from moe.client.moe import RemoteMixtureOfExperts, gather_by_dim
from moe.client.remote_module import untraced
from moe.config import check_positive
from moe.errors import ConfigError
from moe.schema import Nested


def load_balancing_loss(grid_probs: Sequence[torch.Tensor], grid_utilization: Sequence[torch.Tensor]) -> torch.Tensor:
    """How unevenly a gate spreads its rows: the number of dimensions if all coordinates are used alike, more otherwise.

    :param grid_probs: for each dimension, probabilities (B, size)
    :param grid_utilization: for each dimension, the part of the rows that went to each coordinate, (size,)
    :returns: a scalar; its gradients are finite, also for coordinates that nobody used
    """
    return torch.stack(
        [
            (probs.mean(0) * utilization).mean() * len(utilization) ** 2
            for probs, utilization in zip(grid_probs, grid_utilization)
        ]
    ).sum()


class RemoteSwitchMixtureOfExperts(RemoteMixtureOfExperts):
    """A mixture in the manner of Switch Transformers: one expert per row (unless told), weighted by its probability and
    added to the input; and a loss that keeps the experts evenly used.

    Rows whose expert does not answer keep their input. Jitter, grid dropout and the moving average of the utilization
    are for training; ``eval()`` turns them off.

    :param grid_size: dimensions of the grid of experts
    :param utilization_alpha: weight of the past in the moving average of the utilization
    :param grid_dropout: probability to *keep* each coordinate of the grid for a batch (as in hivemind); of each
        dimension, one is always kept
    :param jitter_eps: the gate's input is multiplied by noise from 1 - jitter_eps to 1 + jitter_eps
    :param kwargs: those of RemoteMixtureOfExperts
    """

    grid_utilization: torch.Tensor

    def __init__(
        self,
        *,
        grid_size: Sequence[int],
        utilization_alpha: float = 0.9,
        grid_dropout: float = 1.0,
        jitter_eps: float = 1e-2,
        k_best: int = 1,
        k_min: int = 0,
        backward_k_min: int = 0,
        allow_zero_outputs: bool = True,
        **kwargs: Any,
    ):
        super().__init__(
            grid_size=grid_size,
            k_best=k_best,
            k_min=k_min,
            backward_k_min=backward_k_min,
            allow_zero_outputs=allow_zero_outputs,
            **kwargs,
        )
        self.utilization_alpha, self.grid_dropout, self.jitter_eps = utilization_alpha, grid_dropout, jitter_eps
        check_positive(self, "utilization_alpha", "grid_dropout", "jitter_eps", allow_none=False, allow_zero=True)
        if max(utilization_alpha, grid_dropout) > 1:
            raise ConfigError(f"utilization_alpha={utilization_alpha} and grid_dropout={grid_dropout} are at most 1")
        self.register_buffer("grid_utilization", torch.cat([torch.full((size,), 1 / size) for size in grid_size]))

    @untraced
    def forward(
        self,
        input: torch.Tensor,
        *args: Nested,
        batch_kwargs: Mapping[str, Nested] | None = None,
        global_kwargs: Mapping[str, Nested] | None = None,
        **kwargs: Nested,
    ) -> tuple[Nested, torch.Tensor]:
        """Route each row to its expert; see RemoteMixtureOfExperts.forward.

        :returns: outputs, nested as the experts return them, with the input added to the first; and the balancing loss
        """
        grid_scores = self._drop_coordinates(self._grid_scores(self._jitter(self._gating_input(input))))
        grid_probs = [scores.softmax(dim=-1) for scores in grid_scores]
        answers = self._call_experts(grid_scores, (input, *args), kwargs, batch_kwargs, global_kwargs)
        if self.training:
            self._update_utilization(answers.assignment)
        first, *others = answers.mix(self._pair_scores(grid_probs, answers.assignment))
        utilization = self.grid_utilization.split_with_sizes(list(self.beam_search.grid_size))
        return answers.schema.pack_outputs([first + input, *others]), load_balancing_loss(grid_probs, utilization)

    def compute_expert_scores(
        self, grid_probs: Sequence[torch.Tensor], batch_experts: Sequence[Sequence[Any]]
    ) -> torch.Tensor:
        """Probabilities of chosen experts: products of those of the grid; differentiable.

        :param grid_probs: for each dimension, (B, size)
        :param batch_experts: for each row, up to K experts (whatever has a ``uid``)
        :returns: (B, K); where a row has fewer experts, -inf
        """
        return super().compute_expert_scores(grid_probs, batch_experts)

    def _pair_scores(self, grid_probs: Sequence[torch.Tensor], assignment: Assignment) -> torch.Tensor:
        """(N,): the probability of each pair, the product over dimensions."""
        return gather_by_dim(grid_probs, assignment).prod(0)

    def _jitter(self, gating_input: torch.Tensor) -> torch.Tensor:
        if not self.training or self.jitter_eps == 0:
            return gating_input
        return gating_input * torch.empty_like(gating_input).uniform_(1 - self.jitter_eps, 1 + self.jitter_eps)

    def _drop_coordinates(self, grid_scores: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """Scores with -inf for coordinates that sit this batch out; never for all of a dimension."""
        if not self.training or self.grid_dropout == 1:
            return grid_scores
        dropped_scores = []
        for scores in grid_scores:
            draw = torch.rand(scores.shape[-1], device=scores.device)
            kept = (draw < self.grid_dropout) | (draw == draw.min())
            dropped_scores.append(scores.masked_fill(~kept, -torch.inf))
        return dropped_scores

    @torch.no_grad()
    def _update_utilization(self, assignment: Assignment) -> None:
        """Move the average towards where the rows of this batch went, dimension by dimension."""
        if not len(assignment.rows_N):
            return  # nobody answered, which says nothing about balance
        counts = [
            np.bincount(index_N, minlength=size)
            for index_N, size in zip(assignment.coordinates_ND.T, self.beam_search.grid_size)
        ]
        batch = torch.from_numpy(np.concatenate(counts) / len(assignment.rows_N)).to(self.grid_utilization)
        # not in place: the backward of an earlier forward may still need the old values
        self.grid_utilization = self.utilization_alpha * self.grid_utilization + (1 - self.utilization_alpha) * batch
