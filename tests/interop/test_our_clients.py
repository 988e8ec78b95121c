"""Our clients against a stock hivemind Server, which runs in its own process."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn

from moe import (
    DHT,
    ClientConfig,
    ExpertNotFound,
    MoEBeamSearcher,
    RemoteExpert,
    RemoteMixtureOfExperts,
    RemoteSequential,
    SchemaError,
    get_experts,
)
from moe.client.expert import transport_of
from moe.expert_uid import ExpertInfo, PeerIDLike
from moe.transport.base import Call, ExpertTransport, Reply
from moe.wire.messages import ExpertDescription
from tests.interop.experts import (
    HIDDEN,
    KINDS,
    MAX_BATCH_SIZE,
    assert_close,
    assert_state_close,
    best_experts,
    dense_mixture,
    reference,
    run,
)
from tests.interop.peers import STOCK_GRID_UIDS, STOCK_UIDS, StockPeer

PROMPT_S = 2.0  # within which bad input is answered

pytestmark = [
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor"),  # in hivemind's UNIFORM_8BIT
    pytest.mark.timeout(240),  # the first test starts everybody
]


class Spy:
    """An ExpertTransport that counts what is sent."""

    def __init__(self, transport: ExpertTransport):
        self._transport = transport
        self.calls = 0

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        return await self._transport.info(peer, uid, timeout_s=timeout_s)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        self.calls += 1
        return await self._transport.call(peer, call, timeout_s=timeout_s)

    async def close(self) -> None:
        """The transport is not ours to close."""


def find(dht: DHT, kind: str) -> RemoteExpert:
    """A stock server's expert."""
    (expert,) = get_experts(dht, [STOCK_UIDS[kind]])
    assert isinstance(expert, RemoteExpert)
    return expert


def spied(dht: DHT, kind: str) -> tuple[RemoteExpert, Spy]:
    """The same, and what counts its calls."""
    found, spy = find(dht, kind), Spy(transport_of(dht))
    return RemoteExpert(ExpertInfo(found.uid, found.peer_id), spy), spy


def module_of(stock: StockPeer, uid: str, kind: str) -> nn.Module:
    """A copy of what a stock server hosts."""
    module = KINDS[kind].make()
    module.load_state_dict(stock.ask("state", uid))
    return module


# --- one expert ----------------------------------------------------------------------------------------------------------


def test_our_get_experts_finds_stock_ones(our_dht: DHT, stock: StockPeer) -> None:
    *found, absent = get_experts(our_dht, [*STOCK_UIDS.values(), "nobody.0"])
    assert [expert.peer_id.to_base58() for expert in found] == [stock.server_id] * len(STOCK_UIDS)
    assert absent is None


@pytest.mark.parametrize("kind", STOCK_UIDS)
def test_forward_and_backward(our_dht: DHT, stock: StockPeer, kind: str) -> None:
    args, kwargs = KINDS[kind].inputs(rows=3)  # the wide expert's reply: 3 MiB for 12 bytes
    expected = reference(module_of(stock, STOCK_UIDS[kind], kind), args, kwargs)
    tolerance = KINDS[kind].tolerance
    actual = run(find(our_dht, kind), args, kwargs, expected.grad_outputs)
    assert_close(actual.outputs, expected.result.outputs, tolerance)
    assert_close(actual.input_grads, expected.result.input_grads, tolerance)
    assert_state_close(stock.ask("state", STOCK_UIDS[kind]), expected.trained, tolerance)  # trained, once


@pytest.mark.parametrize("kind", ["plain", "FLOAT16"])
def test_streamed(our_dht: DHT, stock: StockPeer, kind: str) -> None:
    args, kwargs = KINDS[kind].inputs(rows=80_000)  # 5 MB each way, in two chunks
    expected = reference(module_of(stock, STOCK_UIDS[kind], kind), args, kwargs)
    actual = run(find(our_dht, kind), args, kwargs, expected.grad_outputs)
    assert_close(actual.outputs, expected.result.outputs, KINDS[kind].tolerance)
    assert_close(actual.input_grads, expected.result.input_grads, KINDS[kind].tolerance)


def test_replies_too_large_for_a_unary_call_are_streamed(our_dht: DHT, stock: StockPeer) -> None:
    x = torch.randn(5, 1)  # the reply: 5 MiB, which stock clients cannot get
    expected = module_of(stock, STOCK_UIDS["wide"], "wide")(x)
    assert_close([find(our_dht, "wide")(x).detach()], [expected.detach()])


def test_trains_although_no_input_requires_a_gradient(our_dht: DHT, stock: StockPeer) -> None:
    args, kwargs = KINDS["plain"].inputs(rows=4)
    expected = reference(module_of(stock, STOCK_UIDS["plain"], "plain"), args, kwargs)
    run(find(our_dht, "plain"), args, kwargs, expected.grad_outputs, inputs_require_grad=False)
    assert_state_close(stock.ask("state", STOCK_UIDS["plain"]), expected.trained)


def test_info(our_dht: DHT) -> None:
    info = find(our_dht, "kwargs").info
    assert (info["protocol_version"], info["features"]) == (0, ())
    assert info["keyword_names"] == ("scale", "shift")
    assert info["optional_keywords"] == ()
    assert info["max_batch_size"] > MAX_BATCH_SIZE  # stock servers do not tell it


