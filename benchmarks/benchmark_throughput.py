"""How many rows per second do clients get through experts? All presets of hivemind's benchmark of this name, and those of
this project's criteria, on this project, stock hivemind and the bare module.

    python -m benchmarks.benchmark_throughput --preset nop --scale 0.1
    python -m benchmarks.benchmark_throughput --preset criteria_nop_8 --transport tls

The bare module computes the rows of all clients in one batch, in one process that does nothing else. A preset of hivemind's
makes as many calls as hivemind's does, unless that takes longer than --longest; one of the criteria calls for --seconds.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from benchmarks.common import BARE, OURS, STOCK, Case, Record, interleave, make_parser, parse
from benchmarks.peers import START_TIMEOUT_S, Subject, bare, running, served_each

STALL_S = 60.0  # for deadlines only: what a call may take on top of its rows and those of all other clients
SLOWEST_ROWS_PER_S = 200.0  # for deadlines only: stock hivemind training ffn on one core makes 400
LONGEST_S = 120.0  # a round of a preset with a number of calls
BARE_ROWS = 2048  # the largest batch the bare module is given, unless one call is larger


@dataclass(frozen=True)
class Preset:
    """One workload. The defaults are those of hivemind's benchmark.

    :ivar experts: hosted by the one server; clients call all of them
    :ivar clients: processes that call without pause
    :ivar calls: of each client; None: as many as there are in a round
    :ivar rows: of a call
    :ivar max_batch_size: default: four calls
    :ivar handlers: of stock hivemind; default: half as many as clients, as in its benchmark
    :ivar input_grad: the gradient of the input is asked for; hivemind's benchmark does not, a layer of a model does
    :ivar transport: of this project
    """

    experts: int = 16
    clients: int = 128
    calls: int | None = 16
    expert_cls: str = "ffn"
    hidden_dim: int = 1024
    rows: int = 2048
    max_batch_size: int | None = None
    handlers: int | None = None
    backward: bool = True
    input_grad: bool = False
    optimizer: str = "adam"
    transport: str = "auto"

    def shrunk(self, scale: float) -> Preset:
        """Fewer experts, clients and calls; calls of the same size."""
        if scale == 1.0:
            return self
        return replace(
            self,
            experts=max(1, round(self.experts * scale)),
            clients=max(1, round(self.clients * scale)),
            calls=None if self.calls is None else max(1, round(self.calls * scale)),
            handlers=None if self.handlers is None else max(1, round(self.handlers * scale)),
        )

    @property
    def uids(self) -> list[str]:
        """Of the experts."""
        return [f"expert.{i}" for i in range(self.experts)]

    @property
    def load(self) -> dict[str, Any]:
        """Of a client, see ``benchmarks.worker.Load``."""
        return {
            "uids": self.uids,
            "shape": [self.rows, self.hidden_dim],
            "backward": self.backward,
            "input_grad": self.input_grad,
        }

    @property
    def server(self) -> dict[str, Any]:
        """Of a server, see ``benchmarks.systems``."""
        return {
            "uids": self.uids,
            "expert_cls": self.expert_cls,
            "hidden_dim": self.hidden_dim,
            "optimizer": self.optimizer,
            "max_batch_size": self.max_batch_size or 4 * self.rows,
            "num_handlers": self.handlers or max(1, self.clients // 2),
            "device": "cpu",
        }


_CRITERION = Preset(
    experts=1, calls=None, handlers=8, optimizer="none", backward=False
)  # 8: hivemind's default per expert
_SMALL = Preset(backward=True, experts=1, rows=1, max_batch_size=8192, clients=512)
PRESETS = {
    "default": Preset(),
    "ffn_forward_backward": Preset(),
    "ffn_forward": Preset(backward=False),
    "ffn_small_batch": Preset(backward=False, experts=4, rows=32, max_batch_size=8192),
    "ffn_small_batch_512clients": _SMALL,
    "ffn_small_batch_512clients_32handlers": replace(_SMALL, handlers=32),
    "ffn_massive": Preset(backward=False, clients=512, rows=512, max_batch_size=8192),
    "minimalistic": Preset(experts=1, clients=1, handlers=1),
    "nop": Preset(expert_cls="nop", backward=False),
    "criteria_nop_8": replace(_CRITERION, expert_cls="nop", clients=8),
    "criteria_nop_1": replace(_CRITERION, expert_cls="nop", clients=1),
    "criteria_nop_tls_8": replace(_CRITERION, expert_cls="nop", clients=8, transport="tls"),
    "criteria_nop_tls_1": replace(_CRITERION, expert_cls="nop", clients=1, transport="tls"),
    "criteria_ffn_small": replace(_CRITERION, clients=8, rows=32, max_batch_size=4096),
    "criteria_ffn_large": replace(_CRITERION, clients=8),
    "criteria_ffn_train": replace(_CRITERION, clients=1, backward=True, input_grad=True, optimizer="adam"),
}


def measure(
    name: str, preset: Preset, systems: Sequence[str], rounds: int, seconds: float, longest_s: float = LONGEST_S
) -> Case:
    """Rows per second of one preset.

    :param seconds: of a round; with a number of calls, of the bare module only
    :param longest_s: a round with a number of calls ends after these, even if not all are made
    """
    batch = min(preset.rows * preset.clients, max(preset.rows, BARE_ROWS))
    subjects = served_each(
        systems,
        server=preset.server,
        clients=preset.clients,
        client={"transport": preset.transport},
        start_timeout_s=START_TIMEOUT_S + 2.0 * preset.clients + 4.0 * preset.experts,
    )
    if BARE in systems:
        subjects.append(bare(expert_cls=preset.expert_cls, hidden_dim=preset.hidden_dim, optimizer=preset.optimizer))
    limit = {"calls": preset.calls, "seconds": seconds if preset.calls is None else longest_s}
    timeout_s = STALL_S + max(seconds, longest_s) + preset.clients * preset.rows / SLOWEST_ROWS_PER_S

    def run(subject: Subject) -> Mapping[str, float]:
        if subject.name == BARE:
            load = {**preset.load, "shape": [batch, preset.hidden_dim]}
            results = subject.ask("calls", timeout_s, load=load, limit={"seconds": seconds})
        else:
            answers = subject.ask_clients("calls", timeout_s, load=preset.load, limit=limit)
            results = [result for answer in answers for result in answer]
        return {"rows/s": vectors_per_s(results)}

    with running(*subjects) as started:
        found = interleave(started, rounds, run)
    return Case(
        name=name,
        metric=f"rows/s, {'forward + backward' if preset.backward else 'forward'}",
        higher_is_better=True,
        rounds=found.of("rows/s"),
        settings={**asdict(preset), "server": preset.server, "bare_rows": batch, "limit": limit},
        panel="throughput",
        notes=found.notes,
    )


def vectors_per_s(results: Sequence[Mapping[str, Any]]) -> float:
    """From the first begin to the last end of all clients' loops."""
    vectors = sum(len(result["durations"]) * result["vectors"] for result in results)
    elapsed_s = max(result["end"] for result in results) - min(result["start"] for result in results)
    return float(vectors / elapsed_s)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the presets that were asked for."""
    parser = make_parser(__doc__, systems=(OURS, STOCK, BARE))
    parser.add_argument("--preset", nargs="+", choices=PRESETS, default=["default"], help="workloads")
    parser.add_argument("--transport", choices=("auto", "unix", "tls", "libp2p"), help="of this project; default auto")
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1: fewer experts, clients and calls")
    parser.add_argument(
        "--longest",
        type=float,
        default=LONGEST_S,
        help="seconds after which a round with a number of calls ends anyway",
    )
    parser.add_argument("--rows", type=int, help="of a call, in place of the preset's")
    smoke = {"preset": ["criteria_nop_8"], "scale": 0.25, "rows": 64, "systems": [OURS, STOCK]}
    options = parse(parser, argv, smoke)
    record = Record("throughput", options.smoke)
    for name in options.preset:
        preset = PRESETS[name].shrunk(options.scale)
        preset = replace(preset, rows=options.rows or preset.rows, transport=options.transport or preset.transport)
        label = name if options.transport is None else f"{name}, {options.transport}"
        print(f"{label}: {preset}", file=sys.stderr)
        record.cases.append(measure(label, preset, options.systems, options.rounds, options.seconds, options.longest))
    record.publish(options.out)


if __name__ == "__main__":
    main()
