"""Where does the time of a call go? One client, one expert, one call after another, from the autograd call to its return.

    python -m benchmarks.benchmark_breakdown

The stages add up to the call, but for the cost of noting the times: below 0.02 ms a call. See ``benchmarks.tracing``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks import tracing
from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse
from benchmarks.peers import Subject, running, served

UID = "expert.0"
HIDDEN = 1024
TIMEOUT_S = 60.0


def measure(expert_cls: str, rows: int, operation: str, transport: str, rounds: int, seconds: float) -> list[Case]:
    """Median time of each stage of a forward or of a backward."""
    backward = operation == "backward"
    server = {
        "uids": [UID],
        "expert_cls": expert_cls,
        "hidden_dim": HIDDEN,
        "optimizer": "adam" if backward else "none",
        "max_batch_size": 4096,
        "num_handlers": 1,
        "device": "cpu",
    }
    load = {"uids": [UID], "shape": [rows, HIDDEN], "backward": backward, "input_grad": backward}
    limit = {"seconds": seconds}

    def run(subject: Subject) -> Mapping[str, float]:
        timeout_s = TIMEOUT_S + seconds
        ours = subject.peers[0]
        ours.ask("stamps", timeout_s)  # forget those of before
        (found,) = subject.ask_clients("traced", timeout_s, load=load, limit=limit)
        stamps = {**found, **ours.ask("stamps", timeout_s)}
        stages = tracing.stages(tracing.of_backwards(stamps) if backward else stamps)
        return {**stages, "whole call": 1e3 * _median(found["called"], found["returned"])}

    subject = served(OURS, server=server, client={"transport": transport}, role="traced server")
    with running(subject) as started:
        started[0].ask_clients("trace", TIMEOUT_S, operation=operation)
        found = interleave(started, rounds, run)
    panel = f"{expert_cls}, {rows} x {HIDDEN}, {operation}, {transport}"
    settings: dict[str, Any] = {"rows": rows, "transport": transport, "server": server, "seconds": seconds}
    return [
        Case(f"{panel}: {stage}", "ms", False, found.of(stage), settings, panel=panel)
        for stage in ("whole call", *(name for name, _, _ in tracing.STAGES))
    ]


def _median(begins: Sequence[float], ends: Sequence[float]) -> float:
    durations = sorted(end - begin for begin, end in zip(begins, ends))
    return durations[len(durations) // 2]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, systems=(OURS,))
    parser.add_argument("--transport", nargs="+", choices=("unix", "tls"), default=["unix", "tls"], help="direct links")
    parser.add_argument("--expert_cls", nargs="+", default=["nop", "ffn"], help="experts")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 2048], help="of a call")
    parser.add_argument("--operation", nargs="+", choices=("forward", "backward"), default=["forward", "backward"])
    options = parse(parser, argv, {"transport": ["unix"], "expert_cls": ["nop"], "rows": [4]})
    record = Record("breakdown", options.smoke)
    for transport in options.transport:
        for expert_cls in options.expert_cls:
            for rows in options.rows:
                for operation in options.operation:
                    record.cases += measure(expert_cls, rows, operation, transport, options.rounds, options.seconds)
    record.publish(options.out)


if __name__ == "__main__":
    main()
