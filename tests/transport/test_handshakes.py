"""Handshakes: whatever a ticket says a dial ends in time, and whatever strangers do the next one is heard."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from moe.errors import ConnectError
from moe.transport import handshakes
from moe.transport.direct import DirectServer, _remove_orphans
from moe.transport.event_loop import EventLoopThread
from moe.transport.handshakes import (
    HANDSHAKE_TIMEOUT_S,
    MAX_DIALS,
    MAX_STRANGERS,
    dial,
    dial_in_thread,
    listening_sockets,
    make_tls_context,
    origin_of,
)
from moe.transport.tickets import Ticket
from moe.wire.frames import HELLO, encode_frame
from tests.transport.test_direct import Host, connect, lora_host


def ticket(**fields: Any) -> Ticket:
    return Ticket(**{"secret": bytes(32), "proof": bytes(32), "fingerprint": bytes(32), **fields})


def took(func: Callable[[], Any]) -> float:
    begin = time.monotonic()
    with pytest.raises(ConnectError):
        func()
    return time.monotonic() - begin


# --- dialing ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "a..b",
        "x" * 100,
        "a\0b",
        "",
        " ",
        "\x1b[31m",
        "256.256.256.256",
        "::::",
        "-",
        "ä" * 70,
        "[::1]",
        "%",
        "127.0.0.1\n",
    ],
)
def test_no_host_name_raises_anything_but_connect_error(host: str) -> None:
    with pytest.raises(ConnectError) as caught:
        dial(ticket(addresses=((host, 1),)), timeout_s=2.0)
    assert "\0" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


@contextlib.contextmanager
def listening(family: int = socket.AF_INET, path: str = "") -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind(path or ("127.0.0.1", 0))
        listener.listen(16)
        yield listener


@contextlib.contextmanager
def black_hole() -> Iterator[tuple[str, int]]:
    """An address that drops packets: its queue of connections is full."""
    with socket.socket() as listener, contextlib.ExitStack() as stack:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        for _ in range(4):
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        yield listener.getsockname()


def test_one_deadline_for_all_addresses() -> None:
    with black_hole() as address:
        addresses = (
            address,
            ("localhost", address[1]),
            ("127.0.0.1", 1),
            *((f"127.0.0.{i}", address[1]) for i in range(2, 9)),
        )
        assert took(lambda: dial(ticket(addresses=addresses), timeout_s=1.0)) < 3.0


def trickle(listener: socket.socket, answer: bytes, context: ssl.SSLContext | None) -> threading.Thread:
    """Accept one connection and answer with a byte now and then."""

    def work() -> None:
        with contextlib.suppress(OSError):
            sock, _ = listener.accept()
            if context is not None:
                sock = context.wrap_socket(sock, server_side=True)
            with sock:
                for byte in answer:
                    sock.sendall(bytes([byte]))
                    time.sleep(0.1)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


@pytest.mark.parametrize("kind", ["unix", "tls", "instead of tls"])
def test_a_server_that_trickles_holds_nobody(kind: str, tmp_path: Path) -> None:
    context, fingerprint = make_tls_context(tmp_path)
    with tempfile.TemporaryDirectory(prefix="moe-link-") as directory:
        path = os.path.join(directory, "socket") if kind == "unix" else ""
        with listening(socket.AF_UNIX if path else socket.AF_INET, path) as listener:
            thread = trickle(listener, bytes(200), context if kind == "tls" else None)
            address = () if path else (listener.getsockname(),)
            own = ticket(unix_path=path, addresses=address, fingerprint=fingerprint)
            assert took(lambda: dial(own, timeout_s=1.0)) < 3.0
            thread.join()


def test_no_unix_socket_is_dialed_but_those_of_servers(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="moe-link-") as directory:
        (Path(directory) / "socket").write_bytes(b"a file")
        link = Path(directory) / "link"
        with listening(socket.AF_UNIX, str(tmp_path / "socket")) as other:
            other.settimeout(0.1)
            link.symlink_to(tmp_path / "socket")
            for path in (
                str(tmp_path / "socket"),  # of another program
                str(Path(directory) / "socket"),  # no socket
                str(link),
                "/proc/self/mem",
                "\0abstract/moe-link-/socket",
                "moe-link-x/socket" + "\0",
                "x" * 256,
            ):
                assert took(partial(dial, ticket(unix_path=path))) < 1.0
            with pytest.raises(TimeoutError):
                other.accept()


def test_a_dial_that_hangs_neither_holds_the_event_loop_nor_the_end_of_the_process() -> None:
    script = """
