"""The DHT's process. Owns: starting it, ending it without a trace, and running functions in it within a deadline.

hivemind's DHT is a forked process with an event loop, asked through a pipe. By itself, a request to a dead or stuck one
waits for ever, a request larger than a few kilobytes can kill it (it reads the pipe without blocking and takes a part
for the whole), it outlives a parent that is killed, and a SIGTERM to all processes of a server ends it before the server
has told the swarm that it leaves. None of that gets past this file. Must not know: records.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
import os
import select
import signal
import tempfile
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from multiprocessing import popen_fork, reduction
from typing import Any, TypeVar, cast

import msgspec
from hivemind.dht import DHT, DHTNode
from hivemind.p2p import PeerID, PeerInfo
from hivemind.utils import MPFuture
from hivemind.utils.multiaddr import Multiaddr

from moe.errors import CallTimeout, ConfigError, LifecycleError, MoEError, TransportError

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 15.0  # for one operation
_POLL_S = 0.25  # how often a waiting caller looks whether the process still lives
_LOCK_PATIENCE_S = 2.0  # a result is sent in far less, unless the sender is dead
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # what asks a process to end
_INLINE_BYTES = 2048  # a request is one write of at most PIPE_BUF (4096) bytes; 759 of them are hivemind's

_Result = TypeVar("_Result")
NodeFunction = Callable[..., Awaitable[_Result]]  # async def function(node, *plain arguments), on module level


# --- asking it -------------------------------------------------------------------------------------------------------


def call(
    dht: DHT, stage: str, function: NodeFunction[_Result], *args: Any, timeout_s: float = DEFAULT_TIMEOUT_S
) -> _Result:
    """Run ``function(node, *args)`` in the DHT process. The arguments are plain: strings, numbers, lists, dicts.

    :param stage: what is being done, for errors
    :raises CallTimeout: if it gives no result in time
    :raises LifecycleError: if the process is not running
    :raises TransportError: if the function raised
    """
    deadline = time.monotonic() + timeout_s
    coroutine = partial(_run_bounded, function=function, payload=_pack(args), timeout_s=timeout_s)
    try:
        outcome, result = _wait(dht, stage, _send(dht, stage, coroutine, deadline), deadline)
    except CallTimeout:
        outcome, result = "timeout", None
    if outcome == "timeout":
        raise CallTimeout(f"DHT: {stage} took longer than {timeout_s:.3g} s")
    if outcome != "ok":
        raise TransportError(f"DHT: {stage} failed: {result or outcome}")
    return cast(_Result, result)


def call_in_background(dht: DHT, stage: str, function: NodeFunction[_Result], *args: Any) -> MPFuture[_Result]:
    """Like ``call``, but returns hivemind's future of the result, which has no deadline of its own.

    :raises CallTimeout: if the process takes no requests
    :raises LifecycleError: if the process is not running
    """
    coroutine = partial(_run_unbounded, function=function, payload=_pack(args))
    return _send(dht, stage, coroutine, time.monotonic() + DEFAULT_TIMEOUT_S)


async def _run_bounded(
    _dht: DHT, node: DHTNode, *, function: NodeFunction[Any], payload: Any, timeout_s: float
) -> tuple[str, Any]:
    """Errors are returned: what is raised here, hivemind logs with a traceback."""
    try:
        return "ok", await asyncio.wait_for(function(node, *_unpack(payload)), timeout_s)
    except asyncio.TimeoutError:
        return "timeout", None
    except asyncio.CancelledError:
        return "cancelled", None
    except Exception as e:
        logger.debug("an operation on the DHT failed", exc_info=True)
        return "error", f"{type(e).__name__}: {e}"


async def _run_unbounded(_dht: DHT, node: DHTNode, *, function: NodeFunction[Any], payload: Any) -> Any:
    return await function(node, *_unpack(payload))


def _pack(args: tuple[Any, ...]) -> Any:
    """Arguments as bytes or, if they are many, as an unnamed file, so that the request itself stays small."""
    payload = msgspec.msgpack.encode(args)
    if len(payload) <= _INLINE_BYTES:
        return payload
    with tempfile.TemporaryFile() as spool:
        spool.write(payload)
        spool.flush()
        return reduction.DupFd(spool.fileno())


def _unpack(payload: Any) -> Any:
    if not isinstance(payload, bytes):
        with os.fdopen(payload.detach(), "rb") as spool:
            spool.seek(0)
            payload = spool.read()
    return msgspec.msgpack.decode(payload)


def _send(dht: DHT, stage: str, coroutine: Callable[..., Awaitable[Any]], deadline: float) -> Any:
    _check_alive(dht, stage)
    with _room_in_pipe(dht, stage, deadline):
        return dht.run_coroutine(coroutine, return_future=True)


_sending = threading.Lock()  # seeing that there is room and using it, as one


@contextlib.contextmanager
def _room_in_pipe(dht: DHT, stage: str, deadline: float) -> Iterator[None]:
    """Hold the pipe to the DHT process while there is room for one small request: writing to a full one blocks."""
    if not _sending.acquire(timeout=max(0.0, deadline - time.monotonic())):
        raise CallTimeout(f"DHT: {stage}: others are waiting to send requests")
    try:
        poll = select.poll()
        poll.register(dht._outer_pipe.fileno(), select.POLLOUT)
        if not poll.poll(1000 * max(0.0, deadline - time.monotonic())):
            raise CallTimeout(f"DHT: {stage}: its process takes no requests")
        yield
    except OSError as e:
        if isinstance(e, CallTimeout):
            raise
        raise LifecycleError(f"DHT: {stage}: the way to its process is closed ({e})") from e
    finally:
        _sending.release()


def _wait(dht: DHT, stage: str, future: Any, deadline: float) -> Any:
    while True:
        left = deadline - time.monotonic()
        try:
            return future.result(timeout=max(0.0, min(left, _POLL_S)))
        except concurrent.futures.TimeoutError:
            if future.done():  # it is the result; or that came just after our waiting had ended
                return future.result(timeout=0.0)
            if left <= 0:
                raise CallTimeout(f"DHT: {stage}: no answer in time") from None
        try:
            _check_alive(dht, stage)
        except LifecycleError:
            with contextlib.suppress(concurrent.futures.TimeoutError):  # perhaps it has answered before it ended
                return future.result(timeout=_POLL_S)
            raise


def check_dht(dht: Any) -> None:
    """Refuse addresses where a DHT node is expected, before they are used as one.

    :raises ConfigError: says what to do
    """
    if isinstance(dht, (str, bytes, list, tuple, set, frozenset, Multiaddr)):
        raise _no_dht(dht)


def _no_dht(given: Any) -> ConfigError:
    return ConfigError(
        f"expected a DHT node, got {given!r:.200}; pass a DHT: moe.DHT(initial_peers=[...], start=True), with addresses "
        f"such as /ip4/.../p2p/..."
    )


def _check_alive(dht: DHT, stage: str) -> None:
    if not hasattr(dht, "_parent_pid"):
        raise _no_dht(dht)
    if dht._parent_pid != os.getpid():
        return  # only its parent can tell
    _watch(dht)
    if not dht.is_alive():
        raise LifecycleError(f"DHT: {stage}: its process is not running (exit code {dht.exitcode})")


_watched: weakref.WeakSet[DHT] = weakref.WeakSet()  # alive when last looked at
_watching = threading.Lock()


def _watch(dht: DHT) -> None:
    """Notice which DHTs have died a violent death, and repair what that breaks.

    hivemind's processes send their results under one lock. One that is killed while it holds the lock leaves all others
    of this process waiting for ever. So after such a death, whoever has had the lock for long is taken to be the dead.
    """
    with _watching:
        _watched.add(dht)
        dead = [child for child in _watched if child._parent_pid == os.getpid() and not child.is_alive()]
        _watched.difference_update(dead)
    if any(child.exitcode for child in dead):
        MPFuture._update_lock.acquire(timeout=_LOCK_PATIENCE_S)
        with contextlib.suppress(ValueError):  # it has been released meanwhile
            MPFuture._update_lock.release()


# --- starting and stopping it ----------------------------------------------------------------------------------------


class _Popen(popen_fork.Popen):
    """The process of a _BoundDHT, which does not heed SIGTERM: an interpreter that ends asks with that, and waits."""

    def terminate(self) -> None:
        """Kill it, whereupon its libp2p daemon ends too."""
        self.kill()


class _BoundDHT(DHT):  # type: ignore[misc]
    """hivemind's DHT, but its process ends when the one that started it says so or is gone, and not before.

    A supervisor or a terminal that ends a server signals each of its processes. This one has to live on until the server
    has told the swarm that it leaves, so it ignores what asks processes to end, and leaves the terminal's foreground group,
    together with its libp2p daemon, which heeds SIGINT and SIGTERM.
    """

    @staticmethod
    def _Popen(process: Any) -> _Popen:
        return _Popen(process)

    def run(self) -> None:
        """The process."""
        os.setpgid(0, 0)
        for number in ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, ENDING_SIGNALS)
        threading.Thread(target=self._end_with_parent, name="moe.dht.end_with_parent", daemon=True).start()
        super().run()

    async def _shutdown(self) -> None:
        daemon = self._node.p2p._child
        if (
            daemon is None or daemon.returncode is None
        ):  # else there is nobody to take leave of, and that would take long
            await super()._shutdown()

    def _end_with_parent(self) -> None:
        while os.getppid() == self._parent_pid:
            time.sleep(1.0)
        with contextlib.suppress(Exception):  # there may be no node yet, or a stuck one
            loop = self._node.p2p._reader_task.get_loop()
            asyncio.run_coroutine_threadsafe(self._node.shutdown(), loop).result(timeout=3.0)
        os._exit(1)


@contextlib.contextmanager
def _signals_wait() -> Iterator[None]:
    """Let signals that ask this process to end wait until the end of the body; processes started there do not heed them.

    In between, one would end a new child that does not ignore it yet; and torch, when it starts its process for shared memory
    and is interrupted, does not come back.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start_dht(initial_peers: Sequence[Any] = (), *, start_timeout_s: float = 30.0, **kwargs: Any) -> DHT:
    """Start a DHT node in its own process, which ends together with this one. Call it before threads and CUDA start.

    :param initial_peers: addresses of peers whose swarm to join; none: a new swarm
    :param kwargs: of hivemind's DHT, DHTNode and P2P (host_maddrs, identity_path, record_validators, authorizer, ...)
    :raises ConfigError: if an address is malformed; nothing was started then
    :raises LifecycleError: if it could not start, or not in time; nothing is left of it then
    """
    if isinstance(initial_peers, str):
        raise ConfigError("initial_peers is a list of addresses, not one string")
    for address in initial_peers:
        try:
            Multiaddr(address)["p2p"]
        except Exception as e:
            raise ConfigError(f"initial_peers: {str(address)!r} is not an address like /ip4/.../p2p/...: {e}") from None
    deadline = time.monotonic() + start_timeout_s
    tempfile.gettempdir()  # the process will look it up, too: under a lock that another thread must not hold during the fork
    dht: DHT | None = None
    try:
        with _signals_wait():
            dht = _BoundDHT(initial_peers=list(initial_peers), start=True, await_ready=False, **kwargs)
        _watch(dht)
        dht._inner_pipe.close()  # the child's end: while it is open here too, writing to a dead child is no error
        _wait(dht, "starting", dht._ready, deadline)
        left = max(0.1, deadline - time.monotonic())
        dht._peer_id = call(dht, "starting", _peer_id, timeout_s=left)
    except BaseException as e:
        if dht is not None:
            _kill(dht)
        if isinstance(e, CallTimeout):
            raise LifecycleError(f"the DHT did not start within {start_timeout_s:.3g} s") from e
        if isinstance(e, Exception) and not isinstance(e, LifecycleError):
            raise LifecycleError(f"the DHT could not start: {e}") from e
        raise
    return dht


