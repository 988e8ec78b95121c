"""Tensors that are held for their senders: the store (time is a number), and requests that refer to them, made by hand as a
hostile client would.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe.config import HandlerConfig
from moe.errors import MoEError, Overloaded, ProtocolError, RemoteSchemaError, TensorNotHeld
from moe.expert_uid import join_chain
from moe.schema import BatchTensorProto, Compression, TensorProto, digest
from moe.server.expert_backend import ExpertBackend
from moe.server.held_tensors import HeldTensor, HeldTensors
from moe.testing import MemoryServer, MemoryTransport
from moe.transport.base import BACKWARD, FORWARD, Call, Reply
from moe.transport.event_loop import client_loop
from moe.wire.messages import (
    FEATURES,
    MIN_HELD_BYTES,
    BlockInputs,
    RequestHeader,
    decode_request_header,
    encode_header,
    new_request_id,
)
from tests.experts import HIDDEN, LoraExpert, linear_backend, local_twin, lora_backend, seeded

WAIT_S = 20.0  # generous: the machine may be busy
LORA = ("lora_a", "lora_b")
RANK = 256  # with it a matrix of an adapter takes 6 KiB

# --- the store -----------------------------------------------------------------------------------------------------------


def tensor(size_bytes: int = 10) -> HeldTensor:
    made = torch.zeros(size_bytes, dtype=torch.uint8)
    return HeldTensor(made, made._version)


def held(store: HeldTensors, peer: str, keys: str, now: float) -> str:
    """Those of the keys that are held; asking is using."""
    return "".join(key for key in keys if store.find(peer, key.encode(), now) is not None)


def store(max_bytes: int = 50, max_bytes_per_peer: int = 30, window_s: float = 10.0) -> HeldTensors:
    return HeldTensors(max_bytes, max_bytes_per_peer, window_s)


def test_a_peer_finds_what_it_has_sent_and_nothing_else() -> None:
    own, kept = store(), tensor()
    own.hold("anna", b"a", kept, 0.0)
    assert own.find("anna", b"a", 1.0) is kept
    assert own.find("anna", b"b", 1.0) is None
    assert own.find("bert", b"a", 1.0) is None
    own.drop("bert", [b"a"])
    own.drop("anna", [b"b"])
    assert held(own, "anna", "a", 1.0) == "a"
    own.drop("anna", [b"a", b"a"])
    assert repr(own) == "HeldTensors(0 of 0 peers, 0 bytes)"


def test_the_least_recently_used_ones_of_a_peer_make_room() -> None:
    own = store()
    for i, key in enumerate("abc"):
        own.hold("anna", key.encode(), tensor(), float(i))
    assert held(own, "anna", "a", 3.0) == "a"
    own.hold("anna", b"d", tensor(), 4.0)
    assert held(own, "anna", "abcd", 5.0) == "acd"
    own.hold("anna", b"e", tensor(21), 6.0)
    assert held(own, "anna", "acde", 7.0) == "e"


def test_a_peer_that_sends_much_pushes_out_its_own_first() -> None:
    own = store()
    own.hold("anna", b"a", tensor(), 0.0)
    for i in range(100):
        own.hold("bert", str(i).encode(), tensor(), 1.0)
    assert held(own, "anna", "a", 2.0) == "a"
    assert repr(own) == "HeldTensors(4 of 2 peers, 40 bytes)"


def test_all_together_are_bounded_too() -> None:
    own = store()
    for i, peer in enumerate(("anna", "bert", "carl", "dora", "emil", "fred")):
        own.hold(peer, b"a", tensor(), float(i))
    assert own.bytes == 50
    assert own.find("anna", b"a", 6.0) is None
    assert own.find("bert", b"a", 6.0) is not None


def test_a_tensor_that_is_too_large_is_not_held_and_pushes_nothing_out() -> None:
    own = store()
    own.hold("anna", b"a", tensor(), 0.0)
    own.hold("anna", b"b", tensor(31), 1.0)
    assert held(own, "anna", "ab", 2.0) == "a"
    own.hold("anna", b"a", tensor(31), 3.0)
    assert held(own, "anna", "a", 4.0) == ""  # what it had under this key is another one
    nothing = store(max_bytes=0)
    nothing.hold("anna", b"a", tensor(1), 0.0)
    assert len(nothing) == 0


def test_what_nobody_uses_is_dropped() -> None:
    own = store()
    own.hold("anna", b"a", tensor(), 0.0)
    own.hold("anna", b"b", tensor(), 4.0)
    assert own.expire(9.9) == 10.0
    assert held(own, "anna", "a", 9.9) == "a"
    assert own.expire(14.0) == 19.9
    assert held(own, "anna", "ab", 15.0) == "a"
    assert own.expire(25.0) is None
    assert own.bytes == 0


def test_a_tensor_that_was_written_to_is_not_what_was_sent() -> None:
    own = store()
    before, after = tensor(), tensor()
    own.hold("anna", b"a", before, 0.0)
    before.tensor[3:5].detach().add_(1)
    after.tensor.add_(1)
    own.hold("anna", b"b", after, 0.0)
    assert held(own, "anna", "ab", 1.0) == ""
    assert own.bytes == 0


def test_a_part_counts_as_all_of_its_memory() -> None:
    own, part = store(), torch.zeros(30, dtype=torch.uint8)[:1]
    own.hold("anna", b"a", HeldTensor(part, part._version), 0.0)
    assert own.bytes == 30


class Model:
    """The same, as plainly as possible: (peer, key, size, time of last use), the least recently used first."""

    def __init__(self, max_bytes: int, max_bytes_per_peer: int, window_s: float):
        self.limits, self.window_s = (max_bytes, min(max_bytes, max_bytes_per_peer)), window_s
        self.items: list[tuple[str, bytes, int, float]] = []

    def expire(self, now: float) -> None:
        self.items = [item for item in self.items if item[3] > now - self.window_s]

    def find(self, peer: str, key: bytes, now: float) -> bool:
        self.expire(now)
        for item in self.items:
            if item[:2] == (peer, key):
                self.items.remove(item)
                self.items.append((*item[:3], now))
                return True
        return False

    def hold(self, peer: str, key: bytes, size: int, now: float) -> None:
        self.expire(now)
        self.drop(peer, key)
        if size > self.limits[1]:
            return
        self.items.append((peer, key, size, now))
        while sum(item[2] for item in self.items if item[0] == peer) > self.limits[1]:
            self.items.remove(next(item for item in self.items if item[0] == peer))
        while sum(item[2] for item in self.items) > self.limits[0]:
            self.items.pop(0)

    def drop(self, peer: str, key: bytes) -> None:
        self.items = [item for item in self.items if item[:2] != (peer, key)]


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["hold", "find", "drop"]),
        st.sampled_from(["anna", "bert", "carl"]),
        st.sampled_from([b"a", b"b", b"c", b"d"]),
        st.integers(0, 40),
        st.floats(0, 4),
    ),
    max_size=60,
)


@given(STEPS, st.integers(0, 60), st.integers(1, 40))
@settings(max_examples=200)
def test_it_does_what_its_model_does(steps: list[Any], max_bytes: int, max_bytes_per_peer: int) -> None:
    own, model, now = store(max_bytes, max_bytes_per_peer, 5.0), Model(max_bytes, max_bytes_per_peer, 5.0), 0.0
    for action, peer, key, size, pause_s in steps:
        now += pause_s
        if action == "hold":
            own.hold(peer, key, tensor(size), now)
            model.hold(peer, key, size, now)
        elif action == "find":
            assert (own.find(peer, key, now) is not None) == model.find(peer, key, now)
        else:
            own.drop(peer, [key])
            model.drop(peer, key)
        assert own.bytes == sum(item[2] for item in model.items) <= max_bytes
        assert len(own) == len(model.items)
        assert sum(own._peer_bytes.values()) == own.bytes
        assert {peer: len(keys) for peer, keys in own._of_peer.items()} == {
            peer: sum(item[0] == peer for item in model.items) for peer in {item[0] for item in model.items}
        }


# --- requests --------------------------------------------------------------------------------------------------------------


def make_call(method: str, uid: str, tensors: Sequence[torch.Tensor], header: RequestHeader | None) -> Call:
    return Call(method, uid, header, list(tensors), [Compression.NONE] * len(tensors))


def send(
    server: MemoryServer,
    method: str,
    tensors: Sequence[torch.Tensor],
    header: RequestHeader | None,
    uid: str = "lora.0",
    caller: str = "client",
) -> Reply:
    transport = MemoryTransport({server.name: server.handler}, caller)
    return client_loop().run(transport.call(server.peer, make_call(method, uid, tensors, header), timeout_s=WAIT_S))


def lora_server(config: HandlerConfig | None = None, module: nn.Module | None = None, lr: float | None = None) -> Any:
    module = module or seeded(LoraExpert)
    optimizer = None if lr is None else torch.optim.SGD(module.parameters(), lr=lr)
    backend = lora_backend(module, optimizer, max_batch_size=64)
    return MemoryServer({"lora.0": backend}, handler_config=config)


def x(rows: int = 2, length: int = 3) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN)


def adapter(rank: int = RANK) -> list[torch.Tensor]:
    return [torch.randn(HIDDEN, rank) / rank, torch.randn(rank, HIDDEN)]


def leaves(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [t.detach().clone().requires_grad_(t.is_floating_point()) for t in tensors]


def close(got: torch.Tensor, expected: torch.Tensor | None) -> None:
    assert expected is not None
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


def lora_header(**fields: Any) -> RequestHeader:
    return RequestHeader(present=LORA, **fields)


def test_an_adapter_that_was_sent_before_need_not_be_sent_again() -> None:
    lora = adapter()
    with lora_server() as server:
        twin = local_twin(server.backends["lora.0"].module)
        send(server, FORWARD, [x(), *lora], lora_header(hold=(1, 2)))
        keys = {1: digest(lora[0]), 2: digest(lora[1])}
        data, grad = x(), x()
        mine = leaves(data, *lora)
        expected = twin(mine[0], lora_a=mine[1], lora_b=mine[2])
        expected.backward(grad)
        (output,) = send(server, FORWARD, [data], lora_header(held=keys)).tensors
        close(output, expected)
        backward = lora_header(held=keys, request_id=new_request_id())
        for got, leaf in zip(send(server, BACKWARD, [data, grad], backward).tensors, mine, strict=True):
            close(got, leaf.grad)
        one_of_them = lora_header(held={2: keys[2]})
        close(send(server, FORWARD, [data, lora[0]], one_of_them).tensors[0], expected)
        assert server.handler.inflight.bytes == 0


def test_inputs_of_a_forward_are_kept_for_one_backward() -> None:
    data, mask, lora, grad = x(32, 8), torch.rand(32, 8) > 0.3, adapter(), x(32, 8)
    request_id = new_request_id()
    with lora_server() as server:
        twin = local_twin(server.backends["lora.0"].module)
        present = (*LORA, "mask")
        keeping = RequestHeader(present=present, keep=True, request_id=request_id)
        send(server, FORWARD, [data, *lora, mask], keeping)
        assert len(server.handler.held_inputs) == 3  # not the mask, which is small
        keys = dict.fromkeys(range(3), request_id)
        referring = RequestHeader(present=present, request_id=new_request_id(), held=keys)
        got = send(server, BACKWARD, [mask, grad], referring).tensors
        mine = leaves(data, *lora)
        twin(mine[0], lora_a=mine[1], lora_b=mine[2], mask=mask).backward(grad)
        for gradient, leaf in zip(got, mine, strict=True):
            close(gradient, leaf.grad)
        assert server.handler.held_inputs.bytes == 0
        with pytest.raises(TensorNotHeld, match=r"args\[0\] is not held"):
            send(server, BACKWARD, [mask, grad], referring)


def test_a_backward_may_refer_to_some_of_the_inputs_and_lets_go_of_all() -> None:
    data, lora, request_id = x(32, 8), adapter(), new_request_id()
    with lora_server() as server:
        send(server, FORWARD, [data, *lora], lora_header(hold=(1,), keep=True, request_id=request_id))
        assert (len(server.handler.held_globals), len(server.handler.held_inputs)) == (1, 3)
        keys = {0: request_id, 1: digest(lora[0])}
        send(server, BACKWARD, [lora[1], data], lora_header(held=keys, request_id=new_request_id()))
        assert (len(server.handler.held_globals), len(server.handler.held_inputs)) == (1, 0)


def test_a_backward_that_fails_leaves_the_inputs_for_another_try() -> None:
    data, grad, request_id = x(32, 8), x(32, 8), new_request_id()
    with lora_server(lr=0.1) as server:
        send(server, FORWARD, [data], RequestHeader(keep=True, request_id=request_id))
        backward = RequestHeader(request_id=new_request_id(), held={0: request_id})
        with pytest.raises(RemoteSchemaError, match="expected 32 rows"):
            send(server, BACKWARD, [grad[:3]], backward)
        (got,) = send(server, BACKWARD, [grad], backward).tensors
        assert got.shape == data.shape
        (repeated,) = send(server, BACKWARD, [data, grad], changed(backward, held={})).tensors
        assert torch.equal(got, repeated)
        assert server.backends["lora.0"].updates == 1


class TwoKwargs(nn.Module):
    """Two optional kwargs of one shape, and another use for each."""

    def forward(self, x: torch.Tensor, a: torch.Tensor | None = None, b: torch.Tensor | None = None) -> torch.Tensor:
        return x.tanh() * (1 if a is None else a) + (0 if b is None else b.sin() * x)


def two_kwargs(name: str) -> ExpertBackend:
    proto = BatchTensorProto(HIDDEN)
    kwargs = {"a": proto, "b": proto}
    return ExpertBackend(name, TwoKwargs(), args_schema=(proto,), kwargs_schema=kwargs, optional_kwargs=("a", "b"))


@pytest.mark.parametrize("uid, present", [("e.0", ("b",)), ("e.1", ("a",)), ("e.0", ()), ("e.0", ("a", "b"))])
def test_what_is_kept_is_of_one_expert_and_its_kwargs(uid: str, present: tuple[str, ...]) -> None:
    """A backward of anything else is answered as if nothing had been kept, or with ``not_held``."""
    rows = 512
    data, a, b, grad = (torch.randn(rows, HIDDEN) for _ in range(4))
    request_id = new_request_id()
    with MemoryServer({"e.0": two_kwargs("e.0"), "e.1": two_kwargs("e.1")}) as server:
        keeping = RequestHeader(present=("a",), keep=True, request_id=request_id)
        send(server, FORWARD, [data, a], keeping, "e.0")
        assert (len(server.handler.held_inputs), len(server.handler.held_forwards)) == (2, 1)
        kwargs = [{"a": a, "b": b}[name] for name in present]
        mine = leaves(data, *kwargs)
        TwoKwargs()(mine[0], **dict(zip(present, mine[1:]))).backward(grad)
        everything = dict.fromkeys(range(1 + len(present)), request_id)
        if uid == "e.1" or "b" in present:  # by position it would be found
            with pytest.raises(TensorNotHeld):
                send(server, BACKWARD, [grad], RequestHeader(present=present, held=everything), uid)
        referring = RequestHeader(present=present, held={0: request_id} if uid == "e.0" else {})
        sent = [*([] if uid == "e.0" else [data]), *kwargs, grad]
        for gradient, leaf in zip(send(server, BACKWARD, sent, referring, uid).tensors, mine, strict=True):
            close(gradient, leaf.grad)
        server.handler.check_idle()


def test_activations_of_small_requests_are_not_kept() -> None:
    """Each takes some memory besides its tensors, and they would be many."""
    with lora_server() as server:
        send(server, FORWARD, [x(1)], RequestHeader(keep=True, request_id=new_request_id()))
        assert len(server.handler.held_forwards) == 0
        for _ in range(5):
            send(server, FORWARD, [x(32, 8)], RequestHeader(keep=True, request_id=new_request_id()))
        assert server.handler.held_forwards.bytes > 5 * 2**16
        server.handler.check_idle()


def test_what_is_held_counts_as_it_was_when_it_came() -> None:
    own, growing = store(), tensor(10)
    own.hold("anna", b"a", growing, 0.0)
    growing.tensor.untyped_storage().resize_(20)
    own.check()
    own.drop("anna", [b"a"])
    assert own.bytes == 0


def changed(header: RequestHeader, **changes: Any) -> RequestHeader:
    fields = {name: getattr(header, name) for name in header.__struct_fields__}
    return RequestHeader(**{**fields, **changes})


def test_only_those_who_ask_have_their_tensors_held() -> None:
    lora, data = adapter(), x(32, 8)
    with lora_server() as server:
        send(server, FORWARD, [data, *lora], lora_header())
        send(server, FORWARD, [data, *lora], lora_header(request_id=new_request_id()))
        send(server, FORWARD, [data, *lora], lora_header(keep=True))  # under no name
        send(server, BACKWARD, [data, *lora, data], lora_header(keep=True, request_id=new_request_id()))
        assert (len(server.handler.held_globals), len(server.handler.held_inputs)) == (0, 0)
        send(server, FORWARD, [data, *adapter(2)], lora_header(hold=(1, 2)))  # too small
        send(server, FORWARD, [data, *lora], lora_header(hold=(0, 3, 4095)))  # not global, or not there
        assert len(server.handler.held_globals) == 0
        send(server, BACKWARD, [data, *lora, data], lora_header(hold=(1, 2), request_id=new_request_id()))
        assert server.handler.held_globals.bytes == sum(t.nbytes for t in lora)


def test_a_server_without_room_says_that_it_holds_nothing() -> None:
    with lora_server(HandlerConfig(held_max_bytes=0)) as server:
        assert set(FEATURES) - set(server.handler.describe("client", "lora.0").features) == {"held_tensors"}
        data, lora = x(32, 8), adapter()
        send(server, FORWARD, [data, *lora], lora_header(hold=(1, 2), keep=True, request_id=new_request_id()))
        assert server.handler.held_globals.bytes == server.handler.held_inputs.bytes == 0
    with lora_server() as server:
        assert set(server.handler.describe("client", "lora.0").features) == set(FEATURES)


def test_what_is_held_is_bounded_by_the_settings() -> None:
    lora = adapter()
    with lora_server(HandlerConfig(held_max_bytes_per_peer=lora[0].nbytes)) as server:
        send(server, FORWARD, [x(), *lora], lora_header(hold=(1, 2)))
        assert server.handler.held_globals.bytes == lora[0].nbytes
        with pytest.raises(TensorNotHeld, match=r"kwargs\['lora_a'\] is not held"):
            send(server, FORWARD, [x(), lora[1]], lora_header(held={1: digest(lora[0])}))
        send(server, FORWARD, [x(), lora[0]], lora_header(held={2: digest(lora[1])}))


def test_tensors_that_nobody_uses_are_dropped_although_no_request_comes() -> None:
    with lora_server(HandlerConfig(held_window_s=0.2)) as server:
        header = lora_header(hold=(1, 2), keep=True, request_id=new_request_id())
        send(server, FORWARD, [x(32, 8), *adapter()], header)
        assert server.handler.held_inputs.bytes > 0
        deadline = time.monotonic() + WAIT_S
        while server.handler.held_globals.bytes or server.handler.held_inputs.bytes:
            assert time.monotonic() < deadline
            client_loop().run(asyncio.sleep(0.01))


def test_a_request_that_is_running_keeps_what_it_refers_to() -> None:
    lora, data = adapter(), x()
    with lora_server() as server:
        expected = local_twin(server.backends["lora.0"].module)(data, lora_a=lora[0], lora_b=lora[1])
        send(server, FORWARD, [data, *lora], lora_header(hold=(1, 2)))
        transport = MemoryTransport({"server": server.handler})
        header = lora_header(held={1: digest(lora[0]), 2: digest(lora[1])})
        with server.paused():
            call = make_call(FORWARD, "lora.0", [data], header)
            answer = client_loop().submit(transport.call(server.peer, call, timeout_s=WAIT_S))
            server.wait_pending(1)
            server.handler.held_globals.expire(float("inf"))
            assert server.handler.held_globals.bytes == 0
        close(answer.result(WAIT_S).tensors[0], expected)


def test_bytes_of_a_reference_count_as_if_they_had_been_sent() -> None:
    lora = adapter()
    size = sum(t.nbytes for t in lora)
    config = HandlerConfig(max_request_bytes=size + 2000, max_inflight_bytes=2 * size)
    header = lora_header(held={1: digest(lora[0]), 2: digest(lora[1])})
    with lora_server(config) as server:
        send(server, FORWARD, [x(), *lora], lora_header(hold=(1, 2)))
        with pytest.raises(RemoteSchemaError, match="exceeds"):
            send(server, FORWARD, [x(32, 8)], header)
        with Opened(server, header), pytest.raises(Overloaded, match="in flight"):
            send(server, FORWARD, [x()], header)
        send(server, FORWARD, [x()], header)
        assert server.handler.inflight.bytes == 0


class Opened:
    """A request that has been opened, and holds what it refers to."""

    def __init__(self, server: MemoryServer, header: RequestHeader):
        self._server, self._header = server, header

    def __enter__(self) -> None:
        async def open_it() -> Any:
            return self._server.handler.open("client", FORWARD, "lora.0", self._header)

        self._admission = client_loop().run(open_it())

    def __exit__(self, *exc_info: object) -> None:
        self._admission.release()


def test_calls_that_refer_share_a_lane_with_calls_that_send() -> None:
    lora, module = adapter(), seeded(LoraExpert)
    with lora_server(module=module) as server:
        send(server, FORWARD, [x(), *lora], lora_header(hold=(1, 2)))
        launches, data = module.launches, [x(), x(3)]
        requests = [
            ([data[0]], lora_header(held={1: digest(lora[0]), 2: digest(lora[1])}), "client"),
            ([data[1], *lora], lora_header(), "somebody else"),
        ]
        with server.paused():
            answers = []
            for tensors, header, caller in requests:
                transport = MemoryTransport({"server": server.handler}, caller)
                call = make_call(FORWARD, "lora.0", tensors, header)
                answers.append(client_loop().submit(transport.call(server.peer, call, timeout_s=WAIT_S)))
            server.wait_pending(2)
        for answer, own in zip(answers, data):
            expected = local_twin(module)(own, lora_a=lora[0], lora_b=lora[1])
            close(answer.result(WAIT_S).tensors[0], expected)
        assert module.launches == launches + 1


# --- chains ----------------------------------------------------------------------------------------------------------------


def test_chains_refer_too() -> None:
    backends = {f"b.{i}": lora_backend(seeded(LoraExpert, seed=i), name=f"b.{i}", max_batch_size=64) for i in range(2)}
    lora, data, grad, request_id = adapter(), x(32, 8), x(32, 8), new_request_id()
    chain = (BlockInputs(present=LORA, tensors=(1, 2)), BlockInputs(present=LORA, tensors=(1, 2)))
    uid = join_chain(list(backends))
    keys = {1: digest(lora[0]), 2: digest(lora[1])}
    with MemoryServer(backends) as server:
        mine = leaves(data, *lora)
        expected = mine[0]
        for backend in backends.values():
            expected = local_twin(backend.module)(expected, lora_a=mine[1], lora_b=mine[2])
        expected.backward(grad)
        keeping = RequestHeader(chain=chain, hold=(1, 2), keep=True, request_id=request_id)
        close(send(server, FORWARD, [data, *lora], keeping, uid).tensors[0], expected)
        close(send(server, FORWARD, [data], RequestHeader(chain=chain, held=keys), uid).tensors[0], expected)
        ids = tuple(BlockInputs(present=LORA, tensors=(1, 2), request_id=new_request_id()) for _ in backends)
        backward = RequestHeader(chain=ids, held={0: request_id, **keys})
        for got, leaf in zip(send(server, BACKWARD, [grad], backward, uid).tensors, mine, strict=True):
            close(got, leaf.grad)
        assert server.handler.held_inputs.bytes == 0


def test_a_reference_has_to_fit_every_block_that_takes_it() -> None:
    backends = {
        "wide.0": lora_backend(seeded(LoraExpert), name="wide.0"),
        "narrow.0": ExpertBackend(
            "narrow.0", LoraExpert(), args_schema=(BatchTensorProto(None, HIDDEN),),
            kwargs_schema={"lora_a": TensorProto(HIDDEN, 2), "lora_b": TensorProto(2, HIDDEN)}, optional_kwargs=LORA,
        ),
    }  # fmt: skip
    lora = adapter()
    inputs = BlockInputs(present=LORA, tensors=(1, 2))
    with MemoryServer(backends) as server:
        send(server, FORWARD, [x(), *lora], lora_header(hold=(1, 2)), "wide.0")
        header = RequestHeader(chain=(inputs, inputs), held={1: digest(lora[0]), 2: digest(lora[1])})
        with pytest.raises(RemoteSchemaError, match=r"narrow.0: kwargs\['lora_a'\]: expected float32\(6, 2\)"):
            send(server, FORWARD, [x()], header, join_chain(["wide.0", "narrow.0"]))


# --- what a hostile client might try -----------------------------------------------------------------------------------

HELD_ID = b"i" * 16
KEPT, SECOND = adapter()
BAD_REFERENCES: dict[str, tuple[dict[int, bytes], int, type[MoEError], str]] = {
    "a digest of nothing": ({1: bytes(32)}, 2, TensorNotHeld, r"kwargs\['lora_a'\] is not held"),
    "a request id of nothing": ({0: bytes(16)}, 2, TensorNotHeld, r"args\[0\] is not held"),
    "the digest of a global for a batched tensor": ({0: digest(KEPT)}, 2, RemoteSchemaError, "a key of 32 bytes"),
    "an id of another forward": ({2: b"o" * 16}, 2, TensorNotHeld, r"kwargs\['lora_b'\] is not held"),
    "a key of another length": ({1: digest(KEPT)[:20]}, 2, RemoteSchemaError, "a key of 20 bytes"),
    "another shape": ({2: digest(KEPT)}, 2, RemoteSchemaError, r"kwargs\['lora_b'\]: expected float32\(any, 6\), got"),
    "a position after the inputs": ({3: digest(KEPT)}, 2, RemoteSchemaError, "position 3 is none of the 3 inputs"),
    "another number of rows": ({0: HELD_ID}, 3, RemoteSchemaError, "rows"),
    "all tensors sent as well": ({1: digest(KEPT), 2: digest(SECOND)}, 3, RemoteSchemaError, "expected 1 .*, got more"),
    "fewer tensors than are missing": ({1: digest(KEPT)}, 1, RemoteSchemaError, "expected 2 tensors .*lora_b.*, got 1"),
}


@pytest.mark.parametrize("name", BAD_REFERENCES)
def test_a_bad_reference_is_refused(name: str) -> None:
    keys, count, error, message = BAD_REFERENCES[name]
    method = BACKWARD if "after the inputs" in name else FORWARD
    with lora_server() as server:
        header = lora_header(hold=(1, 2), keep=True, request_id=HELD_ID)
        send(server, FORWARD, [x(32, 8), KEPT, SECOND], header)
        assert (len(server.handler.held_globals), len(server.handler.held_inputs)) == (2, 3)
        before = server.handler.held_globals.bytes, server.handler.held_inputs.bytes
        sent = {"another number of rows": [KEPT, SECOND], "another shape": [x(), KEPT]}.get(
            name, [x(), KEPT, SECOND][:count]
        )
        if name == "another number of rows":  # of a mask, beside the input that is held
            header = RequestHeader(present=("mask", *LORA), held=keys)
            sent.append(torch.ones(2, 8).bool())
        else:
            header = lora_header(held=keys, request_id=new_request_id())
        with pytest.raises(error, match=message):
            send(server, method, sent, header)
        assert (server.handler.held_globals.bytes, server.handler.held_inputs.bytes) == before
        assert server.handler.inflight.bytes == 0
        assert server.handler.traffic(["lora.0"]).open == 0


def test_keys_of_another_peer_find_nothing() -> None:
    with lora_server() as server:
        header = lora_header(hold=(1, 2), keep=True, request_id=HELD_ID)
        send(server, FORWARD, [x(32, 8), KEPT, SECOND], header)
        with pytest.raises(TensorNotHeld, match="lora_a"):
            send(server, FORWARD, [x(), SECOND], lora_header(held={1: digest(KEPT)}), caller="thief")
        with pytest.raises(TensorNotHeld, match="args"):
            send(server, FORWARD, [KEPT, SECOND], lora_header(held={0: HELD_ID}), caller="thief")
        send(server, FORWARD, [SECOND], lora_header(held={0: HELD_ID, 1: digest(KEPT)}))


def test_a_digest_is_what_the_server_has_computed() -> None:
    with lora_server() as server:
        lie = lora_header(held={2: digest(KEPT)})  # of another tensor, and not held
        with pytest.raises(TensorNotHeld):
            send(server, FORWARD, [x(), KEPT], lie)
        assert len(server.handler.held_globals) == 0


def test_a_reference_is_answered_before_any_tensor_is_taken() -> None:
    with lora_server() as server:
        header = decode_request_header(encode_header(lora_header(held={1: bytes(32)})))

        async def open_it() -> None:
            server.handler.open("client", FORWARD, "lora.0", header)

        with pytest.raises(TensorNotHeld):
            client_loop().run(open_it())
        assert server.handler.inflight.bytes == 0


@pytest.mark.parametrize(
    "held", [{0: b"short"}, {0: bytes(33)}, {-1: bytes(32)}, {4096: bytes(32)}, dict.fromkeys(range(513), bytes(32))]
)
def test_headers_with_impossible_references_are_refused(held: dict[int, bytes]) -> None:
    with pytest.raises(ProtocolError, match="malformed request header"):
        decode_request_header(encode_header(RequestHeader(held=held)))


def test_many_references_are_refused_as_quickly_as_one() -> None:
    with lora_server() as server:
        header = lora_header(held=dict.fromkeys(range(512), bytes(32)))
        with pytest.raises(RemoteSchemaError, match="a key of 32 bytes"):
            send(server, FORWARD, [], header)


# --- experts that write to their inputs ----------------------------------------------------------------------------------


class Writer(nn.Module):
    """x (B, D) + scale (D) + shift (D); leaves twice the scale behind."""

    def forward(self, x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
        y = x + scale + shift
        scale.mul_(2)
        return y


class Doubler(nn.Module):
    """x (B, D), left as twice itself."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mul_(2) if not x.requires_grad else x * 2


