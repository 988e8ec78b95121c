"""Fixtures for tests on real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe.dht import DHT, start_dht, stop_dht
from tests.swarm.tools import LOOPBACK, connect, prepare_processes


@pytest.fixture(scope="session", autouse=True)
def other_processes() -> None:
    """Before the first test, so that no test is said to have left that behind."""
    prepare_processes()


@pytest.fixture(scope="module")
def dht() -> Iterator[DHT]:
    """The clients' node: a new swarm for each file of tests. Servers join it."""
    dht = start_dht(**LOOPBACK)
    connect(dht)
    yield dht
    stop_dht(dht)