def stop_dht(dht: DHT, timeout_s: float = 5.0) -> None:
    """Stop a DHT and leave nothing of it: no process, no libp2p daemon, no descriptor. May be called twice.

    :param timeout_s: for a graceful end; after that its process is killed, whereupon its libp2p daemon ends too
    :raises LifecycleError: if another process has started it
    """
    if dht._parent_pid != os.getpid():
        raise LifecycleError("only the process that started a DHT can stop it")
    deadline = time.monotonic() + timeout_s
    if dht.is_alive():
        with contextlib.suppress(MoEError), _room_in_pipe(dht, "stopping", deadline):
            dht._outer_pipe.send(("_shutdown", [], {}))
        dht.join(max(0.0, deadline - time.monotonic()))
        if dht.is_alive():
            logger.warning("the DHT did not stop within %.3g s and is killed", timeout_s)
    _kill(dht)


def _kill(dht: DHT) -> None:
    if dht.is_alive():
        dht.kill()
        dht.join()
    _watch(dht)
    for pipe in (dht._outer_pipe, dht._inner_pipe):
        with contextlib.suppress(OSError):
            pipe.close()
    if dht._popen is not None:
        dht._popen.close()  # not dht.close(): that would make hivemind's own __del__ fail


# --- asking where it is ----------------------------------------------------------------------------------------------


