"""Stock hivemind's clients, in their own process, against our server."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe import Server
from moe.server.expert_backend import ExpertBackend
from tests.interop.conftest import OUR_FROZEN_UIDS, OUR_TRAINED_UIDS, OUR_UIDS
from tests.interop.experts import (
    HIDDEN,
    KINDS,
    assert_close,
    assert_state_close,
    best_experts,
    dense_mixture,
    reference,
    run,
)
from tests.interop.peers import StockError, StockPeer

PROMPT_S = 2.0  # within which bad input is answered

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),  # in hivemind's UNIFORM_8BIT
    pytest.mark.timeout(240),  # the first test starts everybody
]


def call(stock: StockPeer, uid: str, *args: Any, grad_outputs: Any = None, **kwargs: Any) -> dict[str, Any]:
    """Outputs and gradients that a stock RemoteExpert gives."""
    result: dict[str, Any] = stock.ask("call", uid, list(args), kwargs, grad_outputs)
    return result


def train(
    stock: StockPeer, backend: ExpertBackend, args: Any, kwargs: dict[str, Any], tolerance: float = 0.0
) -> dict[str, Any]:
    """Let a stock client go forward and backward; see that all is as it would be here, and that it trained once."""
    expected, updates = reference(backend.module, args, kwargs), backend.updates
    actual = call(stock, backend.name, *args, grad_outputs=expected.grad_outputs, **kwargs)
    assert_close(actual["outputs"], expected.result.outputs, tolerance)
    assert_close(actual["input_grads"], expected.result.input_grads, tolerance)
    assert backend.updates == updates + 1
    assert_state_close(dict(backend.module.state_dict()), expected.trained, tolerance)
    return actual


# --- one expert ----------------------------------------------------------------------------------------------------------


def test_stock_get_experts_finds_ours(stock: StockPeer, our_server: Server) -> None:
    uids = list(our_server.expert_backends)
    assert stock.ask("where", [*uids, "nobody.0"]) == [our_server.dht.peer_id.to_base58()] * len(uids) + [None]


@pytest.mark.parametrize("kind", KINDS)
def test_forward_and_backward(stock: StockPeer, our_server: Server, kind: str) -> None:
    args, kwargs = KINDS[kind].inputs(rows=3)  # the wide expert's reply: 3 MiB, unary
    train(stock, our_server.expert_backends[OUR_UIDS[kind]], args, kwargs, KINDS[kind].tolerance)


def test_codecs_are_used_on_the_way_back(stock: StockPeer, our_server: Server) -> None:
    x = torch.randn(64, HIDDEN)
    (half,) = call(stock, OUR_UIDS["FLOAT16"], x)["outputs"]
    assert torch.equal(half, half.half().float())
    for codec in ("UNIFORM_8BIT", "QUANTILE_8BIT"):
        (output,) = call(stock, OUR_UIDS[codec], x)["outputs"]
        assert len(output.unique()) <= 256


@pytest.mark.parametrize("kind", ["plain", "FLOAT16"])
def test_streamed(stock: StockPeer, our_server: Server, kind: str) -> None:
    args, kwargs = KINDS[kind].inputs(rows=80_000)  # 5 MB each way, in two chunks
    train(stock, our_server.expert_backends[OUR_UIDS[kind]], args, kwargs, KINDS[kind].tolerance)


def test_a_reply_too_large_for_a_unary_call_is_refused_in_words(stock: StockPeer, our_server: Server) -> None:
    with pytest.raises(StockError, match="too large for a unary") as error:
        call(stock, OUR_UIDS["wide"], torch.randn(5, 1))  # 5 MiB; a stock client only looks at its request
    assert error.value.seconds < PROMPT_S
    assert call(stock, OUR_UIDS["wide"], torch.randn(1, 1))["outputs"][0].shape == (1, 2**18)


def test_trains_although_no_input_requires_a_gradient(stock: StockPeer, our_server: Server) -> None:
    backend = our_server.expert_backends[OUR_UIDS["plain"]]
    x = torch.randn(4, HIDDEN)
    expected, updates = reference(backend.module, (x,), {}), backend.updates
    actual = stock.ask("call", backend.name, [x], {}, expected.grad_outputs, inputs_require_grad=False)
    assert actual["input_grads"] == [None]
    assert backend.updates == updates + 1
    assert_state_close(dict(backend.module.state_dict()), expected.trained)


def test_nested_inputs_and_integer_outputs(stock: StockPeer, our_server: Server) -> None:
    a, b, c = torch.randn(3, 5, HIDDEN)
    backend = our_server.expert_backends["our_structured.0"]
    actual = train(stock, backend, ({"a": a, "b": b}, [c]), {})
    assert actual["outputs"][1].dtype == torch.int64


def test_s8_optional_globals_are_left_out_for_stock_clients(stock: StockPeer, our_server: Server) -> None:
    assert stock.ask("keyword_names", "our_optional_globals.0") == []
    train(stock, our_server.expert_backends["our_optional_globals.0"], (torch.randn(4, HIDDEN),), {})


@pytest.mark.parametrize("names", [["scale"], ["scale", "other"], []])
def test_required_globals_fail_before_sending(stock: StockPeer, our_server: Server, names: list[str]) -> None:
    requests = our_server.handler.requests
    with pytest.raises(StockError, match=r"cannot be called by stock hivemind: kwargs\['scale'\]"):
        call(stock, "our_required_globals.0", torch.randn(4, HIDDEN), **dict.fromkeys(names, torch.ones(HIDDEN)))
    assert our_server.handler.requests == requests


def bad(problem: str, rows: int) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], str]:
    """Inputs of the expert with masks, one of them wrong, and what the answer must contain."""
    (x, mask), kwargs = KINDS["masks"].inputs(rows)
    match problem:
        case "size":
            return [x[:, 1:], mask], kwargs, r"args\[0\].*16.*15"
        case "dimensions":
            return [x, mask[0]], kwargs, r"args\[1\]"
        case "dtype":
            return [x.double(), mask], kwargs, r"args\[0\].*float32.*float64"
        case "integer dtype":
            return [x, mask.int()], kwargs, r"args\[1\].*int64.*int32"
        case "rows":
            return [x, mask[1:]], kwargs, r"args\[1\].*rows"
        case _:
            return [x, mask], {"negate": kwargs["negate"][1:]}, r"kwargs\['negate'\].*rows"


@pytest.mark.parametrize("rows", [4, 15_000], ids=["unary", "streamed"])
@pytest.mark.parametrize("problem", ["size", "dimensions", "dtype", "integer dtype", "rows", "rows of a kwarg"])
def test_bad_inputs_are_answered_at_once_and_the_server_lives_on(
    stock: StockPeer, our_server: Server, problem: str, rows: int
) -> None:
    backend = our_server.expert_backends[OUR_UIDS["masks"]]
    bad_args, bad_kwargs, answer = bad(problem, rows)
    updates = backend.updates
    with pytest.raises(StockError, match=answer) as error:
        call(stock, backend.name, *bad_args, **bad_kwargs)
    assert error.value.seconds < PROMPT_S
    assert our_server.is_healthy()
    args, kwargs = KINDS["masks"].inputs(4)
    assert_close(call(stock, backend.name, *args, **kwargs)["outputs"], run(backend.module, args, kwargs).outputs)
    assert backend.updates == updates


def test_bad_gradients_are_answered_at_once_and_nothing_is_trained(stock: StockPeer, our_server: Server) -> None:
    backend = our_server.expert_backends[OUR_UIDS["plain"]]
    before = {name: tensor.clone() for name, tensor in backend.module.state_dict().items()}
    x = torch.randn(4, HIDDEN)
    with pytest.raises(StockError, match=r"grad_outputs.*rows") as error:
        stock.ask("raw_backward", backend.name, [x, torch.randn(5, HIDDEN)])
    assert error.value.seconds < PROMPT_S
    with pytest.raises(StockError, match=r"expected 2 tensors.*got 1") as error:
        stock.ask("raw_backward", backend.name, [x])
    assert error.value.seconds < PROMPT_S
    assert_state_close(dict(backend.module.state_dict()), before)


def test_unknown_expert(stock: StockPeer, our_server: Server) -> None:
    with pytest.raises(StockError, match=r"no expert 'nobody\.0' here") as error:
        stock.ask("call_at", "nobody.0", our_server.dht.peer_id.to_base58(), torch.randn(2, HIDDEN))
    assert error.value.seconds < PROMPT_S


# --- mixtures ------------------------------------------------------------------------------------------------------------

GRIDS = [("flat.", (4,)), ("grid.", (2, 3)), ("cube.", (4, 3, 2))]


def alive(prefix: str) -> list[str]:
    return [uid for uid in OUR_FROZEN_UIDS if uid.startswith(prefix)]


@pytest.mark.parametrize("negative_caching", [False, True])
@pytest.mark.parametrize(("prefix", "grid_size"), GRIDS)
def test_beam_search(stock: StockPeer, prefix: str, grid_size: tuple[int, ...], negative_caching: bool) -> None:
    uids = alive(prefix)
    scores = [torch.randn(5, size) for size in grid_size]
    plain = [rows.tolist() for rows in scores]
    options = {"negative_caching": negative_caching}
    found = stock.ask("beam_search", prefix, plain, len(uids), options)
    assert found == best_experts(uids, scores, len(uids))


@pytest.mark.parametrize(("prefix", "grid_size"), GRIDS)
def test_mixture_equals_a_local_one(
    stock: StockPeer, our_server: Server, prefix: str, grid_size: tuple[int, ...]
) -> None:
    uids = alive(prefix)
    k_best = len(uids)  # a beam search narrower than the experts may miss some of the best
    x, grad = torch.randn(2, 4, HIDDEN)
    actual = stock.ask("mixture", prefix, list(grid_size), k_best, x, grad, switch=False)
    x.requires_grad_()
    weight, bias = actual["weight"].requires_grad_(), actual["bias"].requires_grad_()
    experts = {uid: our_server.expert_backends[uid].module for uid in uids}
    expected = dense_mixture(experts, x, weight, bias, grid_size, k_best)
    grads = torch.autograd.grad(expected, [x, weight], grad)
    assert_close([actual["output"], actual["grad"], actual["weight_grad"]], [expected.detach(), *grads])


def test_switch_mixture(stock: StockPeer, our_server: Server) -> None:
    uids = alive("grid.")
    x, grad = torch.randn(2, 4, HIDDEN)
    actual = stock.ask("mixture", "grid.", [2, 3], 1, x, grad, switch=True)
    scores = torch.nn.functional.linear(x, actual["weight"], actual["bias"]).split([2, 3], dim=-1)
    probabilities = [score.softmax(-1).amax(-1) for score in scores]
    chosen = best_experts(uids, scores, 1)
    outputs = torch.stack([our_server.expert_backends[uid].module(row) for (uid,), row in zip(chosen, x)])
    expected = probabilities[0].mul(probabilities[1]).unsqueeze(-1) * outputs + x
    assert_close([actual["output"]], [expected.detach()])
    assert actual["balancing_loss"].isfinite()


def test_training_a_mixture_trains_our_experts(stock: StockPeer, our_server: Server) -> None:
    backends = [our_server.expert_backends[uid] for uid in OUR_TRAINED_UIDS]
    before = [backend.backward_pool.statistics().rows for backend in backends]
    x = torch.randn(8, HIDDEN)
    target = torch.tanh(x.flip(-1))
    losses = stock.ask("train_mixture", "trained.", [2, 2], 2, x, target, steps=15)
    assert losses[-1] < 0.9 * losses[0]
    rows = [backend.backward_pool.statistics().rows - before_ for backend, before_ in zip(backends, before)]
    assert sum(rows) == 15 * 8 * 2  # every backward arrived, once
