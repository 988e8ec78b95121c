"""Handshakes of the direct link: dialing with a ticket, and listening to strangers who may have one. Owns: both, and TLS.

A server's certificate is made anew at each start; its fingerprint is in the ticket. Strangers are held by the event loop,
none by a thread, and each for HANDSHAKE_TIMEOUT_S at most: however many are silent, there is room for the next one.
Must not know: what is said over a link, or whose ticket is valid.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import errno
import hashlib
import hmac
import ipaddress
import logging
import os
import pathlib
import socket
import ssl
import stat
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from time import monotonic

from moe.errors import ConnectError, MoEError
from moe.transport.link import LinkSocket
from moe.transport.tickets import Ticket
from moe.wire.frames import HEADER_BYTES, HELLO, SECRET_BYTES, WELCOME, encode_frame

logger = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT_S = 5.0  # for all of it: connecting to any of the addresses, TLS, ticket and proof
MAX_STRANGERS = 64  # being listened to at one time; for one more, the oldest of the address with most of them has to go
MAX_DIALS = 64  # of this process at one time
SOCKET_NAME, DIRECTORY_PREFIX = "socket", "moe-link-"  # of a server's Unix socket; clients dial no others
_HELLO_BYTES = HEADER_BYTES + SECRET_BYTES
_HELLO_HEAD = encode_frame(HELLO, 0, bytes(SECRET_BYTES))[:HEADER_BYTES]
_ACCEPT_AT_ONCE = 8
_PAUSE_S = 0.5  # of a listener, when no more connections can be had
_PORTS_TRIED = 10  # for one that is free at several addresses
_OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

# --- dialing: blocking, each in a thread -----------------------------------------------------------------------------------


def dial(ticket: Ticket, only: str | None = None, timeout_s: float = HANDSHAKE_TIMEOUT_S) -> LinkSocket:
    """Connect and prove the ticket. Blocks for ``timeout_s`` at most, and as long as the resolver takes for a name.

    Whatever a ticket says, nothing is sent but a TLS greeting, before the other side has shown the certificate (TLS) or is a
    socket of our own user (Unix), and the ticket's secret afterwards.

    :param only: "unix" or "tls"; None: Unix socket if it is there, then the addresses in order
    :raises ConnectError: nobody could be reached who proves to be the server
    """
    deadline = monotonic() + timeout_s
    failures = []
    attempts: list[tuple[str, Callable[[float], LinkSocket]]] = []
    if only in (None, "unix") and _is_link_socket(ticket.unix_path):
        attempts.append((ticket.unix_path, partial(_dial_unix, ticket.unix_path)))
    if only in (None, "tls"):
        for host, port in dict.fromkeys(ticket.addresses):
            attempts.append((f"{host}:{port}", partial(_dial_tls, host, port, ticket.fingerprint)))
    for number, (name, connect) in enumerate(attempts):
        sock = None
        try:
            share_s = _left_s(deadline) / (len(attempts) - number)  # one that drops packets does not take all the time
            sock = connect(monotonic() + share_s)
            _show(sock, ticket, deadline)
            return sock
        except Exception as e:  # a host name alone can raise UnicodeError, ValueError, OverflowError
            failures.append(f"{name!r:.100}: {e!s:.200}")
            if sock is not None:
                sock.close()
                break  # the ticket is used up
    raise ConnectError(f"no direct link ({'; '.join(failures)[:1000] or 'no address fits'})")


def _show(sock: LinkSocket, ticket: Ticket, deadline: float) -> None:
    """Show the ticket's secret, and have its proof shown."""
    sock.settimeout(_left_s(deadline))
    sock.sendall(encode_frame(HELLO, 0, ticket.secret))
    expected, answer = encode_frame(WELCOME, 0, ticket.proof), b""
    while len(answer) < len(expected):
        sock.settimeout(_left_s(deadline))
        piece = sock.recv(len(expected) - len(answer))
        if not piece:
            raise ConnectError("the connection was closed during the handshake")
        answer += piece
    if not hmac.compare_digest(answer, expected):
        raise ConnectError("the other side has not issued this ticket")


