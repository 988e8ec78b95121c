"""Copies to and from a device: in the right order, on the right stream, as a made-up CUDA sees them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe.errors import Unavailable
from moe.server import runtime as runtime_module
from moe.server import transfer
from moe.server.runtime import Runtime
from moe.server.task_pool import Task, TaskPool, TaskResult
from moe.server.transfer import Loader, to_cpu

WAIT_S = 20.0
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class FakeCuda:
    """Streams and events of torch.cuda. ``log`` has what happened, each with the stream it happened on."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.current = threading.local()
        self.streams = 0

    def Stream(self, device: torch.device) -> FakeStream:
        assert device == CUDA
        return FakeStream(self, "copying")

    def current_stream(self, device: torch.device) -> FakeStream:
        assert device == CUDA
        return getattr(self.current, "stream", FakeStream(self, "computing"))

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.current.stream = stream
        yield
        del self.current.stream


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str):
        self.cuda, self.name = cuda, name

    def record_event(self) -> str:
        event = f"event {self.cuda.streams}"
        self.cuda.streams += 1
        self.cuda.log.append(f"{self.name}: record {event}")
        return event

    def wait_event(self, event: str) -> None:
        self.cuda.log.append(f"{self.name}: wait for {event}")

    def synchronize(self) -> None:
        self.cuda.log.append(f"{self.name}: synchronize")


class FakeTensor:
    """Is somewhere; can be staged (see ``cuda``) and copied."""

    def __init__(self, cuda: FakeCuda, name: str, device: torch.device = CPU, pinned: bool = False):
        self.cuda, self.name, self.device, self.pinned = cuda, name, device, pinned

    def to(self, device: torch.device, non_blocking: bool = False) -> FakeTensor:
        assert device == CUDA
        if self.device == CUDA:
            return self
        assert non_blocking
        assert self.pinned, "a copy from other memory makes the thread wait"
        self.cuda.log.append(f"{self.cuda.current_stream(CUDA).name}: copy {self.name}")
        return FakeTensor(self.cuda, self.name, CUDA)

    def record_stream(self, stream: FakeStream) -> None:
        assert self.device == CUDA
        self.cuda.log.append(f"{stream.name}: uses {self.name}")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()

    def pinned(tensor: FakeTensor) -> FakeTensor:
        if tensor.device == CUDA:
            fake.log.append(f"{fake.current_stream(CUDA).name}: copy {tensor.name} back")
        return FakeTensor(fake, tensor.name, CPU, pinned=True)

    monkeypatch.setattr(transfer, "_pinned", pinned)
    return fake


def tensors(cuda: FakeCuda, *names: str) -> Any:
    return [FakeTensor(cuda, name) for name in names]


def test_a_batch_is_copied_on_its_own_stream_and_awaited_by_the_computing_one(cuda: FakeCuda) -> None:
    loaded = Loader(CUDA, cuda).load([tensors(cuda, "a", "b"), tensors(cuda, "c")])
    assert cuda.log == ["copying: copy a", "copying: copy b", "copying: copy c", "copying: record event 0"]
    cuda.log.clear()
    taken: Any = loaded.take()
    assert [[tensor.name for tensor in call] for call in taken] == [["a", "b"], ["c"]]
    assert all(tensor.device == CUDA for call in taken for tensor in call)
    assert cuda.log == ["computing: wait for event 0", "computing: uses a", "computing: uses b", "computing: uses c"]


def test_what_is_on_the_device_already_is_not_copied(cuda: FakeCuda) -> None:
    there: Any = FakeTensor(cuda, "there", CUDA)
    assert Loader(CUDA, cuda).load([[there]]).take() == [[there]]
    assert cuda.log == ["copying: record event 0", "computing: wait for event 0", "computing: uses there"]


def test_results_come_back_together_before_one_synchronization(cuda: FakeCuda) -> None:
    results: Any = [[FakeTensor(cuda, "a", CUDA), None], [FakeTensor(cuda, "b", CUDA), FakeTensor(cuda, "c", CUDA)]]
    copies: Any = to_cpu(results, cuda)
    assert [[None if copy is None else (copy.name, copy.device) for copy in result] for result in copies] == [
        [("a", CPU), None],
        [("b", CPU), ("c", CPU)],
    ]
    assert cuda.log == [f"computing: copy {name} back" for name in "abc"] + ["computing: synchronize"]


