"""ExpertBackend: a torch module, its schemas and its optimizer. Owns: forward, backward with recompute, the step.

Runs in the Runtime thread, one batch at a time, under ``step_lock``; ``state_dict`` takes the same lock, so a snapshot is
never torn. Must not know: who called, how the call came, or when a batch is due.

Within a batch, tasks form *lanes*: tasks of one lane share their global tensors (by content) and are concatenated; lanes
differ in them. Several lanes run in one launch with ``torch.func.vmap`` over the stacked globals where the module allows it,
one after another where it does not. Gradients of globals belong to one caller, so there a lane is a single task.

Ideas: hivemind's ``ModuleBackend`` (1.1.12) and tesseract's ``ExpertBackend``; per-sample gradients as in torch.func.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from moe.chains import Chain
from moe.errors import ConfigError, ExpertFailed, NonFiniteError, SchemaError, TensorNotHeld
from moe.expert_uid import UID_PATTERN, is_valid_uid
from moe.schema import (
    DUMMY_BATCH_SIZE,
    Entry,
    ExpertSchema,
    Nested,
    concatenate,
    digest,
    gradient_entries,
    signature,
    split,
    validate,
)
from moe.server.dry_run import EmptyOutputs, infer_outputs, no_trace, zeros_for
from moe.server.escapes import Escapes, is_told_by, is_wrapper, mend_all
from moe.server.execution import Outcome, as_expert_failure, is_device_lost, is_out_of_memory, run_isolated, text_of
from moe.server.gradients import add, usable
from moe.server.kept_forwards import KeptForward, NotKept, Thrift
from moe.server.matmul import speed_up_linear
from moe.server.module_state import Attributes, has_graph, places_of
from moe.server.optim import fuse, load_state, move_state, portable_state
from moe.server.ownership import SMALL_BYTES, held_elsewhere, lend, lends_for_nothing, own, plain
from moe.server.task_pool import DeviceLost, Task, TaskPool, TaskResult
from moe.server.transfer import to_cpu
from moe.wire.messages import FEATURES, PROTOCOL_MAJOR, ExpertDescription

logger = logging.getLogger(__name__)

MAX_PADDING = 2.0  # lanes of unequal row counts are stacked if that at most doubles the rows; decision 0007
WATCHED_RUNS = 8  # of the same shapes are watched for tensors that escape from them; ours
MAX_CHAINS = 1024  # kept, one for each subset of the optional kwargs that callers give; ours
_lane_numbers = itertools.count()
_NOTHING = contextlib.nullcontext()


class ExpertBackend:
    """A module that serves forward and backward requests, and trains if it has an optimizer.

    :param name: the expert's uid; to be hosted by a Server, it must be a valid one
    :param module: any torch module that treats the rows of a batch independently of each other. Its linear layers may get
        another kernel (moe.server.matmul)
    :param optimizer: steps after every backward batch; None: the expert never changes. Adam gets torch's fused kernel
    :param scheduler: learning-rate scheduler, stepped after the optimizer
    :param args_schema: protos of the positional arguments, nested structures allowed
    :param kwargs_schema: protos of the keyword arguments by name
    :param outputs_schema: protos of what the module returns; None: found by a dry run that leaves no trace
    :param optional_kwargs: kwargs that callers may leave out; absent ones are not passed to the module at all
    :param accumulate_steps: backward batches per optimizer step (their gradients are summed)
    :param detect_anomalies: never return or step on non-finite values: callers get NonFiniteError
    :param train_on_non_finite: train with parameter gradients that are not finite (or have a norm beyond 1e16), too. By
        default a call that has such gradients is answered, and trains nothing; others in its batch do
    :param min_batch_size: rows a batch waits for, ``timeout`` seconds at most
    :param max_batch_size: rows in one batch
    :param timeout: see min_batch_size
    :param pool_size: requests of one kind that may wait; more are refused as Overloaded
    :param prefetch_batches: hivemind's; with ``daemon`` and ``start`` it has no effect: see TaskPool
    :raises SchemaError: wrong schema, or the module does not do what it says
    :raises ConfigError: settings that contradict each other
    """

    def __init__(
        self,
        name: str,
        module: nn.Module,
        optimizer: Any | None = None,
        *,
        scheduler: Any | None = None,
        args_schema: Sequence[Nested] | None = None,
        kwargs_schema: Mapping[str, Nested] | None = None,
        outputs_schema: Nested = None,
        optional_kwargs: Sequence[str] = (),
        accumulate_steps: int = 1,
        detect_anomalies: bool = False,
        train_on_non_finite: bool = False,
        min_batch_size: int = 1,
        max_batch_size: int = 4096,
        timeout: float | None = None,
        pool_size: int | None = None,
        prefetch_batches: int = 1,
        daemon: bool = True,
        start: bool = False,
    ):
        if not isinstance(name, str) or not (
            is_valid_uid(name) or is_valid_uid(f"{name}.0")
        ):  # the beginning of one, too
            raise ConfigError(f"{name!r:.100} is not a valid expert uid; uids follow {UID_PATTERN.pattern}")
        if optimizer is None and scheduler is not None:
            raise ConfigError(f"{name}: a scheduler needs an optimizer")
        if accumulate_steps < 1:
            raise ConfigError(f"{name}: accumulate_steps is at least 1, got {accumulate_steps}")
        self.name, self.module, self.optimizer, self.scheduler = name, module, optimizer, scheduler
        self.accumulate_steps, self.detect_anomalies = accumulate_steps, detect_anomalies
        self.train_on_non_finite = train_on_non_finite
        self.step_lock = threading.RLock()
        self.updates = 0  # optimizer steps taken
        self.failed_steps = 0
        self._accumulated = 0  # backward batches since the last step
        self._generation = 0  # goes up with each change to the module that is made here
        self._not_training: set[int] = set()  # tasks of the batch at hand whose gradients are not finite
        self._batch_rows = 0
        self._writes_inputs = False  # as far as it is known
        self._stackable: dict[tuple[str, tuple[str, ...]], bool] = {}
        self._escapes: Escapes | None = None  # of the stacked run at hand
        self._watched: Counter[Any] = Counter()  # stacked runs that were watched, by shapes
        self._chains: dict[tuple[str, ...], Chain] = {}
        self._thrift = Thrift()
        self._overridden = {
            operation
            for operation in ("forward", "backward")
            if getattr(type(self), operation) is not getattr(ExpertBackend, operation)
        }
        speed_up_linear(module)
        if optimizer is not None:
            fuse(optimizer)
        self.schema = ExpertSchema(args_schema or (), kwargs_schema, outputs_schema, optional_kwargs)
        if self.schema.outputs is None:
            outputs = infer_outputs(name, module, self.schema)
            self.schema = ExpertSchema(self.schema.args, self.schema.kwargs, outputs, optional_kwargs)
        self._attributes = _attributes_of(module)
        self._has_buffers = next(iter(module.buffers()), None) is not None
        self._empty = EmptyOutputs(self.schema.output_entries)
        pool = dict(
            max_batch_size=max_batch_size,
            min_batch_size=min_batch_size,
            timeout=timeout,
            pool_size=pool_size,
            prefetch_batches=prefetch_batches,
            daemon=daemon,
            start=start,
        )
        self.forward_pool = TaskPool(self._run_forward, name=f"{name}_forward", **cast(Any, pool))
        self.backward_pool = TaskPool(self._serve_backward, name=f"{name}_backward", **cast(Any, pool))
        self.forward_pool.submit_task = self.submit_forward  # type: ignore[method-assign]
        self.backward_pool.submit_task = self.submit_backward  # type: ignore[method-assign]

    def __repr__(self) -> str:
        return f"ExpertBackend({self.name!r}, {type(self.module).__name__}, {self.schema})"

    # --- hivemind's names for the schemas ------------------------------------------------------------------------

    @property
    def args_schema(self) -> tuple[Nested, ...]:
        """Protos of the positional arguments."""
        return self.schema.args

    @property
    def kwargs_schema(self) -> dict[str, Nested]:
        """Protos of the keyword arguments, sorted by name."""
        return self.schema.kwargs

    @property
    def outputs_schema(self) -> Nested:
        """Protos of what the module returns."""
        return self.schema.outputs

    @property
    def forward_schema(self) -> tuple[tuple[Nested, ...], dict[str, Nested]]:
        """(args, kwargs)."""
        return (self.schema.args, self.schema.kwargs)

    @property
    def backward_schema(self) -> tuple[Any, Nested]:
        """(forward_schema, outputs_schema)."""
        return (self.forward_schema, self.schema.outputs)

    @property
    def grad_inputs_schema(self) -> tuple[tuple[Nested, ...], dict[str, Nested]]:
        """What backward returns: like the inputs."""
        return self.forward_schema

    @property
    def max_batch_size(self) -> int:
        """Rows in one batch, and so in one request."""
        return self.forward_pool.config.max_batch_size

    def get_info(self) -> dict[str, Any]:
        """What callers need to know; hivemind's keys and ours."""
        return {
            "forward_schema": self.forward_schema,
            "outputs_schema": self.outputs_schema,
            "keyword_names": tuple(self.schema.kwargs),
            "optional_keywords": self.schema.optional,
            "max_batch_size": self.max_batch_size,
            "trainable": self.optimizer is not None,
            "protocol_version": PROTOCOL_MAJOR,
            "features": FEATURES,
        }

    def describe(self, max_request_bytes: int = 2**30) -> ExpertDescription:
        """The same for the wire."""
        return ExpertDescription(
            schema=self.schema.to_plain(),
            max_batch_size=self.max_batch_size,
            max_request_bytes=max_request_bytes,
            trainable=self.optimizer is not None,
        )

    def get_pools(self) -> tuple[TaskPool, TaskPool]:
        """The pools that Runtime serves."""
        return self.forward_pool, self.backward_pool

    # --- submitting (any thread) -----------------------------------------------------------------------------------

    def submit_forward(
        self,
        *tensors: torch.Tensor,
        present: Sequence[str] = (),
        deadline: float = math.inf,
        priority: float = 0.0,
        peer: str = "",
    ) -> Future[TaskResult]:
        """Ask for a forward pass.

        :param tensors: flat inputs, in the order of the schema
        :param present: names of the optional kwargs among them
        :param deadline: monotonic seconds after which nobody waits
        :returns: future of the flat outputs
        :raises SchemaError: tensors that do not fit
        :raises Overloaded: too many requests wait
        """
        task = self.make_task("forward", tensors, present)
        task.deadline, task.priority, task.peer = deadline, priority, peer
        return self.forward_pool.submit(task)

    def submit_backward(
        self,
        *tensors: torch.Tensor,
        present: Sequence[str] = (),
        wants_grad: Sequence[bool] | None = None,
        deadline: float = math.inf,
        priority: float = 0.0,
        peer: str = "",
    ) -> Future[TaskResult]:
        """Ask for a backward pass.

        :param tensors: flat inputs, then gradients: either of the floating-point outputs, or (as hivemind does) of all
        :param wants_grad: which inputs want a gradient; None: all floating-point ones
        :returns: future of the gradients of the flat inputs; None for those that have none
        :raises SchemaError: tensors that do not fit
        :raises Overloaded: too many requests wait
        """
        task = self.make_task("backward", tensors, present, wants_grad)
        task.deadline, task.priority, task.peer = deadline, priority, peer
        return self.backward_pool.submit(task)

    def make_task(
        self,
        operation: str,
        tensors: Sequence[torch.Tensor],
        present: Sequence[str] = (),
        wants_grad: Sequence[bool] | None = None,
        digests: Mapping[int, bytes] = MappingProxyType({}),
    ) -> Task:
        """Check tensors against the schema and say what they may be batched with.

        :param digests: of global tensors, by ``id``, as far as they are known
        """
        present = tuple(sorted(present))
        inputs = self.schema.input_entries(present)
        entries = self.task_entries(operation, present, len(tensors))
        rows = validate(entries, tensors, what=operation)
        if wants_grad is not None and len(wants_grad) != len(inputs):
            raise SchemaError(f"wants_grad: expected {len(inputs)} flags, one per input, got {len(wants_grad)}")
        wanted: tuple[bool, ...] = ()
        if operation == "backward":
            floating = tuple(entry.proto.is_floating_point for entry in inputs)
            wanted = floating if wants_grad is None else tuple(w and f for w, f in zip(wants_grad, floating))
        task = Task(operation, present, entries, list(tensors), rows, None, wants_grad=wanted)
        task.lane = self._lane(task, inputs, digests)
        # Lanes of equal shape may be stacked, so globals are compared by shape here, and by content within the batch.
        task.group = signature(operation, present, entries, tensors, wanted)
        if not self.schema.mergeable or rows == 0:
            task.group = (task.group, next(_lane_numbers))
        return task

    def chain(self, present: Sequence[str]) -> Chain:
        """A call of this expert alone, with these optional kwargs.

        :raises SchemaError: if a name is not an optional kwarg
        """
        key = tuple(present)
        known = self._chains.get(key)
        if known is None:
            known = Chain.single(self.name, self.schema, key)
            if len(self._chains) >= MAX_CHAINS:  # a peer may name any subset
                self._chains.clear()
            self._chains[key] = known
        return known

    def task_entries(self, operation: str, present: Sequence[str], count: int | None = None) -> tuple[Entry, ...]:
        """The flat schema of a task's tensors; for backward, whose gradients there are is told by ``count``."""
        inputs = self.schema.input_entries(tuple(present))
        if operation == "forward":
            return inputs
        return inputs + self.gradient_entries(stock=count == len(inputs) + len(self.schema.output_entries))

    def gradient_entries(self, *, stock: bool) -> tuple[Entry, ...]:
        """The gradients a backward task has after its inputs. Stock hivemind sends one for every output, integer ones
        included; native callers send those of floating-point outputs only."""
        if stock:
            return tuple(Entry(f"grad_{path}", proto) for path, proto in self.schema.output_entries)
        return gradient_entries(self.schema.output_entries)

    def _lane(self, task: Task, inputs: Sequence[Entry], digests: Mapping[int, bytes]) -> Any:
        own_gradient = any(wanted and not entry.proto.batched for wanted, entry in zip(task.wants_grad, inputs))
        if own_gradient:
            return next(_lane_numbers)
        shared = [tensor for entry, tensor in zip(inputs, task.tensors) if not entry.proto.batched]
        return tuple(digests.get(id(tensor)) or digest(tensor) for tensor in shared)

    # --- forward (Runtime thread) ------------------------------------------------------------------------------------

    def forward(self, *inputs: torch.Tensor, present: Sequence[str] = ()) -> tuple[torch.Tensor, ...]:
        """Apply the module to one batch, without gradients. Override to compute outputs otherwise; an override need not take
        ``present`` if no kwarg is optional.

        :param inputs: flat tensors of ``forward_schema``
        :param present: names of the optional kwargs among them
        :returns: flat outputs
        """
        args, kwargs = self.schema.pack_inputs(inputs, tuple(present))
        with torch.no_grad():
            return tuple(self._call_module(args, kwargs))

    def dry_run(self, rows: int, any_length: int) -> float:
        """Apply the module to zeros, without optional kwargs, leaving no trace in it.

        :param any_length: size of axes of any length
        :returns: seconds it took
        :raises Exception: whatever the module raises
        """
        with self.step_lock, no_trace(self.module):
            args, kwargs = self.schema.pack_inputs(zeros_for(self.module, self.schema, rows, any_length), ())
            begin = time.perf_counter()
            for output in self._call_module(args, kwargs):
                if output.is_cuda:
                    torch.cuda.synchronize(output.device)
            return time.perf_counter() - begin

    def _run_forward(self, tasks: list[Task]) -> list[Outcome]:
        with self.step_lock:
            join = self._join_rows if self.schema.mergeable else None
            return run_isolated(tasks, lambda tasks: self._computed(self._compute_forward, tasks), join)

    def _computed(self, compute: Callable[[list[Task]], list[TaskResult]], tasks: list[Task]) -> list[TaskResult]:
        """Compute; once more, if the module turns out to use a tensor that it has kept from an earlier stacked run. Statistics
        that have become nan (a BatchNorm's, of one caller's rows) are put back: they would stay so."""
        statistics = _small_buffers(self.module) if self._has_buffers and not self.train_on_non_finite else []
        try:
            return compute(tasks)
        except RuntimeError as e:
            if not is_told_by(text_of(e)):
                raise
        finally:
            for part, name, value in statistics:
                now = part._buffers.get(name)
                if now is not None and not now.isfinite().all():
                    part._buffers[name] = now.detach().copy_(value) if now.shape == value.shape else value
        if mend_all():
            self._stackable[tasks[0].operation, tasks[0].present] = False
        return compute(tasks)

    def _compute_forward(self, tasks: list[Task]) -> list[TaskResult]:
        if tasks[0].rows == 0:
            return [self._empty_outputs(task) for task in tasks]
        if self.detect_anomalies:
            for task in tasks:  # before the module sees them: a BatchNorm would never get over it
                self._refuse_non_finite(task.tensors, task.entries)
        results = self._run_lanes(tasks, self._forward_lane, self._forward_stacked)
        if self.detect_anomalies:
            for result in results:
                self._refuse_non_finite(result, self.schema.output_entries)
        return to_cpu(results)

    def _forward_lane(self, lane: list[Task]) -> list[TaskResult]:
        _check_shared(lane)
        rows = [task.rows for task in lane]
        keeps = len(lane) == 1 and lane[0].keep and "forward" not in self._overridden and self._thrift.keeps()
        outputs = self._forward_keeping(lane[0]) if keeps else None
        if outputs is None:
            tensors = concatenate(lane[0].entries, [task.tensors for task in lane])
            lent = self._to_lend(lane, tensors)
            with (
                self._noticing_writes([t for t, is_lent in zip(tensors, lent) if not is_lent])
                if False in lent
                else _NOTHING
            ):
                given = [lend(t) if is_lent else t for t, is_lent in zip(tensors, lent)]
                outputs = own(self._checked(self._forwarded(given, lane[0].present), sum(rows)))
        return [list(part) for part in split(self.schema.output_entries, outputs, rows)]

    def _forwarded(self, inputs: Sequence[torch.Tensor], present: tuple[str, ...]) -> list[torch.Tensor]:
        """What ``forward`` returns, a subclass's or ours.

        :raises ExpertFailed: a subclass's returns another number of outputs
        """
        outputs = list(self.forward(*inputs, **_given(present)))
        if len(outputs) != len(self.schema.output_entries):
            expected = len(self.schema.output_entries)
            raise ExpertFailed(f"{type(self).__name__}.forward returned {len(outputs)} tensors, expected {expected}")
        return outputs

    def _forward_keeping(self, task: Task) -> list[torch.Tensor] | None:
        """Outputs of one task, whose graph is kept in it if that is of use; None if they are to be computed without."""

        def call(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            return self._checked(self._call_module(*self.schema.pack_inputs(inputs, task.present)), task.rows)

        try:
            with self._as_trained():
                kept = KeptForward(call, task.tensors, self.module, lambda: self._generation)
        except NotKept as e:
            logger.debug("%s: a forward is not kept: %s", self.name, e)
            return None if e.outputs is None else own([output.detach() for output in e.outputs])
        except (
            BaseException
        ) as e:  # no memory for activations, or a module that autograd does not like: it may do without
            if is_device_lost(e):
                raise
            logger.debug("%s: a forward cannot be kept (%r)", self.name, e)
            return None
        task.kept = kept
        held = held_elsewhere(kept.outputs, kept.saved)
        return [t.detach().clone() if is_held else t.detach().contiguous() for t, is_held in zip(kept.outputs, held)]

    def _to_lend(self, lane: list[Task], tensors: Sequence[torch.Tensor]) -> list[bool]:
        """Which of a lane's tensors the module may not write to: somebody else may use them afterwards. Those that cannot be
        lent for nothing are given to a module that has not been seen to write to its inputs."""
        if len(lane) == 1 and (self._writes_inputs or lane[0].keep):
            return [True] * len(tensors)
        shared = {id(held.tensor) for task in lane for held in task.shared}
        return [
            not (len(lane) > 1 and entry.proto.batched)  # else it is a copy anyway
            and (lends_for_nothing(tensor) or self._writes_inputs or id(tensor) in shared)
            for entry, tensor in zip(lane[0].entries, tensors)
        ]

    @contextlib.contextmanager
    def _noticing_writes(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Notice if the module writes to these tensors, which are not lent: they can be used no more then."""
        before = [tensor._version for tensor in tensors]
        try:
            yield
        except BaseException as e:
            if not is_device_lost(e) and any(t._version != version for t, version in zip(tensors, before)):
                self._writes_inputs = True
                raise ExpertFailed(f"{type(e).__name__}, after it had written to its inputs; send them again") from e
            raise
        self._writes_inputs |= any(t._version != version for t, version in zip(tensors, before))

    def _call_module(self, args: Sequence[Nested], kwargs: Mapping[str, Nested]) -> list[torch.Tensor]:
        """The module's outputs, flat.

        :raises ExpertFailed: if they do not have the schema's structure
        """
        outputs = self.module(*args, **kwargs)
        try:
            return self.schema.flatten_outputs(outputs)
        except SchemaError as e:
            raise ExpertFailed(e.message) from None

    def _checked(self, outputs: list[Any], rows: int) -> list[torch.Tensor]:
        """The module's outputs, each an ordinary tensor of its schema; in place.

        :raises ExpertFailed: one is not
        """
        for i, entry in enumerate(self.schema.output_entries):
            if not isinstance(outputs[i], torch.Tensor):
                raise ExpertFailed(f"the module returned {type(outputs[i]).__name__} as {entry.path}, not a tensor")
            try:
                outputs[i] = plain(outputs[i])
            except ValueError as e:
                raise ExpertFailed(f"the module returned {e} as {entry.path}, which cannot be sent") from None
        try:
            validate(self.schema.output_entries, outputs, rows=rows, what="outputs")
        except SchemaError as e:
            raise ExpertFailed(f"the module returned something else than its schema says: {e.message}") from None
        return outputs

    def _empty_outputs(self, task: Task) -> TaskResult:
        """Outputs for no rows (a module need not take empty batches)."""

        def run(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            with no_trace(self.module):
                return self._checked(self._forwarded(inputs, task.present), DUMMY_BATCH_SIZE)

        return list(self._empty.answer(task.present, task.entries, task.tensors, run))

    # --- backward (Runtime thread) -----------------------------------------------------------------------------------

    def backward(
        self,
        *inputs: torch.Tensor,
        present: Sequence[str] = (),
        wants_grad: Sequence[bool] | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Run the module again with gradients, backpropagate, and train (``on_backward``). One batch, one step.

        An override is called with one request at a time, without ``wants_grad``, and without ``present`` if no kwarg is
        optional. It has to call this one, or ``on_backward``.

        :param inputs: flat tensors of ``backward_schema``: inputs, then gradients of the outputs
        :returns: gradients of the flat inputs; None for those that have none
        """
        task = self.make_task("backward", inputs, present, wants_grad)
        outcome = self._run_backward([task])[0]
        if isinstance(outcome, BaseException):
            raise outcome
        return tuple(outcome)

    def on_backward(self, batch_size: int) -> None:
        """Train for one step; called once per backward batch, with gradients in place. Override to train otherwise."""
        self._accumulated += 1
        if self.optimizer is None or self._accumulated < self.accumulate_steps:
            return
        self._accumulated = 0
        try:
            self.optimizer.step()
            self.updates += 1
            if self.scheduler is not None:
                self.scheduler.step()
        finally:
            self.optimizer.zero_grad()  # also when the step failed: stale gradients belong to nobody

    def _serve_backward(self, tasks: list[Task]) -> list[Outcome]:
        if "backward" not in self._overridden:
            return self._run_backward(tasks)
        return [self._run_override(task) if task.rows else self._run_backward([task])[0] for task in tasks]

    def _run_override(self, task: Task) -> Outcome:
        """Gradients of one task by a subclass's ``backward``."""
        count = len(task.wants_grad)
        task.kept = None
        with self.step_lock:
            before = self._generation, self.updates, self._accumulated
            try:
                _check_shared([task])
                gradients = list(self.backward(*map(lend, task.tensors), **_given(task.present)))
                return self._wanted_gradients(task, gradients, task.entries[:count])
            except BaseException as e:
                if is_device_lost(e):
                    raise DeviceLost(text_of(e)) from e
                task.may_have_trained = (self._generation, self.updates, self._accumulated) != before
                return as_expert_failure(e)
            finally:
                self._generation += 1

    def _wanted_gradients(self, task: Task, gradients: list[Any], entries: Sequence[Entry]) -> TaskResult:
        """Those of a subclass's gradients that the caller wants.

        :raises ExpertFailed: they do not fit the inputs
        """
        name = f"{type(self).__name__}.backward"
        if len(gradients) != len(entries):
            raise ExpertFailed(
                f"{name} returned {len(gradients)} gradients, expected {len(entries)}, one for each input"
            )
        result: TaskResult = [None] * len(entries)
        for i, (gradient, tensor) in enumerate(zip(gradients, task.tensors)):
            if task.wants_grad[i]:
                result[i] = torch.zeros_like(tensor) if gradient is None else plain(gradient).detach().clone()
        wanted = [i for i, gradient in enumerate(result) if gradient is not None]
        try:
            validate([entries[i] for i in wanted], [cast(torch.Tensor, result[i]) for i in wanted], rows=task.rows)
        except SchemaError as e:
            raise ExpertFailed(f"{name} returned a gradient that does not fit its input: {e.message}") from None
        return to_cpu([result])[0]

    def _run_backward(self, tasks: list[Task]) -> list[Outcome]:
        with self.step_lock:
            self._not_training.clear()
            self._batch_rows = sum(task.rows for task in tasks)
            join = self._join_rows if self.schema.mergeable else None
            outcomes = run_isolated(
                tasks, lambda tasks: self._computed(self._compute_backward, tasks), join, self._added_gradients
            )
            rows = sum(
                task.rows
                for task, outcome in zip(tasks, outcomes)
                if not isinstance(outcome, BaseException) and task.number not in self._not_training
            )
            if rows > 0:
                self._train(rows)
            return outcomes

    def _train(self, rows: int) -> None:
        """``on_backward``. If it fails, the callers get their gradients all the same: they are right, a repeat would train
        once more with what may have been trained already, and no caller can mend an optimizer."""
        try:
            self.on_backward(rows)
        except BaseException as e:
            if is_device_lost(e):
                raise DeviceLost(text_of(e)) from e
            self.failed_steps += 1
            self._accumulated = 0
            logger.critical("%s: a step of its optimizer has failed; it may be half done", self.name, exc_info=e)
            self._forget_gradients()
            self._generation += 1
            return
        if not self._trains_as_usual or self._accumulated == 0:
            self._generation += 1

    @property
    def _trains_as_usual(self) -> bool:
        return getattr(self.on_backward, "__func__", None) is ExpertBackend.on_backward

    def _forget_gradients(self) -> None:
        for parameter in self._parameters():
            parameter.grad = None

    def _parameters(self) -> list[torch.Tensor]:
        """Those of the module, and what else the optimizer trains."""
        groups = getattr(self.optimizer, "param_groups", ())
        more = (parameter for group in groups for parameter in group["params"])
        return list({id(p): p for p in itertools.chain(self.module.parameters(), more)}.values())

    def _compute_backward(self, tasks: list[Task]) -> list[TaskResult]:
        """Gradients of these tasks; parameter gradients are added up, unless this raises: then they are as before."""
        if tasks[0].rows == 0:
            return [_zero_gradients(task) for task in tasks]
        if self.detect_anomalies:
            for task in tasks:
                self._refuse_non_finite(task.tensors, task.entries)
        kept, tasks[0].kept = tasks[0].kept, None
        if len(tasks) == 1 and kept is not None and kept.is_of(tasks[0].inputs):
            try:
                with self._parameter_gradients(tasks):
                    return to_cpu(self._finish_backward(tasks, [self._backward_kept(tasks[0], kept)]))
            except BaseException as e:
                if is_device_lost(e) or isinstance(e, NonFiniteError):
                    raise
                logger.debug("%s: a forward that was kept is of no use (%r)", self.name, e)
        with self._parameter_gradients(tasks):
            return to_cpu(
                self._finish_backward(tasks, self._run_lanes(tasks, self._backward_lane, self._backward_stacked))
            )

    def _finish_backward(self, tasks: list[Task], results: list[TaskResult]) -> list[TaskResult]:
        """The results, if they may be used."""
        if self.detect_anomalies:
            for task, result in zip(tasks, results):
                self._refuse_non_finite(result, task.entries, "the gradient of ")
            self._refuse_non_finite_parameters()
        return results

    def _backward_kept(self, task: Task, kept: KeptForward) -> TaskResult:
        """Gradients of one task whose forward was kept."""
        count = len(task.wants_grad)
        _check_shared([task])
        wanted = [leaf for leaf, wants in zip(kept.leaves, task.wants_grad) if wants]
        into = [*wanted, *(p for p in self._parameters() if p.requires_grad)]
        if into:
            _backpropagate(kept.outputs, task.tensors[count:], task.entries[count:], into)
        self._thrift.used()
        return own(_gradients_of(kept.leaves, task.wants_grad), apart=True)

    def _backward_lane(self, lane: list[Task]) -> list[TaskResult]:
        _check_shared(lane)
        try:
            return self._backward_once(lane)
        except RuntimeError as e:
            if self._writes_inputs or "leaf Variable that requires grad" not in text_of(e):
                raise
        finally:  # of a graph that is used up: the next backward would fail
            self._forget(has_graph)
        self._writes_inputs = True
        self._forget_gradients()  # _parameter_gradients has put earlier ones aside
        return self._backward_once(lane)

    def _forget(self, unwanted: Callable[[torch.Tensor], bool]) -> None:
        """Let the module not keep such tensors."""
        if places := places_of(self.module, unwanted):
            self._attributes.forget(places)

    def _backward_once(self, lane: list[Task]) -> list[TaskResult]:
        first = lane[0]
        tensors = concatenate(first.entries, [task.tensors for task in lane])
        count = len(first.wants_grad)
        leaves = _leaves(tensors[:count], first.wants_grad)
        # Autograd lets nobody write to a leaf: one that wants a gradient is lent even if it is a copy.
        lent = [
            is_lent or (wanted and lends_for_nothing(leaf))
            for is_lent, wanted, leaf in zip(self._to_lend(lane, tensors[:count]), first.wants_grad, leaves)
        ]
        direct = [leaf for leaf, is_lent in zip(leaves, lent) if not is_lent]
        with torch.enable_grad(), self._noticing_writes(direct) if direct else _NOTHING:
            given = [lend(leaf) if is_lent else leaf for leaf, is_lent in zip(leaves, lent)]
            args, kwargs = self.schema.pack_inputs(given, first.present)
            outputs = self._checked(self._call_module(args, kwargs), sum(task.rows for task in lane))
            _backpropagate(outputs, tensors[count:], first.entries[count:])
            del given, args, kwargs, outputs
        grads = own(_gradients_of(leaves, first.wants_grad), apart=True)
        entries = first.entries[:count]
        rows = [task.rows for task in lane]
        kept = [i for i, grad in enumerate(grads) if grad is not None]
        parts = split([entries[i] for i in kept], [cast(torch.Tensor, grads[i]) for i in kept], rows)
        results: list[TaskResult] = [[None] * count for _ in lane]
        for result, part in zip(results, parts):
            for i, grad in zip(kept, part):
                result[i] = grad
        return results

    @contextlib.contextmanager
    def _as_trained(self) -> Iterator[None]:
        """An expert without an optimizer is frozen: its parameters take no part in autograd meanwhile."""
        frozen = [] if self.optimizer is not None else [p for p in self.module.parameters() if p.requires_grad]
        for parameter in frozen:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def _parameter_gradients(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Let the body compute the tasks' parameter gradients from none; add them to those of before. They are dropped if it
        raises, or if they cannot be trained with and belong to one task.

        :raises NonFiniteError: they cannot be trained with, and belong to several tasks
        """
        with self._added_gradients(whole=sum(task.rows for task in tasks) == self._batch_rows) as parameters:
            yield
            if self.train_on_non_finite or usable(p.grad for p in parameters if p.grad is not None):
                return
            if len(tasks) > 1:  # halving finds those whose they are
                raise NonFiniteError("somebody's parameter gradients are not finite")
            logger.warning("%s: parameter gradients of %s are not finite: not trained", self.name, tasks[0].peer)
            self._not_training.add(tasks[0].number)

    @contextlib.contextmanager
    def _added_gradients(self, whole: bool = False) -> Iterator[list[torch.Tensor]]:
        """Let the body compute parameter gradients from none; add them to those of before, or drop them if it raises, or if a
        task in it must not train. (Parts of a task have its number.)

        :param whole: it computes the whole batch: if a step is due, nothing else will be added to them
        """
        parameters = [p for p in self._parameters() if p.requires_grad]
        before = _take_gradients(parameters)
        spoilt = len(self._not_training)
        done = False
        try:
            with self._as_trained():
                yield parameters
            done = len(self._not_training) == spoilt
        finally:
            gradients = _take_gradients(parameters)
            if done:
                if not (whole and self.accumulate_steps == 1 and self._trains_as_usual):
                    gradients = _in_own_memory(gradients)
                for parameter, grad, more in zip(parameters, before, gradients):
                    parameter.grad = add(grad, more)
            else:
                for parameter, grad in zip(parameters, before):
                    parameter.grad = grad

    def _refuse_non_finite(
        self, tensors: Sequence[torch.Tensor | None], entries: Sequence[Entry], prefix: str = ""
    ) -> None:
        for tensor, entry in zip(tensors, entries):
            if tensor is not None and tensor.is_floating_point() and not tensor.isfinite().all():
                raise NonFiniteError(f"{prefix}{entry.path} has nan or inf values; nothing was trained")

    def _refuse_non_finite_parameters(self) -> None:
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                raise NonFiniteError(f"the gradient of parameter {name} has nan or inf values; nothing was trained")

    # --- several lanes in one launch -----------------------------------------------------------------------------------

    def _run_lanes(
        self,
        tasks: list[Task],
        run_one: Callable[[list[Task]], list[TaskResult]],
        run_stacked: Callable[[list[list[Task]]], list[TaskResult]],
    ) -> list[TaskResult]:
        """Results of the tasks, in order: all lanes in one launch if the module allows it, else lane by lane."""
        if len(tasks) == 1:
            return run_one(tasks)
        lanes = _lanes(tasks)
        may_stack = self._may_stack(lanes)
        results = self._try_stacked(lanes, run_stacked) if may_stack else None
        if results is None:
            results = [result for lane in lanes for result in run_one(lane)]
            if may_stack:  # it was not a task's fault: do not try again
                self._stackable[tasks[0].operation, tasks[0].present] = False
        by_number = {task.number: result for task, result in zip(itertools.chain.from_iterable(lanes), results)}
        return [by_number[task.number] for task in tasks]

    def _may_stack(self, lanes: list[list[Task]]) -> bool:
        first = lanes[0][0]
        if len(lanes) < 2 or first.operation in self._overridden:
            return False
        rows = [sum(task.rows for task in lane) for lane in lanes]
        small_enough = max(rows) * len(rows) <= MAX_PADDING * sum(rows)
        return small_enough and self._stackable.get((first.operation, first.present), True)

    def _try_stacked(
        self, lanes: list[list[Task]], run_stacked: Callable[[list[list[Task]]], list[TaskResult]]
    ) -> list[TaskResult] | None:
        """Run lanes in one launch, or None if that fails, or leaves something behind in the module: then it is as before."""
        first = lanes[0][0]
        key = (first.operation, first.present)
        before = _Before(self.module, proven=key in self._stackable)
        self._escapes = Escapes() if self._watched[self._shapes(lanes)] < WATCHED_RUNS else None
        results, problem, no_memory = None, "", None
        try:
            results = run_stacked(lanes)
        except (
            BaseException
        ) as e:  # vmap says it in many ways: random numbers, control flow on data, in-place updates, ...
            if is_device_lost(e):
                raise
            problem = f"{type(e).__name__}: {text_of(e)}"
            no_memory = torch.OutOfMemoryError(text_of(e)) if is_out_of_memory(e) else None
        left = before.has_left_something()
        escapes, self._escapes = self._escapes, None
        if (escapes is not None and escapes.mend()) or left:
            results, problem = None, "it keeps tensors made of its inputs, or writes to its buffers"
        if results is None:
            before.restore(self._attributes)
        if no_memory is not None:
            raise no_memory
        if results is None:
            logger.info("%s: its %s runs callers with own globals one by one (%s)", self.name, first.operation, problem)
        else:
            self._stackable[key] = True
            self._watched[self._shapes(lanes)] += 1
        return results

    def _shapes(self, lanes: list[list[Task]]) -> Any:
        """The same for stacked runs in which the module sees the same shapes."""
        if len(self._watched) > MAX_CHAINS:
            self._watched.clear()
        return lanes[0][0].group, len(lanes), max(sum(task.rows for task in lane) for lane in lanes)

    def _stack(self, lanes: list[list[Task]], grad: bool) -> tuple[list[torch.Tensor], list[int], int]:
        """Flat tensors with a leading lane axis: batched ones padded to (lanes, rows, *), globals stacked (lanes, *)."""
        entries = lanes[0][0].entries
        rows = [sum(task.rows for task in lane) for lane in lanes]
        most = max(rows)
        count = len(lanes[0][0].wants_grad) if grad else len(entries)
        stacked = []
        _check_shared(itertools.chain.from_iterable(lanes))
        for i, entry in enumerate(entries):
            if entry.proto.batched:
                # Padding repeats a caller's own first row, which its module can certainly take; gradients there are 0.
                parts = [_pad([task.tensors[i] for task in lane], most, repeat_first=i < count) for lane in lanes]
            else:
                parts = [lane[0].tensors[i] for lane in lanes]
            stacked.append(torch.stack(parts))
        return stacked, rows, most

    def _unstack(
        self, lanes: list[list[Task]], tensors: Sequence[torch.Tensor | None], entries: Sequence[Entry]
    ) -> list[TaskResult]:
        results: list[TaskResult] = []
        for index, lane in enumerate(lanes):
            start = 0
            for task in lane:
                stop = start + task.rows
                results.append(
                    [
                        None if t is None else t[index, start:stop] if entry.proto.batched else t[index]
                        for t, entry in zip(tensors, entries)
                    ]
                )
                start = stop
        return results

    def _vmapped(self, present: tuple[str, ...]) -> Callable[..., tuple[torch.Tensor, ...]]:
        escapes = self._escapes

        def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if escapes is not None:
                escapes.watch(tensors)
            with escapes or contextlib.nullcontext():
                return tuple(self._call_module(*self.schema.pack_inputs(tensors, present)))

        return cast("Callable[..., tuple[torch.Tensor, ...]]", torch.func.vmap(call))

    def _forward_stacked(self, lanes: list[list[Task]]) -> list[TaskResult]:
        stacked, _, most = self._stack(lanes, grad=False)
        with torch.no_grad():
            outputs = list(self._vmapped(lanes[0][0].present)(*stacked))
        self._checked([output[0] for output in outputs], most)
        return self._unstack(lanes, own(cast(TaskResult, outputs)), self.schema.output_entries)

    def _backward_stacked(self, lanes: list[list[Task]]) -> list[TaskResult]:
        first = lanes[0][0]
        stacked, _, most = self._stack(lanes, grad=True)
        count = len(first.wants_grad)
        leaves = _leaves(stacked[:count], first.wants_grad)
        try:
            with torch.enable_grad():
                outputs = self._vmapped(first.present)(*leaves)
                self._checked([output[0] for output in outputs], most)
                _backpropagate(outputs, stacked[count:], first.entries[count:])
        except BaseException:
            self._forget_gradients()  # _parameter_gradients has put earlier ones aside
            raise
        del outputs
        grads = own(_gradients_of(leaves, first.wants_grad), apart=True)
        return self._unstack(lanes, grads, first.entries[:count])

    # --- rows of one task, when memory is short --------------------------------------------------------------------------

    def _join_rows(self, task: Task, parts: Sequence[TaskResult]) -> TaskResult:
        backward = task.operation == "backward"
        entries = task.entries[: len(task.wants_grad)] if backward else self.schema.output_entries
        joined: TaskResult = []
        for i, entry in enumerate(entries):
            pieces = [part[i] for part in parts]
            tensors = [piece for piece in pieces if piece is not None]
            if len(tensors) < len(pieces):
                joined.append(None)
            elif entry.proto.batched:
                joined.append(torch.cat(tensors))
            else:
                joined.append(torch.stack(tensors).sum(0))  # the gradient of a global is a sum over rows
        return joined

    # --- state ---------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """A snapshot of module, optimizer and scheduler, taken between batches: safe to write while training goes on."""
        with self.step_lock:
            state: dict[str, Any] = {"module": self.module.state_dict()}
            if self.optimizer is not None:
                state["optimizer"] = portable_state(self.optimizer)
            if self.scheduler is not None:
                state["scheduler"] = self.scheduler.state_dict()
            state["moe"] = {"uid": self.name, "schema": self.schema.to_plain(), "updates": self.updates}
            if self._accumulated:  # backward batches whose step is still to come
                grads = {name: p.grad for name, p in self.module.named_parameters() if p.grad is not None}
                state["moe"] |= {"accumulated": self._accumulated, "gradients": grads}
            return cast("dict[str, Any]", _detached_copy(state))

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore ``state_dict``, ours or hivemind's. A missing optimizer or scheduler state is only warned about."""
        with self.step_lock:
            self.module.load_state_dict(state_dict["module"])
            if self.optimizer is not None and "optimizer" in state_dict:
                load_state(self.optimizer, state_dict["optimizer"])
            if self.scheduler is not None and "scheduler" in state_dict:
                self.scheduler.load_state_dict(state_dict["scheduler"])
            for part in ("optimizer", "scheduler"):
                if getattr(self, part) is not None and part not in state_dict:
                    logger.warning("%s: the checkpoint has no %s state", self.name, part)
            ours = state_dict.get("moe", {})
            self.updates, self._accumulated = int(ours.get("updates", 0)), int(ours.get("accumulated", 0))
            self._generation += 1
            self._forget_gradients()
            gradients = ours.get("gradients", {})
            for name, parameter in self.module.named_parameters():
                if name in gradients:
                    parameter.grad = gradients[name].to(parameter.device, parameter.dtype, copy=True)

    def to(self, device: torch.device | str) -> None:
        """Move module and optimizer state to a device, in place."""
        with self.step_lock:
            self.module.to(device)
            self._generation += 1
            if self.optimizer is not None:
                move_state(self.optimizer, device)


ModuleBackend = ExpertBackend  # hivemind's name


# --- helpers -----------------------------------------------------------------------------------------------------------------


class _Before:
    """A module before a stacked run.

    :param proven: such a run has left nothing in it so far, so that it need not be able to put everything back
    """

    def __init__(self, module: nn.Module, *, proven: bool):
        self._module = module
        self._attributes = None if proven else _attributes_of(module)
        self._buffers = [(b, b._version, None if proven else b.detach().clone()) for b in module.buffers()]

    def has_left_something(self) -> bool:
        """Does the module keep something that has no meaning outside of the run, or has it written to its buffers?"""
        return bool(places_of(self._module, _means_nothing_outside)) or any(
            buffer._version != version for buffer, version, _ in self._buffers
        )

    def restore(self, pristine: Attributes) -> None:
        """Put it back as it was; what is not known of it, as it was made."""
        if self._attributes is not None:
            self._attributes.restore()
        pristine.forget(places_of(self._module, _means_nothing_outside))
        for buffer, version, value in self._buffers:
            if value is not None and buffer._version != version:
                buffer.detach().copy_(value)


def _given(present: tuple[str, ...]) -> dict[str, Any]:
    """``present`` as an argument, if there is anything to say: overrides written for hivemind do not take it."""
    return {"present": present} if present else {}


def _means_nothing_outside(tensor: torch.Tensor) -> bool:
    return is_wrapper(tensor) or has_graph(tensor)


def _attributes_of(module: nn.Module) -> Attributes:
    try:
        return Attributes(module)
    except ValueError:  # too much to look at
        return Attributes(nn.Identity())


def _small_buffers(module: nn.Module) -> list[tuple[nn.Module, str, torch.Tensor]]:
    """Copies of a module's small floating-point buffers that are finite, with their places, if it is in training."""
    if not module.training:
        return []
    return [
        (part, name, buffer.detach().clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
        and buffer.is_floating_point()
        and buffer.nbytes <= SMALL_BYTES
        and buffer.isfinite().all()
    ]


def _lanes(tasks: list[Task]) -> list[list[Task]]:
    by_lane: dict[Any, list[Task]] = {}
    for task in tasks:
        by_lane.setdefault(task.lane, []).append(task)
    return list(by_lane.values())


def _check_shared(tasks: Iterable[Task]) -> None:
    """Refuse tasks whose inputs a module has written to: they came with another task. Their callers can send them again.

    :raises TensorNotHeld: there is one
    """
    if not all(held.unchanged for task in tasks for held in task.shared):
        raise TensorNotHeld("an expert has written to a tensor that was held")


def _backpropagate(
    outputs: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    entries: Sequence[Entry],
    into: Sequence[torch.Tensor] | None = None,
) -> None:
    """Backward through the floating-point outputs; the zeros that stock peers send for the others are dropped.

    :param into: leaves that get a gradient; None: all that require one
    """
    floating = [output for output in outputs if output.is_floating_point()]
    given = [(grad, entry) for grad, entry in zip(grads, entries) if grad.is_floating_point()]
    pairs = []
    for output, (grad, entry) in zip(floating, given, strict=True):
        if grad.shape != output.shape:  # in an axis of "any length"; the rest is checked before
            raise SchemaError(f"{entry.path}: the output has shape {tuple(output.shape)}, this {tuple(grad.shape)}")
        if output.requires_grad:
            pairs.append((output, grad.to(output.device, output.dtype)))
    if pairs:  # else nothing that was asked for depends on anything
        torch.autograd.backward([output for output, _ in pairs], [grad for _, grad in pairs], inputs=into)


def _leaves(inputs: Sequence[torch.Tensor], wants_grad: Sequence[bool]) -> list[torch.Tensor]:
    ordinary = (tensor.clone() if tensor.is_inference() else tensor for tensor in inputs)
    return [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(ordinary, wants_grad)]


def _take_gradients(tensors: Sequence[torch.Tensor]) -> TaskResult:
    """Their gradients; they have none any more."""
    gradients: TaskResult = []
    for tensor in tensors:
        gradients.append(tensor.grad)
        if gradients[-1] is not None:
            tensor.grad = None
    return gradients


def _in_own_memory(gradients: TaskResult) -> TaskResult:
    if any(gradient is not None and gradient.layout is not torch.strided for gradient in gradients):
        return gradients
    return own(gradients, apart=True, contiguous=False)


def _gradients_of(leaves: Sequence[torch.Tensor], wants_grad: Sequence[bool]) -> TaskResult:
    """Gradients of the leaves that want one: zeros where the outputs do not depend on them. The leaves have none any more."""
    gradients: TaskResult = []
    for leaf, wanted in zip(leaves, wants_grad):
        gradients.append((torch.zeros_like(leaf) if leaf.grad is None else leaf.grad) if wanted else None)
        leaf.grad = None
        if (grad := gradients[-1]) is not None and grad.layout is not torch.strided:
            gradients[-1] = grad.to_dense()
        del grad
    return gradients


def _zero_gradients(task: Task) -> TaskResult:
    return [torch.zeros_like(t, device="cpu") if wanted else None for t, wanted in zip(task.tensors, task.wants_grad)]


def _pad(parts: list[torch.Tensor], rows: int, repeat_first: bool) -> torch.Tensor:
    tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
    missing = rows - len(tensor)
    if not missing:
        return tensor
    filler = tensor[:1].expand(missing, *tensor.shape[1:]) if repeat_first else tensor.new_zeros(1)
    return torch.cat([tensor, filler.expand(missing, *tensor.shape[1:])])


def _detached_copy(state: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return state.detach().cpu().clone()
    if isinstance(state, Mapping):
        return {key: _detached_copy(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_detached_copy(value) for value in state)
    return state
