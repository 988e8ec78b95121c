"""What all benchmarks share. Owns: interleaved rounds, their statistics, the record, its table and its chart, the options.

A *system* is what is measured: this project, stock hivemind, the bare module. A *case* is one quantity, measured in several
rounds on each system. Rounds alternate between the systems (A B A B ...), so that what else the machine does in the meantime
hits all of them, and ratios are taken within a round. Must not know: processes, torch, or what is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypeVar

import psutil

from moe.version import __version__

OURS, STOCK, BARE = "moe", "hivemind", "bare"
RESULTS = Path(__file__).resolve().parent / "results"
FORMAT_VERSION = 1
COLORS = {OURS: "#1f6feb", STOCK: "#e8710a", BARE: "#6e7781"}
LOG_SCALE_FROM = 20.0  # a chart whose values differ by more than this factor has a logarithmic axis


class MeasurementFailed(Exception):
    """A system gave no result: it froze, died or raised."""


# --- rounds ----------------------------------------------------------------------------------------------------------


class Measurable(Protocol):
    """A running system that can be started again after it froze."""

    @property
    def name(self) -> str: ...

    def restart(self) -> None: ...


Subject = TypeVar("Subject", bound=Measurable)
Measured = list[Mapping[str, float]]


@dataclass
class Rounds:
    """What came out of interleaved rounds.

    :ivar values: by system, a mapping of quantity to value for each round
    :ivar notes: what went wrong
    """

    values: dict[str, Measured]
    notes: list[str] = field(default_factory=list)

    def of(self, quantity: str) -> dict[str, list[float]]:
        """By system, one quantity of each round. Systems that do not have it are left out."""
        return {
            system: [values[quantity] for values in measured]
            for system, measured in self.values.items()
            if measured and quantity in measured[0]
        }


def interleave(
    subjects: Sequence[Subject],
    rounds: int,
    measure: Callable[[Subject], Mapping[str, float]],
    *,
    warmups: int = 1,
    log: Callable[[str], None] = lambda line: print(line, file=sys.stderr, flush=True),
) -> Rounds:
    """Measure all subjects in turn, ``rounds`` times. One that fails is started again once in a round; stock hivemind is
    left out when that does not help.

    :param warmups: rounds before, not counted
    :raises MeasurementFailed: a system other than stock hivemind failed twice in a round
    """
    result = Rounds({subject.name: [] for subject in subjects})
    alive = list(subjects)
    for number in range(-warmups, rounds):
        for subject in list(alive):
            try:
                values = _measure_patiently(subject, measure, result.notes)
            except MeasurementFailed as e:
                if subject.name != STOCK:
                    raise
                result.notes.append(f"{subject.name} is left out: {e}")
                log(result.notes[-1])
                alive.remove(subject)
                result.values[subject.name] = []
                continue
            if number >= 0:
                result.values[subject.name].append(values)
                shown = ", ".join(f"{quantity} {value:.4g}" for quantity, value in values.items())
                log(f"  round {number + 1} of {rounds}, {subject.name}: {shown}")
    return result


def _measure_patiently(
    subject: Subject, measure: Callable[[Subject], Mapping[str, float]], notes: list[str]
) -> Mapping[str, float]:
    try:
        return measure(subject)
    except MeasurementFailed as e:
        notes.append(f"{subject.name} was started again: {str(e).splitlines()[0]}")
        subject.restart()
        return measure(subject)


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass
class Case:
    """One quantity on one or several systems.

    :ivar name: what was done
    :ivar metric: what was measured, with its unit
    :ivar higher_is_better: of the metric
    :ivar rounds: by system, one value per round
    :ivar settings: how it was done
    :ivar other_ratios: by description, one ratio per round; besides those to the other systems
    :ivar panel: which part of the chart it belongs to
    :ivar x: its place on the panel's axis; None: the panel has bars
    :ivar x_label: what x is
    :ivar notes: what a reader has to know
    """

    name: str
    metric: str
    higher_is_better: bool
    rounds: Mapping[str, Sequence[float]]
    settings: Mapping[str, Any] = field(default_factory=dict)
    other_ratios: Mapping[str, Sequence[float]] = field(default_factory=dict)
    panel: str = ""
    x: float | None = None
    x_label: str = ""
    notes: Sequence[str] = ()

    @property
    def ratios(self) -> dict[str, list[float]]:
        """One per round: ours to each other system, then the other ones."""
        ours = self.rounds.get(OURS, ())
        against = {
            f"{OURS}/{system}": [a / b for a, b in zip(ours, values) if b]
            for system, values in self.rounds.items()
            if system != OURS and ours and values
        }
        return {**against, **{name: list(values) for name, values in self.other_ratios.items()}}

    def ratio(self, name: str) -> float | None:
        """Median of a ratio over the rounds; None if it was not measured."""
        values = self.ratios.get(name)
        return statistics.median(values) if values else None

    def to_plain(self) -> dict[str, Any]:
        """For the record."""
        return {
            "name": self.name,
            "metric": self.metric,
            "higher_is_better": self.higher_is_better,
            "settings": dict(self.settings),
            "systems": {system: summary(values) for system, values in self.rounds.items() if values},
            "ratios": {name: summary(values) for name, values in self.ratios.items() if values},
            "notes": list(self.notes),
        }


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Median and spread of the rounds, and the rounds themselves."""
    ordered = sorted(values)
    low, high = quantile(ordered, 0.25), quantile(ordered, 0.75)
    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "max": ordered[-1],
        "iqr": high - low,
        "rounds": list(values),
    }