def visible_addresses(dht: DHT, timeout_s: float = DEFAULT_TIMEOUT_S) -> tuple[str, ...]:
    """Addresses at which other peers can reach this DHT, each with its peer id. Loopback ones only if there is nothing
    else; none in client mode.

    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    addresses = call(dht, "asking for its addresses", _addresses, timeout_s=timeout_s)
    public = [address for address in addresses if not address.startswith(("/ip4/127.", "/ip6/::1/"))]
    return tuple(dict.fromkeys(public or addresses))


async def _addresses(node: DHTNode) -> list[str]:
    with contextlib.suppress(ValueError):  # it listens nowhere
        return [str(address) for address in await node.get_visible_maddrs(latest=True)]
    return []


def visible_peer(dht: DHT, timeout_s: float = DEFAULT_TIMEOUT_S) -> PeerInfo:
    """The same with the peer id, as hivemind's PeerInfo.

    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    peer_id = call(dht, "asking for its peer id", _peer_id, timeout_s=timeout_s)
    return PeerInfo(peer_id, [Multiaddr(text) for text in visible_addresses(dht, timeout_s)])


async def _peer_id(node: DHTNode) -> PeerID:
    return node.peer_id


def peers_line(dht: DHT, timeout_s: float = DEFAULT_TIMEOUT_S) -> str:
    """The one line to copy to join this swarm: ``--initial_peers /ip4/.../p2p/...``; empty in client mode.

    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    addresses = visible_addresses(dht, timeout_s)
    return f"--initial_peers {' '.join(addresses)}" if addresses else ""


def resolve_p2p(dht: DHT, timeout_s: float = DEFAULT_TIMEOUT_S) -> str:
    """Address of the DHT's libp2p daemon, for ``P2P.replicate`` in an event loop of one's own. (hivemind's
    ``dht.replicate_p2p`` hands every event loop the same replica.)

    :raises CallTimeout: if this takes too long
    :raises LifecycleError: if the DHT is not running
    """
    return call(dht, "asking for its libp2p daemon", _p2p_socket, timeout_s=timeout_s)


async def _p2p_socket(node: DHTNode) -> str:
    return str(node.p2p.daemon_listen_maddr)
