"""A lock that is held in one event loop holds up nobody in another one, and nobody for longer than the budget."""

from __future__ import annotations

import asyncio
import gc
import os
import threading

import pytest
import torch

from moe.client import expert
from moe.client.loop_lock import LoopLock
from moe.client.references import Referring
from moe.errors import CallTimeout
from moe.testing import MemoryTransport
from moe.transport.base import Budget
from moe.transport.event_loop import EventLoopThread


def test_one_at_a_time() -> None:
    lock, inside = LoopLock(), 0

    async def work() -> None:
        nonlocal inside
        async with lock.held(Budget(10.0), "work"):
            inside += 1
            assert inside == 1
            await asyncio.sleep(0)
            inside -= 1

    async def run() -> None:
        await asyncio.gather(*(work() for _ in range(10)))

    asyncio.run(run())


def test_nobody_waits_longer_than_the_budget() -> None:
    async def run() -> None:
        lock = LoopLock()
        async with lock.held(Budget(None), "first"):
            with pytest.raises(CallTimeout, match="info of e.0"):
                async with lock.held(Budget(0.05), "info of e.0"):
                    raise AssertionError
        async with lock.held(Budget(1.0), "again"):
            pass

    asyncio.run(run())


def test_another_loop_does_not_wait_for_what_the_first_one_holds() -> None:
    lock, holding = LoopLock(), threading.Event()

    async def hold() -> None:
        async with lock.held(Budget(None), "for ever"):
            holding.set()
            await asyncio.sleep(3600)

    async def take() -> str:
        async with lock.held(Budget(5.0), "after a fork"):
            return "taken"

    parent, child = EventLoopThread("parent"), EventLoopThread("child")
    try:
        parent.submit(hold())
        assert holding.wait(5)
        assert child.run(take(), 5.0) == "taken"
    finally:
        parent.stop()
        child.stop()
        del parent, child
        gc.collect()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_what_threads_of_the_parent_hold_is_free_in_a_child() -> None:
    transport = MemoryTransport({})
    referring = Referring.over(transport)
    with expert._making_transports, referring.digests._lock:
        child = os.fork()
        if child == 0:  # no pytest from here on
            code = 1
            try:
                taken = expert._making_transports.acquire(timeout=5)
                digest = Referring.over(transport).digests.of(torch.zeros(8))
                code = 0 if taken and len(digest) == 32 else 2
            finally:
                os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert Referring.over(transport) is referring
