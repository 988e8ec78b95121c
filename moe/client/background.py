"""Work that blocks, in a thread of its own: for those of a pool, such as asyncio's, the interpreter waits when it exits."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def in_thread(function: Callable[..., T], *args: Any) -> concurrent.futures.Future[T]:
    """Run it in a daemon thread that ends with it."""
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(function(*args))
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, name=f"moe-client-{function.__name__.strip('<>_')}", daemon=True).start()
    return future
