"""What a client sends once and refers to afterwards: what travels is counted, what comes back is compared with the local
module. Servers, their stores and the encoding are real, the network is memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import nn

import moe.client.references
from moe.client.expert import RemoteExpert
from moe.client.moe import RemoteMixtureOfExperts
from moe.client.references import Pauses, Referring, SentTensors
from moe.config import ClientConfig, HandlerConfig
from moe.errors import ConnectError, Overloaded, PeerGone, TensorNotHeld
from moe.expert_uid import ExpertInfo, PeerIDLike
from moe.schema import BatchTensorProto, Compression, TensorProto
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.testing import MemoryServer, MemoryTransport
from moe.transport.base import Budget, Call, Reply
from moe.transport.event_loop import client_loop
from moe.wire.messages import MAX_HELD
from tests.client.memory_swarm import DIM, Swarm
from tests.client.sequence_swarm import sequence_swarm
from tests.experts import HIDDEN, LoraExpert, in_parallel, local_twin, lora_backend, seeded, unchanged

RANK = 256  # with it a matrix of an adapter takes 6 KiB
QUICK = ClientConfig(min_backoff_s=0.001, max_backoff_s=0.01, total_timeout_s=30.0, request_timeout_s=10.0)
WITHOUT = ClientConfig(hold_tensors=False)
WAIT_S = 20.0


# --- decisions: time is a number -----------------------------------------------------------------------------------------


def test_what_was_sent_is_remembered_by_server() -> None:
    sent = SentTensors(max_known=3)
    sent.note("anna", [b"a", b"b"])
    sent.note("bert", [b"a"])
    assert [sent.has(*key) for key in (("anna", b"a"), ("bert", b"a"), ("bert", b"b"))] == [True, True, False]
    sent.note("anna", [b"a"])
    sent.note("anna", [b"c"])
    assert [sent.has("anna", key) for key in (b"a", b"b", b"c")] == [True, False, True]
    sent.forget("anna", [b"a", b"never sent"])
    assert [sent.has("anna", key) for key in (b"a", b"c")] == [False, True]
    sent.forget("anna")
    assert not sent.has("anna", b"c") and sent.has("bert", b"a")
    assert len(sent) == 1


def test_one_miss_is_an_accident() -> None:
    pauses = Pauses()
    assert not pauses.paused("anna", 0.0)
    for now in (100.0, 100.1, 100.9):  # of requests that were under way
        pauses.missed("anna", now)
        assert not pauses.paused("anna", now)


def test_misses_in_a_row_double_the_pause() -> None:
    pauses = Pauses()
    now, lengths = 100.0, []
    pauses.missed("anna", now)
    for _ in range(8):
        now += 1.0
        pauses.missed("anna", now)
        begin = now
        while pauses.paused("anna", now):
            now += 1.0
        lengths.append(now - begin)
    assert lengths == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]
    assert not pauses.paused("bert", begin)
    pauses.found("anna")
    pauses.missed("anna", now)
    assert not pauses.paused("anna", now)


# --- a client and its servers ----------------------------------------------------------------------------------------------


@dataclass
class Sent:
    """One call as it went over the wire."""

    peer: str
    method: str
    bytes: int
    refers: int
    error: str = ""


@dataclass
class Counting(MemoryTransport):
    """Counts what travels, and fails on demand.

    :ivar broken: errors of the next calls, before they are carried
    """

    services: dict[str, Any]
    caller: str = "client"
    calls: list[tuple[str, str, str]] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    broken: list[Exception] = field(default_factory=list)

    __hash__ = object.__hash__

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        held = call.header.held if call.header is not None else None
        sent = Sent(peer.to_base58(), call.method, call.request_bytes, len(held or {}))
        self.sent.append(sent)
        try:
            if self.broken:
                raise self.broken.pop(0)
            return await super().call(peer, call, timeout_s=timeout_s)
        except Exception as e:
            sent.error = type(e).__name__
            raise

    @property
    def uploaded(self) -> int:
        """Bytes of tensors so far."""
        return sum(sent.bytes for sent in self.sent)

    @property
    def errors(self) -> list[str]:
        """Of calls so far."""
        return [sent.error for sent in self.sent if sent.error]

    def take(self) -> list[Sent]:
        """Calls since the last time."""
        taken, self.sent = self.sent, []
        return taken


class Client:
    """An expert on some servers, and its module here."""

    def __init__(self, servers: list[MemoryServer], uid: str, config: ClientConfig):
        self.servers, self.uid, self.config = servers, uid, config
        self.transport = Counting({server.name: server.handler for server in servers})
        self.expert = self.another(config)

    def another(self, config: ClientConfig) -> RemoteExpert:
        """A further RemoteExpert of the same servers."""
        first, *others = [server.peer for server in self.servers]
        return RemoteExpert(ExpertInfo(self.uid, first), self.transport, replicas=others, config=config)

    @property
    def module(self) -> nn.Module:
        """As the server has it."""
        return local_twin(self.servers[0].backends[self.uid].module)

    def restart(self, index: int = 0) -> None:
        """The server forgets everything but its experts."""
        server = self.servers[index]
        handler = ConnectionHandler(server.backends, server.handler.config)
        self.transport.services[server.name] = server.handler = handler


@contextlib.contextmanager
def serve(
    make: Callable[[], ExpertBackend] = lambda: lora_backend(seeded(LoraExpert), max_batch_size=64),
    *,
    servers: int = 1,
    config: ClientConfig = QUICK,
    **handler: Any,
) -> Iterator[Client]:
    with contextlib.ExitStack() as stack:
        backends = [make() for _ in range(servers)]
        started = [
            MemoryServer({backend.name: backend}, f"server{i}", handler_config=HandlerConfig(**handler))
            for i, backend in enumerate(backends)
        ]
        for server in started:
            stack.enter_context(server)
        yield Client(started, backends[0].name, config)


@pytest.fixture
def keep_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are kept that would be sent again as fast."""
    monkeypatch.setattr(moe.client.references, "KEEP_FROM_BYTES", 1)


