"""One swarm for all interop tests: a server of ours, a DHT node for our clients, a stock server and a stock client."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import nn

from moe import DHT, BatchTensorProto, ModuleBackend, Server, TensorProto, declare_experts, get_experts
from moe.dht import start_dht, stop_dht, visible_addresses
from moe.server.layers.adapted import AdaptedFeedforwardBlock, adapted_ffn_schema
from tests.interop.experts import HIDDEN, KINDS, LEARNING_RATE
from tests.interop.peers import HOST_MADDRS, StockPeer

OUR_UIDS = {kind: f"our_{kind.lower()}.0" for kind in KINDS}
OUR_FROZEN_UIDS = [
    *(f"flat.{i}" for i in (0, 1, 3)),
    *(f"grid.{i}.{j}" for i in range(2) for j in range(3)),
    *("cube.0.0.0", "cube.0.2.1", "cube.1.1.0", "cube.3.2.1", "cube.3.0.1"),  # no cube.2. at all
    *("mixed.0.0", "mixed.1.1"),  # the rest of that grid is of the stock server
]
OUR_TRAINED_UIDS = [f"trained.{i}.{j}" for i in range(2) for j in range(2)]


class Structured(nn.Module):
    """({"a": (B, D), "b": (B, D)}, [(B, D)]) -> [(B, D), int64 (B)]: more structure than stock servers can take."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, pair: dict[str, torch.Tensor], rest: list[torch.Tensor]) -> list[torch.Tensor]:
        result = self.linear(pair["a"]) * pair["b"] + rest[0]
        return [result, result.argmax(-1)]


class Scaled(nn.Module):
    """(B, D), and by keyword a scale (D) that is global to the call -> (B, D)"""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x * scale


def _backends() -> dict[str, ModuleBackend]:
    options = {uid: KINDS[kind].backend_options() for kind, uid in OUR_UIDS.items()}
    options.update((uid, KINDS["plain"].backend_options()) for uid in OUR_TRAINED_UIDS)
    options.update((uid, KINDS["plain"].backend_options(trained=False)) for uid in OUR_FROZEN_UIDS)
    row = BatchTensorProto(HIDDEN)
    structured, adapted = Structured(), AdaptedFeedforwardBlock(HIDDEN)
    adapted_schema = adapted_ffn_schema(HIDDEN)
    options["our_structured.0"] = dict(
        module=structured,
        optimizer=torch.optim.SGD(structured.parameters(), lr=LEARNING_RATE),
        args_schema=({"a": row, "b": row}, [row]),
    )
    options["our_optional_globals.0"] = dict(
        module=adapted,
        optimizer=torch.optim.SGD(adapted.parameters(), lr=LEARNING_RATE),
        args_schema=adapted_schema["args"],
        kwargs_schema=adapted_schema["kwargs"],
        optional_kwargs=adapted_schema["optional"],
    )
    options["our_required_globals.0"] = dict(
        module=Scaled(), args_schema=(row,), kwargs_schema={"scale": TensorProto(HIDDEN)}
    )
    return {uid: ModuleBackend(name=uid, **kwargs) for uid, kwargs in options.items()}


class Swarm(NamedTuple):
    """Who takes part in the tests.

    :ivar server: ours; serves the kinds of experts that stock servers know, some with globals, and grids
    :ivar dht: a node for our clients. They have made a call, so that what all calls of a process share is there
    :ivar stock: a stock server and a stock client
    """

    server: Server
    dht: DHT
    stock: StockPeer


@pytest.fixture(scope="package")
def swarm() -> Iterator[Swarm]:
    """One swarm for all tests."""
    torch.manual_seed(1)
    with contextlib.ExitStack() as stack:
        stock = StockPeer()  # imports while ours starts
        stack.callback(stock.close)
        server = Server(start_dht(host_maddrs=HOST_MADDRS), _backends(), start=True)
        stack.callback(server.shutdown)
        initial_peers = visible_addresses(server.dht)
        dht = start_dht(initial_peers, host_maddrs=HOST_MADDRS)
        stack.callback(stop_dht, dht)
        stock.join(initial_peers)
        # The next announcement, brought forward: stock clients trust the node next to them, which has joined after the
        # first one, and so knows only what stock servers have stored in the grid that both host.
        declare_experts(server.dht, list(server.expert_backends))
        (expert,) = get_experts(dht, [OUR_UIDS["plain"]])
        expert(torch.zeros(1, HIDDEN))
        yield Swarm(server, dht, stock)


@pytest.fixture(autouse=True)
def same_numbers_every_time() -> None:
    """What lossy codecs lose depends on the numbers."""
    torch.manual_seed(2)


@pytest.fixture(scope="package")
def our_server(swarm: Swarm) -> Server:
    """See Swarm."""
    return swarm.server


@pytest.fixture(scope="package")
def our_dht(swarm: Swarm) -> DHT:
    """See Swarm."""
    return swarm.dht


@pytest.fixture(scope="package")
def stock(swarm: Swarm) -> StockPeer:
    """See Swarm."""
    return swarm.stock
