"""Whether one may train with gradients: all that optimizers cannot digest is found, nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from moe.server.gradients import add, usable

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_among_many_is_found(dtype: torch.dtype, value: float) -> None:
    gradient = torch.randn(300, 40).to(dtype)
    assert usable([torch.ones(2), gradient])
    gradient[123, 7] = value
    assert not usable([torch.ones(2), gradient])
    gradient[124, 7] = -value  # what would cancel out
    assert not usable([gradient])


def test_what_an_optimizer_cannot_square_is_found() -> None:
    assert usable([torch.full((10,), 1e10)])
    assert not usable([torch.full((10,), 1e30)])
    assert not usable([torch.full((10,), 1e30, dtype=torch.bfloat16)])


def test_ordinary_gradients_of_half_precision_are_usable() -> None:
    assert usable([torch.full((1000, 1000), 60000.0, dtype=torch.float16)])


def test_odd_ones() -> None:
    assert usable([])
    assert usable([torch.empty(0, 3), torch.tensor(1.0), torch.ones(3, dtype=torch.complex64)])
    assert usable([torch.ones(3).to_sparse()])
    assert not usable([torch.tensor([0.0, math.nan]).to_sparse()])


def test_sums() -> None:
    one, sparse = torch.ones(2), torch.tensor([0.0, 2.0]).to_sparse()
    assert add(None, None) is None
    assert add(one, None) is one
    assert add(None, one) is one
    for first, second in ((one.clone(), sparse), (sparse, one.clone()), (one.clone(), torch.tensor([0.0, 2.0]))):
        total = add(first, second)
        assert total is not None
        assert total.to_dense().tolist() == [1, 3]
    both = add(sparse, sparse)
    assert both is not None
    assert both.to_dense().tolist() == [0, 4]
