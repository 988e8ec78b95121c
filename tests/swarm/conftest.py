"""Fixtures for tests on real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from moe.config import ClientConfig
from moe.dht import DHT, start_dht, stop_dht
from tests.swarm.tools import LOOPBACK, connect, prepare_processes


@pytest.fixture(scope="session", autouse=True)
def other_processes() -> None:
    """Before the first test, so that no test is said to have left that behind."""
    prepare_processes()


@pytest.fixture(scope="session", autouse=True)
def transport_of_choice(request: pytest.FixtureRequest) -> Iterator[None]:
    """With ``--transport``, clients that do not say how their tensors travel use this transport and no other."""
    chosen = request.config.getoption("--transport")
    defaults = ClientConfig.__init__.__kwdefaults__
    assert defaults is not None
    before = defaults["transport"]
    defaults["transport"] = chosen or before
    yield
    defaults["transport"] = before


@pytest.fixture(scope="module")
def dht() -> Iterator[DHT]:
    """The clients' node: a new swarm for each file of tests. Servers join it."""
    dht = start_dht(**LOOPBACK)
    connect(dht)
    yield dht
    stop_dht(dht)
