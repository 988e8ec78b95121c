"""Linear layers with oneDNN: torch's numbers, whoever differentiates or vmaps them, and torch's own way for all else."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from moe.schema import BatchTensorProto
from moe.server import matmul
from moe.server.expert_backend import ExpertBackend
from moe.server.matmul import OneDnnLinear, onednn_is_faster, speed_up_linear

I, O = 24, 40  # noqa: E741


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of the products that oneDNN has computed; it is used from two rows of a layer on, and taken for the faster one."""
    computed: list[int] = []

    def counted(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        computed.append(x.numel() // x.shape[-1])
        return onednn(x, weight, bias)

    onednn = matmul._onednn
    monkeypatch.setattr(matmul, "_onednn", counted)
    monkeypatch.setattr(matmul, "MIN_PRODUCT", 2 * I * O)
    monkeypatch.setattr(matmul, "onednn_is_faster", lambda: True)
    return computed


def make_pair(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """A layer of ours, and the same as torch has it."""
    torchs = nn.Linear(I, O, bias=bias)
    ours = copy.deepcopy(torchs)
    speed_up_linear(ours)
    assert type(ours) is OneDnnLinear
    assert type(torchs) is nn.Linear
    return ours, torchs


def passes(layer: nn.Linear, x: torch.Tensor, call: Callable[..., torch.Tensor] | None = None) -> list[torch.Tensor]:
    """Outputs, and gradients of the input and all parameters."""
    leaf = x.clone(memory_format=torch.preserve_format).requires_grad_()
    outputs = (call or layer)(leaf)
    grad = torch.linspace(-1, 1, outputs.numel()).reshape(outputs.shape)
    return [outputs.detach(), *torch.autograd.grad(outputs, [leaf, *layer.parameters()], grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(2, I), (7, I), (3, 5, I), (2, 2, 2, I)])
def test_results_and_gradients_are_torchs(products: list[int], shape: tuple[int, ...], bias: bool) -> None:
    ours, torchs = make_pair(bias)
    x = torch.randn(shape)
    assert_close(passes(ours, x), passes(torchs, x), rtol=1e-5, atol=1e-5)
    rows = x.numel() // I
    assert products == [rows, rows, O]  # the last one, of the weights, has its inputs transposed


def test_memory_layout_does_not_matter(products: list[int]) -> None:
    ours, torchs = make_pair()
    for x in (
        torch.randn(I, 6).T,
        torch.randn(6, 2 * I)[:, ::2],
        torch.randn(1, I).expand(6, I),
        torch.randn(4, 3, I).mT.mT,
    ):
        assert_close(passes(ours, x), passes(torchs, x), rtol=1e-5, atol=1e-5)
        sums = []
        for layer in (ours, torchs):
            leaf = x.detach().requires_grad_()
            sums.append(torch.autograd.grad(layer(leaf).sum(), [leaf, layer.weight]))  # an expanded gradient
        assert_close(*sums, rtol=1e-5, atol=1e-5)
    assert len(products) == 4 * 6


def test_only_gradients_that_are_wanted_are_computed(products: list[int]) -> None:
    ours, _ = make_pair()
    ours(torch.randn(3, I)).sum().backward()
    assert products == [3, O]
    ours.requires_grad_(False)
    ours(torch.randn(3, I, requires_grad=True)).sum().backward()
    assert products == [3, O, 3, 3]


def test_it_can_be_differentiated_twice(products: list[int]) -> None:
    results = []
    for layer in make_pair():
        leaf = torch.linspace(-1, 1, 4 * I).reshape(4, I).requires_grad_()
        (grad,) = torch.autograd.grad(layer(leaf).sin().sum(), leaf, create_graph=True)
        results.append(torch.autograd.grad(grad.pow(2).sum(), [leaf, layer.weight]))
    assert_close(*results, rtol=1e-5, atol=1e-5)
    assert products


def test_many_callers_of_one_layer_are_one_product(products: list[int]) -> None:
    ours, torchs = make_pair()
    x = torch.randn(6, 1, I)  # one row each: too small alone
    assert_close(passes(ours, x, torch.func.vmap(ours)), passes(torchs, x), rtol=1e-5, atol=1e-5)
    assert products == [6, 6, O]


def test_many_layers_of_one_class_are_left_to_torch(products: list[int]) -> None:
    ours, torchs = make_pair()
    weights = {name: torch.stack([p.detach(), p.detach() + 1]) for name, p in torchs.named_parameters()}

    def run(layer: nn.Linear) -> torch.Tensor:
        call = torch.func.vmap(lambda own, x: torch.func.functional_call(layer, own, x))
        outputs: torch.Tensor = call(weights, torch.ones(2, 5, I))
        return outputs

    assert torch.equal(run(ours), run(torchs))
    assert products == []


def test_what_is_small_or_of_another_kind_is_left_to_torch(products: list[int]) -> None:
    ours, torchs = make_pair()
    assert torch.equal(ours(torch.ones(1, I)), torchs(torch.ones(1, I)))
    assert ours(torch.ones(0, I)).shape == (0, O)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ours(torch.ones(5, I)).dtype == torch.bfloat16
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ours(torch.ones(5, 2 * I))
    for dtype in (torch.float64, torch.bfloat16):
        x = torch.ones(5, I, dtype=dtype)
        assert torch.equal(ours.to(dtype)(x), torchs.to(dtype)(x))
    assert ours.to("meta")(torch.ones(5, I, device="meta", dtype=torch.bfloat16)).device.type == "meta"
    assert products == []

    class Own(nn.Linear):
        pass

    own = nn.Sequential(Own(I, O), nn.MultiheadAttention(I, 1))
    kinds = [type(module) for module in own.modules()]
    speed_up_linear(own)
    assert [type(module) for module in own.modules()] == kinds


def test_an_expert_trains_with_it_as_without(products: list[int]) -> None:
    module = nn.Sequential(nn.Linear(I, O), nn.ReLU(), nn.Linear(O, I))
    twin = copy.deepcopy(module)
    proto = BatchTensorProto(I)
    backend = ExpertBackend(
        "e.0", module, torch.optim.SGD(module.parameters(), lr=0.1), args_schema=(proto,), outputs_schema=proto
    )
    x, grad = torch.randn(8, I), torch.randn(8, I)
    assert_close(backend.forward(x)[0], twin(x), rtol=1e-5, atol=1e-5)
    backend.backward(x, grad)
    twin(x).backward(grad)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_close(backend.state_dict()["module"], dict(twin.state_dict()), rtol=1e-5, atol=1e-5)
    assert len(products) == 2 + 2 + 4


def test_where_it_does_not_help_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*tensors: torch.Tensor | None) -> torch.Tensor:
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute '_linear_pointwise'")

    def slow(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return sum((nn.functional.linear(x, weight, bias) for _ in range(3)), torch.zeros(())) / 3

    def wrong(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return torch.zeros(len(x), len(weight))

    for other in (missing, slow, wrong):
        monkeypatch.setattr(matmul, "_onednn", other)
        onednn_is_faster.cache_clear()
        layer = nn.Linear(I, O)
        speed_up_linear(layer)
        assert type(layer) is nn.Linear
    onednn_is_faster.cache_clear()
