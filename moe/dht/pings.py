"""Round trips to peers. Owns: how one is measured.

By hivemind's DHT ping, from the DHT process: the cheapest request that every peer answers, stock ones too, and one that waits
for no expert. Must not know: who wants to know, or why.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Sequence

from hivemind.dht import DHT, DHTNode
from hivemind.p2p import PeerID
from hivemind.proto import dht_pb2

from moe.dht.process import call

PING_TIMEOUT_S = 2.0  # as Petals
_AT_ONCE = 16  # more would measure how busy this process is; ours
_GRACE_S = 5.0  # for the DHT process to answer at all


def ping_peers(dht: DHT, peers: Sequence[str], timeout_s: float = PING_TIMEOUT_S) -> dict[str, float]:
    """Measure round trips.

    :param peers: base58 peer ids
    :param timeout_s: for each of them
    :returns: seconds by peer id; infinity for one that does not answer
    :raises CallTimeout: if the DHT process does not answer
    :raises LifecycleError: if the DHT is not running
    """
    if not peers:
        return {}
    most_s = timeout_s * -(-len(peers) // _AT_ONCE) + _GRACE_S
    return call(dht, f"pinging {len(peers)} peers", _ping_all, list(peers), timeout_s, timeout_s=most_s)


async def _ping_all(node: DHTNode, peers: list[str], timeout_s: float) -> dict[str, float]:
    room = asyncio.Semaphore(_AT_ONCE)

    async def ping(peer: str) -> float:
        async with room:
            try:
                return await asyncio.wait_for(_round_trip(node, PeerID.from_base58(peer)), timeout_s)
            except Exception:  # whatever libp2p says
                return math.inf

    return dict(zip(peers, await asyncio.gather(*map(ping, peers))))


async def _round_trip(node: DHTNode, peer_id: PeerID) -> float:
    """The second of two: the first one may have to open the connection."""
    if peer_id == node.peer_id:  # which libp2p does not dial
        return 0.0
    elapsed_s = math.inf
    for _ in range(2):
        begin = time.perf_counter()
        try:
            await node.protocol.get_stub(peer_id).rpc_ping(dht_pb2.PingRequest())
        except Exception as e:
            if "not supported" not in str(e):  # so says a peer whose DHT is in client mode: it was reached
                raise
        elapsed_s = time.perf_counter() - begin
    return elapsed_s
