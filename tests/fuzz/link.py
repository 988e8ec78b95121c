"""Fuzzer of the direct link: ``python -m tests.fuzz.link --seconds 1800``. See tests/fuzz/rounds.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from tests.fuzz.hostile_link import BEHAVIOURS, attack
from tests.fuzz.rounds import Fuzzer, main, start
from tests.fuzz.server import FuzzedServer

TRANSPORTS = ("unix", "tls")
_TICKETS = 12  # of one hostile client
_PEERS = 3  # hostile ones


def launch(server: FuzzedServer, rng: random.Random, seconds: float, only: Sequence[str]) -> Any:
    """A hostile client of one of a few peers."""
    peer = f"hostile-{rng.randrange(_PEERS)}"
    return start(attack, server.tickets(peer, _TICKETS), rng.getrandbits(32), seconds, only)


def make(seed: int, only: Sequence[str] = ()) -> Fuzzer:
    """The fuzzer."""
    return Fuzzer(launch, TRANSPORTS, seed, only)


if __name__ == "__main__":
    main(make, list(BEHAVIOURS))
