"""What many experts cost: processes do not grow with them, and they start soon."""

from __future__ import annotations

import gc
import subprocess
import sys
import time

import psutil
import pytest

from moe.client.expert import get_experts
from moe.server.server import Server
from moe.testing.swarm import LocalSwarm
from tests.swarm.tools import report


def import_seconds() -> float:
    """How long this machine takes just now to import what a server imports."""
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import moe.server.server"], check=True, timeout=120)
    return time.monotonic() - begin


@pytest.mark.parametrize(("experts", "wanted_s"), [(64, 10.0), (256, 30.0)])
def test_processes_do_not_grow_with_experts_and_start_up_is_quick(experts: int, wanted_s: float) -> None:
    imports_s = import_seconds()
    arguments = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0", "--hidden_dim", "16", "--expert_cls", "ffn"]
    begin = time.monotonic()
    with LocalSwarm([*arguments, "--num_experts", str(experts), "--expert_pattern", "ffn.[0:16].[0:16]"]) as swarm:
        took_s = time.monotonic() - begin - imports_s
        processes = swarm.processes(0)
        threads = psutil.Process(processes[0]).num_threads()
        report(f"{experts} experts: {len(processes)} processes, {threads} threads, {took_s:.1f} s beyond imports")
        assert len(processes) <= 4
        assert took_s < 2 * wanted_s  # a machine that runs tests may be busy
        found = get_experts(swarm.dht(), [f"ffn.{i}.{j}" for i in range(16) for j in range(16)])
        assert sum(expert is not None for expert in found) == experts


@pytest.mark.parametrize("start", [True, False])
def test_memory_is_shared_with_the_process_of_the_dht_while_the_server_lives(start: bool) -> None:
    server = Server.create(
        expert_uids=["ffn.0"], expert_cls="ffn", hidden_dim=16, host_maddrs=["/ip4/127.0.0.1/tcp/0"], start=start
    )
    try:
        assert gc.get_freeze_count() > 0  # a collection would write to what is shared
    finally:
        server.shutdown()
    assert gc.get_freeze_count() == 0
