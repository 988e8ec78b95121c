"""What a server has served. Owns: the counters of a ``statistics()`` snapshot and what two snapshots say about speed.

Pure values and arithmetic; must not know who counts, who asks, or what time it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class ExpertStatistics:
    """What one expert has done since its server started, and what waits for it now.

    :ivar forward_rows: rows (examples) sent through forward
    :ivar backward_rows: rows sent through backward
    :ivar forward_batches: batches these forward rows were run in
    :ivar backward_batches: batches these backward rows were run in
    :ivar pending: tasks that wait now
    :ivar failed: tasks that ended with an error
    :ivar failed_steps: steps of the optimizer that raised; callers got their gradients all the same
    """

    forward_rows: int = 0
    backward_rows: int = 0
    forward_batches: int = 0
    backward_batches: int = 0
    pending: int = 0
    failed: int = 0
    failed_steps: int = 0

    @property
    def rows(self) -> int:
        """Rows of both directions."""
        return self.forward_rows + self.backward_rows

    @property
    def batches(self) -> int:
        """Batches of both directions."""
        return self.forward_batches + self.backward_batches


@dataclass(frozen=True, kw_only=True)
class ServerStatistics:
    """A snapshot of all experts of a server, by uid."""

    experts: Mapping[str, ExpertStatistics] = field(default_factory=dict)

    @property
    def total(self) -> ExpertStatistics:
        """All experts together."""
        return sum_statistics(self.experts.values())


@dataclass(frozen=True, kw_only=True)
class ExpertRates:
    """How fast an expert served between two snapshots.

    :ivar mean_batch_rows: rows per batch in that time, both directions together; 0 if nothing was served
    """

    forward_rows_per_s: float = 0.0
    backward_rows_per_s: float = 0.0
    mean_batch_rows: float = 0.0

    @property
    def rows_per_s(self) -> float:
        """Both directions."""
        return self.forward_rows_per_s + self.backward_rows_per_s


@dataclass(frozen=True, kw_only=True)
class ServerRates:
    """How fast a server served between two snapshots: each expert, and all together."""

    experts: Mapping[str, ExpertRates]
    total: ExpertRates


def sum_statistics(statistics: Iterable[ExpertStatistics]) -> ExpertStatistics:
    """Several experts' counters added up."""
    counters = list(statistics)
    return ExpertStatistics(
        forward_rows=sum(one.forward_rows for one in counters),
        backward_rows=sum(one.backward_rows for one in counters),
        forward_batches=sum(one.forward_batches for one in counters),
        backward_batches=sum(one.backward_batches for one in counters),
        pending=sum(one.pending for one in counters),
        failed=sum(one.failed for one in counters),
        failed_steps=sum(one.failed_steps for one in counters),
    )


def served_rates(before: ServerStatistics, after: ServerStatistics, elapsed_s: float) -> ServerRates:
    """Rates between two snapshots; an expert that ``before`` does not know started from zero.

    :param elapsed_s: time between the snapshots
    :returns: rates of the experts in ``after``; all zero if no time has passed
    """
    unborn = ExpertStatistics()
    experts = {uid: _rates(before.experts.get(uid, unborn), now, elapsed_s) for uid, now in after.experts.items()}
    earlier = sum_statistics(one for uid, one in before.experts.items() if uid in after.experts)
    return ServerRates(experts=experts, total=_rates(earlier, after.total, elapsed_s))


def _rates(before: ExpertStatistics, after: ExpertStatistics, elapsed_s: float) -> ExpertRates:
    if elapsed_s <= 0:
        return ExpertRates()
    rows, batches = after.rows - before.rows, after.batches - before.batches
    return ExpertRates(
        forward_rows_per_s=(after.forward_rows - before.forward_rows) / elapsed_s,
        backward_rows_per_s=(after.backward_rows - before.backward_rows) / elapsed_s,
        mean_batch_rows=rows / batches if batches else 0.0,
    )
