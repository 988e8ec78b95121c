"""Many callers in one batch, and in other processes: nobody sees anything of the others."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from moe.client.expert import RemoteExpert, get_experts
from moe.config import ClientConfig
from moe.dht import DHT
from moe.server.server import Server
from moe.transport.base import FORWARD
from tests.swarm.experts import ATTENTION_WIDTH, WIDTH, compare_with_local, make_backend, random_inputs
from tests.swarm.host import compare
from tests.swarm.tools import Child, Gate, RawClient, peers_of, serving, wait_until

CLIENTS = 12
TOLERANCE = 1e-5
GLOBAL_AND_BATCHED = ("x", "lora_a", "lora_b")  # inputs with gradients


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def server(dht: DHT, gate: Gate) -> Iterator[Server]:
    backends = make_backend("attention", "attention.0", width=ATTENTION_WIDTH), make_backend("linear", "blocker.0")
    with serving(dht, *backends, on_batch=gate) as server:
        yield server


@pytest.fixture(scope="module")
def raw(dht: DHT, server: Server) -> Iterator[RawClient]:
    raw = RawClient(dht, server.dht.peer_id)
    yield raw
    raw.close()


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(CLIENTS) as threads:
        yield threads


def find(dht: DHT, transport: str) -> RemoteExpert:
    (expert,) = get_experts(dht, ["attention.0"], config=ClientConfig(transport=transport))
    assert isinstance(expert, RemoteExpert)
    return expert


def call(expert: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    own = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    return expert(own["x"], **{name: tensor for name, tensor in own.items() if name != "x"}), own


@pytest.mark.parametrize("forward_only", [True, False], ids=["forward", "backward"])
def test_rank_equals_rows_equals_length_in_one_batch(
    dht: DHT, server: Server, raw: RawClient, threads: ThreadPoolExecutor, gate: Gate, forward_only: bool
) -> None:
    """Nothing but the schema can tell what is batched here, and all twelve calls run as one."""
    expert, local = find(dht, "libp2p"), make_backend("attention", "local.0", width=ATTENTION_WIDTH).module
    inputs = [random_inputs(seed, rows=4, length=4, rank=4) for seed in range(CLIENTS)]
    expected = [call(local, one) for one in inputs]
    if forward_only:
        expert.describe()
    else:
        received = [call(expert, one) for one in inputs]
    backend = server.expert_backends["attention.0"]
    pool = backend.forward_pool if forward_only else backend.backward_pool

    def forward(number: int) -> float:
        with torch.no_grad():
            return (call(expert, inputs[number])[0] - expected[number][0]).abs().max().item()

    def backward(number: int) -> float:
        (y, own), (local_y, local_own) = received[number], expected[number]
        y.sum().backward()
        local_grads = torch.autograd.grad(local_y.sum(), [local_own[name] for name in GLOBAL_AND_BATCHED])
        pairs = zip((own[name].grad for name in GLOBAL_AND_BATCHED), local_grads)
        return max((grad - local_grad).abs().max().item() for grad, local_grad in pairs)

    gate.batches.clear()
    with gate.closed(lambda: raw.submit(raw.call(FORWARD, "blocker.0", [torch.ones(1, WIDTH)]))):
        running = [threads.submit(forward if forward_only else backward, number) for number in range(CLIENTS)]
        wait_until(lambda: pool.statistics().pending == CLIENTS, what="gathering")
    errors = [one.result(60) for one in running]
    assert (pool.name, CLIENTS) in gate.batches
    assert max(errors) < TOLERANCE


def test_identical_adapters_of_two_callers_get_their_own_gradients(
    dht: DHT, server: Server, raw: RawClient, threads: ThreadPoolExecutor, gate: Gate
) -> None:
    """The bytes are the same, so forwards share them; the gradients are not."""
    expert = find(dht, "libp2p")
    first, second = random_inputs(1, rows=2, length=3, rank=4), random_inputs(2, rows=2, length=3, rank=4)
    second.update(lora_a=first["lora_a"].clone(), lora_b=first["lora_b"].clone())
    expert.describe()
    pool = server.expert_backends["attention.0"].forward_pool
    gate.batches.clear()
    with gate.closed(lambda: raw.submit(raw.call(FORWARD, "blocker.0", [torch.ones(1, WIDTH)]))):
        running = [threads.submit(compare_with_local, expert, inputs) for inputs in (first, second)]
        wait_until(lambda: pool.statistics().pending == 2, what="gathering")
    assert max(one.result(60) for one in running) < TOLERANCE
    assert (pool.name, 2) in gate.batches


def test_clients_in_processes_of_their_own(dht: DHT, server: Server) -> None:
    peers = peers_of(server.dht)
    with (
        Child(compare, peers, "auto", list(range(100, 106))) as one,
        Child(compare, peers, "libp2p", list(range(200, 206))) as two,
    ):
        for child in (one, two):
            assert child.receive() == "ready"
        for child in (one, two):
            child.send("go")
        errors = [child.receive() for child in (one, two)]
        assert max(errors) < TOLERANCE
        for child in (one, two):
            assert child.wait(15) == 0
            assert child.survivors() == []


@pytest.fixture(scope="module", params=["libp2p", "unix", "tls"])
def linked(request: pytest.FixtureRequest, dht: DHT, server: Server) -> RemoteExpert:
    """An expert to which there is a connection."""
    expert = find(dht, request.param)
    with torch.no_grad():
        call(expert, random_inputs(0, rows=1, length=1, rank=1))
    return expert


def has_ended(child: int) -> bool:
    return os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_calls_over_connections_of_its_own(linked: RemoteExpert) -> None:
    """As workers of a DataLoader do. What the parent has open is the parent's: bytes of the child in between would spoil it."""
    inputs = random_inputs(0, rows=2, length=3, rank=1)
    with torch.no_grad():
        expected = call(linked, inputs)[0]
        child = os.fork()
        if child == 0:  # no pytest from here on
            code = 1
            try:
                code = 0 if torch.allclose(call(linked, inputs)[0], expected, atol=TOLERANCE) else 2
            finally:
                os._exit(code)
        for _ in range(5):
            assert torch.allclose(call(linked, inputs)[0], expected, atol=TOLERANCE)
        wait_until(partial(has_ended, child), what="the child's end")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert torch.allclose(call(linked, inputs)[0], expected, atol=TOLERANCE)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_children_forked_while_threads_call_are_not_held_up_by_their_locks(linked: RemoteExpert) -> None:
    """Locks that the parent's threads hold, and what its event loop waits for, are nobody's in a child."""
    inputs, ended = random_inputs(0, rows=2, length=3, rank=20), threading.Event()  # adapters that servers hold
    expected, own = call(linked, inputs)
    expected.sum().backward()

    def run() -> float:
        output, theirs = call(linked, inputs)
        output.sum().backward()
        return max(
            (output - expected).abs().max().item(),
            *((theirs[name].grad - own[name].grad).abs().max().item() for name in GLOBAL_AND_BATCHED),
        )

    def keep_calling() -> float:
        worst = 0.0
        while not ended.is_set():
            linked.refresh_info()
            worst = max(worst, run())
        return worst

    with ThreadPoolExecutor(4) as threads:
        calling = [threads.submit(keep_calling) for _ in range(4)]
        for _ in range(4):
            child = os.fork()
            if child == 0:  # no pytest from here on
                code = 1
                try:
                    code = 0 if run() < TOLERANCE else 2
                finally:
                    os._exit(code)
            wait_until(partial(has_ended, child), what="the child's end")
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        ended.set()
        assert all(future.result(30) < TOLERANCE for future in calling)