def x(rows: int = 2, length: int = 3) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN)


def adapter(rank: int = RANK) -> dict[str, torch.Tensor]:
    lora = {"lora_a": torch.randn(HIDDEN, rank) / rank, "lora_b": torch.randn(rank, HIDDEN)}
    return {name: tensor.requires_grad_() for name, tensor in lora.items()}


def size(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def check(client: Client, lora: dict[str, torch.Tensor], data: torch.Tensor | None = None, **options: Any) -> None:
    """A forward and a backward through the server give what the module gives here."""
    data = x() if data is None else data
    inputs = [data.detach().clone().requires_grad_() for _ in range(2)]
    grad = torch.randn_like(data)
    gradients = []
    for module, own in zip((options.get("expert", client.expert), client.module), inputs):
        for tensor in lora.values():
            tensor.grad = None
        output = module(own, **lora)
        output.backward(grad)
        gradients.append([output.detach(), own.grad, *(tensor.grad for tensor in lora.values())])
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)  # sums over up to 1600 positions


# --- an adapter is sent once ---------------------------------------------------------------------------------------------


def test_an_unchanged_adapter_over_100_calls_is_sent_once() -> None:
    with serve() as client, torch.no_grad():
        lora, data = adapter(), x()
        expected = client.module(data, **lora)
        for _ in range(100):
            torch.testing.assert_close(client.expert(data, **lora), expected, atol=1e-5, rtol=1e-5)
        assert client.transport.uploaded == 100 * data.nbytes + size(lora)
        assert client.transport.errors == []
        assert Referring.over(client.transport).digests.computed == 2


def test_without_holding_it_is_sent_each_time() -> None:
    with serve(config=WITHOUT) as client:
        lora, data = adapter(), x()
        for _ in range(3):
            check(client, lora, data)
        assert client.transport.uploaded == 6 * size(lora) + 3 * data.nbytes * 3
        assert client.servers[0].handler.held_globals.bytes == 0


def test_the_backward_refers_to_what_the_forward_has_sent() -> None:
    with serve() as client:
        lora = adapter()
        check(client, lora)
        check(client, lora)
        assert [(sent.method, sent.refers) for sent in client.transport.sent] == [
            ("forward", 0), ("backward", 2), ("forward", 2), ("backward", 2),
        ]  # fmt: skip


