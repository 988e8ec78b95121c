"""Which blocks of a model a server should host. Owns: the choice of a first place, and whether moving to another one pays.

Pure: what is known of the swarm comes in, a decision goes out. Must not know: the DHT, servers, time.

The rules are those of Petals (``src/petals/server/block_selection.py``): host the blocks that the swarm serves slowest, that
is the window whose throughputs, sorted, come first; move when the swarm as a whole, after all others have moved to their best
places too, would be faster by more than ``balance_quality`` allows. What differs is deliberate: throughputs are whole
numbers, so that sums do not depend on their order and no server moves over a rounding error; in a swarm with missing blocks a
move that fills some is worth it even if others stay missing; and no server leaves a block without another holder, whatever
else speaks for it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Throughputs = npt.NDArray[np.int64]  # of each block, in units

_UNITS_PER_ROW_PER_S = 1000  # a server that says nothing of its speed counts as one unit: slow, but not missing
_MAX_ROWS_PER_S = 1e11  # a peer may claim anything; with this the sum over 2**16 servers stays within 63 bits
_MAX_ROUNDS = 4  # of all servers moving; what more rounds change is small, and with unequal servers there may be no end


class Span(NamedTuple):
    """Consecutive blocks that one server hosts, or is about to.

    :ivar start: first block
    :ivar end: after the last block
    :ivar rows_per_s: what the server says it can serve
    :ivar movable: whether it may go elsewhere, as one piece
    """

    start: int
    end: int
    rows_per_s: float
    movable: bool = True

    @property
    def units(self) -> int:
        """The throughput as a whole number; hostile values are cut off."""
        rows_per_s = self.rows_per_s if self.rows_per_s > 0 else 0.0  # also without nan
        return max(1, round(min(rows_per_s, _MAX_ROWS_PER_S) * _UNITS_PER_ROW_PER_S))


def sum_throughputs(spans: Iterable[Span], total_blocks: int) -> Throughputs:
    """Of each block; 0 where nobody hosts it."""
    sums = np.zeros(total_blocks, dtype=np.int64)
    for span in spans:
        sums[span.start : span.end] += span.units
    return sums


def choose_start(throughputs: Throughputs, num_blocks: int, present: int | None = None) -> int:
    """Where a server that can host ``num_blocks`` is needed most.

    :param throughputs: of each block, without the server's own part
    :param present: where the server is; it stays there if no other place is better
    :returns: the first such place
    """
    windows = np.sort(np.lib.stride_tricks.sliding_window_view(throughputs, num_blocks), axis=1)
    best = int(np.lexsort(windows.T[::-1])[0])
    if present is not None and np.array_equal(windows[present], windows[best]):
        return present
    return best


def plan_move(
    own: Span,
    others: Sequence[Span],
    held_by_others: Iterable[int],
    total_blocks: int,
    balance_quality: float,
    rng: random.Random,
) -> int | None:
    """Where this server should go, if that pays.

    :param own: what this server hosts
    :param others: what all others host, or are about to
    :param held_by_others: blocks that another server serves now, and does not say it leaves
    :param balance_quality: move if the slowest block is served slower than this part of what it could be. 0: never; above 1:
        whenever there is a better place
    :param rng: in which order the others are imagined to move
    :returns: first block of the new place, or None: stay
    """
    if balance_quality <= 0:
        return None
    num_blocks = own.end - own.start
    without = sum_throughputs(others, total_blocks)
    start = choose_start(without, num_blocks, own.start)
    left_behind = set(range(own.start, own.end)) - set(range(start, start + num_blocks))
    if start == own.start or not left_behind <= set(held_by_others):
        return None
    if balance_quality > 1:
        return start
    now = sum_throughputs([own, *others], total_blocks)
    moved = own._replace(start=start, end=start + num_blocks)
    after_own_move = sum_throughputs([moved, *others], total_blocks)
    if np.count_nonzero(after_own_move) > np.count_nonzero(now):
        return start  # fills a gap
    if now.min() >= balance_quality * now.mean():  # the slowest block cannot become faster than that
        return None
    settled = settle([moved, *others], total_blocks, rng)
    after = sum_throughputs(settled, total_blocks).min()
    return start if now.min() < balance_quality * after else None


def settle(spans: Sequence[Span], total_blocks: int, rng: random.Random) -> list[Span]:
    """Where all servers end up if they go to their best places in turn, until nobody wants to move any more."""
    spans = list(spans)
    throughputs = sum_throughputs(spans, total_blocks)
    order = [i for i, span in enumerate(spans) if span.movable]
    for _ in range(_MAX_ROUNDS):
        rng.shuffle(order)
        moved = False
        for i in order:
            span = spans[i]
            throughputs[span.start : span.end] -= span.units
            start = choose_start(throughputs, span.end - span.start, span.start)
            if start != span.start:
                span = spans[i] = span._replace(start=start, end=start + span.end - span.start)
                moved = True
            throughputs[span.start : span.end] += span.units
        if not moved:
            break
    return spans
