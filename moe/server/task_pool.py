"""Futures and deadlines around batching. Owns: tasks, their futures, and that each is resolved exactly once.

A ``TaskPool`` takes tasks from any thread, and hands batches to the one Runtime thread. Must not know: the device, the
network, or what the tensors mean. It *is* no process or thread (in hivemind each pool was a process with two threads).
"""

from __future__ import annotations

import itertools
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field

import torch

from moe.config import PoolConfig, note_unused
from moe.errors import DeadlineExceeded, ExpertFailed, LifecycleError, MoEError, Overloaded, Unavailable
from moe.schema import BatchTensorProto, Entry, signature, validate
from moe.server.batching import BatchQueue, Rank, Waiting
from moe.server.held_tensors import HeldTensor
from moe.server.kept_forwards import KeptForward

logger = logging.getLogger(__name__)

TaskResult = list[torch.Tensor | None]
_numbers = itertools.count()  # next() of it is atomic


class DeviceLost(Exception):
    """The accelerator is in a state from which only a new process recovers (a sticky CUDA error)."""


@dataclass(eq=False)
class Task:
    """One caller's request on its way through a pool.

    :ivar operation: "forward" or "backward"
    :ivar present: names of the optional kwargs in this call
    :ivar entries: the schema of ``tensors``, flat
    :ivar tensors: the inputs, and for backward the gradients of the outputs after them
    :ivar rows: examples in the call
    :ivar group: tasks of equal group may be run in one batch
    :ivar lane: within a batch, tasks of equal lane share their global tensors; others must be kept apart
    :ivar wants_grad: backward: which inputs want a gradient
    :ivar deadline: monotonic time after which nobody waits; ``math.inf``: never
    :ivar priority: smaller goes first
    :ivar peer: who sent it
    :ivar shared: tensors that other tasks may use as well; if one has been written to, the task must not be run
    :ivar keep: forward: keep its activations, in ``kept``, if it is computed by itself
    :ivar kept: forward: see ``keep``; backward: what was kept of the forward of the same inputs
    :ivar may_have_trained: backward: it has ended with an error after which nobody knows; a repeat must not train again
    """

    operation: str
    present: tuple[str, ...]
    entries: tuple[Entry, ...]
    tensors: list[torch.Tensor]
    rows: int
    group: Hashable
    lane: Hashable = None
    wants_grad: tuple[bool, ...] = ()
    deadline: float = math.inf
    priority: float = 0.0
    peer: str = ""
    shared: tuple[HeldTensor, ...] = ()
    keep: bool = False
    kept: KeptForward | None = None
    may_have_trained: bool = False
    number: int = field(default_factory=lambda: next(_numbers))
    future: Future[TaskResult] = field(default_factory=Future)
    submitted_at: float = 0.0
    started_at: float = 0.0
    finished_at: float = 0.0

    @property
    def inputs(self) -> list[torch.Tensor]:
        """The flat inputs of the module, without gradients of outputs."""
        return self.tensors[: len(self.wants_grad)] if self.operation == "backward" else self.tensors


@dataclass(frozen=True)
class PoolStatistics:
    """Counters since the pool was made.

    :ivar tasks: resolved with a result
    :ivar rows: examples in those
    :ivar batches: batches taken by the Runtime
    :ivar failed: tasks resolved with an error, deadlines included
    :ivar pending: tasks waiting now
    """

    tasks: int = 0
    rows: int = 0
    batches: int = 0
    failed: int = 0
    pending: int = 0


