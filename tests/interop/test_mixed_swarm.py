"""Stock servers and ours in one swarm, for stock clients and ours."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn

from moe import DHT, MoEBeamSearcher, RemoteMixtureOfExperts, Server, declare_experts, get_experts
from moe.dht import get_dht_time, visible_addresses
from tests.interop.conftest import OUR_FROZEN_UIDS
from tests.interop.experts import HIDDEN, KINDS, assert_close, best_experts, dense_mixture
from tests.interop.peers import HOST_MADDRS, STOCK_GRID_UIDS, StockPeer

pytestmark = pytest.mark.timeout(240)  # the first test starts everybody

OURS = [uid for uid in OUR_FROZEN_UIDS if uid.startswith("mixed.")]
THEIRS = [uid for uid in STOCK_GRID_UIDS if uid.startswith("mixed.")]
UIDS = sorted(OURS + THEIRS)  # 2 x 2: one of each in every row and column of the grid
GRID_SIZE = (2, 2)


def modules(our_server: Server, stock: StockPeer) -> dict[str, nn.Module]:
    """Those of the whole grid."""
    experts: dict[str, nn.Module] = {uid: our_server.expert_backends[uid].module for uid in OURS}
    for uid in THEIRS:
        experts[uid] = KINDS["plain"].make()
        experts[uid].load_state_dict(stock.ask("state", uid))
    return {uid: experts[uid] for uid in UIDS}


def eventually(condition: Callable[[], Any], within_s: float) -> bool:
    """True as soon as the condition holds; False if it does not in time."""
    deadline = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def test_both_find_all_experts_of_the_grid(our_dht: DHT, our_server: Server, stock: StockPeer) -> None:
    ours, theirs = our_server.dht.peer_id.to_base58(), stock.server_id
    expected = [ours if uid in OURS else theirs for uid in UIDS]
    assert stock.ask("where", UIDS) == expected
    assert [expert.peer_id.to_base58() for expert in get_experts(our_dht, UIDS)] == expected

    scores = [torch.randn(5, size) for size in GRID_SIZE]
    best = best_experts(UIDS, scores, len(UIDS))
    assert stock.ask("beam_search", "mixed.", [rows.tolist() for rows in scores], len(UIDS)) == best
    found = MoEBeamSearcher(our_dht, "mixed.", GRID_SIZE).batch_find_best_experts(scores, len(UIDS))
    assert [[expert.uid for expert in row] for row in found] == best


def test_a_stock_mixture_over_both(our_server: Server, stock: StockPeer) -> None:
    x, grad = torch.randn(2, 4, HIDDEN)
    actual = stock.ask("mixture", "mixed.", list(GRID_SIZE), len(UIDS), x, grad, switch=False)
    x.requires_grad_()
    expected = dense_mixture(modules(our_server, stock), x, actual["weight"], actual["bias"], GRID_SIZE, len(UIDS))
    assert_close([actual["output"], actual["grad"]], [expected.detach(), *torch.autograd.grad(expected, [x], grad)])


def test_our_mixture_over_both(our_dht: DHT, our_server: Server, stock: StockPeer) -> None:
    x, grad = torch.randn(2, 4, HIDDEN)
    x.requires_grad_()
    mixture = RemoteMixtureOfExperts(
        in_features=HIDDEN, grid_size=GRID_SIZE, dht=our_dht, uid_prefix="mixed.", k_best=len(UIDS)
    )
    weight, bias = mixture.proj.weight, mixture.proj.bias
    output = mixture(x)
    expected = dense_mixture(modules(our_server, stock), x, weight, bias, GRID_SIZE, len(UIDS))
    assert_close([output.detach()], [expected.detach()])
    assert_close(
        torch.autograd.grad(output, [x, weight, bias], grad), torch.autograd.grad(expected, [x, weight, bias], grad)
    )


def test_stock_callers_and_callers_with_adapters_at_the_same_time(
    our_dht: DHT, our_server: Server, stock: StockPeer
) -> None:
    uid = "our_optional_globals.0"
    (expert,) = get_experts(our_dht, [uid])
    module = our_server.expert_backends[uid].module
    adapters = [{"lora_a": torch.randn(HIDDEN, 2), "lora_b": torch.randn(2, 4 * HIDDEN)} for _ in range(4)]

    def call_adapted(adapter: dict[str, torch.Tensor]) -> float:
        worst = 0.0
        for rows in range(1, 21):
            x = torch.randn(rows, HIDDEN)
            with torch.no_grad():
                worst = max(worst, (expert(x, **adapter) - module(x, **adapter)).abs().max().item())
        return worst

    with ThreadPoolExecutor(len(adapters)) as pool:
        ours = [pool.submit(call_adapted, adapter) for adapter in adapters]
        for rows in range(1, 21):
            x = torch.randn(rows, HIDDEN)
            assert_close(stock.ask("call", uid, [x], {})["outputs"], [module(x).detach()])
        assert max(future.result(timeout=30) for future in ours) < 1e-5


def test_declaring_both_ways(our_dht: DHT, stock: StockPeer) -> None:
    us = our_dht.peer_id.to_base58()
    stored = declare_experts(our_dht, ["declared.0.1", "declared_flat.2"], expiration_time=get_dht_time() + 60)
    assert all(stored.values())
    assert stock.ask("where", ["declared.0.1", "declared_flat.2", "declared.1.0"]) == [us, us, None]
    assert stock.ask("beam_search", "declared_flat.", [[[0.0, 0.0, 0.0]]], 1) == [["declared_flat.2"]]

    assert stock.ask("declare", ["declared.1.0", "declared_flat.0"], 60.0)
    found = get_experts(our_dht, ["declared.1.0", "declared_flat.0"])
    assert [expert.peer_id.to_base58() for expert in found] == [stock.client_id] * 2
    (row,) = MoEBeamSearcher(our_dht, "declared.", (2, 2)).batch_find_best_experts([torch.ones(1, 2)] * 2, 4)
    assert sorted(expert.uid for expert in row) == ["declared.0.1", "declared.1.0"]


def test_a_server_that_comes_late_and_leaves(our_dht: DHT, our_server: Server, stock: StockPeer) -> None:
    uids = ["late.0", "late.1"]
    search = {"prefix": "late.", "scores": [[[2.0, 1.0]]], "beam_size": 2}
    assert stock.ask("beam_search", **search) == [
        []
    ]  # and it tells the swarm, for the next five minutes, who is not there
    server = Server.create(
        expert_uids=[*uids, "late_grid.0.0", "late_grid.0.1"],
        expert_cls="nop",
        hidden_dim=HIDDEN,
        initial_peers=visible_addresses(our_server.dht),
        host_maddrs=HOST_MADDRS,
        expiration=8.0,
        start=True,
    )
    try:
        assert stock.ask("where", [*uids, "late_grid.0.0"]) == [server.dht.peer_id.to_base58()] * 3
        assert eventually(lambda: stock.ask("beam_search", **search) == [uids], within_s=5)
        (row,) = MoEBeamSearcher(our_dht, "late.", (2,)).batch_find_best_experts([torch.tensor([[2.0, 1.0]])], 2)
        assert [expert.uid for expert in row] == uids
    finally:
        server.shutdown()
    stopped = time.monotonic()
    assert eventually(lambda: stock.ask("where", ["late_grid.0.1"]) == [None], within_s=5)
    assert eventually(lambda: get_experts(our_dht, [*uids, "late_grid.0.0", "late_grid.0.1"]) == [None] * 4, within_s=5)
    # what a stock node has read before, it believes until that expires
    assert eventually(lambda: stock.ask("where", [*uids, "late_grid.0.0"]) == [None] * 3, within_s=12)
    assert time.monotonic() - stopped < 15
