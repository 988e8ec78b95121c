"""The processes of a benchmark, from outside. Owns: their start, asking them within a deadline, and their certain end.

A *peer* is ``benchmarks.worker`` in a session of its own, with all that it starts: connection handlers, DHT processes, libp2p
daemons, forked clients. Sessions are killed whole: when a measurement is over, when a peer freezes (stock hivemind does), and,
by a guard process, when this process dies. Must not know: what peers do.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import psutil

import moe
from benchmarks.common import BARE, OURS, STOCK, MeasurementFailed
from moe.cli.run_server import TORCH_ENVIRONMENT

ROOT = Path(__file__).resolve().parents[1]
GUARD = Path(moe.__file__).parent / "testing" / "processes.py"  # run as a script: kills sessions when its stdin ends
START_TIMEOUT_S = 90.0  # to import torch and hivemind, and for a DHT node and a libp2p daemon, on a busy machine
START_ATTEMPTS = 3  # stock servers sometimes freeze at their start: they fork while they have threads
CLIENTS_MARGIN_S = 10.0  # for the process that forked the clients to say which of them froze
LOG_TAIL_CHARS = 2000
SERVER_ENVIRONMENT = {  # what hivemind-server of each system sets
    (OURS, role): TORCH_ENVIRONMENT for role in ("server", "traced server")
}
_POLL_S = 0.05
_KILL_TIMEOUT_S = 20.0  # a stock server with many experts has hundreds of processes


class Footprint(NamedTuple):
    """What a peer takes, with all that it has started.

    :ivar processes: how many there are
    :ivar private_bytes: memory that would be free if they were gone (USS), added up
    """

    processes: int
    private_bytes: int


class Peer:
    """One process of a benchmark. It imports what it needs at once, and begins to work when told to start.

    :param role: what it is, see ``benchmarks.worker``
    :param system: "moe", "hivemind" or "bare"
    """

    def __init__(self, role: str, system: str):
        self.name = f"{system} {role}"
        self._directory = tempfile.mkdtemp(prefix="moe-bench-")
        self._log = Path(self._directory, "log")
        self._connection, theirs = multiprocessing.Pipe()
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.worker", role, system, str(theirs.fileno())],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno()],
                env={**os.environ, **SERVER_ENVIRONMENT.get((system, role), {}), "TMPDIR": self._directory},
                start_new_session=True,  # so that it can be ended together with all that it has started
            )
        theirs.close()
        _guard().add(self._process.pid)

    def start(self, timeout_s: float = START_TIMEOUT_S, **options: Any) -> Any:
        """Let it begin.

        :returns: what others need to know of it
        :raises MeasurementFailed: it froze, died or raised
        """
        return self._ask(options, "starting", timeout_s)

    def ask(self, command: str, timeout_s: float, **arguments: Any) -> Any:
        """Let it run one of its methods.

        :raises MeasurementFailed: it froze, died or raised
        """
        return self._ask({"command": command, "arguments": arguments}, command, timeout_s)

    def _ask(self, message: dict[str, Any], what: str, timeout_s: float) -> Any:
        deadline = time.monotonic() + timeout_s
        try:
            self._connection.send_bytes(json.dumps(message).encode())
            while not self._connection.poll(
                _POLL_S
            ):  # not the whole time: its forks hold the pipe open when it has died
                if self._process.poll() is not None:
                    raise MeasurementFailed(f"{self.name} died while {what}; its log ends with\n{self.log_tail()}")
                if time.monotonic() > deadline:
                    raise MeasurementFailed(f"{self.name} froze for {timeout_s:.0f} s while {what}\n{self.log_tail()}")
            answer = json.loads(self._connection.recv_bytes())
        except (OSError, EOFError) as e:
            raise MeasurementFailed(f"{self.name} is gone ({e}); its log ends with\n{self.log_tail()}") from None
        if "error" in answer:
            raise MeasurementFailed(f"{self.name}: {what}: {answer['error']}\n{self.log_tail()}")
        return answer["result"]

    def footprint(self) -> Footprint:
        """Processes and private memory, now."""
        members = _session_members(self._process.pid)
        private = 0
        for member in members:
            with contextlib.suppress(psutil.Error):  # it has just ended
                private += member.memory_full_info().uss
        return Footprint(len(members), private)

    def log_tail(self) -> str:
        """The end of what it has written."""
        return self._log.read_text(errors="replace")[-LOG_TAIL_CHARS:] if self._log.exists() else ""

    def close(self) -> None:
        """End it and everything it has started, the hard way, and remove their files. May be called twice."""
        session = self._process.pid
        deadline = time.monotonic() + _KILL_TIMEOUT_S
        sockets: set[Path] = set()
        while (members := _session_members(session)) and time.monotonic() < deadline:
            sockets |= _daemon_sockets(members)
            for member in members:
                with contextlib.suppress(psutil.Error):
                    member.kill()
            time.sleep(_POLL_S)
        self._process.wait()
        while (late := _shm_managers(self._directory)) and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        for manager in late:
            with contextlib.suppress(psutil.Error):
                manager.kill()
        for path in sockets:
            path.unlink(missing_ok=True)
        self._connection.close()
        shutil.rmtree(self._directory, ignore_errors=True)
        if not members:
            _guard().remove(session)


def _session_members(session: int) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _shm_managers(directory: str) -> list[psutil.Process]:
    """Those that stock servers have started through torch. They leave the session, and end by themselves as soon as they have
    removed the shared memory of the dead; nobody else would."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.name().startswith("torch_shm") and process.environ().get("TMPDIR") == directory:
                found.append(process)
    return found


