"""Digests of unchanged tensors are computed once, and of changed ones again, in whichever way they have changed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe.client.digests import Digests
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


def test_contents_are_recognized_wherever_they_are() -> None:
    digests, tensor = Digests(), matrix()
    with torch.inference_mode():
        inferred = tensor.clone()
    copies = [tensor, inferred, tensor.T.contiguous().T, torch.nn.Parameter(tensor.clone()), tensor[None][0]]
    assert {digests.of(copy) for copy in copies} == {digest(tensor)}
    assert digests.computed == 1


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


# --- changes that sums do not see -----------------------------------------------------------------------------------------


def permuted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten()[torch.randperm(tensor.numel())].reshape(tensor.shape)


def two_swapped(tensor: torch.Tensor) -> torch.Tensor:
    i, j = torch.randperm(tensor.numel())[:2].tolist()
    flat = tensor.flatten().clone()
    flat[i], flat[j] = flat[j].item(), flat[i].item()
    return flat.reshape(tensor.shape)


def rectangle(tensor: torch.Tensor) -> torch.Tensor:
    (a, b), (c, d) = torch.randperm(len(tensor))[:2].tolist(), torch.randperm(tensor.shape[1])[:2].tolist()
    delta = torch.zeros_like(tensor)
    delta[a, c] = delta[b, d] = 1
    delta[a, d] = delta[b, c] = -1
    return tensor + delta


def signs_flipped(tensor: torch.Tensor) -> torch.Tensor:
    i, j = torch.randperm(tensor.numel())[:2].tolist()
    flat = tensor.flatten().clone()
    flat[[i, j]] = -flat[[i, j]]
    return flat.reshape(tensor.shape)


def rows_rolled(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.roll(1, 0)


def transposed(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.T.contiguous()


STRUCTURED = [permuted, two_swapped, rectangle, signs_flipped, rows_rolled, transposed]


@pytest.mark.parametrize("change", STRUCTURED)
@pytest.mark.parametrize("contents", ["permutation", "one-hot", "gauss"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_structured_changes_in_place_are_noticed(
    change: Callable[[torch.Tensor], torch.Tensor], contents: str, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    if contents == "permutation":
        tensor = torch.eye(128)[torch.randperm(128)]
    elif contents == "one-hot":
        tensor = torch.nn.functional.one_hot(torch.randint(128, (128,)), 128)
    else:
        tensor = torch.randn(128, 128) * 100
    tensor = tensor.to(dtype).contiguous()
    digests = Digests()
    for _ in range(20):
        before = digests.of(tensor)
        changed = change(tensor).to(dtype)
        different = changed.view(torch.uint8).ne(tensor.view(torch.uint8)).any().item()
        tensor.data.copy_(changed)
        assert (digests.of(tensor) != before) == different
        assert digests.of(tensor) == digest(tensor)


def test_values_that_compare_as_equal_or_never_are_told_apart_by_their_bits() -> None:
    digests, tensor = Digests(), torch.zeros(64, 64)
    words = tensor.view(torch.int32)
    seen = {digests.of(tensor)}
    for word in (-(2**31), 0x7FC00000, 0x7FC00001, -0x400000, 1):  # -0.0, three nans, the smallest subnormal
        words[3, 5] = word
        assert digests.of(tensor) == digest(tensor)
        seen.add(digests.of(tensor))
    assert len(seen) == 6


@given(st.integers(1, 3000), st.data())
@settings(max_examples=60, deadline=None)
def test_any_one_byte_is_noticed(size: int, data: st.DataObject) -> None:
    tensor = torch.randint(0, 256, (size,), dtype=torch.uint8)
    digests = Digests()
    before = digests.of(tensor)
    tensor.data[data.draw(st.integers(0, size - 1))] += 1
    assert digests.look(tensor).changed
    assert digests.of(tensor) == digest(tensor) != before


def test_what_is_changed_while_it_is_digested_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    digests, tensor = Digests(), matrix()
    seen = digests.look(tensor)

    def digest_and_change(arriving: torch.Tensor) -> bytes:
        arriving.data.zero_()
        return digest(arriving)

    monkeypatch.setattr("moe.client.digests.digest", digest_and_change)
    digests.compute(tensor, Compression.NONE, seen.mark)
    assert digests.look(tensor).digest is None
