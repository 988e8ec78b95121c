"""ConnectionHandler: what is refused before it waits, and what a caller is told. The client's own checks are bypassed:
calls are made by hand, as a hostile or a stock client would.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import queue
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import moe.server.connection_handler
from moe.config import HandlerConfig
from moe.errors import (
    DeadlineExceeded,
    ExpertFailed,
    ExpertNotFound,
    MoEError,
    Overloaded,
    ProtocolError,
    Refused,
    RemoteSchemaError,
    SchemaError,
    Unavailable,
)
from moe.schema import BatchTensorProto, Compression, TensorProto
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.server.once import ANSWER_BYTES
from moe.server.task_pool import Task
from moe.testing import FaultPlan, MemoryServer, MemorySwarm, MemoryTransport, memory_swarm
from moe.transport.base import BACKWARD, FORWARD, Call, Reply
from moe.transport.event_loop import client_loop
from moe.wire.messages import RequestHeader, decode_request_header, encode_header, new_request_id
from tests.experts import (
    HIDDEN,
    LoraExpert,
    in_parallel,
    linear_backend,
    local_twin,
    lora_backend,
    parameters_of,
    run_with_gradients,
    seeded,
    unchanged,
)

B = BatchTensorProto
WAIT_S = 20.0  # generous: the machine may be busy
AT_ONCE_S = 5.0  # likewise: what is promised is 2 s
NATIVE = RequestHeader()


def make_call(method: str, uid: str, tensors: Sequence[torch.Tensor], header: RequestHeader | None) -> Call:
    return Call(method, uid, header, list(tensors), [Compression.NONE] * len(tensors))


def send(
    swarm: MemorySwarm,
    method: str,
    tensors: Sequence[torch.Tensor],
    header: RequestHeader | None = NATIVE,
    uid: str = "lora.0",
    timeout_s: float | None = WAIT_S,
) -> Reply:
    call = make_call(method, uid, tensors, header)
    return client_loop().run(swarm.transport.call(swarm.server.peer, call, timeout_s=timeout_s), WAIT_S)


def x(rows: int = 2, length: int = 3) -> torch.Tensor:
    return torch.randn(rows, length, HIDDEN)


def adapter(rank: int = 2) -> list[torch.Tensor]:
    return [torch.randn(HIDDEN, rank), torch.randn(rank, HIDDEN)]


# --- bad input ---------------------------------------------------------------------------------------------------------

LORA = RequestHeader(present=("lora_a", "lora_b"))
MASK = RequestHeader(present=("mask",))
BAD_INPUT: dict[str, tuple[str, list[torch.Tensor], RequestHeader | None, str]] = {
    "no arg": (FORWARD, [], NATIVE, r"expected 1 tensors \(args\[0\]\), got 0"),
    "an arg too many": (FORWARD, [x(), x()], NATIVE, r"expected 1 tensors \(args\[0\]\), got more"),
    "ndim of an arg": (FORWARD, [x()[0]], NATIVE, r"args\[0\]: expected float32\(batch, any, 6\), got float32\(3, 6\)"),
    "size of an arg": (FORWARD, [x()[..., :5]], NATIVE, r"args\[0\]: expected float32\(batch, any, 6\), got .*2, 3, 5"),
    "dtype of an arg": (FORWARD, [x().half()], NATIVE, r"args\[0\]: expected float32.*got float16\(2, 3, 6\)"),
    "too many rows": (FORWARD, [x(33)], NATIVE, r"args\[0\]: 33 rows, at most 32"),
    "a kwarg said but not sent": (FORWARD, [x()], MASK, r"expected 2 tensors \(args\[0\], kwargs\['mask'\]\), got 1"),
    "a kwarg sent but not said": (FORWARD, [x(), torch.ones(2, 3).bool()], NATIVE, "got more"),
    "an unknown kwarg": (FORWARD, [x(), x()], RequestHeader(present=("nonsense",)), "nonsense"),
    "a kwarg twice": (FORWARD, [x(), x()], RequestHeader(present=("mask", "mask")), "mask"),
    "ndim of a kwarg": (FORWARD, [x(), torch.ones(2).bool()], MASK, r"kwargs\['mask'\]: expected bool\(batch, any\)"),
    "dtype of a kwarg": (FORWARD, [x(), torch.ones(2, 3)], MASK, r"kwargs\['mask'\]: expected bool.*got float32"),
    "rows of a kwarg": (FORWARD, [x(), torch.ones(3, 3).bool()], MASK, r"kwargs\['mask'\]: expected 2 rows.*got 3"),
    "size of a global": (
        FORWARD, [x(), torch.ones(5, 2), torch.ones(2, 6)], LORA, r"kwargs\['lora_a'\]: expected float32\(6, any\)",
    ),
    "ndim of a global": (
        FORWARD, [x(), torch.ones(2, 6, 2), torch.ones(2, 6)], LORA, r"kwargs\['lora_a'\].*got float32\(2, 6, 2\)",
    ),
    "no gradient": (BACKWARD, [x()], NATIVE, r"expected 2 tensors \(args\[0\], grad_outputs\), got 1"),
    "a gradient too many": (BACKWARD, [x(), x(), x()], NATIVE, "got more"),
    "ndim of a gradient": (BACKWARD, [x(), x()[0]], NATIVE, r"grad_outputs: expected float32\(batch, any, 6\)"),
    "size of a gradient": (BACKWARD, [x(), x()[..., :5]], NATIVE, "grad_outputs: expected"),
    "dtype of a gradient": (BACKWARD, [x(), x().double()], NATIVE, "grad_outputs: .*float64"),
    "rows of a gradient": (BACKWARD, [x(2), x(3)], NATIVE, "grad_outputs: expected 2 rows.*got 3"),
    "gradient mask": (
        BACKWARD, [x(), x()], RequestHeader(wants_grad=(True, True)), "wants_grad: expected 1 flags",
    ),
    "an arg too many, stock": (FORWARD, [x(), x()], None, "got more"),
    "no gradient, stock": (BACKWARD, [x()], None, "expected 2 tensors"),
    "rows of a gradient, stock": (BACKWARD, [x(2), x(3)], None, "expected 2 rows"),
}  # fmt: skip


@pytest.fixture
def swarm():
    backend = lora_backend(seeded(LoraExpert), max_batch_size=32)
    with memory_swarm({"lora.0": backend}) as swarm:
        yield swarm


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_named_in_time_and_good_calls_stay_exact(swarm: MemorySwarm, case: str) -> None:
    method, tensors, header, problem = BAD_INPUT[case]
    good = x()
    expected = local_twin(swarm.server.backends["lora.0"].module)(good)
    start = time.monotonic()
    bad, concurrent = in_parallel(
        [lambda: send(swarm, method, tensors, header), lambda: send(swarm, FORWARD, [good]).tensors[0]]
    )
    assert time.monotonic() - start < AT_ONCE_S
    with pytest.raises(RemoteSchemaError, match=problem):
        raise bad
    for output in (concurrent, send(swarm, FORWARD, [good]).tensors[0]):
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
    assert swarm.server.handler.inflight.bytes == 0
    assert swarm.server.pending == 0


def test_unknown_experts_and_methods(swarm: MemorySwarm) -> None:
    for uid in ("lora.1", "", "lora.0 lora.0", "é" * 3000):
        with pytest.raises(ExpertNotFound, match="no expert"):
            send(swarm, FORWARD, [x()], uid=uid)
    with pytest.raises(ExpertNotFound):
        client_loop().run(swarm.transport.info(swarm.server.peer, "lora.1", timeout_s=WAIT_S))
    with pytest.raises(Refused, match="unknown method 'train'"):
        send(swarm, "train", [x()])


def test_a_peer_that_may_not_call_is_refused_before_its_tensors_are_looked_at() -> None:
    asked = []

    def authorize(peer: str, method: str, uid: str) -> bool:
        asked.append((peer, method, uid))
        return method == FORWARD

    module = seeded(LoraExpert)
    backend = lora_backend(module, torch.optim.SGD(module.parameters(), lr=1.0))
    handler = ConnectionHandler({"lora.0": backend}, authorize=authorize)
    before = parameters_of(module)
    with pytest.raises(Refused, match="not allowed to call backward"):
        handler.open("mallory", BACKWARD, "lora.0", None)
    assert handler.open("alice", FORWARD, "lora.0", None)
    assert asked == [("mallory", BACKWARD, "lora.0"), ("alice", FORWARD, "lora.0")]
    assert unchanged(module, before)
    assert repr(handler) == "ConnectionHandler(1 experts, 9728 bytes in flight)"


def test_who_asks_for_a_fourth_argument_is_given_what_the_caller_has_told() -> None:
    told: list[dict[str, Any]] = []

    def authorize(peer: str, method: str, uid: str, metadata: dict[str, Any]) -> bool:
        told.append(metadata)
        return metadata.get("token") == "secret"

    handler = ConnectionHandler({"lora.0": lora_backend(seeded(LoraExpert))}, authorize=authorize)
    assert handler.open("alice", FORWARD, "lora.0", RequestHeader(metadata={"token": "secret"}))
    for header in (RequestHeader(metadata={"token": "guess"}), RequestHeader(), None):
        with pytest.raises(Refused, match="not allowed"):
            handler.open("mallory", FORWARD, "lora.0", header)
    assert told == [{"token": "secret"}, {"token": "guess"}, {}, {}]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=60))
def test_any_metadata_is_a_header_or_a_typed_error(metadata: bytes) -> None:
    try:
        header = decode_request_header(metadata)
    except (ProtocolError, Refused):
        return
    backend = _FUZZED.backends["lora.0"]
    try:
        admission = _FUZZED.open("fuzz", FORWARD, "lora.0", header)
    except SchemaError:  # names of kwargs that do not exist
        assert header is not None
        assert set(header.present) - set(backend.schema.optional) or len(set(header.present)) < len(header.present)
        return
    admission.release()


_FUZZED = ConnectionHandler({"lora.0": lora_backend(seeded(LoraExpert))})


# --- bounds ------------------------------------------------------------------------------------------------------------


ITSELF = 2 * 8192  # more than a request takes besides its tensors


def test_a_request_is_bounded_before_memory_is_taken() -> None:
    config = HandlerConfig(max_request_bytes=10**6, max_inflight_bytes=15 * 10**5 + 2 * ITSELF)
    handler = ConnectionHandler({"lora.0": lora_backend(seeded(LoraExpert))}, config)
    first = handler.open("peer", FORWARD, "lora.0", NATIVE)
    itself = handler.inflight.bytes
    assert 0 < itself < ITSELF
    assert first.admit(0, (1, 40_000, HIDDEN), "float32", Compression.NONE) == 960_000
    others = [handler.open("peer", FORWARD, "lora.0", NATIVE) for _ in range(2)]
    with pytest.raises(SchemaError, match="exceeds 1000000 bytes"):
        others[0].admit(0, (1, 10**9, HIDDEN), "float32", Compression.NONE)
    with pytest.raises(Overloaded, match="bytes of requests are in flight"):
        others[1].admit(0, (1, 30_000, HIDDEN), "float32", Compression.NONE)
    assert handler.inflight.bytes == 960_000 + 3 * itself
    for admission in (first, *others, first):
        admission.release()
    handler.check_idle()


def test_many_small_requests_are_bounded_by_what_each_takes_itself() -> None:
    handler = ConnectionHandler({"e.0": linear_backend("e.0")}, HandlerConfig(max_inflight_bytes=2**20))
    admissions = []
    with pytest.raises(Overloaded):
        for _ in range(1000):
            admissions.append(handler.open("peer", FORWARD, "e.0", NATIVE))
    assert 2**20 // ITSELF <= len(admissions) <= 2**20 // 8192
    for admission in admissions:
        admission.release()
    handler.check_idle()


def test_what_a_header_says_besides_is_not_kept_with_the_request() -> None:
    handler = ConnectionHandler(
        {"e.0": linear_backend("e.0")}, authorize=lambda peer, method, uid, told: len(told) == 60
    )
    large = RequestHeader(metadata={f"{i}": "x" * 900 for i in range(60)}, features=("f" * 200,) * 64)
    admission = handler.open("peer", FORWARD, "e.0", large)
    assert len(encode_header(admission._header)) < 500
    admission.release()


def test_a_peer_over_its_share_leaves_room_for_others() -> None:
    config = HandlerConfig(max_inflight_bytes=2**20, max_inflight_bytes_per_peer=2**19)
    handler = ConnectionHandler({"e.0": linear_backend("e.0")}, config)
    with pytest.raises(Overloaded, match="of your requests"):
        greedy = [handler.open("greedy", FORWARD, "e.0", NATIVE) for _ in range(1000)]
        assert not greedy
    assert handler.open("modest", FORWARD, "e.0", NATIVE)


@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
def test_room_for_the_answer_is_reserved_with_the_request(method: str) -> None:
    handler = ConnectionHandler({"e.0": linear_backend("e.0")})
    admission = handler.open("peer", method, "e.0", RequestHeader(wants_grad=(True,)) if method == BACKWARD else NATIVE)
    before, sent = handler.inflight.bytes, 1 if method == FORWARD else 2
    for index in range(sent):
        admission.admit(index, (10, HIDDEN), "float32", Compression.NONE)
    assert handler.inflight.bytes - before == (sent + 1) * 10 * HIDDEN * 4
    unwanted = handler.open("peer", BACKWARD, "e.0", RequestHeader(wants_grad=(False,)))
    before = handler.inflight.bytes
    unwanted.admit(0, (10, HIDDEN), "float32", Compression.NONE)
    assert handler.inflight.bytes - before == 10 * HIDDEN * 4
    admission.release()
    unwanted.release()
    handler.check_idle()


def test_an_idle_server_takes_any_request_of_usual_size_whatever_its_answer_takes() -> None:
    data = torch.randn(1000, HIDDEN)
    config = HandlerConfig(max_request_bytes=2 * data.nbytes, max_inflight_bytes=2 * data.nbytes + 100)
    with memory_swarm({"e.0": linear_backend("e.0")}, handler_config=config) as swarm:
        handler = swarm.server.handler
        for method, tensors in ((FORWARD, [data]), (BACKWARD, [data, data])):
            assert send(swarm, method, tensors, NATIVE, "e.0").tensors
            handler.check_idle()
        other = handler.open("other", FORWARD, "e.0", NATIVE)
        with pytest.raises(Overloaded):
            send(swarm, BACKWARD, [data, data], NATIVE, "e.0")
        other.release()
        handler.check_idle()


class Long(nn.Module):
    """One row in, many out: of a length that no schema tells."""

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        return data.repeat(1, 1000)


def test_an_answer_of_any_length_counts_when_it_is_there() -> None:
    backend = ExpertBackend("e.0", Long(), args_schema=(B(2),), outputs_schema=B(None))
    with memory_swarm({"e.0": backend}) as swarm, Starting(swarm.server, "e.0", [torch.randn(3, 2)], NATIVE) as request:
        before = swarm.server.handler.inflight.bytes
        assert request.start()
        request.answers.get(timeout=WAIT_S)
        assert swarm.server.handler.inflight.bytes - before == 3 * 2000 * 4
    swarm.server.handler.check_idle()


def compressed_backend(arg: Compression, output: Compression = Compression.NONE) -> ExpertBackend:
    protos = B(HIDDEN, compression=arg), B(HIDDEN, compression=output)
    linear = nn.Linear(HIDDEN, HIDDEN)
    return ExpertBackend("e.0", linear, args_schema=protos[:1], outputs_schema=protos[1], max_batch_size=2**20)


@pytest.mark.parametrize("codec", [c for c in Compression if c not in (Compression.NONE, Compression.FLOAT16)])
@pytest.mark.parametrize("position", [0, 1])
def test_only_the_codec_of_the_schema_or_none_is_taken(codec: Compression, position: int) -> None:
    """Stock clients use the schema's, ours too; another one is the sender's idea of how much memory decoding takes."""
    codecs = [Compression.NONE, Compression.NONE]
    codecs[position] = Compression.FLOAT16
    backend = compressed_backend(*codecs)
    handler = ConnectionHandler({"e.0": backend})
    for header in (NATIVE, None):
        admission = handler.open("peer", BACKWARD, "e.0", header)
        if position:
            admission.admit(0, (2, HIDDEN), "float32", Compression.NONE)
        with pytest.raises(SchemaError, match=rf"compressed as {codec.name}; this expert takes NONE or FLOAT16"):
            admission.admit(position, (2, HIDDEN), "float32", codec)
        assert admission.admit(position, (2, HIDDEN), "float32", Compression.FLOAT16)
        admission.release()
    handler.check_idle()


@pytest.mark.parametrize(
    "shape",
    [
        (0, 10**9, HIDDEN),
        (0, 2**61, HIDDEN),
        (0, 2**63, HIDDEN),
        (1, -1, HIDDEN),
        (-1, 3, HIDDEN),
        (-5, -5, HIDDEN),
    ],
)
@pytest.mark.parametrize("position", [0, 1])
def test_axes_of_tensors_without_values_are_bounded_too(shape: tuple[int, ...], position: int) -> None:
    handler = ConnectionHandler({"lora.0": lora_backend(seeded(LoraExpert))})
    admission = handler.open("peer", BACKWARD, "lora.0", NATIVE)
    if position:
        admission.admit(0, (max(0, shape[0]), 3, HIDDEN), "float32", Compression.NONE)
    with pytest.raises(MoEError, match="exceeds|impossible"):
        admission.admit(position, shape, "float32", Compression.NONE)
    admission.release()
    handler.check_idle()


def test_globals_without_values_are_bounded_too() -> None:
    handler = ConnectionHandler({"lora.0": lora_backend(seeded(LoraExpert))})
    admission = handler.open("peer", FORWARD, "lora.0", LORA)
    admission.admit(0, (1, 3, HIDDEN), "float32", Compression.NONE)
    admission.admit(1, (HIDDEN, 0), "float32", Compression.NONE)  # a rank of 0 is a rank
    admission.release()
    any_axes = ExpertBackend("e.0", Scaled(), args_schema=(B(1),), kwargs_schema={"w": TensorProto(None, None)})
    handler = ConnectionHandler({"e.0": any_axes})
    admission = handler.open("peer", FORWARD, "e.0", NATIVE)
    admission.admit(0, (1, 1), "float32", Compression.NONE)
    with pytest.raises(SchemaError, match="exceeds"):
        admission.admit(1, (0, 2**40), "float32", Compression.NONE)
    admission.release()


@pytest.mark.parametrize("codec", [Compression.UNIFORM_8BIT, Compression.BLOCKWISE_8BIT, Compression.MEANSTD_16BIT])
def test_what_a_lossy_codec_unpacks_to_counts(codec: Compression) -> None:
    backend = compressed_backend(codec)
    handler = ConnectionHandler({"e.0": backend}, HandlerConfig(max_request_bytes=2**20))
    admission = handler.open("peer", FORWARD, "e.0", NATIVE)
    with pytest.raises(SchemaError, match="exceeds"):
        admission.admit(0, (2**16, HIDDEN), "float32", codec)
    before = handler.inflight.bytes
    admission.admit(0, (2**12, HIDDEN), "float32", codec)
    values = 2**12 * HIDDEN
    assert handler.inflight.bytes - before >= (2 + 4 + 4) * values  # two encoded, one decoded, the answer
    admission.release()
    handler.check_idle()


def test_a_full_pool_is_told_at_once() -> None:
    backend = linear_backend("e.0", pool_size=2)
    with memory_swarm({"e.0": backend}) as swarm, swarm.server.paused():
        data = torch.randn(1, HIDDEN)
        header = RequestHeader(time_left_s=0.5)
        outcomes = in_parallel([lambda: send(swarm, FORWARD, [data], header, "e.0")] * 5)
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 3
    assert all(isinstance(outcome, (Overloaded, DeadlineExceeded)) for outcome in outcomes)


def test_one_peer_cannot_take_all_places() -> None:
    backend = linear_backend("e.0", pool_size=8)
    backend.forward_pool.config = dataclasses.replace(backend.forward_pool.config, max_pending_per_peer=3)
    backend.forward_pool._queue.config = backend.forward_pool.config
    with MemoryServer({"e.0": backend}) as server, server.paused():
        greedy = MemorySwarm([server])
        greedy.transport.caller = "greedy"  # type: ignore[attr-defined]
        other = MemoryTransport({"server": server.handler}, caller="modest")
        header = RequestHeader(time_left_s=0.5)
        data = torch.randn(1, HIDDEN)
        flood = in_parallel([lambda: send(greedy, FORWARD, [data], header, "e.0")] * 6)
        assert sum(isinstance(outcome, Overloaded) for outcome in flood) == 3
        call = other.call(server.peer, make_call(FORWARD, "e.0", [data], header), timeout_s=WAIT_S)
        with pytest.raises(DeadlineExceeded):  # it had a place
            client_loop().run(call)


# --- deadlines and callers that go -------------------------------------------------------------------------------------


def test_what_is_late_is_answered_and_never_computed() -> None:
    module = seeded(LoraExpert)
    with memory_swarm({"lora.0": lora_backend(module)}) as swarm:
        launches = module.launches
        with swarm.server.paused():
            header = RequestHeader(time_left_s=0.05, request_id=new_request_id())
            for method, tensors in ((FORWARD, [x()]), (BACKWARD, [x(), x()])):
                with pytest.raises(DeadlineExceeded):
                    send(swarm, method, tensors, header)
        send(swarm, FORWARD, [x(1, 1)])
        assert module.launches == launches + 1


def test_the_servers_own_limit_counts_where_the_caller_sets_none() -> None:
    config = HandlerConfig(request_timeout_s=0.05)
    with memory_swarm({"e.0": linear_backend("e.0")}, handler_config=config) as swarm, swarm.server.paused():
        for header in (None, NATIVE, RequestHeader(time_left_s=1e9), RequestHeader(time_left_s=math.inf)):
            with pytest.raises(DeadlineExceeded):
                send(swarm, FORWARD, [torch.randn(1, HIDDEN)], header, "e.0")


def test_a_forward_whose_caller_has_gone_is_withdrawn_and_a_backward_is_not() -> None:
    backend = linear_backend("e.0", lr=0.1)
    with memory_swarm({"e.0": backend}) as swarm:
        with swarm.server.paused():
            for method, tensors, left in (
                (FORWARD, [torch.randn(1, HIDDEN)], 0),
                (BACKWARD, [torch.randn(1, HIDDEN)] * 2, 1),
            ):
                call = make_call(method, "e.0", tensors, RequestHeader(request_id=new_request_id()))
                future = client_loop().submit(swarm.transport.call(swarm.server.peer, call, timeout_s=WAIT_S))
                swarm.server.wait_pending(1)
                future.cancel()
                wait_until(lambda left=left: swarm.server.pending == left)
        wait_until(lambda: backend.updates == 1)  # a repeat of it may be under way
    wait_until(lambda: swarm.server.handler.inflight.bytes == 0)


def wait_until(condition: Any) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_when_the_runtime_dies_waiting_calls_fail_at_once() -> None:
    plan = FaultPlan()
    plan.crash_runtime(at_batch=1, pool="lora.0_forward")
    with memory_swarm({"lora.0": lora_backend(seeded(LoraExpert))}, plan=plan) as swarm:
        start = time.monotonic()
        outcomes = in_parallel([lambda: send(swarm, FORWARD, [x()])] * 4)
        assert time.monotonic() - start < AT_ONCE_S
        assert [type(outcome) for outcome in outcomes] == [Unavailable] * 4
        with pytest.raises(Unavailable, match="has died"):
            send(swarm, BACKWARD, [x(), x()], RequestHeader(request_id=new_request_id()))
        assert not swarm.server.runtime.is_alive()


def test_ten_thousand_failing_calls_leave_nothing(swarm: MemorySwarm) -> None:
    handler = swarm.server.handler
    tensors = [x()[..., :5]]
    for _ in range(10_000):
        admission = handler.open("peer", FORWARD, "lora.0", NATIVE)
        with pytest.raises(SchemaError):
            admission.admit(0, tuple(tensors[0].shape), "float32", Compression.NONE)
        admission.release()
    assert handler.inflight.bytes == 0
    assert swarm.server.pending == 0
    assert repr(handler.once) == "OnceWindow(0 running, 0 answers of 0 bytes)"


# --- modules that misbehave --------------------------------------------------------------------------------------------


class Misbehaving(nn.Module):
    """Behaves badly where a row holds a magic number."""

    def forward(self, x: torch.Tensor) -> Any:
        if bool((x == 1).any()):
            raise RuntimeError("secret /path/to/file.py")
        if bool((x == 2).any()):
            return x[:-1]
        if bool((x == 3).any()):
            return None
        if bool((x == 4).any()):
            raise type("Unpicklable", (Exception,), {"__reduce__": None})("gone")
        return x * 2


@pytest.mark.parametrize("magic", [1, 2, 3, 4])
def test_only_the_caller_of_a_misbehaving_module_is_hurt(magic: int) -> None:
    backend = ExpertBackend("e.0", Misbehaving(), args_schema=(B(2),), outputs_schema=B(2))
    with memory_swarm({"e.0": backend}) as swarm:
        inputs = [torch.randn(2, 2) for _ in range(9)]
        inputs[4][0, 0] = float(magic)
        calls = [lambda data=data: send(swarm, FORWARD, [data], NATIVE, "e.0").tensors[0] for data in inputs]
        calls += [
            lambda data=data: send(swarm, BACKWARD, [data, torch.ones(2, 2)], NATIVE, "e.0").tensors[0]
            for data in inputs
        ]
        with swarm.server.paused():
            pending = threading.Thread(target=lambda: outcomes.extend(in_parallel(calls)))
            outcomes: list[Any] = []
            pending.start()
            swarm.server.wait_pending(18)
        pending.join(WAIT_S)
    for i, outcome in enumerate(outcomes):
        if i % 9 == 4:
            assert isinstance(outcome, ExpertFailed)
            assert "Traceback" not in str(outcome)
        else:
            assert torch.equal(outcome, inputs[i] * 2 if i < 9 else torch.full((2, 2), 2.0))


def test_two_lengths_at_once_are_both_answered(swarm: MemorySwarm) -> None:
    twin = local_twin(swarm.server.backends["lora.0"].module)
    inputs = [x(2, 7), x(2, 9), x(3, 7)]
    for data, reply in zip(inputs, in_parallel([functools.partial(send, swarm, FORWARD, [data]) for data in inputs])):
        torch.testing.assert_close(reply.tensors[0], twin(data), atol=1e-5, rtol=1e-5)


# --- replies -----------------------------------------------------------------------------------------------------------


def test_a_native_reply_says_which_gradients_it_has_and_how_long_it_took(swarm: MemorySwarm) -> None:
    a, b = adapter()
    mask = torch.ones(2, 3).bool()
    data, grad = x(), x()
    names = ("lora_a", "lora_b", "mask")
    reply = send(swarm, BACKWARD, [data, a, b, mask, grad], RequestHeader(present=names))
    assert reply.header is not None
    assert reply.header.has_grad == (True, True, True, False)
    assert reply.header.compute_s > 0
    assert reply.header.queue_s >= 0
    wanted = RequestHeader(present=names, wants_grad=(False, True, False, True))
    some = send(swarm, BACKWARD, [data, a, b, mask, grad], wanted)
    assert some.header is not None
    assert some.header.has_grad == (False, True, False, False)
    torch.testing.assert_close(some.tensors[0], reply.tensors[1])
    unsorted = RequestHeader(present=("mask", "lora_b", "lora_a"))
    assert send(swarm, FORWARD, [data, a, b, mask], unsorted).tensors[0].shape == data.shape


class Scaled(nn.Module):
    """data times the sum of a global tensor."""

    def forward(self, data: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return data * w.sum()


def test_a_large_global_is_digested_without_blocking_the_loop() -> None:
    threads = []

    class Recording(ExpertBackend):
        def make_task(self, *args: Any) -> Task:
            threads.append(threading.current_thread().name)
            return super().make_task(*args)

    backend = Recording("e.0", Scaled(), args_schema=(B(1),), kwargs_schema={"w": TensorProto(None)})
    with memory_swarm({"e.0": backend}) as swarm:
        for values in (10, 2**19):
            reply = send(swarm, FORWARD, [torch.ones(1, 1), torch.ones(values)], NATIVE, "e.0")
            assert float(reply.tensors[0]) == values
    assert threads[0] == "moe-client-loop"  # where a MemoryTransport serves
    assert threads[1] != threads[0]


# --- the stock dialect -------------------------------------------------------------------------------------------------


def test_a_stock_client_calls_without_header_and_without_optional_kwargs(swarm: MemorySwarm) -> None:
    module = swarm.server.backends["lora.0"].module
    data, grad = x(), x()
    expected, gradients = run_with_gradients(local_twin(module), [data], {}, grad)
    forward, backward = send(swarm, FORWARD, [data], None), send(swarm, BACKWARD, [data, grad], None)
    assert forward.header is None
    assert backward.header is None
    torch.testing.assert_close(forward.tensors[0], expected)
    torch.testing.assert_close(backward.tensors[0], gradients["0"])


def test_a_stock_client_gets_zeros_for_integer_inputs_and_sends_gradients_of_integer_outputs() -> None:
    class Mixed(nn.Module):
        def forward(self, ids: torch.Tensor, data: torch.Tensor, flag: torch.Tensor) -> Any:
            return data * ids[:, None], ids + 1

    backend = ExpertBackend(
        "e.0", Mixed(), args_schema=(B(dtype=torch.int64), B(2)), kwargs_schema={"flag": B(dtype=torch.bool)}
    )
    ids, data, flag = torch.tensor([1, 2, 3]), torch.randn(3, 2), torch.tensor([True, False, True])
    grad = torch.randn(3, 2)
    with memory_swarm({"e.0": backend}) as swarm:
        outputs = send(swarm, FORWARD, [ids, data, flag], None, "e.0").tensors
        assert torch.equal(outputs[1], ids + 1)
        stock = send(swarm, BACKWARD, [ids, data, flag, grad, torch.zeros_like(ids)], None, "e.0").tensors
        assert [(t.dtype, tuple(t.shape)) for t in stock] == [
            (torch.int64, (3,)),
            (torch.float32, (3, 2)),
            (torch.bool, (3,)),
        ]
        assert not stock[0].any()
        assert not stock[2].any()
        torch.testing.assert_close(stock[1], grad * ids[:, None])
        native = send(swarm, BACKWARD, [ids, data, flag, grad], NATIVE, "e.0")
        assert native.header is not None
        assert native.header.has_grad == (False, True, False)
        with pytest.raises(RemoteSchemaError, match="got more"):
            send(swarm, BACKWARD, [ids, data, flag, grad, torch.zeros_like(ids)], NATIVE, "e.0")


def test_stock_backwards_train_each_time_and_are_not_kept() -> None:
    backend = linear_backend("e.0", lr=0.1)
    with memory_swarm({"e.0": backend}) as swarm:
        for _ in range(2):
            send(swarm, BACKWARD, [torch.randn(1, HIDDEN)] * 2, None, "e.0")
        assert backend.updates == 2
        assert repr(swarm.server.handler.once) == "OnceWindow(0 running, 0 answers of 0 bytes)"


# --- exactly once ------------------------------------------------------------------------------------------------------


def test_a_repeated_backward_never_trains_twice_also_while_the_first_is_running() -> None:
    backend = linear_backend("e.0", lr=0.1)
    twin = local_twin(backend.module)
    data, grad = torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)
    header = RequestHeader(request_id=new_request_id())
    _, gradients = run_with_gradients(twin, [data], {}, grad)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    with memory_swarm({"e.0": backend}) as swarm:
        outcomes: list[Any] = []
        calls = [lambda: send(swarm, BACKWARD, [data, grad], header, "e.0")] * 4
        with swarm.server.paused():
            concurrent = threading.Thread(target=lambda: outcomes.extend(in_parallel(calls)))
            concurrent.start()
            wait_until(lambda: swarm.server.handler.requests == 4)
            time.sleep(0.05)
            assert swarm.server.pending == 1
        concurrent.join(WAIT_S)
        outcomes.append(send(swarm, BACKWARD, [data, grad], header, "e.0"))
        for outcome in outcomes:
            assert torch.equal(outcome.tensors[0], outcomes[0].tensors[0])
            torch.testing.assert_close(outcome.tensors[0], gradients["0"])
        assert backend.updates == 1
        assert unchanged(backend.module, parameters_of(twin))
        send(swarm, BACKWARD, [data, grad], RequestHeader(request_id=new_request_id()), "e.0")
        assert backend.updates == 2


def test_ids_of_different_peers_and_experts_are_different_ids() -> None:
    backends = {uid: linear_backend(uid, lr=0.1) for uid in ("e.0", "e.1")}
    header = RequestHeader(request_id=new_request_id())
    with memory_swarm(backends) as swarm:
        handler = swarm.server.handler
        alice, bob = (MemoryTransport({"server": handler}, caller=name) for name in ("alice", "bob"))
        for transport, uid in ((alice, "e.0"), (bob, "e.0"), (alice, "e.1"), (alice, "e.0")):
            call = make_call(BACKWARD, uid, [torch.randn(1, HIDDEN)] * 2, header)
            client_loop().run(transport.call(MemoryServer({}, "server").peer, call, timeout_s=WAIT_S))
        assert {uid: backend.updates for uid, backend in backends.items()} == {"e.0": 2, "e.1": 1}


def test_a_backward_that_failed_may_be_repeated() -> None:
    backend = linear_backend("e.0", lr=0.1, detect_anomalies=True)
    header = RequestHeader(request_id=new_request_id())
    grad = torch.randn(1, HIDDEN)
    with memory_swarm({"e.0": backend}) as swarm:
        with pytest.raises(MoEError, match="nothing was trained"):
            send(swarm, BACKWARD, [torch.full((1, HIDDEN), math.nan), grad], header, "e.0")
        with swarm.server.paused(), pytest.raises(DeadlineExceeded):
            late = RequestHeader(request_id=header.request_id, time_left_s=0.05)
            send(swarm, BACKWARD, [grad, grad], late, "e.0")
        wait_until(lambda: swarm.server.pending == 0)
        assert backend.updates == 0
        wait_until(lambda: "0 running" in repr(swarm.server.handler.once))
        send(swarm, BACKWARD, [grad, grad], header, "e.0")
        assert backend.updates == 1


def test_answers_that_had_to_be_dropped_are_refused_not_trained_again() -> None:
    backend = linear_backend("e.0", lr=0.1)
    config = HandlerConfig(once_max_replies=2)
    headers = [RequestHeader(request_id=new_request_id()) for _ in range(3)]
    data = [torch.randn(1, HIDDEN)] * 2
    with memory_swarm({"e.0": backend}, handler_config=config) as swarm:
        for header in headers:
            send(swarm, BACKWARD, data, header, "e.0")
        wait_until(lambda: "0 running" in repr(swarm.server.handler.once))
        with pytest.raises(Refused, match="not trained twice"):
            send(swarm, BACKWARD, data, headers[0], "e.0")
        assert send(swarm, BACKWARD, data, headers[2], "e.0").tensors
        assert backend.updates == 3


def test_a_kept_answer_does_not_keep_its_whole_batch() -> None:
    backend = linear_backend("e.0")
    data = torch.randn(4, HIDDEN)
    with memory_swarm({"e.0": backend}) as swarm:
        headers = [RequestHeader(request_id=new_request_id()) for _ in range(3)]
        calls = [lambda header=header: send(swarm, BACKWARD, [data, data], header, "e.0") for header in headers]
        with swarm.server.paused():
            concurrent = threading.Thread(target=lambda: in_parallel(calls))
            concurrent.start()
            swarm.server.wait_pending(3)
        concurrent.join(WAIT_S)
        once = swarm.server.handler.once
        wait_until(lambda: "0 running" in repr(once))
        assert repr(once) == f"OnceWindow(0 running, 3 answers of {3 * (data.nbytes + ANSWER_BYTES)} bytes)"
        for header in headers:
            kept = once.find("client", ("e.0", header.request_id), 0.0)
            assert kept is not None and kept.task is None  # nor the inputs
            (gradient,) = kept.answer
            assert gradient is not None
            assert gradient.untyped_storage().nbytes() == data.nbytes


# --- exactly once, whatever happens to the first ------------------------------------------------------------------------


def one_backward(**fields: Any) -> tuple[list[torch.Tensor], RequestHeader]:
    return [torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)], RequestHeader(request_id=new_request_id(), **fields)


def submit(swarm: MemorySwarm, tensors: Sequence[torch.Tensor], header: RequestHeader, uid: str = "e.0") -> Any:
    call = make_call(BACKWARD, uid, tensors, header)
    return client_loop().submit(swarm.transport.call(swarm.server.peer, call, timeout_s=WAIT_S))


def settled(swarm: MemorySwarm) -> None:
    """Wait until nothing is left of any request."""

    def idle() -> bool:
        return "0 running" in repr(swarm.server.handler.once) and not swarm.server.handler.inflight.bytes

    wait_until(idle)
    swarm.server.handler.check_idle()


def test_a_backward_that_nobody_waits_for_leaves_and_a_repeat_after_that_trains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(moe.server.connection_handler, "_REPEAT_WITHIN_S", 0.05)
    backend = linear_backend("e.0", lr=0.1)
    tensors, header = one_backward()
    with memory_swarm({"e.0": backend}) as swarm:
        with swarm.server.paused():
            calls = [submit(swarm, tensors, header) for _ in range(3)]
            swarm.server.wait_pending(1)
            for call in calls[:2]:
                call.cancel()
            time.sleep(0.2)
            assert swarm.server.pending == 1  # the third one waits for it
            calls[2].cancel()
            settled(swarm)  # while nothing is computed
        assert backend.updates == 0
        assert submit(swarm, tensors, header).result(WAIT_S).tensors
        settled(swarm)
    assert backend.updates == 1


def test_a_backward_that_is_running_is_finished_and_a_repeat_has_its_answer() -> None:
    started, gate = threading.Event(), threading.Event()

    class Gated(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            started.set()
            assert gate.wait(WAIT_S)
            return super().forward(x)

    gate.set()
    module = Gated(HIDDEN, HIDDEN)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    backend = ExpertBackend("e.0", module, optimizer, args_schema=(B(HIDDEN),))
    gate.clear()
    started.clear()
    tensors, header = one_backward()
    with memory_swarm({"e.0": backend}) as swarm:
        call = submit(swarm, tensors, header)
        assert started.wait(WAIT_S)
        call.cancel()
        wait_until(lambda: not +swarm.server.handler._open)
        assert swarm.server.handler.inflight.bytes > sum(t.nbytes for t in tensors)  # counted until it is gone
        gate.set()
        assert submit(swarm, tensors, header).result(WAIT_S).tensors
        settled(swarm)
    assert backend.updates == 1


def test_a_repeat_has_its_own_time() -> None:
    backend = linear_backend("e.0", lr=0.1)
    tensors, header = one_backward(time_left_s=0.3)
    with memory_swarm({"e.0": backend}) as swarm:
        with swarm.server.paused():
            first = submit(swarm, tensors, header)
            swarm.server.wait_pending(1)
            repeat = submit(swarm, tensors, RequestHeader(request_id=header.request_id))
            with pytest.raises(DeadlineExceeded):
                first.result(WAIT_S)
            swarm.server.wait_pending(1)
        assert repeat.result(WAIT_S).tensors
        settled(swarm)
    assert backend.updates == 1


def test_a_repeat_of_what_had_to_make_room_for_others_is_tried_itself() -> None:
    backend = linear_backend("e.0", lr=0.1, pool_size=2)
    tensors, header = one_backward()
    with memory_swarm({"e.0": backend}) as swarm:
        modest = MemoryTransport({"server0": swarm.server.handler}, caller="modest")
        with swarm.server.paused():
            other = submit(swarm, *one_backward())
            swarm.server.wait_pending(1)
            calls = [submit(swarm, tensors, header) for _ in range(2)]
            swarm.server.wait_pending(2)
            wait_until(lambda: swarm.server.handler.requests == 3)
            call = make_call(BACKWARD, "e.0", *one_backward())
            pushed_out = client_loop().submit(modest.call(swarm.server.peer, call, timeout_s=WAIT_S))
            for call in calls:  # there is no room for the repeat either
                with pytest.raises(Overloaded):
                    call.result(WAIT_S)
        assert other.result(WAIT_S).tensors and pushed_out.result(WAIT_S).tensors
        assert submit(swarm, tensors, header).result(WAIT_S).tensors
        settled(swarm)
    assert backend.updates == 3 or backend.backward_pool.statistics().tasks == 3


@pytest.mark.parametrize("change", ["rows", "gradient mask", "optional kwarg"])
def test_a_repeat_of_another_request_is_refused(change: str) -> None:
    module = seeded(LoraExpert)
    backend = lora_backend(module, torch.optim.SGD(module.parameters(), lr=0.1))
    names = ("lora_a", "lora_b")
    data, grad, given = x(), x(), adapter()
    first = RequestHeader(present=names, request_id=new_request_id(), wants_grad=(True, False, False))
    other, tensors = first, [data, *given, grad]
    if change == "rows":
        tensors = [x(3), *given, x(3)]
    elif change == "gradient mask":
        other = RequestHeader(present=names, request_id=first.request_id)
    else:
        other, tensors = RequestHeader(request_id=first.request_id), [data, grad]
    with memory_swarm({"lora.0": backend}) as swarm:
        answer = send(swarm, BACKWARD, [data, *given, grad], first)
        with pytest.raises(Refused):
            send(swarm, BACKWARD, tensors, other)
        less = RequestHeader(present=names, request_id=first.request_id, wants_grad=(False, False, False))
        assert send(swarm, BACKWARD, [data, *given, grad], less).tensors == []
        assert torch.equal(send(swarm, BACKWARD, [data, *given, grad], first).tensors[0], answer.tensors[0])
        settled(swarm)
    assert backend.updates == 1


def test_after_a_failure_of_which_nobody_knows_how_far_it_came_a_repeat_is_refused() -> None:
    backend = linear_backend("e.0", lr=0.1)
    process = backend.backward_pool.process_func

    def train_and_fail(tasks: list[Task]) -> Any:
        process(tasks)
        raise MemoryError("no room for the answer")

    tensors, header = one_backward()
    with memory_swarm({"e.0": backend}) as swarm:
        backend.backward_pool.process_func = train_and_fail
        with pytest.raises(ExpertFailed, match="MemoryError"):
            submit(swarm, tensors, header).result(WAIT_S)
        backend.backward_pool.process_func = process
        settled(swarm)
        with pytest.raises(Refused, match="not trained twice"):
            submit(swarm, tensors, header).result(WAIT_S)
        settled(swarm)
    assert backend.updates == 1


def test_backwards_without_rows_are_not_remembered() -> None:
    backend = linear_backend("e.0", lr=0.1)
    with memory_swarm({"e.0": backend}) as swarm:
        for _ in range(3):
            header = RequestHeader(request_id=new_request_id())
            assert submit(swarm, [torch.empty(0, HIDDEN)] * 2, header).result(WAIT_S).tensors
        settled(swarm)
        assert repr(swarm.server.handler.once) == "OnceWindow(0 running, 0 answers of 0 bytes)"


def test_no_other_peer_ends_a_window() -> None:
    backend = linear_backend("e.0", lr=0.1)
    tensors, header = one_backward()
    with memory_swarm({"e.0": backend}, handler_config=HandlerConfig(once_max_replies=8)) as swarm:
        submit(swarm, tensors, header).result(WAIT_S)
        for i in range(60):
            flood = MemoryTransport({"server0": swarm.server.handler}, caller=f"flood {i % 3}")
            call = make_call(BACKWARD, "e.0", *one_backward())
            client_loop().run(flood.call(swarm.server.peer, call, timeout_s=WAIT_S))
        updates = backend.updates
        assert submit(swarm, tensors, header).result(WAIT_S).tensors
        settled(swarm)
        assert backend.updates == updates


def test_large_answers_are_copied_off_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[tuple[str, int]] = []
    copy = moe.server.connection_handler.own_memory

    def recording(tensors: Any) -> Any:
        threads.append((threading.current_thread().name, sum(t.nbytes for t in tensors)))
        return copy(tensors)

    monkeypatch.setattr(moe.server.connection_handler, "own_memory", recording)
    backend = linear_backend("e.0", max_batch_size=2**20)
    with memory_swarm({"e.0": backend}) as swarm:
        with swarm.server.paused():
            rows = (1, 2**17)
            data = [torch.randn(count, HIDDEN) for count in rows]
            calls = [submit(swarm, [d, d], RequestHeader(request_id=new_request_id())) for d in data]
            swarm.server.wait_pending(2)
        for call, count in zip(calls, rows):
            assert call.result(WAIT_S).tensors[0].shape == (count, HIDDEN)
        settled(swarm)
    assert {name for name, size in threads if size > 2**20} != {"moe-client-loop"}  # where a MemoryTransport serves
    assert {name for name, size in threads if size < 2**20} == {"moe-client-loop"}


# --- started, not run ----------------------------------------------------------------------------------------------------


class Starting:
    """A request of the event loop's, started by hand."""

    def __init__(self, server: MemoryServer, uid: str, tensors: Sequence[torch.Tensor], header: RequestHeader | None):
        self.server, self.tensors = server, list(tensors)
        self.call = make_call(FORWARD, uid, tensors, header)
        self.answers: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()

    def __enter__(self) -> Starting:
        self.admission = self._in_loop(self._open)
        return self

    def __exit__(self, *exc: object) -> None:
        inflight = self.server.handler.inflight
        before = inflight.bytes
        self._in_loop(self.admission.release)
        released = before - inflight.bytes
        assert sum(tensor.nbytes for tensor in self.tensors) < released
        self._in_loop(self.admission.release)
        assert before - inflight.bytes == released

    def _open(self) -> Any:
        call = self.call
        admission = self.server.handler.open("client", call.method, call.uid, call.header)
        for index, tensor in enumerate(self.tensors):
            admission.admit(index, tuple(tensor.shape), str(tensor.dtype).split(".")[1], Compression.NONE)
        return admission

    def start(self) -> bool:
        def answer(outcome: Any) -> None:
            self.answers.put((threading.current_thread().name, outcome))

        return bool(self._in_loop(lambda: self.admission.start(self.tensors, answer)))

    @staticmethod
    def _in_loop(func: Callable[[], Any]) -> Any:
        async def run() -> Any:
            return func()

        return client_loop().run(run(), WAIT_S)


