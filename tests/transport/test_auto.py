"""Dialing in the background: nobody waits long for a link that cannot be had, and whoever can have one gets it later."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
import torch

from moe.errors import CallTimeout, ConnectError, MoEError
from moe.transport import auto as auto_module
from moe.transport.auto import (
    FIRST_DIAL_WAIT_S,
    MAX_RETRY_DIRECT_AFTER_S,
    RETRY_DIRECT_AFTER_S,
    AutoTransport,
    _Dialing,
)
from moe.transport.base import Call, Reply
from moe.transport.direct import DirectClient
from moe.transport.memory import MemoryPeer
from moe.transport.tickets import Ticket
from moe.wire.messages import ExpertDescription
from tests.experts import HIDDEN
from tests.transport.test_direct import Host, forward_call, lora_host

PEER = MemoryPeer("s")


class LibP2P:
    """Stands for libp2p below AutoTransport; a ticket takes as long as a test wants."""

    def __init__(self, ticket: Callable[[], Any]):
        self._ticket, self.calls, self.tickets = ticket, 0, 0

    async def info(self, peer: Any, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        raise NotImplementedError

    async def call(self, peer: Any, call: Call, *, timeout_s: float | None) -> Reply:
        self.calls += 1
        return Reply(None, [])

    async def ticket(self, peer: Any, *, timeout_s: float | None) -> Ticket:
        self.tickets += 1
        ticket = self._ticket()
        return await ticket if asyncio.iscoroutine(ticket) else ticket

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def auto(ticket: Callable[[], Any], mode: str = "auto") -> AsyncIterator[tuple[AutoTransport, LibP2P]]:
    below = LibP2P(ticket)
    transport = AutoTransport(below, mode)
    try:
        yield transport, below
    finally:
        await transport.close()


async def call_once(transport: AutoTransport, timeout_s: float | None = 10.0) -> float:
    """Seconds that a call took."""
    begin = time.monotonic()
    await transport.call(PEER, forward_call(torch.ones(2, 1, HIDDEN)), timeout_s=timeout_s)
    return time.monotonic() - begin


async def hang() -> Ticket:
    await asyncio.sleep(60)
    raise AssertionError


def failing(error: Exception) -> Callable[[], Ticket]:
    def ticket() -> Ticket:
        raise error

    return ticket


def dropping() -> Ticket:
    """The port of a host whose firewall drops packets: TEST-NET-1 of RFC 5737."""
    return Ticket(secret=bytes(32), proof=bytes(32), fingerprint=bytes(32), addresses=(("192.0.2.1", 9),) * 2)


@pytest.fixture
def host() -> Any:
    with lora_host() as host:
        yield host


@pytest.mark.parametrize("ticket", [hang, dropping], ids=["ticket", "dial"])
def test_a_dial_that_hangs_costs_a_second_once(host: Host, ticket: Callable[[], Any]) -> None:
    async def work() -> tuple[list[float], int]:
        async with auto(ticket) as (transport, below):
            at_once = await asyncio.gather(*(call_once(transport) for _ in range(5)))
            return [*at_once, *[await call_once(transport) for _ in range(20)]], below.tickets

    times, tickets = host.client_loop.run(work(), 30.0)
    assert max(times) < FIRST_DIAL_WAIT_S + 1.0
    assert max(times[5:]) < 0.5
    assert tickets == 1


def test_short_calls_wait_for_half_their_time_at_most(host: Host) -> None:
    async def work() -> float:
        async with auto(hang) as (transport, _):
            return await call_once(transport, 0.2)

    assert host.client_loop.run(work(), 30.0) < 0.19


def test_a_link_that_comes_late_is_used_from_then_on(host: Host) -> None:
    async def late() -> Ticket:
        await asyncio.sleep(FIRST_DIAL_WAIT_S + 0.4)
        return host.direct.ticket("client")  # its loop's clock is this one's

    async def work() -> tuple[int, int]:
        async with auto(late) as (transport, below):
            await call_once(transport)
            before = below.calls
            attempt = transport._dialing["s"].attempt
            assert attempt is not None
            await asyncio.wait([attempt])
            await call_once(transport)
            return before, below.calls

    assert host.client_loop.run(work(), 30.0) == (1, 1)


@pytest.mark.parametrize(
    "error",
    [ConnectError("no"), CallTimeout("late"), ValueError("odd"), UnicodeError("odd"), OSError(24, "descriptors")],
)
def test_whatever_fails_calls_go_over_libp2p_and_strict_modes_say_so(host: Host, error: Exception) -> None:
    async def work() -> int:
        async with auto(failing(error)) as (transport, below):
            for _ in range(3):
                await call_once(transport)
        async with auto(failing(error), "tls") as (strict, _):
            for _ in range(2):
                with pytest.raises(MoEError):
                    await call_once(strict)
        return below.tickets

    assert host.client_loop.run(work(), 30.0) == 1


def test_later_dials_are_in_the_background(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_module, "RETRY_DIRECT_AFTER_S", 0.0)
    monkeypatch.setattr(auto_module, "DIAL_TIMEOUT_S", 0.3)

    async def work() -> tuple[list[float], int]:
        async with auto(hang) as (transport, below):
            times = [await call_once(transport)]
            for _ in range(20):
                await asyncio.sleep(0.05)
                times.append(await call_once(transport))
            return times[1:], below.tickets

    times, tickets = host.client_loop.run(work(), 30.0)
    assert max(times) < 0.2
    assert tickets > 2


def test_pauses_between_dials_grow() -> None:
    dialing, now, pauses = _Dialing(), 0.0, []
    for _ in range(40):
        assert dialing.may_begin(now)
        dialing.failed(now)
        begin = now
        while not dialing.may_begin(now):
            now += RETRY_DIRECT_AFTER_S
        pauses.append(now - begin)
    assert pauses[:4] == [RETRY_DIRECT_AFTER_S * factor for factor in (1, 2, 4, 8)]
    assert pauses[-1] == MAX_RETRY_DIRECT_AFTER_S


def test_links_that_carry_nothing_are_not_dialed_again_and_again(host: Host) -> None:
    async def work() -> int:
        async with auto(lambda: host.direct.ticket("client")) as (transport, below):
            for _ in range(5):
                link = await transport._connect(PEER, 10.0)
                if link is not None:
                    link.close()
            return below.tickets

    assert host.client_loop.run(work(), 30.0) == 1


def test_strict_modes_wait_for_their_budget(host: Host) -> None:
    async def work() -> float:
        async with auto(hang, "unix") as (transport, _):
            begin = time.monotonic()
            with pytest.raises(CallTimeout):
                await call_once(transport, 3.0)
            return time.monotonic() - begin

    assert 1.4 < host.client_loop.run(work(), 30.0) < 2.9


@pytest.mark.parametrize("mode", ["auto", "unix"])
def test_whoever_waits_for_a_link_hears_that_the_transport_is_closed(host: Host, mode: str) -> None:
    async def work() -> Any:
        async with auto(hang, mode) as (transport, _):
            calling = asyncio.ensure_future(call_once(transport))
            await asyncio.sleep(0.1)
            await transport.close()
            return (await asyncio.gather(calling, return_exceptions=True))[0]

    assert isinstance(host.client_loop.run(work(), 30.0), ConnectError)


def test_a_call_that_is_cancelled_leaves_the_dial_to_others(host: Host) -> None:
    async def work() -> tuple[int, int]:
        async with auto(lambda: host.direct.ticket("client")) as (transport, below):
            calling = asyncio.ensure_future(call_once(transport))
            await asyncio.sleep(0)
            calling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await calling
            await call_once(transport)
            return below.tickets, below.calls

    assert host.client_loop.run(work(), 30.0) == (1, 0)


def test_a_forked_child_leaves_its_parents_links_alone(host: Host) -> None:
    transport = AutoTransport(LibP2P(lambda: host.direct.ticket("client")))

    async def connect() -> DirectClient | None:
        return await transport._connect(PEER, 10.0)

    assert host.client_loop.run(connect(), 10.0) is not None
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        with contextlib.suppress(BaseException):
            assert transport.blocking(PEER) is None
            asyncio.run(transport.close())
            assert transport._links == {}
            status = 0
        os._exit(status)
    os.close(write)
    os.close(read)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    call = transport.blocking(PEER)
    assert call is not None
    assert call(forward_call(torch.ones(2, 1, HIDDEN)), 10.0).tensors[0].shape == (2, 1, HIDDEN)
    host.client_loop.run(transport.close(), 10.0)


def test_the_listener_of_a_server_that_has_ended_is_not_kept_by_its_children(host: Host) -> None:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(write, b"forked")
        time.sleep(30)
        os._exit(0)
    try:
        assert os.read(read, 6) == b"forked"
        address = host.ticket().addresses[0]
        host.server_loop.run(host.direct.stop(), 10.0)
        with socket.create_server(address):  # the port is free
            pass
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(read)
        os.close(write)
