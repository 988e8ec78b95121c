"""A batch of rows to many experts and back. Owns: which row goes to which expert, how many answers each row needs, and
when to stop waiting for the rest.

``Assignment`` and ``Quorum`` decide and are pure; ``fan_out`` waits. Must not know: gating scores, autograd, or what a
call consists of.

Legend: B = rows of the batch, E = distinct experts, N = (row, expert) pairs grouped by expert, D = grid dimensions.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from moe.errors import CallTimeout, MoEError
from moe.expert_uid import UID_DELIMITER, ExpertInfo

T = TypeVar("T")
Indices = NDArray[np.int64]

_MAX_NAMED_ROWS = 20  # in an error message


class CutOff(CallTimeout):
    """Not waited for any longer, as every row had the answers it needs."""


class Abandoned(MoEError):
    """Not waited for any longer, as another call failed and the whole cannot succeed. Says nothing about this one."""


@dataclass(frozen=True, eq=False)
class Assignment:
    """Who computes what: pairs of a row and one of its experts.

    :ivar batch_size: B
    :ivar width: most experts that a row was given
    :ivar experts_E: the experts, each once
    :ivar coordinates_ED: where they are in the grid
    :ivar experts_N: index into experts_E; never decreases
    :ivar rows_N: row of each pair
    :ivar slots_N: which of its row's experts it is: 0 for the best one
    """

    batch_size: int
    width: int
    experts_E: tuple[ExpertInfo, ...]
    coordinates_ED: Indices
    experts_N: Indices
    rows_N: Indices
    slots_N: Indices

    @classmethod
    def of(cls, chosen: Sequence[Sequence[Any]], uid_prefix: str, num_dims: int) -> Assignment:
        """Group the experts chosen for each row; whatever has a ``uid`` will do. The first with a uid stands for all."""
        distinct: dict[str, int] = {}
        flat = [expert for row in chosen for expert in row]
        experts_N = np.fromiter((distinct.setdefault(e.uid, len(distinct)) for e in flat), np.int64, len(flat))
        firsts = np.unique(experts_N, return_index=True)[1]
        lengths = np.fromiter(map(len, chosen), np.int64, len(chosen))
        starts = np.cumsum(lengths) - lengths
        order = np.argsort(experts_N, kind="stable")
        coordinates = [[int(c) for c in uid[len(uid_prefix) :].split(UID_DELIMITER)] for uid in distinct]
        return cls(
            batch_size=len(chosen),
            width=int(lengths.max(initial=0)),
            experts_E=tuple(flat[i] for i in firsts),
            coordinates_ED=np.array(coordinates, np.int64).reshape(len(distinct), num_dims),
            experts_N=experts_N[order],
            rows_N=np.repeat(np.arange(len(chosen)), lengths)[order],
            slots_N=(np.arange(len(flat)) - np.repeat(starts, lengths))[order],
        )

    @property
    def coordinates_ND(self) -> Indices:
        """Grid coordinates of each pair's expert."""
        return self.coordinates_ED[self.experts_N]

    @property
    def rows_E(self) -> list[Indices]:
        """The rows of each expert."""
        if not self.experts_E:
            return []
        return np.split(self.rows_N, np.cumsum(np.bincount(self.experts_N, minlength=len(self.experts_E)))[:-1])

    def keep(self, kept_N: NDArray[np.bool_]) -> Assignment:
        """These pairs only; experts without any are left out."""
        used, experts_N = np.unique(self.experts_N[kept_N], return_inverse=True)
        return Assignment(
            batch_size=self.batch_size,
            width=self.width,
            experts_E=tuple(self.experts_E[i] for i in used),
            coordinates_ED=self.coordinates_ED[used],
            experts_N=experts_N,
            rows_N=self.rows_N[kept_N],
            slots_N=self.slots_N[kept_N],
        )


