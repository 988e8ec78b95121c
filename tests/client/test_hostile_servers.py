"""One server answers garbage, another one is honest: every kind of call goes on with the honest one, or ends in a typed error.

What a hostile server can say is listed once, here, and used for all kinds of calls.
"""

from __future__ import annotations

import asyncio
import dataclasses
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch

from moe.client.expert import RemoteExpert
from moe.client.moe import RemoteMixtureOfExperts
from moe.client.requests import MAX_ROW_BYTES, Terms
from moe.client.switch_moe import RemoteSwitchMixtureOfExperts
from moe.config import ClientConfig
from moe.errors import _BY_CODE, MoEError, ProtocolError, SchemaError
from moe.expert_uid import ExpertInfo, PeerIDLike
from moe.schema import BatchTensorProto, ExpertSchema, TensorProto
from moe.testing import MemoryPeer, memory_swarm
from moe.transport.base import FORWARD, Call, ExpertTransport, Reply
from moe.wire.messages import ExpertDescription, ReplyHeader, WireError
from tests.client.memory_swarm import DIM, Swarm
from tests.client.sequence_swarm import sequence_swarm
from tests.experts import HIDDEN, linear_backend, local_twin

CONFIG = ClientConfig(
    min_backoff_s=0.001, max_backoff_s=0.002, total_timeout_s=20.0, request_timeout_s=10.0, detect_anomalies=True
)

Answer = Callable[[Reply], Any]  # what the hostile server makes of an honest reply
Description = Callable[[ExpertDescription], Any]


def raising(error: BaseException) -> Callable[[Any], Any]:
    def answer(honest: Any) -> Any:
        raise error

    return answer


def tensors(change: Callable[[list[torch.Tensor]], Any]) -> Answer:
    return lambda reply: Reply(reply.header, change(list(reply.tensors)))


def each(change: Callable[[torch.Tensor], Any]) -> Answer:
    return tensors(lambda own: [change(tensor) for tensor in own])


def header(**fields: Any) -> Answer:
    return lambda reply: Reply(ReplyHeader(**fields), reply.tensors)


# What decoding, or a transport, may raise because of what a peer has sent.
RAISED = [
    RuntimeError("Stride calculation overflowed"), UnicodeError("label too long"), MemoryError(), RecursionError("too deep"),
    OverflowError("int too large"), ValueError("no"), TypeError("no"), KeyError("x"), IndexError("x"), AssertionError("x"),
    struct.error("short"), asyncio.IncompleteReadError(b"", 8), ConnectionResetError("reset"), EOFError(), OSError(24, "files"),
    msgspec.DecodeError("truncated"), NotImplementedError("sparse"), ZeroDivisionError(), LookupError("codec"),
]  # fmt: skip

ANSWERS: dict[str, Answer] = {
    **{
        f"code {code!r}": raising(WireError(code=code, message="no\x1b[31m\n" + "x" * 1900).to_exception(peer=None, uid=None))
        for code in [*_BY_CODE, "", "\x1b]0;title\x07", "no such code"]
    },
    **{f"raises {type(error).__name__}": raising(error) for error in RAISED},
    "no tensors": tensors(lambda own: []),
    "a tensor too many": tensors(lambda own: [*own, torch.zeros(1)]),
    "ten thousand tensors": tensors(lambda own: own * 10_000),
    "no tensors but things": tensors(lambda own: [None, "x", 3]),
    "nothing": lambda reply: None,
    "no header": lambda reply: Reply(None, [torch.zeros(1, 1)]),
    "another dtype": each(lambda tensor: tensor.double()),
    "integers": each(lambda tensor: tensor.long()),
    "complex numbers": each(lambda tensor: tensor.to(torch.complex64)),
    "a row more": each(lambda tensor: torch.cat([tensor, tensor[:1]])),
    "a row less": each(lambda tensor: tensor[1:]),
    "no rows": each(lambda tensor: tensor[:0]),
    "an axis more": each(lambda tensor: tensor[None]),
    "a number": each(lambda tensor: torch.tensor(1.0)),
    "a longer last axis": each(lambda tensor: torch.cat([tensor, tensor], -1)),
    "an empty axis": each(lambda tensor: tensor[..., :0]),
    "huge empty axes": each(lambda tensor: torch.empty(0, 2**40, 1)),
    "nan": each(lambda tensor: tensor * torch.nan),
    "infinity": each(lambda tensor: tensor + torch.inf),
    "a sparse tensor": each(lambda tensor: tensor.to_sparse()),
    "a tensor without memory": each(lambda tensor: tensor.to("meta")),
}  # fmt: skip

