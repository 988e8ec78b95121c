"""Digests of unchanged tensors are computed once, and of changed ones again, in whichever way they have changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.client.digests import Digests, _checksum
from moe.schema import Compression, digest
from moe.wire.tensors import decode_tensor, encode_tensor


def matrix(rows: int = 64, columns: int = 64) -> torch.Tensor:
    return torch.randn(rows, columns)


def test_an_unchanged_tensor_is_digested_once() -> None:
    digests, tensor = Digests(), matrix().requires_grad_()
    assert {digests.of(tensor), digests.of(tensor.detach()), digests.of(tensor.data)} == {digest(tensor)}
    assert repr(digests) == "Digests(1 known, 1 computed)"


def test_a_look_computes_nothing() -> None:
    digests, tensor = Digests(), matrix()
    assert digests.look(tensor) == digests.look(tensor)
    assert digests.look(tensor)[1:] == (None, False)
    assert digests.computed == 0


def step(tensor: torch.Tensor) -> None:
    with torch.no_grad():
        tensor.sub_(0.1)


def step_uncounted(tensor: torch.Tensor) -> None:
    tensor.data -= 0.1


def one_value_uncounted(tensor: torch.Tensor) -> None:
    tensor.data[17, 3] += 1e-3


def swap_rows_uncounted(tensor: torch.Tensor) -> None:
    tensor.data.copy_(tensor.data.flip(0))


def swap_columns_uncounted(tensor: torch.Tensor) -> None:
    tensor.data.copy_(tensor.data.flip(1))


def through_numpy(tensor: torch.Tensor) -> None:
    tensor.detach().numpy()[5] = 0


def other_memory(tensor: torch.Tensor) -> None:
    tensor.data = torch.randn(64, 64)


CHANGES = [
    step, step_uncounted, one_value_uncounted, swap_rows_uncounted, swap_columns_uncounted, through_numpy, other_memory,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_tensor_has_another_digest(change: Callable[[torch.Tensor], None]) -> None:
    digests, tensor = Digests(), matrix()
    before = digests.of(tensor)
    seen = digests.look(tensor)
    assert seen.digest == before
    change(tensor)
    after = digests.look(tensor)
    assert (after.digest, after.changed) == (None, change is not other_memory)
    assert after.mark != seen.mark
    assert digests.of(tensor) == digest(tensor) != before
    assert digests.look(tensor) == (after.mark, digest(tensor), False)
    assert digests.computed == 2


def test_another_tensor_at_the_same_address_is_another_tensor() -> None:
    digests, memory = Digests(), bytearray(2**14)
    for value in range(3):
        tensor = torch.frombuffer(memory, dtype=torch.float32)
        tensor.fill_(value)
        assert digests.look(tensor) == (digests.look(tensor).mark, None, False)
        assert digests.of(tensor) == digest(tensor)
        del tensor


def test_views_of_one_memory_are_told_apart() -> None:
    digests, tensor = Digests(), torch.arange(4096)
    views = [
        tensor, tensor[:2048], tensor[2048:], tensor.view(64, 64), tensor.view(64, 64).T, tensor.view(torch.float64),
        tensor[1:], tensor[::2],
    ]  # fmt: skip
    for view in views * 2:
        assert digests.of(view) == digest(view)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.bool])
def test_all_dtypes(dtype: torch.dtype) -> None:
    digests = Digests()
    for size in (0, 1, 513, 5000):
        tensor = torch.ones(size).to(dtype)
        assert digests.of(tensor) == digests.of(tensor) == digest(tensor)


def test_tensors_of_inference_mode_have_no_version_and_are_digested_each_time() -> None:
    digests = Digests()
    with torch.inference_mode():
        tensor = matrix()
    assert digests.of(tensor) == digests.of(tensor) == digest(tensor)
    assert digests.computed == 2


@pytest.mark.parametrize("codec", [Compression.FLOAT16, Compression.MEANSTD_16BIT])
def test_what_travels_compressed_is_digested_as_it_arrives(codec: Compression) -> None:
    digests, tensor = Digests(), matrix()
    arrived = decode_tensor(encode_tensor(tensor, codec))
    assert digests.of(tensor, codec) == digests.of(tensor, codec) == digest(arrived) != digest(tensor)
    assert digests.of(tensor) == digest(tensor)
    assert digests.computed == 2


def test_only_so_many_are_remembered() -> None:
    digests, tensors = Digests(max_known=2), [matrix() for _ in range(3)]
    for tensor in tensors:
        digests.of(tensor)
    assert repr(digests) == "Digests(2 known, 3 computed)"
    digests.of(tensors[0])
    assert digests.computed == 4


@given(st.integers(0, 3000), st.data())
@settings(max_examples=60)
def test_a_checksum_tells_any_one_byte(size: int, data: st.DataObject) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
    other = tensor.clone()
    assert _checksum(tensor) == _checksum(other)
    if size:
        other[data.draw(st.integers(0, size - 1))] += 1
        assert _checksum(tensor) != _checksum(other)


def test_a_checksum_tells_where_bytes_are() -> None:
    tensor = torch.zeros(64 * 4096, dtype=torch.uint8)
    seen = set()
    for position in (0, 1, 8, 4095, 4096, 4104, 2 * 4096, 64 * 4096 - 1):
        tensor.zero_()[position] = 1
        seen.add(_checksum(tensor))
    assert len(seen) == 8