class Quorum:
    """Counts answers row by row.

    :param rows_E: rows of each expert
    :param needed_B: answers each row needs
    :param zeros_allowed: a row that nobody answers is fine all the same
    """

    def __init__(self, rows_E: Sequence[Indices], needed_B: Indices, *, zeros_allowed: bool):
        self._rows_E, self._needed_B, self._zeros_allowed = rows_E, needed_B, zeros_allowed
        self._answered_B = np.zeros_like(needed_B)
        self._pending_B = np.zeros_like(needed_B)
        for rows in rows_E:
            np.add.at(self._pending_B, rows, 1)
        self._outstanding = len(rows_E)

    def __repr__(self) -> str:
        return f"Quorum({self._outstanding} of {len(self._rows_E)} outstanding, {int(self._lacking().sum())} rows lack)"

    def count(self, expert: int, answered: bool) -> None:
        """An expert has answered or failed."""
        rows = self._rows_E[expert]
        np.subtract.at(self._pending_B, rows, 1)
        if answered:
            np.add.at(self._answered_B, rows, 1)
        self._outstanding -= 1

    def withdraw(self, expert: int) -> None:
        """An expert's answer turned out to be none."""
        np.subtract.at(self._answered_B, self._rows_E[expert], 1)

    @property
    def reached(self) -> bool:
        """True once every row has the answers it needs, or nobody left who could give any."""
        return not (self._lacking() & (self._pending_B > 0)).any()

    @property
    def over(self) -> bool:
        """True if waiting longer cannot help: all is settled, or some row cannot get what it needs any more."""
        return self._outstanding == 0 or bool(self._lost().any())

    def short_rows(self) -> Indices:
        """Rows that cannot get the answers they need any more; if there are none, those that do not have them yet."""
        lost_B = self._lost()
        return np.flatnonzero(lost_B if lost_B.any() else self._excused(self._lacking()))

    def _lacking(self) -> NDArray[np.bool_]:
        return self._answered_B < self._needed_B

    def _lost(self) -> NDArray[np.bool_]:
        return self._excused(self._answered_B + self._pending_B < self._needed_B)

    def _excused(self, lacking_B: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return lacking_B & (self._answered_B > 0) if self._zeros_allowed else lacking_B


async def fan_out(
    calls: Sequence[Coroutine[Any, Any, T]],
    quorum: Quorum,
    *,
    timeout_s: float | None,
    after_quorum_s: float | None,
) -> list[T | MoEError]:
    """Run all calls at once; cancel those that are still running when waiting for them is over.

    :param quorum: is told of each result
    :param timeout_s: for everything
    :param after_quorum_s: for the rest, once every row has what it needs
    :returns: what each call returned, or why it failed
    """
    wait = _Wait(quorum, timeout_s, after_quorum_s)
    tasks = [asyncio.ensure_future(call) for call in calls]
    for index, task in enumerate(tasks):
        task.add_done_callback(functools.partial(wait.settle, index))
    try:
        why_not = await wait.over
        return [_outcome(task) if task.done() else why_not() for task in tasks]
    finally:
        wait.stop()
        for task in tasks:
            task.cancel()


class _Wait:
    """Decides when ``fan_out`` has waited long enough. ``over`` becomes what to say of calls that are still running."""

    def __init__(self, quorum: Quorum, timeout_s: float | None, after_quorum_s: float | None):
        self._loop = asyncio.get_running_loop()
        self._quorum, self._after_quorum_s = quorum, after_quorum_s
        self._timers: list[asyncio.TimerHandle] = []
        self._in_extra_time = False
        self.over: asyncio.Future[Callable[[], MoEError]] = self._loop.create_future()
        if timeout_s is not None:
            self._end_in(timeout_s, functools.partial(CallTimeout, f"no answer within {timeout_s:.3g} s"))
        self._consider()

    def settle(self, index: int, task: asyncio.Task[Any]) -> None:
        """A call is done."""
        error = _error(task)  # looked at in any case, or asyncio complains that nobody did
        if not self.over.done():
            self._quorum.count(index, error is None)
            if error is not None and not isinstance(error, MoEError):
                self._end(Abandoned)  # a mistake of ours, which fan_out raises
            self._consider()

    def stop(self) -> None:
        """Cancel the timers."""
        for timer in self._timers:
            timer.cancel()

    def _consider(self) -> None:
        if self._quorum.over:
            self._end(functools.partial(Abandoned, "others failed, so that some row cannot reach its k_min"))
        elif self._after_quorum_s is not None and self._quorum.reached and not self._in_extra_time:
            self._in_extra_time = True
            message = f"no answer within {self._after_quorum_s:.3g} s after every row had its k_min"
            self._end_in(self._after_quorum_s, functools.partial(CutOff, message))

    def _end_in(self, delay_s: float, why_not: Callable[[], MoEError]) -> None:
        self._timers.append(self._loop.call_later(delay_s, self._end, why_not))

    def _end(self, why_not: Callable[[], MoEError]) -> None:
        if not self.over.done():
            self.over.set_result(why_not)


def _error(task: asyncio.Task[Any]) -> BaseException | None:
    return CallTimeout("the call was cancelled") if task.cancelled() else task.exception()


def _outcome(task: asyncio.Task[T]) -> T | MoEError:
    error = _error(task)
    if error is None:
        return task.result()
    if isinstance(error, MoEError):
        return error
    raise error


def name_rows(rows: Indices) -> str:
    """Row ids for an error message."""
    more = f" and {len(rows) - _MAX_NAMED_ROWS} more" if len(rows) > _MAX_NAMED_ROWS else ""
    return f"{rows[:_MAX_NAMED_ROWS].tolist()}{more}"
