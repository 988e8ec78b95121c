"""Runtime: the device loop, the one owner of the accelerator. Owns: the thread that runs batches, and its health.

Takes the most urgent ready batch of all pools, so that peers take turns whichever experts they call, moves it to the device
(with ``prefetch_batches``, while the one before is computed: prefetch_generator), lets the pool process it. Must not know: what
a batch computes, where requests come from, or how devices copy.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from prefetch_generator import BackgroundGenerator

from moe.config import note_unused
from moe.errors import ConfigError, LifecycleError, MoEError, Unavailable
from moe.server.execution import as_expert_failure, is_out_of_memory
from moe.server.task_pool import Task, TaskPool
from moe.server.transfer import Loaded, Loader

logger = logging.getLogger(__name__)

BatchHook = Callable[[TaskPool, list[Task]], None]


class Batch(NamedTuple):
    """Tasks of one pool, and their tensors on the device; None: they stay where they are."""

    pool: TaskPool
    tasks: list[Task]
    loaded: Loaded | None = None


class HasPools(Protocol):
    """What Runtime needs of a backend."""

    def get_pools(self) -> tuple[TaskPool, ...]:
        """Pools to serve."""
        ...

    def to(self, device: torch.device | str) -> None:
        """Move to a device."""
        ...


class Runtime:
    """Runs the batches of all pools on one device, in one thread.

    :param backends: by uid; their pools are served, each once. More may come and some go later: ``add``, ``remove``
    :param prefetch_batches: batches moved to the device ahead of time; None: 1 on an accelerator, 0 on CPU, where moving
        is free and every batch taken early is a batch that can no longer grow
    :param sender_threads: hivemind's; has no effect: the thread that has a result gives it to who waits
    :param device: backends and batches are moved there; None: they stay where they are
    :param stats_report_interval: hivemind's; has no effect here: Server's has
    :param module_backends: hivemind's name of ``backends``
    :param on_batch: called in the loop before each batch; what it raises ends the Runtime (for fault injection)
    :param clock: monotonic seconds

    >>> runtime = Runtime(backends, device="cpu")
    >>> runtime.start()
    >>> runtime.shutdown()
    """

    def __init__(
        self,
        backends: Mapping[str, HasPools] | None = None,
        prefetch_batches: int | None = None,
        sender_threads: int = 1,
        device: torch.device | str | None = None,
        stats_report_interval: float | None = None,
        *,
        module_backends: Mapping[str, HasPools] | None = None,
        on_batch: BatchHook | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        backends = backends if backends is not None else module_backends
        if backends is None:
            raise ConfigError("a Runtime takes the backends whose pools it serves: backends={uid: backend}")
        reported_by_server = stats_report_interval is not None
        note_unused("Runtime", sender_threads=sender_threads != 1, stats_report_interval=reported_by_server)
        self.backends: dict[str, HasPools] = dict(backends)
        self.device = torch.device(device) if device is not None else None
        on_accelerator = self.device is not None and self.device.type != "cpu"
        self.prefetch_batches = int(on_accelerator) if prefetch_batches is None else prefetch_batches
        self.pools = tuple(dict.fromkeys(pool for backend in backends.values() for pool in backend.get_pools()))
        self.ready = threading.Event()
        self.failure: BaseException | None = None
        self._on_batch = on_batch
        self._clock = clock
        self._changing = threading.Lock()
        self._signals: queue.SimpleQueue[None] = (
            queue.SimpleQueue()
        )  # a token for each reason to look at the pools again
        self._active: dict[TaskPool, None] = {}  # pools that may have waiting tasks, in order of their first submission
        self._stopping = False
        self._busy_since = self._wanted_until = math.inf
        self._thread: threading.Thread | None = None
        self._on_failure: Callable[[BaseException], None] | None = None

    @property
    def module_backends(self) -> Mapping[str, HasPools]:
        """hivemind's name of ``backends``."""
        return self.backends

    def __repr__(self) -> str:
        state = "failed" if self.failure else "running" if self.is_alive() else "not running"
        return f"Runtime({len(self.backends)} backends on {self.device or 'their own devices'}, {state})"

    def start(self, on_failure: Callable[[BaseException], None] | None = None) -> None:
        """Move backends to the device and begin to serve.

        :param on_failure: called once, in the Runtime thread, if it ends without having been asked to
        :raises LifecycleError: if it was started before
        """
        if self._thread is not None:
            raise LifecycleError("this Runtime was started before; make a new one")
        self._on_failure = on_failure
        if self.device is not None:
            for backend in self.backends.values():
                backend.to(self.device)
        for pool in self.pools:
            pool.attach(self._notify)
            self._notify(pool)  # it may hold tasks already
        self._thread = threading.Thread(target=self._run, name="moe-runtime", daemon=True)
        self._thread.start()
        self.ready.set()

    def add(self, backends: Mapping[str, HasPools]) -> None:
        """Serve more backends, from any thread; the calling one moves them to the device. Allowed before start, too.

        :raises LifecycleError: if the Runtime is stopping or has died
        """
        if self.device is not None and self._thread is not None:
            for backend in backends.values():
                backend.to(self.device)
        with self._changing:
            if self._stopping:
                raise LifecycleError("this Runtime is stopping")
            self.backends = {**self.backends, **backends}
            new = tuple(dict.fromkeys(pool for backend in backends.values() for pool in backend.get_pools()))
            self.pools += new
        if self._thread is not None:
            for pool in new:
                pool.attach(self._notify)
                self._notify(pool)  # it may hold tasks already

    def remove(self, uids: Iterable[str]) -> None:
        """Serve these backends no more: their waiting tasks fail as Unavailable, a batch that runs is finished."""
        leaving = set(uids)
        with self._changing:
            left = [pool for uid in leaving for pool in self.backends[uid].get_pools()]
            self.backends = {uid: backend for uid, backend in self.backends.items() if uid not in leaving}
            self.pools = tuple(pool for pool in self.pools if pool not in left)
        for pool in left:
            pool.close(Unavailable(f"{pool.name} has left this server"))
            pool.detach()
            with self._changing:
                self._active.pop(pool, None)

    def is_alive(self) -> bool:
        """True while the loop runs."""
        return self._thread is not None and self._thread.is_alive() and self.failure is None

    def busy_s(self) -> float:
        """How long the batch at hand has been running; 0 if none is."""
        return max(0.0, self._clock() - self._busy_since)

    def overdue_s(self) -> float:
        """How long nobody has waited for the batch at hand any more; 0 if somebody does, or none is running.

        A batch may take as long as its callers have time. One that goes on without them is stuck, or as good as that.
        """
        return max(0.0, self._clock() - self._wanted_until) if self._busy_since < math.inf else 0.0

    def shutdown(self, timeout_s: float = 5.0) -> bool:
        """Finish the batch at hand, fail all waiting tasks, end the thread. May be called more than once.

        :returns: False if a batch was still running after ``timeout_s``
        """
        self.ready.clear()
        with self._changing:
            self._stopping = True
        self._signals.put(None)
        for pool in self.pools:
            pool.close(Unavailable("the server is stopping"))
        if self._thread is None or self._thread is threading.current_thread():
            return True
        self._thread.join(timeout_s)
        for pool in self.pools:
            pool.detach()
        return not self._thread.is_alive()

    # --- the loop ------------------------------------------------------------------------------------------------

    def _notify(self, pool: TaskPool) -> None:
        with self._changing:
            self._active[pool] = None
        self._signals.put(None)

    def _run(self) -> None:
        torch.get_num_threads()  # without it, torch.set_num_threads holds for MKL only in the thread that called it
        batches: Any = self._batches()
        if self.prefetch_batches:
            batches = BackgroundGenerator(batches, max_prefetch=self.prefetch_batches)
        batch: list[Task] = []
        try:
            for pool, batch, loaded in batches:
                if self._on_batch is not None:
                    self._on_batch(pool, batch)
                self._wanted_until = max(task.deadline for task in batch)
                self._busy_since = self._clock()
                if loaded is not None:
                    for task, tensors in zip(batch, loaded.take()):
                        task.tensors = tensors
                pool.process(batch)
                self._busy_since = math.inf
                batch = []
                del pool, loaded  # one that is removed now must not stay in memory until there is more to do
        except BaseException as e:
            self._fail(e, batch, batches)
        finally:
            self._busy_since = math.inf

    def _fail(self, error: BaseException, batch: list[Task], loaded: Iterator[Batch]) -> None:
        """The loop itself broke: nobody who waits may go on waiting.

        :param batch: the one at hand
        :param loaded: ends now, after those that were loaded ahead
        """
        self.failure = error
        self.ready.clear()
        logger.critical("the Runtime has died", exc_info=error)
        with self._changing:
            self._stopping = True
        self._signals.put(None)
        gone = Unavailable(f"the Runtime of this server has died ({type(error).__name__})")
        _tell(batch, gone)
        for pool in self.pools:
            pool.close(gone)
        for _, ahead, _ in loaded:
            _tell(ahead, gone)
        if self._on_failure is not None:
            self._on_failure(error)

    def _batches(self) -> Iterator[Batch]:
        """Batches in order of urgency, on the device, until shutdown."""
        loader = None if self.device is None or self.device.type == "cpu" else Loader(self.device)
        while (batch := self._next_batch()) is not None:
            if loader is None:
                yield batch
            else:
                yield from self._load(batch.pool, batch.tasks, loader)
            del batch  # as in _run

    def _load(self, pool: TaskPool, tasks: list[Task], loader: Loader) -> Iterator[Batch]:
        """The batch with its tensors on the device; in halves, if there is no room for all at once."""
        try:
            loaded = loader.load([task.tensors for task in tasks])
        except Exception as e:
            if not is_out_of_memory(e):
                _tell(tasks, Unavailable(f"the device of this server has failed ({type(e).__name__})"))
                raise
            if len(tasks) == 1:
                _tell(tasks, as_expert_failure(e))
                return
        else:
            yield Batch(pool, tasks, loaded)
            return
        middle = len(tasks) // 2
        yield from self._load(pool, tasks[:middle], loader)
        yield from self._load(pool, tasks[middle:], loader)

    def _next_batch(self) -> Batch | None:
        while True:
            while not self._signals.empty():
                self._signals.get_nowait()  # what they tell is seen below
            with self._changing:
                if self._stopping:
                    return None
                # under the lock: a submission that comes later puts a pool back that is left out here
                self._active = {pool: None for pool in self._active if not pool.empty}
                pools = list(self._active)
            if not pools:
                self._signals.get()
                continue
            now = self._clock()
            ranks = [(rank, i) for i, pool in enumerate(pools) if (rank := pool.most_urgent(now)) is not None]
            if ranks:
                pool = pools[min(ranks)[1]]
                tasks = pool.load_batch(now)
                if tasks:
                    if len(pools) > 1:
                        peers = {task.peer for task in tasks}
                        for other in pools:
                            if other is not pool:
                                other.served(peers, now)
                    return Batch(pool, tasks)
                continue
            wait_s = min((pool.next_event(now) for pool in pools), default=math.inf) - now
            with contextlib.suppress(queue.Empty):
                self._signals.get(timeout=None if wait_s == math.inf else max(0.0, wait_s))


def _tell(tasks: list[Task], error: MoEError) -> None:
    for task in tasks:
        if not task.future.done():
            task.future.set_exception(error)
