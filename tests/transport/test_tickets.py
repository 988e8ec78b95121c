"""Tickets: used once, expire, bounded, and decoded strictly."""

import pytest

from moe.errors import ProtocolError
from moe.transport.tickets import (
    MAX_TICKETS,
    MAX_TICKETS_PER_PEER,
    TICKET_LIFETIME_S,
    Ticket,
    TicketOffice,
    decode_ticket,
    encode_ticket,
)


def test_a_ticket_is_used_once_and_tells_whose_it_is() -> None:
    office = TicketOffice()
    secret, proof = office.issue("alice", now=0.0)
    assert office.redeem(secret, now=1.0) == ("alice", proof)
    assert office.redeem(secret, now=1.0) is None


def test_a_ticket_expires() -> None:
    office = TicketOffice()
    secret, _ = office.issue("alice", now=0.0)
    assert office.redeem(secret, now=TICKET_LIFETIME_S) is None


def test_strangers_guess_in_vain() -> None:
    office = TicketOffice()
    office.issue("alice", now=0.0)
    assert office.redeem(bytes(32), now=0.0) is None


def test_one_peer_cannot_use_up_the_office() -> None:
    office = TicketOffice()
    honest, proof = office.issue("bob", now=0.0)
    for _ in range(MAX_TICKETS_PER_PEER + 10):
        last, _ = office.issue("mallory", now=0.0)
    assert office.redeem(honest, now=1.0) == ("bob", proof)
    assert office.redeem(last, now=1.0) is not None


def test_the_number_of_open_tickets_is_bounded() -> None:
    office = TicketOffice()
    first, _ = office.issue("peer", now=0.0)
    for i in range(MAX_TICKETS):
        office.issue(f"peer{i}", now=0.0)
    assert office.redeem(first, now=0.0) is None


def test_round_trip() -> None:
    ticket = Ticket(
        secret=b"s" * 32, proof=b"p" * 32, unix_path="/x", addresses=(("10.0.0.1", 31337),), fingerprint=b"f" * 32
    )
    assert decode_ticket(encode_ticket(ticket)) == ticket


@pytest.mark.parametrize(
    "data", [b"", b"garbage", b"\x80", encode_ticket(Ticket(secret=b"", proof=b"", fingerprint=b""))]
)
def test_malformed_tickets_are_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError):
        decode_ticket(data)