GRADIENTS: dict[str, Answer] = {
    "no flags": header(has_grad=None),
    "flags of nobody": header(has_grad=()),
    "a flag too many": header(has_grad=(True,) * 2),
    "no gradient, it says": header(has_grad=(False,)),
    "four thousand flags": header(has_grad=(True,) * 4096),
    "times that are no numbers": header(has_grad=(True,), queue_s=float("nan"), compute_s=-float("inf")),
}


def described(**fields: Any) -> Description:
    return lambda honest: msgspec.structs.replace(honest, **fields)


def schema(*args: Any, **options: Any) -> Description:
    return described(schema=ExpertSchema(args, **options).to_plain())


B = BatchTensorProto
DEEP: Any = {"batched": True, "sizes": [1], "dtype": "float32", "compression": 0}
for _ in range(5000):
    DEEP = ["tuple", [DEEP]]


def plain(**fields: Any) -> Description:
    return lambda honest: msgspec.structs.replace(honest, schema={**honest.schema, **fields})


DESCRIPTIONS: dict[str, Description] = {
    **{f"raises {type(error).__name__}": raising(error) for error in RAISED},
    "nothing": lambda honest: None,
    "no schema": described(schema={}),
    "no outputs": plain(outputs=None),
    "outputs that are text": plain(outputs="float32"),
    "outputs in a bomb": plain(outputs=DEEP),
    "inputs in a bomb": plain(args=DEEP),
    "another output": schema(B(HIDDEN), outputs=B(HIDDEN + 1)),
    "several outputs": schema(B(HIDDEN), outputs=(B(HIDDEN), B(HIDDEN))),
    "empty outputs": schema(B(HIDDEN), outputs=()),
    "a global output": schema(B(HIDDEN), outputs=TensorProto(HIDDEN)),
    "other inputs": schema(B(HIDDEN + 1), outputs=B(HIDDEN)),
    "more inputs": schema(B(HIDDEN), B(HIDDEN), outputs=B(HIDDEN)),
    "global inputs": schema(TensorProto(1, HIDDEN), outputs=B(HIDDEN)),
    "a kwarg that must be given": schema(B(HIDDEN), kwargs={"secret": B(1)}, outputs=B(HIDDEN)),
    "a million axes": plain(outputs={"batched": True, "sizes": [1] * 10**6, "dtype": "float32", "compression": 0}),
    "endless rows": schema(B(HIDDEN), outputs=B(2**40)),
    "a row at a time": described(max_batch_size=1),
    "a byte at a time": described(max_request_bytes=1),
    "no end of bytes": described(max_request_bytes=2**63, max_batch_size=2**63),
    "features of nobody": described(features=("x" * 256,) * 1000),
    "every feature": described(features=("chain", "held_tensors", "once")),
    "a stock server": described(native=False, features=()),
}  # fmt: skip


class Hostile:
    """Carries calls to honest servers, and changes what some of them say.

    :ivar answers: by peer
    :ivar descriptions: by peer
    :ivar method: whose replies are changed; None: of all
    """

    def __init__(self, inner: ExpertTransport):
        self.inner = inner
        self.answers: dict[str, Answer] = {}
        self.descriptions: dict[str, Description] = {}
        self.method: str | None = None
        self.asked: list[str] = []

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        honest = await self.inner.info(peer, uid, timeout_s=timeout_s)
        change = self.descriptions.get(peer.to_base58())
        return honest if change is None else change(honest)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        self.asked.append(peer.to_base58())
        honest = await self.inner.call(peer, call, timeout_s=timeout_s)
        change = self.answers.get(peer.to_base58())
        return honest if change is None or self.method not in (None, call.method) else change(honest)

    async def close(self) -> None: ...


# --- one expert ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def swarm():
    backends = [{"linear.0": linear_backend()} for _ in range(2)]
    backends[1]["linear.0"].module.load_state_dict(backends[0]["linear.0"].module.state_dict())
    with memory_swarm(*backends) as swarm:
        yield swarm


@pytest.fixture
def hostile(swarm):
    return Hostile(swarm.transport)


def expert_of(hostile: Hostile, **config: Any) -> RemoteExpert:
    servers = [MemoryPeer(f"server{i}") for i in range(2)]
    settings = dataclasses.replace(CONFIG, **config)
    return RemoteExpert(ExpertInfo("linear.0", servers[0]), hostile, replicas=servers[1:], config=settings)


