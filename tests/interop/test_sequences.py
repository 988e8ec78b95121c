"""Sequences with blocks on stock hivemind servers and on ours.

s.. in a test's name: see tests/client/test_sequential.py.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from moe import DHT, ClientConfig, RemoteSequential, SchemaError, Server
from tests.interop.conftest import OUR_UIDS
from tests.interop.experts import HIDDEN, KINDS, assert_close
from tests.interop.peers import STOCK_UIDS, StockPeer

pytestmark = pytest.mark.timeout(240)  # the first test starts everybody

UIDS = [STOCK_UIDS["plain"], OUR_UIDS["plain"], "our_optional_globals.0", STOCK_UIDS["kwargs"], STOCK_UIDS["plain"]]
ROWS = 5


def blocks_of(our_server: Server, stock: StockPeer) -> list[nn.Module]:
    """Copies of the blocks as they are now."""
    blocks: list[nn.Module] = []
    for uid in UIDS:
        if uid in our_server.expert_backends:
            blocks.append(copy.deepcopy(our_server.expert_backends[uid].module))
            continue
        kind = next(kind for kind, stock_uid in STOCK_UIDS.items() if stock_uid == uid)
        blocks.append(KINDS[kind].make())
        blocks[-1].load_state_dict(stock.ask("state", uid))
    return blocks


def inputs() -> tuple[torch.Tensor, list[dict[str, torch.Tensor]]]:
    def leaf(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, requires_grad=True)

    lora = {"lora_a": leaf(HIDDEN, ROWS), "lora_b": leaf(ROWS, 4 * HIDDEN)}
    return leaf(ROWS, HIDDEN), [{}, {}, lora, {"scale": leaf(ROWS, HIDDEN), "shift": leaf(ROWS)}, {}]


@pytest.mark.parametrize("rows_at_once", [1024, 2])
def test_s9_stock_servers_take_part_as_single_blocks(
    our_dht: DHT, our_server: Server, stock: StockPeer, rows_at_once: int
) -> None:
    """Forward, gradients, kwargs of each block; ours take an adapter, theirs what they always take."""
    x, own = inputs()
    blocks = blocks_of(our_server, stock)
    sequence = RemoteSequential(our_dht, UIDS, config=ClientConfig(max_tokens_per_request=rows_at_once))
    expected = x
    for block, kwargs in zip(blocks, own):
        expected = block(expected, **kwargs)
    output = sequence(x, block_kwargs=own)
    assert_close([output.detach()], [expected.detach()])
    if rows_at_once == 2:  # each part trains the blocks, so that later gradients are those of other weights
        return
    leaves = [x, *(tensor for kwargs in own for tensor in kwargs.values())]
    grad = torch.randn_like(output)
    # The last block is also the first, and has learned when the backward gets there: the gradient of x is of other weights.
    ours, theirs = torch.autograd.grad(output, leaves, grad), torch.autograd.grad(expected, leaves, grad)
    assert_close(list(ours[1:]), list(theirs[1:]))
    assert ours[0].shape == theirs[0].shape


@pytest.mark.parametrize(
    ("given", "answer"),
    [
        ({"lora_a": torch.ones(HIDDEN, 2)}, r"unknown \['lora_a'\].*stock hivemind server.*global"),
        ({"mask": torch.ones(ROWS).bool()}, r"unknown \['mask'\].*stock hivemind server"),
    ],
)
def test_s9_what_a_stock_server_cannot_do_fails_before_sending(
    our_dht: DHT, stock: StockPeer, given: dict[str, Any], answer: str
) -> None:
    before = stock.ask("state", STOCK_UIDS["plain"])
    sequence = RemoteSequential(our_dht, [STOCK_UIDS["plain"], OUR_UIDS["plain"]])
    with pytest.raises(SchemaError, match=answer):
        sequence(torch.ones(ROWS, HIDDEN), block_kwargs=[given, {}])
    assert all(torch.equal(before[name], value) for name, value in stock.ask("state", STOCK_UIDS["plain"]).items())
    assert sequence(torch.ones(ROWS, HIDDEN)).shape == (ROWS, HIDDEN)
