"""ConnectionHandler: decode -> validate -> submit -> encode. Owns: what a request must satisfy before it may wait in a pool.

An ``ExpertService`` (moe.transport.base) for any transport; runs in the server's event loop, and leaves every computation to
the pools. Must not know: how bytes travel, how batches form. (In hivemind it was a process, and there were eight per expert.)
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import logging
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
    Overloaded,
    Refused,
    SchemaError,
    TensorNotHeld,
)
from moe.expert_uid import split_chain
from moe.schema import DIGEST_BYTES, DTYPE_NAMES, DTYPES, Compression, Entry, TensorProto, count_rows, digest
from moe.server.authorization import Authorization, Authorizer
from moe.server.chains import all_of, backward_chain, forward_chain, returned_bytes
from moe.server.execution import as_expert_failure
from moe.server.expert_backend import ExpertBackend
from moe.server.held_tensors import HeldTensor, HeldTensors
from moe.server.kept_forwards import KeptForward
from moe.server.once import OnceWindow
from moe.server.task_pool import Task, TaskPool, TaskResult
from moe.transport.base import BACKWARD, FORWARD, INFO, TICKET, Reply
from moe.transport.inflight import InflightBytes, Reservation
from moe.wire.messages import (
    HELD_TENSORS,
    MIN_HELD_BYTES,
    REQUEST_ID_BYTES,
    ExpertDescription,
    ReplyHeader,
    RequestHeader,
)
from moe.wire.tensors import max_encoded_bytes

logger = logging.getLogger(__name__)

T = TypeVar("T")

_TOO_LATE = "the caller's time was over before the expert was done"
_IN_THREAD_BYTES = 2**20  # more than this is not digested or copied in the event loop; ours, about 1 ms
_COPY_BYTES = 2**18  # rows of a batch up to this are copied, so that they do not keep the batch; ours, about 25 us
_MAX_FEATURES_KEPT = 16
_REPEAT_WITHIN_S = 1.0  # a backward that nobody waits for any more waits so long for a repeat of it; ours
_KEPT_FORWARD_BYTES = 2**16  # of a graph besides its tensors; ours

# What a request takes besides its tensors' values: measured, 2 KB for itself, 3 for its task, 3 for what waits for it; in a
# chain of 256 blocks, 230 bytes for each; 600 for a tensor without values.
_REQUEST_BYTES, _BLOCK_BYTES, _TENSOR_BYTES = 8192, 512, 1024


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
        self.tasks: set[asyncio.Task[None]] = set()  # that end by themselves
        self._opened: Counter[str] = Counter()  # requests by uid, so far and now
        self._open: Counter[str] = Counter()
        self.once: OnceWindow[_Backward] = OnceWindow(
            self.config.once_max_replies, self.config.once_max_bytes, self.config.once_window_s
        )
        limits = self.config.held_max_bytes, self.config.held_max_bytes_per_peer, self.config.held_window_s
        self.held_globals: HeldTensors[HeldTensor] = HeldTensors(*limits)
        self.held_inputs: HeldTensors[HeldTensor] = HeldTensors(*limits)
        self.held_forwards: HeldTensors[KeptForward] = HeldTensors(
            self.config.held_max_bytes,
            self.config.held_max_bytes // 2,
            self.config.held_window_s,
            entry_bytes=_KEPT_FORWARD_BYTES,
        )
        self._expiry: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"ConnectionHandler({len(self.backends)} experts, {self.inflight.bytes} bytes in flight)"

    @property
    def _stores(self) -> tuple[HeldTensors[Any], ...]:
        return self.held_globals, self.held_inputs, self.held_forwards

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
        if header is not None and (header.metadata or len(header.features) > _MAX_FEATURES_KEPT):
            header = msgspec.structs.replace(header, metadata={}, features=())  # not needed any more, and maybe large
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

    @property
    def held_bytes(self) -> int:
        """Of tensors kept for later requests."""
        return sum(store.bytes for store in self._stores)

    def closed(self, uids: Iterable[str]) -> None:
        """A request for these experts has ended."""
        for uid in uids:
            self._open[uid] -= 1

    def expire_later(self) -> None:
        """Drop held tensors when nobody has used them for long, also if no request comes any more."""
        if self._expiry is not None:
            return
        now = time.monotonic()
        due = [at for store in self._stores if (at := store.expire(now)) is not None]
        if due:
            self._expiry = asyncio.get_running_loop().call_later(min(due) - now, self._expire)

    def _expire(self) -> None:
        self._expiry = None
        self.expire_later()

    def check_idle(self) -> None:
        """Assert that no request is open, and that what is counted is what is there. For tests: in the event loop, a moment
        after the last answer was sent."""
        assert not +self._open, f"open requests: {dict(+self._open)}"
        self.inflight.check()
        assert self.inflight.bytes == 0, f"{self.inflight} although no request is open"
        for backend in self.backends.values():
            for pool in backend.get_pools():
                pool.check()
                assert pool.empty, f"{pool} although no request is open"
        self.once.check()
        for store in self._stores:
            store.check()

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


class _Backward:
    """A backward of one expert that repeats may join, or have the answer of.

    :ivar task: None when it has ended
    :ivar answer: what a repeat is given then
    :ivar shape: something that a repeat must have in common
    :ivar callers: who wait for it
    """

    __slots__ = ("answer", "callers", "shape", "task")

    def __init__(self, task: Task):
        self.task: Task | None = task
        self.answer: TaskResult = []
        self.shape = _shape_of(task)
        self.callers = 0

    def withdraw(self) -> None:
        """If nobody waits for it (any more), and it has not begun, it need not be done."""
        if not self.callers and self.task is not None:
            self.task.future.cancel()


class RequestAdmission:
    """One request between its header and its answer. See ``Admission`` in moe.transport.base.

    All the memory that it takes is counted by its reservation: "request" is the reason until it is released, its tasks are
    reasons until they are gone.

    :param backends: the blocks it asks for; a single one, or those of a chain
    :raises SchemaError: a header that makes no sense
    :raises Overloaded: no room for one more
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
        self._names = self._uids = tuple(backend.name for backend in backends)
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
        self._bytes = self._needed = 0  # of the tensors admitted; and of what is kept between blocks
        self._ahead = self._ahead_of_reply = 0  # reserved for what is not there yet: returned by blocks, gradients
        self._decoding = 0  # reserved for the time in which tensors are decoded
        self._between = 0  # bytes between the last two blocks of a chain
        self._queue_s = self._compute_s = 0.0
        self._forward: KeptForward | None = None
        self._started: tuple[weakref.ref[Task], asyncio.TimerHandle] | None = None
        limit_s = handler.config.request_timeout_s
        if header is not None and header.time_left_s is not None:
            limit_s = min(limit_s, header.time_left_s)
        self._deadline = now + limit_s
        uses = sum(map(len, self._chain.users)) if len(backends) > 1 else 0  # of a tensor, by blocks
        itself = _REQUEST_BYTES + _BLOCK_BYTES * (len(backends) + uses) + _TENSOR_BYTES * len(self._entries)
        self._reservation: Reservation = handler.inflight.reserve(
            peer, itself, "request", must_fit=handler.inflight.bytes > 0
        )

    @property
    def deadline(self) -> float:
        """See Admission."""
        return self._deadline

    @property
    def reservation(self) -> Reservation:
        """See Admission."""
        return self._reservation

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
                held = self._handler.held_inputs.find(peer, self._input_key(key, position), now)
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
        users = self._chain.users[position] if position < len(self._chain.users) else (entry,)
        for user in users:
            problem = user.proto.mismatch(shape, dtype)
            if problem is not None:
                raise SchemaError(f"{user.path}: {problem}")
        if codec != Compression.NONE and all(codec != user.proto.compression for user in users):
            raise SchemaError(f"{entry.path}: compressed as {codec.name}; this expert takes {_codecs(users)}")
        encoded = max_encoded_bytes(shape, DTYPES[dtype], codec)  # refuses what is no shape
        self._shapes[position] = shape
        if entry.proto.batched:
            if self._batched is None:
                self._batched = position
            rows = count_rows((self._entries[self._batched], entry), (self._shapes[self._batched], shape))
            if rows > self._max_rows:
                raise SchemaError(
                    f"{entry.path}: {rows} rows, at most {self._max_rows} are taken in one request; split it"
                )
        values = math.prod(shape)
        decoded = values * DTYPES[dtype].itemsize
        size = encoded if codec == Compression.NONE else encoded + decoded
        limit = self._handler.config.max_request_bytes
        axes = decoded or math.prod(filter(None, shape)) * DTYPES[dtype].itemsize  # nobody shall make rows of these
        if self._bytes + size > limit or axes > limit:
            raise SchemaError(
                f"{entry.path}: with it the request exceeds {limit} bytes, the most this server takes"
                + (f" (without rows it still has axes of {shape})" if not values else "")
            )
        decoding = besides = _decoding_bytes(values, encoded, dtype, codec)
        if position == self._batched:
            returned = returned_bytes(self._chain, self._method, shape[0])
            if self._method == FORWARD:
                besides += returned
            elif returned:
                self._reserve(returned, 0)
            self._ahead += returned
        if self._method == BACKWARD and position < len(self._wants) and self._wants[position]:
            self._ahead_of_reply += decoded
            besides += decoded
        self._reserve(size, besides)
        self._bytes += size
        self._decoding += decoding
        return encoded

    # --- memory ----------------------------------------------------------------------------------------------------------

    def _reserve(self, size_bytes: int, besides: int) -> None:
        """Reserve before memory is taken.

        :param size_bytes: of a tensor, or of what a backward keeps between blocks
        :param besides: what decoding and answering takes. While there is no other request, this need not fit: else an idle
            server might refuse one for ever that is not too large itself
        :raises Overloaded: there is no room for it
        """
        self._needed += size_bytes
        try:
            self._reservation.grow(size_bytes + besides)
        except Overloaded:
            config = self._handler.config
            alone = self._reservation.is_all
            if not alone or self._needed > config.max_inflight_bytes or besides > 4 * config.max_request_bytes:
                raise
            self._reservation.grow(size_bytes + besides, must_fit=False)

    def _count(self, size_bytes: int, *, between: bool = False) -> None:
        """Memory that is taken now, for some or all of which there is a reservation already.

        :param between: it is what a backward keeps between blocks, and not part of a reply; of that there is only what fits
        :raises Overloaded: it does not
        """
        expected = min(size_bytes, self._ahead)
        self._ahead -= expected
        if not between:
            of_reply = min(size_bytes - expected, self._ahead_of_reply)
            self._ahead_of_reply -= of_reply
            expected += of_reply
        # a module may return any length: an answer that nobody could foresee may have to be dropped
        if size_bytes > expected:
            alone = self._reservation.is_all
            must_fit = between or (self._method == FORWARD and not alone)
            self._reservation.grow(size_bytes - expected, must_fit=must_fit)

    def _decoded(self) -> None:
        """Nothing has to be decoded any more."""
        if self._decoding:
            self._reservation.shrink(self._decoding)
            self._decoding = 0

    def release(self) -> None:
        """See Admission. What is given back at once is all but that which tasks need that cannot be withdrawn."""
        self._reservation.done_with("request")
        self._handler.closed(self._uids)
        self._uids, self._shared, self._forward = (), {}, None
        if self._started is not None:
            (started, timer), self._started = self._started, None
            timer.cancel()
            if (task := started()) is not None:
                task.future.cancel()

    # --- started ---------------------------------------------------------------------------------------------------------

    def start(self, tensors: Sequence[torch.Tensor], answer: Callable[[Reply | MoEError], None]) -> bool:
        """See Admission: a forward of one expert, of which nothing is held, is answered by the Runtime's thread."""
        header, chain = self._header, self._chain
        if self._method != FORWARD or len(chain) > 1 or header is None or header.held or header.hold or header.keep:
            return False
        if any(entry.proto.compression for entry in chain.output_entries):  # their codecs take time
            return False
        if sum(t.nbytes for t, e in zip(tensors, self._entries) if not e.proto.batched) > _IN_THREAD_BYTES:
            return False
        self._check_count(tensors)
        self._decoded()
        (backend,) = self._backends
        try:
            task = backend.make_task(FORWARD, tensors, chain.blocks[0].present)
        except Exception as e:
            raise as_expert_failure(e) from None
        task.deadline, task.peer = self._deadline, self._peer
        number, waiting = task.number, [task]  # a cycle through its future would keep its tensors for long

        def settle(future: Future[TaskResult]) -> None:
            try:
                ended = waiting.pop()
                if not future.cancelled():  # else it was withdrawn: nobody waits
                    answer(self._answer_of(ended, future))
            except BaseException as e:  # whatever it is: the caller is answered, and the Runtime goes on
                with contextlib.suppress(BaseException):
                    answer(as_expert_failure(e))
            finally:
                self._reservation.done_with(number)

        late = DeadlineExceeded(_TOO_LATE)
        timer = asyncio.get_running_loop().call_later(self._deadline - time.monotonic(), answer, late)
        self._started = (
            weakref.ref(task),
            timer,
        )  # its result is not to stay until the answer has left, if that is another
        self._reservation.keep_for(number)
        task.future.add_done_callback(settle)
        try:
            backend.forward_pool.submit(task)  # last of all: see _wait
        except BaseException:
            timer.cancel()
            task.future.cancel()
            raise
        return True

    def _answer_of(self, task: Task, future: Future[TaskResult]) -> Reply:
        self._count_times(task)
        outputs, taken = own_rows(future.result())
        self._count(taken)
        return self._outputs(all_of(outputs))

    def _check_count(self, tensors: Sequence[torch.Tensor]) -> None:
        if len(tensors) != len(self._sent):
            raise SchemaError(f"{self._method}: expected {self._expected()}, got {len(tensors)}")

    def _count_times(self, task: Task) -> None:
        self._queue_s += task.started_at - task.submitted_at
        self._compute_s += task.finished_at - task.started_at

    # --- run -------------------------------------------------------------------------------------------------------------

    async def run(self, tensors: Sequence[torch.Tensor]) -> Reply:
        """Wait for the expert's answer, or for those of a chain's blocks, until the caller's deadline.

        :raises MoEError: there is none; whatever goes wrong
        """
        try:
            return await self._run(tensors)
        except Exception as e:
            raise (e if isinstance(e, MoEError) else as_expert_failure(e)) from None

    async def _run(self, tensors: Sequence[torch.Tensor]) -> Reply:
        self._check_count(tensors)
        self._decoded()
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
            self._peer, (self._input_key(key, at) for key in kept for at in range(len(self._chain.users)))
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
        digests = await self._maybe_in_thread(sum(t.nbytes for t in new.values()), _digests, list(new.values()))
        for (position, tensor), found in zip(new.items(), digests):
            held = self._shared[position] = HeldTensor(tensor, tensor._version, found)
            self._handler.held_globals.hold(self._peer, found, held, time.monotonic())
        self._handler.expire_later()

    @property
    def _keeps(self) -> bool:
        """The client has asked to keep what it sends for the backward that follows."""
        header = self._header
        return header is not None and header.keep and header.request_id is not None

    def _input_key(self, request_id: bytes, position: int) -> Hashable:
        """Of one input of a forward of these experts. Not its position, which depends on the optional kwargs before it."""
        return request_id, self._names, self._chain.entries[position].path

    def _forward_key(self, request_id: bytes) -> Hashable:
        """Of a forward of these experts, with these optional kwargs."""
        return request_id, self._names, tuple(block.present for block in self._chain.blocks)

    def _take_forward(self) -> KeptForward | None:
        """The forward whose inputs this backward refers to, if its activations are kept."""
        for key in self._keys.values():
            if len(key) == REQUEST_ID_BYTES:
                name = self._forward_key(key)
                found = self._handler.held_forwards.find(self._peer, name, time.monotonic())
                self._handler.held_forwards.drop(self._peer, [name])
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
        if not inputs:
            return
        assert self._header is not None and self._header.request_id is not None
        request_id, now = self._header.request_id, time.monotonic()
        for position, held in inputs.items():
            self._handler.held_inputs.hold(self._peer, self._input_key(request_id, position), held, now)
        if self._forward is not None:
            self._handler.held_forwards.hold(self._peer, self._forward_key(request_id), self._forward, now)
            self._forward = None  # nobody but the store keeps it, which bounds them
        self._handler.expire_later()

    # --- blocks and their tasks ----------------------------------------------------------------------------------------

    async def _ask(
        self, index: int, method: str, tensors: list[torch.Tensor], wants: tuple[bool, ...] | None
    ) -> TaskResult:
        """One block's answer."""
        backend = self._backends[index]
        try:
            task = await self._make_task(index, method, tensors, wants)
            result = await self._result_of(index, task)
            return await self._count_result(index, method, result)
        except Exception as e:
            error = e if isinstance(e, MoEError) else as_expert_failure(e)
            if len(self._backends) > 1:
                raise type(error)(f"{backend.name}: {error.message}", uid=backend.name) from None
            raise error from None

    async def _make_task(
        self, index: int, method: str, tensors: list[torch.Tensor], wants: tuple[bool, ...] | None
    ) -> Task:
        backend, block = self._backends[index], self._chain.blocks[index]
        shared = {id(held.tensor): held for held in self._shared.values()}
        digests = {number: held.digest for number, held in shared.items() if held.digest is not None}
        unknown = (t.nbytes for t, e in zip(tensors, block.entries) if not e.proto.batched and id(t) not in digests)
        arguments = (method, tensors, block.present, wants, digests)
        task = await self._maybe_in_thread(sum(unknown), backend.make_task, *arguments)
        if shared:
            task.shared = tuple(shared[id(tensor)] for tensor in tensors if id(tensor) in shared)
        task.deadline, task.peer = self._deadline, self._peer
        if len(self._chain) == 1:
            if method == FORWARD:
                task.keep = bool(self._worth_keeping(tensors))
            else:
                task.kept = self._take_forward()
        return task

    async def _count_result(self, index: int, method: str, result: TaskResult) -> TaskResult:
        """The answer of a block, whose memory is counted from now on."""
        if method == self._method and method == FORWARD:
            owned, taken = own_rows(result)
            self._count(taken)
            self._ahead += self._between  # nobody needs any more what the block before has returned
            self._between = taken
        elif method == FORWARD:  # of a chain's backward, which keeps it: inputs of a block
            self._count(sum(t.nbytes for t in result if t is not None), between=True)
            owned = await self._maybe_in_thread(_rows_bytes(result), own_memory, result)
        else:
            owned, taken = own_rows(result)
            self._count(taken)
            self._ahead += self._between
            args = len(self._chain.blocks[index].schema.arg_entries)
            self._between = sum(t.nbytes for t in owned[:args] if t is not None)  # the rest are parts of the reply
        return owned

    # --- exactly once ----------------------------------------------------------------------------------------------------

    def _once_key(self, index: int, task: Task) -> Hashable:
        """What a repeat is known by; None if it is done again: a forward, or a request of a stock peer, or without rows."""
        if task.operation == FORWARD or self._header is None or task.rows == 0:
            return None
        request_id = self._header.request_id if self._header.chain is None else self._header.chain[index].request_id
        return None if request_id is None else (self._backends[index].name, request_id)

    async def _result_of(self, index: int, task: Task) -> TaskResult:
        """The task's result; of a repeat, that of the first one."""
        key = self._once_key(index, task)
        if key is None:
            return await self._submit(index, task)
        tried: _Backward | None = None
        while True:
            first = self._handler.once.find(self._peer, key, time.monotonic())
            if first is None:
                return await self._submit(index, task, key)
            if first.shape != _shape_of(task):
                raise Refused("another request with this id was trained, or is about to be")
            if first.task is None:
                return list(first.answer)
            try:
                return await self._wait(first.task, first)
            except (DeadlineExceeded, Overloaded, concurrent.futures.CancelledError):
                # it was not trained, since its own caller has left, or had less time
                if first is tried or time.monotonic() >= self._deadline:
                    raise
                tried = first

    async def _submit(self, index: int, task: Task, key: Hashable = None) -> TaskResult:
        """Let a task wait in its pool."""
        backend, reservation, number = self._backends[index], self._reservation, task.number
        pool = backend.forward_pool if task.operation == FORWARD else backend.backward_pool
        if not reservation.keep_for(number):
            raise DeadlineExceeded("the request was withdrawn")
        first = None if key is None else self._remember(key, task)
        if first is None:
            task.future.add_done_callback(lambda _: reservation.done_with(number))
        return await self._wait(task, first, pool)

    def _remember(self, key: Hashable, task: Task) -> _Backward:
        """Let repeats of this request have this task's answer."""
        once, peer, reservation, number = self._handler.once, self._peer, self._reservation, task.number
        loop = asyncio.get_running_loop()
        first = _Backward(task)
        once.begin(peer, key, first)

        def end(answer: TaskResult | None, trained: bool) -> None:
            first.task = None  # and its tensors with it: only the answer is kept
            if answer is not None:
                first.answer = answer
            if not trained:
                once.abandon(peer, key)
            else:
                size_bytes = None if answer is None else sum(grad.nbytes for grad in answer if grad is not None)
                once.finish(peer, key, size_bytes, time.monotonic())
            reservation.done_with(number)

        async def copy_and_end(answer: TaskResult) -> None:
            try:
                own = await loop.run_in_executor(None, own_memory, answer)
            except Exception:  # no memory for it
                logger.exception("the answer of a backward cannot be kept")
                end(None, True)
            else:
                end(own, True)

        def settle(future: Future[TaskResult]) -> None:
            if future.cancelled() or future.exception() is not None:
                assert first.task is not None
                end(None, first.task.may_have_trained)
            elif _rows_bytes(answer := future.result()) <= _IN_THREAD_BYTES:
                end(own_memory(answer), True)
            else:
                copying = loop.create_task(copy_and_end(answer))
                self._handler.tasks.add(copying)
                copying.add_done_callback(self._handler.tasks.discard)

        def settle_in_loop(future: Future[TaskResult]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server stops
                loop.call_soon_threadsafe(settle, future)

        task.future.add_done_callback(settle_in_loop)
        return first

    async def _wait(self, task: Task, first: _Backward | None, pool: TaskPool | None = None) -> TaskResult:
        """The task's result. By hand and not with ``wrap_future`` and ``wait_for``, which cost 40 us a call together.

        :param first: what is known of it, if repeats may wait for the same task
        :param pool: to submit it to, last of all: that wakes the Runtime's thread, which begins when this one has nothing to do
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
        if first is not None:
            first.callers += 1
        submitted = False
        try:
            if pool is not None:
                pool.submit(task)
            submitted = True
            await settled
            if not future.done():
                raise DeadlineExceeded(_TOO_LATE)
            result = future.result()
            self._count_times(task)
            self._forward, task.kept = task.kept, None
            return list(result)
        finally:
            timer.cancel()
            if first is not None:
                first.callers -= 1
            if first is None or not submitted:
                future.cancel()  # all who know of it are told
            elif not first.callers and not future.done():
                loop.call_later(_REPEAT_WITHIN_S, first.withdraw)

    async def _maybe_in_thread(self, size_bytes: int, func: Callable[..., T], *args: Any) -> T:
        """What takes long is not done in the event loop. It is done to its end, and what it needs is counted until then."""
        if size_bytes <= _IN_THREAD_BYTES:
            return func(*args)
        reservation, reason = self._reservation, object()
        if not reservation.keep_for(reason):
            raise DeadlineExceeded("the request was withdrawn")
        doing = asyncio.get_running_loop().run_in_executor(None, func, *args)
        doing.add_done_callback(lambda _: reservation.done_with(reason))
        return await asyncio.shield(doing)

    # --- replies -----------------------------------------------------------------------------------------------------------

    def _outputs(self, outputs: Sequence[torch.Tensor]) -> Reply:
        header = ReplyHeader(queue_s=self._queue_s, compute_s=self._compute_s)
        return self._reply(
            header, [(tensor, entry.proto) for tensor, entry in zip(outputs, self._chain.output_entries)]
        )

    def _gradients(self, grads: TaskResult) -> Reply:
        pairs = [(grad, entry.proto) for grad, entry in zip(grads, self._chain.entries)]
        if self._header is None:  # a stock client expects a gradient for every input, integer ones included
            every = [
                (torch.zeros(self._shapes[position], dtype=proto.dtype) if grad is None else grad, proto)
                for position, (grad, proto) in enumerate(pairs)
            ]
            self._count(sum(zeros.nbytes for (grad, _), (zeros, _) in zip(pairs, every) if grad is None))
            return self._reply(None, every)
        has_grad = tuple(grad is not None for grad in grads)
        header = ReplyHeader(has_grad=has_grad, queue_s=self._queue_s, compute_s=self._compute_s)
        return self._reply(header, [(grad, proto) for grad, proto in pairs if grad is not None])

    def _reply(self, header: ReplyHeader | None, tensors: Sequence[tuple[torch.Tensor, TensorProto]]) -> Reply:
        """An answer; what it is encoded to is counted."""
        lossy = [(t, proto.compression) for t, proto in tensors if proto.compression != Compression.NONE]
        if lossy:
            self._count(sum(max_encoded_bytes(t.shape, t.dtype, codec) for t, codec in lossy))
        return Reply(header, [t for t, _ in tensors], [proto.compression for _, proto in tensors])


def _digests(tensors: Sequence[torch.Tensor]) -> list[bytes]:
    return [digest(tensor) for tensor in tensors]


def _codecs(users: Sequence[Entry]) -> str:
    names = dict.fromkeys((Compression.NONE.name, *(user.proto.compression.name for user in users)))
    return " or ".join(names)


def _decoding_bytes(values: int, encoded_bytes: int, dtype: str, codec: Compression) -> int:
    """What decoding a tensor takes for a moment, besides what it is decoded from and to."""
    if codec == Compression.NONE:
        return values if dtype == "bool" else 0
    if codec in (Compression.FLOAT16, Compression.MEANSTD_16BIT):
        return encoded_bytes
    return encoded_bytes + 12 * values  # a table is looked up: an int64 and a float32 for each value


def _shape_of(task: Task) -> int:
    """Equal for repeats of one request."""
    return hash((task.present, tuple((tensor.dtype, tensor.shape) for tensor in task.tensors)))


def _is_part(tensor: torch.Tensor) -> bool:
    """Rows of a batch: it keeps more than itself in memory."""
    return tensor.untyped_storage().nbytes() > tensor.nbytes


def _rows_bytes(tensors: Sequence[torch.Tensor | None]) -> int:
    """Of those that ``own_memory`` copies."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None and _is_part(tensor))


def own_memory(tensors: Sequence[torch.Tensor | None]) -> TaskResult:
    """Copies of those that are rows of a batch and would keep the whole batch in memory; the others as they are."""
    return [t.clone() if t is not None and _is_part(t) else t for t in tensors]


def own_rows(tensors: Sequence[torch.Tensor | None]) -> tuple[TaskResult, int]:
    """The same for an answer that is sent at once: large rows are not copied.

    :returns: the tensors, and the memory that they keep
    """
    owned: TaskResult = []
    taken = 0
    for tensor in tensors:
        if tensor is not None:
            size_bytes, keeps = tensor.nbytes, tensor.untyped_storage().nbytes()
            if keeps > size_bytes and size_bytes <= _COPY_BYTES:
                tensor, keeps = tensor.clone(), size_bytes
            taken += max(size_bytes, keeps)
        owned.append(tensor)
    return owned, taken
