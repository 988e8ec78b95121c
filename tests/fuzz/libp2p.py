"""Fuzzer of the libp2p streams: ``python -m tests.fuzz.libp2p --seconds 1800``. See tests/fuzz/rounds.py."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from moe.dht import resolve_p2p, start_dht, stop_dht
from tests.fuzz.hostile_libp2p import BEHAVIOURS, attack
from tests.fuzz.rounds import Fuzzer, main, start
from tests.fuzz.server import FuzzedServer
from tests.swarm.tools import LOOPBACK

TRANSPORTS = ("libp2p", "unix")


class _Peers:
    """The hostile clients' daemon, made with the first of them. (It stays when their processes are killed.)"""

    def __init__(self) -> None:
        self._dht: Any = None
        self._maddr = ""

    def launch(self, server: FuzzedServer, rng: random.Random, seconds: float, only: Sequence[str]) -> Any:
        """A hostile client."""
        if self._dht is None:
            self._dht = start_dht(list(server.peers), **LOOPBACK)
            self._maddr = str(resolve_p2p(self._dht))
        return start(attack, self._maddr, server.peer_id.to_base58(), rng.getrandbits(32), seconds, only)

    def close(self) -> None:
        """End the daemon."""
        if self._dht is not None:
            stop_dht(self._dht)


class LibP2PFuzzer(Fuzzer):
    """The fuzzer, with the daemon of its hostile clients."""

    def __init__(self, seed: int, only: Sequence[str] = ()):
        self._peers = _Peers()
        super().__init__(self._peers.launch, TRANSPORTS, seed, only)

    def __exit__(self, *exc: object) -> None:
        super().__exit__(*exc)
        self._peers.close()


if __name__ == "__main__":
    main(LibP2PFuzzer, list(BEHAVIOURS))
