"""Which waiting tasks form the next batch. Pure: no clock (``now`` is passed in), no threads, no tensors.

Owns: groups of equal signature, urgency, turns of peers, expiry, bounds. Must not know: what a task holds or who waits for it.

Rules. Tasks merge only within a group. The most urgent task decides which group goes next, so no group starves however busy
another one is. Urgent is, of the lowest priority number, what has waited longest: since it was submitted, or since its peer was
last served, whichever was later. So tasks of one peer go oldest first, and peers take turns: one with a thousand requests is
behind everybody else again after each batch. A batch is then filled with tasks of its group, one of each peer in turn, while
they fit. A group is ready at once, except where a ``min_batch_size`` is asked for: then it waits until the rows are there, or
for ``max_wait_s`` at most. In a full queue, a peer that has less waiting than another takes the place of the other's newest.
"""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Container, Hashable, Iterable
from typing import NamedTuple

from moe.config import PoolConfig
from moe.errors import Overloaded, SchemaError


class Rank(NamedTuple):
    """How urgent a task is: the smaller, the sooner. Time waited decides among equal priorities.

    :ivar submitted_at: or when its peer was last served, if that was later
    """

    priority: float
    submitted_at: float
    number: int


class Waiting(NamedTuple):
    """A task as the batching sees it.

    :ivar rank: its urgency; ``rank.number`` identifies it within the queue
    :ivar rows: examples it holds
    :ivar group: tasks of equal group may share a batch
    :ivar deadline: time after which nobody waits for it any more (``math.inf``: never)
    :ivar peer: who sent it
    """

    rank: Rank
    rows: int
    group: Hashable
    deadline: float = math.inf
    peer: str = ""


class _Ranks:
    """A heap of ranks; may hold those of removed tasks, but never on top, and never more than of waiting ones by much.

    :ivar count: of tasks that wait
    """

    __slots__ = ("_heap", "count")

    def __init__(self) -> None:
        self._heap: list[Rank] = []
        self.count = 0

    @property
    def first(self) -> Rank:
        """The most urgent one."""
        return self._heap[0]

    def add(self, rank: Rank) -> None:
        heapq.heappush(self._heap, rank)
        self.count += 1

    def remove_one(self, waiting: Container[int]) -> None:
        """A task has been removed.

        :param waiting: numbers of those that are left
        """
        self.count -= 1
        heap = self._heap
        if not self.count:
            heap.clear()
            return
        while heap[0].number not in waiting:
            heapq.heappop(heap)
        if len(heap) > 2 * self.count + 64:
            self._heap = [rank for rank in heap if rank.number in waiting]
            heapq.heapify(self._heap)

    def last(self, waiting: Container[int]) -> Rank:
        """The least urgent one."""
        return max(rank for rank in self._heap if rank.number in waiting)


class _Peer(_Ranks):
    """What waits of one peer.

    :ivar served_at: when it last was, since something of it waits here
    :ivar due: the rank of its most urgent task, with its turn; None: it has left
    """

    __slots__ = ("due", "served_at")

    def __init__(self) -> None:
        super().__init__()
        self.served_at = -math.inf
        self.due: Rank | None = None

    def turn(self, rank: Rank) -> Rank:
        """When a task of this peer is due."""
        return rank if rank.submitted_at >= self.served_at else rank._replace(submitted_at=self.served_at)

    def __lt__(self, other: object) -> bool:
        return False  # among equals in a heap


class _Group:
    """What waits of one group, by peer."""

    __slots__ = ("by_peer", "rows")

    def __init__(self) -> None:
        self.by_peer: dict[str, _Ranks] = {}
        self.rows = 0

    @property
    def oldest(self) -> float:
        """When the one was submitted that has waited longest."""
        return min(ranks.first.submitted_at for ranks in self.by_peer.values())


