"""Chains: which tensor each block takes, what fits together, and how far back a backward has to go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe.chains import Block, Chain
from moe.errors import SchemaError
from moe.schema import MAX_TENSORS, BatchTensorProto, ExpertSchema, TensorProto

B, T = BatchTensorProto, TensorProto


def schema(wide: int = 4, out: int = 4, **kwargs: Any) -> ExpertSchema:
    options = {"optional": tuple(kwargs), **kwargs.pop("options", {})}
    return ExpertSchema((B(None, wide),), kwargs, B(None, out), [n for n in options["optional"] if n in kwargs])


LORA = schema(a=T(4, None), mask=B(None, dtype=torch.bool))
PLAIN = schema()


def block(name: str, of: ExpertSchema, *kwargs: int, present: tuple[str, ...] = ()) -> Block:
    return Block(name, of, present, kwargs)


def three(*, present: tuple[str, ...] = ("a", "mask")) -> Chain:
    """One mask for all; the first two share an adapter, the third has its own."""
    return Chain([block(f"b.{i}", LORA, a, 2, present=present) for i, a in enumerate([1, 1, 3])])


def test_a_shared_tensor_has_one_position_and_all_its_users() -> None:
    chain = three()
    assert [len(users) for users in chain.users] == [1, 2, 3, 1]
    assert [entry.path for entry in chain.entries] == [
        "args[0]", "b.0: kwargs['a']", "b.0: kwargs['mask']", "b.2: kwargs['a']",
    ]  # fmt: skip
    assert chain.gradient_entries[0].path == "grad_outputs"
    assert (len(chain), chain.args, chain.mergeable) == (3, 1, True)
    assert repr(chain) == "Chain(b.0 b.1 b.2, 4 tensors)"


def test_a_call_of_one_expert_is_a_chain_of_one() -> None:
    chain = Chain.single("b.0", LORA, ("mask", "a"))
    assert chain.entries == LORA.input_entries(("a", "mask"))
    assert chain.blocks[0].kwargs == (1, 2)


def test_inputs_of_a_block_are_what_came_before_and_its_own_kwargs_in_its_dtype() -> None:
    half = ExpertSchema((B(None, 4, dtype=torch.bfloat16),), {}, B(None, 4))
    chain = Chain([block("b.0", LORA, 1, present=("a",)), block("b.1", half)])
    tensors = [torch.ones(2, 3, 4), torch.zeros(4, 2)]
    assert chain.inputs_of(0, tensors[:1], tensors)[1] is tensors[1]
    (value,) = chain.inputs_of(1, tensors[:1], tensors)
    assert value.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("blocks", "problem"),
    [
        ([block("b.0", LORA, 1, present=("a", "mask"))], "b.0: expected 2 tensors of kwargs, got positions of 1"),
        ([block("b.0", LORA, 0, present=("a",))], r"position 0 is an arg's"),
        ([block("b.0", LORA, 2, present=("a",))], "a tensor at position 2, but only 2 tensors are used"),
        ([block("b.0", LORA, 4095, present=("a",))], "a tensor at position 4095"),
        ([block("b.0", LORA, 1, 1, present=("a", "mask"))], "batched for one of them only"),
        ([block("b.0", LORA, present=("nonsense",))], "nonsense"),
        ([block("b.0", schema(4, 5)), block("b.1", PLAIN)], r"b.1 takes .*any, 4.* but b.0 before it returns .*any, 5"),
        ([block("b.0", PLAIN), block("b.1", ExpertSchema((), {"x": B()}, B()), 1)], "b.1 takes"),
        ([block("b.0", PLAIN), block("b.1", ExpertSchema((B(4),), {}, B()))], "b.1 takes"),
        ([block("b.0", PLAIN), block("b.1", ExpertSchema((T(None, 4),), {}, B()))], "b.1 takes"),
        ([block("b.0", PLAIN), block("b.1", ExpertSchema((B(None, 4, dtype=torch.int64),), {}, B()))], "b.1 takes"),
    ],
)
def test_what_makes_no_sense_is_refused(blocks: list[Block], problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        Chain(blocks)


def test_the_tensors_of_a_request_are_bounded() -> None:
    many = schema(**{f"k{i}": T() for i in range(MAX_TENSORS // 2)})
    names = many.optional
    half = MAX_TENSORS // 2
    blocks = [Block(f"b.{i}", many, names, tuple(range(1 + i * half, 1 + (i + 1) * half))) for i in range(2)]
    with pytest.raises(SchemaError, match="4097 tensors in one request"):
        Chain(blocks)


def test_a_tuple_of_outputs_is_several_args() -> None:
    two = ExpertSchema((B(4), B(3)), {}, (B(4), B(3)))
    assert Chain([block("b.0", two), block("b.1", two)]).args == 2
    with pytest.raises(SchemaError, match="b.1 takes"):
        Chain([block("b.0", two), block("b.1", ExpertSchema((B(4),), {}, B(4)))])


def test_a_global_output_cannot_be_split_by_rows() -> None:
    loud = ExpertSchema((B(4), T()), {}, (B(4), T()))
    assert not Chain([block("b.0", loud), block("b.1", loud)]).mergeable


@pytest.mark.parametrize(
    ("wants", "trainable", "expected"),
    [
        ((True, False, False, False), (False,) * 3, 0),
        ((False, True, False, False), (False,) * 3, 0),
        ((False, False, False, True), (False,) * 3, 2),
        ((False, False, False, True), (False, True, False), 1),
        ((False,) * 4, (False,) * 3, 3),
    ],
)
def test_backward_goes_no_further_than_needed(
    wants: tuple[bool, ...], trainable: tuple[bool, ...], expected: int
) -> None:
    assert three().first_needed(wants, trainable) == expected


def test_a_block_is_asked_for_the_gradients_that_are_needed() -> None:
    chain = three()
    wants = (False, False, False, True)
    assert chain.wants_of(2, wants, first_needed=2) == (False, True, False)
    assert chain.wants_of(2, wants, first_needed=1) == (True, True, False)
    assert chain.wants_of(1, wants, first_needed=1) == (False, False, False)
    assert chain.wants_of(0, (True, True, False, True), first_needed=0) == (True, True, False)


@given(st.integers(0, 3), st.integers(1, 4))
def test_a_part_takes_only_its_own_tensors(start: int, count: int) -> None:
    positions = [(1, 2), (1, 3), (4, 2), (1, 5)]
    chain = Chain([block(f"b.{i}", LORA, *p, present=("a", "mask")) for i, p in enumerate(positions)])
    part, used = chain.part(start, min(4, start + count))
    for mine, theirs in zip(part.blocks, chain.blocks[start:]):
        assert mine.uid == theirs.uid
        assert [used[p - part.args] for p in mine.kwargs] == list(theirs.kwargs)
    assert len(part.users) == part.args + len(used)
