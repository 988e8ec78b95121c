"""How fast are the first calls after a server and its clients have started, against the steady state?

    python -m benchmarks.benchmark_burst
    python -m benchmarks.benchmark_burst --transport tls

Every round starts a server and clients anew, and waits until their processes are idle: hivemind's libp2p daemon takes a
quarter of a second of a core after it has started, whatever its settings, and nine of them share the cores with the calls
(``--at_once`` measures that). All clients begin at once and make a few calls each; the rate of these is the first burst. The
steady state is the median of further bursts of as many calls, in the same processes.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import psutil

from benchmarks.benchmark_throughput import PRESETS, STALL_S, Preset, vectors_per_s
from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse
from benchmarks.peers import Subject, running, served

CALLS = 12  # of each client in a burst
LATER_BURSTS = 6
OF_STEADY_STATE = "first burst to steady state"
IDLE = 0.05  # of a core
IDLE_TIMEOUT_S = 20.0


class FreshSwarm:
    """A server and clients that are started for every measurement, and ended after it."""

    name = OURS

    def __init__(self, preset: Preset, calls: int, later_bursts: int, at_once: bool = False):
        self._preset, self._calls, self._later_bursts, self._at_once = preset, calls, later_bursts, at_once

    def restart(self) -> None:
        """Every measurement starts one."""

    def measure(self) -> Mapping[str, float]:
        """Rows per second of the first burst, and the median of the later ones."""
        preset = self._preset
        subject = served(OURS, server=preset.server, clients=preset.clients, client={"transport": preset.transport})
        with running(subject) as (started,):
            if not self._at_once:
                await_idle()
            rates = [self._burst(started) for _ in range(1 + self._later_bursts)]
        return {"first": rates[0], "steady": statistics.median(rates[1:])}

    def _burst(self, subject: Subject) -> float:
        limit: dict[str, Any] = {"calls": self._calls, "seconds": STALL_S}
        answers = subject.ask_clients("calls", 2 * STALL_S, load=self._preset.load, limit=limit)
        return vectors_per_s([result for answer in answers for result in answer])


def await_idle() -> None:
    """Wait until the processes that this one has started have nothing to do, or for as long as that may take."""
    deadline = time.monotonic() + IDLE_TIMEOUT_S
    before = _cpu_s()
    while time.monotonic() < deadline:
        time.sleep(0.5)
        now = _cpu_s()
        if now - before < 0.5 * IDLE:
            return
        before = now


def _cpu_s() -> float:
    """Processor time of all processes that this one has started."""
    total = 0.0
    for process in psutil.Process().children(recursive=True):
        try:
            times = process.cpu_times()
        except psutil.Error:  # it has ended
            continue
        total += times.user + times.system
    return total


def measure(
    preset: Preset, rounds: int, calls: int = CALLS, later_bursts: int = LATER_BURSTS, at_once: bool = False
) -> list[Case]:
    """First burst and steady state."""
    found = interleave([FreshSwarm(preset, calls, later_bursts, at_once)], rounds, FreshSwarm.measure, warmups=0)
    first, steady = found.of("first")[OURS], found.of("steady")[OURS]
    settings = {**asdict(preset), "calls": calls, "later_bursts": later_bursts}
    ratios = {OF_STEADY_STATE: [a / b for a, b in zip(first, steady)]}
    return [
        Case("first burst", "rows/s, forward", True, {OURS: first}, settings, ratios, notes=found.notes),
        Case("steady state", "rows/s, forward", True, {OURS: steady}, settings, notes=found.notes),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, systems=(OURS,))
    parser.add_argument("--transport", choices=("auto", "unix", "tls", "libp2p"), default="auto")
    parser.add_argument("--calls", type=int, default=CALLS, help="of each client in a burst (default %(default)s)")
    parser.add_argument("--rows", type=int, default=2048, help="of a call (default %(default)s)")
    parser.add_argument("--at_once", action="store_true", help="do not wait until the processes are idle")
    options = parse(parser, argv, {"calls": 2, "rows": 64, "rounds": 1})
    record = Record("burst", options.smoke)
    preset = replace(PRESETS["criteria_nop_8"], transport=options.transport, rows=options.rows)
    if options.smoke:
        preset = replace(preset, clients=2)
    record.cases = measure(preset, options.rounds, options.calls, 1 if options.smoke else LATER_BURSTS, options.at_once)
    record.publish(options.out)


if __name__ == "__main__":
    main()
