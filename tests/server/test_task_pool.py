"""TaskPool: every accepted task is resolved exactly once, whatever becomes of its caller, its batch or its pool."""

from __future__ import annotations

import gc
import math
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor

import pytest
import torch

from moe.errors import DeadlineExceeded, ExpertFailed, LifecycleError, Overloaded, SchemaError, Unavailable
from moe.server.task_pool import DeviceLost, Task, TaskPool, TaskResult
from moe.testing import FakeClock


def doubled(tasks: list[Task]) -> list[TaskResult]:
    return [[tensor * 2 for tensor in task.tensors] for task in tasks]


def make_pool(
    func: Callable[[list[Task]], Sequence[TaskResult | BaseException]] = doubled, **options: object
) -> TaskPool:
    return TaskPool(func, **{"max_batch_size": 8, "name": "pool", "clock": FakeClock(0.0), **options})  # type: ignore[arg-type]


def task(value: float = 1.0, rows: int = 1, **options: object) -> Task:
    return Task("forward", (), (), [torch.full((rows, 2), value)], rows, "group", **options)  # type: ignore[arg-type]


def run_next(pool: TaskPool, now: float = 0.0) -> list[Task]:
    """What the Runtime does, once."""
    if pool.most_urgent(now) is None:
        return []
    batch = pool.load_batch(now)
    pool.process(batch)
    return batch


def test_tasks_are_batched_and_each_gets_its_own_result() -> None:
    pool = make_pool()
    futures = [pool.submit(task(float(i), rows=i)) for i in (1, 2, 3)]
    assert len(run_next(pool)) == 3
    for i, future in zip((1, 2, 3), futures):
        assert torch.equal(future.result(0)[0], torch.full((i, 2), 2.0 * i))  # type: ignore[arg-type]
    assert pool.empty


def test_times_are_kept_for_the_callers_breakdown() -> None:
    clock = FakeClock(10.0)
    pool = make_pool(clock=clock)
    waiting = task()
    pool.submit(waiting)
    clock.advance(2.0)
    batch = pool.load_batch(clock())
    clock.advance(0.5)
    pool.process(batch)
    assert (waiting.submitted_at, waiting.started_at, waiting.finished_at) == (10.0, 12.0, 12.5)


def test_a_task_past_its_deadline_is_answered_and_never_computed() -> None:
    clock = FakeClock(0.0)
    computed: list[Task] = []
    pool = make_pool(lambda tasks: computed.extend(tasks) or doubled(tasks), clock=clock)  # type: ignore[func-returns-value]
    late, patient = pool.submit(task(deadline=5.0)), pool.submit(task(deadline=50.0))
    assert pool.next_event(0.0) == 5.0
    clock.advance(6.0)
    assert len(run_next(pool, clock())) == 1
    with pytest.raises(DeadlineExceeded, match=r"not computed: .* 6\.000 s in queue"):
        late.result(0)
    assert patient.result(0)
    assert len(computed) == 1
    assert pool.statistics().failed == 1


def test_a_cancelled_task_leaves_the_queue_at_once() -> None:
    pool = make_pool()
    first, second = pool.submit(task()), pool.submit(task())
    assert first.cancel()
    assert pool.statistics().pending == 1
    assert len(run_next(pool)) == 1
    assert second.result(0)
    with pytest.raises(CancelledError):
        first.result(0)


def test_a_task_whose_batch_has_started_cannot_be_cancelled_and_is_answered() -> None:
    pool = make_pool()
    future = pool.submit(task())
    batch = pool.load_batch(0.0)
    assert not future.cancel()
    pool.process(batch)
    assert future.result(0)


def test_an_error_among_the_outcomes_reaches_its_caller_only() -> None:
    pool = make_pool(lambda tasks: [ExpertFailed("no") if t.rows == 2 else [torch.ones(1)] for t in tasks])
    futures = [pool.submit(task(rows=rows)) for rows in (1, 2, 3)]
    run_next(pool)
    assert futures[0].result(0)
    assert futures[2].result(0)
    with pytest.raises(ExpertFailed, match="no"):
        futures[1].result(0)
    statistics = pool.statistics()
    assert (statistics.tasks, statistics.rows, statistics.batches, statistics.failed) == (2, 4, 1, 1)