def quantile(ordered: Sequence[float], share: float) -> float:
    """A quantile of sorted values, interpolated linearly."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


# --- the record ------------------------------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Where this runs."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": model,
        "cores": usable,
        "memory_bytes": psutil.virtual_memory().total,
        "system": platform.platform(),
        "load_before": os.getloadavg()[0],
    }


def versions() -> dict[str, str]:
    """Of all that takes part."""
    packages = {}
    for name in ("torch", "hivemind", "numpy", "uvloop"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    return {OURS: __version__, "python": platform.python_version(), **packages}


@dataclass
class Record:
    """One run of one benchmark. Make it before measuring: it notes how busy the machine is.

    :ivar benchmark: which question it answers
    :ivar smoke: True: settings so small that the numbers mean nothing
    :ivar cases: what was measured
    :ivar more: further keys of the record
    """

    benchmark: str
    smoke: bool = False
    cases: list[Case] = field(default_factory=list)
    more: dict[str, Any] = field(default_factory=dict)
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).isoformat(timespec="seconds"))
    machine: dict[str, Any] = field(default_factory=machine)

    def to_plain(self) -> dict[str, Any]:
        """What is written as JSON."""
        return {
            "format": FORMAT_VERSION,
            "benchmark": self.benchmark,
            "date": self.date,
            "smoke": self.smoke,
            "arguments": sys.argv[1:],
            "machine": self.machine,
            "versions": versions(),
            **self.more,
            "cases": [case.to_plain() for case in self.cases],
        }

    def publish(self, directory: Path, chart: Callable[[Record], Any] | None = None) -> None:
        """Print the table; write ``<benchmark>.json`` and ``<benchmark>.png``.

        :param chart: makes a figure; default: all cases
        """
        print(table(self.cases))
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / f"{self.benchmark}.json"
        path.write_text(json.dumps(self.to_plain(), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        figure = (chart or draw)(self)
        where = f"{self.machine['cpu']}, {self.machine['cores']} cores, {self.date[:10]}"
        figure.suptitle(f"{self.benchmark}{' (smoke run: means nothing)' if self.smoke else ''}\n{where}", fontsize=10)
        figure.savefig(path.with_suffix(".png"), dpi=110)
        pyplot().close(figure)
        print(f"written: {path} and {path.with_suffix('.png').name}")


def table(cases: Sequence[Case]) -> str:
    """Medians of all systems, and ratios with their spread, for reading."""
    systems = list(dict.fromkeys(system for case in cases for system in case.rounds))
    rows = [["case", "metric", *systems, "ratio: median (min to max)"]]
    for case in cases:
        medians = [number(statistics.median(case.rounds[s])) if case.rounds.get(s) else "-" for s in systems]
        ratios = [
            f"{name} {number(statistics.median(values))} ({number(min(values))} to {number(max(values))})"
            for name, values in case.ratios.items()
            if values
        ]
        rows.append([case.name, case.metric, *medians, "; ".join(ratios)])
    notes = list(dict.fromkeys(f"{case.name}: {note}" for case in cases for note in case.notes))
    return "\n".join([*columns(rows), *(f"note: {note}" for note in notes)])


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with a rule below its first row."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def number(value: float) -> str:
    """As many digits as mean something."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


# --- the chart -------------------------------------------------------------------------------------------------------


