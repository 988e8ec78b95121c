"""DoRA and biases in the blocks of a pretrained model: what they change; callers who have different ones share a launch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe.architectures import BIAS, DORA, IA3, IA3_INPUT, LORA, kwarg_of, linear_of
from moe.server.pretrained import PretrainedBlock, PretrainedModel
from tests.pretrained import save_model

HIDDEN = 32
LINEAR = {"bert": "attention.self.query", "qwen2": "self_attn.q_proj"}


@pytest.fixture(scope="module", params=LINEAR)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers have biases."""
    folder = tmp_path_factory.mktemp("models") / request.param
    save_model(request.param, folder)
    return folder


def adapters_of(block: PretrainedBlock, seed: int) -> dict[str, Any]:
    """Of all linear layers and norms."""
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {}
    for kwarg, proto in block.schema().kwargs.items():
        kind = (linear_of(kwarg) or ("",))[0]
        if kind == LORA:
            sizes = (proto["a"].sizes[0], 3), (3, proto["b"].sizes[1])
            a, b = (torch.randn(*size, generator=generator) / 5 for size in sizes)
            made[kwarg] = {"a": a, "b": b}
        elif kind in (DORA, BIAS):
            made[kwarg] = torch.rand(*proto.sizes, generator=generator) + 0.5
    return made


def test_names_are_not_ambiguous() -> None:
    for kind in (LORA, DORA, BIAS, IA3, IA3_INPUT):
        assert linear_of(kwarg_of(kind, "attention.self.query")) == (kind, "attention.self.query")


@pytest.mark.parametrize("with_lora", [True, False])
def test_rows_of_that_length_and_other_biases(with_lora: bool, folder: Path) -> None:
    block, other = (PretrainedModel(folder).load_block(0) for _ in range(2))
    kwargs = {name: value for name, value in adapters_of(block, 0).items() if with_lora or not name.startswith(LORA)}
    with torch.no_grad():
        for name, linear in other.linears():
            weight: Any = linear.weight
            if with_lora:
                pair = kwargs[kwarg_of(LORA, name)]
                weight += (pair["a"] @ pair["b"]).T
            weight *= (kwargs[kwarg_of(DORA, name)] / weight.norm(dim=1))[:, None]
        for name, bias in other.biases():
            bias.copy_(kwargs[kwarg_of(BIAS, name)])
        hidden = torch.randn(2, 5, HIDDEN)
        assert_close(block(hidden, **kwargs), other(hidden), rtol=1e-4, atol=1e-5)


def test_only_layers_with_a_bias_take_one(folder: Path) -> None:
    block = PretrainedModel(folder).load_block(0)
    found = {linear_of(name)[1] for name in block.schema().kwargs if name.startswith(BIAS)}  # type: ignore[index]
    expected = {
        "bert": {name for name, _ in block.linears()} | {"attention.output.LayerNorm", "output.LayerNorm"},
        "qwen2": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    }
    assert found == expected[folder.name]


def test_callers_in_lanes(folder: Path) -> None:
    """Without control flow on data, and gradients are each caller's own."""
    block = PretrainedModel(folder).load_block(0).requires_grad_(False)
    lanes = [(torch.randn(2, 5, HIDDEN), adapters_of(block, seed)) for seed in range(3)]
    leaves = [[t.requires_grad_() for t in torch.utils._pytree.tree_leaves(kwargs)] for _, kwargs in lanes]
    expected = [block(hidden, **kwargs) for hidden, kwargs in lanes]
    stacked = torch.utils._pytree.tree_map(lambda *tensors: torch.stack(tensors), *(kwargs for _, kwargs in lanes))
    inputs = torch.stack([hidden for hidden, _ in lanes])
    got = torch.func.vmap(lambda hidden, kwargs: block(hidden, **kwargs))(inputs, stacked)
    assert_close(got, torch.stack(expected), rtol=1e-4, atol=1e-5)
    for output, other_output, own in zip(got, expected, leaves):
        mine = torch.autograd.grad(output.square().sum(), own, retain_graph=True, allow_unused=True)
        alone = torch.autograd.grad(other_output.square().sum(), own, allow_unused=True)
        for gradient, other in zip(mine, alone):
            assert gradient is not None
            assert_close(gradient, other, rtol=1e-3, atol=1e-3)
