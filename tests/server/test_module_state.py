"""What a module holds: every change is told, and put back where it is asked for."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from moe.server.module_state import Attributes, Mark, RandomState, contents, has_graph, places_of


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(100, 200)
        self.register_buffer("table", torch.arange(1000.0))
        self.number, self.text, self.nothing = 1.5, "text", None
        self.by_length: dict[Any, Any] = {3: torch.ones(3)}
        self.nested: dict[str, list[Any]] = {"list": [torch.ones(2), {"deep": (torch.zeros(1), 2)}]}
        self.config = SimpleNamespace(scale=2.0, inner=SimpleNamespace(mask=torch.ones(2)))
        self.array = np.zeros(3)
        self.names = {"a", "b"}
        self.generator = torch.Generator()
        self.activation: Any = torch.tanh
        self.count = 0


CHANGES: dict[str, Callable[[Any], object]] = {
    "parameter": lambda m: m.layer.weight.data.__setitem__((17, 3), 5.0),
    "parameter's sign": lambda m: m.layer.bias.data.__setitem__(0, -m.layer.bias.data[0]),
    "swapped rows": lambda m: m.layer.weight.data.__setitem__([0, 1], m.layer.weight.data[[1, 0]]),
    "buffer": lambda m: m.table.numpy().__setitem__(999, 1),
    "number": lambda m: setattr(m, "number", 2.5),
    "number's type": lambda m: setattr(m, "count", 0.0),
    "text": lambda m: setattr(m, "text", "other"),
    "nothing": lambda m: setattr(m, "nothing", 0),
    "dict": lambda m: m.by_length.update({4: torch.ones(4)}),
    "value in a dict": lambda m: m.by_length[3].zero_(),
    "list": lambda m: m.nested["list"].append(1),
    "tuple": lambda m: m.nested["list"][1]["deep"][0].add_(1),
    "object": lambda m: setattr(m.config, "scale", 3.0),
    "object in an object": lambda m: m.config.inner.mask.data.zero_(),
    "array": lambda m: m.array.__setitem__(0, 1),
    "set": lambda m: m.names.add("c"),
    "generator": lambda m: torch.rand(1, generator=m.generator),
    "function": lambda m: setattr(m, "activation", torch.relu),
    "new attribute": lambda m: setattr(m, "more", 1),
    "removed attribute": lambda m: delattr(m, "number"),
    "mode": lambda m: m.layer.eval(),
    "hook": lambda m: m.layer.register_forward_hook(lambda *args: None),
    "part": lambda m: setattr(m, "layer", nn.Linear(100, 200)),
    "shape": lambda m: setattr(m.layer.weight, "data", m.layer.weight.data.T),
    "requires_grad of nothing else": lambda m: setattr(m.layer, "bias", None),
}


@pytest.mark.parametrize("what", CHANGES)
def test_every_change_is_told(what: str) -> None:
    module = Holds()
    before = Mark(module)
    assert before.same_as(Mark(module))
    CHANGES[what](module)
    assert not before.same_as(Mark(module))


def test_what_only_counts_can_be_left_out() -> None:
    module = Holds()
    before = Mark(module)
    module.count += 1
    after = Mark(module)
    counters = before.counters(after)
    assert len(counters) == 1
    assert before.same_as(after, counters)
    module.count += 1
    assert after.same_as(Mark(module), counters)
    module.number = 7.0
    assert not after.same_as(Mark(module), counters)


def test_it_is_told_if_there_is_too_much_to_look_at() -> None:
    module = Holds()
    module.by_length = {i: [i] for i in range(2**15)}
    with pytest.raises(ValueError, match="too many"):
        Mark(module)
    assert Attributes(module)


def test_cycles_have_an_end() -> None:
    module = Holds()
    module.nested["list"].append(module.nested)
    module.by_length["self"] = module.by_length
    assert Mark(module).same_as(Mark(module))
    Attributes(module).restore()
    assert places_of(module, lambda tensor: True)


@given(st.integers(0, 2**17), st.integers(0, 2**17), st.integers(1, 8), st.sampled_from([torch.uint8, torch.float32]))
def test_contents_differ_if_a_value_does(length: int, at: int, more: int, dtype: torch.dtype) -> None:
    tensor = torch.zeros(length, dtype=dtype)
    before = contents([tensor])
    assert before == contents([tensor.clone()])
    if length:
        tensor[at % length] += more
        assert before != contents([tensor])


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool])
def test_contents_of_structured_changes_differ(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = 300
    matrix = torch.eye(n)[torch.randperm(n, generator=generator)]
    found = {contents([matrix.to(dtype)])}
    changed = []
    for _ in range(10):
        changed.append(matrix[torch.randperm(n, generator=generator)])  # another permutation
        rows, columns = (torch.randint(n, (2,), generator=generator) for _ in range(2))
        rectangle = matrix.clone()
        if len(rows.unique()) == len(columns.unique()) == 2:
            for row, sign in zip(rows, (1, -1)):
                rectangle[row, columns] += torch.tensor([sign, -sign])
            changed.append(rectangle)
        swapped = matrix.clone()
        swapped[rows] = matrix[rows.flip(0)]
        if not torch.equal(swapped, matrix):
            changed.append(swapped)
    distinct = {bytes(m.to(dtype).view(torch.uint8).numpy().data) for m in [matrix, *changed]}
    found |= {contents([m.to(dtype)]) for m in changed}
    assert len(found) == len(distinct)


def test_contents_of_any_layout() -> None:
    tensor = torch.randn(300, 400)
    assert contents([tensor.T]) == contents([tensor.T.contiguous()])
    assert contents([tensor[:, ::2]]) == contents([tensor[:, ::2].clone()])
    assert contents([]) == contents([])
    assert contents([torch.tensor(math.nan)]) == contents([torch.tensor(math.nan)])
    assert contents([torch.empty(0), torch.ones(1)]) == contents([torch.ones(1)])
    odd = torch.zeros(2**17 + 1, dtype=torch.uint8)[1:]  # no words at its address
    assert contents([odd]) == contents([odd])


def test_everything_is_put_back_except_counts() -> None:
    module = Holds()
    attributes = Attributes(module)
    before = Mark(module)
    mask = module.config.inner.mask
    for name in ("number", "text", "nothing", "dict", "list", "object", "new attribute", "function", "mode"):
        CHANGES[name](module)
    module.nested["list"][0] = torch.zeros(5)
    module.config.inner.mask = torch.zeros(3)
    module.register_buffer("another", torch.ones(1))
    module.count = 7
    attributes.restore()
    assert module.count == 7
    module.count = 0
    assert before.same_as(Mark(module))
    assert module.config.inner.mask is mask


def test_only_what_is_not_wanted_is_forgotten() -> None:
    module = Holds()
    attributes = Attributes(module)
    graph = torch.ones(2, requires_grad=True) * 2
    module.by_length.update({3: graph, 4: torch.ones(4), 5: [graph]})
    module.nested["list"][1]["deep"] = (graph, 2)
    module.kept = graph
    module.config.found = {"x": graph}
    module.table = graph
    module.number = 9.0
    places = places_of(module, has_graph)
    assert len(places) == 6
    attributes.forget(places)
    assert places_of(module, has_graph) == []
    assert module.by_length[3].grad_fn is None
    assert 4 in module.by_length
    assert module.number == 9.0
    assert not hasattr(module, "kept")
    assert len(module.table) == 1000


@pytest.mark.parametrize(
    "draw", [lambda: torch.rand(1), random.random, np.random.rand, lambda: nn.functional.dropout(torch.ones(2))]
)
def test_random_numbers_that_are_drawn_are_told_and_drawn_again(draw: Callable[[], Any]) -> None:
    before = RandomState()
    assert before == RandomState()
    first = draw()
    assert before != RandomState()
    before.restore()
    assert before == RandomState()
    assert np.array_equal(np.asarray(first), np.asarray(draw()))