import asyncio, socket, threading
from moe.transport.event_loop import client_loop
from moe.transport.handshakes import dial_in_thread
from moe.transport.tickets import Ticket
socket.getaddrinfo = lambda *args, **kwargs: __import__("time").sleep(60)  # a resolver that does not answer
async def dial():
    ticket = Ticket(secret=bytes(32), proof=bytes(32), fingerprint=bytes(32), addresses=(("h", 1),))
    dialing = [asyncio.ensure_future(dial_in_thread(ticket)) for _ in range(100)]
    await asyncio.sleep(0.2)
    print(sum(thread.name == "moe-dial" for thread in threading.enumerate()))
    await asyncio.get_running_loop().run_in_executor(None, print, "the executor is free")
client_loop().run(dial(), 10)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.split("\n")[:2] == [str(MAX_DIALS), "the executor is free"]


def test_a_socket_that_nobody_waits_for_any_more_is_closed() -> None:
    with lora_host() as host:

        async def give_up() -> None:
            dialing = asyncio.ensure_future(dial_in_thread(host.ticket(), "unix"))
            await asyncio.sleep(0)
            dialing.cancel()

        async def issue() -> Ticket:
            return host.direct.ticket("client")

        own = host.server_loop.run(issue(), 5.0)
        host.ticket = lambda peer="client": own  # type: ignore[method-assign]
        host.client_loop.run(give_up(), 10.0)
        deadline = time.monotonic() + 5.0
        while host.links() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert host.links() == 0


# --- listening -------------------------------------------------------------------------------------------------------------


def links_within(host: Host, kind: str, seconds: float) -> None:
    """An honest peer gets its link."""
    begin = time.monotonic()
    dial(host.ticket("honest"), kind).close()
    assert time.monotonic() - begin < seconds


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_silent_strangers_stop_nobody(kind: str) -> None:
    with lora_host() as host, contextlib.ExitStack() as stack:
        own = host.ticket()
        for _ in range(3 * MAX_STRANGERS):
            if kind == "unix":
                sock = stack.enter_context(socket.socket(socket.AF_UNIX))
                sock.connect(own.unix_path)
            else:
                sock = stack.enter_context(socket.create_connection(own.addresses[0]))
        for _ in range(3):
            links_within(host, kind, 2.0)
        assert host.direct._handshakes <= MAX_STRANGERS


@pytest.mark.parametrize("kind", ["unix", "tls"])
def test_a_stranger_that_trickles_is_cut_off_in_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "HANDSHAKE_TIMEOUT_S", 0.5)
    with lora_host() as host, connect(host, kind) as sock:
        begin = time.monotonic()
        with pytest.raises(OSError):
            for byte in encode_frame(HELLO, 0, bytes(32)) * 5:
                sock.sendall(bytes([byte]))
                time.sleep(0.1)
        assert time.monotonic() - begin < 4.0
        assert host.direct._handshakes == 0


def test_one_address_with_many_strangers_does_not_push_out_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshakes, "MAX_STRANGERS", 8)
    with lora_host() as host, contextlib.ExitStack() as stack:
        own = host.ticket("honest")
        patient = stack.enter_context(socket.socket(socket.AF_UNIX))
        patient.connect(own.unix_path)
        for _ in range(50):
            stack.enter_context(socket.create_connection(own.addresses[0]))
        time.sleep(0.2)
        patient.sendall(encode_frame(HELLO, 0, own.secret))
        patient.settimeout(5.0)
        assert patient.recv(1000)[-32:] == own.proof


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        (("10.0.0.1", 5), "10.0.0.1"),
        (("::ffff:10.0.0.1", 5, 0, 0), "10.0.0.1"),
        (("2001:db8::1", 5, 0, 0), "2001:db8::/64"),
        (("fe80::1%eth0", 5, 0, 2), "fe80::/64"),
        (("?", 5), "?"),
    ],
)
def test_who_shares_a_part_of_the_room_for_strangers(address: tuple[Any, ...], origin: str) -> None:
    with socket.socket() as sock:
        assert origin_of(sock, address) == origin


