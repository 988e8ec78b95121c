"""Running a batch so that one bad task cannot hurt the others. Owns: isolation, out-of-memory halving, error texts.

Decides nothing about the device or the module: ``compute`` does the work for a list of tasks, all or nothing. A batch that
fails is halved until only the offenders are left (2 log n launches for one of n, instead of n); a single task that runs out
of memory is halved by rows.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from moe.errors import ExpertFailed, MoEError
from moe.schema import select_rows
from moe.server.task_pool import DeviceLost, Task, TaskResult

logger = logging.getLogger(__name__)

Outcome = TaskResult | BaseException
Compute = Callable[[list[Task]], list[TaskResult]]
Join = Callable[[Task, Sequence[TaskResult]], TaskResult]
Undoable = Callable[[], AbstractContextManager[object]]

MAX_ERROR_CHARS = 1000  # of a module's own error message


def run_isolated(
    tasks: list[Task],
    compute: Compute,
    join: Join | None = None,
    undoable: Undoable = contextlib.nullcontext,
) -> list[Outcome]:
    """Compute a batch; only tasks that fail on their own get an error.

    :param compute: returns one result per task; when it raises, it must have had no effect
    :param join: puts the results of a task's row ranges together; None if its tasks cannot be split by rows
    :param undoable: a context for the parts of a task; undoes the effects of their computations if it is left by an exception
    :returns: one result or error per task, in order
    """
    try:
        results = compute(tasks)
        assert len(results) == len(tasks)
        return list(results)
    except BaseException as e:  # a module may raise anything, SystemExit included
        error = e
    try:
        if is_device_lost(error):
            raise DeviceLost(text_of(error)) from error
        if is_out_of_memory(error) and torch.cuda.is_available():
            torch.cuda.empty_cache()
        if len(tasks) > 1:
            middle = len(tasks) // 2
            parts = (tasks[:middle], tasks[middle:])
            return [outcome for part in parts for outcome in run_isolated(part, compute, join, undoable)]
        if is_out_of_memory(error) and join is not None and tasks[0].rows > 1:
            return [_run_halves(tasks[0], compute, join, undoable)]
        logger.debug("a task failed", exc_info=error)
        return [as_expert_failure(error)]
    finally:
        del error  # it holds this frame, and would be held by it: a cycle, with all tensors of the computation in it


def _run_halves(task: Task, compute: Compute, join: Join, undoable: Undoable) -> Outcome:
    middle = task.rows // 2
    results: list[TaskResult] = []
    try:
        with undoable():  # one half that has succeeded may not train if the other fails
            for half in (_rows_of(task, 0, middle), _rows_of(task, middle, task.rows)):
                (outcome,) = run_isolated([half], compute, join, undoable)
                if isinstance(outcome, BaseException):
                    raise outcome
                results.append(outcome)
    except MoEError as e:
        return e.with_traceback(None)
    return join(task, results)


def _rows_of(task: Task, start: int, stop: int) -> Task:
    return Task(
        task.operation,
        task.present,
        task.entries,
        select_rows(task.entries, task.tensors, start, stop),
        stop - start,
        task.group,
        task.lane,
        task.wants_grad,
        shared=task.shared,
        number=task.number,
    )


def is_out_of_memory(error: BaseException) -> bool:
    """True for the ways torch says that memory ran out, on any device."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in text_of(error)
    )


def is_device_lost(error: BaseException) -> bool:
    """True for errors after which every further use of the device fails as well (device-side asserts, lost devices)."""
    return isinstance(error, DeviceLost) or (
        isinstance(error, RuntimeError) and "CUDA error" in text_of(error) and not is_out_of_memory(error)
    )


def text_of(error: BaseException) -> str:
    """An error's message, whatever its class does."""
    try:
        return str(error).encode("utf-8", "backslashreplace").decode()[:MAX_ERROR_CHARS]
    except BaseException:
        return "(its message cannot be shown)"


def as_expert_failure(error: BaseException) -> MoEError:
    """What the caller is told: our own errors as they are, a module's by type and message. Without traceback and causes: they
    would keep all tensors of the computation in memory."""
    if isinstance(error, MoEError):
        error.__cause__ = error.__context__ = None
        return error.with_traceback(None)
    return ExpertFailed(f"{type(error).__name__}: {text_of(error)}")
