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
    left = queue.add(waiting(4, peer="late"))  # there is always a place for who has less than another
    assert left is not None and left.rank.number == 1
    with pytest.raises(Overloaded, match="3 requests are waiting"):
        queue.add(waiting(5, peer="last"))  # all have as little
    assert len(queue) == 3
    queue.take(0.0)
    queue.add(waiting(6, peer="greedy"))


# --- turns of peers ----------------------------------------------------------------------------------------------------


def test_a_peer_with_a_thousand_requests_delays_anothers_by_a_batch() -> None:
    queue = queue_of(*(waiting(i, group=i, peer="flood") for i in range(1000)))
    assert [task.rank.number for task in queue.take(1000.0)] == [0]
    queue.add(waiting(1001, group="common", at=1000.5, peer="modest"))
    assert [batch for _, batch in zip(range(3), drain(queue, 1001.0))] == [[1], [1001], [2]]


def test_peers_take_turns_and_each_goes_oldest_first() -> None:
    queue = queue_of(*(waiting(i, group=i, peer="abc"[i // 3]) for i in range(9)))
    taken = [queue.take(10.0 + turn)[0].rank.number for turn in range(9)]
    assert taken == [0, 3, 6, 1, 4, 7, 2, 5, 8]


def test_a_newcomer_does_not_go_before_those_who_have_waited_longer() -> None:
    """Else a peer of many names would always be first."""
    queue = queue_of(waiting(0, group=0, peer="a"), waiting(1, group=1, peer="a"))
    queue.take(2.0)
    for number in range(3, 6):
        queue.add(waiting(number, group=number, peer=f"new {number}"))
    assert list(drain(queue, 6.0)) == [[1], [3], [4], [5]]


def test_who_was_served_elsewhere_is_behind_here_too() -> None:
    queue = queue_of(waiting(0, group=0, peer="a"), waiting(1, group=1, peer="b"), waiting(9, group=2, peer="a"))
    queue.served(["a", "not here"], 5.0)
    assert queue.most_urgent(5.0) == Rank(0.0, 1.0, 1)
    assert list(drain(queue, 6.0)) == [[1], [0], [9]]


def test_batches_are_as_large_as_they_can_be_whoever_sent_their_tasks() -> None:
    queue = queue_of(*(waiting(i, peer=f"peer {i % 7}") for i in range(50)), max_batch_size=64)
    assert [len(batch) for batch in drain(queue)] == [50]


def test_a_batch_is_filled_with_tasks_of_all_peers_in_turn() -> None:
    queue = queue_of(*(waiting(i, peer="a") for i in range(8)), *(waiting(10 + i, peer="b") for i in range(2)))
    queue.config = PoolConfig(max_batch_size=5)
    assert list(drain(queue)) == [[0, 10, 1, 11, 2], [3, 4, 5, 6, 7]]


def test_what_does_not_fit_lets_others_fill_the_batch() -> None:
    queue = queue_of(waiting(0, 3, peer="a"), waiting(1, 4, peer="a"), waiting(2, 2, peer="b"), max_batch_size=6)
    assert list(drain(queue)) == [[0, 2], [1]]


def test_priority_wins_over_turns() -> None:
    queue = queue_of(waiting(0, group=0, peer="a", priority=-1.0), waiting(1, group=1, peer="a", priority=-1.0))
    queue.add(waiting(2, group=2, peer="b"))
    assert list(drain(queue, 5.0)) == [[0], [1], [2]]


def test_four_peers_cannot_fill_the_queue_for_a_fifth() -> None:
    queue = queue_of(max_pending_tasks=100, max_pending_per_peer=25)
    for i in range(100):
        queue.add(waiting(i, group=i, peer=f"flood {i % 4}"))
    lost = [queue.add(waiting(200 + i, group=i, peer="modest")) for i in range(20)]
    assert {task.rank.number for task in lost if task is not None} == set(range(80, 100))
    with pytest.raises(Overloaded):
        queue.add(waiting(300, peer="modest"))  # it has its share now
    queue.check()


class Peers:
    """Turns of peers as plainly as possible: no heaps, no groups. One task is a batch."""

    def __init__(self) -> None:
        self.tasks: list[Waiting] = []
        self.served_at: dict[str, float] = {}

    def take(self, now: float) -> int:
        def due(task: Waiting) -> tuple[float, float, int]:
            served_at = self.served_at.get(task.peer, -math.inf)
            return task.rank.priority, max(task.rank.submitted_at, served_at), task.rank.number

        # of each peer its oldest, and of those the one that is due first
        heads = {task.peer: task for task in sorted(self.tasks, key=lambda task: task.rank, reverse=True)}
        first = min(heads.values(), key=due)
        self.tasks.remove(first)
        self.served_at[first.peer] = now
        return first.rank.number


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["add", "add", "take", "remove", "elsewhere"]),
            st.sampled_from("abcd"),
            st.sampled_from([0.0, 0.0, 1.0]),
            st.sampled_from([0.0, 1.0]),
        ),
        max_size=60,
    )
)
def test_turns_are_those_of_the_model(steps: list[tuple[str, str, float, float]]) -> None:
    queue, model, now = BatchQueue(PoolConfig(max_batch_size=1)), Peers(), 0.0
    for number, (step, peer, priority, pause) in enumerate(steps):
        now += pause
        if step == "add":
            task = waiting(number, group=number % 3, at=now, priority=priority, peer=peer)
            queue.add(task)
            model.tasks.append(task)
        elif step == "elsewhere":
            queue.served([peer], now)
            if any(task.peer == peer for task in model.tasks):
                model.served_at[peer] = now
        elif step == "remove" and model.tasks:
            queue.remove(model.tasks.pop(number % len(model.tasks)).rank.number)
        elif step == "take" and model.tasks:
            assert [task.rank.number for task in queue.take(now)] == [model.take(now)]
        model.served_at = {p: at for p, at in model.served_at.items() if any(t.peer == p for t in model.tasks)}
        queue.check()


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
        queue.check()
    queue.expire(now)
    rest = [number for batch in drain(queue, now + 10.0) for number in batch]
    assert sorted(rest) == sorted(n for n, task in alive.items() if task.deadline > now)
