"""RemoteMixtureOfExperts: a local gate over remote experts. Owns: gating, mixing, and their gradients.

One beam search for a batch, one request per expert and pass: rows are grouped by expert, tensors that are global to the
call go to each expert whole. Who gets which row and how long to wait is ``fan_out``'s, requests and retries are
``ExpertCaller``'s, finding experts is the beam search's. Must not know: what is in the DHT, or how bytes travel.

Legend: B = rows of the batch, K = experts per row, E = distinct experts, N = (row, expert) pairs grouped by expert.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from moe.client.beam_search import MoEBeamSearcher
from moe.client.call_many import CallMany, NonFiniteInput, check_finite, check_mixable, describe_any
from moe.client.expert import RemoteExpert, from_wire, merge_kwargs, to_wire, transport_of
from moe.client.fan_out import Abandoned, Assignment, CutOff, Quorum, name_rows
from moe.client.references import KeptRows
from moe.client.remote_module import RemoteModule, check_differentiable, differentiable_once, untraced
from moe.client.requests import Gradients
from moe.config import ClientConfig, check_positive, replace_known
from moe.dht import check_dht
from moe.errors import ConfigError, MoEError, NoExpertsFound, ProtocolError, SchemaError, TooFewExperts
from moe.expert_uid import ExpertInfo
from moe.schema import ExpertSchema, Nested
from moe.transport.base import BACKWARD, FORWARD, Budget
from moe.transport.event_loop import client_loop

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = ClientConfig(max_retries=1)  # ours, not measured
MAX_REMEMBERED_EXPERTS = 4096  # whose description is kept; ours, a few KiB each
MAX_NAMED_EXPERTS = 8  # in a message
OTHER_OPINIONS_S = 2.0  # waited for what other experts say that they take, if it is not what the first one says; ours
RESOLVE_TIMEOUT_S = 15.0  # to learn from the DHT how to open connections; once per process


class BeamSearcher(Protocol):
    """What a mixture needs of its beam search; MoEBeamSearcher, unless told."""

    @property
    def uid_prefix(self) -> str:
        """What the uids of all experts begin with; ends with a dot."""
        ...

    @property
    def grid_size(self) -> Sequence[int]:
        """Size of each dimension."""
        ...

    def search(
        self, batch_scores: Sequence[Any], beam_size: int, *, timeout_s: float | None
    ) -> Sequence[Sequence[ExpertInfo]]:
        """The best live experts of each row, best first; never one with a coordinate scored -inf.

        :param batch_scores: for each dimension, scores of shape (B, size of the dimension)
        """
        ...

    def forget(self, uid: str) -> None:
        """This expert has failed; do not offer it again from memory."""
        ...

    def no_experts_found(self) -> NoExpertsFound:
        """What to raise when nobody was found."""
        ...


@dataclass(frozen=True, kw_only=True)
class MoEStatistics:
    """What the latest forward and its backward did.

    :ivar rows_per_expert: rows sent to each expert
    :ivar forward_failures: uid -> why it gave no outputs; its rows were mixed without it
    :ivar backward_failures: uid -> why it gave no gradients; it counted as a constant
    :ivar search_s: time for the beam search
    :ivar forward_s: time for the forward calls, from the end of the search to the last answer used
    :ivar backward_s: time for the backward calls; 0 before there was one
    :ivar total_forward_failures: since the module was made
    :ivar total_backward_failures: since the module was made
    """

    rows_per_expert: Mapping[str, int] = field(default_factory=dict)
    forward_failures: Mapping[str, str] = field(default_factory=dict)
    backward_failures: Mapping[str, str] = field(default_factory=dict)
    search_s: float = 0.0
    forward_s: float = 0.0
    backward_s: float = 0.0
    total_forward_failures: int = 0
    total_backward_failures: int = 0


class RemoteMixtureOfExperts(RemoteModule):
    """Mixes the outputs of the ``k_best`` remote experts that a local gate scores highest, row by row.

    An expert that fails in forward is left out of the mixture; one that fails in backward counts as a constant. Outputs
    and gradients come back on the device and in the dtype of the input.

    :param in_features: size of the input's last axis
    :param grid_size: dimensions of the grid of experts
    :param dht: where experts are searched, and what calls go through
    :param uid_prefix: experts are named ``{uid_prefix}.{0...grid_size[0]}.{0...grid_size[1]}...``
    :param k_best: experts per row
    :param k_min: experts that must answer, for each row
    :param forward_timeout: seconds for all of a forward: search, descriptions, requests; None: config.total_timeout_s
    :param timeout_after_k_min: seconds to wait for the rest once every row has k_min answers, in forward and in backward;
        with a k_min of 0 they begin at once. None: as long as the pass may take
    :param backward_k_min: experts that must give gradients, for each row
    :param backward_timeout: seconds for all of a backward; None: config.total_timeout_s
    :param detect_anomalies: refuse non-finite inputs and gradients; an expert that returns such has failed
    :param allow_zero_outputs: rows that no expert answers become zeros, whatever k_min says
    :param num_workers: of the beam search, see MoEBeamSearcher
    :param negative_caching: of the beam search
    :param cache_expiration: of the beam search
    :param config: deadlines and retries; by default those of ClientConfig, but one retry only, since an expert that keeps
        failing has others to stand in for it
    :param beam_search: chooses experts in place of a MoEBeamSearcher
    :raises ConfigError: settings that make no sense or contradict each other
    """

    shared = ("dht", "config", "beam_search", "_experts", "_typical", "_numbers")

    def __init__(
        self,
        *,
        in_features: int,
        grid_size: Sequence[int],
        dht: Any,
        uid_prefix: str,
        k_best: int,
        k_min: int = 1,
        forward_timeout: float | None = None,
        timeout_after_k_min: float | None = None,
        backward_k_min: int = 1,
        backward_timeout: float | None = None,
        detect_anomalies: bool = False,
        allow_zero_outputs: bool = False,
        num_workers: int | None = None,
        negative_caching: bool = True,
        cache_expiration: float = 30.0,
        config: ClientConfig | None = None,
        beam_search: BeamSearcher | None = None,
    ):
        super().__init__()
        check_dht(dht)
        self.dht = dht
        self.k_best, self.k_min, self.backward_k_min = k_best, k_min, backward_k_min
        self.forward_timeout, self.backward_timeout = forward_timeout, backward_timeout
        self.timeout_after_k_min = timeout_after_k_min
        self.allow_zero_outputs = allow_zero_outputs
        check_positive(self, "k_best", allow_none=False)
        check_positive(self, "k_min", "backward_k_min", allow_none=False, allow_zero=True)
        check_positive(self, "forward_timeout", "backward_timeout")
        check_positive(self, "timeout_after_k_min", allow_zero=True)
        if max(k_min, backward_k_min) > k_best:
            raise ConfigError(f"k_min={k_min} and backward_k_min={backward_k_min} cannot exceed k_best={k_best}")
        self.config: ClientConfig = replace_known(config or DEFAULT_CONFIG, detect_anomalies=detect_anomalies or None)
        self.detect_anomalies = self.config.detect_anomalies
        self.beam_search: BeamSearcher = beam_search or MoEBeamSearcher(
            dht, uid_prefix, tuple(grid_size), num_workers, negative_caching, cache_expiration
        )
        self.proj = nn.Linear(in_features, sum(grid_size))  # logits for all dimensions of the grid
        self._experts: dict[ExpertInfo, RemoteExpert] = {}  # least recently used first
        self._typical: tuple[RemoteExpert, ExpertSchema] | None = None  # whose description stands for all
        self._statistics = MoEStatistics()
        self._numbers = itertools.count(1)  # of calls
        self._latest_call = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> RemoteMixtureOfExperts:
        copied = super().__deepcopy__(memo)
        copied._experts = dict(self._experts)
        return copied

    def extra_repr(self) -> str:
        """For repr."""
        grid = f"uid_prefix={self.beam_search.uid_prefix!r}, grid_size={tuple(self.beam_search.grid_size)}"
        return f"{grid}, k_best={self.k_best}, k_min={self.k_min}"

    def statistics(self) -> MoEStatistics:
        """What the latest forward and its backward did."""
        return self._statistics

    @property
    def info(self) -> dict[str, Any]:
        """What the experts take and return, as ``RemoteExpert.info`` of one of them.

        :raises NoExpertsFound: there are none
        """
        return self._describe_any(self._forward_budget())[0].info

    def refresh_info(self) -> None:
        """Ask the experts again, on the next call, what they take."""
        self._experts.clear()
        self._typical = None

    # --- forward ----------------------------------------------------------------------------------------------------

    @untraced
    def forward(
        self,
        input: torch.Tensor,
        *args: Nested,
        batch_kwargs: Mapping[str, Nested] | None = None,
        global_kwargs: Mapping[str, Nested] | None = None,
        **kwargs: Nested,
    ) -> Nested:
        """Choose experts for each row, call them, and average what they return by the gate's softmax.

        :param input: first argument of the experts, (B, ..., in_features); the gate sees its mean over the middle axes
        :param args: further arguments of the experts
        :param batch_kwargs: kwargs that you hold to be batched; checked against the experts' schema
        :param global_kwargs: kwargs that you hold to be global to the call; checked likewise
        :param kwargs: keyword inputs; batched ones are dispatched with their rows, global ones go to every expert whole
        :returns: averaged outputs, nested as the experts return them
        :raises SchemaError: inputs that do not fit, before anything is sent
        :raises Unsupported: a derivative is wanted that servers do not compute
        :raises NoExpertsFound: no live expert is known
        :raises TooFewExperts: fewer than k_min answered for some rows
        """
        grid_scores = self._grid_scores(self._gating_input(input))
        answers = self._call_experts(grid_scores, (input, *args), kwargs, batch_kwargs, global_kwargs)
        scores_N = self._pair_scores(grid_scores, answers.assignment)
        return answers.schema.pack_outputs(answers.mix(_softmax_by_row(scores_N, answers.assignment)))

    def compute_expert_scores(
        self, grid_scores: Sequence[torch.Tensor], batch_experts: Sequence[Sequence[Any]]
    ) -> torch.Tensor:
        """Scores of chosen experts, from those of the grid; differentiable.

        :param grid_scores: for each dimension, (B, size)
        :param batch_experts: for each row, up to K experts (whatever has a ``uid``)
        :returns: (B, K); where a row has fewer experts, -inf
        """
        assignment = Assignment.of(batch_experts, self.beam_search.uid_prefix, len(grid_scores))
        return _as_table(self._pair_scores(grid_scores, assignment), assignment)

    def _gating_input(self, input: torch.Tensor) -> torch.Tensor:
        """(B, in_features), in the gate's own dtype."""
        if not isinstance(input, torch.Tensor) or input.ndim < 2 or input.shape[-1] != self.proj.in_features:
            what = tuple(input.shape) if isinstance(input, torch.Tensor) else type(input).__name__
            raise SchemaError(f"input: expected a tensor (batch, ..., {self.proj.in_features}), got {what}")
        if self.detect_anomalies and not input.isfinite().all():
            raise NonFiniteInput("One of inputs has nan/inf values: input")
        if input.ndim == 2:
            return input.to(self.proj.weight.dtype)
        return input.mean(dim=tuple(range(1, input.ndim - 1)), dtype=self.proj.weight.dtype)

    def _grid_scores(self, gating_input: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """For each dimension, (B, size); at least float32, for softmax and numpy."""
        scores: torch.Tensor = self.proj(gating_input)
        scores = scores.float() if scores.itemsize < 4 else scores
        return scores.split_with_sizes(list(self.beam_search.grid_size), dim=-1)

    def _pair_scores(self, grid_scores: Sequence[torch.Tensor], assignment: Assignment) -> torch.Tensor:
        """(N,): the score of each pair, the sum over dimensions."""
        return gather_by_dim(grid_scores, assignment).sum(0)

    # --- calling experts --------------------------------------------------------------------------------------------

    def _call_experts(
        self,
        grid_scores: Sequence[torch.Tensor],
        args: tuple[Nested, ...],
        kwargs: Mapping[str, Nested],
        batch_kwargs: Mapping[str, Nested] | None,
        global_kwargs: Mapping[str, Nested] | None,
    ) -> Answers:
        """Find the best experts of each row and call them; gradients flow from the answers to args and kwargs."""
        check_differentiable([arg for arg in args if isinstance(arg, torch.Tensor)], grad=torch.is_grad_enabled())
        budget, started = self._forward_budget(), time.perf_counter()
        assignment = self._search(grid_scores, budget)
        searched = time.perf_counter()
        experts = self._remote_experts(assignment.experts_E, budget)

        def bind(schema: ExpertSchema) -> _Bound:
            present, tensors = schema.bind(args, merge_kwargs(schema, kwargs, batch_kwargs, global_kwargs))
            sent = to_wire(schema, present, tensors)
            check_mixable(schema, present, sent, assignment.batch_size)
            return _Bound(schema, present, tensors, sent)

        bound = self._bind(bind, experts, budget)
        call, quorum, outputs_E, failures = self._ask(bound, assignment, experts, budget)
        nobody = experts and all(isinstance(outputs, MoEError) for outputs in outputs_E)
        if nobody and self._typical is None:  # perhaps since the one that has told what all return told a lie
            other = self._bind_otherwise(bound.schema, bind, experts, budget)
            if other is not None:
                bound = other
                call, quorum, outputs_E, failures = self._ask(bound, assignment, experts, budget)
        self._latest_call = call.number
        self._statistics = MoEStatistics(
            rows_per_expert={expert.uid: len(rows) for expert, rows in zip(experts, assignment.rows_E)},
            forward_failures={uid: str(error) for uid, error in failures.items()},
            search_s=searched - started,
            forward_s=time.perf_counter() - searched,
            total_forward_failures=self._statistics.total_forward_failures + len(failures),
            total_backward_failures=self._statistics.total_backward_failures,
        )
        self._check_quorum(quorum, FORWARD, self._forward_k_min, failures)

        answered_call = call.keep([not isinstance(outputs, MoEError) for outputs in outputs_E])
        flat = answered_call.join_outputs([o for o in outputs_E if not isinstance(o, MoEError)], bound.sent)
        tensors = bound.tensors
        outputs = _attach(self, answered_call, [output.to(tensors[0].device) for output in flat], tensors)
        return Answers(answered_call.assignment, bound.schema, outputs, tensors[0].dtype)

    def _ask(
        self, bound: _Bound, assignment: Assignment, experts: Sequence[RemoteExpert], budget: Budget
    ) -> tuple[CallMany, Quorum, list[list[torch.Tensor] | MoEError], dict[str, MoEError]]:
        """Call the experts: the call, who has answered which rows, outputs of each expert or why there are none, failures."""
        grad = torch.is_grad_enabled() and (any(map(_trains, experts)) or any(t.requires_grad for t in bound.tensors))
        check_differentiable(bound.tensors, grad=grad)
        kept: dict[str, KeptRows] | None = {} if grad else None
        call = CallMany(next(self._numbers), bound.schema, bound.present, assignment, tuple(experts), kept)
        if self.detect_anomalies:
            check_finite(call.entries, bound.sent, "inputs")
        needed_B = np.full(assignment.batch_size, self._forward_k_min)
        quorum = call.quorum(needed_B, zeros_allowed=self.allow_zero_outputs)
        requests = call.requests(bound.sent)
        outputs_E = client_loop().run(call.forward(requests, quorum, budget, self.timeout_after_k_min))
        return call, quorum, outputs_E, self._note_failures(experts, outputs_E, FORWARD)

    @property
    def _forward_k_min(self) -> int:
        return self.k_min if self.allow_zero_outputs else max(self.k_min, 1)

    def _forward_budget(self) -> Budget:
        return Budget(self.config.total_timeout_s if self.forward_timeout is None else self.forward_timeout)

    def _search(self, grid_scores: Sequence[torch.Tensor], budget: Budget) -> Assignment:
        """The best experts of each row."""
        scores = [dim_scores.detach().cpu().numpy() for dim_scores in grid_scores]
        chosen: Sequence[Sequence[ExpertInfo]] = []
        if len(scores[0]) > 0:
            chosen = self.beam_search.search(scores, self.k_best, timeout_s=budget.left_s())
            if not self.allow_zero_outputs and not any(chosen):
                raise self.beam_search.no_experts_found()
        return Assignment.of(chosen, self.beam_search.uid_prefix, len(scores))

    def _remote_experts(self, infos: Sequence[ExpertInfo], budget: Budget) -> list[RemoteExpert]:
        """Experts that were called before are kept, so that each has to be asked only once what it takes."""
        timeout_s = budget.left_s(RESOLVE_TIMEOUT_S) or RESOLVE_TIMEOUT_S
        transport = transport_of(self.dht, self.config.transport, timeout_s)
        experts = []
        for info in infos:
            expert = self._experts.pop(info, None) or RemoteExpert(info, transport, config=self.config)
            self._experts[info] = expert
            experts.append(expert)
        for info in list(self._experts)[: max(0, len(self._experts) - MAX_REMEMBERED_EXPERTS)]:
            self._experts.pop(info, None)  # another thread may have done so
        return experts

    def _bind(self, bind: Callable[[ExpertSchema], _Bound], experts: Sequence[RemoteExpert], budget: Budget) -> _Bound:
        """The call's tensors, matched to what the experts take. If they do not fit what one expert has told, they may fit what
        the others tell."""
        schema = self._describe(experts, budget)
        try:
            return bind(schema)
        except SchemaError:
            bound = self._bind_otherwise(schema, bind, experts, budget)
            if bound is None:
                raise
            return bound

    def _bind_otherwise(
        self,
        schema: ExpertSchema,
        bind: Callable[[ExpertSchema], _Bound],
        experts: Sequence[RemoteExpert],
        budget: Budget,
    ) -> _Bound | None:
        for expert, other in self._described_otherwise(schema, experts, budget):
            with contextlib.suppress(SchemaError):
                bound = bind(other)
                self._typical = expert, other
                return bound
        return None

    def _describe(self, experts: Sequence[RemoteExpert], budget: Budget) -> ExpertSchema:
        """The schema that calls are matched to: that of the first expert to tell."""
        typical = self._typical
        if typical is None:
            if not experts:
                return self._describe_any(budget)[1]
            described = client_loop().run(describe_any(experts, budget))
            for expert, known in zip(experts, described):
                if not isinstance(known, MoEError):
                    self._typical = expert, known[1]
                    return known[1]
            error = next(iter(self._note_failures(experts, described, "info").values()))
            raise TooFewExperts(
                f"none of {len(experts)} experts that were found says what it takes: {error}"
            ) from error
        return typical[1]

    @staticmethod
    def _described_otherwise(
        schema: ExpertSchema, experts: Sequence[RemoteExpert], budget: Budget
    ) -> list[tuple[RemoteExpert, ExpertSchema]]:
        """Other schemas that experts tell, those of most experts first, and one expert of each."""
        if len(experts) < 2:
            return []
        others: list[list[tuple[RemoteExpert, ExpertSchema]]] = []
        described = client_loop().run(describe_any(experts, budget, after_first_s=OTHER_OPINIONS_S))
        for expert, known in zip(experts, described):
            if isinstance(known, MoEError) or known[1] == schema:
                continue
            same = next((group for group in others if group[0][1] == known[1]), None)
            if same is None:
                others.append([(expert, known[1])])
            else:
                same.append((expert, known[1]))
        return [group[0] for group in sorted(others, key=len, reverse=True)]

    def _describe_any(self, budget: Budget) -> tuple[RemoteExpert, ExpertSchema]:
        typical = self._typical
        if typical is None:
            scores = [np.zeros((1, size), np.float32) for size in self.beam_search.grid_size]
            (found,) = self.beam_search.search(scores, 1, timeout_s=budget.left_s())
            if not found:
                raise self.beam_search.no_experts_found()
            experts = self._remote_experts(found, budget)
            typical = experts[0], self._describe(experts, budget)
        return typical

    def _note_failures(
        self, experts: Sequence[RemoteExpert], results: Sequence[Any], stage: str
    ) -> dict[str, MoEError]:
        """Warn about experts that failed, and forget what we know of them."""
        failures = {}
        for expert, error in zip(experts, results):
            if not isinstance(error, MoEError) or isinstance(error, Abandoned):
                continue
            failures[expert.uid] = error
            if isinstance(error, CutOff):
                continue  # slow, perhaps, but nothing is wrong with it
            self._experts.pop(ExpertInfo(expert.uid, expert.peer_id), None)
            self.beam_search.forget(expert.uid)
            if isinstance(error, (SchemaError, ProtocolError)):
                self._typical = None  # experts may have changed; ask again
        if failures:
            logger.warning("%s: %d of %d experts failed: %s", stage, len(failures), len(experts), _reasons(failures))
        return failures

    @staticmethod
    def _check_quorum(quorum: Quorum, stage: str, k_min: int, failures: Mapping[str, MoEError]) -> None:
        short = quorum.short_rows()
        if len(short):
            message = f"{stage}: fewer than {k_min} experts answered for rows {name_rows(short)}"
            reasons = _reasons(failures) or "no more were found"
            raise TooFewExperts(f"{message} ({reasons})") from next(iter(failures.values()), None)

    # --- backward ---------------------------------------------------------------------------------------------------

    def _backward(
        self,
        call: CallMany,
        inputs: Sequence[torch.Tensor],
        grad_outputs: Sequence[torch.Tensor],
        wants: Sequence[bool],
    ) -> Gradients:
        """Gradients of all inputs, summed over experts. Experts that fail contribute none."""
        budget = Budget(self.config.total_timeout_s if self.backward_timeout is None else self.backward_timeout)
        started = time.perf_counter()
        outputs = [(e, grad) for e, grad in zip(call.schema.output_entries, grad_outputs) if e.proto.is_floating_point]
        grads = [grad.detach().to("cpu", entry.proto.dtype).contiguous() for entry, grad in outputs]
        if self.detect_anomalies:
            check_finite([entry for entry, _ in outputs], grads, "gradients")
        sent = to_wire(call.schema, call.present, inputs)
        requests = call.requests(sent)
        served_B = np.bincount(call.assignment.rows_N, minlength=call.assignment.batch_size) > 0
        quorum = call.quorum(np.where(served_B, self.backward_k_min, 0), zeros_allowed=False)
        grads_E = client_loop().run(call.backward(requests, grads, wants, quorum, budget, self.timeout_after_k_min))
        failures = self._note_failures(call.experts, grads_E, BACKWARD)
        statistics = self._statistics
        if call.number == self._latest_call:
            reasons = {uid: str(error) for uid, error in failures.items()}
            statistics = replace(statistics, backward_failures=reasons, backward_s=time.perf_counter() - started)
        total = statistics.total_backward_failures + len(failures)
        self._statistics = replace(statistics, total_backward_failures=total)
        self._check_quorum(quorum, BACKWARD, self.backward_k_min, failures)
        return call.sum_gradients(requests, grads_E, sent, wants)


def _reasons(failures: Mapping[str, MoEError]) -> str:
    """Why experts failed, in one line of bounded length."""
    brief = [f"{uid}: {type(error).__name__}: {error.message:.120}" for uid, error in failures.items()]
    more = f"; and {len(brief) - MAX_NAMED_EXPERTS} more" if len(brief) > MAX_NAMED_EXPERTS else ""
    return " ".join("; ".join(brief[:MAX_NAMED_EXPERTS]).split()) + more


class _Bound(NamedTuple):
    """The tensors of a call, matched to a schema.

    :ivar present: the optional kwargs given
    :ivar tensors: flat, as they are
    :ivar sent: as they are sent
    """

    schema: ExpertSchema
    present: tuple[str, ...]
    tensors: list[torch.Tensor]
    sent: list[torch.Tensor]


def _trains(expert: RemoteExpert) -> bool:
    """Does it want gradients for itself? Perhaps, as long as it has not told."""
    known = expert.caller.known
    return known is None or known[0].trainable


# --- between the calls and the module ----------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Answers:
    """What experts returned, with autograd.

    :ivar assignment: the pairs that were answered
    :ivar outputs: flat outputs, each (N, ...)
    :ivar dtype: of the caller's input
    """

    assignment: Assignment
    schema: ExpertSchema
    outputs: Sequence[torch.Tensor]
    dtype: torch.dtype

    def mix(self, weights_N: torch.Tensor) -> list[torch.Tensor]:
        """For each output, the weighted sum over each row's pairs: (B, ...). Zeros for rows without any."""
        dtype = self.dtype if self.dtype.is_floating_point else weights_N.dtype
        mixed = []
        for output in self.outputs:
            weighted = output * weights_N.view(-1, *[1] * (output.ndim - 1))
            rows_N = torch.from_numpy(self.assignment.rows_N).to(output.device)
            zeros = weighted.new_zeros((self.assignment.batch_size, *output.shape[1:]))
            mixed.append(zeros.index_add(0, rows_N, weighted).to(dtype))
        return mixed


def _attach(
    owner: RemoteMixtureOfExperts, call: CallMany, answers: list[torch.Tensor], inputs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, ...]:
    """The answers as results of the inputs they were computed from."""
    trainable = any(map(_trains, call.experts))
    trigger = torch.empty(0, requires_grad=trainable)  # calls backward although no input requires a gradient
    attached: tuple[torch.Tensor, ...] = _MixtureCall.apply(trigger, owner, call, answers, *inputs)  # type: ignore[no-untyped-call]
    return attached


class _MixtureCall(torch.autograd.Function):
    """Computes nothing; its backward calls the experts again."""

    @staticmethod
    def forward(
        ctx: Any,
        trigger: torch.Tensor,
        owner: RemoteMixtureOfExperts,
        call: CallMany,
        answers: list[torch.Tensor],
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.owner, ctx.call = owner, call
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(answer for answer in answers if not answer.is_floating_point()))
        return tuple(answers)

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, inputs: tuple[torch.Tensor, ...], *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        wants = [needed and tensor.is_floating_point() for needed, tensor in zip(ctx.needs_input_grad[4:], inputs)]
        grads = ctx.owner._backward(ctx.call, inputs, grad_outputs, wants)
        return (None, None, None, None, *from_wire(grads, inputs))


# --- tensors -------------------------------------------------------------------------------------------------------


def gather_by_dim(grid_scores: Sequence[torch.Tensor], assignment: Assignment) -> torch.Tensor:
    """(D, N): for each dimension, the score of each pair's coordinate."""
    device = grid_scores[0].device
    rows_N = torch.from_numpy(assignment.rows_N).to(device)
    coordinates_DN = torch.from_numpy(assignment.coordinates_ND.T.copy()).to(device)
    return torch.stack([scores[rows_N, index_N] for scores, index_N in zip(grid_scores, coordinates_DN)])


def _as_table(scores_N: torch.Tensor, assignment: Assignment) -> torch.Tensor:
    """(N,) -> (B, K), with -inf where there is no pair."""
    rows_N, slots_N = (torch.from_numpy(index).to(scores_N.device) for index in (assignment.rows_N, assignment.slots_N))
    table = scores_N.new_full((assignment.batch_size, assignment.width), -torch.inf)
    return table.index_put((rows_N, slots_N), scores_N)


def _softmax_by_row(scores_N: torch.Tensor, assignment: Assignment) -> torch.Tensor:
    """(N,): softmax over the pairs of each row. A row without pairs is given some, lest -inf alone turn into nan."""
    rows_N, slots_N = (torch.from_numpy(index).to(scores_N.device) for index in (assignment.rows_N, assignment.slots_N))
    table = _as_table(scores_N, assignment)
    answered = torch.zeros(assignment.batch_size, 1, dtype=torch.bool, device=table.device)
    answered[rows_N] = True
    return table.where(answered, 0.0).softmax(dim=1)[rows_N, slots_N]
