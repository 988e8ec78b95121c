"""How served rows are shown."""

from __future__ import annotations

import io
import logging
import sys

import pytest
from rich.console import Console

from moe.cli.report import Reporter, progress_line, statistics_table
from moe.server.stats import ExpertStatistics, ServerStatistics, served_rates

IDLE = ServerStatistics(experts={"ffn.0": ExpertStatistics(), "ffn.1": ExpertStatistics()})
BUSY = ServerStatistics(
    experts={
        "ffn.0": ExpertStatistics(forward_rows=10, forward_batches=1),
        "ffn.1": ExpertStatistics(forward_rows=80, backward_rows=40, forward_batches=2, backward_batches=1, pending=5),
    }
)


def test_line_names_the_busiest_first() -> None:
    line = progress_line(BUSY, served_rates(IDLE, BUSY, elapsed_s=2.0))
    assert line == (
        "serving 45.0 rows/s forward, 20.0 rows/s backward (32.5 rows a batch); since start 90 + 40 rows; "
        "5 pending, 0 failed | ffn.1 60.0 rows/s, ffn.0 5.0 rows/s"
    )


def test_line_tells_of_steps_that_failed() -> None:
    broken = ServerStatistics(experts={"ffn.0": ExpertStatistics(failed_steps=2)})
    assert ", 2 optimizer steps failed | " in progress_line(broken, served_rates(IDLE, broken, elapsed_s=2.0))


def test_idle_line_shows_zeros() -> None:
    line = progress_line(IDLE, served_rates(IDLE, IDLE, elapsed_s=2.0))
    assert "serving 0.0 rows/s forward, 0.0 rows/s backward" in line
    assert line.endswith("ffn.0 0.0 rows/s, ffn.1 0.0 rows/s")


def test_line_stays_short_with_many_experts() -> None:
    many = ServerStatistics(experts={f"ffn.{i}": ExpertStatistics() for i in range(256)})
    line = progress_line(many, served_rates(many, many, elapsed_s=1.0))
    assert line.endswith(" and 248 more")
    assert len(line) < 400


def test_table_has_everything_and_each_expert() -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(statistics_table(BUSY, served_rates(IDLE, BUSY, elapsed_s=2.0)))
    rows = [line.replace("│", " ").split() for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["all", "2", "45.0", "20.0", "130", "4", "32.5", "5", "0"] in rows
    assert ["ffn.0", "5.0", "0.0", "10", "1", "10.0", "0", "0"] in rows
    assert ["ffn.1", "40.0", "20.0", "120", "3", "40.0", "5", "0"] in rows


def test_lines_where_there_is_no_terminal(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    times = iter([0.0, 2.0, 4.0])
    with Reporter(Console(file=io.StringIO()), now=lambda: next(times)) as reporter:
        reporter.report(BUSY)
        reporter.report(BUSY)
    first, second = (record.getMessage() for record in caplog.records)
    assert "serving 45.0 rows/s forward" in first
    assert "serving 0.0 rows/s forward" in second


def test_live_table_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler()
    logging.getLogger().addHandler(handler)
    try:
        console = Console(stderr=True, force_terminal=True, width=100)
        with Reporter(console) as reporter:
            reporter.report(BUSY)
            assert handler.stream is not screen  # what is logged now appears above the table
            logging.getLogger("some.module").warning("a remark")
        assert handler.stream is screen
    finally:
        logging.getLogger().removeHandler(handler)
    shown = screen.getvalue()
    assert "ffn.1" in shown
    assert "a remark" in shown
