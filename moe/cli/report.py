"""Showing what a server serves. Owns: the progress line, the live table, how often they change.

Must not know: how the numbers come about. Everything goes to stderr; stdout is for output that programs read.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.table import Table

from moe.cli.display import cell
from moe.server.stats import ServerRates, ServerStatistics, served_rates

logger = logging.getLogger(__name__)

EXPERTS_IN_LINE = 8  # a progress line names this many experts, the busiest ones


class Reporter:
    """Reports each new snapshot: as a live table on a terminal, as one log line elsewhere.

    :param console: where a table is drawn; default: stderr
    :param now: the clock rates are computed with
    """

    def __init__(self, console: Console | None = None, now: Callable[[], float] = time.monotonic):
        console = Console(stderr=True) if console is None else console
        self._now = now
        self._before, self._taken_at = ServerStatistics(), now()
        self._live = Live(console=console, auto_refresh=False, redirect_stdout=False) if console.is_terminal else None
        self._moved: list[logging.StreamHandler[Any]] = []

    def __enter__(self) -> Reporter:
        if self._live is not None:
            stderr = sys.stderr
            self._live.start()  # puts a stderr in place that prints above the table
            self._moved = [handler for handler in _stream_handlers() if handler.stream is stderr]
            for handler in self._moved:
                handler.setStream(sys.stderr)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            for handler in self._moved:
                handler.setStream(sys.stderr)

    def report(self, statistics: ServerStatistics) -> None:
        """Show a snapshot, with rates since the one before."""
        now = self._now()
        rates = served_rates(self._before, statistics, now - self._taken_at)
        self._before, self._taken_at = statistics, now
        if self._live is not None:
            self._live.update(statistics_table(statistics, rates), refresh=True)
        else:
            logger.info("%s", progress_line(statistics, rates))


def progress_line(statistics: ServerStatistics, rates: ServerRates) -> str:
    """All experts together, then the busiest ones, in one line."""
    total, speed = statistics.total, rates.total
    line = (
        f"serving {speed.forward_rows_per_s:.1f} rows/s forward, {speed.backward_rows_per_s:.1f} rows/s backward "
        f"({speed.mean_batch_rows:.1f} rows a batch); since start {total.forward_rows} + {total.backward_rows} rows; "
        f"{total.pending} pending, {total.failed} failed"
    )
    if total.failed_steps:
        line += f", {total.failed_steps} optimizer steps failed"
    busiest = sorted(rates.experts.items(), key=lambda item: (-item[1].rows_per_s, item[0]))
    named = ", ".join(f"{uid} {rate.rows_per_s:.1f} rows/s" for uid, rate in busiest[:EXPERTS_IN_LINE])
    more = f" and {len(busiest) - EXPERTS_IN_LINE} more" if len(busiest) > EXPERTS_IN_LINE else ""
    return f"{line} | {named}{more}" if named else line


def statistics_table(statistics: ServerStatistics, rates: ServerRates) -> Table:
    """All experts together in the first row, then one row for each."""
    table = Table(title="served rows")
    table.add_column("expert", overflow="fold")
    for name in ("forward/s", "backward/s", "rows in total", "batches", "rows/batch", "pending", "failed"):
        table.add_column(name, justify="right")
    rows = [(f"all {len(statistics.experts)}", statistics.total, rates.total)]
    rows += [(uid, statistics.experts[uid], rates.experts[uid]) for uid in sorted(statistics.experts)]
    for name, counters, speed in rows:
        table.add_row(
            cell(name),
            f"{speed.forward_rows_per_s:.1f}",
            f"{speed.backward_rows_per_s:.1f}",
            str(counters.rows),
            str(counters.batches),
            f"{speed.mean_batch_rows:.1f}",
            str(counters.pending),
            str(counters.failed),
            end_section=name.startswith("all "),
        )
    return table


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    for name in (None, "hivemind"):  # hivemind's logger has a handler of its own
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                yield handler
