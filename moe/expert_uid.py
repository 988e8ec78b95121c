"""Names of experts. Owns: the grammar of uids and prefixes, grid coordinates, chains of uids. Knows no I/O.

The grammar is hivemind's (hivemind/moe/expert_uid.py): a name without dots, then one or more coordinates without leading
zeros. A prefix is the same with any number of coordinates and a trailing dot. Unlike in hivemind, a name has no spaces (they
separate the uids of a chain), and nothing else that cannot be seen.
"""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator
from typing import NamedTuple, Protocol

from moe.errors import ConfigError

ExpertUID = str
ExpertPrefix = str
Coordinate = int
Score = float

UID_DELIMITER = "."  # separates the name and the coordinates
CHAIN_DELIMITER = " "  # separates the uids of a chain (a span of blocks run in one request)
FLAT_EXPERT = -1  # subkey under which hivemind stores an expert with a single coordinate, under the prefix "name.0."
UID_PATTERN = re.compile(r"^(([^.\s])+)([.](?:[0]|([1-9]([0-9]*))))+$")
PREFIX_PATTERN = re.compile(r"^(([^.\s])+)([.](?:[0]|([1-9]([0-9]*))))*[.]$")
MAX_UID_LENGTH = 1024  # ours: bounds what a hostile peer can make us look up; hivemind has no limit


class PeerIDLike(Protocol):
    """What this package needs of hivemind's PeerID."""

    def to_base58(self) -> str: ...

    def to_bytes(self) -> bytes: ...


class ExpertInfo(NamedTuple):
    """Where an expert lives: its uid and the peer id of a server that hosts it."""

    uid: ExpertUID
    peer_id: PeerIDLike


def is_valid_uid(maybe_uid: str) -> bool:
    """True for a name followed by one or more coordinates, such as ``ffn.3.7``."""
    return _may_be_either(maybe_uid) and bool(UID_PATTERN.fullmatch(maybe_uid))


def is_valid_prefix(maybe_prefix: str) -> bool:
    """True for a name, any number of coordinates and a trailing dot, such as ``ffn.`` or ``ffn.3.``."""
    return _may_be_either(maybe_prefix) and bool(PREFIX_PATTERN.fullmatch(maybe_prefix))


def _may_be_either(text: str) -> bool:
    return len(text) <= MAX_UID_LENGTH and text.isprintable()


def split_uid(uid_or_prefix: ExpertUID | ExpertPrefix) -> tuple[ExpertPrefix, Coordinate]:
    """``ffn.3.7`` (or ``ffn.3.7.``) -> ``("ffn.3.", 7)``."""
    uid_or_prefix = uid_or_prefix.rstrip(UID_DELIMITER)
    pivot = uid_or_prefix.rindex(UID_DELIMITER) + 1
    return uid_or_prefix[:pivot], int(uid_or_prefix[pivot:])


def coordinates(uid: ExpertUID) -> tuple[Coordinate, ...]:
    """``ffn.3.7`` -> ``(3, 7)``."""
    return tuple(map(int, uid.split(UID_DELIMITER)[1:]))


def join_chain(uids: list[ExpertUID] | tuple[ExpertUID, ...]) -> str:
    """The name of several experts run one after another in one request."""
    return CHAIN_DELIMITER.join(uids)


def split_chain(chain: str) -> tuple[ExpertUID, ...]:
    """Inverse of join_chain; a plain uid is a chain of one, an empty string has none."""
    return tuple(filter(None, chain.split(CHAIN_DELIMITER)))


def block_range(text: str) -> range:
    """``"2:5"`` -> ``range(2, 5)``: blocks 2, 3 and 4.

    :raises ConfigError: if it is not that, or empty
    """
    matched = re.fullmatch(r"([0-9]{1,9}):([0-9]{1,9})", text)
    if matched is None or int(matched[1]) >= int(matched[2]):
        raise ConfigError(f"block_indices: expected FIRST:END, such as 0:3 for blocks 0, 1 and 2, got {text!r}")
    return range(int(matched[1]), int(matched[2]))


class UidPattern:
    """A pattern of uids such as ``ffn.[0:4].[0:256]``: fixed blocks and half-open ranges of coordinates.

    :raises ConfigError: if a block is neither fixed nor a range ``[from:to]``, or the uids would be invalid
    """

    def __init__(self, pattern: str):
        self.pattern = pattern
        self.blocks: list[str | range] = []
        for block in pattern.split(UID_DELIMITER):
            if "[" not in block and "]" not in block:
                self.blocks.append(block)
                continue
            matched = re.fullmatch(r"\[([0-9]{1,18}):([0-9]{1,18})\]", block)
            if matched is None or int(matched[1]) >= int(matched[2]):
                raise ConfigError(
                    f"Expert pattern {pattern} has invalid block {block}: "
                    f"Block must be either fixed or a range [from:to]"
                )
            self.blocks.append(range(int(matched[1]), int(matched[2])))
        example = UID_DELIMITER.join(str(b.start) if isinstance(b, range) else b for b in self.blocks)
        if not is_valid_uid(example):
            raise ConfigError(
                f"Expert pattern {pattern} gives invalid uids such as {example!r}; expected a name followed by one or "
                f"more coordinates, for example 'ffn.[0:4].[0:256]'"
            )

    def __len__(self) -> int:
        return math.prod(len(block) for block in self.blocks if isinstance(block, range))

    def __iter__(self) -> Iterator[ExpertUID]:
        choices = [block if isinstance(block, range) else (block,) for block in self.blocks]
        return (UID_DELIMITER.join(map(str, picked)) for picked in itertools.product(*choices))

    def __contains__(self, uid: object) -> bool:
        if not isinstance(uid, str) or not is_valid_uid(uid):
            return False
        parts = uid.split(UID_DELIMITER)
        return len(parts) == len(self.blocks) and all(
            part.isdigit() and part.isascii() and f"{int(part)}" == part and int(part) in block
            if isinstance(block, range)
            else part == block
            for part, block in zip(parts, self.blocks)
        )

    def sample(self, rng: random.Random) -> ExpertUID:
        """One uid of the pattern, uniformly at random."""
        picked = (str(rng.choice(block)) if isinstance(block, range) else block for block in self.blocks)
        return UID_DELIMITER.join(picked)
