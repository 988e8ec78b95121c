"""How long does a mixture of experts take? 64 rows of width 64, the 4 best of 8 nop experts, forward and backward.

    python -m benchmarks.benchmark_moe

Three cases: rows spread over the experts (balanced); one expert among the best of every row (hot); several clients that call at
the same moment, after a pause (bursty), where the time is that until the last one has its gradients.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import Case, Record, interleave, make_parser, parse
from benchmarks.peers import Subject, running, served_each

EXPERTS, WIDTH, ROWS, BEST = 8, 64, 64, 4
PREFIX = "expert."
HANDLERS = (
    16  # of stock hivemind; on 2 cores 8, 16 and its default of 64 gave the same, within noise, and 64 start later
)
BURSTS, PAUSE_S = 3, 0.3  # in a round
TIMEOUT_S = 90.0
CASES = {
    "balanced": "64 rows, balanced",
    "hot": "64 rows, one hot expert",
    "bursty": "64 rows, {clients} clients at once",
}


def measure(
    systems: Sequence[str],
    rounds: int,
    seconds: float,
    *,
    cases: Sequence[str] = tuple(CASES),
    clients: int = 4,
    rows: int = ROWS,
    handlers: int = HANDLERS,
    transport: str = "auto",
) -> list[Case]:
    """Milliseconds of a step, by case."""
    uids = [f"{PREFIX}{i}" for i in range(EXPERTS)]
    server = {
        "uids": uids,
        "expert_cls": "nop",
        "hidden_dim": WIDTH,
        "optimizer": "none",
        "max_batch_size": 4096,
        "num_handlers": handlers,
        "device": "cpu",
    }
    clients = clients if "bursty" in cases else 1
    mixture = {"rows": rows, "prefix": PREFIX, "grid": [EXPERTS], "k": BEST, "width": WIDTH}

    def steps(subject: Subject, workers: int, limit: Mapping[str, Any], hot: bool = False) -> list[dict[str, Any]]:
        return subject.ask_clients("mixture_steps", TIMEOUT_S + seconds, workers, limit=limit, hot=hot, **mixture)

    def run(subject: Subject) -> Mapping[str, float]:
        values = {}
        for case in cases:
            if case == "bursty":
                bursts = []
                for _ in range(BURSTS):
                    time.sleep(min(PAUSE_S, seconds))
                    answers = steps(subject, clients, {"calls": 1})
                    bursts.append(max(a["end"] for a in answers) - min(a["start"] for a in answers))
                values[case] = 1e3 * statistics.median(bursts)
            else:
                (answer,) = steps(subject, 1, {"seconds": seconds}, hot=case == "hot")
                values[case] = 1e3 * statistics.median(answer["durations"])
        return values

    client = {"transport": transport, "uids": uids}
    with running(*served_each(systems, server=server, clients=clients, client=client)) as started:
        found = interleave(started, rounds, run)
    return [
        Case(
            CASES[case].format(clients=clients).replace("64 rows", f"{rows} rows"),
            "ms, forward + backward",
            False,
            found.of(case),
            {**mixture, "clients": clients if case == "bursty" else 1, "transport": transport, "server": server},
            panel=f"mixture of experts, k {BEST} of {EXPERTS}",
            notes=found.notes,
        )
        for case in cases
    ]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__)
    parser.add_argument("--clients", type=int, default=4, help="of a burst (default %(default)s)")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a batch (default %(default)s)")
    parser.add_argument("--handlers", type=int, default=HANDLERS, help="of stock hivemind (default %(default)s)")
    parser.add_argument(
        "--transport", choices=("auto", "unix", "tls", "libp2p"), default="auto", help="of this project"
    )
    options = parse(parser, argv, {"clients": 2, "rows": 4, "rounds": 1, "handlers": 4})
    record = Record("moe", options.smoke)
    record.cases = measure(
        options.systems,
        options.rounds,
        options.seconds,
        clients=options.clients,
        rows=options.rows,
        handlers=options.handlers,
        transport=options.transport,
    )
    record.publish(options.out)


if __name__ == "__main__":
    main()
