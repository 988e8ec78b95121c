"""What do the codecs cost and save? Time to encode and to decode one tensor, its size on the wire, and the error.

    python -m benchmarks.benchmark_compression --values 10000000

The lossy codecs are hivemind's; this project reads them by itself, and sends uncompressed tensors without copying them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.common import OURS, STOCK, Case, Record, interleave, make_parser, parse

CODECS = ("NONE", "FLOAT16", "MEANSTD_16BIT", "QUANTILE_8BIT", "UNIFORM_8BIT", "BLOCKWISE_8BIT")
VALUES = 4_000_000
WIDTH = 1000  # of the tensor's last axis; MEANSTD_16BIT has a mean and a deviation for each row
QUANTITIES = {
    "encode": "ms to encode",
    "decode": "ms to decode",
    "size": "bytes for each value",
    "error": "mean square error",
}


class Codec:
    """One codec as one of the systems has it.

    :param name: of the system
    :param encode: tensor -> something
    :param decode: its inverse
    :param size_bytes: of something
    """

    def __init__(
        self,
        name: str,
        encode: Callable[[torch.Tensor], Any],
        decode: Callable[[Any], torch.Tensor],
        size_bytes: Callable[[Any], int],
    ):
        self.name, self._encode, self._decode, self._size_bytes = name, encode, decode, size_bytes
        self.notes: list[str] = []

    def restart(self) -> None:
        """There is nothing to start."""

    def measure(self, tensor: torch.Tensor, seconds: float) -> Mapping[str, float]:
        """Medians over as many repetitions as fit; without what decoding would give if that fails."""
        encoded = self._encode(tensor)
        values = {"size": self._size_bytes(encoded) / tensor.numel()}
        try:
            values["error"] = float((self._decode(encoded) - tensor).square().mean())
        except Exception as e:  # stock hivemind's tables of 8-bit codecs, with NumPy 2.4
            self.notes = [f"{self.name} cannot decode this with the versions here: {type(e).__name__}: {e}"]
        values["encode"] = _median_ms(lambda: self._encode(tensor), seconds / 2)
        if not self.notes:
            values["decode"] = _median_ms(lambda: self._decode(encoded), seconds / 2)
        return values


def _median_ms(work: Callable[[], object], seconds: float) -> float:
    times: list[float] = []
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        begin = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def codecs(codec: str) -> list[Codec]:
    """Both systems' forms of a codec."""
    from hivemind.compression import deserialize_torch_tensor, serialize_torch_tensor
    from hivemind.proto.runtime_pb2 import CompressionType

    from moe.schema import Compression
    from moe.wire.tensors import EncodedTensor, decode_tensor, encode_tensor

    def decode(encoded: EncodedTensor) -> torch.Tensor:
        return decode_tensor(encoded)

    return [
        Codec(OURS, lambda x: encode_tensor(x, Compression[codec]), decode, lambda encoded: len(encoded.buffer)),
        Codec(
            STOCK,
            lambda x: serialize_torch_tensor(x, CompressionType.Value(codec)),
            deserialize_torch_tensor,
            lambda message: int(message.ByteSize()),
        ),
    ]


def measure(names: Sequence[str], systems: Sequence[str], rounds: int, seconds: float, values: int) -> list[Case]:
    """Time, size and error of each codec that both can have here."""
    torch.manual_seed(0)
    tensor = torch.randn(max(1, values // WIDTH), WIDTH)
    cases: dict[str, list[Case]] = {quantity: [] for quantity in QUANTITIES}
    for name in names:
        both = [codec for codec in codecs(name) if codec.name in systems]
        found = interleave(both, rounds, lambda codec: codec.measure(tensor, seconds))
        for quantity, metric in QUANTITIES.items():
            settings = {"values": tensor.numel(), "width": WIDTH, "threads": torch.get_num_threads()}
            notes = [note for codec in both for note in codec.notes] if quantity == "decode" else ()
            case = Case(name, metric, False, found.of(quantity), settings, panel=metric, notes=notes)
            cases[quantity].append(case)
    return [case for group in cases.values() for case in group]


def main(argv: Sequence[str] | None = None) -> None:
    """Measure it."""
    parser = make_parser(__doc__, seconds=1.0)
    parser.add_argument("--values", type=int, default=VALUES, help="in the tensor (default %(default)s)")
    parser.add_argument("--codecs", nargs="+", choices=CODECS, help="default: all that can be used here")
    options = parse(parser, argv, {"values": 20_000})
    record = Record("compression", options.smoke)
    names = options.codecs or [name for name in CODECS if name != "BLOCKWISE_8BIT" or _has_bitsandbytes()]
    record.cases = measure(names, options.systems, options.rounds, options.seconds, options.values)
    record.publish(options.out)


def _has_bitsandbytes() -> bool:
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


if __name__ == "__main__":
    main()