def _left_s(deadline: float) -> float:
    left = deadline - monotonic()
    if left <= 0:
        raise ConnectError("the handshake took too long")
    return left


def _is_link_socket(path: str) -> bool:
    """Is this a socket as our servers make them, of our own user? A ticket may name any path."""
    if os.path.basename(path) != SOCKET_NAME or not os.path.basename(os.path.dirname(path)).startswith(
        DIRECTORY_PREFIX
    ):
        return False
    try:
        found = os.stat(path, follow_symlinks=False)
    except (OSError, ValueError):
        return False
    return os.path.isabs(path) and stat.S_ISSOCK(found.st_mode) and found.st_uid == os.geteuid()


def _dial_unix(path: str, deadline: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(_left_s(deadline))
        sock.connect(path)
        return sock
    except BaseException:
        sock.close()
        raise


def _dial_tls(host: str, port: int, fingerprint: bytes, deadline: float) -> ssl.SSLSocket:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the certificate is pinned: compared below with the fingerprint in the ticket
    sock = _connect(host, port, deadline)
    try:
        sock.settimeout(_left_s(deadline))
        tls = context.wrap_socket(sock)  # the timeout is for all of the handshake
    except BaseException:
        sock.close()
        raise
    certificate = tls.getpeercert(binary_form=True) or b""
    if not hmac.compare_digest(hashlib.sha256(certificate).digest(), fingerprint):
        tls.close()
        raise ConnectError("its certificate is not the one in the ticket")
    return tls


def _connect(host: str, port: int, deadline: float) -> socket.socket:
    """``socket.create_connection`` within one deadline for all addresses of a name."""
    found = socket.getaddrinfo(host, port, 0, socket.SOCK_STREAM)[:8]
    error: OSError = OSError("no address")
    for number, (family, kind, protocol, _, address) in enumerate(found):
        sock = socket.socket(family, kind, protocol)
        try:
            sock.settimeout(_left_s(deadline) / (len(found) - number))
            sock.connect(address)
            return sock
        except OSError as e:
            sock.close()
            error = e
        except BaseException:
            sock.close()
            raise
    raise error


_dials = threading.BoundedSemaphore(MAX_DIALS)


async def dial_in_thread(ticket: Ticket, only: str | None = None) -> LinkSocket:
    """``dial`` in a thread of its own, which neither the event loop's other work nor the end of the process waits for.

    With MAX_DIALS others being dialed it waits for one of them to end; the caller sets a limit.

    :raises ConnectError: see dial
    """
    loop, slots = asyncio.get_running_loop(), _dials
    dialed: asyncio.Future[LinkSocket] = loop.create_future()

    def settle(sock: LinkSocket | None, error: MoEError | None) -> None:
        if dialed.done():  # nobody waits any more
            if sock is not None:
                sock.close()
        elif sock is not None:
            dialed.set_result(sock)
        else:
            assert error is not None
            dialed.set_exception(error)

    def work() -> None:
        sock, error = None, None
        try:
            sock = dial(ticket, only)
        except MoEError as e:
            error = e
        finally:
            slots.release()
        try:
            loop.call_soon_threadsafe(settle, sock, error)
        except RuntimeError:  # the loop has ended
            if sock is not None:
                sock.close()

    while not slots.acquire(blocking=False):  # noqa: ASYNC110 - threads release it
        await asyncio.sleep(0.02)
    try:
        threading.Thread(target=work, name="moe-dial", daemon=True).start()
    except RuntimeError as e:  # no more threads
        slots.release()
        raise ConnectError(f"cannot dial: {e}") from None
    return await dialed


# --- listening -------------------------------------------------------------------------------------------------------------


def make_certificate() -> tuple[bytes, bytes]:
    """A new self-signed certificate and its key, as PEM; only its fingerprint matters."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "moe")])
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    encoding, private = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return certificate.public_bytes(encoding), key.private_bytes(encoding, private, serialization.NoEncryption())


def make_tls_context(directory: pathlib.Path) -> tuple[ssl.SSLContext, bytes]:
    """A TLS 1.3 server context with a new certificate, and the certificate's SHA-256.

    :param directory: private; the key lies there for a moment, since ``load_cert_chain`` takes nothing but files
    """
    certificate, key = make_certificate()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0  # nobody resumes
    pem = directory / "pem"
    pem.touch(mode=0o600)
    pem.write_bytes(certificate + key)
    context.load_cert_chain(pem)
    pem.unlink()
    return context, hashlib.sha256(ssl.PEM_cert_to_DER_cert(certificate.decode())).digest()


def origin_of(sock: socket.socket, address: object) -> str:
    """Who shares one part of MAX_STRANGERS: an IPv4 address, an IPv6 network of 64 bits, or all of this host's Unix socket."""
    if sock.family == socket.AF_UNIX:
        return "unix"
    host = str(address[0]) if isinstance(address, tuple) and address else ""
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if isinstance(ip, ipaddress.IPv6Address):
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return str(ip)


class Stranger:
    """A connection whose peer has not shown a ticket yet.

    :param context: TLS, for TCP sockets
    :param heard: called with it and the secret, once its HELLO is there; it may ``take`` the socket
    :param gone: called once, whatever has become of it
    """

    def __init__(
        self,
        sock: socket.socket,
        origin: str,
        context: ssl.SSLContext | None,
        heard: Callable[[Stranger, bytes], None],
        gone: Callable[[Stranger], None],
    ):
        self.origin = origin
        self._sock: LinkSocket = sock
        self._heard, self._gone = heard, gone
        self._loop = asyncio.get_running_loop()
        self._hello = b""
        self._writing = False
        self._over = False
        sock.setblocking(False)
        if context is not None:
            self._sock = context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        self._shaken = context is None
        self._timer = self._loop.call_later(HANDSHAKE_TIMEOUT_S, self.drop)
        self._loop.add_reader(self._sock, self._go_on)

    def _go_on(self) -> None:
        """As far as the other side has come."""
        try:
            if not self._shaken:
                assert isinstance(self._sock, ssl.SSLSocket)
                self._sock.do_handshake()
                self._shaken = True
                self._write_too(False)
            while len(self._hello) < _HELLO_BYTES:
                piece = self._sock.recv(_HELLO_BYTES - len(self._hello))
                if not piece:
                    self.drop()
                    return
                self._hello += piece
                if self._hello[:HEADER_BYTES] != _HELLO_HEAD[: len(self._hello)]:
                    self.drop()
                    return
            self._heard(self, self._hello[HEADER_BYTES:])
            self.drop()
        except ssl.SSLWantWriteError:
            self._write_too(True)
        except (BlockingIOError, ssl.SSLWantReadError, InterruptedError):
            self._write_too(False)
        except Exception as e:
            logger.debug("a stranger was turned away: %r", e)
            self.drop()

    def _write_too(self, writing: bool) -> None:
        if writing != self._writing:
            self._writing = writing
            if writing:
                self._loop.add_writer(self._sock, self._go_on)
            else:
                self._loop.remove_writer(self._sock)

    def take(self, welcome: bytes) -> LinkSocket:
        """The connection, after a last word.

        :raises OSError: it has ended, or does not take the word
        """
        if self._sock.send(welcome) != len(welcome):
            raise BlockingIOError("the welcome does not fit")
        self._end()
        return self._sock

    def drop(self) -> None:
        """Hang up, unless it was taken."""
        if not self._over:
            self._end()
            self._sock.close()

    def _end(self) -> None:
        self._over = True
        self._timer.cancel()
        self._loop.remove_reader(self._sock)
        self._write_too(False)
        self._gone(self)


class Listener:
    """Accepts strangers from some listening sockets, in the event loop.

    :param heard: see Stranger
    """

    def __init__(self, heard: Callable[[Stranger, bytes], None]):
        self._heard = heard
        self._loop = asyncio.get_running_loop()
        self._sockets: list[socket.socket] = []
        self._strangers: OrderedDict[Stranger, None] = OrderedDict()  # oldest first
        self._paused: dict[socket.socket, asyncio.TimerHandle] = {}
        self._complained = False

    def __len__(self) -> int:
        """Strangers being listened to."""
        return len(self._strangers)

    def listen(self, sock: socket.socket, context: ssl.SSLContext | None) -> None:
        """Accept from a socket, with TLS or without."""
        sock.listen(128)
        sock.setblocking(False)
        self._sockets.append(sock)
        _listening.add(sock)
        self._loop.add_reader(sock, self._accept, sock, context)

    def close(self) -> None:
        """Listen to nobody any more."""
        for timer in self._paused.values():
            timer.cancel()
        for sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
        self._sockets.clear()
        for stranger in list(self._strangers):
            stranger.drop()

    def _accept(self, listener: socket.socket, context: ssl.SSLContext | None) -> None:
        for _ in range(_ACCEPT_AT_ONCE):
            sock = None
            try:
                sock, address = listener.accept()
                self._complained = False
                self._make_room()
                stranger = Stranger(sock, origin_of(sock, address), context, self._heard, self._forget)
                self._strangers[stranger] = None
            except BlockingIOError:
                return
            except OSError as e:
                if sock is not None:
                    sock.close()
                elif e.errno in _OUT_OF_RESOURCES:
                    self._pause(listener, context, e)
                    return
            except Exception:
                logger.exception("a stranger could not be listened to")
                if sock is not None:
                    sock.close()

    def _make_room(self) -> None:
        if len(self._strangers) < MAX_STRANGERS:
            return
        counts: dict[str, int] = {}
        for stranger in self._strangers:
            counts[stranger.origin] = counts.get(stranger.origin, 0) + 1
        most = max(counts.values())
        next(stranger for stranger in self._strangers if counts[stranger.origin] == most).drop()

    def _forget(self, stranger: Stranger) -> None:
        self._strangers.pop(stranger, None)

    def _pause(self, listener: socket.socket, context: ssl.SSLContext | None, error: OSError) -> None:
        """Connections wait in the kernel until there are descriptors again."""
        if not self._complained:
            self._complained = True
            logger.warning("no more connections can be accepted for now: %s", error)
        self._loop.remove_reader(listener)

        def resume() -> None:
            del self._paused[listener]
            self._loop.add_reader(listener, self._accept, listener, context)

        self._paused[listener] = self._loop.call_later(_PAUSE_S, resume)


_listening: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def _after_fork() -> None:
    """A child listens to nobody: its parent's port is free once the parent has ended. Nor does it dial for its parent."""
    global _dials
    _dials = threading.BoundedSemaphore(MAX_DIALS)
    for sock in list(_listening):
        with contextlib.suppress(OSError):
            os.close(sock.detach())


os.register_at_fork(after_in_child=_after_fork)


def listening_sockets(hosts: Sequence[str], port: int) -> list[socket.socket]:
    """TCP sockets bound to one port at each of some addresses of this host.

    :param port: 0: any that is free at all of them
    :raises OSError: the port is taken, or an address is not ours
    """
    for _ in range(_PORTS_TRIED if port == 0 else 0):
        with contextlib.suppress(OSError):  # free at the first address, taken at another
            return _bound(hosts, port)
    return _bound(hosts, port)


def _bound(hosts: Sequence[str], port: int) -> list[socket.socket]:
    sockets: list[socket.socket] = []
    try:
        for host in dict.fromkeys(hosts):
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            sock = socket.create_server((host, port), family=family, backlog=128)
            sockets.append(sock)
            port = sock.getsockname()[1]
    except BaseException:
        for sock in sockets:
            sock.close()
        raise
    return sockets
