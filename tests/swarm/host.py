"""What tests run in processes of their own: a server, and callers."""

from __future__ import annotations

import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

import torch

from moe.client.expert import get_experts
from moe.config import ClientConfig, HandlerConfig, ServerConfig
from moe.dht import start_dht, stop_dht
from moe.server.checkpoints import load_experts
from moe.server.server import Server
from moe.server.task_pool import Task, TaskPool
from tests.swarm.experts import WIDTH, compare_with_local, make_backend, random_inputs
from tests.swarm.tools import LOOPBACK, peers_of


def serve(pipe: Connection, spec: dict[str, Any]) -> None:
    """A server; says when it serves, and stops on SIGTERM. Exit code 1 if it failed.

    ``peers``: of the swarm to join; ``experts``: list of arguments of make_backend; ``die_after``: batches after which the
    Runtime dies; ``checkpoints``: directory; ``handler`` and ``config``: settings.
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
    pipe.send({"peers": peers_of(dht), "start_s": time.monotonic() - started})
    while not stop.is_set() and not server.wait(0.1):
        pass
    server.shutdown()
    sys.exit(1 if server.failure is not None else 0)


def compare(pipe: Connection, peers: list[str], transport: str, seeds: list[int]) -> None:
    """Clients in threads, each with its own seed; sends the largest difference from what it computes itself."""
    torch.set_num_threads(1)
    dht = start_dht(peers, **LOOPBACK)
    (expert,) = get_experts(dht, ["attention.0"], config=ClientConfig(transport=transport))
    with ThreadPoolExecutor(len(seeds)) as threads:
        pipe.send("ready")
        pipe.recv()
        pipe.send(max(threads.map(lambda seed: compare_with_local(expert, random_inputs(seed)), seeds)))
    stop_dht(dht)


def call_slowly(pipe: Connection, peers: list[str], transport: str, rows: list[int]) -> None:
    """Calls of the expert slow.0, three seconds each and all at once; says when they have begun."""
    dht = start_dht(peers, **LOOPBACK)
    (expert,) = get_experts(dht, ["slow.0"], config=ClientConfig(transport=transport))
    y = expert(torch.zeros(2, WIDTH, requires_grad=True))
    for count in rows:
        x = torch.zeros(count, WIDTH)
        x[0, 0] = 3.0
        threading.Thread(target=expert, args=(x,), daemon=True).start()
    threading.Thread(target=y.sum().backward, daemon=True).start()
    pipe.send("calling")
    time.sleep(60)