def optimizer_step(tensor: torch.Tensor) -> None:
    tensor.grad = torch.ones_like(tensor)
    torch.optim.SGD([tensor], lr=0.1).step()


def plain_step(tensor: torch.Tensor) -> None:
    tensor.data -= 0.1


@pytest.mark.parametrize("change", [optimizer_step, plain_step])
def test_what_has_changed_in_place_is_sent_again(change: Callable[[torch.Tensor], None]) -> None:
    with serve() as client:
        lora = adapter()
        check(client, lora)
        change(lora["lora_a"])
        client.transport.take()
        check(client, lora)
        forward, backward = client.transport.take()
        assert (forward.refers, forward.bytes) == (1, x().nbytes + lora["lora_a"].nbytes)
        assert backward.refers == 2
        check(client, lora)
        assert [sent.refers for sent in client.transport.take()] == [2, 2]
        change(lora["lora_a"])
        check(client, lora)
        assert client.transport.errors == []
        assert Referring.over(client.transport).digests.computed == 4  # none twice


def test_equal_contents_of_another_tensor_are_the_same() -> None:
    with serve() as client, torch.no_grad():
        lora = adapter()
        client.expert(x(), **lora)
        client.transport.take()
        client.expert(x(), **{name: tensor.detach().clone() for name, tensor in lora.items()})
        client.expert(x(), **{name: tensor.double() for name, tensor in lora.items()})
        assert [sent.refers for sent in client.transport.sent] == [2, 2]


def test_small_tensors_are_sent_and_not_looked_at() -> None:
    with serve() as client:
        lora = adapter(2)
        check(client, lora)
        check(client, lora)
        assert [sent.refers for sent in client.transport.sent] == [0] * 4
        assert Referring.over(client.transport).digests.computed == 0
        assert client.servers[0].handler.held_globals.bytes == 0


def test_experts_of_one_server_share_what_it_holds() -> None:
    backends = {uid: lora_backend(seeded(LoraExpert), name=uid) for uid in ("a.0", "a.1")}
    with MemoryServer(backends) as server, torch.no_grad():
        transport = Counting({"server": server.handler})
        lora = adapter()
        for uid in backends:
            RemoteExpert(ExpertInfo(uid, server.peer), transport)(x(), **lora)
        assert [sent.refers for sent in transport.sent] == [0, 2]


def test_a_compressed_adapter_is_sent_once_too() -> None:
    def make() -> ExpertBackend:
        return ExpertBackend(
            "lora.0", seeded(LoraExpert), args_schema=(BatchTensorProto(None, HIDDEN),),
            kwargs_schema={
                "lora_a": TensorProto(HIDDEN, None, compression=Compression.FLOAT16),
                "lora_b": TensorProto(None, HIDDEN, compression=Compression.FLOAT16),
            },
            optional_kwargs=("lora_a", "lora_b"),
        )  # fmt: skip

    with serve(make) as client, torch.no_grad():
        lora, data = adapter(), x()
        outputs = [client.expert(data, **lora) for _ in range(3)]
        outputs.append(client.another(WITHOUT)(data, **lora))
        assert [sent.refers for sent in client.transport.sent] == [0, 2, 2, 0]
        assert client.transport.errors == []
        assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_a_call_that_is_split_sends_its_adapter_once() -> None:
    with serve(lambda: lora_backend(seeded(LoraExpert), max_batch_size=8)) as client:
        lora = adapter()
        check(client, lora, x(8))
        client.transport.take()
        check(client, lora, x(64))
        assert [sent.refers for sent in client.transport.take()] == [2] * 16