class TaskPool:
    """Collects tasks of one operation of one expert and forms batches of them for Runtime.

    :param process_func: runs a batch of tasks and returns one outcome (result or error) per task
    :param max_batch_size: rows in one batch
    :param name: for logs and statistics
    :param min_batch_size: rows to wait for, for at most ``timeout`` seconds
    :param timeout: see min_batch_size; default 0.05 s
    :param pool_size: tasks that may wait; more are refused as Overloaded. None or 0 (in hivemind: any number): 4096
    :param prefetch_batches: hivemind's; has no effect, see Runtime's
    :param daemon: hivemind's; has no effect, this is no process
    :param start: hivemind's; has no effect, a Runtime serves the pool
    :param clock: monotonic seconds
    """

    def __init__(
        self,
        process_func: Callable[[list[Task]], Sequence[TaskResult | BaseException]],
        max_batch_size: int,
        name: str,
        min_batch_size: int = 1,
        timeout: float | None = None,
        pool_size: int | None = None,
        prefetch_batches: int = 1,
        daemon: bool = True,
        start: bool = False,
        *,
        max_pending_per_peer: int | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        note_unused("TaskPool", prefetch_batches=prefetch_batches != 1, daemon=not daemon, start=start)
        defaults = PoolConfig()
        self.config = PoolConfig(
            min_batch_size=min_batch_size,
            max_batch_size=max_batch_size,
            max_wait_s=defaults.max_wait_s if timeout is None else timeout,
            max_pending_tasks=pool_size or defaults.max_pending_tasks,
            max_pending_per_peer=defaults.max_pending_per_peer
            if max_pending_per_peer is None
            else max_pending_per_peer,
        )
        self.process_func, self.name = process_func, name
        self._clock = clock
        self._lock = threading.Lock()
        self._queue = BatchQueue(self.config)
        self._tasks: dict[int, Task] = {}
        self._closed: MoEError | None = None
        self._on_submit: Callable[[TaskPool], None] | None = None
        self._batches = self._resolved = self._rows = self._failed = 0
        self._this = weakref.ref(self)  # for futures, which are kept longer than a pool that leaves the server

    def __repr__(self) -> str:
        return f"TaskPool({self.name!r}, {self._queue!r})"

    # --- any thread ----------------------------------------------------------------------------------------------

    def submit(self, task: Task) -> Future[TaskResult]:
        """Let a task wait for its batch.

        :returns: its future; cancelling it before the batch starts takes the task out of the queue
        :raises SchemaError: too many rows
        :raises Overloaded: too many tasks. (A task that waits is given this as well, if it has to make room for one of a
            peer that has less waiting.)
        :raises Unavailable: the pool was closed
        """
        now = self._clock()
        task.submitted_at = now
        waiting = Waiting(Rank(task.priority, now, task.number), task.rows, task.group, task.deadline, task.peer)
        with self._lock:
            if self._closed is not None:
                raise _another(self._closed)
            left = self._queue.add(waiting)
            self._tasks[task.number] = task
            displaced = None if left is None else self._tasks.pop(left.rank.number)
        if displaced is not None:
            self._resolve(displaced, Overloaded("the queue is full, and most of it is yours; try again later"))
        number, this = task.number, self._this
        task.future.add_done_callback(lambda future: _forget(this, number) if future.cancelled() else None)
        if self._on_submit is not None:
            self._on_submit(self)
        return task.future

    def submit_task(self, *args: torch.Tensor, priority: float = 0.0, deadline: float = math.inf) -> Future[TaskResult]:
        """hivemind's way in: flat tensors, all of them batched along their first axis."""
        entries = tuple(
            Entry(f"args[{i}]", BatchTensorProto(*arg.shape[1:], dtype=arg.dtype)) for i, arg in enumerate(args)
        )
        rows = validate(entries, args)
        group = signature(self.name, (), entries, args)
        task = Task("forward", (), entries, list(args), rows, group, priority=priority, deadline=deadline)
        return self.submit(task)

    def statistics(self) -> PoolStatistics:
        """Counters, and how many tasks wait."""
        with self._lock:
            return PoolStatistics(self._resolved, self._rows, self._batches, self._failed, len(self._queue))

    def check(self) -> None:
        """Assert that what is counted is what is there."""
        with self._lock:
            self._queue.check()
            assert len(self._queue) == len(self._tasks)

    @property
    def empty(self) -> bool:
        """True if no task waits."""
        return not self._tasks

    def close(self, error: MoEError | None = None) -> None:
        """Refuse new tasks and fail the waiting ones; a batch that runs is not touched."""
        with self._lock:
            self._closed = error or Unavailable(f"{self.name}: the server is stopping")
            left = list(self._tasks.values())
            self._tasks.clear()
            self._queue = BatchQueue(self.config)
        for task in left:
            self._resolve(task, _another(self._closed))

    def reopen(self) -> None:
        """Take tasks again after ``close``."""
        with self._lock:
            self._closed = None

    # --- the Runtime thread ----------------------------------------------------------------------------------------

    def attach(self, on_submit: Callable[[TaskPool], None]) -> None:
        """Let a Runtime know of new tasks.

        :raises LifecycleError: if another one does already
        """
        if self._on_submit is not None:
            raise LifecycleError(f"{self.name} is served by a Runtime already")
        self._on_submit = on_submit

    def detach(self) -> None:
        """Undo attach."""
        self._on_submit = None

    def most_urgent(self, now: float) -> Rank | None:
        """Rank of the task the next batch would begin with; expired tasks are answered on the way."""
        with self._lock:
            expired = [self._tasks.pop(waiting.rank.number) for waiting in self._queue.expire(now)]
            rank = self._queue.most_urgent(now)
        for task in expired:
            waited = now - task.submitted_at
            self._resolve(
                task, DeadlineExceeded(f"not computed: the caller's time was over after {waited:.3f} s in queue")
            )
        return rank

    def served(self, peers: Collection[str], now: float) -> None:
        """These peers were served by another pool: they wait for their next turn here, too."""
        with self._lock:
            self._queue.served(peers, now)

    def next_event(self, now: float) -> float:
        """When to look again although nobody submits."""
        with self._lock:
            return self._queue.next_event(now)

    def load_batch(self, now: float) -> list[Task]:
        """Take the next batch; tasks whose callers have cancelled are left out. May be empty."""
        with self._lock:
            batch = [self._tasks.pop(waiting.rank.number) for waiting in self._queue.take(now)]
            self._batches += 1
        running = [task for task in batch if task.future.set_running_or_notify_cancel()]
        for task in running:
            task.started_at = now
        return running

    def process(self, batch: list[Task]) -> None:
        """Run a batch and resolve its tasks, whatever happens."""
        outcomes: Sequence[TaskResult | BaseException]
        batch = self._still_wanted(batch)
        try:
            outcomes = self.process_func(batch) if batch else ()
            assert len(outcomes) == len(batch), f"{self.name}: {len(outcomes)} outcomes of {len(batch)} tasks"
        except DeviceLost as e:  # no batch can succeed any more: answer these callers, and let the Runtime end
            self._fail(batch, Unavailable(f"the device of this server has failed: {e}"[:500]))
            raise
        except BaseException as e:  # not even SystemExit of somebody's module may leave a caller without an answer
            logger.exception("%s: a batch failed as a whole", self.name)
            self._fail(batch, ExpertFailed(f"the batch failed: {type(e).__name__}"))
            return
        for task, outcome in zip(batch, outcomes):
            self._resolve(task, outcome)  # the last thing done with it: wakes who waits, who may want the GIL

    def _still_wanted(self, batch: list[Task]) -> list[Task]:
        """The tasks whose time is not over: a batch may have been taken long before it is run."""
        now = self._clock()
        if all(task.deadline > now for task in batch):
            return batch
        for task in batch:
            if task.deadline <= now:
                self._resolve(task, DeadlineExceeded("not computed: the caller's time was over before its batch began"))
        return [task for task in batch if task.deadline > now]

    def _fail(self, batch: list[Task], error: MoEError) -> None:
        """Tell the tasks of a batch of which nobody knows how far it came."""
        for task in batch:
            task.may_have_trained = task.operation == "backward"
            self._resolve(task, _another(error))

    def _resolve(self, task: Task, outcome: TaskResult | BaseException) -> None:
        task.finished_at = self._clock()
        failed = isinstance(outcome, BaseException)
        with self._lock:
            self._failed += failed
            self._resolved += not failed
            self._rows += 0 if failed else task.rows
        try:
            if isinstance(outcome, BaseException):
                task.future.set_exception(outcome)
            else:
                task.future.set_result(outcome)
        except InvalidStateError:
            pass  # its caller has cancelled it in the meantime


def _forget(pool_ref: weakref.ref[TaskPool], number: int) -> None:
    """Take a task out of the queue of its pool."""
    pool = pool_ref()
    if pool is not None:
        with pool._lock:
            pool._queue.remove(number)
            pool._tasks.pop(number, None)


def _another(error: MoEError) -> MoEError:
    """A copy to raise: one object raised again and again would remember the frames of all who were told."""
    return type(error)(error.message, peer=error.peer, uid=error.uid)
