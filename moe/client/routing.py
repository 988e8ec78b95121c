"""Which servers run which blocks. Owns: what is known of servers, bans, round trips, and the choice of a route.

Pure: ``now`` is passed in, in the seconds of any one monotonic clock. Must not know: how servers are found, pinged or called.
"""

from __future__ import annotations

from dataclasses import dataclass

from moe.expert_uid import PeerIDLike


@dataclass(frozen=True)
class Span:
    """Consecutive blocks that one server runs in one request.

    :ivar peer_id: the server
    :ivar start: its first block
    :ivar end: the block after its last one
    """

    peer_id: PeerIDLike
    start: int
    end: int

    def __len__(self) -> int:
        return self.end - self.start

    def __str__(self) -> str:
        return f"{self.start}:{self.end} via ...{self.peer_id.to_base58()[-6:]}"