def test_calls_at_the_same_time_send_a_large_adapter_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.client.references, "_ONE_UPLOAD_BYTES", 4096)
    with serve() as client, torch.no_grad():
        lora, data = adapter(), [x() for _ in range(8)]
        outputs = in_parallel([lambda own=own: client.expert(own, **lora) for own in data])  # type: ignore[misc]
        for own, output in zip(data, outputs):
            torch.testing.assert_close(output, client.module(own, **lora), atol=1e-5, rtol=1e-5)
        assert client.transport.uploaded == size(lora) + sum(own.nbytes for own in data)
        lora["lora_b"].mul_(2)  # which is digested while it travels
        outputs = in_parallel([lambda own=own: client.expert(own, **lora) for own in data])  # type: ignore[misc]
        for own, output in zip(data, outputs):
            torch.testing.assert_close(output, client.module(own, **lora), atol=1e-5, rtol=1e-5)
        assert client.transport.uploaded == size(lora) + lora["lora_b"].nbytes + 2 * sum(own.nbytes for own in data)
        assert client.transport.errors == []


def test_who_waits_for_an_upload_goes_on_when_it_fails_or_takes_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.client.references, "_ONE_UPLOAD_BYTES", 4096)
    monkeypatch.setattr(moe.client.references, "_MAX_WAIT_S", 0.1)
    with serve() as client, torch.no_grad():
        lora = adapter()
        client.expert(x())  # knows the schema
        client.transport.broken = [Overloaded("for now")]
        in_parallel([lambda: client.expert(x(), **lora)] * 4)
        assert client.transport.errors == ["Overloaded"]
        other = adapter()
        with client.servers[0].paused():
            pending = [client_loop_call(client, other) for _ in range(3)]
            client.servers[0].wait_pending(3)  # the first one is not done, and the others have not waited for ever
        for answer in pending:
            answer.result(WAIT_S)


def client_loop_call(client: Client, lora: dict[str, torch.Tensor]) -> Any:
    """A forward of which the answer is waited for later."""
    caller, schema = client.expert.caller, client.expert.schema
    present, tensors = schema.bind((x(),), lora)
    return client_loop().submit(caller.forward([t.detach() for t in tensors], present, Budget(WAIT_S)))


# --- inputs of a forward are kept for its backward ----------------------------------------------------------------------


@pytest.mark.usefixtures("keep_all")
def test_the_backward_sends_gradients_only() -> None:
    with serve() as client:
        data = x(32, 8)
        check(client, {}, data)
        check(client, adapter(), data)
        assert [(sent.method, sent.refers) for sent in client.transport.sent] == [
            ("forward", 0), ("backward", 1), ("forward", 0), ("backward", 3),
        ]  # fmt: skip
        assert [sent.bytes for sent in client.transport.sent if sent.method == "backward"] == [data.nbytes] * 2
        assert client.servers[0].handler.held_inputs.bytes == 0


@pytest.mark.usefixtures("keep_all")
def test_inputs_are_not_kept_if_no_backward_can_follow() -> None:
    with serve() as client:
        with torch.no_grad():
            client.expert(x(32, 8).requires_grad_())
        client.expert(x(32, 8))
        assert client.servers[0].handler.held_inputs.bytes == 0
        output = client.expert(x(32, 8).requires_grad_())
        assert client.servers[0].handler.held_inputs.bytes > 0
        del output
    trainable = seeded(LoraExpert)
    with serve(lambda: lora_backend(trainable, torch.optim.SGD(trainable.parameters(), lr=0.1))) as client:
        client.expert(x(32, 8))
        assert client.servers[0].handler.held_inputs.bytes > 0


@pytest.mark.parametrize("changed", ["data", "mask", "lora_a", "nothing"])
@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD, torch.optim.Adam])
@pytest.mark.usefixtures("keep_all")
def test_what_was_written_to_unseen_by_autograd_gives_the_same_with_and_without(changed: str, optimizer: Any) -> None:
    """Through .data or NumPy, as some optimizers and data loaders do: a backward does not depend on who kept what."""
    results = []
    for config in (QUICK, WITHOUT):
        torch.manual_seed(0)
        module = seeded(LoraExpert)
        own = None if optimizer is None else optimizer(module.parameters(), lr=0.1)
        with serve(lambda: lora_backend(module, own), config=config) as client:  # noqa: B023
            inputs: dict[str, torch.Tensor] = {"data": x(32, 8), "mask": torch.rand(32, 8) < 0.5, **adapter()}
            inputs["data"].requires_grad_()
            output = client.expert(inputs["data"], **{n: t for n, t in inputs.items() if n != "data"})
            if changed != "nothing":
                memory = inputs[changed].detach().numpy()
                memory[:] = ~memory if changed == "mask" else memory * 2
            output.square().sum().backward()
            gradients = [tensor.grad for tensor in inputs.values() if tensor.grad is not None]
            results.append([output.detach(), *gradients, *(p.detach().clone() for p in module.parameters())])
            (backward,) = (sent for sent in client.transport.sent if sent.method == "backward")
            assert (backward.refers == 3) == (changed == "nothing" and config is QUICK)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.usefixtures("keep_all")
