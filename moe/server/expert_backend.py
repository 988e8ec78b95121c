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
    BatchTensorProto,
    Entry,
    ExpertSchema,
    Nested,
    TensorProto,
    concatenate,
    digest,
    gradient_entries,
    signature,
    split,
    validate,
)
from moe.server.execution import Outcome, is_device_lost, run_isolated
from moe.server.kept_forwards import KeptForward, Thrift
from moe.server.matmul import speed_up_linear
from moe.server.optim import fuse, load_state, move_state, portable_state
from moe.server.task_pool import Task, TaskPool, TaskResult
from moe.server.transfer import to_cpu
from moe.wire.messages import FEATURES, PROTOCOL_MAJOR, ExpertDescription

logger = logging.getLogger(__name__)

MAX_PADDING = 2.0  # lanes of unequal row counts are stacked if that at most doubles the rows; decision 0007
MAX_CHAINS = 1024  # kept, one for each subset of the optional kwargs that callers give; ours
_DRY_RUN_LENGTHS = (8, 5)  # of "any length" axes; two, to see which output axes follow them
_lane_numbers = itertools.count()


class ExpertBackend:
    """A module that serves forward and backward requests, and trains if it has an optimizer.

    :param name: the expert's uid
    :param module: any torch module that treats the rows of a batch independently of each other. Its linear layers may get
        another kernel (moe.server.matmul)
    :param optimizer: steps after every backward batch; None: the expert never changes. Adam gets torch's fused kernel
    :param scheduler: learning-rate scheduler, stepped after the optimizer
    :param args_schema: protos of the positional arguments, nested structures allowed
    :param kwargs_schema: protos of the keyword arguments by name
    :param outputs_schema: protos of what the module returns; None: found by a dry run that leaves no trace
    :param optional_kwargs: kwargs that callers may leave out; absent ones are not passed to the module at all
    :param accumulate_steps: backward batches per optimizer step (their gradients are summed)
    :param detect_anomalies: never return or step on non-finite values
    :param min_batch_size: rows a batch waits for, ``timeout`` seconds at most
    :param max_batch_size: rows in one batch
    :param timeout: see min_batch_size
    :param pool_size: requests of one kind that may wait; more are refused as Overloaded
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
        min_batch_size: int = 1,
        max_batch_size: int = 4096,
        timeout: float | None = None,
        pool_size: int | None = None,
    ):
        if not is_valid_uid(name):
            raise ConfigError(f"{name!r} is not a valid expert uid; uids follow {UID_PATTERN.pattern}")
        if optimizer is None and scheduler is not None:
            raise ConfigError(f"{name}: a scheduler needs an optimizer")
        if accumulate_steps < 1:
            raise ConfigError(f"{name}: accumulate_steps is at least 1, got {accumulate_steps}")
        self.name, self.module, self.optimizer, self.scheduler = name, module, optimizer, scheduler
        self.accumulate_steps, self.detect_anomalies = accumulate_steps, detect_anomalies
        self.step_lock = threading.RLock()
        self.updates = 0  # optimizer steps taken
        self._accumulated = 0  # backward batches since the last step
        self._stackable: dict[tuple[str, tuple[str, ...]], bool] = {}
        self._chains: dict[tuple[str, ...], Chain] = {}
        self._thrift = Thrift()
        speed_up_linear(module)
        if optimizer is not None:
            fuse(optimizer)
        self.schema = ExpertSchema(args_schema or (), kwargs_schema, outputs_schema, optional_kwargs)
        if self.schema.outputs is None:
            outputs = _infer_outputs(name, module, self.schema)
            self.schema = ExpertSchema(self.schema.args, self.schema.kwargs, outputs, optional_kwargs)
        pool = dict(max_batch_size=max_batch_size, min_batch_size=min_batch_size, timeout=timeout, pool_size=pool_size)
        self.forward_pool = TaskPool(self._run_forward, name=f"{name}_forward", **cast(Any, pool))
        self.backward_pool = TaskPool(self._run_backward, name=f"{name}_backward", **cast(Any, pool))
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
        """Apply the module to one batch, without gradients.

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
        with self.step_lock, _no_trace(self.module):
            args, kwargs = self.schema.pack_inputs(_zeros_for(self.module, self.schema, rows, any_length), ())
            begin = time.perf_counter()
            for output in self._call_module(args, kwargs):
                if output.is_cuda:
                    torch.cuda.synchronize(output.device)
            return time.perf_counter() - begin

    def _run_forward(self, tasks: list[Task]) -> list[Outcome]:
        with self.step_lock:
            return run_isolated(tasks, self._compute_forward, self._join_rows if self.schema.mergeable else None)

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
        outputs = self._forward_keeping(lane[0]) if len(lane) == 1 and lane[0].keep and self._thrift.keeps() else None
        if outputs is None:
            tensors = concatenate(lane[0].entries, [task.tensors for task in lane])
            outputs = self.forward(*tensors, present=lane[0].present)
        entries, rows = self.schema.output_entries, [task.rows for task in lane]
        self._check_outputs(outputs, sum(rows))
        return [list(part) for part in split(entries, outputs, rows)]

    def _forward_keeping(self, task: Task) -> tuple[torch.Tensor, ...] | None:
        """Outputs of one task, whose graph is kept in it; None if that does not work."""

        def call(leaves: list[torch.Tensor]) -> list[torch.Tensor]:
            return self._call_module(*self.schema.pack_inputs(leaves, task.present))

        try:
            with self._as_trained():
                kept = KeptForward(call, task.tensors, self.module.parameters())
        except Exception as e:  # no memory for activations, or a module that autograd does not like: it may do without
            logger.debug("%s: a forward cannot be kept (%r)", self.name, e)
            return None
        task.kept = kept
        return tuple(output.detach() if isinstance(output, torch.Tensor) else output for output in kept.outputs)

    def _call_module(self, args: Sequence[Nested], kwargs: Mapping[str, Nested]) -> list[torch.Tensor]:
        """The module's outputs, flat.

        :raises ExpertFailed: if they do not have the schema's structure
        """
        outputs = self.module(*args, **kwargs)
        try:
            return self.schema.flatten_outputs(outputs)
        except SchemaError as e:
            raise ExpertFailed(e.message) from None

    def _check_outputs(self, outputs: Sequence[Any], rows: int) -> None:
        for entry, output in zip(self.schema.output_entries, outputs):
            if not isinstance(output, torch.Tensor):
                raise ExpertFailed(f"the module returned {type(output).__name__} as {entry.path}, not a tensor")
        try:
            validate(self.schema.output_entries, outputs, rows=rows, what="outputs")
        except SchemaError as e:
            raise ExpertFailed(f"the module returned something else than its schema says: {e.message}") from None

    def _empty_outputs(self, task: Task) -> TaskResult:
        """Outputs for no rows: those of some rows of zeros, without the rows (a module need not take empty batches)."""
        some_rows = [
            t.new_zeros((DUMMY_BATCH_SIZE, *t.shape[1:])) if entry.proto.batched else t
            for entry, t in zip(task.entries, task.tensors)
        ]
        with _no_trace(self.module):
            outputs = self.forward(*some_rows, present=task.present)
        self._check_outputs(outputs, DUMMY_BATCH_SIZE)
        return [t[:0].cpu() if e.proto.batched else t.cpu() for e, t in zip(self.schema.output_entries, outputs)]

    # --- backward (Runtime thread) -----------------------------------------------------------------------------------

    def backward(
        self,
        *inputs: torch.Tensor,
        present: Sequence[str] = (),
        wants_grad: Sequence[bool] | None = None,
    ) -> tuple[torch.Tensor | None, ...]:
        """Run the module again with gradients, backpropagate, and train (``on_backward``). One batch, one step.

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

    def _run_backward(self, tasks: list[Task]) -> list[Outcome]:
        with self.step_lock:
            join = self._join_rows if self.schema.mergeable else None
            outcomes = run_isolated(tasks, self._compute_backward, join, self._parameter_gradients)
            trained = [t.rows for t, outcome in zip(tasks, outcomes) if not isinstance(outcome, BaseException)]
            if sum(trained) > 0:
                self.on_backward(sum(trained))
            return outcomes

    def _compute_backward(self, tasks: list[Task]) -> list[TaskResult]:
        """Gradients of these tasks; parameter gradients are added up, unless this raises: then they are as before."""
        if tasks[0].rows == 0:
            return [_zero_gradients(task) for task in tasks]
        if self.detect_anomalies:
            for task in tasks:
                self._refuse_non_finite(task.tensors, task.entries)
        kept, tasks[0].kept = tasks[0].kept, None
        if len(tasks) == 1 and kept is not None and kept.unchanged and kept.is_of(tasks[0].inputs):
            try:
                with self._parameter_gradients():
                    return to_cpu(self._finish_backward(tasks, [self._backward_kept(tasks[0], kept)]))
            except Exception as e:
                if is_device_lost(e) or isinstance(e, NonFiniteError):
                    raise
                logger.debug("%s: a forward that was kept is of no use (%r)", self.name, e)
        with self._parameter_gradients():
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
        into = [*wanted, *(p for p in self.module.parameters() if p.requires_grad)]
        if into:
            _backpropagate(kept.outputs, task.tensors[count:], task.entries[count:], into)
        self._thrift.used()
        return _gradients_of(kept.leaves, task.wants_grad)

    def _backward_lane(self, lane: list[Task]) -> list[TaskResult]:
        _check_shared(lane)
        first = lane[0]
        tensors = concatenate(first.entries, [task.tensors for task in lane])
        count = len(first.wants_grad)
        leaves = _leaves(tensors[:count], first.wants_grad)
        args, kwargs = self.schema.pack_inputs(leaves, first.present)
        with torch.enable_grad():
            outputs = self._call_module(args, kwargs)
            self._check_outputs(outputs, sum(task.rows for task in lane))
            _backpropagate(outputs, tensors[count:], first.entries[count:])
        grads = _gradients_of(leaves, first.wants_grad)
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
    def _parameter_gradients(self) -> Iterator[None]:
        """Let the body compute parameter gradients from none; add them to those of before, or drop them if it raises."""
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        before = [p.grad for p in parameters]
        for parameter in parameters:
            parameter.grad = None
        done = False
        try:
            with self._as_trained():
                yield
            done = True
        finally:
            for parameter, grad in zip(parameters, before):
                if grad is not None and parameter.grad is not None and done:
                    grad.add_(parameter.grad)
                if grad is not None or not done:
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
        if len(lanes) < 2:
            return False
        first = lanes[0][0]
        rows = [sum(task.rows for task in lane) for lane in lanes]
        small_enough = max(rows) * len(rows) <= MAX_PADDING * sum(rows)
        return small_enough and self._stackable.get((first.operation, first.present), True)

    def _try_stacked(
        self, lanes: list[list[Task]], run_stacked: Callable[[list[list[Task]]], list[TaskResult]]
    ) -> list[TaskResult] | None:
        """Run lanes in one launch, or None if that fails."""
        first = lanes[0][0]
        try:
            return run_stacked(lanes)
        except torch.OutOfMemoryError:
            raise
        except Exception as e:  # vmap says it in many ways: random numbers, control flow on data, in-place updates, ...
            logger.info("%s: its %s runs callers with own globals one by one (%r)", self.name, first.operation, e)
            return None

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
        def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            return tuple(self._call_module(*self.schema.pack_inputs(tensors, present)))

        return cast("Callable[..., tuple[torch.Tensor, ...]]", torch.func.vmap(call))

    def _forward_stacked(self, lanes: list[list[Task]]) -> list[TaskResult]:
        stacked, _, most = self._stack(lanes, grad=False)
        with torch.no_grad():
            outputs = self._vmapped(lanes[0][0].present)(*stacked)
        self._check_outputs([output[0] for output in outputs], most)
        return self._unstack(lanes, outputs, self.schema.output_entries)

    def _backward_stacked(self, lanes: list[list[Task]]) -> list[TaskResult]:
        first = lanes[0][0]
        stacked, _, most = self._stack(lanes, grad=True)
        count = len(first.wants_grad)
        leaves = _leaves(stacked[:count], first.wants_grad)
        try:
            with torch.enable_grad():
                outputs = self._vmapped(first.present)(*leaves)
                self._check_outputs([output[0] for output in outputs], most)
                _backpropagate(outputs, stacked[count:], first.entries[count:])
        except BaseException:
            for parameter in self.module.parameters():
                parameter.grad = None  # _parameter_gradients has put earlier ones aside
            raise
        return self._unstack(lanes, _gradients_of(leaves, first.wants_grad), first.entries[:count])

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
            self.updates = int(state_dict.get("moe", {}).get("updates", 0))

    def to(self, device: torch.device | str) -> None:
        """Move module and optimizer state to a device, in place."""
        with self.step_lock:
            self.module.to(device)
            if self.optimizer is not None:
                move_state(self.optimizer, device)


ModuleBackend = ExpertBackend  # hivemind's name


# --- helpers -----------------------------------------------------------------------------------------------------------------


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
    return [tensor.detach().requires_grad_(wanted) for tensor, wanted in zip(inputs, wants_grad)]


def _gradients_of(leaves: Sequence[torch.Tensor], wants_grad: Sequence[bool]) -> TaskResult:
    """Gradients of the leaves that want one: zeros where the outputs do not depend on them."""
    return [
        (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad) if wanted else None
        for leaf, wanted in zip(leaves, wants_grad)
    ]


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


@contextlib.contextmanager
def _no_trace(module: nn.Module) -> Iterator[None]:
    """Run a module without leaving a trace in it: buffers and random state as before, no gradients."""
    owners = list(module.modules())
    kept = [dict(owner._buffers) for owner in owners]
    values = {id(b): b.detach().clone() for buffers in kept for b in buffers.values() if b is not None}
    devices = {p.device.index or 0 for p in module.parameters() if p.device.type == "cuda"}
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        with torch.no_grad():
            for owner, buffers in zip(owners, kept):
                owner._buffers.clear()  # also of those that were made or replaced
                owner._buffers.update(buffers)
                for buffer in buffers.values():
                    if buffer is not None:
                        buffer.copy_(values[id(buffer)])


def _zeros_for(module: nn.Module, schema: ExpertSchema, rows: int, any_length: int) -> list[torch.Tensor]:
    """Flat inputs without the optional ones, where the module is."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return [
        proto.make_zeros(rows, any_length=any_length, device=device)
        if isinstance(proto, BatchTensorProto)
        else proto.make_zeros(any_length=any_length, device=device)
        for _, proto in schema.input_entries(())
    ]


