"""How does the cost grow with clients, experts, rows and sequence length? This project alone; each panel varies one of them.

    python -m benchmarks.benchmark_scale --panels clients experts

Clients are threads of up to four processes: the machine, not Python's lock in one client, is what is measured. Experts return
their input, so that what is measured is everything else.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from benchmarks.benchmark_throughput import vectors_per_s
from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse
from benchmarks.peers import START_TIMEOUT_S, Subject, running, served

CLIENTS = (1, 2, 4, 8, 16, 32, 64, 128)
EXPERTS = (1, 4, 16, 64, 256, 1024)
ROWS = (1, 4, 16, 64, 256, 1024, 4096, 16384)
LENGTHS = (1, 4, 16, 64, 256, 1024)
PROCESSES = 4
TIMEOUT_S = 90.0


def _server(expert_cls: str, hidden_dim: int, experts: int = 1) -> dict[str, Any]:
    return {
        "uids": [f"expert.{i}" for i in range(experts)],
        "expert_cls": expert_cls,
        "hidden_dim": hidden_dim,
        "optimizer": "none",
        "max_batch_size": 16384,
        "num_handlers": 1,
        "device": "cpu",
    }


def _point(subject: Subject, *, load: Mapping[str, Any], clients: int, seconds: float) -> Mapping[str, float]:
    """Rate and latency of so many clients with the same load."""
    used = min(PROCESSES, clients)
    answers = subject.ask_clients(
        "calls", TIMEOUT_S + seconds, used, load=load, limit={"seconds": seconds}, threads=clients // used
    )
    results = [result for answer in answers for result in answer]
    durations = [duration for result in results for duration in result["durations"]]
    return {"rate": vectors_per_s(results), "latency": 1e3 * statistics.median(durations)}


def _cases(panel: str, x_label: str, unit: str, x: int, found: Any, settings: Mapping[str, Any]) -> list[Case]:
    return [
        Case(
            f"{x} {x_label}: {what}",
            metric,
            higher,
            found.of(what),
            settings,
            panel=f"{panel}: {what}",
            x=x,
            x_label=x_label,
        )
        for what, metric, higher in (("rate", f"{unit}/s", True), ("latency", "ms, median of a call", False))
    ]


def measure_clients(counts: Sequence[int], rounds: int, seconds: float) -> list[Case]:
    """Calls of 32 rows of 1024, by number of clients."""
    server, cases = _server("nop", 1024), []
    load = {"uids": server["uids"], "shape": [32, 1024]}
    with running(served(OURS, server=server, clients=min(PROCESSES, max(counts)))) as started:
        for count in counts:
            found = interleave(started, rounds, partial(_point, load=load, clients=count, seconds=seconds))
            cases += _cases("clients", "clients", "rows", count, found, {**load, "server": server})
    return cases


def measure_experts(counts: Sequence[int], rounds: int, seconds: float) -> list[Case]:
    """Calls of 32 rows of 64 by 8 clients to all experts in turn, by number of experts."""
    cases = []
    for count in counts:
        server = _server("nop", 64, count)
        load = {"uids": server["uids"], "shape": [32, 64]}
        timeout_s = START_TIMEOUT_S + 0.2 * count
        with running(served(OURS, server=server, clients=PROCESSES, start_timeout_s=timeout_s)) as started:
            found = interleave(started, rounds, partial(_point, load=load, clients=8, seconds=seconds))
        settings = {"clients": 8, "shape": load["shape"], "expert_cls": "nop"}
        cases += _cases("experts", "experts", "rows", count, found, settings)
    return cases


def measure_rows(counts: Sequence[int], rounds: int, seconds: float) -> list[Case]:
    """Calls of one client, by number of rows of 1024."""
    server, cases = _server("nop", 1024), []
    with running(served(OURS, server=server)) as started:
        for count in counts:
            load = {"uids": server["uids"], "shape": [count, 1024]}
            found = interleave(started, rounds, partial(_point, load=load, clients=1, seconds=seconds))
            cases += _cases("rows of a call", "rows", "rows", count, found, {**load, "server": server})
    return cases


def measure_lengths(lengths: Sequence[int], rounds: int, seconds: float) -> list[Case]:
    """Calls of one client with 16 sequences of width 256, by their length."""
    server, cases = _server("nop_sequence", 256), []
    with running(served(OURS, server=server)) as started:
        for length in lengths:
            load = {"uids": server["uids"], "shape": [16, length, 256]}
            found = interleave(started, rounds, partial(_point, load=load, clients=1, seconds=seconds))
            cases += _cases("sequence length", "positions", "positions", length, found, {**load, "server": server})
    return cases


PANELS = {
    "clients": (measure_clients, CLIENTS),
    "experts": (measure_experts, EXPERTS),
    "rows": (measure_rows, ROWS),
    "lengths": (measure_lengths, LENGTHS),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the panels that were asked for."""
    parser = make_parser(__doc__, rounds=3, seconds=2.0, systems=(OURS,))
    parser.add_argument("--panels", nargs="+", choices=PANELS, default=list(PANELS), help="what to vary (default: all)")
    parser.add_argument("--largest", type=int, help="leave out what is larger")
    options = parse(parser, argv, {"panels": ["clients"], "largest": 2})
    record = Record("scale", options.smoke)
    for panel in options.panels:
        measure, counts = PANELS[panel]
        wanted = [count for count in counts if options.largest is None or count <= options.largest]
        record.cases += measure(wanted, options.rounds, options.seconds)
    record.publish(options.out)


if __name__ == "__main__":
    main()