def test_without_cuda_nothing_is_copied_or_waited_for(cuda: FakeCuda) -> None:
    tensor = torch.ones(2)
    ((result, nothing),) = to_cpu([[tensor, None]], cuda)
    assert result is tensor
    assert nothing is None
    ((moved,),) = Loader(torch.device("meta"), cuda).load([[tensor]]).take()
    assert moved.device.type == "meta"
    assert cuda.log == []


def test_pinned_copies_fall_back_to_ordinary_memory_where_there_is_no_more_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    empty, asked = torch.empty, []
    error = "CUDA error: out of memory"

    def limited(*args: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        if pin_memory and error:
            raise RuntimeError(error)
        return empty(*args, **options)

    monkeypatch.setattr(torch, "empty", limited)
    source = torch.arange(6).reshape(2, 3).T
    assert torch.equal(transfer._pinned(source), source)
    assert asked == [True, False]
    error = ""
    assert torch.equal(transfer._pinned(source), source)
    assert asked == [True, False, True]
    error = "CUDA error: device-side assert triggered"
    with pytest.raises(RuntimeError, match="device-side"):
        transfer._pinned(source)


class Backend:
    """One pool; every batch is written down in the log of a made-up CUDA, and waits for ``gate``."""

    def __init__(self, cuda: FakeCuda):
        self.cuda, self.gate = cuda, threading.Event()
        self.pool = TaskPool(self._process, max_batch_size=1, name="pool")

    def _process(self, tasks: list[Task]) -> list[TaskResult]:
        (tensor,) = tasks[0].tensors
        assert tensor.device == CUDA
        self.cuda.log.append(f"compute {tensor.name}")  # type: ignore[attr-defined]
        assert self.gate.wait(WAIT_S)
        self.cuda.log.append(f"computed {tensor.name}")  # type: ignore[attr-defined]
        return [[]]

    def get_pools(self) -> tuple[TaskPool, ...]:
        return (self.pool,)

    def to(self, device: torch.device | str) -> None:
        assert device == CUDA

    def submit(self, name: str) -> Future[TaskResult]:
        return self.pool.submit(Task("forward", (), (), tensors(self.cuda, name), 1, "group"))


def test_the_next_batch_is_copied_while_one_is_computed(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "Loader", lambda device: Loader(device, cuda))
    backend = Backend(cuda)
    copied = threading.Event()
    record = FakeStream.record_event

    def recorded(stream: FakeStream) -> str:
        event = record(stream)
        if event == "event 1":
            copied.set()
        return event

    monkeypatch.setattr(FakeStream, "record_event", recorded)
    futures = [backend.submit(name) for name in ("a", "b")]
    runtime = Runtime({"x": backend}, device=CUDA)
    runtime.start()
    assert copied.wait(WAIT_S), "b is not copied before a is computed"
    backend.gate.set()
    for future in futures:
        future.result(WAIT_S)
    assert runtime.shutdown(WAIT_S)
    order = {entry: place for place, entry in enumerate(cuda.log)}
    assert order["copying: record event 1"] < order["computed a"]
    for name, event in (("a", "event 0"), ("b", "event 1")):
        assert order[f"copying: copy {name}"] < order[f"copying: record {event}"]
        assert order[f"computing: wait for {event}"] < order[f"computing: uses {name}"] < order[f"compute {name}"]


def test_a_device_that_cannot_be_had_ends_the_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(device: torch.device) -> Loader:
        raise RuntimeError("CUDA error: all CUDA-capable devices are busy or unavailable")

    monkeypatch.setattr(runtime_module, "Loader", broken)
    backend, failed = Backend(FakeCuda()), threading.Event()
    future = backend.submit("a")
    runtime = Runtime({"x": backend}, device=CUDA)
    runtime.start(on_failure=lambda error: failed.set())
    with pytest.raises(Unavailable, match="has died"):
        future.result(WAIT_S)
    assert failed.wait(WAIT_S)
    assert not runtime.is_alive()
    assert "busy" in str(runtime.failure)
