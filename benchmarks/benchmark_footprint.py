"""What does a server take, by number of experts? Processes, private memory (USS of all of them, added up), and time to start.

    python -m benchmarks.benchmark_footprint

Every round starts each server anew. The time is from starting Python to the server's word that it serves, imports included.
The experts are ffn of width 64, so small that what is measured is everything else. Stock hivemind gets 8 connection handlers in
all, however many experts it hosts. That is to its advantage: its default is 8 for each expert, 512 processes for 64 experts.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from benchmarks.common import OURS, STOCK, Case, MeasurementFailed, Record, interleave, make_parser, parse
from benchmarks.peers import START_TIMEOUT_S, Peer

EXPERTS = {1: (OURS, STOCK), 8: (OURS, STOCK), 64: (OURS, STOCK), 256: (OURS,)}  # stock would need 530 processes
HIDDEN = 64
HANDLERS = 8
SETTLE_S = 1.0  # after the start, before memory is counted
QUANTITIES = {"processes": "processes", "private memory": "MB of private memory", "start": "s to start"}


class FreshServer:
    """A system whose server is started for every measurement, and ended after it.

    :param name: of the system
    :param experts: how many it hosts
    """

    def __init__(self, name: str, experts: int, handlers: int = HANDLERS):
        self.name = name
        self._experts, self._handlers = experts, handlers

    def restart(self) -> None:
        """Every measurement starts one."""

    def measure(self) -> Mapping[str, float]:
        """Start a server, look at it, end it."""
        begin = time.monotonic()
        peer = Peer("server", self.name)
        try:
            peer.start(
                START_TIMEOUT_S + self._experts,
                uids=[f"expert.{i}" for i in range(self._experts)],
                expert_cls="ffn",
                hidden_dim=HIDDEN,
                optimizer="adam",
                max_batch_size=4096,
                num_handlers=self._handlers,
                device="cpu",
            )
            start_s = time.monotonic() - begin
            time.sleep(SETTLE_S)
            footprint = peer.footprint()
            if footprint.processes == 0:
                raise MeasurementFailed(f"{peer.name} ended by itself")
        finally:
            peer.close()
        return {
            "processes": footprint.processes,
            "private memory": footprint.private_bytes / 1e6,
            "start": start_s,
        }


def measure(experts: Mapping[int, Sequence[str]], systems: Sequence[str], rounds: int) -> list[Case]:
    """Processes, memory and start-up time, by number of experts."""
    cases = []
    for count, possible in experts.items():
        servers = [FreshServer(system, count) for system in systems if system in possible]
        found = interleave(servers, rounds, FreshServer.measure, warmups=0)
        settings = {"experts": count, "expert_cls": "ffn", "hidden_dim": HIDDEN, "stock_handlers": HANDLERS}
        cases += [
            Case(
                f"{count} experts: {quantity}",
                metric,
                False,
                found.of(quantity),
                settings,
                panel=quantity,
                x=count,
                x_label="experts",
                notes=found.notes,
            )
            for quantity, metric in QUANTITIES.items()
        ]
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, rounds=3)
    parser.add_argument("--experts", type=int, nargs="+", default=list(EXPERTS), help="numbers (default %(default)s)")
    options = parse(parser, argv, {"experts": [2], "rounds": 1, "systems": [OURS]})
    record = Record("footprint", options.smoke)
    experts = {count: EXPERTS.get(count, (OURS, STOCK)) for count in options.experts}
    record.cases = measure(experts, options.systems, options.rounds)
    record.publish(options.out)


if __name__ == "__main__":
    main()
