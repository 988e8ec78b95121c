"""Counters and rates."""

from __future__ import annotations

import pytest

from moe.server.stats import ExpertRates, ExpertStatistics, ServerStatistics, served_rates, sum_statistics


def test_totals() -> None:
    one = ExpertStatistics(forward_rows=10, backward_rows=4, forward_batches=2, backward_batches=1, pending=3, failed=1,
                           failed_steps=1)  # fmt: skip
    assert (one.rows, one.batches) == (14, 3)
    assert sum_statistics([]) == ServerStatistics().total == ExpertStatistics()
    assert ServerStatistics(experts={"a.0": one, "a.1": one}).total == ExpertStatistics(
        forward_rows=20, backward_rows=8, forward_batches=4, backward_batches=2, pending=6, failed=2, failed_steps=2
    )


def test_rates_between_two_snapshots() -> None:
    before = ServerStatistics(experts={"a.0": ExpertStatistics(forward_rows=100, forward_batches=10)})
    after = ServerStatistics(
        experts={
            "a.0": ExpertStatistics(forward_rows=160, forward_batches=12, backward_rows=40, backward_batches=2),
            "a.1": ExpertStatistics(forward_rows=20, forward_batches=1),  # new since then
            "a.2": ExpertStatistics(),
        }
    )
    rates = served_rates(before, after, elapsed_s=2.0)
    assert rates.experts["a.0"] == ExpertRates(forward_rows_per_s=30, backward_rows_per_s=20, mean_batch_rows=25)
    assert rates.experts["a.0"].rows_per_s == 50
    assert rates.experts["a.1"] == ExpertRates(forward_rows_per_s=10, mean_batch_rows=20)
    assert rates.experts["a.2"] == ExpertRates()
    assert rates.total == ExpertRates(forward_rows_per_s=40, backward_rows_per_s=20, mean_batch_rows=24)


def test_rates_of_an_expert_that_is_gone_are_left_out() -> None:
    before = ServerStatistics(experts={"a.0": ExpertStatistics(forward_rows=100, forward_batches=10)})
    rates = served_rates(before, ServerStatistics(), elapsed_s=1.0)
    assert rates.experts == {}
    assert rates.total == ExpertRates()


@pytest.mark.parametrize("elapsed_s", [0.0, -1.0])
def test_no_time_no_rates(elapsed_s: float) -> None:
    after = ServerStatistics(experts={"a.0": ExpertStatistics(forward_rows=100, forward_batches=10)})
    assert served_rates(ServerStatistics(), after, elapsed_s).total == ExpertRates()
