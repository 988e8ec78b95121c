"""Models as rows of blocks: names, bounds, the same weights everywhere, and how Server.create makes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from moe.config import ServerConfig
from moe.dht import stop_dht
from moe.errors import ConfigError
from moe.expert_uid import block_range
from moe.schema import BatchTensorProto
from moe.server.assembly import assemble
from moe.server.blocks import BlockSource, seed_of, seeded
from moe.server.checkpoints import store_experts
from moe.server.expert_backend import ExpertBackend
from moe.server.server import Server
from moe.server.throughput import LENGTHS
from tests.pretrained import LAYERS, save_model

LOOPBACK: dict[str, Any] = {"host_maddrs": ["/ip4/127.0.0.1/tcp/0"], "device": "cpu"}
SMALL: dict[str, Any] = {"expert_cls": "ffn", "hidden_dim": 8, "optim_cls": None, **LOOPBACK}


def linear(uid: str, value: float = 1.0) -> ExpertBackend:
    module = torch.nn.Linear(4, 4)
    torch.nn.init.constant_(module.weight, value)
    return ExpertBackend(uid, module, args_schema=(BatchTensorProto(4),))


def test_names_and_bounds() -> None:
    source = BlockSource(prefix="bert.3.", total=3, make=lambda index: linear(f"bert.3.{index}", index))
    assert source.uid(2) == "bert.3.2"
    made = source.make_all(range(1, 3))
    assert [(uid, backend.name) for uid, backend in made.items()] == [("bert.3.1",) * 2, ("bert.3.2",) * 2]
    source.check(range(3))
    for outside in (range(2, 4), [-1]):
        with pytest.raises(ConfigError, match=r"in a model of 3 blocks \(0 to 2\)"):
            source.check(outside)
    for prefix, total in (("block", 3), ("", 3), ("block.", 0), ("block.", 5000)):
        with pytest.raises(ConfigError):
            BlockSource(prefix=prefix, total=total, make=linear)


@pytest.mark.parametrize(
    "text", ["", "3", ":", "1:", ":1", "3:3", "4:3", "-1:3", "0:3:1", "a:b", "0:1e9", "0:" + "9" * 30, " 0:1"]
)
def test_ranges_that_are_none(text: str) -> None:
    with pytest.raises(ConfigError, match="block_indices"):
        block_range(text)


def test_ranges() -> None:
    assert block_range("0:3") == range(3)
    assert block_range("7:12") == range(7, 12)


RANDOM: dict[str, Callable[[], torch.Tensor]] = {
    "a layer": lambda: torch.nn.Linear(4, 4).bias,
    "normal_": lambda: torch.empty(9).normal_(),
    "uniform_": lambda: torch.empty(9).uniform_(),
    "bernoulli": lambda: torch.bernoulli(torch.full((99,), 0.5)),
    "trunc_normal_": lambda: torch.nn.init.trunc_normal_(torch.empty(9)),
    "orthogonal_": lambda: torch.nn.init.orthogonal_(torch.empty(9, 9)),
    "dropout": lambda: torch.nn.functional.dropout(torch.ones(99)),
    "rand": lambda: torch.rand(9),
    "rand_like": lambda: torch.rand_like(torch.empty(9)),
    "randn": lambda: torch.randn(9),
    "normal": lambda: torch.normal(0.0, 1.0, (9,)),
    "randint": lambda: torch.randint(10**6, (9,)),
    "randint from": lambda: torch.randint(3, 10**6, (9,)),
    "randperm": lambda: torch.randperm(99),
    "multinomial": lambda: torch.multinomial(torch.ones(99), 9),
    "double": lambda: torch.randn(9, dtype=torch.float64),
}


@pytest.mark.parametrize("draw", RANDOM.values(), ids=RANDOM)
def test_random_numbers_are_the_same_wherever_and_whenever_they_are_drawn(draw: Callable[[], torch.Tensor]) -> None:
    state = torch.random.get_rng_state()
    first = seeded(seed_of("ffn", 8, "block.0"), draw)
    assert torch.equal(state, torch.random.get_rng_state())  # torch's own generator goes on as if nothing had happened
    torch.manual_seed(17)
    again, other = seeded(seed_of("ffn", 8, "block.0"), draw), seeded(seed_of("ffn", 8, "block.1"), draw)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_weights_are_the_same_though_others_draw_random_numbers_meanwhile() -> None:
    """An expert with dropout is served while a block is made, in another thread."""
    ending = threading.Event()

    def draw() -> None:
        while not ending.is_set():
            torch.rand(10)

    def make() -> list[torch.Tensor]:
        return [torch.nn.Linear(8, 8).weight for _ in range(50)]

    expected = seeded(7, make)
    drawing = threading.Thread(target=draw)
    drawing.start()
    try:
        for _ in range(20):
            assert all(map(torch.equal, expected, seeded(7, make)))
    finally:
        ending.set()
        drawing.join()


def test_servers_that_host_the_same_block_begin_with_the_same_weights() -> None:
    parts = [assemble(block_indices=indices, total_blocks=5, **SMALL) for indices in ("0:3", "2:5")]
    try:
        assert [list(part.backends) for part in parts] == [
            ["block.0", "block.1", "block.2"],
            ["block.2", "block.3", "block.4"],
        ]
        first, second = (part.backends["block.2"].module.state_dict() for part in parts)
        assert all(torch.equal(first[name], second[name]) for name in first)
        other = parts[0].backends["block.1"].module.state_dict()
        assert not all(torch.equal(first[name], other[name]) for name in first)
    finally:
        for part in parts:
            stop_dht(part.dht)


def test_blocks_in_the_checkpoint_directory_are_loaded(tmp_path: Path) -> None:
    parts = assemble(block_indices="0:1", checkpoint_dir=tmp_path, **SMALL)
    stop_dht(parts.dht)
    with torch.no_grad():
        for parameter in parts.backends["block.0"].module.parameters():
            parameter.fill_(3.0)
    store_experts(parts.backends, tmp_path)
    parts = assemble(block_indices="0:2", checkpoint_dir=tmp_path, **SMALL)
    stop_dht(parts.dht)
    assert all((parameter == 3.0).all() for parameter in parts.backends["block.0"].module.parameters())
    assert not all((parameter == 3.0).all() for parameter in parts.backends["block.1"].module.parameters())


def test_a_model_made_in_another_way() -> None:
    source = BlockSource(prefix="mine.", total=4, make=lambda index: linear(f"mine.{index}", float(index)))
    parts = assemble(block_indices="1:3", blocks=source, expert_cls="no such class", **LOOPBACK)
    stop_dht(parts.dht)
    assert {uid: backend.module.weight.mean().item() for uid, backend in parts.backends.items()} == {
        "mine.1": 1,
        "mine.2": 2,
    }  # type: ignore[operator, union-attr]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(block_indices="0:3", num_experts=3), "leave out num_experts"),
        (dict(block_indices="0:3", expert_uids=["a.0"]), "leave out num_experts"),
        (dict(block_indices="0:3", total_blocks=2), "no block 2 in a model of 2 blocks"),
        (dict(block_indices="three"), "FIRST:END"),
        (dict(num_blocks=3), "give total_blocks, too"),
        (dict(num_blocks=0, total_blocks=3), "at least 1"),
        (dict(num_blocks=3, total_blocks=2), "no block 2 in a model of 2 blocks"),
        (dict(num_blocks=3, total_blocks=5, block_indices="0:3"), "no block_indices"),
        (dict(num_blocks=3, total_blocks=5, num_experts=3), "leave out num_experts"),
        (dict(num_blocks=3, total_blocks=5, optim_cls=torch.optim.Adam), "blocks that are trained cannot move"),
        (dict(num_blocks=3, total_blocks=5, balance_quality=-1.0), "balance_quality"),
        (dict(block_indices="0:3", throughput="fast"), "throughput"),
        (dict(block_indices="0:3", block_prefix="block"), "block_prefix"),
        (dict(blocks=BlockSource(prefix="a.", total=1, make=lambda index: linear("a.0"))), "say which ones"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        assemble(**{**SMALL, **settings})


def test_a_server_of_a_new_swarm_begins_at_the_first_block_and_may_move() -> None:
    settings = {**SMALL, "throughput": 12.5}
    del settings["optim_cls"]  # nobody asked for one, so these blocks have none
    parts = assemble(num_blocks=3, total_blocks=5, balance_period_s=7.0, **settings)
    stop_dht(parts.dht)
    assert list(parts.backends) == ["block.0", "block.1", "block.2"]
    assert all(backend.optimizer is None for backend in parts.backends.values())
    config = parts.server_options["config"]
    assert (config.balance_quality, config.balance_period_s) == (0.75, 7.0)
    assert parts.server_options["throughput"] == 12.5
    assert parts.server_options["blocks"].total == 5


def test_a_pretrained_model_says_itself_how_many_blocks_it_has(tmp_path: Path) -> None:
    save_model("bert", tmp_path)
    settings = dict(model_path=tmp_path, num_blocks=2, throughput="eval", **LOOPBACK)
    parts = assemble(**settings)
    stop_dht(parts.dht)
    assert list(parts.backends) == ["block.0", "block.1"]
    source = parts.server_options["blocks"]
    assert source.total == LAYERS
    first, again = parts.backends["block.1"].module.state_dict(), source.make(1).module.state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert parts.server_options["throughput"].tokens_per_row == LENGTHS[1]  # this model takes 64 positions at most
    with pytest.raises(ConfigError, match="in a model of"):
        assemble(**{**settings, "num_blocks": LAYERS + 1})


def test_blocks_that_were_chosen_by_hand_do_not_move() -> None:
    parts = assemble(block_indices="1:3", throughput=None, **SMALL)
    stop_dht(parts.dht)
    assert parts.server_options["config"].balance_quality == 0.0


def test_a_server_that_moves_hosts_consecutive_blocks() -> None:
    source = BlockSource(prefix="block.", total=4, make=lambda index: linear(f"block.{index}"))
    for backends in ({}, source.make_all([0, 2]), {**source.make_all([0]), "ffn.0": linear("ffn.0")}):
        with pytest.raises(ConfigError, match="consecutive blocks"):
            Server(None, backends, blocks=source)
    assert (
        Server(None, source.make_all([0, 2]), blocks=source, config=ServerConfig(balance_quality=0.0)).rebalancer
        is None
    )
