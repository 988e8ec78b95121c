"""Ending processes for certain. Owns: finding and killing all processes of a session, also after its leader has died.

Every server of a LocalSwarm leads a session of its own; its children (hivemind's DHT, the libp2p daemon) may leave its
process group, but stay in the session. A guard process kills the sessions when the test's process is gone, however that
went.

Standard library only: the guard runs this file as a script.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_S = 0.01


def session_members(session: int) -> list[int]:
    """Ids of the processes of a session, without those that are dead and only not waited for."""
    members = []
    for pid, state in _all_processes():
        with contextlib.suppress(OSError):  # gone in the meantime, or not ours to look at
            if os.getsid(pid) == session and state not in ("Z", "X"):
                members.append(pid)
    return members


def kill_session(session: int, timeout_s: float = 5.0) -> list[int]:
    """Kill all processes of a session, those included that are born meanwhile.

    :returns: ids of processes that are still there after ``timeout_s``; normally none
    """
    deadline = time.monotonic() + timeout_s
    while (members := session_members(session)) and time.monotonic() < deadline:
        for pid in members:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_POLL_S)
    return members


def _all_processes() -> Iterator[tuple[int, str]]:
    """(pid, state letter) of every process."""
    if not Path("/proc/self/stat").exists():
        listed = subprocess.run(
            ["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, timeout=10, check=True
        )
        for line in listed.stdout.splitlines():
            pid, state = line.split()[:2]
            yield int(pid), state[0]
        return
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError, IndexError):
                stat = Path("/proc", entry, "stat").read_text(errors="replace")
                yield int(entry), stat[stat.rindex(")") + 2]


class Guard:
    """A process that outlives this one just long enough to kill the sessions entrusted to it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl+C is not for it
        )

    def add(self, session: int) -> None:
        """Kill this session when we are gone."""
        self._tell(f"+{session}\n")

    def remove(self, session: int) -> None:
        """This session has been dealt with."""
        self._tell(f"-{session}\n")

    def close(self) -> None:
        """Nothing is left to guard."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        self._process.wait(timeout=30)

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):  # somebody killed the guard: the context manager still does its work
            self._process.stdin.write(line.encode())
            self._process.stdin.flush()


def main() -> None:
    """Keep a list of sessions as told on stdin; when it ends, kill those on the list."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    sessions: set[int] = set()
    for line in sys.stdin:
        (sessions.add if line[0] == "+" else sessions.discard)(int(line[1:]))
    for session in sessions:
        kill_session(session)


if __name__ == "__main__":
    main()
