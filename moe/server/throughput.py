"""How many rows a second a server can serve. Owns: measuring that on this machine, and remembering what was measured.

Two things bound it: how fast an expert computes, and how fast tensors get through the network stack. Both are measured
here, without any other machine: how fast the line to the outside is, nobody but the operator knows, who may say it. What is
remembered is found again by machine, versions, module and shapes. Must not know: who announces the result, or to whom.

The rules, and the file with a lock, are those of Petals (``src/petals/server/throughput.py``); it measures the line with an
external service instead.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import math
import os
import platform
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from moe.schema import BatchTensorProto
from moe.server.execution import is_out_of_memory
from moe.server.expert_backend import ExpertBackend
from moe.version import __version__

logger = logging.getLogger(__name__)

RELAY_PENALTY = 0.2  # of the network's part, for a server that is reached through a relay; Petals'
LENGTHS = (128, 16)  # tokens in a row, where an expert takes any number; the second if it does not take that many; ours
_COMPUTE_S = 0.3  # for measuring compute: enough for ten batches of the size that a server runs
_BATCH_S = 0.02  # a batch that takes this long is large enough to show the speed
_MAX_INPUT_BYTES = 64 * 2**20  # of a batch in the measurement
_NETWORK_S = 0.05
_CHUNK_BYTES = 2**20
_LOCK_TIMEOUT_S = 60.0  # for other servers of this machine to finish measuring
_LOCK_POLL_S = 0.05
_MAX_REMEMBERED = 256


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """What was measured of an expert.

    :ivar compute_rows_per_s: forward, through the expert alone
    :ivar network_rows_per_s: its inputs and outputs through this machine's network stack
    :ivar tokens_per_row: length of the sequence axis in the measurement; 1: there is none
    """

    compute_rows_per_s: float
    network_rows_per_s: float
    tokens_per_row: int = 1

    def served_rows_per_s(self, num_blocks: int = 1, *, relayed: bool = False) -> float:
        """Rows that a server can serve.

        :param num_blocks: consecutive blocks it hosts. A request begins at any of them and uses those that follow, so that it
            is computed by ``(num_blocks + 1) / 2`` of them on average. 1 for experts that are called one at a time
        :param relayed: whether others reach it through a relay
        """
        network = self.network_rows_per_s * (RELAY_PENALTY if relayed else 1.0)
        return min(self.compute_rows_per_s / ((num_blocks + 1) / 2), network)

    def __str__(self) -> str:
        tokens = f" ({self.compute_rows_per_s * self.tokens_per_row:.0f} tokens/s in rows of {self.tokens_per_row})"
        return (
            f"{self.compute_rows_per_s:.1f} rows/s through one expert{tokens if self.tokens_per_row > 1 else ''}, "
            f"{self.network_rows_per_s:.0f} rows/s through the network stack"
        )


# --- measuring --------------------------------------------------------------------------------------------------------


def measure(backend: ExpertBackend) -> Throughput:
    """Measure an expert where it is; takes about half a second.

    :raises Exception: whatever the expert raises
    """
    length = length_of_rows(backend)
    return Throughput(
        compute_rows_per_s=measure_compute(backend, length),
        network_rows_per_s=measure_loopback_bytes_per_s() / max(1, bytes_per_row(backend, length)),
        tokens_per_row=length,
    )


def length_of_rows(backend: ExpertBackend) -> int:
    """A length for axes of any length that the expert takes; 1 if there are none.

    :raises Exception: whatever the expert raises at the shortest length
    """
    if not any(None in proto.sizes for _, proto in backend.schema.input_entries(())):
        return 1
    for length in LENGTHS[:-1]:
        try:
            backend.dry_run(1, length)
            return length
        except Exception as e:  # a model of few positions
            logger.debug("%s does not take rows of %d: %s", backend.name, length, e)
    backend.dry_run(1, LENGTHS[-1])
    return LENGTHS[-1]


def measure_compute(backend: ExpertBackend, any_length: int = 1) -> float:
    """Rows per second of a forward pass, with batches as large as they have to be to show it.

    :raises Exception: whatever the expert raises; out of memory only for a single row
    """
    most = min(backend.max_batch_size, max(1, _MAX_INPUT_BYTES // max(1, bytes_per_row(backend, any_length))))
    rows, best = 1, 0.0
    backend.dry_run(rows, any_length)  # what is done once only
    deadline = time.monotonic() + _COMPUTE_S
    while True:
        try:
            elapsed_s = backend.dry_run(rows, any_length)
        except Exception as e:
            if rows == 1 or not is_out_of_memory(e):
                raise
            return best
        best = max(best, rows / max(elapsed_s, 1e-9))
        if time.monotonic() > deadline:
            return best
        if elapsed_s < _BATCH_S:
            rows = min(4 * rows, most)


def bytes_per_row(backend: ExpertBackend, any_length: int = 1) -> int:
    """Of the inputs and outputs of one row, uncompressed; what is global to a call does not count."""
    entries = (*backend.schema.input_entries(()), *backend.schema.output_entries)
    return sum(
        proto.itemsize * math.prod(any_length if size is None else size for size in proto.sizes)
        for _, proto in entries
        if isinstance(proto, BatchTensorProto)
    )


def measure_loopback_bytes_per_s() -> float:
    """How fast this machine sends to itself over TCP: no connection to the outside is faster."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.socket() as sender:
        sender.connect(listener.getsockname())
        receiver, _ = listener.accept()
        with receiver:
            ending = threading.Event()

            def send() -> None:
                chunk = bytes(_CHUNK_BYTES)
                with contextlib.suppress(OSError):  # the receiver has heard enough
                    while not ending.is_set():
                        sender.sendall(chunk)

            sending = threading.Thread(target=send, name="moe-throughput", daemon=True)
            sending.start()
            room, received = bytearray(_CHUNK_BYTES), 0
            begin = time.perf_counter()
            while (elapsed_s := time.perf_counter() - begin) < _NETWORK_S:
                received += receiver.recv_into(room)
            ending.set()
        sending.join()
    return received / elapsed_s


