"""What does it cost to bring one's own adapter? 16 callers with 0, 1, 4 or 16 different LoRA adapters between them, the same
rows in total, on one ffn expert; and callers whose sequences have one length, or four. This project and the bare module: stock
hivemind takes neither.

    python -m benchmarks.benchmark_kwargs

The bare module computes one caller after another. The ratios in the table are of rates within a round: 16 adapters at 0.8 of
one adapter means that a fifth is lost because the callers differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.benchmark_throughput import vectors_per_s
from benchmarks.common import BARE, OURS, Case, Record, interleave, make_parser, parse
from benchmarks.peers import Subject, bare, running, served

ADAPTERS = (0, 1, 4, 16)
CALLERS, PROCESSES = 16, 4  # callers are threads of a few client processes
ROWS, HIDDEN = 32, 1024  # of a call
LENGTHS = {"one length": (20,), "four lengths": (8, 16, 24, 32)}  # the same mean
SEQUENCES, SEQUENCE_HIDDEN = 4, 512  # of a call
TIMEOUT_S = 120.0


def measure(
    systems: Sequence[str],
    rounds: int,
    seconds: float,
    *,
    adapters: Sequence[int] = ADAPTERS,
    passes: Sequence[str] = ("forward", "forward + backward"),
    callers: int = CALLERS,
    hidden_dim: int = HIDDEN,
) -> list[Case]:
    """Rows per second by number of adapters; the ratios are to one adapter."""
    loads = {
        f"{_adapters(count)}, {what}": {
            "uids": ["expert.0"],
            "shape": [ROWS, hidden_dim],
            "adapters": count,
            "backward": what != "forward",
            "input_grad": what != "forward",
        }
        for what in passes
        for count in adapters
    }
    baselines = {name: f"{_adapters(1)}, {name.partition(', ')[2]}" for name in loads}
    return _measure("adapted_ffn", hidden_dim, loads, baselines, systems, rounds, seconds, callers)


def measure_lengths(systems: Sequence[str], rounds: int, seconds: float, *, callers: int = CALLERS) -> list[Case]:
    """Vectors per second when all callers have sequences of one length, and when they differ; the ratio is to one length."""
    loads = {
        f"{name}, forward": {"uids": ["expert.0"], "shape": [SEQUENCES, 1, SEQUENCE_HIDDEN], "lengths": lengths}
        for name, lengths in LENGTHS.items()
    }
    baselines = dict.fromkeys(loads, "one length, forward")
    return _measure("adapted_sequence", SEQUENCE_HIDDEN, loads, baselines, systems, rounds, seconds, callers)


def _adapters(count: int) -> str:
    return "1 adapter" if count == 1 else f"{count} adapters"


def _measure(
    expert_cls: str,
    hidden_dim: int,
    loads: Mapping[str, Mapping[str, Any]],
    baselines: Mapping[str, str],
    systems: Sequence[str],
    rounds: int,
    seconds: float,
    callers: int,
) -> list[Case]:
    server = {
        "uids": ["expert.0"],
        "expert_cls": expert_cls,
        "hidden_dim": hidden_dim,
        "optimizer": "none",
        "max_batch_size": 4096,
        "num_handlers": 1,
        "device": "cpu",
    }
    processes = min(PROCESSES, callers)
    subjects = [served(OURS, server=server, clients=processes)] if OURS in systems else []
    if BARE in systems:
        subjects.append(bare(expert_cls=expert_cls, hidden_dim=hidden_dim))
    limit, timeout_s = {"seconds": seconds}, TIMEOUT_S + seconds

    def run(subject: Subject) -> Mapping[str, float]:
        """All loads in one round, for ratios between them."""
        rates = {}
        for name, load in loads.items():
            if subject.name == BARE:
                results = subject.ask("calls", timeout_s, load=load, limit=limit, callers=callers)
            else:
                answers = subject.ask_clients("calls", timeout_s, load=load, limit=limit, threads=callers // processes)
                results = [result for answer in answers for result in answer]
            rates[name] = vectors_per_s(results)
        return rates

    with running(*subjects) as started:
        found = interleave(started, rounds, run)
    cases = []
    for name, load in loads.items():
        baseline = baselines[name]
        against = found.of(baseline) if baseline != name and baseline in loads else {}
        ratios = {
            f"{system} to {baseline.partition(', ')[0]}": [a / b for a, b in zip(rates, against[system])]
            for system, rates in found.of(name).items()
            if system in against
        }
        settings = {**load, "callers": callers, "server": server, "seconds": seconds}
        cases.append(
            Case(name, "rows/s", True, found.of(name), settings, ratios, panel=f"{callers} callers, {expert_cls}")
        )
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both."""
    parser = make_parser(__doc__, systems=(OURS, BARE))
    parser.add_argument("--callers", type=int, default=CALLERS, help="a multiple of 4 (default %(default)s)")
    parser.add_argument("--hidden_dim", type=int, default=HIDDEN, help="of the adapted expert (default %(default)s)")
    options = parse(parser, argv, {"callers": 4, "hidden_dim": 64, "systems": [OURS]})
    record = Record("kwargs", options.smoke)
    adapters = (0, 1, 4) if options.smoke else ADAPTERS
    record.cases = measure(
        options.systems,
        options.rounds,
        options.seconds,
        adapters=adapters,
        callers=options.callers,
        hidden_dim=options.hidden_dim,
    )
    if not options.smoke:
        record.cases += measure_lengths(options.systems, options.rounds, options.seconds, callers=options.callers)
    record.publish(options.out)


if __name__ == "__main__":
    main()
