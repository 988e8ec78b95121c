"""The server command as its users run it: started, joined, called, saved, stopped. Real processes, real signals."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from moe.client.expert import get_experts
from moe.config import ClientConfig
from moe.dht import start_dht, stop_dht
from moe.errors import MoEError
from moe.testing.swarm import LocalSwarm
from tests.swarm.tools import report

COMMAND = [sys.executable, "-m", "moe.cli.run_server"]
LOOPBACK = ["--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
SMALL = ["--hidden_dim", "16", "--optimizer", "sgd", "--lr", "0.1"]


def test_nothing_but_the_expert_class_starts_one_expert_in_a_new_swarm() -> None:
    server = subprocess.Popen(
        [*COMMAND, "--expert_cls", "ffn"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout is not None
        flag, *peers = server.stdout.readline().split()
        assert flag == "--initial_peers"
        dht = start_dht(initial_peers=peers)
        try:
            (expert,) = get_experts(dht, ["expert.0"])
            assert expert(torch.randn(2, 1024)).shape == (2, 1024)
        finally:
            stop_dht(dht)
        children = psutil.Process(server.pid).children(recursive=True)
        assert len(children) <= 3  # the DHT, its libp2p daemon, torch's shared memory manager
        server.terminate()
        begin = time.monotonic()
        assert server.wait(20) == 0
        report(f"SIGTERM took {time.monotonic() - begin:.2f} s")
        _, alive = psutil.wait_procs(children, 5)
        assert not alive
    finally:
        server.kill()
        server.communicate()


def test_sigterm_with_a_request_in_flight_ends_soon_and_leaves_nothing() -> None:
    arguments = [*LOOPBACK, "--expert_uids", "slow.0", "--expert_cls", "nop_delay", "--hidden_dim", "8"]
    with LocalSwarm(arguments) as swarm:
        config = ClientConfig(total_timeout_s=20.0, max_retries=0)
        (expert,) = get_experts(swarm.dht(), ["slow.0"], config=config)
        expert(torch.randn(1, 8))
        processes = swarm.processes(0)
        answers = []

        def call() -> None:
            try:
                answers.append(expert(torch.randn(1, 8)))
            except MoEError as e:
                answers.append(e)

        calling = threading.Thread(target=call)
        calling.start()
        time.sleep(0.2)
        begin = time.monotonic()
        assert swarm.terminate(0) == 0
        report(f"stopped within {time.monotonic() - begin:.2f} s")
        assert time.monotonic() - begin < 10
        calling.join(20)
        assert len(answers) == 1  # a result or an error, not silence
        assert not [pid for pid in processes if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]


def test_a_dry_run_measures_prints_and_exits(tmp_path: Path) -> None:
    """As a server that starts would: in the same environment; but it leaves nothing."""
    own = tmp_path / "own.py"
    own.write_text("import os, sys\nprint('policy', os.environ.get('OMP_WAIT_POLICY'), file=sys.stderr)\n")
    arguments = ["--throughput", "dry_run", "--num_blocks", "3", "--total_blocks", "9", "--hidden_dim", "16"]
    arguments += ["--checkpoint_dir", str(tmp_path / "new"), "--custom_module_path", str(own)]
    ended = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    assert "policy passive" in ended.stderr
    assert not (tmp_path / "new").exists()
    said = re.fullmatch(
        r"([0-9.]+) rows/s through one expert, ([0-9.]+) rows/s through the network stack; "
        r"to be announced: ([0-9.]+) rows/s\n",
        ended.stdout,
    )
    assert said is not None, ended.stdout
    compute, network, announced = map(float, said.groups())
    assert announced == pytest.approx(
        min(compute / 2, network), rel=0.01
    )  # a request uses two of three blocks on average


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--expert_cls", "no_such"], "no_such"),
        (["--host_maddrs", "127.0.0.1:80"], "127.0.0.1:80"),
        (["--num_experts", "2", "--expert_uids", "a.0"], "expert_uids"),
        (["--direct_port", "70000"], "70000"),
    ],
)
def test_wrong_settings_end_at_once_with_a_message(wrong: list[str], said: str) -> None:
    begin = time.monotonic()
    ended = subprocess.run([*COMMAND, *wrong], capture_output=True, text=True, timeout=30)
    report(f"refused after {time.monotonic() - begin:.2f} s")
    assert ended.returncode == 2
    assert said in ended.stderr
