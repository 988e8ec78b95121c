"""ConnectionHandler: decode -> validate -> submit -> encode. Owns: what a request must satisfy before it may wait in a pool.

An ``ExpertService`` (moe.transport.base) for any transport; runs in the server's event loop, and leaves every computation to
the pools. Must not know: how bytes travel, how batches form. (In hivemind it was a process, and there were eight per expert.)
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import msgspec
import torch

from moe.chains import Block, Chain
from moe.config import HandlerConfig
from moe.errors import (
    DeadlineExceeded,
    ExpertNotFound,
    MoEError,
    Refused,
    SchemaError,
    TensorNotHeld,
)
from moe.expert_uid import split_chain
from moe.schema import DIGEST_BYTES, DTYPE_NAMES, DTYPES, Compression, count_rows, digest
from moe.server.authorization import Authorization, Authorizer
from moe.server.chains import all_of, backward_chain, forward_chain
from moe.server.execution import as_expert_failure
from moe.server.expert_backend import ExpertBackend
from moe.server.held_tensors import HeldTensor, HeldTensors
from moe.server.kept_forwards import KeptForward
from moe.server.once import OnceWindow
from moe.server.task_pool import Task, TaskResult
from moe.transport.base import BACKWARD, FORWARD, INFO, TICKET, Reply
from moe.transport.inflight import InflightBytes
from moe.wire.messages import (
    HELD_TENSORS,
    MIN_HELD_BYTES,
    REQUEST_ID_BYTES,
    ExpertDescription,
    ReplyHeader,
    RequestHeader,
)
from moe.wire.tensors import max_encoded_bytes

T = TypeVar("T")

_TOO_LATE = "the caller's time was over before the expert was done"
_HASH_IN_THREAD_BYTES = 2**20  # globals larger than this are digested off the event loop; ours, about 1 ms


class Traffic(NamedTuple):
    """Requests for some experts: opened so far, and open now. One for a chain counts once for each of them."""

    opened: int
    open: int


class ConnectionHandler:
    """Serves requests for a set of experts.

    :param backends: experts by uid; more may come and some go later: ``host``, ``drop``
    :param config: what is accepted
    :param authorize: called in the event loop, so it must be quick, with (peer id, method, uid), and, if it takes a fourth
        argument, what the caller's ``request_metadata`` has told. The method is "forward" or "backward" (for each uid of a
        request, before any of its tensors is read), "info" (what an expert takes and returns, which every client asks for
        first), or "ticket" (a direct link; the uid is empty). With these two nothing is told. Anything but True refuses,
        and so does an exception
    :raises ConfigError: ``authorize`` is a coroutine function
    """

    def __init__(
        self,
        backends: Mapping[str, ExpertBackend],
        config: HandlerConfig | None = None,
        *,
        authorize: Authorizer | None = None,
    ):
        self.backends, self.config = dict(backends), config or HandlerConfig()
        self._authorization = Authorization(authorize)
        self.inflight = InflightBytes(self.config.max_inflight_bytes, self.config.max_inflight_bytes_per_peer)
        self.requests = 0
        self._opened: Counter[str] = Counter()  # requests by uid, so far and now
        self._open: Counter[str] = Counter()
        self.once: OnceWindow[Task] = OnceWindow(
            self.config.once_max_replies, self.config.once_max_bytes, self.config.once_window_s
        )
        limits = self.config.held_max_bytes, self.config.held_max_bytes_per_peer, self.config.held_window_s
        self.held_globals: HeldTensors[HeldTensor] = HeldTensors(*limits)
        self.held_inputs: HeldTensors[HeldTensor] = HeldTensors(*limits)
        self.held_forwards: HeldTensors[KeptForward] = HeldTensors(
            self.config.held_max_bytes, self.config.held_max_bytes // 2, self.config.held_window_s
        )
        self._expiry: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"ConnectionHandler({len(self.backends)} experts, {self.inflight.bytes} bytes in flight)"

    @property
    def read_timeout_s(self) -> float:
        """Longest silence while a request is being received."""
        return self.config.read_timeout_s

    def describe(self, peer: str, uid: str) -> ExpertDescription:
        """See ExpertService."""
        self._authorization.check(peer, INFO, uid)
        description = self._backend(uid).describe(self.config.max_request_bytes)
        if self.config.held_max_bytes == 0:
            features = tuple(feature for feature in description.features if feature != HELD_TENSORS)
            description = msgspec.structs.replace(description, features=features)
        return description

    def allow_ticket(self, peer: str) -> None:
        """See ExpertService."""
        self._authorization.check(peer, TICKET, "")

    def open(self, peer: str, method: str, uid: str, header: RequestHeader | None) -> RequestAdmission:
        """See ExpertService."""
        if method not in (FORWARD, BACKWARD):
            raise Refused(f"unknown method {method!r}")
        uids = [uid] if header is None or header.chain is None else split_chain(uid)
        told = header.metadata if header is not None else {}
        for name in dict.fromkeys(uids):  # before they are looked up: who may not call learns nothing of what is here
            self._authorization.check(peer, method, name, told)
        backends = [self._backend(name) for name in uids]
        self.requests += 1
        admission = RequestAdmission(self, backends, peer, method, header, time.monotonic())
        for name in uids:
            self._opened[name] += 1
            self._open[name] += 1
        try:
            admission.admit_held()
        except BaseException:
            admission.release()
            raise
        return admission

    def closed(self, uids: Iterable[str]) -> None:
        """A request for these experts has ended."""
        for uid in uids:
            self._open[uid] -= 1

    def expire_later(self) -> None:
        """Drop held tensors when nobody has used them for long, also if no request comes any more."""
        if self._expiry is not None:
            return
        now = time.monotonic()
        stores: tuple[HeldTensors[Any], ...] = (self.held_globals, self.held_inputs, self.held_forwards)
        due = [at for store in stores if (at := store.expire(now)) is not None]
        if due:
            self._expiry = asyncio.get_running_loop().call_later(min(due) - now, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self.expire_later()

    # --- experts that come and go; in the event loop, like all of this -----------------------------------------------

    def host(self, backends: Mapping[str, ExpertBackend]) -> None:
        """Take requests for more experts."""
        self.backends = {**self.backends, **backends}

    def drop(self, uids: Iterable[str]) -> None:
        """Take no more requests for these experts; those that are open are served."""
        leaving = set(uids)
        self.backends = {uid: backend for uid, backend in self.backends.items() if uid not in leaving}
        self.held_forwards.clear()  # they would keep the experts' parameters in memory

    def traffic(self, uids: Iterable[str]) -> Traffic:
        """Requests for these experts."""
        uids = list(uids)
        return Traffic(sum(self._opened[uid] for uid in uids), sum(self._open[uid] for uid in uids))

    def _backend(self, uid: str) -> ExpertBackend:
        backend = self.backends.get(uid)
        if backend is None:
            raise ExpertNotFound(f"no expert {uid!r} here; this server hosts {len(self.backends)} others")
        return backend


def _planned(backends: Sequence[ExpertBackend], header: RequestHeader | None) -> Chain:
    """Which tensor of the request each block takes.

    :raises SchemaError: if the header makes no sense
    """
    if header is None or header.chain is None:
        (backend,) = backends
        return backend.chain(header.present if header is not None else ())
    if len(header.chain) != len(backends):
        raise SchemaError(f"a chain of {len(backends)} uids, with inputs of {len(header.chain)} blocks")
    return Chain(
        [
            Block(backend.name, backend.schema, tuple(sorted(inputs.present)), inputs.tensors)
            for backend, inputs in zip(backends, header.chain)
        ]
    )


class RequestAdmission:
    """One request between its header and its answer. See ``Admission`` in moe.transport.base.

    :param backends: the blocks it asks for; a single one, or those of a chain
    """

    def __init__(
        self,
        handler: ConnectionHandler,
        backends: Sequence[ExpertBackend],
        peer: str,
        method: str,
        header: RequestHeader | None,
        now: float,
    ):
        self._handler, self._backends, self._peer, self._method, self._header = handler, backends, peer, method, header
        self._uids = tuple(backend.name for backend in backends)
        self._chain = _planned(backends, header)
        self._entries = self._chain.entries
        self._wants = self._chain.floating
        if header is not None and header.wants_grad is not None:
            if len(header.wants_grad) != len(self._wants):
                raise SchemaError(
                    f"wants_grad: expected {len(self._wants)} flags, one per input, got {len(header.wants_grad)}"
                )
            self._wants = tuple(wanted and floating for wanted, floating in zip(header.wants_grad, self._wants))
        if method == BACKWARD:
            self._entries += backends[-1].gradient_entries(stock=header is None)
        self._max_rows = min(backend.max_batch_size for backend in backends)
        self._keys = header.held if header is not None else {}
        every = range(len(self._entries))
        self._sent: Sequence[int] = (
            [position for position in every if position not in self._keys] if self._keys else every
        )
        self._shapes: dict[int, tuple[int, ...]] = {}
        self._batched: int | None = None  # position of one of the batched tensors admitted
        self._shared: dict[int, HeldTensor] = {}  # by position: tensors that other requests may use, too
        self._bytes = 0
        self._queue_s = self._compute_s = 0.0
        self._forward: KeptForward | None = None
        self._started: tuple[Task, asyncio.TimerHandle] | None = None
        limit_s = handler.config.request_timeout_s
        if header is not None and header.time_left_s is not None:
            limit_s = min(limit_s, header.time_left_s)
        self._deadline = now + limit_s
        self._reservation = handler.inflight.reserve(peer, 0, "request")

    @property
    def deadline(self) -> float:
        """See Admission."""
        return self._deadline

    def admit(self, index: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        """Check a tensor's declaration against the schema and the limits, before any memory is taken for it."""
        if index >= len(self._sent):
            raise SchemaError(f"{self._method}: expected {self._expected()}, got more")
        return self._admit(self._sent[index], shape, dtype, codec)

    def admit_held(self) -> None:
        """The same for all tensors that are not sent.

        :raises TensorNotHeld: one of them is not held
        """
        peer, now = self._peer, time.monotonic()
        for position, key in self._keys.items():
            if position >= len(self._chain.users):
                raise SchemaError(f"held: position {position} is none of the {len(self._chain.users)} inputs")
            path, proto = self._chain.entries[position]
            if len(key) == REQUEST_ID_BYTES:
                held = self._handler.held_inputs.find(peer, _input_key(key, position), now)
            elif len(key) == DIGEST_BYTES and not proto.batched:
                held = self._handler.held_globals.find(peer, key, now)
            else:
                raise SchemaError(f"held: {path}: a key of {len(key)} bytes is none of a tensor {proto}")
            if held is None:
                raise TensorNotHeld(f"{path} is not held here (any more); send it")
            self._admit(position, tuple(held.tensor.shape), DTYPE_NAMES[held.tensor.dtype], Compression.NONE)
            self._shared[position] = held

    def _expected(self) -> str:
        names = ", ".join(self._entries[position].path for position in self._sent[:20])
        return f"{len(self._sent)} tensors ({names})"

    def _admit(self, position: int, shape: tuple[int, ...], dtype: str, codec: Compression) -> int:
        entry = self._entries[position]
        for user in self._chain.users[position] if position < len(self._chain.users) else (entry,):
            problem = user.proto.mismatch(shape, dtype)
            if problem is not None:
                raise SchemaError(f"{user.path}: {problem}")
        self._shapes[position] = shape
        if entry.proto.batched:
            if self._batched is None:
                self._batched = position
            rows = count_rows((self._entries[self._batched], entry), (self._shapes[self._batched], shape))
            if rows > self._max_rows:
                raise SchemaError(
                    f"{entry.path}: {rows} rows, at most {self._max_rows} are taken in one request; split it"
                )
        encoded = max_encoded_bytes(shape, DTYPES[dtype], codec)
        size = encoded if codec == Compression.NONE else encoded + math.prod(shape) * DTYPES[dtype].itemsize
        if self._bytes + size > self._handler.config.max_request_bytes:
            raise SchemaError(
                f"{entry.path}: with it the request exceeds {self._handler.config.max_request_bytes} bytes, the most "
                f"this server takes"
            )
        self._hold(size)
        return encoded

    def _hold(self, size_bytes: int) -> None:
        """Count memory as in flight until ``release``."""
        self._reservation.grow(size_bytes)
        self._bytes += size_bytes

    def release(self) -> None:
        """Give back the bytes held in flight."""
        self._reservation.done_with("request")
        self._handler.closed(self._uids)
        self._uids = ()
        if self._started is not None:
            (task, timer), self._started = self._started, None
            timer.cancel()
            if not task.future.done():
                task.future.cancel()

    def start(self, tensors: Sequence[torch.Tensor], answer: Callable[[Reply | MoEError], None]) -> bool:
        """See Admission: a forward of one expert, of which nothing is held, is answered by the Runtime's thread."""
        header, chain = self._header, self._chain
        if self._method != FORWARD or len(chain) > 1 or header is None or header.held or header.hold or header.keep:
            return False
        if any(entry.proto.compression for entry in chain.output_entries):  # their codecs take time
            return False
        if sum(t.nbytes for t, e in zip(tensors, self._entries) if not e.proto.batched) > _HASH_IN_THREAD_BYTES:
            return False
        self._check_count(tensors)
        (backend,) = self._backends
        try:
            task = backend.make_task(FORWARD, tensors, chain.blocks[0].present)
        except Exception as e:
            raise as_expert_failure(e) from None
        task.deadline, task.peer = self._deadline, self._peer

        waiting = weakref.ref(
            task
        )  # a cycle through its future would hold its tensors until the next garbage collection

        def settle(future: Future[TaskResult]) -> None:
            if future.cancelled():  # withdrawn: nobody waits
                return
            try:
                if (done := waiting()) is not None:
                    self._count_times(done)
                answer(self._outputs(all_of(future.result())))
            except Exception as e:
                answer(as_expert_failure(e))

        late = DeadlineExceeded(_TOO_LATE)
        timer = asyncio.get_running_loop().call_later(self._deadline - time.monotonic(), answer, late)
        self._started = (task, timer)
        task.future.add_done_callback(settle)
        backend.forward_pool.submit(task)  # last of all: see _answer
        return True

    def _check_count(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(self._sent):
            raise SchemaError(f"{self._method}: expected {self._expected()}, got {len(tensors)}")

    def _count_times(self, task: Task) -> None:
        self._queue_s += task.started_at - task.submitted_at
        self._compute_s += task.finished_at - task.started_at

    async def run(self, tensors: Sequence[torch.Tensor]) -> Reply:
        """Wait for the expert's answer, or for those of a chain's blocks, until the caller's deadline."""
        self._check_count(tensors)
        if self._shared:
            by_position = {position: held.tensor for position, held in self._shared.items()}
            by_position.update(zip(self._sent, tensors))
            tensors = [by_position[position] for position in range(len(self._entries))]
        await self._hold_globals(tensors)
        if self._method == FORWARD:
            arrived = self._worth_keeping(tensors)
            outputs = await forward_chain(self._chain, tensors, self._ask)
            self._keep(arrived)
            return self._outputs(outputs)
        trainable = [backend.optimizer is not None for backend in self._backends]
        grads = await backward_chain(self._chain, tensors, self._wants, trainable, self._ask)
        kept = {key for key in self._keys.values() if len(key) == REQUEST_ID_BYTES}
        self._handler.held_inputs.drop(
            self._peer, (_input_key(key, at) for key in kept for at in range(len(self._chain.users)))
        )
        return self._gradients(grads)

    # --- tensors held for later requests -------------------------------------------------------------------------------

    async def _hold_globals(self, tensors: Sequence[torch.Tensor]) -> None:
        """Hold those global tensors that have been sent which the client will refer to by their contents."""
        if self._header is None or not self._header.hold or self._handler.config.held_max_bytes == 0:
            return
        entries = self._chain.entries
        new = {
            position: tensors[position]
            for position in self._header.hold
            if position < len(entries)
            and position not in self._keys
            and not entries[position].proto.batched
            and tensors[position].nbytes >= MIN_HELD_BYTES
        }
        if not new:
            return
        digests = await _maybe_in_thread(sum(t.nbytes for t in new.values()), _digests, list(new.values()))
        for (position, tensor), found in zip(new.items(), digests):
            held = self._shared[position] = HeldTensor(tensor, tensor._version, found)
            self._handler.held_globals.hold(self._peer, found, held, time.monotonic())
        self._handler.expire_later()

    @property
    def _keeps(self) -> bool:
        """The client has asked to keep what it sends for the backward that follows."""
        header = self._header
        return header is not None and header.keep and header.request_id is not None

    def _take_forward(self) -> KeptForward | None:
        """The forward whose inputs this backward refers to, if its activations are kept."""
        for key in self._keys.values():
            if len(key) == REQUEST_ID_BYTES:
                found = self._handler.held_forwards.find(self._peer, key, time.monotonic())
                self._handler.held_forwards.drop(self._peer, [key])
                return found
        return None

    def _worth_keeping(self, tensors: Sequence[torch.Tensor]) -> dict[int, HeldTensor]:
        """Inputs of a forward as they have arrived, by position, if the client will refer to them in its backward."""
        if not self._keeps:
            return {}
        return {
            position: HeldTensor(tensors[position], tensors[position]._version)
            for position in self._sent
            if tensors[position].nbytes >= MIN_HELD_BYTES
        }

    def _keep(self, inputs: Mapping[int, HeldTensor]) -> None:
        for position, held in inputs.items():
            assert self._header is not None and self._header.request_id is not None
            key = _input_key(self._header.request_id, position)
            self._handler.held_inputs.hold(self._peer, key, held, time.monotonic())
        if self._forward is not None and self._header is not None and self._header.request_id is not None:
            self._handler.held_forwards.hold(self._peer, self._header.request_id, self._forward, time.monotonic())
        if inputs:
            self._handler.expire_later()

    async def _ask(
        self, index: int, method: str, tensors: list[torch.Tensor], wants: tuple[bool, ...] | None
    ) -> TaskResult:
        """One block's answer."""
        backend = self._backends[index]
        try:
            task = await self._make_task(index, method, tensors, wants)
            key = self._once_key(index, method)
            first = self._handler.once.find(key, time.monotonic()) if key is not None else None
            result = await self._answer(index, first or task, key, submit=first is None)
        except Exception as e:
            error = e if isinstance(e, MoEError) else as_expert_failure(e)
            if len(self._backends) > 1:
                raise type(error)(f"{backend.name}: {error.message}", uid=backend.name) from None
            raise error from None
        self._count_times(task)
        self._forward, task.kept = task.kept, None
        if method != self._method:  # what a chain's backward keeps: inputs of its blocks
            result = own_memory(result)
            self._hold(sum(tensor.nbytes for tensor in result if tensor is not None))
        return result

    async def _make_task(
        self, index: int, method: str, tensors: list[torch.Tensor], wants: tuple[bool, ...] | None
    ) -> Task:
        backend, block = self._backends[index], self._chain.blocks[index]
        shared = {id(held.tensor): held for held in self._shared.values()}
        digests = {number: held.digest for number, held in shared.items() if held.digest is not None}
        unknown = (t.nbytes for t, e in zip(tensors, block.entries) if not e.proto.batched and id(t) not in digests)
        arguments = (method, tensors, block.present, wants, digests)
        task = await _maybe_in_thread(sum(unknown), backend.make_task, *arguments)
        if shared:
            task.shared = tuple(shared[id(tensor)] for tensor in tensors if id(tensor) in shared)
        task.deadline, task.peer = self._deadline, self._peer
        if len(self._chain) == 1:
            if method == FORWARD:
                task.keep = self._keeps
            else:
                task.kept = self._take_forward()
        return task

    def _once_key(self, index: int, method: str) -> Hashable:
        """What a repeat is known by; None if it is done again: a forward, or a request of a stock peer."""
        if method == FORWARD or self._header is None:
            return None
        request_id = self._header.request_id if self._header.chain is None else self._header.chain[index].request_id
        return None if request_id is None else (self._peer, self._backends[index].name, request_id)

    def _remember(self, key: Hashable, task: Task) -> None:
        """Let repeats of this request have this task's answer."""
        once = self._handler.once
        once.begin(key, task)
        loop = asyncio.get_running_loop()
        waiting = weakref.ref(task)  # a cycle through its future would hold the answer long after it is dropped

        def settle(future: Future[TaskResult]) -> None:
            if future.cancelled() or future.exception() is not None:
                once.abandon(key)
            else:
                answer = future.result()
                answer[:] = own_memory(answer)
                size_bytes = sum(grad.nbytes for grad in answer if grad is not None)
                once.finish(key, size_bytes, time.monotonic())
                if (done := waiting()) is not None:
                    done.tensors = []  # only the answer is kept

        def settle_in_loop(future: Future[TaskResult]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops
                loop.call_soon_threadsafe(settle, future)

        task.future.add_done_callback(settle_in_loop)

    async def _answer(self, index: int, task: Task, key: Hashable, *, submit: bool) -> TaskResult:
        """The task's result. By hand and not with ``wrap_future`` and ``wait_for``, which cost 40 us a call together.

        :param key: what repeats of the request are known by
        :param submit: to its pool, last of all: it wakes the Runtime's thread, which begins when this one has nothing to do
        """
        loop, future = asyncio.get_running_loop(), task.future
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
            if submit:
                backend = self._backends[index]
                (backend.forward_pool if task.operation == FORWARD else backend.backward_pool).submit(task)
                if key is not None:
                    self._remember(key, task)
            await settled
            if not future.done():
                raise DeadlineExceeded(_TOO_LATE)
            return future.result()
        finally:
            timer.cancel()
            if task.operation == FORWARD:  # a repeat of a backward may be waiting for the same task
                future.cancel()

    def _outputs(self, outputs: Sequence[torch.Tensor]) -> Reply:
        header = ReplyHeader(queue_s=self._queue_s, compute_s=self._compute_s)
        return Reply(header, outputs, [entry.proto.compression for entry in self._chain.output_entries])

    def _gradients(self, grads: TaskResult) -> Reply:
        protos = [entry.proto for entry in self._chain.entries]
        if self._header is None:  # a stock client expects a gradient for every input, integer ones included
            every = [
                torch.zeros(self._shapes[position], dtype=proto.dtype) if grad is None else grad
                for position, (grad, proto) in enumerate(zip(grads, protos))
            ]
            return Reply(None, every, [proto.compression for proto in protos])
        has_grad = tuple(grad is not None for grad in grads)
        kept = [(grad, proto.compression) for grad, proto in zip(grads, protos) if grad is not None]
        header = ReplyHeader(has_grad=has_grad, queue_s=self._queue_s, compute_s=self._compute_s)
        return Reply(header, [grad for grad, _ in kept], [codec for _, codec in kept])


def _input_key(request_id: bytes, position: int) -> bytes:
    """Of one input of a forward."""
    return request_id + position.to_bytes(2, "big")


def _digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    return [digest(tensor) for tensor in tensors]


async def _maybe_in_thread(hashed_bytes: int, func: Callable[..., T], *args: Any) -> T:
    """Digests of much are not computed in the event loop."""
    if hashed_bytes <= _HASH_IN_THREAD_BYTES:
        return func(*args)
    return await asyncio.get_running_loop().run_in_executor(None, func, *args)


def own_memory(tensors: Sequence[torch.Tensor | None]) -> TaskResult:
    """Copies of those that are rows of a batch and would keep the whole batch in memory; the others as they are."""
    return [t.clone() if t is not None and t.untyped_storage().nbytes() > t.nbytes else t for t in tensors]