def check_expert(swarm: Any, hostile: Hostile) -> None:
    twin, x = local_twin(swarm.server.backends["linear.0"].module), torch.randn(3, HIDDEN)
    own, theirs = (x.clone().requires_grad_() for _ in range(2))
    y = expert_of(hostile)(theirs)
    torch.testing.assert_close(y, twin(own))
    y.sum().backward()
    twin(own).sum().backward()
    torch.testing.assert_close(theirs.grad, own.grad)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_garbage_is_asked_for_at_another_server(swarm: Any, hostile: Hostile, answer: str, method: str) -> None:
    hostile.answers["server0"], hostile.method = ANSWERS[answer], method
    check_expert(swarm, hostile)
    assert hostile.asked.count("server0") <= 3


@pytest.mark.parametrize("answer", GRADIENTS)
def test_gradients_that_are_announced_wrongly_are_asked_for_at_another_server(
    swarm: Any, hostile: Hostile, answer: str
) -> None:
    hostile.answers["server0"], hostile.method = GRADIENTS[answer], "backward"
    check_expert(swarm, hostile)


@pytest.mark.parametrize("answer", DESCRIPTIONS)
def test_who_describes_garbage_is_left_for_another_server(swarm: Any, hostile: Hostile, answer: str) -> None:
    hostile.descriptions["server0"] = DESCRIPTIONS[answer]
    check_expert(swarm, hostile)


@pytest.mark.parametrize("answer", [*ANSWERS, *GRADIENTS])
def test_alone_garbage_is_a_typed_error_that_names_the_server(swarm: Any, hostile: Hostile, answer: str) -> None:
    hostile.answers["server0"] = {**ANSWERS, **GRADIENTS}[answer]
    expert = RemoteExpert(ExpertInfo("linear.0", MemoryPeer("server0")), hostile, config=CONFIG)
    x = torch.randn(3, HIDDEN, requires_grad=True)
    if answer in GRADIENTS:
        hostile.method = "backward"
        y = expert(x)
        if answer == "times that are no numbers":
            y.sum().backward()
            return
    with pytest.raises(MoEError) as caught:
        if answer in GRADIENTS:
            y.sum().backward()
        else:
            expert(x)
    assert not isinstance(caught.value, SchemaError)
    assert caught.value.peer == "server0"
    assert "linear.0" in str(caught.value)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 20_000
    assert len(hostile.asked) <= CONFIG.max_retries + 2


@pytest.mark.parametrize("answer", DESCRIPTIONS)
def test_alone_a_garbage_description_is_a_typed_error_or_an_answer(swarm: Any, hostile: Hostile, answer: str) -> None:
    hostile.descriptions["server0"] = DESCRIPTIONS[answer]
    expert = RemoteExpert(ExpertInfo("linear.0", MemoryPeer("server0")), hostile, config=CONFIG)
    x = torch.randn(3, HIDDEN)
    try:
        expert(x)
        assert isinstance(expert.info, dict)
    except MoEError as e:
        assert len(str(e)) < 10_000