def _infer_outputs(name: str, module: nn.Module, schema: ExpertSchema) -> Nested:
    """Find what a module returns from two dry runs of different batch size and different "any" lengths.

    An axis that follows the batch size is the batch axis, one that follows the lengths is any length. Optional kwargs are
    left out.
    """
    import optree

    shapes: list[list[torch.Tensor]] = []
    structure: Any = None
    for rows, length in zip((DUMMY_BATCH_SIZE, DUMMY_BATCH_SIZE - 1), _DRY_RUN_LENGTHS):
        args, kwargs = schema.pack_inputs(_zeros_for(module, schema, rows, length), ())
        try:
            with _no_trace(module):
                outputs = module(*args, **kwargs)
        except Exception as e:
            raise SchemaError(
                f"{name}: the dry run that finds outputs_schema failed with {type(e).__name__}: {e}. Check args_schema "
                f"and kwargs_schema, or pass outputs_schema"
            ) from e
        leaves, structure = optree.tree_flatten(outputs)
        if not leaves or not all(isinstance(leaf, torch.Tensor) for leaf in leaves):
            raise SchemaError(f"{name}: the module must return tensors, got {type(outputs).__name__}")
        shapes.append(leaves)
    protos: list[TensorProto] = []
    has_rows = any(entry.proto.batched for entry in schema.input_entries(()))
    if len(shapes[0]) != len(shapes[1]):
        raise SchemaError(f"{name}: {len(shapes[0])} outputs for 3 rows and {len(shapes[1])} for 2")
    for first, second in zip(*shapes):
        if first.ndim != second.ndim:
            raise SchemaError(f"{name}: an output has {first.ndim} axes for 3 rows and {second.ndim} for 2")
        batched = (
            has_rows
            and first.ndim > 0
            and (first.shape[0], second.shape[0]) == (DUMMY_BATCH_SIZE, DUMMY_BATCH_SIZE - 1)
        )
        kind = BatchTensorProto if batched else TensorProto
        pairs = zip(first.shape[batched:], second.shape[batched:])
        protos.append(kind(*(a if a == b else None for a, b in pairs), dtype=first.dtype))
    return optree.tree_unflatten(structure, cast(Any, protos))
