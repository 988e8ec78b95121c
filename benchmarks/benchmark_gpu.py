"""How much of a GPU do clients get through a server? Rows per second of ffn experts (width 1024 and 4096, bfloat16), 8 clients
with 2048 rows each, against the bare module on the same GPU.

    python -m benchmarks.benchmark_gpu

The bare module is measured in two ways: "bare" has its inputs on the GPU; "bare, from host" takes each of them from the host's
memory and brings the output back, as every server must.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from benchmarks.benchmark_throughput import vectors_per_s
from benchmarks.common import BARE, OURS, Case, Record, interleave, make_parser, parse
from benchmarks.peers import Subject, bare, running, served

WIDTHS = (1024, 4096)
PASSES = {"forward": False, "forward+backward": True}
CLIENTS, ROWS = 8, 2048
FROM_HOST = f"{BARE}, from host"
TIMEOUT_S = 120.0


def measure(
    width: int, rounds: int, seconds: float, *, device: str, clients: int, rows: int, passes: str, transport: str
) -> Case:
    """Rows per second of one width."""
    backward = PASSES[passes]
    server = {
        "uids": ["expert.0"],
        "expert_cls": "ffn_bfloat16",
        "hidden_dim": width,
        "optimizer": "adam" if backward else "none",
        "max_batch_size": 4 * rows,
        "num_handlers": 1,
        "device": device,
    }
    load = {
        "uids": ["expert.0"],
        "shape": [rows, width],
        "dtype": "bfloat16",
        "backward": backward,
        "input_grad": backward,
    }
    module = {name: server[name] for name in ("expert_cls", "hidden_dim", "optimizer", "device")}
    ours = served(OURS, server=server, clients=clients, client={"transport": transport})
    limit, timeout_s = {"seconds": seconds}, TIMEOUT_S + seconds

    def run(subject: Subject) -> Mapping[str, float]:
        if subject.name == OURS:
            answers = subject.ask_clients("calls", timeout_s, load=load, limit=limit)
            return {"rows/s": vectors_per_s([result for answer in answers for result in answer])}
        return {
            quantity: vectors_per_s(subject.ask("calls", timeout_s, load=load, limit=limit, from_host=from_host))
            for quantity, from_host in (("rows/s", False), (FROM_HOST, True))
        }

    with running(ours, bare(**module)) as started:
        found = interleave(started, rounds, run)
    rates = {**found.of("rows/s"), FROM_HOST: found.of(FROM_HOST)[BARE]}
    settings = {**load, "clients": clients, "transport": transport, "server": server, "seconds": seconds}
    return Case(f"ffn {width}, {passes}", "rows/s", True, rates, settings, panel=f"bfloat16 on {device}")


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it, if there is a GPU."""
    parser = make_parser(__doc__, systems=(OURS, BARE))
    parser.add_argument("--device", default="cuda", help="of experts and bare modules; 'cpu' to try this file out")
    parser.add_argument("--passes", nargs="+", choices=PASSES, default=list(PASSES), help="(default: both)")
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS), help="of the experts")
    parser.add_argument("--clients", type=int, default=CLIENTS, help="processes (default %(default)s)")
    parser.add_argument("--rows", type=int, default=ROWS, help="of a call (default %(default)s)")
    parser.add_argument(
        "--transport", choices=("auto", "unix", "tls", "libp2p"), default="auto", help="of this project"
    )
    options = parse(parser, argv, {"widths": [64], "clients": 2, "rows": 16, "passes": ["forward+backward"]})
    record = Record("gpu", options.smoke)
    if options.device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            sys.exit("no CUDA device")
        record.machine["gpu"] = torch.cuda.get_device_name(options.device)
    for width in options.widths:
        for passes in options.passes:
            record.cases.append(
                measure(
                    width,
                    options.rounds,
                    options.seconds,
                    device=options.device,
                    clients=options.clients,
                    rows=options.rows,
                    passes=passes,
                    transport=options.transport,
                )
            )
    record.publish(options.out)


if __name__ == "__main__":
    main()
