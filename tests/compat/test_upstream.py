"""What hivemind's own tests of ``hivemind.moe`` ask for, asked of this package.

After tests/test_moe.py, test_dht_experts.py, test_expert_backend.py, test_training.py, test_custom_experts.py and
test_start_server.py of hivemind 1.1 (https://github.com/learning-at-home/hivemind, MIT license, Learning@home), as far as they
use public names: smaller, on one server, with other words. What they import from ``hivemind.moe`` is imported from ``moe``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hivemind.p2p.p2p_daemon_bindings.control import P2PHandlerError
from hivemind.utils import get_dht_time
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import nn

from moe import DHT
from moe.client.beam_search import MoEBeamSearcher
from moe.client.expert import RemoteExpert, create_remote_experts
from moe.client.moe import RemoteMixtureOfExperts
from moe.client.switch_moe import RemoteSwitchMixtureOfExperts
from moe.dht import start_dht, stop_dht
from moe.expert_uid import ExpertInfo, is_valid_prefix, is_valid_uid, split_uid
from moe.server import ModuleBackend, Server, background_server, declare_experts
from moe.server.checkpoints import load_experts, store_experts
from moe.server.dht_handler import get_experts
from moe.server.layers.lr_schedule import get_linear_schedule_with_warmup
from tests.compat.conftest import HIDDEN
from tests.swarm.tools import LOOPBACK

# --- test_moe.py ------------------------------------------------------------------------------------------------------


def test_remote_module_call(server: Server) -> None:
    dht, peer_id = server.dht, server.dht.peer_id
    real_expert, fake_expert = create_remote_experts(
        [ExpertInfo(uid="expert.0", peer_id=peer_id), ExpertInfo(uid="oiasfjiasjf", peer_id=peer_id)], dht=dht
    )
    assert real_expert(torch.randn(1, HIDDEN)).shape == (1, HIDDEN)
    x = torch.randn(3, HIDDEN, requires_grad=True)
    output = real_expert(x)
    assert output.shape == (3, HIDDEN)
    again = real_expert(x[1:])
    assert torch.allclose(again, output[1:], atol=1e-5, rtol=0)
    again.norm().backward()
    assert x.grad is not None and x.grad.norm() > 0

    with pytest.raises(P2PHandlerError) as caught:  # of the wrong shape
        real_expert(torch.randn(3, 11))
    assert "11" in repr(caught.value)
    with pytest.raises(P2PHandlerError):
        fake_expert(x)
    assert torch.allclose(real_expert(x[1:]), output[1:], atol=1e-5, rtol=0)


def test_moe(server: Server) -> None:
    dmoe = RemoteMixtureOfExperts(in_features=HIDDEN, grid_size=(4, 4), dht=server.dht, k_best=3, uid_prefix="ffn.")
    for _ in range(3):
        dmoe(torch.randn(10, HIDDEN)).sum().backward()


def test_no_experts(server: Server) -> None:
    """Rows whose experts do not answer in time keep their input; nobody waits."""
    dmoe = RemoteSwitchMixtureOfExperts(
        in_features=HIDDEN, grid_size=(4,), dht=server.dht, uid_prefix="slow.", allow_zero_outputs=True
    )
    x = torch.randn(10, HIDDEN)
    assert not torch.equal(dmoe(x)[0], x)
    dmoe.forward_timeout = dmoe.backward_timeout = 0.3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server.module_backends["slow.0"].module, "delay", 0.6)
        for _ in range(2):
            output, balancing_loss = dmoe(x)
            (output.sum() + balancing_loss).backward()
            assert torch.equal(output, x)


def test_determinism(server: Server) -> None:
    (expert,) = create_remote_experts([ExpertInfo(uid="det_dropout.0", peer_id=server.dht.peer_id)], dht=server.dht)
    x, mask = torch.randn(32, HIDDEN, requires_grad=True), torch.randint(0, 2, (32, HIDDEN))
    outputs = [expert(x, mask) for _ in range(2)]
    grads = [torch.autograd.grad(output.sum(), x)[0] for output in outputs]
    for first, second in (outputs, grads):
        assert torch.allclose(first, second, atol=1e-5, rtol=0)


def test_compute_expert_scores(server: Server) -> None:
    """Of experts that are never called."""
    dmoe = RemoteMixtureOfExperts(
        dht=server.dht, in_features=16, grid_size=(40,), k_best=4, k_min=1, timeout_after_k_min=1, uid_prefix="expert."
    )
    gx, gy = torch.randn(4, 5, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    ii, jj = [[4, 0, 2], [3, 1, 1, 1, 3], [0], [3, 2]], [[2, 2, 1], [0, 1, 2, 0, 1], [0], [1, 2]]
    batch_experts = [
        [RemoteExpert(ExpertInfo(f"expert.{i}.{j}", None), None) for i, j in zip(*row)] for row in zip(ii, jj)
    ]
    logits = dmoe.compute_expert_scores([gx, gy], batch_experts)
    torch.softmax(logits, dim=-1).norm(dim=-1).mean().backward()
    assert all(scores.grad is not None and scores.grad.norm() > 0 for scores in (gx, gy))
    for row in range(4):
        for k, (i, j) in enumerate(zip(ii[row], jj[row])):
            assert torch.allclose(logits[row, k], gx[row, i] + gy[row, j])


def test_client_anomaly_detection(server: Server) -> None:
    """expert.3 has a weight that is nan."""
    options = dict(in_features=HIDDEN, dht=server.dht, uid_prefix="expert.", detect_anomalies=True)
    dmoe = RemoteMixtureOfExperts(grid_size=(3,), k_best=3, **options)
    x = torch.randn(1, HIDDEN)
    x[0, 0] = float("nan")
    with pytest.raises(ValueError):
        dmoe(x)
    x[0, 0] = 0
    with pytest.raises(ValueError):
        (float("inf") * dmoe(x).sum()).backward()
    dmoe = RemoteMixtureOfExperts(grid_size=(4,), k_best=4, **options)
    assert dmoe(x).isfinite().all()
    assert list(dmoe.statistics().forward_failures) == ["expert.3"]


# --- test_dht_experts.py ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def peers() -> Iterator[list[DHT]]:
    """Three nodes of a swarm."""
    peers = [start_dht(**LOOPBACK)]
    try:
        peers += [start_dht(peers[0].get_visible_maddrs(), **LOOPBACK) for _ in range(2)]
        get_experts(peers[0], ["foo.0"])
        yield peers
    finally:
        for peer in peers:
            stop_dht(peer)


def test_store_get_experts(peers: list[DHT]) -> None:
    first, other, _ = peers
    uids = [f"my_expert.{i}" for i in range(20)]
    for start in (0, 10):
        assert all(declare_experts(first, uids[start : start + 10], get_dht_time() + 30).values())
    found = get_experts(other, [uids[3], uids[17], "foo", "bar"])
    assert [None if expert is None else expert.uid for expert in found] == [uids[3], uids[17], None, None]
    declare_experts(other, ["my_other_expert.1337"], get_dht_time() + 30)
    not_found, there = get_experts(first, ["foobar", "my_other_expert.1337"])
    assert not_found is None
    assert isinstance(there, RemoteExpert)
    assert there.peer_id == other.peer_id


def test_beam_search_correctness(peers: list[DHT]) -> None:
    """As good as looking at all experts."""
    uids = [f"grid.{i}.{j}.{k}" for i, j, k in itertools.product(range(5, 8), range(2, 5), range(1, 4))]
    assert all(declare_experts(peers[0], uids, expiration_time=get_dht_time() + 30).values())
    dmoe = RemoteMixtureOfExperts(in_features=32, grid_size=(8, 8, 8), dht=peers[1], k_best=4, uid_prefix="grid.")
    everybody = [[RemoteExpert(ExpertInfo(uid, None), None) for uid in uids]]
    for _ in range(5):
        scores = dmoe.proj(torch.randn(32)).split_with_sizes(dmoe.beam_search.grid_size, dim=-1)
        rows = [dim_scores.detach()[None] for dim_scores in scores]
        assert isinstance(dmoe.beam_search, MoEBeamSearcher)
        chosen = dmoe.beam_search.find_best_experts([row[0].numpy() for row in rows], beam_size=dmoe.k_best)
        assert len(chosen) == 4 and all(isinstance(expert, RemoteExpert) for expert in chosen)
        best = sorted(dmoe.compute_expert_scores(rows, everybody)[0].tolist(), reverse=True)[:4]
        assert np.allclose(dmoe.compute_expert_scores(rows, [chosen])[0].numpy(), best)
        batch = dmoe.beam_search.batch_find_best_experts([np.random.randn(6, 8) for _ in range(3)], beam_size=4)
        assert [len(experts) for experts in batch] == [4] * 6


def test_dht_single_node(peers: list[DHT]) -> None:
    node = peers[2]
    beam_search = MoEBeamSearcher(node, "single.", grid_size=(10,))
    assert all(declare_experts(node, ["single.1", "single.2", "single.3"], get_dht_time() + 30).values())
    assert len(declare_experts(node, ["ffn.1", "ffn.2"], get_dht_time() + 30)) == 4
    assert len(declare_experts(node, ["e.1.2.3", "e.1.2.5", "e.2.0"], get_dht_time() + 30)) == 7
    for expert in get_experts(node, ["single.3", "single.2"]):
        assert expert.peer_id == node.peer_id
    assert all(declare_experts(node, ["single.5", "single.2"], get_dht_time() + 30).values())
    found = beam_search.find_best_experts([(0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0)], beam_size=2)
    assert [expert.uid for expert in found] == ["single.5", "single.3"]

    successors = beam_search.get_active_successors(["e.1.2.", "e.2.", "e.4.5."])
    assert successors == {
        "e.1.2.": {3: ExpertInfo("e.1.2.3", node.peer_id), 5: ExpertInfo("e.1.2.5", node.peer_id)},
        "e.2.": {0: ExpertInfo("e.2.0", node.peer_id)},
        "e.4.5.": {},
    }
    beam = MoEBeamSearcher(node, "single.", (7,)).get_initial_beam((3, 2, 1, 0, -1, -2, -3), beam_size=3)
    assert [entry[:2] for entry in beam] == [(2.0, "single.1."), (1.0, "single.2."), (0.0, "single.3.")]
    with pytest.raises(ValueError):  # upstream: AssertionError
        MoEBeamSearcher(node, "single.1.ffn", (2, 2))
    with pytest.raises(ValueError):
        beam_search.get_active_successors(["e.1.2.", "e.2", "e.4.5."])


def test_uid_patterns() -> None:
    valid = ["expert.1", "expert.0", "expert.0.0.1", "ffn.12.34.56.78.90", "transformer::encoder.2", "🤗.321", "00.1.2"]
    prefixes = ["expert.", "e.1.", "e.1.2.3.", *(f"{uid}." for uid in valid), *(split_uid(uid)[0] for uid in valid)]
    invalid = [
        "",
        ".",
        "expert.-1",
        "xxx.a",
        "expert.1x",
        "some.123.01",
        "e1",
        "e..1",
        "e.1.2.3..4",
        ".123",
        "expert.1\n",
    ]
    assert all(map(is_valid_uid, valid)) and all(map(is_valid_prefix, prefixes))
    assert not any(map(is_valid_uid, [*invalid, *prefixes, "0"]))
    assert not any(map(is_valid_prefix, [*invalid, *valid, "expert"]))


# --- test_expert_backend.py -------------------------------------------------------------------------------------------

NAME, WARMUP, DECAY = "test_expert", 2, 2


@pytest.fixture
def example_experts() -> dict[str, ModuleBackend]:
    expert = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(expert.parameters(), 1.0)
    backend = ModuleBackend(
        name=NAME,
        module=expert,
        optimizer=optimizer,
        scheduler=get_linear_schedule_with_warmup(
            optimizer, num_warmup_steps=WARMUP, num_training_steps=WARMUP + DECAY
        ),
        args_schema=(BatchTensorDescriptor(1),),
        outputs_schema=BatchTensorDescriptor(1),
        max_batch_size=1,
    )
    return {NAME: backend}


def test_save_load_checkpoints(example_experts: dict[str, ModuleBackend], tmp_path: Path) -> None:
    weight = next(example_experts[NAME].module.parameters())
    for i in range(1, 4):
        weight.data[0] = i
        store_experts(example_experts, tmp_path)
    assert len(list((tmp_path / NAME).iterdir())) == 4  # with checkpoint_last.pt
    weight.data[0] = 0
    load_experts(example_experts, tmp_path)
    assert weight.data[0] == 3


def test_restore_update_count_and_lr_schedule(example_experts: dict[str, ModuleBackend], tmp_path: Path) -> None:
    backend = example_experts[NAME]
    assert backend.optimizer is not None and backend.scheduler is not None
    group = backend.optimizer.param_groups[0]
    for i in range(WARMUP):
        assert group["lr"] == i / WARMUP
        backend.backward(torch.randn(1, 1), torch.randn(1, 1))
    assert group["lr"] == 1.0
    store_experts(example_experts, tmp_path)
    for i in range(DECAY):
        assert group["lr"] == 1 - i / DECAY
        backend.backward(torch.randn(1, 1), torch.randn(1, 1))
    assert group["lr"] == 0.0
    load_experts(example_experts, tmp_path)
    assert backend.optimizer.param_groups[0]["lr"] == 1.0
    assert backend.scheduler.last_epoch == WARMUP


# --- test_training.py -------------------------------------------------------------------------------------------------


def test_training(server: Server) -> None:
    """Two experts in a row, trained over there, and a head, trained here."""
    torch.manual_seed(0)
    x = torch.randn(64, HIDDEN)
    labels = (x[:, :2].sum(1) > 0).long()
    first, second = get_experts(server.dht, ["trained.0", "trained.1"])
    model = nn.Sequential(first, nn.ReLU(), second, nn.Linear(HIDDEN, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(100):
        outputs = model(x)
        F.cross_entropy(outputs, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        accuracy = (outputs.argmax(dim=1) == labels).float().mean().item()
        if accuracy >= 0.9:
            break
    assert accuracy >= 0.9


# --- test_custom_experts.py, test_start_server.py ---------------------------------------------------------------------


@pytest.mark.usefixtures("registries")
def test_custom_expert_in_a_background_server(tmp_path: Path, experts_file: Callable[..., Path]) -> None:
    options = dict(expert_cls="custom_perceptron", device="cpu", hidden_dim=HIDDEN, num_handlers=2)
    path = experts_file("from hivemind.moe.server.layers.custom_experts import register_expert_class")
    with background_server(
        num_experts=2, custom_module_path=path, identity_path=str(tmp_path / "id"), **options, **LOOPBACK
    ) as peer_info:
        dht = start_dht(peer_info.addrs, client_mode=True, **LOOPBACK)
        try:
            for expert in get_experts(dht, ["expert.0", "expert.1"]):
                assert expert.peer_id == peer_info.peer_id
                for batch_size in (1, 4):
                    expert(torch.randn(batch_size, HIDDEN)).sum().backward()
        finally:
            stop_dht(dht)
        assert (tmp_path / "id").stat().st_size > 0
