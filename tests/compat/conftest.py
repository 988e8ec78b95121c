"""A server and its clients on one DHT, in one process: how tests of hivemind's users often look."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import nn

from moe import DHT, ClientConfig, get_experts
from moe.config import TRANSPORTS
from moe.dht import resolve_p2p
from moe.server import ModuleBackend, Server
from moe.server.layers import name_to_block, name_to_input, name_to_schema
from moe.server.layers.common import DelayedNopExpert
from tests.hosted import Hosted, hosted
from tests.swarm.tools import LOOPBACK, prepare_processes

HIDDEN = 16


class Failing(nn.Module):
    """Raises."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("this expert has broken")


def backend(uid: str, module: nn.Module, *args: Any, learning_rate: float = 0.0, **options: Any) -> ModuleBackend:
    """One with hivemind's descriptors; every input is a row of HIDDEN values, unless given."""
    parameters = list(module.parameters())
    return ModuleBackend(
        name=uid,
        module=module,
        optimizer=torch.optim.SGD(parameters, lr=learning_rate) if parameters else None,
        args_schema=args or (BatchTensorDescriptor(HIDDEN),),
        outputs_schema=BatchTensorDescriptor(HIDDEN),
        **{"max_batch_size": 64, **options},
    )


def backends() -> dict[str, ModuleBackend]:
    """Experts of the names by which tests call them."""
    torch.manual_seed(0)
    hosted = {f"ffn.{i}.{j}": backend(f"ffn.{i}.{j}", name_to_block["ffn"](HIDDEN)) for i in range(2) for j in range(2)}
    for i in range(4):
        hosted[f"expert.{i}"] = backend(f"expert.{i}", name_to_block["ffn"](HIDDEN))
    with torch.no_grad():
        next(hosted["expert.3"].module.parameters())[0, 0] = float("nan")
    for i in range(3):
        hosted[f"block.{i}"] = backend(f"block.{i}", nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh()))
    for i in range(2):
        hosted[f"trained.{i}"] = backend(f"trained.{i}", name_to_block["ffn"](HIDDEN), learning_rate=0.05)
    mask = BatchTensorDescriptor(HIDDEN, dtype=torch.int64)
    row = BatchTensorDescriptor(HIDDEN)
    hosted["det_dropout.0"] = ModuleBackend(
        name="det_dropout.0",
        module=name_to_block["det_dropout"](HIDDEN),
        args_schema=(row, mask),
        outputs_schema=row,
        max_batch_size=64,
    )
    hosted["slow.0"] = backend("slow.0", DelayedNopExpert(HIDDEN, delay=0.0))  # a test makes it slow
    hosted["failing.0"] = backend("failing.0", Failing())
    return hosted


@pytest.fixture(scope="session", autouse=True)
def other_processes() -> None:
    """Before the first test, so that no test is said to have left that behind."""
    prepare_processes()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """It runs, and was called in all ways, so that what calls share is there: no test is said to have left it behind."""
    dht = DHT(start=True, **LOOPBACK)
    server = Server(dht, backends(), num_connection_handlers=4, start=True, device=torch.device("cpu"))
    try:
        for transport in TRANSPORTS:
            (expert,) = get_experts(dht, ["ffn.0.0"], config=ClientConfig(transport=transport))
            expert(torch.randn(1, HIDDEN))
        yield server
    finally:
        server.shutdown()


@pytest.fixture
def dht(server: Server) -> DHT:
    """The server's own."""
    assert resolve_p2p(server.dht)
    return server.dht


@pytest.fixture
def registries() -> Iterator[None]:
    """Expert classes that a test registers are gone after it, here and in hivemind."""
    from hivemind.moe.server import layers as stock

    all_of_them: list[dict[str, Any]] = [
        name_to_block,
        name_to_input,
        name_to_schema,
        stock.name_to_block,
        stock.name_to_input,
    ]
    before = [dict(registry) for registry in all_of_them]
    yield
    for registry, entries in zip(all_of_them, before):
        registry.clear()
        registry.update(entries)


@pytest.fixture
def experts_file(tmp_path: Path) -> Callable[[str], Path]:
    """Write a file of custom experts that begins with an import line."""

    def write(import_line: str, name: str = "custom_perceptron") -> Path:
        path = tmp_path / "my_experts.py"
        path.write_text(
            f"import torch\n{import_line}\n\n"
            f"@register_expert_class({name!r}, lambda batch_size, hid_dim: torch.empty((batch_size, hid_dim)))\n"
            "class Perceptron(torch.nn.Module):\n"
            "    def __init__(self, hid_dim):\n"
            "        super().__init__()\n"
            "        self.linear = torch.nn.Linear(hid_dim, hid_dim)\n\n"
            "    def forward(self, x):\n"
            "        return self.linear(x)\n"
        )
        return path

    return write


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """An encoder."""
    with hosted("bert", tmp_path_factory.mktemp("bert")) as made:
        yield made


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosted]:
    """A decoder."""
    with hosted("llama", tmp_path_factory.mktemp("llama")) as made:
        yield made
