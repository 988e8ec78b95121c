"""What a server answers to requests that do not fit, sent by a client that checks nothing itself."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
import torch

from moe.dht import DHT
from moe.errors import DeadlineExceeded, ExpertNotFound, ProtocolError, Refused, RemoteSchemaError
from moe.server.server import Server
from moe.testing import check_idle
from moe.transport.base import BACKWARD, FORWARD
from moe.wire.hivemind_dialect import ExpertRequest, to_message
from moe.wire.messages import RequestHeader, encode_header
from moe.wire.tensors import encode_tensor
from tests.swarm.experts import WIDTH, make_backend
from tests.swarm.tools import RawClient, refused, serving

UID = "mixer.0"
MAX_ROWS = 64


@pytest.fixture(scope="module")
def server(dht: DHT) -> Iterator[Server]:
    with serving(dht, make_backend("mixer", UID, max_batch_size=MAX_ROWS)) as server:
        yield server


@pytest.fixture(scope="module")
def raw(dht: DHT, server: Server) -> Iterator[RawClient]:
    raw = RawClient(dht, server.dht.peer_id)
    yield raw
    raw.close()


@dataclass
class Request:
    """A good request, for a test to spoil. Tensors in schema order: x, index, mask, then scale, then the gradient."""

    method: str
    rows: int = 3
    length: int = 5
    scaled: bool = False
    tensors: list[torch.Tensor] = field(default_factory=list)
    header: RequestHeader = field(default_factory=RequestHeader)

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(100 * self.rows + self.length)
        x = torch.randn(self.rows, self.length, WIDTH, generator=generator)
        mask = torch.rand(self.rows, self.length, generator=generator) < 0.7
        self.tensors = [x, torch.arange(self.rows), mask]
        if self.scaled:
            self.tensors.append(torch.randn(WIDTH, generator=generator))
            self.header = RequestHeader(present=("scale",))
        if self.method == BACKWARD:
            self.tensors.append(torch.randn(x.shape, generator=generator))

    def expected(self, server: Server) -> list[torch.Tensor]:
        """The reply's tensors, computed locally."""
        module = server.expert_backends[UID].module
        inputs = [t.clone().requires_grad_(t.is_floating_point()) for t in self.tensors[: 4 if self.scaled else 3]]
        kwargs = {"scale": inputs[3]} if self.scaled else {}
        y, index = module(inputs[0], index=inputs[1], mask=inputs[2], **kwargs)
        if self.method == FORWARD:
            return [y, index]
        inside = [tensor for tensor in inputs if tensor.requires_grad]
        return list(torch.autograd.grad(y, inside, self.tensors[-1]))


def check_exact(received: Any, expected: Any) -> None:
    assert len(received) == len(expected)
    for got, wanted in zip(received, expected):
        torch.testing.assert_close(got, wanted.detach(), rtol=1e-6, atol=1e-6)


async def while_others_call(server: Server, raw: RawClient, bad: Any) -> Any:
    """Send something bad; good calls at the same time and after it must get exact answers."""
    good = [Request(method, length=length) for method in (FORWARD, BACKWARD) for length in (5, 6)]

    async def call(request: Request) -> None:
        reply = await raw.call(request.method, UID, request.tensors, request.header)
        check_exact(reply.tensors, request.expected(server))

    others = [asyncio.ensure_future(call(request)) for request in good]
    try:
        return await bad
    finally:
        await asyncio.gather(*others)
        await call(good[0])


@pytest.fixture
def send(server: Server, raw: RawClient) -> Callable[[Any], Any]:
    """Run a bad request while others call, and check that nothing was trained and nothing is left of it."""

    def run(bad: Any) -> Any:
        before = [parameter.detach().clone() for parameter in server.expert_backends[UID].module.parameters()]
        try:
            return raw.run(while_others_call(server, raw, bad))
        finally:
            for parameter, value in zip(server.expert_backends[UID].module.parameters(), before):
                assert torch.equal(parameter, value)
            check_idle(server)

    return run


