"""Which waiting tasks form the next batch. Pure: no clock (``now`` is passed in), no threads, no tensors.

Owns: groups of equal signature, urgency, expiry, bounds. Must not know: what a task holds or who waits for it.

Rules. Tasks merge only within a group. The most urgent task (lowest priority number, then longest waiting) decides which
group goes next, so no group starves however busy another one is. A group is ready at once, except where a
``min_batch_size`` is asked for: then it waits until the rows are there, or for ``max_wait_s`` at most.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Hashable
from typing import NamedTuple

from moe.config import PoolConfig
from moe.errors import Overloaded, SchemaError


class Rank(NamedTuple):
    """How urgent a task is: the smaller, the sooner. Time waited decides among equal priorities."""

    priority: float
    submitted_at: float
    number: int


class Waiting(NamedTuple):
    """A task as the batching sees it.

    :ivar rank: its urgency; ``rank.number`` identifies it within the queue
    :ivar rows: examples it holds
    :ivar group: tasks of equal group may share a batch
    :ivar deadline: time after which nobody waits for it any more (``math.inf``: never)
    :ivar peer: who sent it, for the per-peer bound
    """

    rank: Rank
    rows: int
    group: Hashable
    deadline: float = math.inf
    peer: str = ""


class BatchQueue:
    """Waiting tasks of one pool, grouped by signature."""

    def __init__(self, config: PoolConfig):
        self.config = config
        self._waiting: dict[int, Waiting] = {}
        self._groups: dict[Hashable, list[Rank]] = {}  # per group a heap of ranks; may hold removed tasks
        self._rows: dict[Hashable, int] = {}
        self._peers: dict[str, int] = {}
        self._by_rank: list[tuple[Rank, _Unordered]] = []  # heap over all groups; may hold removed tasks
        self._by_deadline: list[tuple[float, int]] = []  # likewise

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        return f"BatchQueue({len(self._waiting)} tasks, {sum(self._rows.values())} rows, {len(self._groups)} groups)"

    def add(self, task: Waiting) -> None:
        """Let a task wait.

        :raises SchemaError: more rows than fit into any batch
        :raises Overloaded: too many tasks wait already, in all or from this peer
        """
        config = self.config
        if task.rows > config.max_batch_size:
            raise SchemaError(
                f"a request of {task.rows} rows cannot be processed: max_batch_size is {config.max_batch_size}; "
                f"split it into smaller ones"
            )
        if len(self._waiting) >= config.max_pending_tasks:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already; try again later")
        of_peer = self._peers.get(task.peer, 0)
        if of_peer >= config.max_pending_per_peer:
            raise Overloaded(f"{of_peer} of your requests are waiting already; try again later")
        number = task.rank.number
        assert number not in self._waiting, "a task's number must be unique"
        self._waiting[number] = task
        heapq.heappush(self._groups.setdefault(task.group, []), task.rank)
        heapq.heappush(self._by_rank, (task.rank, _Unordered(task.group)))
        if task.deadline < math.inf:
            heapq.heappush(self._by_deadline, (task.deadline, number))
        self._rows[task.group] = self._rows.get(task.group, 0) + task.rows
        self._peers[task.peer] = of_peer + 1

    def remove(self, number: int) -> Waiting | None:
        """Forget a task whose caller has gone; None if it does not wait (any more)."""
        task = self._waiting.pop(number, None)
        if task is None:
            return None
        self._rows[task.group] -= task.rows
        self._peers[task.peer] -= 1
        if not self._peers[task.peer]:
            del self._peers[task.peer]
        group = self._groups[task.group]
        while group and group[0].number not in self._waiting:
            heapq.heappop(group)
        if not group:
            del self._groups[task.group], self._rows[task.group]
        if max(len(self._by_rank), len(self._by_deadline)) > 2 * len(self._waiting) + 64:
            self._rebuild_heaps()  # they hold mostly removed tasks
        return task

    def expire(self, now: float) -> list[Waiting]:
        """Remove and return the tasks whose deadline has passed."""
        expired = []
        while self._by_deadline and self._by_deadline[0][0] <= now:
            task = self.remove(heapq.heappop(self._by_deadline)[1])
            if task is not None:
                expired.append(task)
        return expired

    def most_urgent(self, now: float) -> Rank | None:
        """Rank of the task that the next batch would begin with, or None if nothing is ready."""
        group = self._ready_group(now)
        return self._groups[group][0] if group is not None else None

    def next_event(self, now: float) -> float:
        """When to look again although nobody submits: a group has waited long enough, or a deadline passes."""
        events = [math.inf]
        if self.config.min_batch_size > 1:
            events += [max(now, ranks[0].submitted_at + self.config.max_wait_s) for ranks in self._groups.values()]
        while self._by_deadline and self._by_deadline[0][1] not in self._waiting:
            heapq.heappop(self._by_deadline)
        if self._by_deadline:
            events.append(self._by_deadline[0][0])
        return min(events)

    def take(self, now: float) -> list[Waiting]:
        """Remove and return the next batch: the most urgent ready group's tasks, most urgent first, while they fit."""
        group = self._ready_group(now)
        batch: list[Waiting] = []
        rows = 0
        while group in self._groups:
            assert group is not None
            task = self._waiting[self._groups[group][0].number]
            if batch and rows + task.rows > self.config.max_batch_size:
                break
            self.remove(task.rank.number)
            batch.append(task)
            rows += task.rows
        return batch

    def _rebuild_heaps(self) -> None:
        waiting = self._waiting.values()
        self._by_rank = [(task.rank, _Unordered(task.group)) for task in waiting]
        self._by_deadline = [(task.deadline, task.rank.number) for task in waiting if task.deadline < math.inf]
        heapq.heapify(self._by_rank)
        heapq.heapify(self._by_deadline)
        for group, ranks in self._groups.items():
            self._groups[group] = [rank for rank in ranks if rank.number in self._waiting]
            heapq.heapify(self._groups[group])

    def _ready_group(self, now: float) -> Hashable | None:
        if not self._waiting:
            return None
        if self.config.min_batch_size > 1:
            ready = [
                (ranks[0], _Unordered(group))
                for group, ranks in self._groups.items()
                if self._rows[group] >= self.config.min_batch_size
                or now >= ranks[0].submitted_at + self.config.max_wait_s
            ]
            return min(ready)[1].value if ready else None
        while self._by_rank[0][0].number not in self._waiting:
            heapq.heappop(self._by_rank)
        return self._by_rank[0][1].value


class _Unordered:
    """Carries a group through a heap without taking part in comparisons (groups need not be comparable)."""

    __slots__ = ("value",)

    def __init__(self, value: Hashable):
        self.value = value

    def __lt__(self, other: object) -> bool:
        return False