def test_what_is_started_is_answered_by_the_runtimes_thread() -> None:
    with memory_swarm({"lora.0": lora_backend(LoraExpert())}) as swarm:
        data, given = x(), adapter()
        with Starting(swarm.server, "lora.0", [data, *given], LORA) as request:
            assert request.start()
            thread, reply = request.answers.get(timeout=WAIT_S)
            assert thread == "moe-runtime"
            assert reply.header.compute_s > 0
            assert reply.header.queue_s > 0
            expected = swarm.server.backends["lora.0"].module(data, lora_a=given[0], lora_b=given[1])
            torch.testing.assert_close(reply.tensors[0], expected.detach())


@pytest.mark.parametrize(
    "header",
    [
        None,  # a stock client
        RequestHeader(hold=(0,)),
        RequestHeader(keep=True, request_id=new_request_id()),
    ],
)
def test_what_takes_more_than_one_task_is_run(header: RequestHeader | None) -> None:
    with memory_swarm({"lora.0": lora_backend(LoraExpert())}) as swarm:
        with Starting(swarm.server, "lora.0", [x()], header) as request:
            assert not request.start()
        assert request.answers.empty()


def test_lossy_answers_and_large_globals_are_run() -> None:
    lossy = linear_backend(outputs_schema=B(HIDDEN, compression=Compression.FLOAT16))
    with memory_swarm({"linear.0": lossy, "lora.0": lora_backend(LoraExpert())}) as swarm:
        with Starting(swarm.server, "linear.0", [torch.randn(2, HIDDEN)], NATIVE) as request:
            assert not request.start()
        with Starting(swarm.server, "lora.0", [x(), *adapter(rank=50_000)], LORA) as request:
            assert not request.start()  # their contents are digested first, which takes long


