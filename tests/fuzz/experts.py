"""What the fuzzed server hosts: experts whose answers a client can check, with the same weights in every process.

Legend: B = rows, S = any length, R = any rank.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from moe.schema import BatchTensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.layers.common import FeedforwardBlock, NopExpert
from tests.swarm.experts import make_backend

NOP_WIDTH = 1024  # 4 KiB a row
FFN_WIDTH = 64
SMALL_WIDTH = 8
SLOTS = 1024  # of ``Slots``; the first ones are those of hostile clients
HOSTILE_SLOTS = 64
WIDE_VALUES = 2**18  # a mebibyte a row
MAX_NAP_S = 0.2


class Slots(nn.Module):
    """A weight for each client, which only its owner trains: with a rate of 1 it counts exactly what its owner sent."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(SLOTS))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, SLOTS) -> (B, SLOTS)"""
        return x * self.weight


class Nap(nn.Module):
    """Keeps the Runtime busy for a moment, so that requests wait."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, SMALL_WIDTH) -> (B, SMALL_WIDTH), after as many seconds as its first value says"""
        if len(x):
            time.sleep(min(MAX_NAP_S, max(0.0, float(torch.nan_to_num(x.detach()[0, 0])))))
        return x * self.weight


def make_backends() -> dict[str, ExpertBackend]:
    """All experts, by uid."""
    torch.manual_seed(0)
    slots, ffn, nap = Slots(), FeedforwardBlock(FFN_WIDTH), Nap()
    flat: dict[str, Any] = {"args_schema": (BatchTensorProto(SMALL_WIDTH),)}
    backends = (
        ExpertBackend("nop.0", NopExpert(NOP_WIDTH), args_schema=(BatchTensorProto(NOP_WIDTH),)),
        make_backend("wide", "wide.0", max_batch_size=8),
        make_backend("mixer", "mixer.0"),
        make_backend("adapted", "adapted.0", width=FFN_WIDTH),
        ExpertBackend(
            "slots.0", slots, torch.optim.SGD(slots.parameters(), lr=1.0), args_schema=(BatchTensorProto(SLOTS),)
        ),
        ExpertBackend(
            "ffn.0", ffn, torch.optim.Adam(ffn.parameters(), lr=1e-4), args_schema=(BatchTensorProto(FFN_WIDTH),)
        ),
        ExpertBackend(
            "nap.0", nap, torch.optim.SGD(nap.parameters(), lr=0.0), outputs_schema=BatchTensorProto(8), **flat
        ),
    )
    return {backend.name: backend for backend in backends}