class _Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__(threading.Lock())


@pytest.mark.parametrize(
    "error", [ValueError("x"), _Unpicklable(), SystemExit(3), KeyboardInterrupt(), StopIteration()]
)
def test_a_batch_that_fails_as_a_whole_leaves_no_caller_waiting_and_the_pool_alive(error: BaseException) -> None:
    def fail(tasks: list[Task]) -> list[TaskResult]:
        if any(t.rows == 7 for t in tasks):
            raise error
        return doubled(tasks)

    pool = make_pool(fail)
    futures = [pool.submit(task(rows=7)), pool.submit(task())]
    run_next(pool)
    for future in futures:
        with pytest.raises(ExpertFailed, match=type(error).__name__):
            future.result(0)
    again = pool.submit(task())
    run_next(pool)
    assert again.result(0)


def test_a_wrong_number_of_outcomes_is_an_error_for_all() -> None:
    pool = make_pool(lambda tasks: [[]])
    futures = [pool.submit(task()), pool.submit(task())]
    run_next(pool)
    for future in futures:
        with pytest.raises(ExpertFailed):
            future.result(0)


def test_too_many_rows_are_refused_and_nothing_waits() -> None:
    pool = make_pool()
    with pytest.raises(SchemaError, match="9 rows"):
        pool.submit(task(rows=9))
    assert pool.empty
    assert pool.statistics().pending == 0


def test_a_full_pool_says_overloaded_and_takes_more_when_there_is_room() -> None:
    pool = make_pool(pool_size=2, max_pending_per_peer=1)
    pool.submit(task(peer="a"))
    with pytest.raises(Overloaded):
        pool.submit(task(peer="a"))
    pool.submit(task(peer="b"))
    with pytest.raises(Overloaded):
        pool.submit(task(peer="c"))
    run_next(pool)
    pool.submit(task(peer="c"))


def test_who_has_most_waiting_makes_room_for_who_has_less() -> None:
    pool = make_pool(pool_size=4, max_pending_per_peer=4)
    flood = [pool.submit(task(peer="flood")) for _ in range(4)]
    modest = pool.submit(task(peer="modest"))
    with pytest.raises(Overloaded, match="most of it is yours"):
        flood[3].result(0)
    assert pool.statistics().pending == 4
    run_next(pool)
    assert modest.result(0) and all(future.result(0) for future in flood[:3])
    pool.check()


def test_what_is_late_when_its_batch_begins_is_not_computed() -> None:
    """A batch may be taken long before: while the one before it is computed."""
    clock, computed = FakeClock(0.0), list[int]()

    def count(tasks: list[Task]) -> list[TaskResult]:
        computed.append(len(tasks))
        return doubled(tasks)

    pool = make_pool(count, clock=clock)
    late, patient = pool.submit(task(deadline=5.0)), pool.submit(task(deadline=50.0))
    batch = pool.load_batch(clock())
    clock.advance(6.0)
    pool.process(batch)
    with pytest.raises(DeadlineExceeded, match="before its batch began"):
        late.result(0)
    assert patient.result(0) and computed == [1]
    lost = pool.submit(task(deadline=7.0))
    batch = pool.load_batch(clock())
    clock.advance(2.0)
    pool.process(batch)
    assert isinstance(lost.exception(0), DeadlineExceeded) and computed == [1]


@pytest.mark.parametrize("error", [MemoryError("after the step"), DeviceLost("gone")])
def test_after_a_batch_that_failed_as_a_whole_nobody_knows_whether_it_was_trained(error: BaseException) -> None:
    def fail(tasks: list[Task]) -> list[TaskResult]:
        raise error

    for operation in ("forward", "backward"):
        pool, one = make_pool(fail), task()
        one.operation = operation
        pool.submit(one)
        try:
            run_next(pool)
        except DeviceLost:
            assert isinstance(error, DeviceLost)
        assert one.future.exception(0) is not None
        assert one.may_have_trained == (operation == "backward")


