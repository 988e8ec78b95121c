"""Real servers in processes of their own, on this machine. Owns: starting them in a swarm of their own, their logs, and
that nothing of them is left, whatever happens.

Must not know: what a server does. It is started by its command line and stopped by signals, as a user would.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import re
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from moe.dht import DHT, start_dht, stop_dht
from moe.errors import LifecycleError
from moe.server.idle import LEFT_AT_THE_END
from moe.testing.processes import Guard, kill_session, session_members

logger = logging.getLogger(__name__)

SERVER_COMMAND = (sys.executable, "-m", "moe.cli.run_server")
READY_PREFIX = "--initial_peers"  # the line a server prints when it can be called
LOG_TAIL_LINES = 40
_POLL_S = 0.02
_LOOPBACK_PORT = re.compile(r"/ip4/127\.0\.0\.1/tcp/(\d+)/p2p/")


class _ServerProcess:
    """One server: its arguments, its process (if it runs), its files."""

    def __init__(self, name: str, arguments: Sequence[str], directory: Path):
        self.name, self.arguments = name, list(arguments)
        self.identity_path, self.log_path = directory / f"{name}.id", directory / f"{name}.log"
        self.out_path = directory / f"{name}.out"
        self.process: subprocess.Popen[bytes] | None = None
        self.session: int | None = None
        self.maddrs: list[str] = []
        self.port = 0  # 0: any free one; then always the same, so that others find it again

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def log_tail(self) -> str:
        text = self.log_path.read_text(errors="replace") if self.log_path.exists() else ""
        return "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "(empty)"


class LocalSwarm:
    """Server processes on loopback, in a swarm of their own. A context manager.

    >>> with LocalSwarm(["--expert_uids", "ffn.0"], ["--expert_uids", "ffn.1"]) as swarm:
    ...     expert, = get_experts(swarm.dht(), ["ffn.1"])
    ...     swarm.kill(1)

    Servers are numbered in the order given. A restarted server keeps its peer id and its port.

    :param servers: command-line arguments of ``hivemind-server``, one list per server
    :param directory: for logs and identities; None: a temporary one, removed at the end
    :param start_timeout_s: for one server to be ready
    :param stop_timeout_s: for a server that was asked to end, before it is killed
    :param env: environment variables, added to those of this process
    :param command: the program, for tests of this class
    :ivar left_behind: set by ``stop``: what servers that were asked to end still had of requests then (see ``check_idle``).
        At the end of the ``with`` that is an AssertionError
    """

    def __init__(
        self,
        *servers: Sequence[str],
        directory: str | Path | None = None,
        start_timeout_s: float = 60.0,
        stop_timeout_s: float = 10.0,
        env: Mapping[str, str] | None = None,
        command: Sequence[str] = SERVER_COMMAND,
    ):
        self._own_directory = directory is None
        unused = Path(tempfile.gettempdir(), f"moe-swarm-{secrets.token_hex(8)}")
        self.directory = unused if directory is None else Path(directory)
        self.start_timeout_s, self.stop_timeout_s = start_timeout_s, stop_timeout_s
        self._env, self._command = {**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})}, list(command)
        self._servers = [_ServerProcess(f"server{i}", args, self.directory) for i, args in enumerate(servers)]
        self._dhts: list[Any] = []
        self._guard: Guard | None = None
        self.left_behind: list[str] = []

    def __repr__(self) -> str:
        running = sum(server.running for server in self._servers)
        return f"LocalSwarm({running} of {len(self._servers)} servers run, files in {self.directory})"

    def __len__(self) -> int:
        return len(self._servers)

    def __enter__(self) -> LocalSwarm:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            for server in self._servers:
                logger.error("log of %s:\n%s", server.name, server.log_tail())
        self.stop()
        if error is None and self.left_behind:
            raise AssertionError("; ".join(self.left_behind))

    # --- all servers -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the first server, then all others at once; returns when requests can be served.

        :raises LifecycleError: a server ended, or was not ready in time; shows the end of its log. Nothing is left then
        """
        if self._guard is not None:
            raise LifecycleError("this LocalSwarm was started before")
        self._guard = Guard()
        atexit.register(self.stop)
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=not self._own_directory)
        try:
            for server in self._servers[:1]:
                self._launch(server)
                self._await_ready(server)
            for server in self._servers[1:]:
                self._launch(server)
            for server in self._servers[1:]:
                self._await_ready(server)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End everything: ask the servers first, then kill what is left. May be called more than once."""
        atexit.unregister(self.stop)
        dhts, self._dhts = self._dhts, []
        for dht in dhts:
            with contextlib.suppress(Exception):  # one that will not stop must not keep the servers running
                stop_dht(dht)
        for server in self._servers:
            self._signal(server, signal.SIGTERM)
        deadline = time.monotonic() + self.stop_timeout_s
        for server in self._servers:
            _wait_until(lambda server=server: not server.running, deadline)  # type: ignore[misc]
            self._clean_up(server)
        if self._guard is not None:
            self._guard.close()
            self._guard = None
        self.left_behind = [f"{server.name}: {line}" for server in self._servers for line in _left_behind(server)]
        if self._own_directory:
            shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def initial_peers(self) -> list[str]:
        """Addresses of the running servers, to join this swarm with."""
        return [maddr for server in self._servers if server.running for maddr in server.maddrs]

    def dht(self, **kwargs: Any) -> DHT:
        """A new DHT node in this swarm (in client mode, unless told otherwise); ends with the swarm.

        :param kwargs: of ``moe.dht.start_dht``
        """
        dht = start_dht(self.initial_peers, **{"client_mode": True, **kwargs})
        self._dhts.append(dht)
        return dht

    # --- one server --------------------------------------------------------------------------------------------------

    def is_running(self, index: int) -> bool:
        """True from its start until the server's main process ends."""
        return self._servers[index].running

    def kill(self, index: int) -> None:
        """SIGKILL a server and all its child processes, at once."""
        self._clean_up(self._servers[index])

    def terminate(self, index: int) -> int:
        """SIGTERM a server and wait for its end.

        :returns: its exit code; whether it left something behind, ``processes`` tells
        :raises LifecycleError: it did not end within ``stop_timeout_s``; then it was killed
        """
        self._signal(self._servers[index], signal.SIGTERM)
        return self.wait(index, self.stop_timeout_s)

    def wait(self, index: int, timeout_s: float) -> int:
        """Wait for a server to end.

        :returns: its exit code
        :raises LifecycleError: it was not running, or did not end in time; then it was killed
        """
        server = self._servers[index]
        if server.process is None:
            raise LifecycleError(f"{server.name} is not running")
        if not _wait_until(lambda: not server.running, time.monotonic() + timeout_s):
            self._clean_up(server)
            raise LifecycleError(f"{server.name} did not end within {timeout_s} s. Its log:\n{server.log_tail()}")
        return server.process.wait()

    def restart(self, index: int) -> None:
        """Start a server again (killed first, if it runs), with its arguments, peer id and port.

        :raises LifecycleError: it ended, or was not ready in time
        """
        server = self._servers[index]
        self._clean_up(server)
        self._launch(server)
        self._await_ready(server)

    def processes(self, index: int) -> list[int]:
        """Ids of a server's live processes: its main one and all children, also those that outlived it."""
        session = self._servers[index].session
        return [] if session is None else session_members(session)

    def log(self, index: int) -> str:
        """What a server wrote to stderr, over all its runs."""
        path = self._servers[index].log_path
        return path.read_text(errors="replace") if path.exists() else ""

    # --- helpers -----------------------------------------------------------------------------------------------------

    def _launch(self, server: _ServerProcess) -> None:
        if self._guard is None:
            raise LifecycleError("this LocalSwarm is not running")
        peers = self.initial_peers
        arguments = [
            "--host_maddrs", f"/ip4/127.0.0.1/tcp/{server.port}",
            "--identity_path", str(server.identity_path),
            *(["--initial_peers", *peers] if peers else []),
            *server.arguments,
        ]  # fmt: skip
        with server.out_path.open("wb") as out, server.log_path.open("ab") as log:
            server.process = subprocess.Popen(
                [*self._command, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=log,
                env=self._env,
                start_new_session=True,
            )
        server.session = server.process.pid
        self._guard.add(server.session)

    def _await_ready(self, server: _ServerProcess) -> None:
        deadline = time.monotonic() + self.start_timeout_s
        _wait_until(lambda: bool(_ready_line(server)) or not server.running, deadline)
        line = _ready_line(server)
        if not line:
            code = server.process.poll() if server.process is not None else None
            problem = f"was not ready within {self.start_timeout_s} s" if code is None else f"ended with code {code}"
            raise LifecycleError(f"{server.name} {problem}. Its log:\n{server.log_tail()}")
        server.maddrs = line.removeprefix(READY_PREFIX).split()
        found = _LOOPBACK_PORT.search(line)
        server.port = int(found[1]) if found is not None else server.port

    def _signal(self, server: _ServerProcess, number: int) -> None:
        if server.process is not None and server.running:
            server.process.send_signal(number)

    def _clean_up(self, server: _ServerProcess) -> None:
        """Kill what is left of a server, and take note of its end."""
        if server.session is None:
            return
        left = kill_session(server.session)
        if server.process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.process.wait(timeout=5.0)
        if left:
            logger.error("%s: processes %s cannot be killed", server.name, left)
        elif self._guard is not None:
            self._guard.remove(server.session)


def _ready_line(server: _ServerProcess) -> str | None:
    """The finished line by which a server says where it is, once it has."""
    lines = server.out_path.read_text(errors="replace").splitlines(keepends=True)
    return next((line for line in lines if line.startswith(READY_PREFIX) and line.endswith("\n")), None)


def _left_behind(server: _ServerProcess) -> list[str]:
    """What a server has said about that, over all its runs."""
    text = server.log_path.read_text(errors="replace") if server.log_path.exists() else ""
    return [line for line in text.splitlines() if LEFT_AT_THE_END in line]


def _wait_until(condition: Callable[[], bool], deadline: float) -> bool:
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
