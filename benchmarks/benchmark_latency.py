"""How long does one row take, there and back? One client, one nop expert, forward.

python -m benchmarks.benchmark_latency
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse, quantile
from benchmarks.peers import Subject, running, served_each

UID = "expert.0"
HIDDEN = 1024
HANDLERS = 8  # of stock hivemind: its default for one expert
TIMEOUT_S = 60.0


def measure(systems: Sequence[str], rounds: int, seconds: float, transport: str = "auto") -> list[Case]:
    """Median and 95th percentile of single calls."""
    server = {
        "uids": [UID],
        "expert_cls": "nop",
        "hidden_dim": HIDDEN,
        "optimizer": "none",
        "max_batch_size": 4096,
        "num_handlers": HANDLERS,
        "device": "cpu",
    }
    load = {"uids": [UID], "shape": [1, HIDDEN]}
    limit = {"seconds": seconds}
    timeout_s = TIMEOUT_S + seconds

    def run(subject: Subject) -> Mapping[str, float]:
        ((result,),) = subject.ask_clients("calls", timeout_s, load=load, limit=limit)
        ordered = sorted(1e3 * duration for duration in result["durations"])
        return {"median": statistics.median(ordered), "p95": quantile(ordered, 0.95)}

    with running(*served_each(systems, server=server, client={"transport": transport})) as started:
        found = interleave(started, rounds, run)
    settings = {"rows": 1, "clients": 1, "transport": transport, "server": server, "seconds": seconds}
    names = {"median": "median of one row", "p95": "95th percentile of one row"}
    return [
        Case(names[quantity], "ms, forward", False, found.of(quantity), settings, panel="one row", notes=found.notes)
        for quantity in names
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--transport", choices=("auto", "unix", "tls", "libp2p"), default="auto", help="of this project"
    )
    options = parse(parser, argv, {"systems": [OURS]})
    record = Record("latency", options.smoke)
    record.cases = measure(options.systems, options.rounds, options.seconds, options.transport)
    record.publish(options.out)


if __name__ == "__main__":
    main()
