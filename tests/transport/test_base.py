"""Deadlines: what is late is a CallTimeout, and an error of the call itself stays what it is."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest
import torch

from moe.errors import CallTimeout, DeadlineExceeded, TooFewExperts
from moe.testing import FakeClock
from moe.transport.base import FORWARD, Budget, Call, within


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(coroutine)


async def fail(error: BaseException) -> None:
    raise error


def test_a_result_in_time_is_given() -> None:
    assert run(within(asyncio.sleep(0, "done"), 5.0, "waiting")) == "done"
    assert run(within(asyncio.sleep(0, "done"), None, "waiting")) == "done"


def test_what_is_late_is_cancelled_and_named() -> None:
    cancelled = []

    async def slow() -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    with pytest.raises(CallTimeout, match=r"reading: no answer within 0\.01 s") as caught:
        run(within(slow(), 0.01, "reading", "peer"))
    assert caught.value.peer == "peer"
    assert cancelled == [True]


@pytest.mark.parametrize("error", [DeadlineExceeded("d"), TooFewExperts("t"), CallTimeout("c"), ValueError("v")])
@pytest.mark.parametrize("timeout_s", [5.0, None])
def test_an_error_of_the_call_is_not_taken_for_lateness(error: Exception, timeout_s: float | None) -> None:
    """Several of our errors are TimeoutErrors: what a server says about its deadline is not our waiting."""
    with pytest.raises(type(error)) as caught:
        run(within(fail(error), timeout_s, "waiting"))
    assert caught.value is error


def test_a_foreign_timeout_error_without_a_limit_stays_what_it_is() -> None:
    with pytest.raises(TimeoutError, match="socket"):
        run(within(fail(TimeoutError("socket")), None, "waiting"))


def test_a_budget_is_shared_by_several_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = FakeClock()
    monkeypatch.setattr("moe.transport.base.time.monotonic", clock)
    budget = Budget(10.0)
    assert budget.left_s() == 10.0
    assert budget.left_s(3.0) == 3.0
    clock.advance(8.0)
    assert budget.left_s(3.0) == pytest.approx(2.0)
    clock.advance(2.0)
    with pytest.raises(CallTimeout, match="budget of 10 s is used up"):
        budget.left_s(3.0)


def test_no_limit_has_to_be_asked_for() -> None:
    assert Budget(None).left_s() is None
    assert Budget(None).left_s(3.0) == 3.0


def test_the_size_of_a_request() -> None:
    call = Call(FORWARD, "e.0", None, [torch.zeros(3, 4), torch.zeros(5, dtype=torch.int64)], [0, 0])
    assert call.request_bytes == 3 * 4 * 4 + 5 * 8


def test_a_cancellation_is_not_lost_when_the_result_comes_at_the_same_moment() -> None:
    async def both_at_once() -> str:
        future: asyncio.Future[str] = asyncio.get_running_loop().create_future()

        async def wait() -> str:
            return await within(future, 5.0, "waiting")

        waiting = asyncio.ensure_future(wait())
        await asyncio.sleep(0.01)
        future.set_result("there")
        waiting.cancel()
        try:
            await waiting
        except asyncio.CancelledError:
            return "cancelled"
        return "went on"

    assert run(both_at_once()) == "cancelled"


def test_what_does_not_let_itself_be_cancelled_is_not_waited_for() -> None:
    ended = []

    async def stubborn() -> None:
        for _ in range(40):
            try:
                await asyncio.sleep(0.1)
            except asyncio.CancelledError:
                continue
        ended.append(True)

    async def wait() -> None:
        task = asyncio.ensure_future(stubborn())
        with pytest.raises(CallTimeout):
            await within(task, 0.05, "waiting")
        assert not ended
        await task

    run(wait())
