"""What programs for hivemind.moe do, with nothing changed but the import."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hivemind.p2p import P2PDaemonError, P2PHandlerError, PeerID
from hivemind.utils import get_dht_time
from hivemind.utils.tensor_descr import BatchTensorDescriptor

import moe
from moe import ClientConfig, DistributedModel, MoEError, config
from moe.client import (
    MoEBeamSearcher,
    RemoteExpert,
    RemoteMixtureOfExperts,
    RemoteSequential,
    RemoteSwitchMixtureOfExperts,
)
from moe.client.remote_expert_worker import RemoteExpertWorker
from moe.dht import find_experts, ping_peers, start_dht
from moe.errors import (
    CallTimeout,
    ConfigError,
    ConnectError,
    ExpertFailed,
    ExpertNotFound,
    LifecycleError,
    NoExpertsFound,
    SchemaError,
    Unavailable,
)
from moe.expert_uid import ExpertInfo
from moe.schema import BatchTensorProto
from moe.server import (
    ExpertBackend,
    ModuleBackend,
    Runtime,
    Server,
    TaskPool,
    assembly,
    declare_experts,
    get_experts,
)
from moe.server.checkpoints import store_experts
from moe.server.layers import add_custom_models_from_file, name_to_block
from moe.testing import memory_swarm
from tests.compat.conftest import HIDDEN, Failing, backend
from tests.swarm.tools import LOOPBACK

ROOT = Path(__file__).resolve().parents[2]
ROW = BatchTensorProto(HIDDEN)

# --- imports ----------------------------------------------------------------------------------------------------------

IMPORTS = """
import moe.server.layers, moe.client.expert
from moe import ModuleBackend, RemoteExpert, RemoteMixtureOfExperts, RemoteSwitchMixtureOfExperts, Server, register_expert_class
from moe import background_server, declare_experts, get_experts
from moe import client, expert_uid, server
from moe.client import RemoteExpert, RemoteMixtureOfExperts, RemoteSwitchMixtureOfExperts, RemoteSequential, MoEBeamSearcher
from moe.client.beam_search import MoEBeamSearcher
from moe.client.expert import RemoteExpert, batch_create_remote_experts, create_remote_experts
from moe.client.moe import RemoteMixtureOfExperts
from moe.client.remote_expert_worker import RemoteExpertWorker
from moe.client.switch_moe import RemoteSwitchMixtureOfExperts
from moe.expert_uid import FLAT_EXPERT, PREFIX_PATTERN, UID_DELIMITER, UID_PATTERN, Coordinate, ExpertInfo, ExpertPrefix
from moe.expert_uid import ExpertUID, Score, is_valid_prefix, is_valid_uid, split_uid
from moe.server import ModuleBackend, Server, background_server, declare_experts, get_experts, register_expert_class
from moe.server import ExpertBackend, TaskPool, Runtime, ConnectionHandler
from moe.server.checkpoints import CheckpointSaver, load_experts, store_experts
from moe.server.connection_handler import ConnectionHandler
from moe.server.dht_handler import declare_experts, get_experts
from moe.server.expert_backend import ExpertBackend
from moe.server.layers import add_custom_models_from_file, name_to_block, name_to_input, register_expert_class
from moe.server.layers import schedule_name_to_scheduler, common, dropout, lr_schedule
from moe.server.layers.common import DelayedNopExpert, FeedforwardBlock, NopExpert, TransformerEncoderLayer, gelu_fast
from moe.server.layers.custom_experts import add_custom_models_from_file, register_expert_class
from moe.server.layers.dropout import DeterministicDropout, DeterministicDropoutNetwork
from moe.server.layers.lr_schedule import get_linear_schedule_with_warmup
from moe.server.layers.optim import ClippingWrapper, OptimizerWrapper
from moe.server.module_backend import ModuleBackend
from moe.server.runtime import Runtime
from moe.server.server import Server, background_server
from moe.server.task_pool import Task, TaskPool
"""


@pytest.mark.parametrize("line", IMPORTS.strip().splitlines())
def test_import(line: str) -> None:
    exec(line, {})


def test_one_object_under_all_its_names() -> None:
    assert moe.server.module_backend.ModuleBackend is ModuleBackend is ExpertBackend is moe.ModuleBackend
    assert moe.server.server.background_server is moe.server.background_server is moe.background_server
    assert moe.server.dht_handler.get_experts is get_experts is moe.client.get_experts is moe.get_experts
    assert moe.server.dht_handler.declare_experts is declare_experts is moe.declare_experts
    for package in (moe, moe.server, moe.client):
        assert set(package.__all__) <= set(dir(package))
        with pytest.raises(AttributeError, match="no_such_name"):
            _ = package.no_such_name
    assert "background_server" in dir(moe.server.server)
    assert "Server" in dir(moe.server.server)


def test_packages_are_attributes_that_load_nothing() -> None:
    """As in ``import hivemind; hivemind.moe.server.layers``."""
    code = "import sys, moe.server, moe.client, moe.expert_uid, moe.server.dht_handler; print('torch' in sys.modules, end=' ');"
    code += "moe.server.layers.name_to_block; moe.client.expert.RemoteExpert; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False", "True"]


# --- exceptions -------------------------------------------------------------------------------------------------------


def test_a_failing_expert_is_caught_as_hiveminds_errors_are() -> None:
    hosted = {"failing.0": backend("failing.0", Failing()), "nop.0": backend("nop.0", name_to_block["nop"](HIDDEN))}
    config = ClientConfig(max_retries=0)
    with memory_swarm(hosted, {"gone.0": backend("gone.0", Failing())}, config=config) as swarm:
        gone = swarm.expert("gone.0")
        swarm.kill(1)
        for expert, x, kind, stock in (
            (swarm.expert("failing.0"), torch.randn(2, HIDDEN), ExpertFailed, P2PHandlerError),
            (swarm.expert("nop.0"), torch.randn(2, HIDDEN + 3), SchemaError, P2PHandlerError),
            (gone, torch.randn(2, HIDDEN), ConnectError, P2PDaemonError),
        ):
            caught: BaseException | None = None
            try:
                expert(x)
            except (P2PDaemonError, P2PHandlerError) as e:
                caught = e
            assert type(caught) is kind
            assert isinstance(caught, stock)
        assert str(HIDDEN + 3) in repr(caught := _raised(lambda: swarm.expert("nop.0")(torch.randn(2, HIDDEN + 3))))
        assert isinstance(caught, ValueError)


def _raised(call: Callable[[], Any]) -> BaseException:
    with pytest.raises(MoEError) as caught:
        call()
    return caught.value


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (ExpertFailed, {P2PHandlerError}),
        (ExpertNotFound, {P2PHandlerError, LookupError}),
        (SchemaError, {P2PHandlerError, ValueError}),
        (Unavailable, {P2PHandlerError, P2PDaemonError}),
        (ConnectError, {P2PDaemonError}),
        (CallTimeout, {P2PDaemonError, TimeoutError}),
        (NoExpertsFound, {RuntimeError, LookupError}),
        (ConfigError, {ValueError}),
    ],
)
def test_errors_are_copied_and_pickled_with_hiveminds_bases(kind: type[MoEError], bases: set[type[Exception]]) -> None:
    error = kind("what happened", peer="12D3KooWpeer", uid="ffn.0")
    every = {P2PHandlerError, P2PDaemonError, ValueError, LookupError, RuntimeError, TimeoutError}
    for same in (error, copy.copy(error), copy.deepcopy(error), pickle.loads(pickle.dumps(error))):
        assert (type(same), str(same), same.uid) == (kind, str(error), "ffn.0")
        assert {base for base in every if isinstance(same, base)} == bases
        with pytest.raises(kind):
            raise same


# --- arguments --------------------------------------------------------------------------------------------------------


def test_every_argument_of_a_module_backend(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "_noted", set())
    module = name_to_block["ffn"](HIDDEN)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    options: dict[str, Any] = dict(
        optimizer=optimizer,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 10),
        args_schema=(BatchTensorDescriptor(HIDDEN),),
        kwargs_schema=None,
        outputs_schema=BatchTensorDescriptor(HIDDEN),
        max_batch_size=32,
        min_batch_size=2,
        timeout=0.25,
        pool_size=7,
        prefetch_batches=3,
        daemon=False,
        start=True,
    )
    with caplog.at_level(logging.INFO, "moe"):
        made = [ModuleBackend("ffn.0", module, **options) for _ in range(2)]
    pool = made[0].forward_pool.config
    assert (pool.max_batch_size, pool.min_batch_size, pool.max_wait_s, pool.max_pending_tasks) == (32, 2, 0.25, 7)
    notes = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert [note.split(" has")[0] for note in notes] == [
        "TaskPool: " + n for n in ("prefetch_batches", "daemon", "start")
    ]


def test_positions_of_a_task_pool_and_names_of_a_runtime() -> None:
    pool = TaskPool(lambda tasks: [list(task.tensors) for task in tasks], 16, "pool", 1, None, 0, 1, True, False)
    runtime = Runtime(
        module_backends={"x": SimpleNamespace(get_pools=lambda: (pool,), to=lambda device: None)},
        prefetch_batches=1,
        sender_threads=2,
        device=torch.device("cpu"),
        stats_report_interval=60,
    )
    assert list(runtime.module_backends) == ["x"]
    runtime.start()
    try:
        runtime.ready.wait()
        (result,) = pool.submit_task(torch.ones(2, 3)).result(10.0)
        assert result is not None
        assert result.tolist() == torch.ones(2, 3).tolist()
    finally:
        runtime.shutdown()
    with pytest.raises(ConfigError, match="Runtime"):
        Runtime()


def test_a_backend_may_be_named_by_the_beginning_of_a_uid_until_it_is_hosted() -> None:
    named = backend("my_expert", name_to_block["ffn"](HIDDEN))
    x = torch.randn(2, HIDDEN)
    (grad,) = named.backward(x, torch.ones_like(x))
    assert grad is not None
    assert named.forward(x)[0].shape == grad.shape == x.shape
    with pytest.raises(ConfigError, match="not a valid expert uid"):
        Server(SimpleNamespace(kwargs={}), {"my_expert": named})
    for name in ("", "my expert.0", "two words", "ffn.01"):
        with pytest.raises(ConfigError, match="not a valid expert uid"):
            backend(name, name_to_block["ffn"](HIDDEN))


# --- subclasses of ModuleBackend, as Petals and others wrote them --------------------------------------------------------


class OwnForward(ModuleBackend):
    """With hivemind's signature."""

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        return tuple(2 * output for output in super().forward(*inputs))


