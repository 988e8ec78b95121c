"""Whose memory a tensor is: what is lent never changes, what is owned is nobody else's, and ordinary answers are not copied."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from moe.server.ownership import held_elsewhere, lend, lends_for_nothing, own, plain, storage_of


class Returns(nn.Module):
    """Has a buffer, and can keep something."""

    out: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("out", torch.zeros(8, 4))
        self.kept: Any = None
        self.array = np.zeros((4, 4), dtype=np.float32)

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        self.kept = tensor
        return tensor


FRESH: dict[str, Callable[[Returns, torch.Tensor], Any]] = {
    "computed": lambda m, x: [x * 2],
    "a layer's": lambda m, x: [m.linear(x)],
    "reshaped": lambda m, x: [(x * 2).reshape(-1)],
    "a part of it": lambda m, x: [torch.randn(20, 4)[: len(x)]],
    "halves": lambda m, x: list((x * 2).chunk(2)),
    "twice": lambda m, x: [x * 2] * 2,
    "a view of a view": lambda m, x: [(x * 2).view(-1)[2:6].view(2, 2)],
    "detached": lambda m, x: [m.linear(x).detach()],
    "several": lambda m, x: [x * 2, x.argmax(-1), x.sum()],
}
HELD: dict[str, Callable[[Returns, torch.Tensor], Any]] = {
    "a buffer": lambda m, x: [m.out],
    "a part of a buffer": lambda m, x: [m.out[: len(x)]],
    "a transposed buffer": lambda m, x: [m.out.T],
    "an expanded parameter": lambda m, x: [m.linear.bias.expand(len(x), 4)],
    "a parameter": lambda m, x: [m.linear.weight],
    "a detached buffer": lambda m, x: [m.out.detach()],
    "an input": lambda m, x: [x],
    "a part of an input": lambda m, x: [x[1:]],
    "kept": lambda m, x: [m.keep(x * 2)],
    "a view of what is kept": lambda m, x: [m.keep(x * 2).view(-1)],
    "a kept view": lambda m, x: [m.keep((x * 2).view(-1))],
    "what a kept view is of": lambda m, x: (lambda y: [y] if m.keep(y[:1]) is not None else [])(x * 2),
    "kept in a list": lambda m, x: [m.keep([x * 2])[0]],  # type: ignore[arg-type]
    "NumPy's": lambda m, x: [torch.from_numpy(m.array)],
    "a ctypes array's": lambda m, x: [torch.frombuffer((ctypes.c_float * 16)(), dtype=torch.float32)],
    "two of one buffer": lambda m, x: [m.out[:4], m.out[:4].detach()],
    "written to with out=": lambda m, x: [torch.mul(x, 2, out=m.out[: len(x)])],
}


@pytest.mark.parametrize("what", FRESH)
def test_answers_in_memory_of_their_own_are_not_copied(what: str) -> None:
    with torch.no_grad():
        outputs = FRESH[what](Returns(), torch.randn(4, 4))
        before = [storage_of(output) for output in outputs]
        assert not any(held_elsewhere(outputs))
        assert [storage_of(output) for output in own(outputs)] == before


@pytest.mark.parametrize("what", HELD)
def test_answers_in_memory_of_others_are_copied(what: str) -> None:
    module, x = Returns(), torch.randn(4, 4)
    with torch.no_grad():
        outputs = HELD[what](module, x)
        expected = [output.clone() for output in outputs]
        before = [storage_of(output) for output in outputs]
        assert all(held_elsewhere(outputs))
        owned = own(outputs)
    for mine, theirs, storage in zip(owned, expected, before, strict=True):
        assert torch.equal(mine, theirs)
        assert mine.is_contiguous()
        assert storage_of(mine) != storage


def test_expanded_tensors_become_whole() -> None:
    (whole,) = own([torch.ones(1, 4).expand(3, 4)])
    assert whole.is_contiguous()
    assert torch.equal(whole, torch.ones(3, 4))


def test_none_stays_none_and_the_same_tensor_the_same() -> None:
    kept = torch.ones(2)
    first, nothing, second = own([kept, None, kept])
    assert nothing is None
    assert first is second
    assert first is not kept
    apart = own([kept, kept], apart=True)
    assert apart[0] is not apart[1]


def test_those_that_must_be_apart_are() -> None:
    halves = own(list(torch.arange(4.0).chunk(2)), apart=True)
    assert storage_of(halves[0]) != storage_of(halves[1])
    assert [half.tolist() for half in halves] == [[0, 1], [2, 3]]


def test_strides_may_be_left_as_they_are() -> None:
    transposed = torch.randn(3, 4).T
    (same,) = own([transposed.T.clone().T], contiguous=False)
    assert same.stride() == transposed.stride()
    (copied,) = own([transposed], contiguous=False)
    assert copied.stride() == transposed.stride()


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda t: t.mul_(2),
    "to data": lambda t: t.data.mul_(2),
    "to a view": lambda t: t[0].zero_(),
    "through NumPy": lambda t: t.numpy().fill(9),
    "with out=": lambda t: torch.add(t, 1, out=t),
    "by index": lambda t: t.__setitem__(0, 7),
    "set_": lambda t: t.set_(torch.zeros(9, dtype=torch.int64)),
}


@pytest.mark.parametrize("how", WRITES)
@pytest.mark.parametrize("whose", ["torch", "others", "inference"])
def test_writes_to_what_is_lent_reach_nobody(how: str, whose: str) -> None:
    if whose == "torch":
        tensor = torch.arange(6)
    elif whose == "others":
        tensor = torch.frombuffer(bytearray(np.arange(6).tobytes()), dtype=torch.int64)
    else:
        with torch.inference_mode():
            tensor = torch.arange(6)
    WRITES[how](lend(tensor))
    assert tensor.tolist() == list(range(6))


def test_what_is_lent_for_nothing() -> None:
    assert lends_for_nothing(torch.zeros(2**20))
    assert lends_for_nothing(torch.frombuffer(bytearray(2**10), dtype=torch.uint8))
    assert not lends_for_nothing(torch.frombuffer(bytearray(2**20), dtype=torch.uint8))


@pytest.mark.parametrize("whose", ["torch", "others"])
def test_gradients_flow_through_what_is_lent_also_if_it_is_written_to(whose: str) -> None:
    values = torch.arange(3.0)
    tensor = values if whose == "torch" else torch.frombuffer(bytearray(values.numpy().tobytes()), dtype=torch.float32)
    leaf = tensor.detach().requires_grad_()
    given = lend(leaf)
    given.mul_(2).relu_()
    given.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [0, 2, 2]
    assert torch.equal(leaf.detach(), values)


class Strange(torch.Tensor):
    @classmethod
    def __torch_function__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("not a tensor, really")


class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, shape)  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no memory")


@pytest.mark.parametrize(
    "make, problem",
    [
        (lambda: torch.eye(2).to_sparse(), "a torch.sparse_coo tensor"),
        (lambda: torch.eye(2).to_sparse_csr(), "a torch.sparse_csr tensor"),
        (lambda: torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged), "a NestedTensor"),
        (lambda: torch.eye(2).to_mkldnn(), "a torch._mkldnn tensor"),
        (lambda: torch.eye(2, device="meta"), "a meta tensor"),
        (lambda: Wrapper((2, 2)), "a Wrapper"),
    ],
)
@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*invariant")
def test_tensors_without_ordinary_memory_are_told(make: Callable[[], torch.Tensor], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        plain(make())


def test_tensors_of_other_classes_become_ordinary() -> None:
    conjugate = torch.complex(torch.ones(2), torch.ones(2)).conj()
    for tensor in (torch.ones(2).as_subclass(Strange), nn.Parameter(torch.ones(2)), conjugate, conjugate.imag):
        found = plain(tensor)
        assert type(found) is torch.Tensor
        assert found.numpy().shape == (2,) if not found.requires_grad else found.is_leaf is False