# --- remembering ------------------------------------------------------------------------------------------------------


def default_cache_path() -> Path:
    """Where measurements of this user and machine are kept."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "moe" / "throughput.json"


def remembered_or_measured(
    backend: ExpertBackend, *, anew: bool = False, cache_path: str | os.PathLike[str] | None = None
) -> Throughput:
    """What an expert of this kind was measured at on this machine; measured now if it was not, and then kept.

    One process of a machine measures at a time. A file that cannot be read or written is no reason to fail.

    :param anew: measure in any case
    :param cache_path: a JSON file; default: ``default_cache_path``
    :raises Exception: whatever the expert raises
    """
    path = default_cache_path() if cache_path is None else Path(cache_path)
    key = key_of(backend)
    with _locked(path):
        known = {} if anew else _read(path)
        if key not in known:
            known = {**_read(path), key: measure(backend)}
            logger.info("measured %s", known[key])
            _write(path, known)
        return known[key]


def key_of(backend: ExpertBackend) -> str:
    """What a measurement depends on: machine, device, versions, module and shapes."""
    parameters = [(name, str(p.dtype), list(p.shape)) for name, p in backend.module.named_parameters()]
    first = next(backend.module.parameters(), None)
    shapes = repr((parameters, backend.schema.to_plain(), backend.max_batch_size))
    kind = type(backend.module)
    parts = (
        platform.node(),
        f"{platform.machine()} {os.cpu_count()} CPUs, {torch.get_num_threads()} threads",
        torch.cuda.get_device_name(first.device) if first is not None and first.is_cuda else "cpu",
        f"moe {__version__}, torch {torch.__version__}",
        f"{kind.__module__}.{kind.__qualname__} {hashlib.blake2b(shapes.encode(), digest_size=12).hexdigest()}",
    )
    return " | ".join(parts)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock beside the file; without one, if that is not to be had."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path.with_name(f"{path.name}.lock"), "ab")  # noqa: SIM115
    except OSError as e:
        logger.warning("throughput is not remembered: %s", e)
        yield
        return
    with lock:  # closing it gives it back, as does the end of the process
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError:
                if time.monotonic() > deadline:
                    logger.warning(
                        "another process has been measuring throughput for %g s; not waiting", _LOCK_TIMEOUT_S
                    )
                    break
            time.sleep(_LOCK_POLL_S)
        yield


def _read(path: Path) -> dict[str, Throughput]:
    """What was remembered; what cannot be read or makes no sense was not."""
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        return {key: one for key, entry in entries.items() if (one := _checked(entry)) is not None}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError) as e:
        logger.warning("remembered throughput cannot be read from %s: %s", path, e)
        return {}


def _checked(entry: Any) -> Throughput | None:
    try:
        found = Throughput(**entry)
        numbers = (found.compute_rows_per_s, found.network_rows_per_s, found.tokens_per_row)
        return found if all(type(n) in (int, float) and 0 < n < math.inf for n in numbers) else None
    except TypeError:
        return None


def _write(path: Path, known: dict[str, Throughput]) -> None:
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    newest = dict(list(known.items())[-_MAX_REMEMBERED:])
    try:
        text = json.dumps({key: asdict(one) for key, one in newest.items()}, indent=1)
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)
    except OSError as e:
        logger.warning("throughput is not remembered: %s", e)
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
