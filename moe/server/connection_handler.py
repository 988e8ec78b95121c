"""ConnectionHandler: decode -> validate -> submit -> encode. Owns: what a request must satisfy before it may wait in a pool.

An ``ExpertService`` (moe.transport.base) for any transport; runs in the server's event loop, and leaves every computation to
the pools. Must not know: how bytes travel, how batches form. (In hivemind it was a process, and there were eight per expert.)
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch

from moe.config import HandlerConfig
from moe.errors import DeadlineExceeded, ExpertNotFound, MoEError, Overloaded, Refused, SchemaError
from moe.schema import DTYPES, Compression, Entry, count_rows
from moe.server.execution import as_expert_failure
from moe.server.expert_backend import ExpertBackend
from moe.server.once import OnceWindow
from moe.server.task_pool import Task, TaskResult
from moe.transport.base import BACKWARD, FORWARD, Reply
from moe.wire.messages import ExpertDescription, ReplyHeader, RequestHeader
from moe.wire.tensors import max_encoded_bytes

Authorizer = Callable[[str, str, str], bool]

_HASH_IN_THREAD_BYTES = 2**20  # globals larger than this are digested off the event loop; ours, about 1 ms


class ConnectionHandler:
    """Serves requests for a set of experts.

    :param backends: experts by uid
    :param config: what is accepted
    :param authorize: called with (peer id, method, uid); False refuses the request before any of its tensors is read
    """

    def __init__(
        self,
        backends: Mapping[str, ExpertBackend],
        config: HandlerConfig | None = None,
        *,
        authorize: Authorizer | None = None,
    ):
        self.backends, self.config, self.authorize = backends, config or HandlerConfig(), authorize
        self.inflight_bytes = 0
        self.requests = 0
        self.once: OnceWindow[Task] = OnceWindow(
            self.config.once_max_replies, self.config.once_max_bytes, self.config.once_window_s
        )

    def __repr__(self) -> str:
        return f"ConnectionHandler({len(self.backends)} experts, {self.inflight_bytes} bytes in flight)"

    @property
    def read_timeout_s(self) -> float:
        """Longest silence while a request is being received."""
        return self.config.read_timeout_s

    def describe(self, uid: str) -> ExpertDescription:
        """See ExpertService."""
        return self._backend(uid).describe(self.config.max_request_bytes)

    def open(self, peer: str, method: str, uid: str, header: RequestHeader | None) -> RequestAdmission:
        """See ExpertService."""
        if method not in (FORWARD, BACKWARD):
            raise Refused(f"unknown method {method!r}")
        backend = self._backend(uid)
        if self.authorize is not None and not self.authorize(peer, method, uid):
            raise Refused(f"this peer is not allowed to call {method}", uid=uid)
        self.requests += 1
        return RequestAdmission(self, backend, peer, method, header, time.monotonic())

    def _backend(self, uid: str) -> ExpertBackend:
        backend = self.backends.get(uid)
        if backend is None:
            raise ExpertNotFound(f"no expert {uid!r} here; this server hosts {len(self.backends)} others")
        return backend


class RequestAdmission:
    """One request between its header and its answer. See ``Admission`` in moe.transport.base."""

    def __init__(
        self,
        handler: ConnectionHandler,
        backend: ExpertBackend,
        peer: str,
        method: str,
        header: RequestHeader | None,
        now: float,
    ):
        self._handler, self._backend, self._peer, self._method, self._header = handler, backend, peer, method, header
        self._present = tuple(sorted(header.present)) if header is not None else ()
        self._entries = self._expected_entries()
        self._shapes: list[tuple[int, ...]] = []
        self._bytes = 0
        limit_s = handler.config.request_timeout_s
        if header is not None and header.time_left_s is not None:
            limit_s = min(limit_s, header.time_left_s)
        self._deadline = now + limit_s

    def _expected_entries(self) -> tuple[Entry, ...]:
        stock_count = None
        if self._method == BACKWARD and self._header is None:
            schema = self._backend.schema
            stock_count = len(schema.input_entries(())) + len(schema.output_entries)
        return self._backend.task_entries(self._method, self._present, stock_count)

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        """Check a tensor's declaration against the schema and the limits, before any memory is taken for it."""
        if index >= len(self._entries):
            raise SchemaError(
                f"{self._method}: expected {len(self._entries)} tensors "
                f"({', '.join(entry.path for entry in self._entries[:20])}), got more"
            )
        entry = self._entries[index]
        problem = entry.proto.mismatch(shape, dtype)
        if problem is not None:
            raise SchemaError(f"{entry.path}: {problem}")
        self._shapes.append(shape)
        rows = count_rows(self._entries, self._shapes)
        if entry.proto.batched and rows > self._backend.max_batch_size:
            raise SchemaError(
                f"{entry.path}: {rows} rows, at most {self._backend.max_batch_size} are taken in one request; split it"
            )
        encoded = max_encoded_bytes(shape, DTYPES[dtype], codec)
        size = encoded if codec == Compression.NONE else encoded + math.prod(shape) * DTYPES[dtype].itemsize
        config = self._handler.config
        if self._bytes + size > config.max_request_bytes:
            raise SchemaError(
                f"{entry.path}: with it the request exceeds {config.max_request_bytes} bytes, the most this server takes"
            )
        if self._handler.inflight_bytes + size > config.max_inflight_bytes:
            raise Overloaded(f"{self._handler.inflight_bytes} bytes of requests are in flight already; try again later")
        self._bytes += size
        self._handler.inflight_bytes += size
        return encoded

    def release(self) -> None:
        """Give back the bytes held in flight."""
        self._handler.inflight_bytes -= self._bytes
        self._bytes = 0

    async def run(self, tensors: Sequence[torch.Tensor]) -> Reply:
        """Wait for the expert's answer, until the caller's deadline."""
        first = await self._submit(tensors)
        try:
            outcome = await self._wait(first.future)
        except MoEError:
            raise
        except Exception as e:
            raise as_expert_failure(e) from None
        return self._reply(first, outcome)

    async def _submit(self, tensors: Sequence[torch.Tensor]) -> Task:
        """A new task in its pool, or the one that a repeated request id belongs to."""
        wants = self._header.wants_grad if self._header is not None else None
        arguments = (self._method, tensors, self._present, wants)
        if sum(t.nbytes for t, e in zip(tensors, self._entries) if not e.proto.batched) > _HASH_IN_THREAD_BYTES:
            make = asyncio.get_running_loop().run_in_executor(None, self._backend.make_task, *arguments)
            task = await make
        else:
            task = self._backend.make_task(*arguments)
        task.deadline, task.peer = self._deadline, self._peer
        if self._method == FORWARD:
            self._backend.forward_pool.submit(task)
            return task
        return self._submit_once(task)

    def _submit_once(self, task: Task) -> Task:
        once, request_id = self._handler.once, self._header.request_id if self._header is not None else None
        if request_id is None:  # a stock peer
            self._backend.backward_pool.submit(task)
            return task
        key = (self._peer, self._backend.name, request_id)
        first = once.find(key, time.monotonic())
        if first is not None:
            return first
        self._backend.backward_pool.submit(task)
        once.begin(key, task)
        loop = asyncio.get_running_loop()

        def settle(future: Future[TaskResult]) -> None:
            if future.cancelled() or future.exception() is not None:
                once.abandon(key)
            else:
                answer = future.result()
                for i, grad in enumerate(answer):
                    if grad is not None and grad.untyped_storage().nbytes() > grad.nbytes:
                        answer[i] = grad.clone()  # rows of a batch would keep the whole batch in memory
                size_bytes = sum(grad.nbytes for grad in answer if grad is not None)
                once.finish(key, size_bytes, time.monotonic())
                task.tensors = []  # only the answer is kept

        def settle_in_loop(future: Future[TaskResult]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops
                loop.call_soon_threadsafe(settle, future)

        task.future.add_done_callback(settle_in_loop)
        return task

    async def _wait(self, future: Future[TaskResult]) -> TaskResult:
        """The task's result. By hand and not with ``wrap_future`` and ``wait_for``, which cost 40 us a call together."""
        loop = asyncio.get_running_loop()
        settled: asyncio.Future[None] = loop.create_future()

        def settle() -> None:
            if not settled.done():
                settled.set_result(None)

        def settle_from_runtime(_: Future[TaskResult]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops
                loop.call_soon_threadsafe(settle)

        future.add_done_callback(settle_from_runtime)
        timer = loop.call_later(max(0.0, self._deadline - time.monotonic()), settle)
        try:
            await settled
            if not future.done():
                raise DeadlineExceeded("the caller's time was over before the expert was done")
            return future.result()
        finally:
            timer.cancel()
            if self._method == FORWARD:  # a repeat of a backward may be waiting for the same task
                future.cancel()

    def _reply(self, task: Task, result: TaskResult) -> Reply:
        queue_s, compute_s = task.started_at - task.submitted_at, task.finished_at - task.started_at
        if self._method == FORWARD:
            protos = [entry.proto for entry in self._backend.schema.output_entries]
            header = ReplyHeader(queue_s=queue_s, compute_s=compute_s)
            return Reply(header, [t for t in result if t is not None], [proto.compression for proto in protos])
        protos = [entry.proto for entry in self._entries[: len(result)]]
        if self._header is None:  # a stock client expects a gradient for every input, integer ones included
            shapes = self._shapes[: len(result)]
            grads = [
                torch.zeros(shape, dtype=proto.dtype) if grad is None else grad
                for grad, shape, proto in zip(result, shapes, protos)
            ]
            return Reply(None, grads, [proto.compression for proto in protos])
        has_grad = tuple(grad is not None for grad in result)
        kept = [(grad, proto.compression) for grad, proto in zip(result, protos) if grad is not None]
        header = ReplyHeader(has_grad=has_grad, queue_s=queue_s, compute_s=compute_s)
        return Reply(header, [grad for grad, _ in kept], [codec for _, codec in kept])