WIDE = 1024


SCALE, SHIFT = torch.ones(WIDE), torch.zeros(WIDE)  # not written to here: servers have copies
SCALE_HELD = {1: digest(SCALE), 2: digest(SHIFT)}


def writer_server(*uids: str, **options: Any) -> MemoryServer:
    kwargs = {"scale": TensorProto(WIDE), "shift": TensorProto(WIDE)}
    protos: dict[str, Any] = dict(args_schema=(BatchTensorProto(WIDE),), outputs_schema=BatchTensorProto(WIDE))
    return MemoryServer({uid: ExpertBackend(uid, Writer(), kwargs_schema=kwargs, **protos, **options) for uid in uids})


def start(server: MemoryServer, uid: str, tensors: Sequence[torch.Tensor], held: dict[int, bytes]) -> Any:
    """A request of which the answer is waited for later; globals that it sends are to be held."""
    transport = MemoryTransport({server.name: server.handler})
    hold = tuple(position for position in (1, 2) if position not in held)
    call = make_call(FORWARD, uid, tensors, RequestHeader(held=held, hold=hold))
    pending = server.pending
    answer = client_loop().submit(transport.call(server.peer, call, timeout_s=WAIT_S))
    server.wait_pending(pending + 1)
    return answer


def test_what_an_expert_writes_to_stays_held_as_it_was_sent() -> None:
    with writer_server("w.0") as server:
        (output,) = send(
            server, FORWARD, [torch.zeros(2, WIDE), SCALE, SHIFT], RequestHeader(hold=(1, 2)), "w.0"
        ).tensors
        assert output.eq(1).all()
        only_shift = RequestHeader(held={2: digest(SHIFT)})
        assert send(server, FORWARD, [torch.zeros(2, WIDE), SCALE], only_shift, "w.0").tensors[0].eq(1).all()
        for _ in range(2):
            held = RequestHeader(held=SCALE_HELD)
            assert send(server, FORWARD, [torch.zeros(2, WIDE)], held, "w.0").tensors[0].eq(1).all()