def test_what_is_started_and_refused_raises() -> None:
    with memory_swarm({"lora.0": lora_backend(LoraExpert(), pool_size=1)}) as swarm, swarm.server.paused():
        one, two = (Starting(swarm.server, "lora.0", [x()], NATIVE) for _ in range(2))
        with one as first, two as other:
            assert first.start()
            with pytest.raises(Overloaded):
                other.start()
            with pytest.raises(SchemaError, match=r"expected 1 tensors"):
                Starting._in_loop(lambda: other.admission.start([], lambda _: None))


def test_what_is_started_is_withdrawn_when_it_is_released() -> None:
    with memory_swarm({"lora.0": lora_backend(LoraExpert())}) as swarm:
        with swarm.server.paused():
            with Starting(swarm.server, "lora.0", [x()], NATIVE) as request:
                assert request.start()
                swarm.server.wait_pending(1)
            assert swarm.server.pending == 0
        assert request.answers.empty()


def test_what_is_started_is_answered_when_its_time_is_over() -> None:
    soon = RequestHeader(time_left_s=0.05)
    with (
        memory_swarm({"lora.0": lora_backend(LoraExpert())}) as swarm,
        swarm.server.paused(),
        Starting(swarm.server, "lora.0", [x()], soon) as request,
    ):
        assert request.start()
        _, outcome = request.answers.get(timeout=WAIT_S)
        assert isinstance(outcome, DeadlineExceeded)


