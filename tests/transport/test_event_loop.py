"""Event loops in threads: every wait for them ends, also when the loop is stopped under it, or the process forks."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from concurrent.futures import CancelledError, ThreadPoolExecutor
from typing import Any

import pytest
import uvloop

from moe.errors import CallTimeout, DeadlineExceeded, LifecycleError
from moe.transport.event_loop import CLIENT_LOOP_NAME, EventLoopThread, client_loop, running_client_loop
from tests.experts import in_parallel

WAIT_S = 20.0


@pytest.fixture
def thread():
    thread = EventLoopThread("test-loop")
    yield thread
    thread.stop()


async def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("error", [SystemExit(3), KeyboardInterrupt()])
def test_code_that_wants_to_end_the_process_does_not_end_the_loop(
    thread: EventLoopThread, error: BaseException
) -> None:
    def wants() -> None:
        raise error

    thread.loop.call_soon_threadsafe(wants)
    with pytest.raises(type(error)):
        thread.run(fail(error), WAIT_S)
    assert thread.run(asyncio.sleep(0, "alive"), WAIT_S) == "alive"


def test_coroutines_run_in_a_uvloop_of_their_own(thread: EventLoopThread) -> None:
    async def where() -> tuple[str, asyncio.AbstractEventLoop]:
        return threading.current_thread().name, asyncio.get_running_loop()

    name, loop = thread.run(where(), WAIT_S)
    assert name == "test-loop"
    assert isinstance(loop, uvloop.Loop)
    assert loop is thread.loop
    assert thread.is_alive()
    assert repr(thread) == "EventLoopThread('test-loop', running)"


def test_waiting_in_the_loop_for_itself_is_refused_instead_of_never_ending(thread: EventLoopThread) -> None:
    async def nested() -> None:
        thread.run(asyncio.sleep(0), WAIT_S)

    with pytest.raises(LifecycleError, match="from inside the event loop"):
        thread.run(nested(), WAIT_S)


def test_what_takes_too_long_is_cancelled(thread: EventLoopThread) -> None:
    cancelled = threading.Event()

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cancelled.set()

    with pytest.raises(CallTimeout, match=r"0\.05 s"):
        thread.run(slow(), 0.05)
    assert cancelled.wait(WAIT_S)


@pytest.mark.parametrize("error", [DeadlineExceeded("server"), CallTimeout("inner"), TimeoutError("os"), KeyError("x")])
def test_errors_come_through_as_they_are(thread: EventLoopThread, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        thread.run(fail(error), WAIT_S)
    assert str(caught.value) == str(error)


def test_a_call_under_way_ends_when_the_loop_is_stopped(thread: EventLoopThread) -> None:
    with ThreadPoolExecutor(1) as pool:
        entered = threading.Event()

        async def slow() -> None:
            entered.set()
            await asyncio.sleep(60)

        waiting = pool.submit(thread.run, slow())
        assert entered.wait(WAIT_S)
        thread.stop()
        with pytest.raises(LifecycleError, match="was stopped"):
            waiting.result(WAIT_S)


def test_nothing_is_taken_after_the_end(thread: EventLoopThread) -> None:
    thread.stop()
    thread.stop()
    assert not thread.is_alive()
    assert "stopped" in repr(thread)
    for call in (thread.submit, thread.run):
        with pytest.raises(LifecycleError, match="not running"):
            call(asyncio.sleep(0))


def test_whatever_is_submitted_while_the_loop_stops_is_answered_or_refused() -> None:
    for _ in range(10):
        thread = EventLoopThread("test-loop")

        def submit_many(thread: EventLoopThread = thread) -> list[object]:
            outcomes: list[object] = []
            for _ in range(100):
                try:
                    outcomes.append(thread.submit(asyncio.sleep(0.01)))
                except LifecycleError:
                    break
            return outcomes

        def stop(thread: EventLoopThread = thread) -> list[object]:
            time.sleep(0.002)
            thread.stop()
            return []

        for outcome in in_parallel([submit_many, submit_many, stop]):
            for future in outcome:
                try:
                    future.result(WAIT_S)
                except CancelledError:
                    continue


def test_a_stopped_loop_leaves_no_task_behind(thread: EventLoopThread) -> None:
    ended = []

    async def cleans_up() -> None:
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0)
            ended.append(True)

    thread.submit(cleans_up())
    thread.run(asyncio.sleep(0), WAIT_S)
    thread.stop()
    assert ended == [True]
    assert thread.loop.is_closed()


def test_stopping_a_loop_from_inside_does_nothing(thread: EventLoopThread) -> None:
    async def stop() -> None:
        thread.stop()

    thread.run(stop(), WAIT_S)
    assert thread.run(asyncio.sleep(0, "alive"), WAIT_S) == "alive"


def test_all_clients_of_a_process_share_a_loop_which_is_made_again_if_it_was_stopped() -> None:
    first = client_loop()
    assert client_loop() is first
    assert first.name == CLIENT_LOOP_NAME
    first.stop()
    second = client_loop()
    assert second is not first
    assert second.run(asyncio.sleep(0, "alive"), WAIT_S) == "alive"


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_gets_a_loop_of_its_own() -> None:
    parents = client_loop()
    child = os.fork()
    if child == 0:  # no pytest from here on
        code = 1
        try:
            assert not parents.is_alive()
            parents.stop()
            own = client_loop()
            assert own is not parents
            assert own.run(asyncio.sleep(0, "alive"), WAIT_S) == "alive"
            try:
                parents.run(asyncio.sleep(0))
            except LifecycleError:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert parents.run(asyncio.sleep(0, "alive"), WAIT_S) == "alive"


@pytest.mark.timeout(WAIT_S)
def test_a_finalizer_may_submit_in_the_middle_of_a_submit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A garbage collection may run one anywhere. (Seen: it closed a DHT's transport, in the thread that was submitting.)"""
    loop, original = EventLoopThread("moe-test-reentrant"), asyncio.run_coroutine_threadsafe
    finalized: list[Any] = []

    def collecting(coroutine: Any, running: Any) -> Any:
        if not finalized:
            finalized.append(None)
            finalized[0] = loop.submit(asyncio.sleep(0, "finalized"))
        return original(coroutine, running)

    monkeypatch.setattr(asyncio, "run_coroutine_threadsafe", collecting)
    try:
        assert loop.run(asyncio.sleep(0, "submitted"), WAIT_S) == "submitted"
        assert finalized[0].result(WAIT_S) == "finalized"
    finally:
        loop.stop()


def test_a_running_client_loop_is_not_made() -> None:
    running = client_loop()
    assert running_client_loop() is running
    running.stop()
    assert running_client_loop() is None
    assert client_loop() is not running
    assert running_client_loop() is not None