ways = pytest.mark.parametrize("way", ["unary", "stream", "link"])
libp2p_ways = pytest.mark.parametrize("way", ["unary", "stream"])
both_methods = pytest.mark.parametrize("method", [FORWARD, BACKWARD])


# --- good ones first: what is refused below is refused for its one fault ---------------------------------------------


@ways
@both_methods
@pytest.mark.parametrize("scaled", [False, True], ids=["", "global"])
@pytest.mark.parametrize("rows", [0, 1, 7, MAX_ROWS])
def test_a_good_request(server: Server, raw: RawClient, method: str, way: str, scaled: bool, rows: int) -> None:
    request = Request(method, rows=rows, scaled=scaled)
    reply = raw.run(raw.call(method, UID, request.tensors, request.header, way=way))
    check_exact(reply.tensors, request.expected(server))


# --- tensors that do not fit -----------------------------------------------------------------------------------------

X, INDEX, MASK = range(3)
Spoil = Callable[[Request], None]


def replace(position: int, change: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    def spoil(request: Request) -> None:
        request.tensors[position] = change(request.tensors[position])

    return spoil


def drop_last(request: Request) -> None:
    request.tensors.pop()


def header(**fields: Any) -> Spoil:
    def spoil(request: Request) -> None:
        request.header = RequestHeader(**fields)

    return spoil


SPOILED: dict[str, tuple[Spoil, str]] = {
    "no tensors": (lambda request: request.tensors.clear(), "expected"),
    "one missing": (drop_last, "expected"),
    "one too many": (lambda request: request.tensors.append(torch.ones(3)), "expected"),
    "an axis too many": (replace(X, lambda t: t.unsqueeze(0)), "args[0]"),
    "an axis too few": (replace(X, lambda t: t[0]), "args[0]"),
    "no axes": (replace(INDEX, lambda t: t.sum()), "kwargs['index']"),
    "wrong size": (replace(X, lambda t: t[..., 1:]), "args[0]"),
    "wrong float dtype": (replace(X, lambda t: t.double()), "args[0]"),
    "int for float": (replace(X, lambda t: t.long()), "args[0]"),
    "float for int": (replace(INDEX, lambda t: t.float()), "kwargs['index']"),
    "int for bool": (replace(MASK, lambda t: t.long()), "kwargs['mask']"),
    "rows of a kwarg": (replace(INDEX, lambda t: t[1:]), "kwargs['index']"),
    "rows of a mask": (replace(MASK, lambda t: t.repeat(2, 1)), "kwargs['mask']"),
    "rows of the arg": (replace(X, lambda t: t[:1]), "kwargs['index']"),
    "a global that is not there": (header(present=("scale",)), "kwargs['scale']"),
    "an unknown kwarg": (header(present=("scalpel",)), "scalpel"),
    "a required kwarg called optional": (header(present=("mask",)), "mask"),
    "the same kwarg twice": (header(present=("scale", "scale")), "scale"),
}


@ways
@both_methods
@pytest.mark.parametrize("fault", SPOILED)
def test_tensors_that_do_not_fit(send: Any, raw: RawClient, fault: str, method: str, way: str) -> None:
    request = Request(method)
    spoil, named = SPOILED[fault]
    spoil(request)
    if method == BACKWARD and fault == "a global that is not there":
        request.tensors.pop()  # else the gradient is in its place, which is another fault
    with refused(RemoteSchemaError, named):
        send(raw.call(method, UID, request.tensors, request.header, way=way))


SPOILED_GRADIENTS: dict[str, tuple[Spoil, str]] = {
    "missing": (drop_last, "grad_outputs[0]"),
    "rows": (replace(-1, lambda t: t[1:]), "grad_outputs[0]"),
    "size": (replace(-1, lambda t: t[..., 1:]), "grad_outputs[0]"),
    "axes": (replace(-1, lambda t: t.sum(-1)), "grad_outputs[0]"),
    "dtype": (replace(-1, lambda t: t.double()), "grad_outputs[0]"),
    "for an integer output": (lambda request: request.tensors.append(torch.ones(3)), "got more"),
    "flags": (header(wants_grad=(True,)), "wants_grad"),
}


@ways
@pytest.mark.parametrize("fault", SPOILED_GRADIENTS)
def test_gradients_that_do_not_fit(send: Any, raw: RawClient, fault: str, way: str) -> None:
    request = Request(BACKWARD)
    spoil, named = SPOILED_GRADIENTS[fault]
    spoil(request)
    with refused(RemoteSchemaError, named):
        send(raw.call(BACKWARD, UID, request.tensors, request.header, way=way))


@ways
@both_methods
def test_a_global_of_the_wrong_size(send: Any, raw: RawClient, method: str, way: str) -> None:
    request = Request(method, scaled=True)
    request.tensors[3] = request.tensors[3][1:]
    with refused(RemoteSchemaError, "kwargs['scale']", "float32(8)", "float32(7)"):
        send(raw.call(method, UID, request.tensors, request.header, way=way))


@ways
@both_methods
def test_more_rows_than_a_batch_has(send: Any, raw: RawClient, method: str, way: str) -> None:
    request = Request(method, rows=MAX_ROWS + 1)
    with refused(RemoteSchemaError, "args[0]", f"at most {MAX_ROWS}"):
        send(raw.call(method, UID, request.tensors, request.header, way=way))


def test_a_gradient_shorter_than_the_output(send: Any, raw: RawClient) -> None:
    """The length of a sequence follows from no schema: only the module's own output shows that this does not fit."""
    request = Request(BACKWARD)
    request.tensors[-1] = request.tensors[-1][:, 1:]
    with refused(RemoteSchemaError, "grad_outputs[0]", "(3, 5, 8)", "(3, 4, 8)"):
        send(raw.call(BACKWARD, UID, request.tensors, request.header))


# --- experts that are not there ----------------------------------------------------------------------------------------


@ways
@both_methods
@pytest.mark.parametrize("uid", ["mixer.1", "mixer", "", "no such expert", "mixer.0 mixer.0", "\u2603" * 50])
def test_unknown_experts(send: Any, raw: RawClient, uid: str, method: str, way: str) -> None:
    with refused(ExpertNotFound, repr(uid)):
        send(raw.call(method, uid, Request(method).tensors, way=way))


@ways
def test_an_endless_uid(send: Any, raw: RawClient, way: str) -> None:
    with refused(ProtocolError, "a call's opening of 1000" if way == "link" else "a uid of 1000000 characters"):
        send(raw.call(FORWARD, "x" * 10**6, [], way=way))


def test_asking_about_an_unknown_expert(send: Any, raw: RawClient) -> None:
    with refused(ExpertNotFound, "'mixer.1'"):
        send(raw.transport.info(raw.peer_id, "mixer.1", timeout_s=30))


# --- bytes that are no header ------------------------------------------------------------------------------------------

HEADERS: dict[str, tuple[bytes, type[Exception], str]] = {
    "no msgpack": (b"\xc1\xc1\xc1", ProtocolError, "metadata"),
    "a number": (b"\x01", ProtocolError, "metadata"),
    "text": (b"hello", ProtocolError, "metadata"),
    "cut off": (encode_header(RequestHeader(present=("scale",)))[:-2], ProtocolError, "metadata"),
    "something after it": (encode_header(RequestHeader()) + b"\x00", ProtocolError, "metadata"),
    "nested for ever": (b"\x91" * 10_000, ProtocolError, "metadata"),
    "wrong type": (msgspec.msgpack.encode({"present": 5}), ProtocolError, "present"),
    "short id": (msgspec.msgpack.encode({"request_id": b"1"}), ProtocolError, "request_id"),
    "negative time": (msgspec.msgpack.encode({"time_left_s": -1.0}), ProtocolError, "time_left_s"),
    "no number": (msgspec.msgpack.encode({"time_left_s": math.nan}), ProtocolError, "time_left_s"),
    "too long": (msgspec.msgpack.encode({"features": ["x" * 200] * 1000}), ProtocolError, "metadata"),
    "another major version": (msgspec.msgpack.encode({"major": 2, "present": 5}), Refused, "version 2"),
    "no time left": (encode_header(RequestHeader(time_left_s=0.0)), DeadlineExceeded, "time"),
}


@libp2p_ways
@both_methods
@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_are_none(send: Any, raw: RawClient, fault: str, method: str, way: str) -> None:
    data, kind, named = HEADERS[fault]
    messages = [to_message(encode_tensor(tensor)) for tensor in Request(method).tensors]
    with refused(kind, named):
        send(raw.send(method, ExpertRequest(uid=UID, tensors=messages, metadata=data), way=way))


@pytest.mark.parametrize("time_left_s", [math.inf, 1e300])
def test_unusual_but_harmless_times(server: Server, raw: RawClient, time_left_s: float) -> None:
    request = Request(FORWARD)
    reply = raw.run(raw.call(FORWARD, UID, request.tensors, RequestHeader(time_left_s=time_left_s)))
    check_exact(reply.tensors, request.expected(server))


# --- bytes that are no tensor ------------------------------------------------------------------------------------------


def set_size(*size: int) -> Callable[[Any], None]:
    def change(tensor: Any) -> None:
        tensor.size[:] = size

    return change


def set_field(**fields: Any) -> Callable[[Any], None]:
    def change(tensor: Any) -> None:
        for name, value in fields.items():
            setattr(tensor, name, value)

    return change


TENSORS: dict[str, tuple[Callable[[Any], None], Any, str]] = {
    "no bytes": (set_field(buffer=b""), ProtocolError, "480 bytes"),
    "a byte missing": (lambda t: setattr(t, "buffer", t.buffer[1:]), ProtocolError, "480"),
    "a byte too many": (lambda t: setattr(t, "buffer", t.buffer + b"\0"), ProtocolError, "480"),
    "a megabyte too many": (lambda t: setattr(t, "buffer", t.buffer + bytes(2**20)), ProtocolError, "480"),
    "no dtype": (set_field(dtype=""), (ProtocolError, RemoteSchemaError), ""),
    "unknown dtype": (set_field(dtype="complex128"), RemoteSchemaError, "args[0]"),
    "a dtype that is code": (set_field(dtype="__import__('os')"), RemoteSchemaError, "args[0]"),
    "a million letters of dtype": (set_field(dtype="f" * 10**6), RemoteSchemaError, "args[0]"),
    "a shape larger than memory": (set_size(3, 2**32 - 1, WIDTH), RemoteSchemaError, "args[0]"),
    "a shape larger than its bytes": (set_size(3, 2**20, WIDTH), ProtocolError, "480"),
    "a hundred thousand axes": (set_size(*[1] * 100_000), ProtocolError, "axes"),
    "unknown codec": (set_field(compression=77), ProtocolError, "77"),
    "raw bytes called compressed": (set_field(compression=4), RemoteSchemaError, "takes NONE"),
    "meanstd of nonsense": (set_field(compression=1), RemoteSchemaError, "takes NONE"),
    "blockwise of nonsense": (set_field(compression=5), RemoteSchemaError, "takes NONE"),
}


@libp2p_ways
@pytest.mark.parametrize("fault", TENSORS)
def test_tensors_that_are_none(send: Any, raw: RawClient, fault: str, way: str) -> None:
    change, kind, named = TENSORS[fault]
    messages = [to_message(encode_tensor(tensor)) for tensor in Request(FORWARD).tensors]
    change(messages[0])
    request = ExpertRequest(uid=UID, tensors=messages, metadata=encode_header(RequestHeader()))
    with refused(kind, named):
        send(raw.send(FORWARD, request, way=way))
