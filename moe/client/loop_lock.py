"""A lock for coroutines of whichever event loop runs. Owns: what a fork makes of it, and that nobody waits for ever."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from moe.transport.base import Budget, within


class LoopLock:
    """An asyncio.Lock that is another one in another event loop: after a fork, the parent's may be held for ever."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._lock = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def held(self, budget: Budget, what: str) -> AsyncIterator[None]:
        """Hold it.

        :param what: that is waited for, for the message
        :raises CallTimeout: not within the budget
        """
        loop = asyncio.get_running_loop()
        if self._loop is not loop:
            self._loop, self._lock = loop, asyncio.Lock()
        lock = self._lock
        await within(lock.acquire(), budget.left_s(), what)
        try:
            yield
        finally:
            lock.release()
