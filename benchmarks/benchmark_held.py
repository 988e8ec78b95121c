"""What is it worth that servers hold tensors, so that they need not be sent again? One client: an adapter of 5 MiB that stays
the same, or changes after each step, and inputs of 8 MiB whose backward follows. Calls per second and MiB sent per call, with
``hold_tensors`` (moe) and without (all sent).

    python -m benchmarks.benchmark_held

Between two processes of one machine bytes cost next to nothing: there the question is whether holding costs anything. What it
is worth over a slow line can be told from the MiB: each takes 80 ms at 100 Mbit/s.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.common import OURS, Case, Record, interleave, make_parser, parse
from benchmarks.peers import Subject, running, served

UID = "expert.0"
HIDDEN, RANK, ROWS, MANY_ROWS = 1024, 256, 32, 2048
CALLS = 100  # of a round, of each kind
WAYS = {OURS: True, "all sent": False}
TIMEOUT_S = 120.0


def loads(hidden_dim: int, rank: int, many_rows: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """By name: the class of the expert, and what is called."""
    adapter = {"uids": [UID], "shape": [ROWS, hidden_dim], "adapters": 1, "rank": rank}
    training = {"backward": True, "input_grad": True}
    mib = 5 * 4 * hidden_dim * rank / 2**20
    return {
        f"the same adapter of {mib:.3g} MiB, forward": ("adapted_ffn", adapter),
        f"the same adapter of {mib:.3g} MiB, forward + backward": ("adapted_ffn", {**adapter, **training}),
        f"another adapter of {mib:.3g} MiB each time, forward + backward": (
            "adapted_ffn",
            {**adapter, **training, "changing": True},
        ),
        f"inputs of {4 * hidden_dim * many_rows / 2**20:.3g} MiB, nop, forward + backward": (
            "nop",
            {"uids": [UID], "shape": [many_rows, hidden_dim], **training},
        ),
    }


def measure(
    name: str, expert_cls: str, load: dict[str, Any], transport: str, hidden_dim: int, rounds: int, calls: int
) -> list[Case]:
    """Calls per second, and MiB sent per call."""
    server = {
        "uids": [UID],
        "expert_cls": expert_cls,
        "hidden_dim": hidden_dim,
        "optimizer": "none",
        "max_batch_size": 4096,
        "num_handlers": 1,
        "device": "cpu",
    }
    limit, turn = {"calls": calls}, [0]

    def run(subject: Subject) -> Mapping[str, float]:
        """Both ways, the first one last in every second round."""
        turn[0] += 1
        values = {}
        for way in list(WAYS)[:: 1 if turn[0] % 2 else -1]:
            (result,) = subject.ask_clients("uploads", TIMEOUT_S, load=load, limit=limit, hold_tensors=WAYS[way])
            made = len(result["durations"])
            values[f"{way}: rate"] = made / (result["end"] - result["start"])
            values[f"{way}: sent"] = result["sent_bytes"] / made / 2**20
        return values

    with running(served(OURS, server=server, client={"transport": transport})) as started:
        found = interleave(started, rounds, run)
    settings = {"load": load, "transport": transport, "calls": calls, "server": server}
    cases = []
    for quantity, metric, higher in (("rate", "calls/s", True), ("sent", "MiB sent a call", False)):
        values = {way: found.of(f"{way}: {quantity}")[OURS] for way in WAYS}
        cases.append(Case(f"{name}, {transport}", metric, higher, values, settings, panel=metric, notes=found.notes))
    return cases


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, systems=(OURS,))
    parser.add_argument("--transport", nargs="+", choices=("unix", "tls", "libp2p"), default=["unix", "tls"])
    parser.add_argument("--calls", type=int, default=CALLS, help="of a round (default %(default)s)")
    parser.add_argument("--hidden_dim", type=int, default=HIDDEN, help="of the experts (default %(default)s)")
    options = parse(parser, argv, {"transport": ["unix"], "calls": 5, "hidden_dim": 64})
    record = Record("held", options.smoke)
    wanted = loads(options.hidden_dim, RANK, 4096 if options.smoke else MANY_ROWS)
    for transport in options.transport:
        for name, (expert_cls, load) in wanted.items():
            record.cases += measure(
                name, expert_cls, load, transport, options.hidden_dim, options.rounds, options.calls
            )
    record.publish(options.out)


if __name__ == "__main__":
    main()
