"""A transport inside one process, for tests: no sockets, but the same encoding, bounds and errors as on the wire.

Owns: handing encoded calls to an ExpertService. Part of the public test kit (``moe.testing``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from moe.errors import ConnectError
from moe.expert_uid import PeerIDLike
from moe.transport.base import Call, ExpertService, Reply, within
from moe.transport.in_process import describe, serve
from moe.wire.messages import ExpertDescription


@dataclass(frozen=True)
class MemoryPeer:
    """A peer id for tests: any name."""

    name: str

    def to_base58(self) -> str:
        """The name."""
        return self.name

    def to_bytes(self) -> bytes:
        """The name."""
        return self.name.encode()


class MemoryTransport:
    """Carries calls to services in this process, as bytes.

    :param services: by peer name; a peer that is missing (or was removed) cannot be connected to
    :param caller: the peer name that services see
    """

    def __init__(self, services: Mapping[str, ExpertService], caller: str = "client"):
        self.services, self.caller = services, caller
        self.calls: list[tuple[str, str, str]] = []  # (peer, method, uid), for assertions

    def _service(self, peer: PeerIDLike) -> ExpertService:
        service = self.services.get(peer.to_base58())
        if service is None:
            raise ConnectError("the peer cannot be reached", peer=peer.to_base58())
        return service

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        self.calls.append((peer.to_base58(), "info", uid))
        return describe(self._service(peer), self.caller, uid)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        self.calls.append((peer.to_base58(), call.method, call.uid))
        name = peer.to_base58()
        serving = serve(self._service(peer), self.caller, name, call)
        return await within(serving, timeout_s, f"{call.method} of {call.uid}", name)

    async def close(self) -> None:
        """Nothing to close."""