def _daemon_sockets(members: Sequence[psutil.Process]) -> set[Path]:
    """Between hivemind and its libp2p daemons, on both sides. Their place is /tmp, and nobody removes those of the killed."""
    found: set[Path] = set()
    for process in members:
        with contextlib.suppress(psutil.Error):
            addresses = (str(connection.laddr) for connection in process.net_connections("unix"))
            found.update(Path(address) for address in addresses if address.startswith("/tmp/hivemind-"))
    return found


class _Guard:
    """A process that outlives this one just long enough to kill the sessions it was told of."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(GUARD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # so that context managers end
        atexit.register(self.close)

    def add(self, session: int) -> None:
        """Kill this session when we are gone."""
        self._tell(f"+{session}\n")

    def remove(self, session: int) -> None:
        """This session has been dealt with."""
        self._tell(f"-{session}\n")

    def close(self) -> None:
        """It kills what is left and ends."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode())
        self._process.stdin.flush()


_the_guard: list[_Guard] = []


def _guard() -> _Guard:
    if not _the_guard:
        _the_guard.append(_Guard())
    return _the_guard[0]


# --- systems under test ----------------------------------------------------------------------------------------------


class Subject:
    """A system under test: peers that are started together, of which the last one is asked.

    :param name: of the system
    :param launch: makes and starts the peers; what it has appended to its argument is ended if it fails
    """

    def __init__(self, name: str, launch: Callable[[list[Peer]], None]):
        self.name = name
        self.peers: list[Peer] = []
        self._launch = launch

    def start(self) -> None:
        """Start all peers.

        :raises MeasurementFailed: not possible, in several attempts if it is stock hivemind
        """
        for attempts_left in reversed(range(START_ATTEMPTS if self.name == STOCK else 1)):
            try:
                self._launch(self.peers)
                return
            except BaseException as e:
                self.close()
                if not isinstance(e, MeasurementFailed) or not attempts_left:
                    raise

    def restart(self) -> None:
        """End all peers and start new ones."""
        self.close()
        self.start()

    def close(self) -> None:
        """End all peers."""
        _close([self])

    def ask(self, command: str, timeout_s: float, **arguments: Any) -> Any:
        """Let the last peer run one of its methods."""
        return self.peers[-1].ask(command, timeout_s, **arguments)

    def ask_clients(self, method: str, timeout_s: float, workers: int | None = None, **arguments: Any) -> list[Any]:
        """Let the clients, or the first ``workers`` of them, do the same at the same time; their results in order."""
        call = {"method": method, "patience_s": timeout_s, "workers": workers, "call": arguments}
        answers: list[Any] = self.ask("run", timeout_s + CLIENTS_MARGIN_S, **call)
        return answers


def served(
    system: str,
    *,
    server: dict[str, Any],
    clients: int = 1,
    client: dict[str, Any] | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
    role: str = "server",
) -> Subject:
    """A server process and client processes.

    :param server: see ``benchmarks.systems``
    :param role: of the server process, see ``benchmarks.worker``
    :param clients: number of client processes
    :param client: options of each client, see ``benchmarks.worker.Client``
    """

    def launch(peers: list[Peer]) -> None:
        peers.append(Peer(role, system))
        peers.append(Peer("clients", system))  # imports while the server starts
        address = peers[0].start(start_timeout_s, **server)
        peers[1].start(start_timeout_s, count=clients, client={"address": address, **(client or {})})

    return Subject(system, launch)


def alone(role: str, system: str, **options: Any) -> Subject:
    """A single process."""

    def launch(peers: list[Peer]) -> None:
        peers.append(Peer(role, system))
        peers[0].start(**options)

    return Subject(system, launch)


def bare(**options: Any) -> Subject:
    """The bare module, see ``benchmarks.worker.Bare``."""
    return alone("bare", BARE, **options)


@contextlib.contextmanager
def running(*subjects: Subject) -> Iterator[list[Subject]]:
    """Start all systems at once; end them all afterwards.

    :returns: those that could be started; only stock hivemind may be missing
    """
    _guard()  # in the main thread, which alone may handle signals
    try:
        with ThreadPoolExecutor(len(subjects)) as pool:
            starting = [(subject, pool.submit(subject.start)) for subject in subjects]
        started = []
        for subject, future in starting:
            try:
                future.result()
                started.append(subject)
            except MeasurementFailed as e:
                if subject.name != STOCK:
                    raise
                print(f"{subject.name} is left out, it does not start: {e}", file=sys.stderr)
        yield started
    finally:
        _close(subjects)


def _close(subjects: Sequence[Subject]) -> None:
    """End all their peers, at once: each takes a while."""
    peers = [peer for subject in subjects for peer in subject.peers]
    for subject in subjects:
        subject.peers.clear()
    if peers:
        with ThreadPoolExecutor(len(peers)) as pool:
            list(pool.map(Peer.close, peers))


def served_each(systems: Sequence[str], **options: Any) -> list[Subject]:
    """``served`` for those of the systems that serve."""
    return [served(system, **options) for system in systems if system in (OURS, STOCK)]
