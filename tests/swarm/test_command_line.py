"""The server command as its users run it: started, joined, called, saved, stopped. Real processes, real signals."""

from __future__ import annotations

import json
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


def train(swarm: LocalSwarm, uid: str, steps: int, seed: int) -> None:
    (expert,) = get_experts(swarm.dht(), [uid])
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 16, generator=generator)
        expert(x).pow(2).mean().backward()


def outputs(swarm: LocalSwarm, uid: str) -> torch.Tensor:
    (expert,) = get_experts(swarm.dht(), [uid])
    with torch.no_grad():
        y: torch.Tensor = expert(torch.linspace(-1, 1, 32).reshape(2, 16))
        return y


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


def test_resumed_training_equals_uninterrupted_training(tmp_path: Path) -> None:
    directory = tmp_path / "experts"
    arguments = [*LOOPBACK, *SMALL, "--expert_uids", "ffn.0", "ffn.1", "--checkpoint_dir", str(directory)]
    with LocalSwarm(arguments) as swarm:
        swarm.terminate(0)  # saved, untrained: ffn.1 begins where ffn.0 does
        (directory / "ffn.1" / "checkpoint_last.pt").unlink()
        for path in (directory / "ffn.1").iterdir():
            path.unlink()
        state = torch.load(directory / "ffn.0" / "checkpoint_last.pt", weights_only=True)
        state["moe"]["uid"] = "ffn.1"
        torch.save(state, directory / "ffn.1" / "checkpoint_last.pt")
        swarm.restart(0)
        assert torch.equal(outputs(swarm, "ffn.0"), outputs(swarm, "ffn.1"))
        for seed in (1, 2):
            train(swarm, "ffn.0", 3, seed)
        train(swarm, "ffn.1", 3, seed=1)
        assert swarm.terminate(0) == 0  # saves
        swarm.restart(0)
        train(swarm, "ffn.1", 3, seed=2)
        assert torch.allclose(outputs(swarm, "ffn.0"), outputs(swarm, "ffn.1"), atol=1e-6)


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


def test_status_lists_experts_servers_and_load() -> None:
    with LocalSwarm([*LOOPBACK, *SMALL, "--expert_uids", "ffn.0.0", "ffn.0.1"]) as swarm:
        asked = [sys.executable, "-m", "moe.cli.status", "--json", "--initial_peers", *swarm.initial_peers]
        ended = subprocess.run(asked, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, ended.stderr
        assert "ffn.0.1" in json.dumps(json.loads(ended.stdout))
