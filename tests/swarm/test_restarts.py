"""Servers that stop and start again: what was learned is there, to the last update."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from moe.client.expert import RemoteExpert
from moe.config import ClientConfig
from moe.dht import DHT
from moe.expert_uid import ExpertInfo
from moe.server.checkpoints import load_experts
from moe.server.expert_backend import ExpertBackend
from tests.swarm.experts import WIDTH, make_backend
from tests.swarm.tools import Host, peers_of, report

UID = "adam.0"
EXPERT = {"kind": "linear", "uid": UID, "lr": 0.05, "optimizer": "adam"}
BIG = {"kind": "linear", "uid": UID, "lr": 0.05, "optimizer": "adam", "width": 512}  # 3 MiB with Adam's moments
STEPS = 6


def batches(width: int = WIDTH) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.randn(4, width, generator=generator), torch.randn(4, width, generator=generator)


def expert_of(dht: DHT, host: Host) -> RemoteExpert:
    return RemoteExpert(ExpertInfo(UID, host.peer_id), dht, config=ClientConfig(total_timeout_s=30))


def train(expert: RemoteExpert, x: torch.Tensor, grad: torch.Tensor) -> None:
    expert(x).backward(grad)


def saved(directory: Path, like: dict[str, object]) -> ExpertBackend:
    backend = make_backend(**like)  # type: ignore[arg-type]
    assert load_experts({UID: backend}, directory) == [UID]
    return backend


def check_equal(backend: ExpertBackend, reference: ExpertBackend) -> None:
    assert backend.updates == reference.updates
    state, expected = backend.state_dict(), reference.state_dict()
    for name, value in expected["module"].items():
        torch.testing.assert_close(state["module"][name], value)
    for index, moments in expected["optimizer"]["state"].items():
        for name, value in moments.items():
            torch.testing.assert_close(state["optimizer"]["state"][index][name], value)


def test_a_restart_equals_uninterrupted_training(dht: DHT, tmp_path: Path) -> None:
    """Optimizer, its moments and its step count included."""
    data, reference, reference_data = batches(), make_backend(**EXPERT), batches()  # type: ignore[arg-type]
    for restart in range(2):
        with Host(peers_of(dht), experts=[EXPERT], checkpoints=str(tmp_path)) as host:
            expert = expert_of(dht, host)
            for _ in range(STEPS):
                train(expert, *next(data))
                reference.backward(*next(reference_data))
            host.terminate()
            assert host.wait(10) == 0
            assert host.survivors() == []
        check_equal(saved(tmp_path, EXPERT), reference)
        assert reference.updates == STEPS * (restart + 1)


def test_a_server_killed_while_it_saves_starts_again(dht: DHT, tmp_path: Path) -> None:
    """It saves all the time and is killed at some moment; whatever it has said to be saved is there."""
    config = {"checkpoint_period_s": 0.001, "keep_checkpoints": 2}
    generator, data, updates = random.Random(0), batches(512), 0
    for _ in range(4):
        with Host(peers_of(dht), experts=[BIG], checkpoints=str(tmp_path), config=config) as host:
            expert = expert_of(dht, host)
            for _ in range(generator.randrange(2, 12)):
                train(expert, *next(data))
            host.kill()
        now = saved(tmp_path, BIG).updates
        report(f"killed with {now} updates saved")
        assert now >= updates
        updates = now
        assert len(list((tmp_path / UID).glob("checkpoint_*.pt"))) <= 4  # two, the last, and one that is not pruned yet
    assert updates > 0


def test_what_is_trained_last_is_saved_too(dht: DHT, tmp_path: Path) -> None:
    """A server that stops under load saves every update that somebody was told of."""
    with Host(peers_of(dht), experts=[EXPERT], checkpoints=str(tmp_path)) as host:
        config = ClientConfig(max_retries=0, request_timeout_s=10)
        expert = RemoteExpert(ExpertInfo(UID, host.peer_id), dht, config=config)
        told, stopping = 0, False
        for x, grad in batches():
            try:
                train(expert, x, grad)
            except Exception:
                assert stopping, "the server stopped by itself"
                break
            told += 1
            if told == 10:
                host.terminate()
                stopping = True
        assert host.wait(10) == 0
    backend = saved(tmp_path, EXPERT)
    report(f"told of {told} updates, saved {backend.updates}")
    assert told <= backend.updates <= told + 1


def test_a_truncated_newest_checkpoint_gives_way_to_the_one_before(dht: DHT, tmp_path: Path) -> None:
    config = {"checkpoint_period_s": 0.05}
    with Host(peers_of(dht), experts=[EXPERT], checkpoints=str(tmp_path), config=config) as host:
        expert, data = expert_of(dht, host), batches()
        for _ in range(STEPS):
            train(expert, *next(data))
        host.terminate()
        assert host.wait(10) == 0
    last = tmp_path / UID / "checkpoint_last.pt"
    whole = last.read_bytes()
    last.write_bytes(whole[: len(whole) // 2])  # it is a link to the newest one, which is damaged with it
    with Host(peers_of(dht), experts=[EXPERT], checkpoints=str(tmp_path), config=config) as host:
        torch.testing.assert_close(expert_of(dht, host)(torch.ones(1, WIDTH)).shape, torch.Size([1, WIDTH]))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """So that what is computed here equals what a server of one thread computes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
