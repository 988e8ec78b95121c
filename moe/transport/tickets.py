"""Tickets for the direct link. Owns: what is in one, and that each is used once. Pure: no sockets, ``now`` is passed in."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from typing import Annotated

import msgspec

from moe.errors import ProtocolError
from moe.wire.frames import SECRET_BYTES

TICKET_LIFETIME_S = 30.0
MAX_TICKETS = 4096  # issued and not used yet
MAX_TICKETS_PER_PEER = 16

Secret = Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Ticket(msgspec.Struct, kw_only=True, frozen=True):
    """What a client needs to dial.

    :ivar secret: to be shown by the client, once
    :ivar proof: to be shown by the server in return
    :ivar unix_path: of the server's socket, if the client should be on the same host; it sees whether it is there
    :ivar addresses: host and port of the TLS listener, to be tried in order
    :ivar fingerprint: SHA-256 of the server's certificate
    """

    secret: Secret
    proof: Secret
    unix_path: Annotated[str, msgspec.Meta(max_length=256)] = ""
    addresses: Annotated[
        tuple[tuple[Annotated[str, msgspec.Meta(max_length=256)], Port], ...], msgspec.Meta(max_length=16)
    ] = ()
    fingerprint: Secret


def encode_ticket(ticket: Ticket) -> bytes:
    """Ticket -> MessagePack."""
    return msgspec.msgpack.encode(ticket)


def decode_ticket(data: bytes) -> Ticket:
    """Inverse of encode_ticket.

    :raises ProtocolError: anything else
    """
    try:
        return msgspec.msgpack.decode(data, type=Ticket)
    except (msgspec.MsgspecError, ValueError, RecursionError) as e:
        raise ProtocolError(f"malformed ticket: {e}"[:300]) from None


class TicketOffice:
    """Issues single-use tickets and recognizes them. Pure: ``now`` is passed in."""

    def __init__(self) -> None:
        self._open: OrderedDict[bytes, tuple[float, str, bytes]] = OrderedDict()  # secret -> expiry, peer, proof

    def issue(self, peer: str, now: float) -> tuple[bytes, bytes]:
        """A new (secret, proof) for a peer; its oldest tickets, and expired ones, are void when there are too many."""
        while self._open and next(iter(self._open.values()))[0] <= now:
            self._open.popitem(last=False)
        own = [secret for secret, (_, owner, _) in self._open.items() if owner == peer]
        for secret in own[: max(0, len(own) - MAX_TICKETS_PER_PEER + 1)]:
            del self._open[secret]
        while len(self._open) >= MAX_TICKETS:
            self._open.popitem(last=False)
        secret, proof = secrets.token_bytes(SECRET_BYTES), secrets.token_bytes(SECRET_BYTES)
        self._open[secret] = (now + TICKET_LIFETIME_S, peer, proof)
        return secret, proof

    def redeem(self, secret: bytes, now: float) -> tuple[str, bytes] | None:
        """(peer, proof) of a valid ticket, which is void from now on; None for anything else."""
        found = self._open.pop(secret, None)
        return found[1:] if found is not None and found[0] > now else None
