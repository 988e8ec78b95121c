"""Every family of models that is hosted: outputs and gradients equal transformers' own, whatever is in a call."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from moe.architectures import ARCHITECTURES
from tests.hosted import Hosted, hosted
from tests.pretrained import ALL_MODELS, padding_mask, token_ids

TOLERANCE = dict(rtol=2e-4, atol=2e-4)
ROWS, LENGTH = 3, 9
MASK = padding_mask([LENGTH, 4, 7])
PACKED = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7, 8], [0, 1, 0, 1, 2, 3, 0, 1, 2]])


@pytest.fixture(scope="module", params=ALL_MODELS)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """Each family, some in several configurations."""
    with hosted(request.param, tmp_path_factory.mktemp("family")) as made:
        yield made


def calls(made: Hosted) -> dict[str, dict[str, Any]]:
    """Arguments beside the token ids, by what is special in them."""
    seen = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril() & (torch.arange(LENGTH) != 2)
    seen = (seen | torch.eye(LENGTH, dtype=torch.bool))[None, None].repeat(ROWS, 1, 1, 1)
    bias = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
    found: dict[str, dict[str, Any]] = {
        "nothing": {},
        "padding": dict(attention_mask=MASK),
        "padding on the left": dict(attention_mask=MASK.flip(1)),
        "booleans": dict(attention_mask=MASK.bool()),
        "a mask of 4 axes": dict(attention_mask=seen),
        "a bias": dict(attention_mask=bias),
    }
    if made.local.config.model_type in ("bloom", "falcon"):  # transformers itself takes none there
        del found["a mask of 4 axes"], found["a bias"]
    if made.local.config._attn_implementation == "eager":  # transformers would add booleans to the scores
        found.pop("a mask of 4 axes", None)
    if made.local.config.model_type in ("opt", "xlm-roberta"):  # ... or derives positions from it
        found.pop("a mask of 4 axes", None)
        found.pop("a bias", None)
    if "position_ids" in inspect.signature(made.distributed().forward).parameters:
        found["packed rows"] = dict(
            position_ids=PACKED, use_cache=False
        )  # with a cache, transformers does not see them
        found["positions"] = dict(
            position_ids=torch.arange(LENGTH)[None].repeat(ROWS, 1) + torch.tensor([[1], [0], [5]])
        )
        found["positions and padding"] = dict(position_ids=(MASK.cumsum(1) - 1).clamp(min=0), attention_mask=MASK)
    return found


def result_of(model: Any, given: dict[str, Any]) -> torch.Tensor:
    outputs = model(token_ids(ROWS, LENGTH), **given)
    tensor: torch.Tensor = outputs["logits"] if "logits" in outputs else outputs["last_hidden_state"]
    mask = given.get("attention_mask", torch.ones(ROWS, LENGTH))
    return tensor[mask.bool()] if mask.ndim == 2 else tensor


def test_a_call_equals_the_whole_model(family: Hosted) -> None:
    model = family.distributed()
    for name, given in calls(family).items():
        with torch.no_grad():
            got, expected = (result_of(each, given) for each in (model, family.local))
        assert_close(got, expected, **TOLERANCE, msg=f"{name}: differs by {(got - expected).abs().max():.2g}")


def test_gradients_equal_those_of_the_whole_model(family: Hosted) -> None:
    model = family.distributed()
    for given in ({}, dict(attention_mask=MASK)):
        for each in (model, family.local):
            each.zero_grad()
            result = result_of(each, given)
            (result * torch.linspace(-1, 1, result.numel()).reshape(result.shape)).sum().backward()
        expected = dict(family.local.named_parameters())
        for name, parameter in model.local.named_parameters():
            if expected[name].grad is None:
                assert parameter.grad is None
            else:
                scale = float(expected[name].grad.abs().max()) + 1e-6
                assert_close(parameter.grad / scale, expected[name].grad / scale, rtol=1e-3, atol=1e-3)
    family.local.zero_grad()


def test_every_family_is_tried() -> None:
    assert {kind.partition(",")[0] for kind in ALL_MODELS} == set(ARCHITECTURES)
