"""The import path hivemind's users know for the event loop of all clients; it lives in ``moe.transport.event_loop``."""

from __future__ import annotations

from collections.abc import Coroutine
from typing import Any

from moe.transport.event_loop import client_loop


class RemoteExpertWorker:
    """Runs coroutines in the event loop that all clients of this process share."""

    @classmethod
    def run_coroutine(cls, coro: Coroutine[Any, Any, Any], return_future: bool = False) -> Any:
        """Run a coroutine there.

        :param return_future: give a concurrent Future of the result instead of waiting
        :raises LifecycleError: called without ``return_future`` from that very loop, where waiting would block it for ever
        """
        loop = client_loop()
        return loop.submit(coro) if return_future else loop.run(coro)
