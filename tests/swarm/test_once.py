"""A backward trains once, however often it is asked for; and only if whoever asks may."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import torch

from moe.client.expert import RemoteExpert
from moe.config import ClientConfig, HandlerConfig
from moe.dht import DHT
from moe.errors import CallTimeout, NonFiniteError, Refused
from moe.expert_uid import ExpertInfo
from moe.server.server import Server
from moe.testing import FaultPlan, FaultyTransport, check_idle
from moe.transport.base import BACKWARD, FORWARD
from moe.wire.messages import RequestHeader, new_request_id
from tests.swarm.experts import WIDTH, make_backend
from tests.swarm.tools import Gate, RawClient, refused, serving, wait_until

LR = 0.1
KEPT = 3  # answers


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def server(dht: DHT, gate: Gate) -> Iterator[Server]:
    def authorize(peer: str, method: str, uid: str) -> bool:
        return (method, uid) != (BACKWARD, "guarded.0")

    backends = [
        make_backend("linear", "linear.0", lr=LR, detect_anomalies=True),
        make_backend("linear", "guarded.0", lr=LR),
        make_backend("linear", "blocker.0"),
        make_backend("slow", "slow.0", lr=LR),
        make_backend("wide", "wide.0"),
    ]
    config = HandlerConfig(once_max_replies=KEPT)
    with serving(dht, *backends, on_batch=gate, handler_config=config, authorize=authorize) as server:
        yield server


@pytest.fixture(scope="module")
def raw(dht: DHT, server: Server) -> Iterator[RawClient]:
    raw = RawClient(dht, server.dht.peer_id)
    yield raw
    raw.close()


class Training:
    """What happens to the parameters of linear.0 from now on."""

    def __init__(self, server: Server, uid: str = "linear.0"):
        self.backend = server.expert_backends[uid]
        self.reference = make_backend("linear", "reference.0", lr=LR)
        self.reference.module.load_state_dict(self.backend.module.state_dict())
        self.updates = self.backend.updates

    def expect(self, *calls: list[torch.Tensor]) -> list[torch.Tensor]:
        """Train a local copy with these calls and nothing else; returns the gradients of its inputs."""
        grads = [grad for call in calls for grad in self.reference.backward(*call)]
        assert self.backend.updates - self.updates == len(calls)
        for name, value in self.reference.module.state_dict().items():
            torch.testing.assert_close(self.backend.module.state_dict()[name], value)
        return [grad for grad in grads if grad is not None]


def some_call(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(3, WIDTH, generator=generator) for _ in range(2)]


@pytest.mark.parametrize("ways", ["unary unary", "unary stream", "stream link", "link unary", "link link"])
def test_the_same_id_again(server: Server, raw: RawClient, ways: str) -> None:
    training, tensors, header = Training(server), some_call(), RequestHeader(request_id=new_request_id())
    replies = [raw.run(raw.call(BACKWARD, "linear.0", tensors, header, way=way)) for way in ways.split()]
    (expected,) = training.expect(tensors)
    for reply in replies:
        torch.testing.assert_close(reply.tensors[0], expected)
    assert torch.equal(replies[0].tensors[0], replies[1].tensors[0])


def test_another_id_is_another_call(server: Server, raw: RawClient) -> None:
    training, tensors = Training(server), some_call()
    for _ in range(2):
        raw.run(raw.call(BACKWARD, "linear.0", tensors, RequestHeader(request_id=new_request_id())))
    training.expect(tensors, tensors)


def test_the_same_id_while_the_first_is_waiting(server: Server, raw: RawClient, gate: Gate) -> None:
    training, tensors, header = Training(server), some_call(), RequestHeader(request_id=new_request_id())
    pool = training.backend.backward_pool
    requests = server.handler.requests
    with gate.closed(lambda: raw.submit(raw.call(FORWARD, "blocker.0", [torch.ones(1, WIDTH)]))):
        calls = [
            raw.submit(raw.call(BACKWARD, "linear.0", tensors, header, way=way))
            for way in ("unary", "stream", "link", "unary")
        ]
        wait_until(lambda: server.handler.requests - requests == 5 and pool.statistics().pending)
        assert pool.statistics().pending == 1
    replies = [call.result(30) for call in calls]
    (expected,) = training.expect(tensors)
    for reply in replies:
        torch.testing.assert_close(reply.tensors[0], expected)


def test_the_first_caller_gives_up_and_asks_again(server: Server, raw: RawClient, gate: Gate) -> None:
    training, tensors, header = Training(server), some_call(), RequestHeader(request_id=new_request_id())
    pool = training.backend.backward_pool
    with gate.closed(lambda: raw.submit(raw.call(FORWARD, "blocker.0", [torch.ones(1, WIDTH)]))):
        with refused(CallTimeout):
            raw.run(raw.call(BACKWARD, "linear.0", tensors, header, timeout_s=0.5))
        assert pool.statistics().pending == 1, "a backward goes on without its caller"
    reply = raw.run(raw.call(BACKWARD, "linear.0", tensors, header))
    (expected,) = training.expect(tensors)
    torch.testing.assert_close(reply.tensors[0], expected)


def test_a_failed_backward_may_be_tried_again(server: Server, raw: RawClient) -> None:
    training, tensors, header = Training(server), some_call(), RequestHeader(request_id=new_request_id())
    with refused(NonFiniteError):
        raw.run(raw.call(BACKWARD, "linear.0", [tensors[0], torch.full_like(tensors[1], torch.nan)], header))
    raw.run(raw.call(BACKWARD, "linear.0", tensors, header))
    training.expect(tensors)


def test_an_answer_that_is_not_kept_any_more(server: Server, raw: RawClient) -> None:
    training, header = Training(server), RequestHeader(request_id=new_request_id())
    calls = [some_call(seed) for seed in range(KEPT + 1)]
    for call, its_header in zip(calls, [header, *(RequestHeader(request_id=new_request_id()) for _ in range(KEPT))]):
        raw.run(raw.call(BACKWARD, "linear.0", call, its_header))
    with refused(Refused, "not trained twice"):
        raw.run(raw.call(BACKWARD, "linear.0", calls[0], header))
    training.expect(*calls)


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
@pytest.mark.parametrize("fault", ["drop_reply", "close_after_work"])
def test_a_retried_backward_trains_once(dht: DHT, server: Server, transport: str, fault: str) -> None:
    from moe.client.expert import transport_of

    plan = FaultPlan()
    getattr(plan.on("backward", times=2), fault)()
    expert = RemoteExpert(
        ExpertInfo("linear.0", server.dht.peer_id),
        FaultyTransport(transport_of(dht, transport), plan),
        config=ClientConfig(request_timeout_s=1.0, min_backoff_s=0.05),
    )
    training, (x, grad) = Training(server), some_call()
    x.requires_grad_()
    y = expert(x)
    y.backward(grad)
    (expected,) = training.expect([x.detach(), grad])
    torch.testing.assert_close(x.grad, expected)
    assert len(plan.fired) == 2 and not plan.unfired


# --- who may ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["unary", "stream", "link"])
def test_a_peer_that_may_not_train(server: Server, raw: RawClient, way: str) -> None:
    before = server.expert_backends["guarded.0"].state_dict()
    x, grad = some_call()
    with refused(Refused, "not allowed"):
        raw.run(raw.call(BACKWARD, "guarded.0", [x, grad], way=way))
    reply = raw.run(raw.call(FORWARD, "guarded.0", [x], way=way))
    torch.testing.assert_close(reply.tensors[0], server.expert_backends["guarded.0"].module(x).detach())
    after = server.expert_backends["guarded.0"].state_dict()
    assert all(torch.equal(after["module"][name], tensor) for name, tensor in before["module"].items())


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
def test_a_peer_that_may_not_train_is_told_so(dht: DHT, server: Server, transport: str) -> None:
    config = ClientConfig(transport=transport)
    expert = RemoteExpert(ExpertInfo("guarded.0", server.dht.peer_id), dht, config=config)
    y = expert(torch.ones(2, WIDTH))
    with refused(Refused, "not allowed"):
        y.sum().backward()


# --- replies of any size -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", ["auto", "libp2p"])
def test_a_small_request_with_a_large_answer(dht: DHT, server: Server, transport: str) -> None:
    """Its length is not in the schema, so the client cannot know."""
    config = ClientConfig(transport=transport)
    expert = RemoteExpert(ExpertInfo("wide.0", server.dht.peer_id), dht, config=config)
    x = torch.randn(16, WIDTH)
    torch.testing.assert_close(expert(x), x[:, :1].expand(-1, 2**18))


def test_many_large_answers_at_once(server: Server, raw: RawClient) -> None:
    async def one(rows: int) -> None:
        x = torch.randn(rows, WIDTH)
        reply = await raw.call(FORWARD, "wide.0", [x])
        torch.testing.assert_close(reply.tensors[0], x[:, :1].expand(-1, 2**18))

    async def all_of_them() -> None:
        await asyncio.gather(*(one(rows) for rows in (1, 2, 3, 4, 5, 1, 2, 8)))

    raw.run(all_of_them())
    check_idle(server)
