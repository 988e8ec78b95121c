"""Freed memory is given back when a server has been idle for a while, once."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from moe.server.heap import IDLE_BEFORE_TRIM_S, HeapTrimmer, _malloc_trim, trim_heap


def test_trims_once_after_each_time_of_work() -> None:
    trims: list[int] = []
    trimmer = HeapTrimmer(lambda: trims.append(1))
    now = 100.0
    trimmer.look(0, False, now)
    trimmer.look(0, False, now + 10 * IDLE_BEFORE_TRIM_S)
    assert not trims, "there was no work yet"
    for work in range(1, 4):
        trimmer.look(work, True, now)
        trimmer.look(work, False, now + IDLE_BEFORE_TRIM_S / 2)
        assert len(trims) == work - 1
        for later in (1.0, 2.0, 5.0):
            trimmer.look(work, False, now + later * IDLE_BEFORE_TRIM_S)
        assert len(trims) == work
        now += 100.0


def test_a_request_that_takes_long_is_no_idle_time() -> None:
    trims: list[int] = []
    trimmer = HeapTrimmer(lambda: trims.append(1))
    for i in range(20):
        trimmer.look(1, True, float(i))
    assert not trims


def test_what_was_held_and_is_dropped_is_given_back() -> None:
    trims: list[int] = []
    trimmer = HeapTrimmer(lambda: trims.append(1))
    for now, held_bytes in enumerate((0, 10, 10, 10, 0, 0, 0, 0)):
        trimmer.look(0, False, now * IDLE_BEFORE_TRIM_S, held_bytes)
    assert len(trims) == 1


def test_requests_that_come_and_go_between_two_looks_count_as_work() -> None:
    trims: list[int] = []
    trimmer = HeapTrimmer(lambda: trims.append(1))
    for i in range(20):
        trimmer.look(i, False, i * IDLE_BEFORE_TRIM_S / 2)
    assert not trims
    trimmer.look(19, False, math.inf)
    assert trims


def test_holes_in_the_heap_are_given_back() -> None:
    if _malloc_trim() is None:  # not glibc: trimming does nothing
        return
    blocks = [torch.ones(2**16) for _ in range(1000)]  # 256 KiB each
    kept = blocks[::10]
    full = _rss_bytes()
    del blocks
    trim_heap()
    assert full - _rss_bytes() > 100 * 2**20
    assert all(block.sum() == 2**16 for block in kept)


def _rss_bytes() -> int:
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return 1024 * int(fields["VmRSS"].split()[0])