@pytest.mark.parametrize(
    "garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(range(256)) * 20, b"\x16\x03\x01\x40\x00" + bytes(300)]
)
def test_garbage_instead_of_a_handshake_harms_nobody(garbage: bytes) -> None:
    with lora_host() as host:
        own = host.ticket()
        for _ in range(5):
            with socket.create_connection(own.addresses[0]) as sock, contextlib.suppress(OSError):
                sock.sendall(garbage)
                sock.shutdown(socket.SHUT_WR)  # unless it has been cut off by now
        links_within(host, "tls", 3.0)


class OutOfDescriptors(socket.socket):
    """A listener whose process has no descriptors left for a while."""

    until = 0.0
    attempts = 0

    def accept(self) -> Any:
        type(self).attempts += 1
        if time.monotonic() < self.until:
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def test_without_descriptors_the_listener_rests_and_goes_on_later(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(socket, "socket", OutOfDescriptors)
    with lora_host() as host:
        monkeypatch.undo()
        own = host.ticket("honest")
        OutOfDescriptors.until, OutOfDescriptors.attempts = time.monotonic() + 1.0, 0
        with caplog.at_level(logging.WARNING, "moe"):
            dial(own, "unix").close()
        assert time.monotonic() > OutOfDescriptors.until
        assert OutOfDescriptors.attempts < 20
        assert len(caplog.records) == 1
        assert "no more connections" in caplog.text


def test_a_server_listens_where_it_is_told_to() -> None:
    loop = EventLoopThread("moe-test-server")
    server = DirectServer(None, listen_host=("127.0.0.1", "127.0.0.2"))  # type: ignore[arg-type]
    try:
        loop.run(server.start(), 10.0)
        ours = [
            c.laddr
            for c in psutil.Process().net_connections("tcp")
            if c.status == "LISTEN" and c.laddr.port == server._port
        ]
        assert sorted(address.ip for address in ours) == ["127.0.0.1", "127.0.0.2"]
    finally:
        loop.run(server.stop(), 10.0)
        loop.stop()


def test_any_port_is_one_that_is_free_at_all_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    with listening() as taken:
        port, create = taken.getsockname()[1], socket.create_server
        asked: list[int] = []

        def unlucky(address: tuple[str, int], **kwargs: Any) -> socket.socket:  # the first one is taken at 127.0.0.1
            host, wanted = address
            if host == "127.0.0.3" and not wanted:
                asked.append(wanted)
                wanted = port if len(asked) == 1 else 0
            return create((host, wanted), **kwargs)

        monkeypatch.setattr(socket, "create_server", unlucky)
        sockets = listening_sockets(("127.0.0.3", "127.0.0.1"), 0)
        ports = {sock.getsockname()[1] for sock in sockets}
        for sock in sockets:
            sock.close()
        assert len(asked) == 2 and len(sockets) == 2 and len(ports) == 1 and port not in ports


def test_a_port_that_is_taken_leaves_nothing_behind() -> None:
    loop = EventLoopThread("moe-test-server")
    before = set(Path(tempfile.gettempdir()).glob("moe-link-*"))
    with listening() as taken:
        server = DirectServer(None, port=taken.getsockname()[1], listen_host="127.0.0.1")  # type: ignore[arg-type]
        with pytest.raises(OSError, match="in use"):
            loop.run(server.start(), 10.0)
        with pytest.raises(OSError, match="in use"):
            listening_sockets(("127.0.0.3", "127.0.0.1"), taken.getsockname()[1])
    loop.stop()
    assert set(Path(tempfile.gettempdir()).glob("moe-link-*")) <= before


def test_directories_of_servers_that_were_killed_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, alive, new, other = (tmp_path / name for name in ("moe-link-dead", "moe-link-alive", "moe-link-new", "other"))
    for directory in (dead, alive, new, other):
        directory.mkdir()
    for directory in (dead, new):
        with listening(socket.AF_UNIX, str(directory / "socket")):
            pass
    with listening(socket.AF_UNIX, str(alive / "socket")):
        for directory in (dead, alive, other):
            os.utime(directory, (1, 1))
        _remove_orphans()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["moe-link-alive", "moe-link-new", "other"]


def test_the_handshake_of_a_dial_has_one_deadline_by_default() -> None:
    assert HANDSHAKE_TIMEOUT_S <= 5.0
