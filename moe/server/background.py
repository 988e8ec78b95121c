"""A server in a process of its own. Owns: that process, from its start to its certain end.

The process is spawned, not forked: forking a process that has threads (torch, event loops, CUDA) is how hivemind's
background servers deadlock at start. Must not know: what the server hosts.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import signal
import sys
import threading
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from moe.config import ServerConfig
from moe.dht import PeerInfo, visible_peer
from moe.errors import LifecycleError
from moe.server.layers import name_to_block
from moe.server.layers.custom_experts import take_over_hiveminds
from moe.server.server import Server

logger = logging.getLogger(__name__)

_SHUTDOWN = "SHUTDOWN"


@contextlib.contextmanager
def background_server(
    *args: Any, shutdown_timeout: float = 5.0, start_timeout: float = 120.0, **kwargs: Any
) -> Iterator[PeerInfo]:
    """Run ``Server.create(*args, **kwargs, start=True)`` in a new process while the body runs.

    Arguments must be picklable. As with every spawned process, a script that calls this needs an
    ``if __name__ == "__main__":`` guard.

    :param shutdown_timeout: seconds for a graceful stop before the process is killed, apart from saving: with a
        ``checkpoint_dir``, a server has ``stop_timeout_s`` for that
    :param start_timeout: seconds until the server must be ready
    :returns: the server's peer id and addresses
    :raises LifecycleError: (a RuntimeError) "Server failed to start: ..." with the cause; also when the process just dies
    """
    take_over_hiveminds()
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=True)
    modules = sorted({block.__module__ for block in name_to_block.values()} - {"__main__"})
    process = context.Process(target=_serve, args=(theirs, modules, args, kwargs), name="moe-background-server")
    try:
        process.start()
        theirs.close()  # so that the end of the child is the end of the pipe
        yield _await_start(ours, process, start_timeout)
    finally:
        with contextlib.suppress(OSError):
            ours.send(_SHUTDOWN)
        process.join(shutdown_timeout + _may_save_s(kwargs))
        if process.is_alive():
            logger.warning("the background server did not stop within %s s; killing it", shutdown_timeout)
            process.kill()
            process.join()
        ours.close()
        process.close()


def _may_save_s(options: dict[str, Any]) -> float:
    if options.get("checkpoint_dir") is None:
        return 0.0
    config: ServerConfig = options.get("config") or ServerConfig()
    return float(options.get("stop_timeout_s") or config.stop_timeout_s)


def _await_start(pipe: Connection, process: Any, timeout_s: float) -> PeerInfo:
    if not wait([pipe, process.sentinel], timeout_s):
        raise LifecycleError(f"Server failed to start: not ready within {timeout_s} s")
    try:
        ok, data = pipe.recv()
    except (EOFError, OSError):
        process.join(1.0)
        raise LifecycleError(
            f"Server failed to start: its process ended with exit code {process.exitcode}. If this is a script, does it "
            f'call background_server under `if __name__ == "__main__":`?'
        ) from None
    if not ok:
        raise LifecycleError(f"Server failed to start: {data}")
    assert isinstance(data, PeerInfo)
    return data


def _serve(pipe: Connection, modules: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """The child: serve until told to stop, or the parent is gone."""
    stopping = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # not only the parent may say so
        signal.signal(number, lambda *_: stopping.set())
    try:
        for module in modules:  # expert classes that the parent has registered
            with contextlib.suppress(ImportError):
                importlib.import_module(module)
        server = Server.create(*args, start=True, **kwargs)
        peer = visible_peer(server.dht)
    except BaseException as e:
        logger.debug("could not start", exc_info=True)
        pipe.send((False, f"{type(e).__name__} {e}"))
        sys.exit(1)
    try:
        pipe.send((True, peer))
        while not stopping.is_set() and not server.wait(0.05) and not pipe.poll(0.2):
            pass
    finally:
        server.shutdown()
    sys.exit(1 if server.lost or (server.failure is not None and not stopping.is_set()) else 0)