def test_a_waiting_request_does_not_get_what_another_one_has_written() -> None:
    with writer_server("w.0", "w.1") as server:
        with server.paused():
            sends = start(server, "w.0", [torch.zeros(2, WIDE), SCALE, SHIFT], {})
            refers = start(server, "w.1", [torch.zeros(2, WIDE)], SCALE_HELD)
        assert sends.result(WAIT_S).tensors[0].eq(1).all()
        assert refers.result(WAIT_S).tensors[0].eq(1).all()


def test_nor_does_the_request_that_has_sent_it() -> None:
    patient = dict(min_batch_size=4, timeout=WAIT_S)
    with writer_server("w.0", "w.1", **patient) as server:
        sends = start(server, "w.1", [torch.zeros(2, WIDE), SCALE, SHIFT], {})
        assert (
            send(server, FORWARD, [torch.zeros(4, WIDE)], RequestHeader(held=SCALE_HELD), "w.0").tensors[0].eq(1).all()
        )
        company = [torch.zeros(2, WIDE), SCALE, SHIFT]
        assert send(server, FORWARD, company, RequestHeader(), "w.1").tensors[0].eq(1).all()
        assert sends.result(WAIT_S).tensors[0].eq(1).all()


def test_nor_does_another_lane_of_the_same_batch() -> None:
    with writer_server("w.0") as server:
        with server.paused():
            answers = [start(server, "w.0", [torch.zeros(1, WIDE), SCALE, SHIFT], {})]
            for rows in (1, 50):  # too different to be stacked
                other_lane = [torch.zeros(rows, WIDE), SHIFT - rows]
                answers.append(start(server, "w.0", other_lane, {1: digest(SCALE)}))
        for shift, answer in zip((0, 1, 50), answers):
            assert answer.result(WAIT_S).tensors[0].eq(1 - shift).all()


