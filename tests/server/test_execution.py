"""run_isolated: only those who fail on their own get an error, at a bounded price; memory that runs out halves the work."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch

from moe.errors import ExpertFailed, NonFiniteError
from moe.schema import BatchTensorProto, Entry, TensorProto
from moe.server.execution import MAX_ERROR_CHARS, as_expert_failure, is_out_of_memory, run_isolated
from moe.server.task_pool import DeviceLost, Task, TaskResult

ENTRIES = (Entry("args[0]", BatchTensorProto()), Entry("kwargs['scale']", TensorProto()))


def task(number: int, rows: int = 1) -> Task:
    tensors = [torch.full((rows,), float(number)), torch.tensor(2.0)]
    return Task("forward", (), ENTRIES, tensors, rows, "group", lane="lane", wants_grad=(True, False), number=number)


class Compute:
    """Doubles; fails where it is told to. Counts its launches."""

    def __init__(self, fails: Callable[[list[Task]], BaseException | None]):
        self.fails = fails
        self.launches: list[list[int]] = []

    def __call__(self, tasks: list[Task]) -> list[TaskResult]:
        self.launches.append([task.rows for task in tasks])
        error = self.fails(tasks)
        if error is not None:
            raise error
        return [[task.tensors[0] * task.tensors[1]] for task in tasks]


def join(task: Task, parts: Sequence[TaskResult]) -> TaskResult:
    return [torch.cat([part[0] for part in parts if part[0] is not None])]


def test_a_good_batch_is_one_launch() -> None:
    compute = Compute(lambda tasks: None)
    outcomes = run_isolated([task(i) for i in range(9)], compute)
    assert len(compute.launches) == 1
    assert [float(o[0]) for o in outcomes] == [2.0 * i for i in range(9)]  # type: ignore[index, arg-type]


@pytest.mark.parametrize("bad", [{0}, {8}, {3, 4}, set(range(9))])
def test_only_the_offenders_fail(bad: set[int]) -> None:
    compute = Compute(lambda tasks: ValueError("bad row") if bad & {t.number for t in tasks} else None)
    outcomes = run_isolated([task(i) for i in range(9)], compute)
    for number, outcome in enumerate(outcomes):
        if number in bad:
            assert isinstance(outcome, ExpertFailed)
            assert str(outcome) == "ValueError: bad row"
        else:
            assert float(outcome[0]) == 2.0 * number  # type: ignore[index, arg-type]
    assert len(compute.launches) <= 1 + 2 * len(bad) * math.ceil(math.log2(9))


def test_an_error_that_no_single_task_causes_hurts_nobody() -> None:
    compute = Compute(lambda tasks: RuntimeError("too many") if len(tasks) > 4 else None)
    outcomes = run_isolated([task(i) for i in range(9)], compute)
    assert not any(isinstance(outcome, BaseException) for outcome in outcomes)


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_out_of_memory_halves_the_batch_and_then_the_rows_of_a_task(limit: int) -> None:
    compute = Compute(lambda tasks: torch.OutOfMemoryError("no room") if sum(t.rows for t in tasks) > limit else None)
    tasks = [task(1, rows=2), task(2, rows=13)]
    outcomes = run_isolated(tasks, compute, join)
    for one, outcome in zip(tasks, outcomes):
        assert torch.equal(outcome[0], one.tensors[0] * 2)  # type: ignore[index, arg-type]
    assert sum(compute.launches[-1]) <= limit


def test_a_single_row_without_room_is_an_error_of_its_caller_only() -> None:
    compute = Compute(lambda tasks: MemoryError("13") if any(t.number == 13 for t in tasks) else None)
    outcomes = run_isolated([task(0), task(13), task(1)], compute, join)
    assert isinstance(outcomes[1], ExpertFailed)
    assert not isinstance(outcomes[0], BaseException)
    assert not isinstance(outcomes[2], BaseException)


def test_rows_are_not_halved_where_they_belong_together() -> None:
    compute = Compute(lambda tasks: torch.OutOfMemoryError("no room"))
    assert isinstance(run_isolated([task(0, rows=8)], compute)[0], ExpertFailed)
    assert compute.launches == [[8]]


def test_halves_keep_what_they_need_to_know() -> None:
    seen: list[Task] = []

    def fails(tasks: list[Task]) -> BaseException | None:
        seen.extend(tasks)
        return torch.OutOfMemoryError() if tasks[0].rows > 2 else None

    run_isolated([task(5, rows=4)], Compute(fails), join)
    half = seen[1]
    assert (half.operation, half.present, half.entries, half.group, half.lane, half.wants_grad, half.rows) == (
        "forward",
        (),
        ENTRIES,
        "group",
        "lane",
        (True, False),
        2,
    )
    assert half.tensors[1].ndim == 0  # what belongs to the whole call is passed whole


@pytest.mark.parametrize(
    "error, expected",
    [
        (torch.OutOfMemoryError("CUDA out of memory"), True),
        (MemoryError(), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


class Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("nobody may see this")


class Unpicklable(Exception):
    def __reduce__(self) -> str:
        raise TypeError("cannot be pickled")


@pytest.mark.parametrize(
    "error, text",
    [
        (KeyError("x"), "KeyError: 'x'"),
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt: "),
        (Unshowable(), "Unshowable: (its message cannot be shown)"),
        (Unpicklable("y"), "Unpicklable: y"),
    ],
)
def test_what_a_caller_is_told_of_a_modules_error(error: BaseException, text: str) -> None:
    (outcome,) = run_isolated([task(0)], Compute(lambda tasks: error))
    assert isinstance(outcome, ExpertFailed)
    assert str(outcome) == text
    assert outcome.__traceback__ is None
    assert outcome.__cause__ is None


def test_long_messages_are_cut_and_our_own_errors_stay_what_they_are() -> None:
    assert len(str(as_expert_failure(ValueError("x" * 10_000)))) < MAX_ERROR_CHARS + 50
    ours = NonFiniteError("nan")
    assert as_expert_failure(ours) is ours


def test_a_half_that_succeeds_has_no_effect_if_the_other_fails() -> None:
    effects: list[float] = []

    def compute(tasks: list[Task]) -> list[TaskResult]:
        (one,) = tasks
        if one.rows > 1:
            raise torch.OutOfMemoryError
        value = float(one.tensors[0])
        if value == 3:
            raise ValueError("bad row")
        effects.append(value)
        return [[one.tensors[0]]]

    @contextlib.contextmanager
    def undoable() -> Iterator[None]:
        before = list(effects)
        try:
            yield
        except BaseException:
            effects[:] = before
            raise

    spoilt, good = task(0, rows=4), task(1, rows=2)
    spoilt.tensors[0] = torch.arange(4.0)
    outcomes = run_isolated([spoilt, good], compute, join, undoable)
    assert str(outcomes[0]) == "ValueError: bad row"
    assert not isinstance(outcomes[1], BaseException)
    assert effects == [1.0, 1.0]


def test_a_lost_device_is_not_retried_and_ends_the_runtime() -> None:
    calls = 0

    def compute(tasks: list[Task]) -> list[TaskResult]:
        nonlocal calls
        calls += 1
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(DeviceLost, match="device-side"):
        run_isolated([task(1), task(2)], compute)
    assert calls == 1