def test_what_an_expert_says_it_returns_is_bounded() -> None:
    huge = ExpertSchema((B(1),), outputs=B(MAX_ROW_BYTES // 4 + 1)).to_plain()
    from moe.client.requests import checked_schema

    with pytest.raises(ProtocolError, match="more than 1073741824 bytes for one row"):
        checked_schema(ExpertDescription(schema=huge, max_batch_size=1))


def test_a_call_whose_outputs_would_be_huge_is_split() -> None:
    from moe.chains import Chain
    from moe.client.requests import Request

    schema = ExpertSchema((B(1),), outputs=B(2**24))  # 64 MiB a row
    request = Request(Hostile(None), Chain.single("e.0", schema), CONFIG)  # type: ignore[arg-type]
    terms = Terms.of([ExpertDescription(schema=schema.to_plain(), max_batch_size=4096)])
    ranges = request.row_ranges(terms, request.chain.entries, [torch.zeros(64, 1)], 64)
    assert [b - a for a, b in ranges] == [16] * 4


@pytest.mark.parametrize("code", ["not_held", "overloaded", "reply_too_large", "unavailable", "deadline"])
def test_what_may_be_repeated_is_repeated_so_often_and_no_more(swarm: Any, hostile: Hostile, code: str) -> None:
    hostile.answers["server0"] = raising(WireError(code=code, message="again").to_exception(peer=None, uid=None))
    expert = RemoteExpert(ExpertInfo("linear.0", MemoryPeer("server0")), hostile, config=CONFIG)
    with pytest.raises(MoEError, match="again"):
        expert(torch.randn(2**16, HIDDEN, requires_grad=True))  # large enough to be kept
    per_part = len(hostile.asked) / 16  # 4096 rows each
    assert per_part <= 4 * (CONFIG.max_retries + 1)


# --- mixtures ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def grid():
    with Swarm(grid_size=(2,)) as swarm:
        yield swarm


def mixtures(grid: Any, hostile: Hostile) -> list[Any]:
    options: dict[str, Any] = dict(
        in_features=DIM, grid_size=(2,), dht=hostile, uid_prefix="ffn.", k_best=2, k_min=1,
        config=dataclasses.replace(CONFIG, max_retries=1), beam_search=grid.search,
    )  # fmt: skip
    return [RemoteMixtureOfExperts(**options), RemoteSwitchMixtureOfExperts(**options).eval()]


def check_mixtures(grid: Any, hostile: Hostile, *, in_backward: bool = False) -> None:
    """The honest expert's answers, alone."""
    for mixture in mixtures(grid, hostile):
        x = torch.randn(3, DIM, requires_grad=True)
        y = mixture(x)
        is_switch = isinstance(mixture, RemoteSwitchMixtureOfExperts)
        total = y[0].sum() if is_switch else y.sum()
        if not in_backward:
            assert set(mixture.statistics().forward_failures) == {"ffn.0"}
            if not is_switch:
                torch.testing.assert_close(y, grid.originals["ffn.1"](x))
        total.backward()
        assert x.grad is not None
        if in_backward:
            assert set(mixture.statistics().backward_failures) == {"ffn.0"}


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_mixture_goes_on_without_an_expert_that_answers_garbage(grid: Any, answer: str) -> None:
    hostile = Hostile(grid.transport)
    hostile.answers["ffn.0"], hostile.method = ANSWERS[answer], FORWARD
    check_mixtures(grid, hostile)


@pytest.mark.parametrize("answer", [*ANSWERS, *list(GRADIENTS)[:-1]])
def test_a_mixture_goes_on_without_gradients_of_an_expert_that_gives_garbage(grid: Any, answer: str) -> None:
    hostile = Hostile(grid.transport)
    hostile.answers["ffn.0"], hostile.method = {**ANSWERS, **GRADIENTS}[answer], "backward"
    check_mixtures(grid, hostile, in_backward=True)


@pytest.mark.parametrize("answer", DESCRIPTIONS)
def test_a_mixture_goes_on_without_an_expert_that_describes_garbage(grid: Any, answer: str) -> None:
    hostile = Hostile(grid.transport)
    hostile.descriptions["ffn.0"] = DESCRIPTIONS[answer]
    for mixture in mixtures(grid, hostile):
        y = mixture(torch.randn(3, DIM))
        y = y[0] if isinstance(y, tuple) else y
        assert y.shape == (3, DIM)


@pytest.mark.parametrize("first", [True, False])
def test_lengths_that_one_expert_alone_gives_are_its_own_failure(first: bool) -> None:
    with Swarm(
        grid_size=(3,), args_schema=(B(None, DIM),), outputs_schema=B(None, DIM), make=torch.nn.Identity
    ) as swarm:
        hostile = Hostile(swarm.transport)
        hostile.answers["ffn.0" if first else "ffn.2"] = each(lambda tensor: tensor[:, :1])
        mixture = RemoteMixtureOfExperts(
            in_features=DIM, grid_size=(3,), dht=hostile, uid_prefix="ffn.", k_best=3, config=CONFIG, beam_search=swarm.search
        )  # fmt: skip
        x = torch.randn(2, 4, DIM)
        torch.testing.assert_close(mixture(x), x)
        assert set(mixture.statistics().forward_failures) == {"ffn.0" if first else "ffn.2"}


# --- sequences -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blocks():
    with sequence_swarm([0, 1, 2], [0, 1, 2], config=CONFIG) as swarm:
        yield swarm


def check_sequence(blocks: Any, hostile: Hostile) -> None:
    inner, blocks.swarm.transport = blocks.swarm.transport, hostile
    try:
        sequence = blocks.sequence()
    finally:
        blocks.swarm.transport = inner
    h = torch.randn(2, 3, HIDDEN)
    own, theirs = (h.clone().requires_grad_() for _ in range(2))
    y, expected = sequence(theirs), blocks.run_locally(own)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(theirs.grad, own.grad, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("answer", ANSWERS)
@pytest.mark.parametrize("method", ["forward", "backward"])
def test_a_sequence_goes_on_at_another_server(blocks: Any, answer: str, method: str) -> None:
    hostile = Hostile(blocks.swarm.transport)
    hostile.answers["server0"], hostile.method = ANSWERS[answer], method
    check_sequence(blocks, hostile)


@pytest.mark.parametrize("answer", DESCRIPTIONS)
def test_a_sequence_goes_on_without_a_server_that_describes_garbage(blocks: Any, answer: str) -> None:
    hostile = Hostile(blocks.swarm.transport)
    hostile.descriptions["server0"] = DESCRIPTIONS[answer]
    check_sequence(blocks, hostile)