def test_blocks_of_a_chain_do_not_share_what_one_of_them_has_written() -> None:
    inputs = BlockInputs(tensors=(1, 2))
    with writer_server("w.0", "w.1") as server:
        header = RequestHeader(chain=(inputs, inputs), hold=(1, 2))
        chain = join_chain(["w.0", "w.1"])
        (output,) = send(server, FORWARD, [torch.zeros(1, WIDE), SCALE, SHIFT], header, chain).tensors
        assert output.eq(2).all()


class AlwaysDoubler(nn.Module):
    """x (B, D), left as twice itself, also where autograd looks on, and in a way that torch does not count."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x.detach().mul_(2)
        x.data.mul_(2)
        return x * 1


def test_inputs_that_the_forward_has_written_to_are_kept_as_they_came() -> None:
    backend = ExpertBackend("d.0", AlwaysDoubler(), args_schema=(BatchTensorProto(WIDE),))
    with MemoryServer({"d.0": backend}) as server:
        header = RequestHeader(keep=True, request_id=HELD_ID)
        x = torch.ones(2, WIDE)
        assert send(server, FORWARD, [x], header, "d.0").tensors[0].eq(4).all()
        assert x.eq(1).all()
        assert len(server.handler.held_inputs) == 1
        (held,) = (entry.what for entry in server.handler.held_inputs._held.values())
        assert held.tensor.eq(1).all()
        referring = RequestHeader(held={0: HELD_ID})
        assert send(server, BACKWARD, [torch.ones(2, WIDE)], referring, "d.0").tensors[0].eq(1).all()


def test_what_is_kept_is_never_a_part_of_a_batch() -> None:
    backend = linear_backend("linear.0")
    data = torch.randn(200, HIDDEN)
    with MemoryServer({"linear.0": backend}) as server:
        transport = MemoryTransport({"server": server.handler})
        ids = [new_request_id() for _ in range(4)]
        with server.paused():
            answers = [
                client_loop().submit(
                    transport.call(
                        server.peer,
                        make_call(FORWARD, "linear.0", [data], RequestHeader(keep=True, request_id=request_id)),
                        timeout_s=WAIT_S,
                    )
                )
                for request_id in ids
            ]
            server.wait_pending(4)
        for answer in answers:
            answer.result(WAIT_S)
        assert data.nbytes >= MIN_HELD_BYTES
        assert (
            server.handler.held_inputs.bytes <= 4 * 1.125 * data.nbytes
        )  # a bytearray that grows has a little to spare
