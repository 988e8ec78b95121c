"""Ending a process well. Owns: signals, the exit of last resort, what child processes do when this process is stopped.

Must not know: what is being stopped. hivemind's DHT lives in a child process that has a child of its own, the libp2p
daemon; the daemon ends when the DHT's process does. Two things follow from that:

- Ctrl+C in a terminal goes to every process of the terminal's foreground group. The daemon would die of it before this
  process could tell the swarm that its experts are leaving. So child processes get a group of their own.
- Child processes must not inherit our signal handlers, or ending them would not end them.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, ClassVar, NoReturn

logger = logging.getLogger(__name__)

STOP_WITHIN_S = 4.5  # after this the hard way; ours: a process told to stop is promised to be gone in 5 s
_ONE_ORDER_S = 0.1  # copies of a signal this close are one order: timeout(1) signals a process, then its whole group
_LOOK_S = 0.1  # how often the deadline looks whether something is still being saved
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopRequested(BaseException):
    """This process was told to stop. Not an Exception, so that nobody handles it by accident."""

    def __init__(self, number: int):
        super().__init__(f"caught {signal.Signals(number).name}")
        self.number = number


class StopSignals:
    """Turns the first SIGINT, SIGTERM or SIGHUP into StopRequested in the main thread; the same one again ends at once.

    After ``begin_stop`` nothing is raised any more, and the process ends the hard way if it is still there
    ``stop_within_s`` later. A signal that was ignored from the start (nohup) stays ignored.

    :param stop_within_s: time for a graceful stop, without the time in which something is saved
    """

    _active: ClassVar[StopSignals | None] = None
    _hook_registered: ClassVar[bool] = False

    def __init__(self, stop_within_s: float = STOP_WITHIN_S):
        self.stop_within_s = stop_within_s
        self._seen: dict[int, float] = {}  # when each signal came first
        self._stopping = False
        self._previous: dict[int, Any] = {}
        self._deadline: threading.Thread | None = None
        self._ended = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether this process was told to stop."""
        return bool(self._seen)

    def __enter__(self) -> StopSignals:
        self.install()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.uninstall()

    def install(self) -> None:
        """Take over the signals. Main thread only."""
        if not StopSignals._hook_registered:
            os.register_at_fork(after_in_child=_prepare_child)
            StopSignals._hook_registered = True
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                self._previous[number] = signal.signal(number, self._on_signal)
        StopSignals._active = self

    def uninstall(self) -> None:
        """Give the signals back and forget the deadline."""
        StopSignals._active = None
        self._ended.set()
        if self._deadline is not None:
            self._deadline.join()
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def begin_stop(self, saving: Callable[[], bool] = lambda: False) -> None:
        """From here on the process is ending: raise nothing any more and start the clock.

        :param saving: True while something is being saved; the clock stands still then. Has to end by itself
        """
        self._stopping = True
        self._deadline = threading.Thread(target=self._end_in_time, args=(saving,), name="moe-stop-deadline")
        self._deadline.daemon = True
        self._deadline.start()

    def prepare_child(self) -> None:
        """In a new child process: leave the terminal's foreground group and drop our signal handlers."""
        for number in self._previous:
            signal.signal(number, signal.SIG_DFL)
        os.setpgid(0, 0)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if now - self._seen.setdefault(number, now) > _ONE_ORDER_S:
            _say("told to stop twice, leaving at once")  # print() is not safe in a signal handler
            end_now(128 + number)
        if not self._stopping:
            self._stopping = True
            raise StopRequested(number)

    def _end_in_time(self, saving: Callable[[], bool]) -> None:
        left_s = self.stop_within_s
        while left_s > 0:
            look_s = min(_LOOK_S, left_s)
            if self._ended.wait(look_s):
                return
            try:
                stands_still = saving()
            except Exception:  # this clock is the last resort: nothing may stop it for good
                logger.exception("cannot tell whether something is being saved")
                stands_still = False
            if not stands_still:
                left_s -= look_s
        _say(f"still not stopped after {self.stop_within_s:.1f} s, leaving at once")
        end_now(1)


def _say(text: str) -> None:
    """Write to stderr, unless that would block, as it does in a pipe that nobody empties: logging may be stuck in it."""
    with contextlib.suppress(OSError, ValueError):
        if select.select([], [2], [], 0.0)[1]:
            os.write(2, f"{text}\n".encode())


def end_children(patience_s: float = 1.0) -> None:
    """End the child processes that are still there: ask first, then kill."""
    children = multiprocessing.active_children()
    for child in children:
        child.terminate()
    for child in children:
        child.join(patience_s)
        if child.is_alive():
            child.kill()
            child.join(patience_s)


def end_now(code: int) -> NoReturn:
    """Kill the child processes and end this one without any cleanup. Does not return."""
    for child in multiprocessing.active_children():
        with contextlib.suppress(OSError, ValueError):
            child.kill()
    os._exit(code)


def leave(code: int) -> NoReturn:
    """End this process after everything has been stopped. Does not return.

    Skips the interpreter's own ending, which is of use to nobody then: with torch loaded it took 2 to 5 s on a busy
    machine with two cores, and 1 s on an idle one.
    """
    for flush in (logging.shutdown, sys.stdout.flush, sys.stderr.flush):
        with contextlib.suppress(OSError, ValueError):  # whoever read this is gone
            flush()
    os._exit(code)


def _prepare_child() -> None:
    if StopSignals._active is not None:
        StopSignals._active.prepare_child()
