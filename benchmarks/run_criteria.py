"""Is it as fast as it should be? Runs the cases of this project's criteria and says for each one what was wanted and measured.

    python -m benchmarks.run_criteria                    # all of them
    python -m benchmarks.run_criteria --only nop ffn     # those whose name contains one of these

Every criterion is the median, over alternating rounds, of a ratio within a round: to stock hivemind, to the bare module, or
between two loads of this project; one is an absolute time. Exits with 1 if one is not met.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import (
    benchmark_burst,
    benchmark_footprint,
    benchmark_kwargs,
    benchmark_latency,
    benchmark_moe,
    benchmark_throughput,
)
from benchmarks.benchmark_throughput import PRESETS
from benchmarks.common import (
    BARE,
    OURS,
    STOCK,
    Case,
    MeasurementFailed,
    Record,
    columns,
    make_parser,
    number,
    parse,
    pyplot,
    summary,
)

TO_STOCK, TO_BARE = f"{OURS}/{STOCK}", f"{OURS}/{BARE}"


@dataclass(frozen=True)
class Criterion:
    """What is wanted of one case.

    :ivar name: of the criterion
    :ivar case: name of the case that decides
    :ivar ratio: of the case; None: the median of ours itself
    :ivar wanted: at least this, or at most
    :ivar at_least: which of both
    """

    name: str
    case: str
    ratio: str | None
    wanted: float
    at_least: bool = True

    def measured(self, case: Case) -> float | None:
        """The median that decides; None if there is none."""
        if self.ratio is not None:
            return case.ratio(self.ratio)
        return float(summary(case.rounds[OURS])["median"]) if case.rounds.get(OURS) else None

    def met(self, measured: float) -> bool:
        """Is this good enough?"""
        return measured >= self.wanted if self.at_least else measured <= self.wanted

    def times_wanted(self, measured: float) -> float:
        """Measured over wanted, so that 1 is just enough and more is better."""
        return measured / self.wanted if self.at_least else self.wanted / measured


@dataclass(frozen=True)
class Group:
    """Criteria that one measurement decides.

    :ivar measure: rounds, seconds of a round -> cases
    """

    measure: Callable[[int, float], list[Case]]
    criteria: Sequence[Criterion]


def _throughput(preset: str, systems: Sequence[str], *criteria: tuple[str, str, float]) -> Group:
    """A preset of the benchmark of throughput, and (name, ratio, at least) for each criterion."""

    def measure(rounds: int, seconds: float) -> list[Case]:
        return [benchmark_throughput.measure(preset, PRESETS[preset], systems, rounds, seconds)]

    return Group(measure, [Criterion(name, preset, ratio, wanted) for name, ratio, wanted in criteria])


def _adapters(rounds: int, seconds: float) -> list[Case]:
    return benchmark_kwargs.measure([OURS], rounds, seconds, adapters=(1, 16), passes=("forward",))


def _adapters_smoke(rounds: int, seconds: float) -> list[Case]:
    return benchmark_kwargs.measure(
        [OURS], rounds, seconds, adapters=(1, 16), passes=("forward",), callers=4, hidden_dim=64
    )


BOTH = (OURS, STOCK)
ONE_ROW, FOOTPRINT = "median of one row", "64 experts: "
ADAPTERS = Group(
    _adapters, [Criterion("16 adapters at once against one", "16 adapters, forward", f"{OURS} to 1 adapter", 0.7)]
)
GROUPS = (
    _throughput("criteria_nop_8", BOTH, ("nop 2048x1024, 8 clients", TO_STOCK, 10)),
    _throughput("criteria_nop_1", BOTH, ("nop 2048x1024, 1 client", TO_STOCK, 10)),
    _throughput("criteria_nop_tls_8", BOTH, ("nop 2048x1024, 8 clients, TLS", TO_STOCK, 5)),
    _throughput("criteria_nop_tls_1", BOTH, ("nop 2048x1024, 1 client, TLS", TO_STOCK, 5)),
    Group(
        lambda rounds, seconds: benchmark_burst.measure(PRESETS["criteria_nop_8"], min(rounds, 5)),
        [
            Criterion(
                "nop 2048x1024, first 12 calls of 8 clients", "first burst", benchmark_burst.OF_STEADY_STATE, 2 / 3
            )
        ],
    ),
    Group(
        lambda rounds, seconds: benchmark_latency.measure(BOTH, rounds, seconds),
        [
            Criterion("nop, one row, median latency", ONE_ROW, TO_STOCK, 1 / 8, at_least=False),
            Criterion("nop, one row, milliseconds", ONE_ROW, None, 0.8, at_least=False),
        ],
    ),
    _throughput("criteria_ffn_small", (OURS, STOCK, BARE), ("ffn 1024, 8 clients, 32 rows", TO_STOCK, 3)),
    _throughput("criteria_ffn_large", (OURS, BARE), ("ffn 1024, 8 clients, 2048 rows, of bare module", TO_BARE, 0.75)),
    _throughput("criteria_ffn_train", (OURS, STOCK, BARE), ("ffn 1024, 2048 rows, training", TO_STOCK, 2.2)),
    Group(
        lambda rounds, seconds: benchmark_moe.measure(BOTH, rounds, seconds, cases=("balanced",)),
        [Criterion("mixture, 64 rows, k 4 of 8", "64 rows, balanced", TO_STOCK, 1 / 50, at_least=False)],
    ),
    Group(
        lambda rounds, seconds: benchmark_footprint.measure({64: BOTH}, BOTH, min(rounds, 3)),
        [
            Criterion("64 experts, processes", f"{FOOTPRINT}processes", TO_STOCK, 1 / 20, at_least=False),
            Criterion("64 experts, private memory", f"{FOOTPRINT}private memory", TO_STOCK, 1 / 3, at_least=False),
        ],
    ),
    ADAPTERS,
)


@dataclass(frozen=True)
class Verdict:
    """A criterion and what was measured; None: nothing."""

    criterion: Criterion
    measured: float | None

    @property
    def word(self) -> str:
        """For the table."""
        if self.measured is None:
            return "NOT MEASURED"
        return "ok" if self.criterion.met(self.measured) else "NOT MET"

    def to_plain(self) -> dict[str, Any]:
        """For the record."""
        criterion = self.criterion
        return {
            "name": criterion.name,
            "case": criterion.case,
            "ratio": criterion.ratio,
            "at_least" if criterion.at_least else "at_most": criterion.wanted,
            "measured": self.measured,
            "verdict": self.word,
        }


def run(groups: Sequence[Group], rounds: int, seconds: float, record: Record) -> list[Verdict]:
    """Measure all groups; cases go into the record as they come."""
    verdicts = []
    for group in groups:
        print(", ".join(criterion.name for criterion in group.criteria), file=sys.stderr)
        try:
            cases = group.measure(rounds, seconds)
        except MeasurementFailed as e:
            print(f"failed: {e}", file=sys.stderr)
            cases = []
        record.cases += cases
        by_name = {case.name: case for case in cases}
        for criterion in group.criteria:
            case = by_name.get(criterion.case)
            verdicts.append(Verdict(criterion, criterion.measured(case) if case is not None else None))
    return verdicts


def verdict_table(verdicts: Sequence[Verdict]) -> str:
    """Criterion, wanted, measured, ok."""
    rows = [["criterion", "wanted", "measured", ""]]
    for verdict in verdicts:
        criterion = verdict.criterion
        bound = f"{'>=' if criterion.at_least else '<='} {number(criterion.wanted)}"
        measured = "-" if verdict.measured is None else number(verdict.measured)
        rows.append([criterion.name, bound, measured, verdict.word])
    return "\n".join(columns(rows))


def draw(verdicts: Sequence[Verdict]) -> Any:
    """One bar for each criterion: how many times over it is met. Left of the line means: not met."""
    shown = [(v.criterion, v.measured) for v in verdicts if v.measured]
    figure, axis = pyplot().subplots(figsize=(9, 1.6 + 0.4 * len(shown)), layout="constrained")
    for place, (criterion, measured) in enumerate(shown):
        times = criterion.times_wanted(measured)
        axis.barh(place, times, 0.6, color="#1a7f37" if times >= 1 else "#cf222e")
        bound = f"{'at least' if criterion.at_least else 'at most'} {number(criterion.wanted)}"
        axis.annotate(f" {number(measured)} ({bound})", (times, place), va="center", fontsize=8)
    axis.axvline(1.0, color="black", linewidth=1)
    axis.set_yticks(range(len(shown)), [criterion.name for criterion, _ in shown], fontsize=8)
    axis.invert_yaxis()
    axis.set_xscale("log")
    axis.set_xticks([10.0**power * digit for power in range(-3, 4) for digit in (1, 2, 5)], minor=False)
    axis.xaxis.set_major_formatter(lambda value, _: number(value))
    axis.tick_params(axis="x", which="minor", labelbottom=False)
    axis.set_xlim(*_limits([criterion.times_wanted(measured) for criterion, measured in shown]))
    axis.set_xlabel("measured over wanted; right of the line: better than wanted", fontsize=8)
    return figure


def _limits(times: Sequence[float]) -> tuple[float, float]:
    """Of an axis with room for words at the right of the longest bar."""
    return 0.5 * min([1.0, *times]), 4.0 * max([1.0, *times])


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print, write, and say by the exit code whether all is well."""
    parser = make_parser(__doc__, systems=())
    parser.add_argument("--only", nargs="+", help="criteria whose name contains one of these")
    options = parse(parser, argv)
    record = Record("criteria", options.smoke)
    groups: Sequence[Group] = [replace(ADAPTERS, measure=_adapters_smoke)] if options.smoke else GROUPS
    if options.only:
        groups = [g for g in groups if any(part in c.name for c in g.criteria for part in options.only)]
    verdicts = run(groups, options.rounds, options.seconds, record)
    record.more["criteria"] = [verdict.to_plain() for verdict in verdicts]
    record.publish(options.out, lambda _: draw(verdicts))
    print(f"\n{verdict_table(verdicts)}")
    sys.exit(0 if options.smoke or all(verdict.word == "ok" for verdict in verdicts) else 1)


if __name__ == "__main__":
    main()
