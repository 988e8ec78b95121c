"""Which tasks form the next batch: order, groups, bounds, deadlines, fairness. All pure, time is a number."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.config import PoolConfig
from moe.errors import Overloaded, SchemaError
from moe.server.batching import BatchQueue, Rank, Waiting


def waiting(
    number: int, rows: int = 1, group: object = "g", at: float | None = None, priority: float = 0.0, **kwargs: object
) -> Waiting:
    """Task ``number``, submitted at time ``number`` unless told otherwise."""
    return Waiting(Rank(priority, float(number) if at is None else at, number), rows, group, **kwargs)  # type: ignore[arg-type]


def queue_of(*tasks: Waiting, **config: int | float) -> BatchQueue:
    queue = BatchQueue(PoolConfig(**config))  # type: ignore[arg-type]
    for task in tasks:
        queue.add(task)
    return queue


def drain(queue: BatchQueue, now: float = 0.0) -> Iterator[list[int]]:
    """Numbers of the tasks in each batch, until nothing is ready."""
    while batch := queue.take(now):
        yield [task.rank.number for task in batch]


def test_all_waiting_tasks_of_a_group_form_one_batch_in_order_of_arrival() -> None:
    queue = queue_of(*(waiting(i) for i in range(5)))
    assert list(drain(queue)) == [[0, 1, 2, 3, 4]]
    assert len(queue) == 0


def test_groups_never_mix_and_the_oldest_task_goes_first() -> None:
    queue = queue_of(waiting(0, group="a"), waiting(1, group="b"), waiting(2, group="a"), waiting(3, group="b"))
    assert list(drain(queue)) == [[0, 2], [1, 3]]


def test_a_batch_never_exceeds_max_batch_size_and_keeps_the_order() -> None:
    queue = queue_of(waiting(0, 3), waiting(1, 4), waiting(2, 1), waiting(3, 8), max_batch_size=8)
    assert list(drain(queue)) == [[0, 1, 2], [3]]


def test_a_request_larger_than_any_batch_is_refused() -> None:
    queue = queue_of(max_batch_size=4)
    with pytest.raises(SchemaError, match="5 rows.*max_batch_size is 4"):
        queue.add(waiting(0, rows=5))
    assert len(queue) == 0


def test_priority_wins_over_age() -> None:
    queue = queue_of(waiting(0, group="a"), waiting(1, group="b", priority=-1.0), waiting(2, group="a", priority=-2.0))
    assert list(drain(queue)) == [[2, 0], [1]]


def test_no_group_starves_under_a_flood_of_another() -> None:
    queue = queue_of(max_batch_size=4)
    number = 0
    for _ in range(4):
        queue.add(waiting(number := number + 1, group="common"))
    queue.add(waiting(rare := 1000, group="rare", at=4.5))
    taken: list[int] = []
    for _ in range(3):  # the flood goes on
        for _ in range(8):
            queue.add(waiting(number := number + 1, group="common"))
        taken += [task.rank.number for task in queue.take(0.0)]
        if rare in taken:
            break
    assert rare in taken
    assert len(taken) <= 5  # the batch that was older, then the rare one


def test_a_batch_is_never_held_back_by_default() -> None:
    queue = queue_of(waiting(0))
    assert queue.most_urgent(0.0) == Rank(0.0, 0.0, 0)
    assert queue.next_event(0.0) == math.inf


def test_min_batch_size_waits_for_rows_but_not_for_ever() -> None:
    queue = queue_of(waiting(0, rows=2, at=10.0), min_batch_size=4, max_wait_s=0.5)
    assert queue.most_urgent(10.0) is None
    assert queue.take(10.0) == []
    assert queue.next_event(10.0) == 10.5
    assert queue.most_urgent(10.5) == Rank(0.0, 10.0, 0)
    queue.add(waiting(1, rows=2, at=10.1))
    assert queue.most_urgent(10.1) == Rank(0.0, 10.0, 0)  # enough rows now
    assert list(drain(queue, 10.1)) == [[0, 1]]


def test_an_empty_request_alone_is_answered_after_the_wait_at_the_latest() -> None:
    queue = queue_of(waiting(0, rows=0, at=1.0), min_batch_size=4, max_wait_s=0.5)
    assert queue.next_event(1.0) == 1.5
    assert list(drain(queue, 1.5)) == [[0]]


def test_min_batch_size_lets_no_ready_group_starve_an_older_one() -> None:
    queue = queue_of(waiting(0, rows=1, group="small", at=0.0), min_batch_size=4, max_wait_s=1.0)
    queue.add(waiting(1, rows=4, group="large", at=0.5))
    assert queue.most_urgent(0.6) == Rank(0.0, 0.5, 1)
    assert queue.most_urgent(1.0) == Rank(0.0, 0.0, 0)  # it has waited long enough, and is older


def test_expired_tasks_leave_before_they_are_computed() -> None:
    queue = queue_of(waiting(0, deadline=5.0), waiting(1), waiting(2, deadline=3.0))
    assert queue.next_event(0.0) == 3.0
    assert [task.rank.number for task in queue.expire(3.0)] == [2]
    assert [task.rank.number for task in queue.expire(10.0)] == [0]
    assert list(drain(queue)) == [[1]]
    assert queue.expire(math.inf) == []
    assert queue.next_event(0.0) == math.inf


def test_a_removed_task_is_gone_and_leaves_the_order_of_others_alone() -> None:
    queue = queue_of(waiting(0, group="a"), waiting(1, group="b"), waiting(2, group="a"))
    assert queue.remove(0) is not None
    assert queue.remove(0) is None
    assert queue.most_urgent(0.0) == Rank(0.0, 1.0, 1)  # hivemind's pools kept the age of a cancelled task
    assert list(drain(queue)) == [[1], [2]]


def test_the_queue_is_bounded_in_all_and_per_peer() -> None:
    queue = queue_of(max_pending_tasks=3, max_pending_per_peer=2)
    queue.add(waiting(0, peer="greedy"))
    queue.add(waiting(1, peer="greedy"))
    with pytest.raises(Overloaded, match="2 of your requests"):
        queue.add(waiting(2, peer="greedy"))
    queue.add(waiting(3, peer="modest"))  # a flood locks nobody else out
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        queue.add(waiting(4, peer="late"))
    queue.take(0.0)
    queue.add(waiting(5, peer="greedy"))


def test_groups_need_not_be_comparable() -> None:
    queue = queue_of(*(waiting(i, group=(f"{i % 2}", object, i % 2), at=0.0) for i in range(4)), min_batch_size=2)
    assert sorted(map(sorted, drain(queue))) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("leave", ["take", "remove", "expire"])
def test_memory_stays_flat_however_many_tasks_come_and_go(leave: str) -> None:
    queue = queue_of(waiting(0, group="stays", at=1e9, deadline=1e9))
    for number in range(1, 3000):
        queue.add(waiting(number, group=number % 7, deadline=300.0 + (number if leave == "expire" else 0)))
        if leave == "take":
            queue.take(0.0)
        elif leave == "remove":
            queue.remove(number)
        else:
            queue.expire(300.0 + number)
    assert len(queue) == 1
    sizes = {name: len(value) for name, value in vars(queue).items() if hasattr(value, "__len__")}
    assert max(sizes.values()) < 200, sizes


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_whatever_happens_each_task_leaves_once_and_batches_are_right(data: st.DataObject) -> None:
    config = PoolConfig(max_batch_size=8, min_batch_size=data.draw(st.integers(1, 8)), max_wait_s=2.0)
    queue, now, number = BatchQueue(config), 0.0, 0
    alive: dict[int, Waiting] = {}
    for step in data.draw(st.lists(st.sampled_from(["add", "add", "take", "remove", "expire", "wait"]), max_size=40)):
        if step == "add":
            number += 1
            deadline = now + data.draw(st.sampled_from([1.0, 3.0, math.inf]))
            rows, group = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 2))
            alive[number] = waiting(number, rows, group, at=now, deadline=deadline)
            queue.add(alive[number])
        elif step == "wait":
            now += 1.0
        elif step == "remove" and alive:
            victim = data.draw(st.sampled_from(sorted(alive)))
            assert queue.remove(victim) == alive.pop(victim)
        elif step == "expire":
            expired = {task.rank.number for task in queue.expire(now)}
            assert expired == {n for n, task in alive.items() if task.deadline <= now}
            alive = {n: task for n, task in alive.items() if n not in expired}
        elif step == "take":
            head = queue.most_urgent(now)
            batch = queue.take(now)
            assert (head is None) == (not batch)
            assert len({task.group for task in batch}) <= 1
            assert sum(task.rows for task in batch) <= config.max_batch_size
            assert [task.rank for task in batch] == sorted(task.rank for task in batch)
            if batch and config.min_batch_size == 1:
                assert batch[0].rank == min(task.rank for task in alive.values())
            for task in batch:
                assert alive.pop(task.rank.number) == task
        assert len(queue) == len(alive)
    queue.expire(now)
    rest = [number for batch in drain(queue, now + 10.0) for number in batch]
    assert sorted(rest) == sorted(n for n, task in alive.items() if task.deadline > now)
