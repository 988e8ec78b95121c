"""Short runs of the fuzzers; ``python -m tests.fuzz.link --seconds 1800`` is a long one. The seed of each round is printed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from tests.fuzz import libp2p, link
from tests.fuzz.rounds import Fuzzer
from tests.swarm.tools import report

SECONDS = 9.0  # of rounds; what is around them takes a few more


@pytest.mark.parametrize("make", [link.make, libp2p.LibP2PFuzzer], ids=["link", "libp2p"])
def test_hostile_clients_leave_nothing_behind_and_harm_nobody(make: Callable[[int], Fuzzer]) -> None:
    seed = random.SystemRandom().getrandbits(32)
    report(f"seed {seed}")
    with make(seed) as fuzzer:
        fuzzer.run(SECONDS)