class OwnBackward(ModuleBackend):
    """With hivemind's signature. ``returns`` is what becomes of the gradients."""

    returns: Callable[[tuple[Any, ...]], Any] = staticmethod(lambda grads: [3 * grad for grad in grads])

    def backward(self, *inputs: torch.Tensor) -> Any:  # type: ignore[override]
        return self.returns(super().backward(*inputs))


def _of_class(kind: type[ModuleBackend], module: torch.nn.Module) -> ModuleBackend:
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    return kind("own.0", module, optimizer=optimizer, args_schema=(BatchTensorDescriptor(HIDDEN),))


@pytest.mark.parametrize("rows", [3, 4096])  # of the second, activations would be kept
def test_a_backend_with_its_own_forward(rows: int) -> None:
    module = torch.nn.Linear(HIDDEN * 8, HIDDEN * 8)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    hosted = OwnForward("own.0", module, optimizer=optimizer, args_schema=(BatchTensorDescriptor(HIDDEN * 8),))
    x = torch.randn(rows, HIDDEN * 8, requires_grad=True)
    weight, expected = module.weight.detach().clone(), 2 * module(x).detach()
    with memory_swarm({"own.0": hosted}) as swarm:
        with torch.no_grad():
            torch.testing.assert_close(swarm.expert("own.0")(x), expected, rtol=1e-4, atol=1e-5)
        output = swarm.expert("own.0")(x)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        output.sum().backward()
        assert swarm.expert("own.0")(x[:0]).shape == (0, HIDDEN * 8)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.sum(0).expand_as(x), rtol=1e-4, atol=1e-5)  # backward calls the module


