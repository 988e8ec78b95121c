"""A server in a process of its own, for tests: ``python -m tests.swarm.host '{"experts": [...], ...}'``.

Prints one line of JSON when it serves; stops when it fails or gets a SIGTERM. Exit code 1 if the server failed.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
import time
from typing import Any

import torch

from moe.config import HandlerConfig, ServerConfig
from moe.dht import start_dht
from moe.server.checkpoints import load_experts
from moe.server.server import Server
from moe.server.task_pool import Task, TaskPool
from tests.swarm.experts import make_backend
from tests.swarm.tools import LOOPBACK, peers_of


def main(spec: dict[str, Any]) -> int:
    """Serve until told to stop.

    ``experts``: list of arguments of make_backend; ``die_after``: batches after which the Runtime dies; ``checkpoints``:
    directory; ``handler`` and ``config``: settings.
    """
    torch.set_num_threads(1)
    left = spec.get("die_after")

    def on_batch(pool: TaskPool, batch: list[Task]) -> None:
        nonlocal left
        if left is not None:
            left -= 1
            if left < 0:
                raise RuntimeError("told to die")

    started = time.monotonic()
    dht = start_dht(spec["peers"], **LOOPBACK)
    backends = {one["uid"]: make_backend(**one) for one in spec["experts"]}
    if "checkpoints" in spec:
        load_experts(backends, spec["checkpoints"])
    server = Server(
        dht,
        backends,
        start=True,
        checkpoint_dir=spec.get("checkpoints"),
        handler_config=HandlerConfig(**spec.get("handler", {})),
        config=ServerConfig(**spec.get("config", {})),
        on_batch=on_batch,
    )
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    sys.stdout.write(json.dumps({"peers": peers_of(dht), "start_s": time.monotonic() - started}) + "\n")
    sys.stdout.flush()
    while not stop.is_set() and not server.wait(0.1):
        pass
    server.shutdown()
    return 1 if server.failure is not None else 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
