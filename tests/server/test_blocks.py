"""Models as rows of blocks: names, bounds, the same weights everywhere, and how Server.create makes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moe.dht import stop_dht
from moe.errors import ConfigError
from moe.expert_uid import block_range
from moe.schema import BatchTensorProto
from moe.server.assembly import assemble
from moe.server.blocks import BlockSource, seed_of, seeded
from moe.server.checkpoints import store_experts
from moe.server.expert_backend import ExpertBackend

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


def test_weights_are_the_same_wherever_and_whenever_they_are_made() -> None:
    state = torch.random.get_rng_state()
    first = seeded(seed_of("ffn", 8, "block.0"), lambda: linear("block.0").module.bias)  # type: ignore[arg-type, return-value]
    assert torch.equal(state, torch.random.get_rng_state())
    torch.manual_seed(17)
    again = seeded(seed_of("ffn", 8, "block.0"), lambda: linear("block.0").module.bias)  # type: ignore[arg-type, return-value]
    other = seeded(seed_of("ffn", 8, "block.1"), lambda: linear("block.1").module.bias)  # type: ignore[arg-type, return-value]
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


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
        (dict(block_indices="0:3", block_prefix="block"), "block_prefix"),
        (dict(blocks=BlockSource(prefix="a.", total=1, make=lambda index: linear("a.0"))), "say which ones"),
    ],
)
def test_settings_that_contradict_each_other(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        assemble(**settings, **SMALL)
