"""Experts that fail, and callers who make them: nobody else in the batch may notice."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Future
from typing import Any

import pytest
import torch

from moe.dht import DHT
from moe.errors import DeadlineExceeded, ExpertFailed, NonFiniteError, Overloaded
from moe.server.server import Server
from moe.server.task_pool import TaskPool
from moe.transport.base import BACKWARD, FORWARD, Reply
from moe.wire.messages import RequestHeader
from tests.swarm.experts import WIDTH, Scripted, make_backend
from tests.swarm.tools import Gate, RawClient, gather_limited, refused, serving, wait_until

GOOD = 8
LR = 0.5


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def server(dht: DHT, gate: Gate) -> Iterator[Server]:
    backends = [
        make_backend("scripted", "scripted.0", lr=LR),
        make_backend("linear", "careful.0", lr=LR, detect_anomalies=True),
        make_backend("mixer", "mixer.0"),
        make_backend("linear", "blocker.0"),
        make_backend("linear", "small.0", pool_size=4),
    ]
    with serving(dht, *backends, on_batch=gate) as server:
        yield server


@pytest.fixture(scope="module")
def raw(dht: DHT, server: Server) -> Iterator[RawClient]:
    raw = RawClient(dht, server.dht.peer_id)
    yield raw
    raw.close()


Together = Callable[[TaskPool, Sequence[Awaitable[Reply]]], "list[Reply | BaseException]"]


@pytest.fixture
def together(server: Server, raw: RawClient, gate: Gate) -> Together:
    """Send calls such that all of them wait in a pool before the first of them is computed."""

    def run(pool: TaskPool, calls: Sequence[Awaitable[Reply]]) -> list[Reply | BaseException]:
        blocked: list[Future[Reply]] = []

        async def send() -> list[Reply | BaseException]:
            return await asyncio.gather(*calls, return_exceptions=True)

        with gate.closed(lambda: blocked.append(raw.submit(raw.call(FORWARD, "blocker.0", [torch.ones(1, WIDTH)])))):
            answers = raw.submit(send())
            wait_until(lambda: pool.statistics().pending == len(calls), what=f"gathering {len(calls)} tasks")
        blocked[0].result(30)
        return answers.result(30)

    return run


def rows_of(first: float, count: int = 2) -> torch.Tensor:
    rows = torch.full((count, WIDTH), 0.5)
    rows[0, 0] = first
    return rows


FAILURES = {
    "raises": (Scripted.RAISE, "ValueError: this row is not to my taste"),
    "raises something that cannot be pickled": (Scripted.UNPICKLABLE, "Unpicklable: holds a lock"),
    "exits": (Scripted.EXIT, "SystemExit: 3"),
    "returns too few rows": (Scripted.WRONG_ROWS, "outputs: expected 2 rows, got 1"),
    "returns nothing": (Scripted.NOTHING, "outputs"),
}


@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
def test_one_bad_task_among_eight_good_ones(
    server: Server, raw: RawClient, together: Together, gate: Gate, method: str, failure: str
) -> None:
    backend = server.expert_backends["scripted.0"]
    module = backend.module
    assert isinstance(module, Scripted)
    mark, text = FAILURES[failure]
    weight = module.weight.item()
    inputs = [rows_of(float(i)) for i in range(GOOD)]
    inputs.insert(5, rows_of(mark))
    gradients = [[torch.ones(2, WIDTH)] if method == BACKWARD else [] for _ in inputs]
    pool = backend.forward_pool if method == FORWARD else backend.backward_pool
    module.batches.clear()

    calls = [raw.call(method, "scripted.0", [x, *grad]) for x, grad in zip(inputs, gradients)]
    started = time.monotonic()
    answers = together(pool, calls)

    assert module.batches[0] == 2 * (GOOD + 1), "they were no one batch"
    with refused(ExpertFailed, text):
        bad = answers.pop(5)
        assert isinstance(bad, BaseException)
        raise bad
    del inputs[5]
    for answer, x in zip(answers, inputs):
        assert isinstance(answer, Reply)
        expected = 2 * weight * (x if method == FORWARD else torch.ones(2, WIDTH))
        torch.testing.assert_close(answer.tensors[0], expected)
    trained = sum(2 * x.sum().item() for x in inputs) if method == BACKWARD else 0.0
    assert module.weight.item() == pytest.approx(weight - LR * trained)
    assert time.monotonic() - started < 5.0

    with torch.no_grad():
        module.weight.fill_(1.0)  # as it was
    reply = raw.run(raw.call(FORWARD, "scripted.0", [rows_of(1.0)]))
    torch.testing.assert_close(reply.tensors[0], 2 * rows_of(1.0))


# --- nan and inf -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("spoiled", ["grad_outputs", "args[0]"])
def test_a_gradient_that_is_not_finite_trains_nothing(
    server: Server, raw: RawClient, value: float, spoiled: str
) -> None:
    backend = server.expert_backends["careful.0"]
    before = backend.state_dict()
    x, grad = torch.ones(2, WIDTH), torch.ones(2, WIDTH)
    (grad if spoiled == "grad_outputs" else x)[1, 3] = value
    with refused(NonFiniteError, spoiled, "nothing was trained"):
        raw.run(raw.call(BACKWARD, "careful.0", [x, grad]))
    after = backend.state_dict()
    assert all(torch.equal(after["module"][name], tensor) for name, tensor in before["module"].items())
    assert after["moe"]["updates"] == before["moe"]["updates"]


def test_a_gradient_that_overflows_inside_trains_nothing(server: Server, raw: RawClient) -> None:
    backend = server.expert_backends["careful.0"]
    before = backend.state_dict()
    with refused(NonFiniteError):
        raw.run(raw.call(BACKWARD, "careful.0", [torch.full((2, WIDTH), 1e30), torch.full((2, WIDTH), 1e30)]))
    assert all(torch.equal(backend.module.state_dict()[name], tensor) for name, tensor in before["module"].items())


def test_an_input_that_is_not_finite_is_not_computed(raw: RawClient) -> None:
    x = torch.ones(2, WIDTH)
    x[0, 0] = math.nan
    with refused(NonFiniteError, "args[0]"):
        raw.run(raw.call(FORWARD, "careful.0", [x]))


def test_only_the_one_with_the_nan_is_refused(server: Server, raw: RawClient, together: Together) -> None:
    backend = server.expert_backends["careful.0"]
    reference = make_backend("linear", "reference.0")
    reference.module.load_state_dict(backend.module.state_dict())
    generator = torch.Generator().manual_seed(0)
    calls = [[torch.randn(2, WIDTH, generator=generator) for _ in range(2)] for _ in range(GOOD + 1)]
    calls[3][1][0, 0] = math.nan

    answers = together(backend.backward_pool, [raw.call(BACKWARD, "careful.0", call) for call in calls])

    with refused(NonFiniteError, "grad_outputs"):
        bad = answers.pop(3)
        assert isinstance(bad, BaseException)
        raise bad
    del calls[3]
    x = torch.cat([call[0] for call in calls]).requires_grad_()
    reference.module(x).backward(torch.cat([call[1] for call in calls]))
    with torch.no_grad():
        for parameter in reference.module.parameters():
            parameter -= LR * parameter.grad
    for answer, expected in zip(answers, x.grad.split(2)):  # type: ignore[union-attr]
        assert isinstance(answer, Reply)
        torch.testing.assert_close(answer.tensors[0], expected)
    for parameter, expected in zip(backend.module.parameters(), reference.module.parameters()):
        torch.testing.assert_close(parameter, expected)


# --- calls that cannot share a batch -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [FORWARD, BACKWARD])
def test_different_sequence_lengths_at_once(
    server: Server, raw: RawClient, together: Together, gate: Gate, method: str
) -> None:
    backend = server.expert_backends["mixer.0"]
    pool = backend.forward_pool if method == FORWARD else backend.backward_pool

    def tensors(length: int) -> list[torch.Tensor]:
        x = torch.full((2, length, WIDTH), float(length))
        inputs = [x, torch.tensor([3, 5]), torch.ones(2, length, dtype=torch.bool)]
        return inputs if method == FORWARD else [*inputs, torch.ones_like(x)]

    lengths = [7, 9, 7, 8, 9]
    gate.batches.clear()
    answers = together(pool, [raw.call(method, "mixer.0", tensors(length)) for length in lengths])

    for length, answer in zip(lengths, answers):
        assert isinstance(answer, Reply), answer
        x, index, mask, *grad = tensors(length)
        y, _ = backend.module(x.requires_grad_(), index=index, mask=mask)
        expected = y if method == FORWARD else torch.autograd.grad(y, [x], *grad)[0]
        torch.testing.assert_close(answer.tensors[0], expected.detach())
    assert sorted(count for name, count in gate.batches if name == pool.name) == [1, 2, 2]  # one batch per length
    wait_until(lambda: pool.statistics().pending == 0)


# --- too many, too late ------------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_at_once(server: Server, raw: RawClient, gate: Gate) -> None:
    pool = server.expert_backends["small.0"].forward_pool
    x = torch.ones(1, WIDTH)
    blocked = []
    with gate.closed(lambda: blocked.append(raw.submit(raw.call(FORWARD, "blocker.0", [x])))):
        waiting = [raw.submit(raw.call(FORWARD, "small.0", [x])) for _ in range(4)]
        wait_until(lambda: pool.statistics().pending == 4)
        with refused(Overloaded, "4 requests are waiting"):
            raw.run(raw.call(FORWARD, "small.0", [x]))
    for call in [*blocked, *waiting]:
        call.result(30)
    raw.run(raw.call(FORWARD, "small.0", [x]))


def test_what_nobody_waits_for_is_not_computed(server: Server, raw: RawClient, gate: Gate) -> None:
    backend = server.expert_backends["scripted.0"]
    module = backend.module
    assert isinstance(module, Scripted)
    blocked: list[Any] = []
    with gate.closed(lambda: blocked.append(raw.submit(raw.call(FORWARD, "blocker.0", [torch.ones(1, WIDTH)])))):
        module.batches.clear()
        late = [
            raw.submit(raw.call(method, "scripted.0", tensors, RequestHeader(time_left_s=0.3)))
            for method, tensors in ((FORWARD, [rows_of(1.0)]), (BACKWARD, [rows_of(1.0), torch.ones(2, WIDTH)]))
        ]
        gone = raw.submit(raw.call(FORWARD, "scripted.0", [rows_of(2.0)]))
        wait_until(lambda: backend.forward_pool.statistics().pending == 2, what="queueing")
        gone.cancel()
        wait_until(lambda: backend.forward_pool.statistics().pending <= 1, what="withdrawing the cancelled one")
        for call in late:
            with refused(DeadlineExceeded):
                call.result(30)
    blocked[0].result(30)
    raw.run(raw.call(FORWARD, "scripted.0", [rows_of(3.0)]))
    assert module.batches == [2], "something was computed for nobody"
    assert module.weight.item() == 1.0


def test_a_crowd_is_answered_one_way_or_the_other(server: Server, raw: RawClient) -> None:
    """A thousand calls at once, of which some are bad: each gets its own answer."""

    async def one(i: int) -> None:
        x = rows_of(Scripted.RAISE if i % 10 == 0 else float(i))
        try:
            reply = await raw.call(FORWARD, "scripted.0", [x])
        except ExpertFailed:
            assert i % 10 == 0
        else:
            assert i % 10
            torch.testing.assert_close(reply.tensors[0], 2 * x)

    raw.run(gather_limited(one, 1000, 200))
