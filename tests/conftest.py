"""For all tests: none may leave processes, threads or descriptors behind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import uvloop

from tests.leaks import Snapshot, find_leaks


@pytest.fixture(scope="session", autouse=True)
def process_wide_descriptors() -> None:
    """libuv opens a signal pipe once per process, with its first loop, and keeps it."""
    uvloop.new_event_loop().close()


@pytest.fixture(autouse=True)
def nothing_left_behind() -> Iterator[None]:
    """Fail a test that leaves something behind. What fixtures of a wider scope hold was there before."""
    before = Snapshot.take()
    yield
    leaks = find_leaks(before)
    if leaks:
        pytest.fail("left behind:\n  " + "\n  ".join(leaks), pytrace=False)