def test_a_second_backward_sends_everything() -> None:
    with serve() as client:
        data = x(32, 8).requires_grad_()
        output = client.expert(data)
        grad = torch.randn_like(output)
        gradients = [torch.autograd.grad(output, data, grad, retain_graph=True)[0] for _ in range(3)]
        assert [sent.refers for sent in client.transport.sent] == [0, 1, 0, 0]
        assert all(torch.equal(gradient, gradients[0]) for gradient in gradients)
        assert client.transport.errors == []


@pytest.mark.usefixtures("keep_all")
def test_a_backward_at_another_server_sends_everything() -> None:
    with serve(servers=2) as client:
        data, lora = x(32, 8).requires_grad_(), adapter()
        output = client.expert(data, **lora)
        client.transport.broken = [PeerGone("the connection broke")]
        output.sum().backward()
        calls = client.transport.take()
        assert [(sent.peer, sent.refers) for sent in calls] == [("server0", 0), ("server0", 3), ("server1", 0)]
        mine = data.detach().clone().requires_grad_()
        client.module(mine, **lora).sum().backward()
        assert data.grad is not None
        torch.testing.assert_close(data.grad, mine.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("keep_all")
def test_a_trained_expert_trains_once_and_the_same() -> None:
    modules = [seeded(LoraExpert) for _ in range(2)]
    after = []
    for module, config in zip(modules, (QUICK, WITHOUT)):
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        with serve(lambda: lora_backend(module, optimizer), config=config) as client:  # noqa: B023
            lora = adapter()
            for _ in range(5):
                client.expert(x(32, 8), **lora).square().sum().backward()
                with torch.no_grad():
                    for tensor in lora.values():
                        tensor -= 0.01 * tensor.grad  # type: ignore[operator]
            assert client.servers[0].backends["lora.0"].updates == 5
            after.append([*lora.values()])
    assert unchanged(modules[0], list(modules[1].parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*after))


@pytest.mark.usefixtures("keep_all")
def test_a_split_call_is_kept_in_parts() -> None:
    with serve(lambda: lora_backend(seeded(LoraExpert), max_batch_size=32)) as client:
        check(client, {}, x(64, 8))
        assert [sent.refers for sent in client.transport.sent] == [0, 0, 1, 1]


@pytest.mark.usefixtures("keep_all")
def test_a_call_that_is_split_otherwise_in_backward_sends_everything() -> None:
    data = x(40, 40)
    with serve(max_request_bytes=int(1.2 * data.nbytes)) as client:  # the backward has the gradients beside the inputs
        check(client, {}, data)
        assert [sent.refers for sent in client.transport.sent] == [0, 0, 0]
        assert client.transport.errors == []


# --- servers that do not hold what they should ---------------------------------------------------------------------------


@pytest.mark.usefixtures("keep_all")
def test_a_server_that_was_started_again_gets_everything_again() -> None:
    with serve() as client:
        lora, data = adapter(), x(32, 8)
        check(client, lora, data)
        client.restart()
        client.transport.take()
        check(client, lora, data)
        assert [(sent.refers, sent.error) for sent in client.transport.take()] == [
            (2, "TensorNotHeld"), (0, ""), (3, ""),
        ]  # fmt: skip
        output = client.expert(data.requires_grad_(), **lora)
        client.restart()
        client.transport.take()
        output.sum().backward()
        assert [(sent.refers, sent.error) for sent in client.transport.take()] == [
            (3, "TensorNotHeld"), (2, "TensorNotHeld"), (0, ""),
        ]  # fmt: skip
        check(client, lora, data)


@pytest.mark.parametrize("error", [PeerGone("the connection broke"), ConnectError("nobody there")])
def test_after_a_lost_connection_nothing_is_taken_for_granted(error: Exception) -> None:
    with serve() as client, torch.no_grad():
        lora = adapter()
        client.expert(x(), **lora)
        client.transport.broken = [error]
        client.expert(x(), **lora)
        assert [sent.refers for sent in client.transport.sent] == [0, 2, 0]


@pytest.mark.usefixtures("keep_all")
def test_tensors_that_are_dropped_in_the_middle_are_sent() -> None:
    with serve(held_max_bytes_per_peer=10_000) as client:  # one matrix of an adapter, one input
        for _ in range(3):
            check(client, adapter(), x(32, 8))
        outputs = [client.expert(x(32, 8).requires_grad_()) for _ in range(3)]
        for output in outputs:
            output.sum().backward()
        assert client.servers[0].handler.held_globals.bytes <= 10_000


def test_a_server_that_drops_everything_is_not_relied_upon_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe.client.references, "_ONE_EPISODE_S", 0.0)
    with serve(held_max_bytes_per_peer=5000) as client, torch.no_grad():  # smaller than each of the matrices
        lora, data = adapter(), x()
        for _ in range(20):
            client.expert(data, **lora)
        assert client.transport.errors == ["TensorNotHeld"] * 2
        assert client.transport.uploaded == 20 * (data.nbytes + size(lora)) + 2 * data.nbytes


