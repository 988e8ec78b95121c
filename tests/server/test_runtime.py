"""Runtime: the device loop. It serves the most urgent batch, survives bad ones, and when it dies nobody waits for it."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe.errors import ExpertFailed, LifecycleError, Unavailable
from moe.schema import BatchTensorProto
from moe.server.batching import Rank
from moe.server.expert_backend import ExpertBackend
from moe.server.runtime import Runtime
from moe.server.task_pool import DeviceLost, Task, TaskPool, TaskResult
from moe.testing import FaultPlan, InjectedFault

WAIT_S = 20.0  # generous: the machine may be busy


class Backend:
    """Something with pools. Each batch is written down, and may be held until ``gate`` opens."""

    def __init__(self, *names: str, log: list[tuple[str, int]] | None = None, **pool_options: Any):
        self.log: list[tuple[str, int]] = [] if log is None else log
        self.gate, self.entered = threading.Event(), threading.Event()
        self.gate.set()
        self.device: object = None
        self.pools = tuple(
            TaskPool(self._process(name), name=name, **{"max_batch_size": 8, **pool_options}) for name in names
        )

    def _process(self, name: str) -> Callable[[list[Task]], list[TaskResult]]:
        def process(tasks: list[Task]) -> list[TaskResult]:
            self.log.append((name, len(tasks)))
            self.entered.set()
            assert self.gate.wait(WAIT_S)
            return [list(task.tensors) for task in tasks]

        return process

    def get_pools(self) -> tuple[TaskPool, ...]:
        return self.pools

    def to(self, device: torch.device | str) -> None:
        self.device = device


def submit(pool: TaskPool, value: Any = None, priority: float = 0.0, rows: int = 1) -> Future[TaskResult]:
    tensors = [torch.ones(1) if value is None else value]
    return pool.submit(Task("forward", (), (), tensors, rows, "group", priority=priority))


@contextmanager
def running(backend: Backend, **options: Any) -> Iterator[Runtime]:
    runtime = Runtime({"x": backend}, **options)
    runtime.start()
    try:
        yield runtime
    finally:
        backend.gate.set()
        assert runtime.shutdown(WAIT_S)


def test_what_waited_before_the_start_is_served_in_one_batch() -> None:
    backend = Backend("pool")
    futures = [submit(backend.pools[0]) for _ in range(5)]
    with running(backend) as runtime:
        assert [len(future.result(WAIT_S)) for future in futures] == [1] * 5
        assert runtime.is_alive()
        assert runtime.ready.is_set()
    assert backend.log == [("pool", 5)]
    assert not runtime.is_alive()


def test_requests_that_come_during_a_batch_form_the_next_one() -> None:
    backend = Backend("pool")
    backend.gate.clear()
    with running(backend):
        first = submit(backend.pools[0])
        assert backend.entered.wait(WAIT_S)
        rest = [submit(backend.pools[0]) for _ in range(6)]
        backend.gate.set()
        for future in (first, *rest):
            future.result(WAIT_S)
    assert backend.log == [("pool", 1), ("pool", 6)]


@pytest.mark.parametrize("priority, expected", [(0.0, ["a", "b", "c"]), (-1.0, ["c", "a", "b"])])
def test_the_longest_waiting_task_of_all_pools_goes_first_unless_another_is_more_urgent(
    priority: float, expected: list[str]
) -> None:
    backend = Backend("a", "b", "c")
    futures = [submit(pool, priority=priority if pool.name == "c" else 0.0) for pool in backend.pools]
    futures.append(submit(backend.pools[0]))  # joins the older task of its pool
    with running(backend):
        for future in futures:
            future.result(WAIT_S)
    assert [name for name, _ in backend.log] == expected


def test_an_old_request_is_served_soon_however_busy_another_expert_is() -> None:
    backend = Backend("busy", "quiet", pool_size=10_000, max_batch_size=1)
    for _ in range(50):
        submit(backend.pools[0])
    patient = submit(backend.pools[1])
    for _ in range(500):
        submit(backend.pools[0])
    with running(backend):
        patient.result(WAIT_S)
    assert backend.log.index(("quiet", 1)) == 50


def test_a_flood_of_many_experts_delays_another_peers_request_by_one_batch() -> None:
    flooded = [f"expert {i}" for i in range(64)]
    backend = Backend(*flooded, "quiet", max_batch_size=1)
    for pool in backend.pools[:-1]:
        for _ in range(10):
            pool.submit(Task("forward", (), (), [torch.ones(1)], 1, "group", peer="flood"))
    backend.gate.clear()
    with running(backend):
        assert backend.entered.wait(WAIT_S)
        patient = backend.pools[-1].submit(Task("forward", (), (), [torch.ones(1)], 1, "group", peer="modest"))
        backend.gate.set()
        patient.result(WAIT_S)
    assert backend.log.index(("quiet", 1)) <= 2


def test_a_lone_request_below_min_batch_size_does_not_wait_for_ever() -> None:
    backend = Backend("pool", min_batch_size=8, timeout=0.05)
    with running(backend):
        start = time.monotonic()
        submit(backend.pools[0]).result(WAIT_S)
        assert time.monotonic() - start >= 0.04
        empty = submit(backend.pools[0], torch.ones(0), rows=0)
        empty.result(WAIT_S)


def test_pools_are_served_once_and_backends_moved() -> None:
    backend = Backend("pool")
    runtime = Runtime({"x": backend, "y": backend}, device="cpu")
    assert runtime.pools == backend.pools
    runtime.start()
    assert backend.device == torch.device("cpu")
    assert runtime.prefetch_batches == 0  # a batch taken early can no longer grow
    runtime.shutdown()
    assert Runtime({}, device="meta").prefetch_batches == 1


def test_lifecycle() -> None:
    backend = Backend("pool")
    runtime = Runtime({"x": backend})
    assert not runtime.is_alive()
    assert "not running" in repr(runtime)
    runtime.start()
    assert "running" in repr(runtime)
    with pytest.raises(LifecycleError, match="before"):
        runtime.start()
    with pytest.raises(LifecycleError, match="already"):
        Runtime({"x": backend}).start()
    assert runtime.shutdown(WAIT_S)
    assert runtime.shutdown(WAIT_S)
    with pytest.raises(Unavailable):
        submit(backend.pools[0])
    never_started = Runtime({"x": Backend("pool")})
    assert never_started.shutdown()


def test_shutdown_finishes_the_batch_at_hand_and_fails_what_waits() -> None:
    backend = Backend("pool")
    backend.gate.clear()
    runtime = Runtime({"x": backend})
    runtime.start()
    running_one = submit(backend.pools[0])
    assert backend.entered.wait(WAIT_S)
    assert runtime.busy_s() >= 0.0
    waiting = submit(backend.pools[0])
    assert not runtime.shutdown(timeout_s=0.05)  # still busy
    with pytest.raises(Unavailable, match="stopping"):
        waiting.result(WAIT_S)
    backend.gate.set()
    assert running_one.result(WAIT_S)
    assert runtime.shutdown(WAIT_S)
    assert runtime.failure is None


def test_a_batch_that_runs_shows_how_long_it_has_been() -> None:
    now = 0.0
    backend = Backend("pool")
    backend.gate.clear()
    with running(backend, clock=lambda: now) as runtime:
        assert runtime.busy_s() == 0.0
        future = submit(backend.pools[0])
        assert backend.entered.wait(WAIT_S)
        now = 700.0
        assert runtime.busy_s() == 700.0
        backend.gate.set()
        future.result(WAIT_S)
    assert runtime.busy_s() == 0.0


def test_a_batch_is_overdue_only_when_none_of_its_callers_waits_any_more() -> None:
    now = 0.0
    backend = Backend("pool")
    for pool in backend.pools:
        pool._clock = lambda: now
    backend.gate.clear()
    futures = [
        backend.pools[0].submit(Task("forward", (), (), [torch.ones(1)], 1, "group", deadline=deadline))
        for deadline in (1000.0, 5000.0)
    ]
    with running(backend, clock=lambda: now) as runtime:
        assert backend.entered.wait(WAIT_S)
        now = 4000.0
        assert (runtime.busy_s(), runtime.overdue_s()) == (4000.0, 0.0)
        now = 5700.0
        assert (runtime.busy_s(), runtime.overdue_s()) == (5700.0, 700.0)
        backend.gate.set()
        assert all(future.result(WAIT_S) for future in futures)
    assert runtime.overdue_s() == 0.0


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_when_the_runtime_dies_everybody_who_waits_is_told_at_once(prefetch: int) -> None:
    plan = FaultPlan()
    plan.crash_runtime(at_batch=2)
    backend = Backend("pool", max_batch_size=1)
    told: list[BaseException] = []
    futures = [submit(backend.pools[0]) for _ in range(8)]
    runtime = Runtime({"x": backend}, prefetch_batches=prefetch, on_batch=plan.on_batch)
    runtime.start(on_failure=told.append)
    assert futures[0].result(WAIT_S)
    for future in futures[1:]:
        with pytest.raises(Unavailable, match="has died"):
            future.result(WAIT_S)
    with pytest.raises(Unavailable, match="has died"):
        submit(backend.pools[0])
    assert runtime.shutdown(WAIT_S)
    assert isinstance(runtime.failure, InjectedFault)
    assert told == [runtime.failure]
    assert not runtime.is_alive()
    assert "failed" in repr(runtime)
    assert plan.unfired == []


@pytest.mark.parametrize("prefetch", [0, 1])
def test_shutdown_with_batches_loaded_ahead_leaves_nobody_waiting(prefetch: int) -> None:
    backend = Backend("pool", max_batch_size=1)
    backend.gate.clear()
    futures = [submit(backend.pools[0]) for _ in range(6)]
    runtime = Runtime({"x": backend}, prefetch_batches=prefetch)
    runtime.start()
    assert backend.entered.wait(WAIT_S)
    threading.Timer(0.1, backend.gate.set).start()
    assert runtime.shutdown(WAIT_S)
    outcomes = [future.exception(WAIT_S) for future in futures]
    assert outcomes[0] is None
    assert isinstance(outcomes[-1], Unavailable)


class FakeTensor:
    """Stands for a tensor that does or does not fit on an accelerator."""

    def __init__(self, value: int, fits: Callable[[FakeTensor], None]):
        self.value, self.fits, self.on_device = value, fits, False

    def to(self, device: torch.device, non_blocking: bool = False) -> FakeTensor:
        assert device.type == "meta"
        self.fits(self)
        moved = FakeTensor(self.value, self.fits)
        moved.on_device = True
        return moved


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_batch_without_room_on_the_device_is_halved_until_only_what_never_fits_fails(prefetch: int) -> None:
    moves: list[int] = []

    def room_for_three_but_not_for_13(tensor: FakeTensor) -> None:
        moves.append(tensor.value)
        if tensor.value == 13 or moves[-4:] == list(range(moves[-1] - 3, moves[-1] + 1)):
            raise torch.OutOfMemoryError("no room")

    backend = Backend("pool")
    futures = [submit(backend.pools[0], FakeTensor(i, room_for_three_but_not_for_13)) for i in (*range(6), 13)]
    with running(backend, device="meta", prefetch_batches=prefetch) as runtime:
        for i, future in enumerate(futures[:6]):
            (tensor,) = future.result(WAIT_S)
            assert tensor.on_device  # type: ignore[union-attr]
            assert tensor.value == i  # type: ignore[union-attr]
        with pytest.raises(ExpertFailed, match="OutOfMemoryError: no room"):
            futures[6].result(WAIT_S)
        assert runtime.is_alive()
    assert sum(count for _, count in backend.log) == 6


@pytest.mark.parametrize("prefetch", [0, 1])
def test_a_broken_device_ends_the_runtime_and_its_callers_are_told(prefetch: int) -> None:
    def broken(tensor: FakeTensor) -> None:
        raise RuntimeError("device-side assert triggered")

    backend = Backend("pool")
    with running(backend, device="meta", prefetch_batches=prefetch) as runtime:
        with pytest.raises(Unavailable, match="has (failed|died)"):
            submit(backend.pools[0], FakeTensor(0, broken)).result(WAIT_S)
        deadline = time.monotonic() + WAIT_S
        while runtime.failure is None and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "device-side assert" in str(runtime.failure)


def test_batches_are_taken_late_without_prefetch_and_early_with_it() -> None:
    taken = {}
    for prefetch in (0, 1):
        backend = Backend("pool")
        backend.gate.clear()
        with running(backend, prefetch_batches=prefetch):
            futures = [submit(backend.pools[0])]
            assert backend.entered.wait(WAIT_S)
            futures.append(submit(backend.pools[0]))
            deadline = time.monotonic() + WAIT_S
            while prefetch and backend.pools[0].statistics().pending and time.monotonic() < deadline:
                time.sleep(0.001)
            futures.append(submit(backend.pools[0]))
            backend.gate.set()
            for future in futures:
                future.result(WAIT_S)
        taken[prefetch] = [count for _, count in backend.log]
    assert taken == {0: [1, 2], 1: [1, 1, 1]}


def test_an_idle_runtime_sleeps() -> None:
    looks = []
    backend = Backend("pool")
    pool = backend.pools[0]
    look = pool.most_urgent

    def counted(now: float) -> Rank | None:
        looks.append(now)
        return look(now)

    pool.most_urgent = counted  # type: ignore[method-assign]
    with running(backend):
        submit(pool).result(WAIT_S)
        seen = len(looks)
        time.sleep(0.2)
        assert len(looks) - seen <= 2
    assert pool.next_event(0.0) == math.inf


def test_a_lost_device_ends_the_runtime_and_nobody_waits() -> None:
    class Broken(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("CUDA error: device-side assert triggered")

    proto = BatchTensorProto(2)
    backend = ExpertBackend("broken.0", Broken(), args_schema=(proto,), outputs_schema=proto)
    runtime = Runtime({"broken.0": backend})
    futures = [backend.submit_forward(torch.zeros(1, 2)) for _ in range(3)]
    runtime.start()
    for future in futures:
        with pytest.raises(Unavailable):
            future.result(10)
    wait_until = time.monotonic() + 10
    while runtime.is_alive() and time.monotonic() < wait_until:
        time.sleep(0.01)
    assert isinstance(runtime.failure, DeviceLost)
    runtime.shutdown()
