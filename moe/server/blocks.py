"""A model as a row of numbered blocks. Owns: what a server must know of it to host any of them: names, number, making one.

The seam between those who have a model (a registered expert class, a checkpoint on disk) and those who decide which part of
it to host. Must not know: where blocks come from, or who hosts which.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from moe.config import MAX_BLOCKS
from moe.errors import ConfigError
from moe.expert_uid import ExpertPrefix, ExpertUID, is_valid_prefix
from moe.server.expert_backend import ExpertBackend

T = TypeVar("T")


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


def seeded(seed: int, make: Callable[[], T]) -> T:
    """What ``make`` returns when the numbers that torch draws for it on the CPU come from a generator with this seed.

    Not by seeding torch's own generator: all threads share that, and an expert may be drawing from it at this moment.
    """
    with _OwnRandomNumbers(seed):
        return make()


class _OwnRandomNumbers(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """In this thread, operations that draw random numbers take them from a generator of ours."""

    def __init__(self, seed: int):
        super().__init__()  # type: ignore[no-untyped-call]
        self._generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._overloadname
        taking = "generator" if name == "default" else f"{name}_generator"
        if taking in func.overloadpacket.overloads():  # randn, randint, ...: another overload takes one
            func = getattr(func.overloadpacket, taking)
        if any(argument.name == "generator" for argument in func._schema.arguments):
            kwargs = {**kwargs, "generator": kwargs.get("generator") or self._generator}
        return func(*args, **kwargs)