# --- what a stock server cannot do ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "given", "answer"),
    [
        ("plain", {"lora_a": torch.ones(HIDDEN, 2)}, r"unknown \['lora_a'\].*stock hivemind server.*global"),
        ("plain", {"global_kwargs": {"lora_a": torch.ones(HIDDEN, 2)}}, r"unknown \['lora_a'\].*stock hivemind server"),
        ("kwargs", {"scale": torch.ones(4, HIDDEN)}, r"missing \['shift'\]"),
        ("kwargs", {"global_kwargs": {"scale": torch.ones(4, HIDDEN)}}, r"kwargs\['scale'\].*global.*batched"),
        ("kwargs", {"scale": torch.ones(HIDDEN), "shift": torch.ones(4)}, r"kwargs\['scale'\]"),
        ("kwargs", {"scale": torch.ones(4, HIDDEN), "shift": torch.ones(5)}, r"kwargs\['shift'\].*rows"),
        ("kwargs", {"scale": torch.ones(4, HIDDEN).double(), "shift": torch.ones(4, 1)}, r"kwargs\['shift'\]"),
    ],
)
def test_wrong_kwargs_fail_before_sending(our_dht: DHT, kind: str, given: dict[str, Any], answer: str) -> None:
    expert, spy = spied(our_dht, kind)
    with pytest.raises(SchemaError, match=answer):
        expert(torch.ones(4, HIDDEN), **given)
    assert spy.calls == 0


@pytest.mark.parametrize("x", [torch.ones(4, HIDDEN - 1), torch.ones(HIDDEN), torch.ones(4, HIDDEN).long()])
def test_wrong_args_fail_before_sending(our_dht: DHT, x: torch.Tensor) -> None:
    expert, spy = spied(our_dht, "plain")
    with pytest.raises(SchemaError, match=r"args\[0\]: expected float32\(batch, 16\)"):
        expert(x)
    assert spy.calls == 0
    assert expert(torch.ones(4, HIDDEN)).shape == (4, HIDDEN)
    assert spy.calls == 1


def test_the_servers_own_errors(our_dht: DHT, stock: StockPeer) -> None:
    expert = find(our_dht, "plain")
    began = time.monotonic()
    with pytest.raises(ExpertNotFound, match=r"nobody\.0"):
        RemoteExpert(ExpertInfo("nobody.0", expert.peer_id), our_dht)(torch.ones(2, HIDDEN))
    assert time.monotonic() - began < 2 * PROMPT_S
    assert expert(torch.ones(4, HIDDEN)).shape == (4, HIDDEN)


def test_it_is_sent_as_many_rows_as_it_says_that_it_takes(our_dht: DHT, stock: StockPeer) -> None:
    """It says so when it gets more; then each row is sent, and trained on, once."""
    expert, spy = spied(our_dht, "plain")
    module = module_of(stock, STOCK_UIDS["plain"], "plain")
    x = torch.randn(2 * MAX_BATCH_SIZE + 5, HIDDEN)
    with torch.no_grad():
        assert_close([expert(x)], [module(x)])
        assert (spy.calls, expert.info["max_batch_size"]) == (4, MAX_BATCH_SIZE)
        assert_close([expert(x)], [module(x)])
        assert spy.calls == 7
        sequence = RemoteSequential(our_dht, [STOCK_UIDS["plain"]], config=ClientConfig(max_tokens_per_request=2**20))
        assert_close([sequence(x)], [module(x)])
    fresh = find(our_dht, "plain")
    own = x[: MAX_BATCH_SIZE + 1].clone().requires_grad_()
    before = stock.ask("state", STOCK_UIDS["plain"])
    fresh(own).sum().backward()
    assert own.grad is not None
    assert own.grad.shape == own.shape
    after = stock.ask("state", STOCK_UIDS["plain"])
    assert any(not torch.equal(before[name], after[name]) for name in before)


# --- mixtures ------------------------------------------------------------------------------------------------------------

UIDS = [uid for uid in STOCK_GRID_UIDS if uid.startswith("stocks.")]
GRID_SIZE = (4,)


def test_our_beam_search_reads_stock_records(our_dht: DHT) -> None:
    scores = torch.randn(5, *GRID_SIZE)
    found = MoEBeamSearcher(our_dht, "stocks.", GRID_SIZE).batch_find_best_experts([scores], 2)
    assert [[expert.uid for expert in row] for row in found] == best_experts(UIDS, [scores], 2)


def test_our_mixture_of_stock_experts_equals_a_local_one(our_dht: DHT, stock: StockPeer) -> None:
    mixture = RemoteMixtureOfExperts(
        in_features=HIDDEN, grid_size=GRID_SIZE, dht=our_dht, uid_prefix="stocks.", k_best=2, config=ClientConfig()
    )
    x, grad = torch.randn(2, 6, HIDDEN)
    x.requires_grad_()
    output = mixture(x)
    experts = {uid: module_of(stock, uid, "plain") for uid in UIDS}
    weight, bias = mixture.proj.weight, mixture.proj.bias
    expected = dense_mixture(experts, x, weight, bias, GRID_SIZE, 2)
    assert_close([output.detach()], [expected.detach()])
    assert_close(
        torch.autograd.grad(output, [x, weight, bias], grad), torch.autograd.grad(expected, [x, weight, bias], grad)
    )
