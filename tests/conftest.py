"""For all tests: none may leave processes, threads or descriptors behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from tests.leaks import Snapshot, find_leaks

# Files that take long, the longest first: several workers end together if these do not begin last (each file has one worker)
LONG = (
    "docs/test_examples.py",
    "benchmarks/test_smoke.py",
    "swarm/test_soak.py",
    "swarm/test_stopping.py",
    "docs/test_snippets.py",
    "fuzz/test_fuzz.py",
    "swarm/test_sequential.py",
    "swarm/test_command_line.py",
    "swarm/test_restarts.py",
    "interop/test_switching.py",
    "swarm/test_rebalancing.py",
    "swarm/test_pretrained.py",
    "swarm/test_footprint.py",
    "swarm/test_deaths.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, else as they were."""
    here = Path(__file__).parent
    rank = {here / name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: rank.get(item.path, len(LONG)))


def pytest_addoption(parser: pytest.Parser) -> None:
    """What the command line of pytest takes besides."""
    parser.addoption("--transport", choices=("unix", "tls", "libp2p"), help="of clients in tests/swarm; default: auto")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What servers remember of this machine, they remember for these tests only."""
    with pytest.MonkeyPatch.context() as environment:
        directory = tmp_path_factory.mktemp("cache")
        environment.setenv("XDG_CACHE_HOME", str(directory))
        yield directory


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