def draw(record: Record) -> Any:
    """One panel per group of cases: lines where they have an x, bars with their spread where not."""
    panels: dict[str, list[Case]] = {}
    for case in record.cases:
        panels.setdefault(case.panel or case.metric, []).append(case)
    heights = [3.0 if cases[0].x is not None else 1.0 + 0.55 * len(cases) for cases in panels.values()]
    across = 2 if len(panels) > 1 and len(set(heights)) == 1 and heights[0] == 3.0 else 1
    heights = heights[::across]
    figure, axes = pyplot().subplots(
        len(heights),
        across,
        figsize=(5 * across + 4 / across, sum(heights) + 0.8),
        squeeze=False,
        gridspec_kw={"height_ratios": heights},
        layout="constrained",
    )
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    for axis, (panel, cases) in zip(axes.flat, panels.items()):
        (_draw_bars if cases[0].x is None else _draw_lines)(axis, cases)
        axis.set_title(panel, fontsize=10, loc="left")
        axis.grid(True, alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def pyplot() -> Any:
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def _systems(cases: Iterable[Case]) -> list[str]:
    return list(dict.fromkeys(system for case in cases for system, values in case.rounds.items() if values))


def _draw_bars(axis: Any, cases: Sequence[Case]) -> None:
    systems = _systems(cases)
    thickness = 0.8 / max(1, len(systems))
    for i, system in enumerate(systems):
        shown = [(place, case.rounds[system]) for place, case in enumerate(cases) if case.rounds.get(system)]
        medians = [statistics.median(values) for _, values in shown]
        spread = [
            [median - min(values) for median, (_, values) in zip(medians, shown)],
            [max(values) - median for median, (_, values) in zip(medians, shown)],
        ]
        places = [place + i * thickness for place, _ in shown]
        axis.barh(places, medians, thickness, xerr=spread, label=system, color=COLORS.get(system), capsize=2)
        for place, median in zip(places, medians):
            axis.annotate(f" {number(median)}", (median, place), va="bottom", fontsize=7)
    axis.set_yticks([place + 0.4 - thickness / 2 for place in range(len(cases))], [case.name for case in cases])
    axis.tick_params(labelsize=8)
    axis.invert_yaxis()
    axis.set_xlabel(_label(cases[0]), fontsize=8)
    if _wide(cases):
        axis.set_xscale("log")


def _draw_lines(axis: Any, cases: Sequence[Case]) -> None:
    for system in _systems(cases):
        shown = sorted(
            ((case.x, case.rounds[system]) for case in cases if case.rounds.get(system)), key=lambda pair: pair[0] or 0
        )
        xs = [x for x, _ in shown]
        medians = [statistics.median(values) for _, values in shown]
        color = COLORS.get(system)
        (line,) = axis.plot(xs, medians, marker="o", markersize=4, label=system, color=color)
        lows, highs = [min(values) for _, values in shown], [max(values) for _, values in shown]
        axis.fill_between(xs, lows, highs, alpha=0.2, color=line.get_color(), linewidth=0)
    places = sorted({case.x for case in cases if case.x is not None})
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [number(place) for place in places], minor=False)
    axis.set_xlabel(cases[0].x_label, fontsize=8)
    axis.set_ylabel(_label(cases[0]), fontsize=8)
    axis.tick_params(labelsize=8)
    if _wide(cases):
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)


def _label(case: Case) -> str:
    return f"{case.metric}, {'higher' if case.higher_is_better else 'lower'} is better"


def _wide(cases: Sequence[Case]) -> bool:
    medians = [statistics.median(values) for case in cases for values in case.rounds.values() if values]
    return bool(medians) and min(medians) > 0 and max(medians) / min(medians) > LOG_SCALE_FROM


# --- options ---------------------------------------------------------------------------------------------------------


def make_parser(
    doc: str | None, *, rounds: int = 5, seconds: float = 3.0, systems: Sequence[str] = (OURS, STOCK)
) -> argparse.ArgumentParser:
    """The options that all benchmarks have.

    :param doc: of the benchmark's file
    :param rounds: default number of rounds
    :param seconds: default length of a round on one system
    :param systems: what can be measured, if there is a choice
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="alternating rounds (default %(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=seconds, help="length of a round on one system (default %(default)s)"
    )
    if len(systems) > 1:
        parser.add_argument("--systems", nargs="+", choices=systems, default=list(systems), help="what to measure")
    parser.add_argument("--out", type=Path, help="where to write the record and the chart (default benchmarks/results)")
    parser.add_argument("--smoke", action="store_true", help="a few seconds, to see that it runs; numbers mean nothing")
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, smoke: Mapping[str, Any] | None = None
) -> argparse.Namespace:
    """The options; with ``--smoke``, two short rounds and what ``smoke`` says, not written to the results.

    :param smoke: defaults of a smoke run
    """
    options = parser.parse_args(argv)
    if options.smoke:
        parser.set_defaults(**{"rounds": 2, "seconds": 0.1, **(smoke or {})})
        options = parser.parse_args(argv)
    if options.out is None:
        options.out = Path(tempfile.gettempdir(), "moe-benchmarks-smoke") if options.smoke else RESULTS
    return options
