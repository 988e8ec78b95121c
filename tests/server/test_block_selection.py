"""Where a server goes in a swarm: the place that is needed most, only if it pays, and never leaving a gap behind."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.server.block_selection import Span, choose_start, plan_move, settle, sum_throughputs

QUALITY = 0.75  # the default


def held(spans: Sequence[Span]) -> set[int]:
    """Blocks that somebody hosts."""
    return {block for span in spans for block in range(span.start, span.end)}


def plan(
    own: Span, others: Sequence[Span], total_blocks: int, quality: float = QUALITY, leaving: Sequence[Span] = ()
) -> int | None:
    """plan_move; ``leaving``: of the others, those that do not count as holders."""
    holders = held([span for span in others if span not in leaving])
    return plan_move(own, others, holders, total_blocks, quality, random.Random(0))


def spans_in(total_blocks: int) -> st.SearchStrategy[Span]:
    def make(place: tuple[int, int], rows_per_s: float, movable: bool) -> Span:
        start, end = sorted(place)
        return Span(start, end + 1, rows_per_s, movable)

    index = st.integers(0, total_blocks - 1)
    return st.builds(make, st.tuples(index, index), st.sampled_from([0.0, 1.0, 7.5, 100.0, 1e18]), st.booleans())


# --- a first place ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("throughputs", "num_blocks", "start"),
    [
        ([0, 0, 0, 0], 2, 0),  # an empty swarm is filled from its first block
        ([5, 5, 0, 0], 2, 2),
        ([5, 5, 0, 5], 2, 1),  # all windows with the gap are equal: the first
        ([5, 1, 2, 5], 2, 1),  # two slow blocks rather than one
        ([9, 2, 9, 9, 2, 8], 2, 4),  # equal slowest blocks: then the next slowest decides
        ([3, 1, 2], 3, 0),
        ([4], 1, 0),
    ],
)
def test_the_slowest_window_is_chosen(throughputs: list[int], num_blocks: int, start: int) -> None:
    assert choose_start(np.array(throughputs), num_blocks) == start


@given(st.data())
def test_no_window_is_needed_more_than_the_chosen_one(data: st.DataObject) -> None:
    throughputs = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=9))
    num_blocks = data.draw(st.integers(1, len(throughputs)))
    windows = [sorted(throughputs[i : i + num_blocks]) for i in range(len(throughputs) - num_blocks + 1)]
    assert choose_start(np.array(throughputs), num_blocks) == windows.index(min(windows))
    for present, window in enumerate(windows):
        chosen = choose_start(np.array(throughputs), num_blocks, present)
        assert chosen == (present if window == min(windows) else windows.index(min(windows)))


@given(st.lists(spans_in(8), max_size=6), st.randoms(use_true_random=False))
def test_sums_do_not_depend_on_the_order(spans: list[Span], rng: random.Random) -> None:
    before = sum_throughputs(spans, 8)
    rng.shuffle(spans)
    assert np.array_equal(before, sum_throughputs(spans, 8))
    assert set(np.flatnonzero(before)) == held(spans)  # who says 0 rows/s is slow, not missing


@pytest.mark.parametrize("claimed", [math.inf, 1e300, 1e18, -1.0, math.nan, 0.0])
def test_what_hostile_servers_claim_stays_in_bounds(claimed: float) -> None:
    spans = [Span(0, 2, claimed)] * 2**16
    assert (sum_throughputs(spans, 2) >= 2**16).all()


# --- whether to move --------------------------------------------------------------------------------------------------


def test_one_of_two_servers_on_the_same_blocks_fills_the_gap() -> None:
    twins = Span(0, 4, 100.0)
    assert plan(twins, [twins], 8) == 4
    assert plan(twins, [twins, Span(4, 8, 100.0)], 12) == 8
    assert plan(twins, [twins], 12) == 4  # the swarm stays incomplete, but is less so


def test_a_balanced_swarm_is_left_alone() -> None:
    spans = [Span(0, 4, 100.0), Span(4, 8, 100.0)]
    for quality in (QUALITY, 1.5):
        assert plan(spans[0], spans[1:], 8, quality) is None
        assert plan(spans[0], spans, 8, quality) is None  # the third of three servers: no place is better


def test_the_last_holder_of_a_block_stays() -> None:
    own = Span(0, 4, 100.0)
    for quality in (QUALITY, 1.5):
        assert plan(own, [], 8, quality) is None
        assert plan(own, [Span(1, 4, 100.0)], 8, quality) is None  # block 0 has no other holder
        assert plan(own, [Span(0, 4, 1.0)], 8, quality) == 4


def test_a_server_that_leaves_is_no_holder() -> None:
    twin, gone = Span(0, 4, 100.0), Span(0, 4, 1.0)
    assert plan(twin, [gone], 8) == 4
    assert plan(twin, [gone], 8, leaving=[gone]) is None


def test_blocks_that_stay_need_no_other_holder() -> None:
    assert plan(Span(2, 6, 100.0), [Span(0, 4, 100.0)], 8) == 4


@pytest.mark.parametrize(("quality", "start"), [(0.0, None), (0.5, None), (0.75, 0), (1.5, 0)])
def test_balance_quality(quality: float, start: int | None) -> None:
    """The slowest block is served at 200 rows/s, and at 300 if one of the four on the other side moves: quality 2/3."""
    others = [Span(0, 2, 100.0)] * 2 + [Span(2, 4, 100.0)] * 3
    assert plan(Span(2, 4, 100.0), others, 4, quality) == start


def test_a_move_that_gains_little_is_not_made() -> None:
    others = [Span(0, 2, 100.0)] * 9 + [Span(2, 4, 100.0)] * 10
    assert plan(Span(2, 4, 100.0), others, 4) is None
    assert plan(Span(2, 4, 100.0), others, 4, 1.5) == 0


def test_a_gap_is_filled_by_those_who_can() -> None:
    """The gap is behind the next span: each server shifts a little, one after another, and no block is ever left."""
    spans = [Span(0, 3, 10.0), Span(0, 3, 10.0), Span(3, 6, 10.0)]
    assert plan(spans[2], spans[:2], 9) is None
    assert plan(spans[1], [spans[0], spans[2]], 9) == 6


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_move_ever_uncovers_a_block_or_leaves_the_model(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 10))
    own, *others = data.draw(st.lists(spans_in(total), min_size=1, max_size=7))
    holders = data.draw(st.sets(st.integers(0, total - 1)))
    quality = data.draw(st.sampled_from([0.3, QUALITY, 2.0]))
    start = plan_move(own, others, holders, total, quality, random.Random(0))
    if start is not None:
        length = own.end - own.start
        assert 0 <= start <= total - length
        assert start != own.start
        assert set(range(own.start, own.end)) <= holders | set(range(start, start + length))
        again = own._replace(start=start, end=start + length)
        everywhere = holders | set(range(total))
        assert plan_move(again, others, everywhere, total, quality, random.Random(0)) is None  # it does not go on


@settings(deadline=None)
@given(st.data())
def test_settling_keeps_servers_and_those_that_cannot_move_in_place(data: st.DataObject) -> None:
    total = data.draw(st.integers(1, 8))
    spans = data.draw(st.lists(spans_in(total), min_size=1, max_size=6))
    settled = settle(spans, total, random.Random(0))
    for before, after in itertools.zip_longest(spans, settled):
        assert after.end - after.start == before.end - before.start
        assert 0 <= after.start <= after.end <= total
        assert after == before or before.movable
    assert sum_throughputs(settled, total).sum() == sum_throughputs(spans, total).sum()


# --- swarms -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("begin", ["joined one by one", "anywhere", "all in one place"])
@pytest.mark.parametrize(
    ("servers", "total_blocks", "lengths", "speeds"),
    [(40, 24, (4, 6), (100.0,)), (60, 48, (4, 8, 12), (50.0, 100.0, 400.0)), (200, 16, (1, 4, 8), (10.0, 1000.0))],
)
def test_swarms_settle_in_a_good_state(
    servers: int, total_blocks: int, lengths: tuple[int, ...], speeds: tuple[float, ...], begin: str
) -> None:
    """Servers look in random order, as in reality. They come to rest within a few rounds, the slowest block ends near the
    mean of all, servers that joined one by one have nothing to do, and no block that was held is ever left."""
    rng = random.Random(servers)
    spans: list[Span] = []
    for _ in range(servers):
        length, speed = rng.choice(lengths), rng.choice(speeds)
        start = {
            "joined one by one": choose_start(sum_throughputs(spans, total_blocks), length),
            "anywhere": rng.randrange(total_blocks - length + 1),
            "all in one place": 0,
        }[begin]
        spans.append(Span(start, start + length, speed))
    moves = 0
    for _ in range(8):
        before = moves
        for i in rng.sample(range(servers), servers):
            own, others = spans[i], spans[:i] + spans[i + 1 :]
            better = plan_move(own, others, held(others), total_blocks, QUALITY, rng)
            if better is not None:
                covered = held(spans)
                spans[i] = own._replace(start=better, end=better + own.end - own.start)
                assert covered <= held(spans)
                moves += 1
        if moves == before:
            break
    else:
        pytest.fail(f"still moving after 8 rounds, {moves} moves")
    throughputs = sum_throughputs(spans, total_blocks)
    assert throughputs.min() > 0.6 * throughputs.mean()
    assert moves <= (0 if begin == "joined one by one" else servers)
