"""Event loops in background threads. Owns: their threads, and getting results out of them with deadlines.

The client side of a process shares one loop (``client_loop``), made on first use and again after a fork; each Server has its
own. Must not know what runs in them.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import logging
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

import uvloop

from moe.errors import CallTimeout, LifecycleError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CLIENT_LOOP_NAME = "moe-client-loop"


class EventLoopThread:
    """A uvloop event loop that runs in its own daemon thread until stopped."""

    def __init__(self, name: str):
        self.name = name
        self.pid = os.getpid()
        self._loop = uvloop.new_event_loop()
        self._stopping = False
        # So that nothing is submitted behind the end. Reentrant: a garbage collection in the middle of a submit may run a
        # finalizer that submits.
        self._submitting = threading.RLock()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def __repr__(self) -> str:
        return f"EventLoopThread({self.name!r}, {'running' if self.is_alive() else 'stopped'})"

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop; use it from within coroutines only."""
        return self._loop

    def is_alive(self) -> bool:
        """True until stop."""
        return self._thread.is_alive() and self.pid == os.getpid() and not self._stopping

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine in the loop.

        :returns: its future; cancelling it cancels the coroutine
        :raises LifecycleError: the loop was stopped
        """
        if self.pid == os.getpid():  # else the lock may be held for ever, by a thread that was not forked
            with self._submitting:
                if self.is_alive():
                    return asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        coroutine.close()
        raise LifecycleError(f"event loop {self.name} is not running")

    def run(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run a coroutine in the loop and wait for its result.

        :raises LifecycleError: called from inside this very loop, where waiting would block it for ever; or the loop
            was stopped, before or meanwhile
        :raises CallTimeout: no result within ``timeout_s``; the coroutine is cancelled
        """
        if threading.current_thread() is self._thread:
            coroutine.close()
            raise LifecycleError(
                f"a blocking call was made from inside the event loop {self.name}; use the asynchronous form there"
            )
        future = self.submit(coroutine)
        try:
            return future.result(timeout_s)
        except concurrent.futures.TimeoutError as e:
            if future.done() and not future.cancelled() and future.exception() is e:
                raise  # the coroutine's own error, not our waiting
            future.cancel()
            raise CallTimeout(f"no result within {timeout_s} s") from None
        except concurrent.futures.CancelledError:
            raise LifecycleError(f"event loop {self.name} was stopped, or the call in it cancelled") from None
        except BaseException:
            future.cancel()  # KeyboardInterrupt in the waiting thread: do not leave the call running
            raise

    def stop(self, timeout_s: float = 5.0) -> None:
        """Cancel what runs, end the thread, close the loop. May be called more than once."""
        if self.pid != os.getpid() or threading.current_thread() is self._thread:
            return
        with self._submitting:
            if self.is_alive():
                self._stopping = True
                self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout_s)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            while not self._stopping:
                try:
                    self._loop.run_forever()
                except (
                    BaseException
                ):  # SystemExit or KeyboardInterrupt of somebody's code: all others would wait for ever
                    logger.exception("something that ran in event loop %s wanted to end it", self.name)
        finally:
            tasks = asyncio.all_tasks(self._loop)
            for task in tasks:
                task.cancel()
            if tasks:
                self._loop.run_until_complete(asyncio.wait(tasks, timeout=1.0))
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            with contextlib.suppress(
                RuntimeError
            ):  # no new thread at interpreter exit, where the pool has ended before
                self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()


_client_loop: EventLoopThread | None = None
_client_loop_lock = threading.Lock()  # not for finalizers: they may run while it is held, and have running_client_loop


def client_loop() -> EventLoopThread:
    """The loop that all clients of this process share."""
    global _client_loop
    with _client_loop_lock:
        if _client_loop is None or not _client_loop.is_alive():
            _client_loop = EventLoopThread(CLIENT_LOOP_NAME)
        return _client_loop


def running_client_loop() -> EventLoopThread | None:
    """``client_loop``, if there is one; takes no lock."""
    loop = _client_loop
    return loop if loop is not None and loop.is_alive() else None


def _stop_client_loop() -> None:
    """At exit: end what runs in the loop, instead of letting the interpreter find it half done."""
    if _client_loop is not None:
        _client_loop.stop(timeout_s=2.0)


def _after_fork() -> None:
    global _client_loop, _client_loop_lock
    _client_loop, _client_loop_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_after_fork)
atexit.register(_stop_client_loop)