def test_a_backend_with_its_own_backward() -> None:
    module, twin = (torch.nn.Linear(HIDDEN, HIDDEN) for _ in range(2))
    twin.load_state_dict(module.state_dict())
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    hosted = _of_class(OwnBackward, module)
    with memory_swarm({"own.0": hosted}) as swarm:
        for _ in range(3):
            x = torch.randn(3, HIDDEN, requires_grad=True)
            local = x.detach().clone().requires_grad_()
            swarm.expert("own.0")(x).sum().backward()
            twin(local).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            assert x.grad is not None and local.grad is not None
            torch.testing.assert_close(x.grad, 3 * local.grad, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(module.weight, twin.weight, rtol=1e-4, atol=1e-5)
        swarm.expert("own.0")(x.detach()).sum().backward()  # nobody wants a gradient: it trains all the same
    assert hosted.updates == 4


@pytest.mark.parametrize(
    ("returns", "complaint"),
    [
        (lambda grads: (), "OwnBackward.backward returned 0 gradients, expected 1"),
        (lambda grads: [grads[0][:1]], "a gradient that does not fit its input"),
        (lambda grads: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_a_backend_whose_own_backward_is_wrong(returns: Callable[[Any], Any], complaint: str) -> None:
    hosted = _of_class(OwnBackward, torch.nn.Linear(HIDDEN, HIDDEN))
    hosted.returns = returns  # type: ignore[attr-defined]
    task = hosted.make_task("backward", [torch.ones(2, HIDDEN)] * 2)
    future = hosted.backward_pool.submit(task)
    hosted.backward_pool.process(hosted.backward_pool.load_batch(0.0))
    with pytest.raises(ExpertFailed, match=complaint):
        future.result(0)
    assert task.may_have_trained  # so that no repeat trains once more
    assert hosted.updates == 1


class Nesting(torch.nn.Linear):
    """Returns a tensor, nested."""

    nest: Callable[[torch.Tensor], Any] = staticmethod(lambda y: y)

    def forward(self, input: torch.Tensor) -> Any:
        return self.nest(super().forward(input))


@pytest.mark.parametrize("schema", [BatchTensorDescriptor(HIDDEN), (BatchTensorDescriptor(HIDDEN),)])
@pytest.mark.parametrize("nest", [lambda y: y, lambda y: (y,), lambda y: {"y": [y]}])
def test_a_single_output_nested_otherwise_than_its_schema(schema: Any, nest: Callable[[torch.Tensor], Any]) -> None:
    module = Nesting(HIDDEN, HIDDEN)
    module.nest = nest  # type: ignore[assignment]
    hosted = ModuleBackend("own.0", module, args_schema=(BatchTensorDescriptor(HIDDEN),), outputs_schema=schema)
    x = torch.randn(3, HIDDEN, requires_grad=True)
    with memory_swarm({"own.0": hosted}) as swarm:
        output = swarm.expert("own.0")(x)
        assert isinstance(output, tuple) == isinstance(schema, tuple)
        y = output[0] if isinstance(output, tuple) else output
        y.sum().backward()
    torch.testing.assert_close(y, torch.nn.functional.linear(x, module.weight, module.bias), rtol=1e-4, atol=1e-5)
    assert x.grad is not None


# --- a program that ends while its server runs ----------------------------------------------------------------------------

ENDS = """
import sys, torch
from moe import Server
server = Server.create(
    expert_uids=["ffn.0"], expert_cls="ffn", hidden_dim=16, device="cpu", throughput=None, checkpoint_dir=sys.argv[1],
    start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"],
)
server.module_backends["ffn.0"].backward(torch.randn(2, 16), torch.randn(2, 16))
"""


def test_nothing_is_lost_when_a_program_ends_without_shutdown(tmp_path: Path) -> None:
    command = [sys.executable, "-c", ENDS, str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert "server.join()" in result.stderr
    saved = torch.load(tmp_path / "ffn.0" / "checkpoint_last.pt", weights_only=True)
    assert saved["moe"]["updates"] == 1


# --- experts without a DHT, addresses in place of one -----------------------------------------------------------------


@pytest.mark.parametrize("peer_id", [None, PeerID.from_base58("QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC")])
def test_an_expert_without_anything_to_call_through_can_be_made(peer_id: PeerID | None) -> None:
    expert = RemoteExpert(ExpertInfo("ffn.0.1", peer_id), None)
    assert (expert.uid, expert.peer_id) == ("ffn.0.1", peer_id)
    with pytest.raises(LifecycleError, match=r"RemoteExpert\(info, dht\)"):
        expert(torch.randn(1, HIDDEN))
    with pytest.raises(LifecycleError, match="p2p=None"):
        _ = expert.info


ADDRESSES = ["/ip4/127.0.0.1/tcp/31330/p2p/QmcgpsyWgH8Y8ajJz1Cu72KnS5uo2Aa2LpzU7kinSupNKC"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: RemoteMixtureOfExperts(in_features=4, grid_size=(2,), dht=ADDRESSES, uid_prefix="ffn.", k_best=1),
        lambda: RemoteSwitchMixtureOfExperts(in_features=4, grid_size=(2,), dht=ADDRESSES, uid_prefix="ffn."),
        lambda: MoEBeamSearcher(ADDRESSES, "ffn.", (2,)),
        lambda: RemoteSequential(ADDRESSES, prefix="block.", num_blocks=2),
        lambda: RemoteExpert(ExpertInfo("ffn.0", PeerID.from_base58(ADDRESSES[0].split("/")[-1])), ADDRESSES),
        lambda: get_experts(ADDRESSES, ["ffn.0"]),
        lambda: get_experts(ADDRESSES[0], ["ffn.0"]),
        lambda: declare_experts(ADDRESSES, ["ffn.0"], get_dht_time() + 30),
        lambda: get_experts(None, ["ffn.0"]),
    ],
)
def test_addresses_in_place_of_a_dht(make: Callable[[], Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"expected a DHT node, got .*moe\.DHT\(initial_peers=\[\.\.\.\], start=True\)"
    ):
        make()


def test_addresses_in_place_of_a_dht_of_a_pretrained_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert", "num_hidden_layers": 2}')
    with pytest.raises(ConfigError, match="expected a DHT node"):
        DistributedModel.from_pretrained(tmp_path, ADDRESSES)


# --- expert classes registered with hivemind --------------------------------------------------------------------------


@pytest.mark.usefixtures("registries")
@pytest.mark.parametrize(
    "module", ["moe", "moe.server.layers", "hivemind.moe", "hivemind.moe.server.layers.custom_experts", "hivemind"]
)
def test_a_file_of_custom_experts(module: str, experts_file: Callable[..., Path]) -> None:
    path = experts_file(f"from {module} import register_expert_class")
    add_custom_models_from_file(path)
    assert name_to_block["custom_perceptron"](HIDDEN)(torch.randn(2, HIDDEN)).shape == (2, HIDDEN)
    add_custom_models_from_file(path)


@pytest.mark.usefixtures("registries")
def test_a_class_registered_with_hivemind_whose_name_is_taken(experts_file: Callable[..., Path]) -> None:
    path = experts_file("from hivemind.moe import register_expert_class", name="adapted_ffn")
    with pytest.raises(ConfigError, match="adapted_ffn.*choose another name"):
        add_custom_models_from_file(path)
    import hivemind.moe.server.layers as stock

    assert "adapted_ffn" not in stock.name_to_block


@pytest.mark.usefixtures("registries")
def test_a_program_that_registers_a_class_with_hivemind(monkeypatch: pytest.MonkeyPatch) -> None:
    from hivemind.moe import register_expert_class

    register_expert_class("hiveminds_own", lambda batch_size, hid_dim: torch.empty((batch_size, hid_dim)))(
        torch.nn.Identity
    )
    parts = assemble(monkeypatch, expert_uids=["own.0"], expert_cls="hiveminds_own", optim_cls=None)
    assert isinstance(parts.backends["own.0"].module, torch.nn.Identity)


@pytest.mark.usefixtures("registries")
def test_two_classes_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody is served another class than the one that was registered; who does not ask for it is not concerned."""
    from hivemind.moe import register_expert_class

    sample = lambda batch_size, hid_dim: torch.empty((batch_size, hid_dim))  # noqa: E731
    register_expert_class("twice", sample)(torch.nn.Identity)
    moe.register_expert_class("twice", sample)(torch.nn.Tanh)
    with pytest.raises(ConfigError, match="'twice' is .*Identity.* but .*Tanh"):
        assemble(monkeypatch, expert_uids=["own.0"], expert_cls="twice", optim_cls=None)
    assert assemble(monkeypatch, expert_uids=["ffn.0"], expert_cls="ffn").backends


def assemble(monkeypatch: pytest.MonkeyPatch, **options: Any) -> assembly.ServerParts:
    """A server's parts, without any process."""
    monkeypatch.setattr(assembly, "start_dht", lambda *args, **kwargs: SimpleNamespace(kwargs=kwargs))
    monkeypatch.setattr(assembly, "find_experts", lambda dht, uids: [None for _ in uids])
    monkeypatch.setattr(gc, "freeze", lambda: None)
    return assembly.assemble(**{"hidden_dim": HIDDEN, "throughput": None, "device": "cpu", **options})


# --- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (dict(expert_uids=["nop.0", "nop.1"]), ["checkpoints of other.0, but", "asked for are nop.0, nop.1"]),
        (
            dict(num_experts=3, expert_pattern="nop.[0:5]"),
            ["checkpoints of other.0, but", "expert_pattern is nop.[0:5]"],
        ),
        (dict(num_experts=3), []),
        (dict(expert_uids=["nop.0", "other.0"]), []),
    ],
)
def test_checkpoints_of_other_experts_are_told(
    options: dict[str, Any],
    said: list[str],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    saved = {uid: backend(uid, name_to_block["nop"](HIDDEN)) for uid in ("nop.0", "other.0")}
    store_experts(saved, tmp_path)
    with caplog.at_level(logging.WARNING, "moe"):
        assemble(monkeypatch, expert_cls="nop", checkpoint_dir=tmp_path, **options)
    told = [record.getMessage() for record in caplog.records if "has checkpoints of" in record.getMessage()]
    assert len(told) == bool(said)
    assert all(part in told[0] for part in said)


# --- a server and its clients on one DHT ------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["auto", "unix", "tls", "libp2p"])
def test_an_expert_behind_the_clients_own_dht(transport: str, server: Server, dht: moe.DHT) -> None:
    expert, missing = get_experts(dht, ["ffn.0.0", "ffn.7.7"], config=ClientConfig(transport=transport, max_retries=0))
    assert missing is None
    assert expert.peer_id == dht.peer_id
    x = torch.randn(3, HIDDEN, requires_grad=True)
    y = expert(x)
    y.sum().backward()
    local = server.module_backends["ffn.0.0"].module
    torch.testing.assert_close(y, local(x.detach()), rtol=1e-4, atol=1e-5)
    assert x.grad is not None and x.grad.shape == x.shape
    large = torch.randn(64, HIDDEN)  # the largest batch, and one that is split
    torch.testing.assert_close(
        expert(torch.cat([large, large])), torch.cat([local(large), local(large)]), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
def test_failures_behind_the_clients_own_dht(transport: str, dht: moe.DHT) -> None:
    (failing,) = get_experts(dht, ["failing.0"], config=ClientConfig(transport=transport))
    with pytest.raises(P2PHandlerError, match="this expert has broken") as caught:
        failing(torch.randn(2, HIDDEN))
    assert type(caught.value) is ExpertFailed
    unknown = RemoteExpert(ExpertInfo("unknown.0", dht.peer_id), dht, config=ClientConfig(transport=transport))
    with pytest.raises(ExpertNotFound):
        unknown(torch.randn(2, HIDDEN))


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
def test_mixtures_and_sequences_behind_the_clients_own_dht(transport: str, dht: moe.DHT) -> None:
    x, config = torch.randn(4, HIDDEN), ClientConfig(transport=transport, max_retries=0)
    grid: dict[str, Any] = dict(in_features=HIDDEN, grid_size=(2, 2), dht=dht, uid_prefix="ffn.", config=config)
    mixture = RemoteMixtureOfExperts(k_best=2, **grid)
    mixture(x).sum().backward()
    assert mixture.proj.weight.grad is not None
    assert not mixture.statistics().forward_failures
    switch = RemoteSwitchMixtureOfExperts(**grid)
    output, balancing_loss = switch(x)
    (output.sum() + balancing_loss).backward()
    for routing in ("max_throughput", "min_latency"):
        sequence = RemoteSequential(dht, prefix="block.", num_blocks=3, config=replace(config, routing=routing))
        in_order = get_experts(dht, [f"block.{i}" for i in range(3)])
        expected = in_order[2](in_order[1](in_order[0](x)))
        torch.testing.assert_close(sequence(x), expected, rtol=1e-4, atol=1e-5)
        sequence(x.requires_grad_()).sum().backward()
        del sequence


def test_a_peer_is_near_to_itself(dht: moe.DHT) -> None:
    assert ping_peers(dht, [dht.peer_id.to_base58()]) == {dht.peer_id.to_base58(): 0.0}


def test_a_server_that_has_stopped_behind_the_clients_own_dht() -> None:
    dht = start_dht(**LOOPBACK)
    server = Server(dht, {"nop.0": backend("nop.0", name_to_block["nop"](HIDDEN))}, start=True)
    config = ClientConfig(max_retries=0, total_timeout_s=10.0)
    (direct,) = get_experts(dht, ["nop.0"], config=config)
    (found,) = find_experts(dht, ["nop.0"])
    assert found is not None
    other = RemoteExpert(ExpertInfo("nop.0", dht.peer_id), dht, config=ClientConfig(transport="libp2p", max_retries=0))
    assert direct(torch.randn(1, HIDDEN)).shape == other(torch.randn(1, HIDDEN)).shape
    server.shutdown()
    for expert in (direct, other):
        with pytest.raises((P2PDaemonError, P2PHandlerError, LifecycleError)):
            expert(torch.randn(1, HIDDEN))


# --- the event loop of clients ----------------------------------------------------------------------------------------


def test_coroutines_in_the_clients_event_loop() -> None:
    async def answer() -> int:
        return 42

    assert RemoteExpertWorker.run_coroutine(answer()) == 42
    assert RemoteExpertWorker.run_coroutine(answer(), return_future=True).result(10.0) == 42