class Failing(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise ValueError("on purpose")


def test_what_is_started_and_fails_is_answered_with_the_error() -> None:
    failing = ExpertBackend("failing.0", Failing(), args_schema=(B(HIDDEN),), outputs_schema=B(HIDDEN))
    data = torch.randn(2, HIDDEN)
    with memory_swarm({"failing.0": failing}) as swarm, Starting(swarm.server, "failing.0", [data], NATIVE) as request:
        assert request.start()
        _, outcome = request.answers.get(timeout=WAIT_S)
        assert isinstance(outcome, ExpertFailed)
        assert "on purpose" in outcome.message


# --- memory is let go of ------------------------------------------------------------------------------------------------


def test_a_small_answer_does_not_keep_the_batch_that_it_was_computed_in() -> None:
    with memory_swarm({"e.0": linear_backend("e.0")}) as swarm:
        sizes = (1, 2000)
        requests = [Starting(swarm.server, "e.0", [torch.randn(rows, HIDDEN)], NATIVE) for rows in sizes]
        with requests[0] as small, requests[1] as large:
            with swarm.server.paused():
                assert small.start() and large.start()
                swarm.server.wait_pending(2)
            for request, rows in ((small, 1), (large, 2000)):
                _, reply = request.answers.get(timeout=WAIT_S)
                assert reply.tensors[0].untyped_storage().nbytes() == rows * HIDDEN * 4


@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
def test_what_a_request_has_sent_is_let_go_of_with_its_answer(method: str) -> None:
    """At once, not when the garbage collector comes by."""
    alive: list[weakref.ref[torch.Tensor]] = []

    class Watching(ExpertBackend):
        def make_task(self, operation: str, tensors: Sequence[torch.Tensor], *args: Any) -> Task:
            alive.extend(map(weakref.ref, tensors))
            return super().make_task(operation, tensors, *args)

    module = nn.Linear(HIDDEN, 1)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    backend = Watching("e.0", module, optimizer, args_schema=(B(HIDDEN),))
    with memory_swarm({"e.0": backend}) as swarm:
        gc.collect()
        gc.disable()
        try:
            for _ in range(5):
                data = torch.randn(1000, HIDDEN)
                if method == FORWARD:
                    with Starting(swarm.server, "e.0", [data], NATIVE) as request:
                        assert request.start()
                        request.answers.get(timeout=WAIT_S)
                    del request
                    continue
                key = new_request_id()
                send(swarm, FORWARD, [data], RequestHeader(keep=True, request_id=key), "e.0")
                header = RequestHeader(request_id=new_request_id(), wants_grad=(False,), held={0: key})
                send(swarm, BACKWARD, [torch.randn(1000, 1)], header, "e.0")
            del data
            wait_until(lambda: not any(reference() is not None for reference in alive))
        finally:
            gc.enable()
        swarm.server.handler.check_idle()


def test_whatever_an_answers_receiver_does_the_runtime_goes_on() -> None:
    with memory_swarm({"e.0": linear_backend("e.0")}) as swarm:
        for error in (ValueError("x"), SystemExit(1), KeyboardInterrupt()):
            told = threading.Event()

            def answer(outcome: Any, error: BaseException = error, told: threading.Event = told) -> None:
                told.set()
                raise error

            request = Starting(swarm.server, "e.0", [torch.randn(2, HIDDEN)], NATIVE)
            admission = request._in_loop(request._open)
            assert request._in_loop(functools.partial(admission.start, request.tensors, answer))
            assert told.wait(WAIT_S)
            request._in_loop(admission.release)
            wait_until(lambda: swarm.server.handler.inflight.bytes == 0)
        assert send(swarm, FORWARD, [torch.randn(2, HIDDEN)], NATIVE, "e.0").tensors
        swarm.server.handler.check_idle()


def test_a_task_that_is_running_is_counted_although_its_caller_has_gone() -> None:
    started, gate = threading.Event(), threading.Event()

    class Gated(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            started.set()
            assert gate.wait(WAIT_S)
            return x * 2

    backend = ExpertBackend("e.0", Gated(), args_schema=(B(HIDDEN),), outputs_schema=B(HIDDEN))
    data = torch.randn(2000, HIDDEN)
    with memory_swarm({"e.0": backend}) as swarm:
        admission = (request := Starting(swarm.server, "e.0", [data], NATIVE))._in_loop(request._open)
        assert request._in_loop(lambda: admission.start([data], lambda _: None))
        assert started.wait(WAIT_S)
        request._in_loop(admission.release)
        assert swarm.server.handler.inflight.bytes > data.nbytes
        gate.set()
        wait_until(lambda: swarm.server.handler.inflight.bytes == 0)
        swarm.server.handler.check_idle()