def test_a_server_that_holds_nothing_is_never_referred_to() -> None:
    with serve(held_max_bytes=0) as client:
        lora = adapter()
        for _ in range(2):
            check(client, lora)
        assert [sent.refers for sent in client.transport.sent] == [0] * 4
        assert Referring.over(client.transport).digests.computed == 0


class Writer(nn.Module):
    """x (B, T, D) + scale (D), of which twice itself is left behind."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = x + scale
        scale.detach().mul_(2)
        return y


def test_an_expert_that_writes_to_its_inputs_gives_the_same() -> None:
    def make() -> ExpertBackend:
        schema = dict(args_schema=(BatchTensorProto(2048),), kwargs_schema={"scale": TensorProto(2048)})
        return ExpertBackend("w.0", Writer(), outputs_schema=BatchTensorProto(2048), **schema)

    with serve(make) as client, torch.no_grad():
        scale, data = torch.ones(2048), torch.zeros(2, 2048)
        for _ in range(5):
            assert client.expert(data, scale=scale).eq(1).all()
        assert client.transport.errors.count("TensorNotHeld") <= 4


def test_a_server_that_will_not_be_referred_to_at_all_gets_plain_requests() -> None:
    class Stubborn:
        """Holds nothing, although it says so."""

        def __init__(self, handler: ConnectionHandler) -> None:
            self.handler, self.refused = handler, 0

        def __getattr__(self, name: str) -> Any:
            return getattr(self.handler, name)

        def open(self, peer: str, method: str, uid: str, header: Any) -> Any:
            if header.held or header.hold or header.keep:
                self.refused += 1
                raise TensorNotHeld("it is not here")
            return self.handler.open(peer, method, uid, header)

    with serve() as client:
        stubborn = Stubborn(client.servers[0].handler)
        client.transport.services["server0"] = stubborn
        lora = adapter()
        check(client, lora)
        assert stubborn.refused == 2
        client.transport.services["server0"] = AlwaysMissing(client.servers[0].handler)
        with pytest.raises(TensorNotHeld):
            client.another(ClientConfig(max_retries=0))(x(), **lora)


class AlwaysMissing:
    """Says of every request that it refers to something that is not there."""

    def __init__(self, handler: ConnectionHandler) -> None:
        self.handler = handler

    def __getattr__(self, name: str) -> Any:
        return getattr(self.handler, name)

    def open(self, *args: Any) -> Any:
        raise TensorNotHeld("it is not here")


def test_no_more_references_than_a_header_has_room_for() -> None:
    count = MAX_HELD + 8

    def make() -> ExpertBackend:
        kwargs = {f"k{i:04}": TensorProto(1024) for i in range(count)}
        backend_of = dict(args_schema=(BatchTensorProto(2),), kwargs_schema=kwargs)
        return ExpertBackend("sum.0", Sum(), outputs_schema=BatchTensorProto(2), **backend_of)

    with serve(make) as client, torch.no_grad():
        kwargs = {f"k{i:04}": torch.full((1024,), float(i)) for i in range(count)}
        for _ in range(2):
            assert client.expert(torch.zeros(1, 2), **kwargs).eq(sum(range(count))).all()
        assert [sent.refers for sent in client.transport.sent] == [0, MAX_HELD]


class Sum(nn.Module):
    """x (B, 2) plus the first value of each kwarg."""

    def forward(self, x: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        return x + sum(value[0] for value in kwargs.values())


def test_a_transport_that_nobody_uses_any_more_is_let_go() -> None:
    with serve() as client, torch.no_grad():
        client.expert(x(), **adapter())
        referring = weakref.ref(Referring.over(client.transport))
        del client.expert, client.transport
        client_loop().run(asyncio.sleep(0))  # it has done with the call
        gc.collect()
        assert referring() is None


# --- sequences and mixtures ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("keep_all")
def test_sequences_send_an_adapter_once_per_server_and_keep_inputs() -> None:
    with sequence_swarm([0, 1], [2]) as swarm:
        counting = Counting(swarm.swarm._services)
        swarm.swarm.transport = counting  # type: ignore[assignment]
        lora, data, grad = adapter(), x(32, 8), torch.randn(32, 8, HIDDEN)
        results = []
        for sequence in (swarm.sequence(), swarm.sequence(hold_tensors=False)):
            for _ in range(2):
                own = data.clone().requires_grad_()
                for tensor in lora.values():
                    tensor.grad = None
                output = sequence(own, **lora)
                output.backward(grad)
                results.append([output.detach(), own.grad, *(tensor.grad for tensor in lora.values())])
        for result in results[1:]:
            for got, expected in zip(result, results[0]):
                torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert [sent.refers for sent in counting.sent] == [0, 0, 3, 3, 2, 2, 3, 3, *[0] * 8]
        assert counting.errors == []


@pytest.mark.usefixtures("keep_all")
def test_a_sequence_whose_server_is_lost_in_between_gives_the_same() -> None:
    with sequence_swarm([0, 1], [0, 1]) as swarm:
        lora = adapter()
        data = x(32, 8).requires_grad_()
        output = swarm.sequence()(data, **lora)
        grad = torch.randn_like(output)
        swarm.kill(0)
        output.backward(grad)
        own = data.detach().clone().requires_grad_()
        expected = swarm.run_locally(own, per_block=[lora] * 2)
        gradients = [data.grad, *(tensor.grad for tensor in lora.values())]
        for tensor in lora.values():
            tensor.grad = None
        expected.backward(grad)
        for got, other in zip(gradients, [own.grad, *(tensor.grad for tensor in lora.values())]):
            torch.testing.assert_close(got, other, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("keep_all")
def test_experts_of_a_mixture_keep_their_rows_for_the_backward() -> None:
    with Swarm((2, 2)) as swarm:
        gradients = []
        for config in (QUICK, WITHOUT):
            seeded_mixture = seeded(lambda: swarm.mixture(RemoteMixtureOfExperts, k_best=2, config=config))  # noqa: B023
            data = seeded(lambda: torch.randn(512, DIM)).requires_grad_()
            output = seeded_mixture(data)
            kept = sum(handler.held_inputs.bytes for handler in swarm.handlers.values())
            assert (kept > 0) == (config is QUICK)
            output.square().sum().backward()
            assert sum(handler.held_inputs.bytes for handler in swarm.handlers.values()) == 0
            gradients.append(data.grad)
            with torch.no_grad():
                seeded_mixture(data)
            assert sum(handler.held_inputs.bytes for handler in swarm.handlers.values()) == 0
        torch.testing.assert_close(gradients[0], gradients[1], atol=1e-6, rtol=1e-6)