def test_closing_fails_what_waits_and_refuses_what_comes_but_not_the_running_batch() -> None:
    pool = make_pool()
    running = pool.submit(task())
    batch = pool.load_batch(0.0)
    waiting = pool.submit(task())
    pool.close()
    with pytest.raises(Unavailable, match="stopping"):
        waiting.result(0)
    with pytest.raises(Unavailable, match="stopping"):
        pool.submit(task())
    pool.process(batch)
    assert running.result(0)
    assert pool.most_urgent(1e9) is None


def test_refusals_of_a_closed_pool_keep_no_memory() -> None:
    pool = make_pool()
    pool.close()
    lengths = []
    for _ in range(3):
        with pytest.raises(Unavailable) as caught:
            pool.submit(task())
        lengths.append(len(caught.traceback))
    assert len(set(lengths)) == 1  # one error object, raised again and again, would remember every caller's frame


def test_each_task_resolves_exactly_once_under_threads() -> None:
    pool = make_pool(max_batch_size=16, pool_size=100_000)
    resolved: list[int] = []
    stop = threading.Event()

    def serve() -> None:
        while not (stop.is_set() and pool.empty):
            run_next(pool)

    def submit_many(seed: int) -> list[Future[TaskResult]]:
        futures = []
        for i in range(200):
            one = task(float(i))
            future = pool.submit(one)
            future.add_done_callback(lambda _, number=one.number: resolved.append(number))  # type: ignore[misc]
            if (i + seed) % 5 == 0:
                future.cancel()
            futures.append(future)
        return futures

    with ThreadPoolExecutor(5) as threads:
        server = threads.submit(serve)
        futures = [f for submitted in threads.map(submit_many, range(4)) for f in submitted]
        stop.set()
        server.result(20)
    assert all(future.done() for future in futures)
    assert len(resolved) == len(set(resolved)) == 800
    assert pool.statistics().pending == 0


def test_results_are_not_kept_by_the_pool() -> None:
    pool = make_pool()
    future = pool.submit(task())
    run_next(pool)
    kept = weakref.ref(future.result(0)[0])
    del future
    gc.collect()
    assert kept() is None


def test_a_pool_has_one_runtime_at_a_time() -> None:
    pool = make_pool()
    told: list[TaskPool] = []
    pool.attach(told.append)
    with pytest.raises(LifecycleError, match="already"):
        pool.attach(told.append)
    pool.submit(task())
    assert told == [pool]
    pool.detach()
    pool.attach(told.append)


def test_hiveminds_way_to_submit() -> None:
    pool = make_pool()
    same = [pool.submit_task(torch.ones(2, 3), torch.zeros(2)) for _ in range(2)]
    other = pool.submit_task(torch.ones(2, 4), torch.zeros(2))  # another shape: hivemind's pool died of torch.cat here
    assert len(run_next(pool)) == 2
    assert len(run_next(pool)) == 1
    assert [tuple(t.shape) for t in same[1].result(0) if t is not None] == [(2, 3), (2,)]
    assert other.result(0)
    with pytest.raises(SchemaError, match=r"args\[1\].*2 rows"):
        pool.submit_task(torch.ones(2, 3), torch.zeros(3))
    with pytest.raises(SchemaError, match=r"args\[0\]"):
        pool.submit_task(torch.tensor(1.0))
    late = pool.submit_task(torch.ones(1), deadline=-1.0)
    assert run_next(pool) == []
    with pytest.raises(DeadlineExceeded):
        late.result(0)


def test_repr_and_wait_of_a_batch_that_is_being_collected() -> None:
    pool = make_pool(min_batch_size=4, timeout=0.5)
    pool.submit(task())
    assert pool.most_urgent(0.0) is None
    assert pool.next_event(0.0) == 0.5
    assert repr(pool) == "TaskPool('pool', BatchQueue(1 tasks, 1 rows, 1 groups))"
    assert len(run_next(pool, 0.5)) == 1
    assert pool.next_event(0.5) == math.inf
