"""How fast are experts declared, looked up and searched in the DHT, by size of the grid and number of peers?

    python -m benchmarks.benchmark_dht --peers 4 16 --grids 8x8 16x16 32x32

One node declares all experts of a grid, another one looks them all up, then searches the best of them for a batch of rows:
first knowing nothing, then again with other scores. Every round has new uids. Both systems use hivemind's DHT underneath.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from functools import partial

from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse
from benchmarks.peers import Subject, alone, running

PEERS = (4, 16)
GRIDS = ("8x8", "16x16")
ROWS, BEST = 64, 4
EXPIRATION_S = 300.0
TIMEOUT_S = 120.0
QUANTITIES = {
    "declare": "declare all",
    "look up": "look up all",
    "first search": f"first beam search, {ROWS} rows",
    "next search": f"next beam search, {ROWS} rows",
}


_serial = itertools.count()  # of prefixes, so that nobody knows anything of them


def measure(peers: int, grids: Sequence[str], systems: Sequence[str], rounds: int) -> list[Case]:
    """Milliseconds of each operation, for each grid, with one number of peers."""
    cases = []
    with running(*(alone("nodes", system, count=peers) for system in systems)) as started:
        for grid in grids:
            sizes = [int(size) for size in grid.split("x")]
            found = interleave(started, rounds, partial(_declare_and_find, sizes=sizes))
            settings = {"peers": peers, "grid": sizes, "rows": ROWS, "beam_size": BEST, "expiration_s": EXPIRATION_S}
            cases += [
                Case(
                    f"{grid}, {peers} peers: {title}",
                    "ms",
                    False,
                    found.of(quantity),
                    settings,
                    panel=f"{title}, {peers} peers",
                    x=math.prod(sizes),
                    x_label="experts in the grid",
                    notes=found.notes,
                )
                for quantity, title in QUANTITIES.items()
            ]
    return cases


def _declare_and_find(subject: Subject, sizes: Sequence[int]) -> Mapping[str, float]:
    """All operations, once."""
    prefix = f"expert{next(_serial)}."
    uids = [prefix + ".".join(map(str, place)) for place in itertools.product(*map(range, sizes))]
    timeout_s = TIMEOUT_S + 0.1 * len(uids)
    declare_s = subject.ask("declare", timeout_s, uids=uids, expiration_s=EXPIRATION_S)
    find_s = subject.ask("find", timeout_s, uids=uids)
    search = {"prefix": prefix, "grid": sizes, "rows": ROWS, "beam_size": BEST, "seed": 0}
    first_s, next_s = subject.ask("search", timeout_s, **search)
    return dict(zip(QUANTITIES, (1e3 * elapsed_s for elapsed_s in (declare_s, find_s, first_s, next_s))))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--peers", type=int, nargs="+", default=list(PEERS), help="numbers (default %(default)s)")
    parser.add_argument("--grids", nargs="+", default=list(GRIDS), help="sizes (default %(default)s)")
    options = parse(parser, argv, {"peers": [2], "grids": ["2x2", "2x3"], "rounds": 1, "systems": [OURS]})
    record = Record("dht", options.smoke)
    for peers in options.peers:
        record.cases += measure(peers, options.grids, options.systems, options.rounds)
    record.publish(options.out)


if __name__ == "__main__":
    main()
