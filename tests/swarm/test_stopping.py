"""The server command told to stop, in every way a supervisor, a terminal or a person may do that: nothing that was learned
is lost, nobody finds the experts any more, nothing stays behind."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from moe.client.expert import get_experts
from moe.dht import DHT, find_experts
from moe.server.background import background_server
from moe.server.checkpoints import find_checkpointed_uids
from moe.testing.processes import kill_session, session_members
from moe.testing.swarm import LocalSwarm
from tests.swarm.tools import report, wait_until

UPDATES = 3
SLOW_DISK = """
import os, time
import moe.server.checkpoints as checkpoints

class SlowOS:
    def __getattr__(self, name):
        return getattr(os, name)
    def fsync(self, descriptor):
        time.sleep(0.9)
        os.fsync(descriptor)

checkpoints.os = SlowOS()
"""
# each server is stopped by one test: how, and of which experts it has
ORDERS = {
    1: (signal.SIGTERM, 0.0, ("p2pd", "main", "shm", "dht")),
    2: (signal.SIGHUP, 0.0, ("shm", "p2pd", "dht", "main")),
    3: (signal.SIGINT, 0.1, ("dht", "main", "p2pd", "shm")),
}
PATIENT, HASTY, BROKEN = 4, 5, 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts")
    (directory / "slow_disk.py").write_text(SLOW_DISK)
    return directory


@pytest.fixture(scope="module")
def swarm(directory: Path) -> Iterator[LocalSwarm]:
    """All at once: most of the time is that of imports. The first server stays, so that there is a swarm to leave."""

    def arguments(index: int) -> list[str]:
        own = ["--hidden_dim", "8", "--throughput", "10", "--torch_threads", "1", "--checkpoint_period", "3600"]
        own += ["--expert_uids", *uids_of(index), "--checkpoint_dir", str(directory / str(index))]
        if index in (PATIENT, HASTY):
            own += ["--custom_module_path", str(directory / "slow_disk.py")]
        return [*own, "--stop_timeout", "1"] if index == HASTY else own

    with LocalSwarm(*map(arguments, range(BROKEN + 1)), start_timeout_s=120.0, stop_timeout_s=30.0) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def dht(swarm: LocalSwarm) -> DHT:
    """Its first call has been made: that opens connections that stay."""
    dht = swarm.dht()
    (expert,) = get_experts(dht, uids_of(0))
    expert(torch.zeros(1, 8))
    return dht


def uids_of(index: int) -> list[str]:
    return [f"stop.{index}.{i}" for i in range(3 if index in (PATIENT, HASTY) else 1)]


def train(dht: DHT, directory: Path, index: int) -> None:
    uids = uids_of(index)
    saves = directory / str(index)
    wait_until(lambda: find_checkpointed_uids(saves) == uids, 30, "the first save")
    for number, expert in enumerate(get_experts(dht, uids)):
        for _ in range(UPDATES + number):
            expert(torch.randn(4, 8)).sum().backward()


def updates_saved(directory: Path, index: int) -> list[int]:
    paths = [directory / str(index) / uid / "checkpoint_last.pt" for uid in uids_of(index)]
    return [torch.load(path, weights_only=True)["moe"]["updates"] for path in paths]


def processes_of(swarm: LocalSwarm, index: int) -> dict[str, psutil.Process]:
    """By their parts: the main one, the DHT's, its libp2p daemon, torch's for shared memory."""
    main = psutil.Process(min(swarm.processes(index)))
    found = {"main": main}
    for process in main.children(recursive=True):
        name = process.name()
        found["p2pd" if name.startswith("p2pd") else "shm" if name.startswith("torch_shm") else "dht"] = process
    return found


@pytest.mark.parametrize("index", ORDERS)
def test_each_process_is_told_in_any_order(swarm: LocalSwarm, dht: DHT, directory: Path, index: int) -> None:
    number, pause_s, order = ORDERS[index]
    train(dht, directory, index)
    processes = processes_of(swarm, index)
    assert set(processes) == set(order)
    for name in order:
        with contextlib.suppress(psutil.NoSuchProcess):  # the server was faster
            processes[name].send_signal(number)
        time.sleep(pause_s)
    begin = time.monotonic()
    assert swarm.wait(index, 30) == 0, swarm.log(index)
    report(f"stopped within {time.monotonic() - begin:.2f} s")
    assert updates_saved(directory, index) == [UPDATES]
    assert find_experts(dht, uids_of(index)) == [None]
    _, left = psutil.wait_procs(processes.values(), 5)
    assert not left


def test_saving_takes_as_long_as_it_needs(swarm: LocalSwarm, dht: DHT, directory: Path) -> None:
    """Longer than the few seconds that all else has; the experts are invisible meanwhile."""
    train(dht, directory, PATIENT)
    (main, *_) = processes_of(swarm, PATIENT).values()
    begin = time.monotonic()
    main.terminate()
    wait_until(lambda: find_experts(dht, uids_of(PATIENT)) == [None] * 3, 10, "the retraction")
    assert main.is_running()
    assert swarm.wait(PATIENT, 60) == 0
    assert time.monotonic() - begin > 3 * 0.9
    assert updates_saved(directory, PATIENT) == [UPDATES, UPDATES + 1, UPDATES + 2]


def test_when_the_time_to_save_is_over_the_rest_is_lost_and_named(swarm: LocalSwarm, dht: DHT, directory: Path) -> None:
    train(dht, directory, HASTY)
    assert swarm.terminate(HASTY) == 1
    *first, last = updates_saved(directory, HASTY)
    assert first[0] == 0 and last in (0, UPDATES + 2)  # what would lose most was begun with
    assert "stop.5.0 (3 updates)" in swarm.log(HASTY)


def test_what_cannot_be_written_is_named(swarm: LocalSwarm, dht: DHT, directory: Path) -> None:
    train(dht, directory, BROKEN)
    (directory / str(BROKEN)).rename(directory / "unmounted")
    assert swarm.terminate(BROKEN) == 1
    assert "stop.6.0 (3 updates)" in swarm.log(BROKEN)
    assert find_experts(dht, uids_of(BROKEN)) == [None]


def test_told_to_stop_while_it_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "moe.cli.run_server", "--hidden_dim", "8", "--host_maddrs", "/ip4/127.0.0.1/tcp/0"]
    started = [
        subprocess.Popen([*command, "--checkpoint_dir", str(tmp_path / str(i))], stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True, start_new_session=True)
        for i in range(3)
    ]  # fmt: skip
    try:
        for server, seconds in zip(started, (1.5, 1.0, 1.0)):  # imports, then whatever this machine has come to
            time.sleep(seconds)
            server.terminate()
        for server in started:
            _, errors = server.communicate(timeout=30)
            assert server.returncode == 0, errors
            assert "Traceback" not in errors
        wait_until(lambda: not any(session_members(server.pid) for server in started), what="the end of all")
    finally:
        for server in started:
            kill_session(server.pid)


def test_a_background_server_that_is_told_by_others_saves_too(tmp_path: Path) -> None:
    """Its process gets the terminal's Ctrl+C, or a supervisor's SIGTERM."""
    options = {"expert_cls": "ffn", "hidden_dim": 8, "throughput": None, "host_maddrs": ["/ip4/127.0.0.1/tcp/0"]}
    before = set(psutil.Process().children())
    with background_server(expert_uids=["ffn.0"], checkpoint_dir=tmp_path, **options):
        (server,) = (
            child for child in psutil.Process().children() if child not in before and "spawn" in str(child.cmdline())
        )
        for path in tmp_path.glob("*/*"):
            path.unlink()
        server.terminate()
        wait_until(
            lambda: server.status() == psutil.STATUS_ZOMBIE, 20, "its end"
        )  # not waited for: that is its parent's
    assert find_checkpointed_uids(tmp_path) == ["ffn.0"]
