"""A model as a row of numbered blocks. Owns: what a server must know of it to host any of them: names, number, making one.

The seam between those who have a model (a registered expert class, a checkpoint on disk) and those who decide which part of
it to host. Must not know: where blocks come from, or who hosts which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from moe.config import MAX_BLOCKS
from moe.errors import ConfigError
from moe.expert_uid import ExpertPrefix, ExpertUID, is_valid_prefix
from moe.server.expert_backend import ExpertBackend


@dataclass(frozen=True, kw_only=True)
class BlockSource:
    """Makes any block of a model.

    :param prefix: of the uids; block 3 of ``block.`` is ``block.3``
    :param total: number of blocks
    :param make: index -> a new backend with the uid ``f"{prefix}{index}"``. It makes the same weights whenever and wherever it
        is called, since several servers may host a block
    :raises ConfigError: a prefix that is none, or a model without blocks
    """

    prefix: ExpertPrefix
    total: int
    make: Callable[[int], ExpertBackend]

    def __post_init__(self) -> None:
        if not is_valid_prefix(self.prefix):
            raise ConfigError(f"block_prefix: expected a name and a dot, such as 'block.', got {self.prefix!r}")
        if not 1 <= self.total <= MAX_BLOCKS:
            raise ConfigError(f"a model has 1 to {MAX_BLOCKS} blocks, not {self.total}")

    def uid(self, index: int) -> ExpertUID:
        """Name of a block."""
        return f"{self.prefix}{index}"

    def check(self, indices: Iterable[int]) -> None:
        """Raise ConfigError for an index outside of the model."""
        outside = [index for index in indices if not 0 <= index < self.total]
        if outside:
            raise ConfigError(
                f"there is no block {outside[0]} in a model of {self.total} blocks (0 to {self.total - 1})"
            )

    def make_all(self, indices: Iterable[int]) -> dict[ExpertUID, ExpertBackend]:
        """New backends by uid."""
        return {self.uid(index): self.make(index) for index in indices}


def seed_of(*parts: object) -> int:
    """A seed for random weights that is the same on every machine, for the same parts."""
    text = "\n".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def seeded(seed: int, make: Callable[[], ExpertBackend]) -> ExpertBackend:
    """What ``make`` returns when torch's CPU random numbers start from a seed; they go on as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()
