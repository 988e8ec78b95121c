"""The peers of the interop tests: stock ones in a process of their own, ours in this one. Owns: their start and certain end."""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]
HOST_MADDRS = ["/ip4/127.0.0.1/tcp/0"]
START_TIMEOUT_S = 90.0  # for importing torch and hivemind, and forking two processes per stock expert
CALL_TIMEOUT_S = 30.0

STOCK_UIDS = {
    kind: f"stock_{kind.lower()}.0"
    for kind in ("plain", "kwargs", "masks", "nested", "bfloat16", "FLOAT16", "UNIFORM_8BIT", "QUANTILE_8BIT", "wide")
}
STOCK_GRID_UIDS = ["stocks.0", "stocks.1", "stocks.3", "mixed.0.1", "mixed.1.0"]  # the rest of the last grid is ours


def pack(value: Any) -> bytes:
    """Plain data and tensors -> bytes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def unpack(data: bytes) -> Any:
    """Inverse of pack."""
    return torch.load(io.BytesIO(data), weights_only=True)


class StockError(Exception):
    """What the stock peer raised.

    :ivar kind: name of its class
    :ivar seconds: how long it took to be raised
    """

    def __init__(self, kind: str, message: str, seconds: float):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message, self.seconds = kind, message, seconds


class StockPeer:
    """A process with a stock server and a stock client in it (``tests.interop.stock_peer``)."""

    def __init__(self) -> None:
        self._connection, theirs = multiprocessing.Pipe()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115, closed with the peer
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.interop.stock_peer", str(theirs.fileno())],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            pass_fds=[theirs.fileno()],
            start_new_session=True,  # so that it can be ended together with all that it has started
        )
        theirs.close()
        self.client_id, self.server_id = "", ""

    def join(self, initial_peers: Sequence[str]) -> None:
        """Let it join a swarm; wait until its server serves and its client finds the experts."""
        self._connection.send_bytes(pack(list(initial_peers)))
        self.client_id, self.server_id = self._receive("starting", START_TIMEOUT_S)

    def ask(self, command: str, *args: Any, **kwargs: Any) -> Any:
        """Let it run a method of its client.

        :raises StockError: if that raised
        """
        self._connection.send_bytes(pack((command, args, kwargs)))
        return self._receive(command, CALL_TIMEOUT_S)

    def _receive(self, what: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        while not self._connection.poll(0.1):  # not the whole time: its forks hold the pipe open when it has died
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"the stock peer has died or hangs while {what}; its log ends with\n{self._last_words()}"
                )
        answer = unpack(self._connection.recv_bytes())
        if "error" in answer:
            raise StockError(answer["error"], answer["message"], answer["seconds"])
        return answer["result"]

    def _last_words(self) -> str:
        """The end of what it has written, and where it is now: the stacks of all threads of its Python processes."""
        for process in alive_in_group(self._process.pid):
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("python"):
                    process.send_signal(signal.SIGUSR1)
                    time.sleep(0.05)  # one after another
        self._log.seek(0)
        return self._log.read().decode(errors="replace")[-100_000:]

    def close(self) -> None:
        """End it and everything it has started, the hard way: stock servers do not always end by themselves."""
        end_group(self._process.pid)
        self._process.wait()
        self._connection.close()
        self._log.close()


def end_group(group: int) -> None:
    """Kill what is left of a process group, and see that it is gone, with the socket files of its libp2p daemons."""
    sockets = _socket_files(group)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
    deadline = time.monotonic() + 10.0
    while members := alive_in_group(group):
        assert time.monotonic() < deadline, f"still there after SIGKILL: {members}"
        time.sleep(0.05)
    for path in sockets:
        path.unlink(missing_ok=True)


def _socket_files(group: int) -> set[Path]:
    """Those of libp2p daemons, which nobody removes when they are killed."""
    found: set[Path] = set()
    for process in alive_in_group(group):
        with contextlib.suppress(psutil.Error):
            paths = (str(connection.laddr) for connection in process.net_connections("unix"))
            found.update(Path(path) for path in paths if path.startswith("/tmp/hivemind-"))
    return found


def alive_in_group(group: int) -> list[psutil.Process]:
    """The running processes of a group."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found