class BatchQueue:
    """Waiting tasks of one pool, grouped by signature."""

    def __init__(self, config: PoolConfig):
        self.config = config
        self._waiting: dict[int, Waiting] = {}
        self._groups: dict[Hashable, _Group] = {}
        self._peers: dict[str, _Peer] = {}
        self._turns: list[tuple[Rank, _Peer]] = []  # heap of peers; those whose rank has changed since are not valid
        self._by_deadline: list[tuple[float, int]] = []  # heap; may hold removed tasks

    def __len__(self) -> int:
        return len(self._waiting)

    def __repr__(self) -> str:
        rows = sum(group.rows for group in self._groups.values())
        return f"BatchQueue({len(self._waiting)} tasks, {rows} rows, {len(self._groups)} groups)"

    def add(self, task: Waiting) -> Waiting | None:
        """Let a task wait.

        :returns: the task that has to leave for it, if any: the newest one of the peer that has most
        :raises SchemaError: more rows than fit into any batch
        :raises Overloaded: too many tasks wait already, of this peer, or in all and nobody has more than it would have
        """
        config, number = self.config, task.rank.number
        if task.rows > config.max_batch_size:
            raise SchemaError(
                f"a request of {task.rows} rows cannot be processed: max_batch_size is {config.max_batch_size}; "
                f"split it into smaller ones"
            )
        assert number not in self._waiting, "a task's number must be unique"
        known = self._peers.get(task.peer)
        of_peer = 0 if known is None else known.count
        if of_peer >= config.max_pending_per_peer:
            raise Overloaded(f"{of_peer} of your requests are waiting already; try again later")
        left = self._make_room(of_peer + 1) if len(self._waiting) >= config.max_pending_tasks else None
        self._waiting[number] = task
        group, peer = self._groups.get(task.group), self._peers.get(task.peer)
        if group is None:
            group = self._groups[task.group] = _Group()
        if peer is None:
            peer = self._peers[task.peer] = _Peer()
        ranks = group.by_peer.get(task.peer)
        if ranks is None:
            ranks = group.by_peer[task.peer] = _Ranks()
        group.rows += task.rows
        ranks.add(task.rank)
        peer.add(task.rank)
        self._take_turn(peer)
        if task.deadline < math.inf:
            heapq.heappush(self._by_deadline, (task.deadline, number))
        return left

    def _make_room(self, will_have: int) -> Waiting:
        """The newest task of the peer that has most, taken out."""
        most = max(self._peers.values(), key=lambda peer: peer.count)
        if most.count <= will_have:
            raise Overloaded(f"{len(self._waiting)} requests are waiting already; try again later")
        left = self.remove(most.last(self._waiting).number)
        assert left is not None
        return left

    def remove(self, number: int) -> Waiting | None:
        """Forget a task whose caller has gone; None if it does not wait (any more)."""
        task = self._waiting.pop(number, None)
        if task is None:
            return None
        if not self._waiting:
            self._clear()
            return task
        group, peer = self._groups[task.group], self._peers[task.peer]
        ranks = group.by_peer[task.peer]
        group.rows -= task.rows
        ranks.remove_one(self._waiting)
        if not ranks.count:
            del group.by_peer[task.peer]
            if not group.by_peer:
                del self._groups[task.group]
        peer.remove_one(self._waiting)
        if peer.count:
            self._take_turn(peer)
        else:
            del self._peers[task.peer]
            peer.due = None
        if len(self._by_deadline) > 2 * len(self._waiting) + 64:  # it holds mostly removed tasks
            waiting = self._waiting.values()
            self._by_deadline = [(task.deadline, task.rank.number) for task in waiting if task.deadline < math.inf]
            heapq.heapify(self._by_deadline)
        return task

    def _clear(self) -> None:
        for what in (self._waiting, self._groups, self._peers, self._turns, self._by_deadline):
            what.clear()

    def expire(self, now: float) -> list[Waiting]:
        """Remove and return the tasks whose deadline has passed."""
        expired = []
        while self._by_deadline and self._by_deadline[0][0] <= now:
            task = self.remove(heapq.heappop(self._by_deadline)[1])
            if task is not None:
                expired.append(task)
        return expired

    def served(self, peers: Iterable[str], now: float) -> None:
        """These peers were served, here or elsewhere: others have their turn before them."""
        for name in peers:
            peer = self._peers.get(name)
            if peer is not None:
                peer.served_at = now
                self._take_turn(peer)

    def most_urgent(self, now: float) -> Rank | None:
        """Rank of the task that the next batch would begin with, or None if nothing is ready."""
        head = self._head(now)
        return head[0] if head is not None else None

    def next_event(self, now: float) -> float:
        """When to look again although nobody submits: a group has waited long enough, or a deadline passes."""
        events = [math.inf]
        if self.config.min_batch_size > 1:
            events += [max(now, group.oldest + self.config.max_wait_s) for group in self._groups.values()]
        while self._by_deadline and self._by_deadline[0][1] not in self._waiting:
            heapq.heappop(self._by_deadline)
        if self._by_deadline:
            events.append(self._by_deadline[0][0])
        return min(events)

    def take(self, now: float) -> list[Waiting]:
        """Remove and return the next batch: the most urgent ready group's tasks, one of each peer in turn, while they fit."""
        head = self._head(now)
        if head is None:
            return []
        if len(self._waiting) == 1:  # as most often
            (task,) = self._waiting.values()
            self._clear()
            return [task]
        group = self._groups[head[1]]
        order = [self._place(name, ranks, 0) for name, ranks in group.by_peer.items()]
        heapq.heapify(order)
        batch: list[Waiting] = []
        rows = 0
        while order:
            _, count, rank, name = order[0]
            task = self._waiting[rank.number]
            if batch and rows + task.rows > self.config.max_batch_size:
                heapq.heappop(order)  # others may still have one that fits
                continue
            self.remove(rank.number)
            batch.append(task)
            rows += task.rows
            ranks = group.by_peer.get(name)
            if not self._waiting or ranks is None:
                heapq.heappop(order)
            else:
                heapq.heapreplace(order, self._place(name, ranks, count + 1))
        self.served({task.peer for task in batch}, now)
        return batch

    def _place(self, name: str, ranks: _Ranks, count: int) -> tuple[float, int, Rank, str]:
        """Of a peer in the order in which a batch is filled: by priority, then in rounds.

        :param count: of its tasks that are in the batch already
        """
        rank = self._peers[name].turn(ranks.first)
        return rank.priority, count, rank, name

    def check(self) -> None:
        """Assert that what is counted is what is there."""
        tasks = self._waiting.values()
        by_group = Counter((task.group, task.peer) for task in tasks)
        assert Counter({name: peer.count for name, peer in self._peers.items()}) == Counter(task.peer for task in tasks)
        assert by_group == {
            (group, peer): ranks.count for group, one in self._groups.items() for peer, ranks in one.by_peer.items()
        }
        assert sum(group.rows for group in self._groups.values()) == sum(task.rows for task in tasks)

    def _head(self, now: float) -> tuple[Rank, Hashable] | None:
        """The most urgent task that is ready: when it is due, and its group."""
        if self.config.min_batch_size > 1:
            ready = [
                self._peers[name].turn(ranks.first)
                for group in self._groups.values()
                if group.rows >= self.config.min_batch_size or now >= group.oldest + self.config.max_wait_s
                for name, ranks in group.by_peer.items()
            ]
            rank = min(ready, default=None)
        else:
            while self._turns and self._turns[0][1].due is not self._turns[0][0]:
                heapq.heappop(self._turns)
            rank = self._turns[0][0] if self._turns else None
        return None if rank is None else (rank, self._waiting[rank.number].group)

    def _take_turn(self, peer: _Peer) -> None:
        """Put a peer where it belongs by now."""
        rank = peer.turn(peer.first)
        if rank == peer.due:
            return
        peer.due = rank
        heapq.heappush(self._turns, (rank, peer))
        if len(self._turns) > 2 * len(self._peers) + 64:  # they hold mostly what was
            self._turns = [(one.due, one) for one in self._peers.values() if one.due is not None]
            heapq.heapify(self._turns)
