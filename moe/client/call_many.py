"""One call of many experts. Owns: what each of them is sent, and how their outputs and gradients come together.

Everything is flat tensors on CPU. Must not know: autograd, gating, or how experts were chosen.

Legend: B = rows of the batch, E = distinct experts, N = (row, expert) pairs grouped by expert.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from moe.client.expert import RemoteExpert
from moe.client.fan_out import Assignment, Indices, Quorum, fan_out
from moe.client.references import KeptRows
from moe.client.requests import Described, Gradients
from moe.errors import MoEError, NonFiniteError, ProtocolError, SchemaError, TooFewExperts
from moe.schema import Entry, ExpertSchema, validate
from moe.transport.base import Budget


class NonFiniteInput(NonFiniteError, ValueError):
    """The caller's own tensors have nan or inf; nothing was sent. A ValueError, as hivemind's users expect."""


@dataclass(frozen=True, eq=False)
class Request:
    """One expert and its rows of the inputs."""

    expert: RemoteExpert
    rows: torch.Tensor
    tensors: list[torch.Tensor]


@dataclass(frozen=True, eq=False)
class CallMany:
    """One call, forward and perhaps backward, without its tensors.

    :ivar number: tells calls of one mixture apart
    :ivar schema: what all these experts take and return
    :ivar present: names of the optional kwargs given
    :ivar assignment: which rows go to which expert
    :ivar experts: in the order of the assignment
    :ivar kept: by uid, which servers keep the inputs for the backward; None: there will be none
    """

    number: int
    schema: ExpertSchema
    present: tuple[str, ...]
    assignment: Assignment
    experts: tuple[RemoteExpert, ...]
    kept: dict[str, KeptRows] | None = None

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The inputs, flat."""
        return self.schema.input_entries(self.present)

    def quorum(self, needed_B: Indices, *, zeros_allowed: bool) -> Quorum:
        """Counts the answers of these experts."""
        return Quorum(self.assignment.rows_E, needed_B, zeros_allowed=zeros_allowed)

    def requests(self, inputs: Sequence[torch.Tensor]) -> list[Request]:
        """For each expert its rows of the inputs; global tensors whole."""
        requests = []
        for expert, rows in zip(self.experts, map(torch.from_numpy, self.assignment.rows_E)):
            own = [t.index_select(0, rows) if entry.proto.batched else t for entry, t in zip(self.entries, inputs)]
            requests.append(Request(expert, rows, own))
        return requests

    def keep(self, kept_E: Sequence[bool]) -> CallMany:
        """The same with these experts only."""
        experts = tuple(expert for expert, kept in zip(self.experts, kept_E) if kept)
        kept_N = np.array(kept_E, bool)[self.assignment.experts_N]
        return replace(self, assignment=self.assignment.keep(kept_N), experts=experts)

    # --- in the client's event loop ---------------------------------------------------------------------------------

    async def forward(
        self, requests: Sequence[Request], quorum: Quorum, budget: Budget, after_quorum_s: float | None
    ) -> list[list[torch.Tensor] | MoEError]:
        """Outputs of each expert for its rows, or why there are none."""
        timeout_s = budget.left_s()

        async def one(request: Request) -> list[torch.Tensor]:
            described = await request.expert.caller.describe(budget)
            if not _return_the_same(described[1], self.schema):
                raise SchemaError(f"it returns {described[1].outputs}, other experts {self.schema.outputs}")
            kept = None if self.kept is None else self.kept.setdefault(request.expert.uid, {})
            caller = request.expert.caller
            outputs = await caller.forward(request.tensors, self.present, budget, kept, described=described)
            validate(self.schema.output_entries, outputs, rows=len(request.rows), what="outputs")
            return outputs

        calls = [one(request) for request in requests]
        results = await fan_out(calls, quorum, timeout_s=timeout_s, after_quorum_s=after_quorum_s)
        return self._of_equal_sizes(results, quorum)

    def _of_equal_sizes(
        self, results: list[list[torch.Tensor] | MoEError], quorum: Quorum
    ) -> list[list[torch.Tensor] | MoEError]:
        """Lengths that a schema leaves open must be the same for all: those that most experts say, of as many the first."""
        sizes = [None if isinstance(r, MoEError) else tuple(output.shape[1:] for output in r) for r in results]
        counts = Counter(size for size in sizes if size is not None)
        if len(counts) < 2:
            return results
        common = counts.most_common(1)[0][0]
        for i, size in enumerate(sizes):
            if size is not None and size != common:
                message = f"its outputs have sizes {list(size)}, those of other experts {list(common)}"
                results[i] = ProtocolError(message, peer=self.experts[i].peer_id.to_base58(), uid=self.experts[i].uid)
                quorum.withdraw(i)
        return results

    async def backward(
        self,
        requests: Sequence[Request],
        grad_outputs: Sequence[torch.Tensor],
        wants: Sequence[bool],
        quorum: Quorum,
        budget: Budget,
        after_quorum_s: float | None,
    ) -> list[Gradients | MoEError]:
        """Gradients of each expert's inputs, or why there are none.

        :param grad_outputs: of the floating-point outputs, (N, ...)
        :param wants: which inputs want a gradient
        """
        timeout_s = budget.left_s()

        async def one(request: Request, grads: Sequence[torch.Tensor]) -> Gradients:
            caller = request.expert.caller
            described = await caller.describe(budget)
            if not described[0].trainable and not any(wants):
                return [None] * len(wants)
            kept = None if self.kept is None else self.kept.get(request.expert.uid)
            return await caller.backward(request.tensors, grads, self.present, wants, budget, kept, described=described)

        grads_E = zip(*(grad.split_with_sizes([len(r.rows) for r in requests]) for grad in grad_outputs))
        calls = [one(request, grads) for request, grads in zip(requests, grads_E)]
        return await fan_out(calls, quorum, timeout_s=timeout_s, after_quorum_s=after_quorum_s)

    # --- what came back ---------------------------------------------------------------------------------------------

    def join_outputs(
        self, outputs_E: Sequence[Sequence[torch.Tensor]], inputs: Sequence[torch.Tensor]
    ) -> list[torch.Tensor]:
        """Outputs of these experts, each (N, ...).

        :param inputs: of the call; if there are no experts, they tell how long an axis of any length is
        :raises TooFewExperts: there are no experts, and no axis of the input that is as long as the output's
        """
        if outputs_E:
            return [torch.cat(parts) for parts in zip(*outputs_E)]
        first, tensor = self.entries[0].proto, inputs[0]
        outputs = []
        for path, proto in self.schema.output_entries:
            sizes = [
                tensor.shape[axis + 1] if size is None and first.sizes[axis : axis + 1] == (None,) else size
                for axis, size in enumerate(proto.sizes)
            ]
            if None in sizes:
                raise TooFewExperts(f"no expert answered, and nobody else knows how long {path} is ({proto})")
            outputs.append(torch.zeros([0, *(size or 0 for size in sizes)], dtype=proto.dtype))
        return outputs

    def sum_gradients(
        self,
        requests: Sequence[Request],
        grads_E: Sequence[Gradients | MoEError],
        inputs: Sequence[torch.Tensor],
        wants: Sequence[bool],
    ) -> Gradients:
        """Gradients of all inputs: summed over experts, row by row, or as a whole if global to the call."""
        totals: Gradients = []
        for i, (entry, tensor, wanted) in enumerate(zip(self.entries, inputs, wants)):
            if not wanted:
                totals.append(None)
                continue
            total = torch.zeros(tensor.shape, dtype=torch.promote_types(tensor.dtype, torch.float32))
            for request, grads in zip(requests, grads_E):
                grad = None if isinstance(grads, MoEError) else grads[i]
                if grad is not None and entry.proto.batched:
                    total.index_add_(0, request.rows, grad.to(total.dtype))
                elif grad is not None:
                    total += grad
            totals.append(total)
        return totals


def _return_the_same(one: ExpertSchema, other: ExpertSchema) -> bool:
    """Are their outputs of the same kinds? Looked at before anything is sent, as one says how large its answer may be."""
    if one is other:
        return True
    outputs = [
        [(entry.path, entry.proto.batched, entry.proto.dtype, entry.proto.sizes) for entry in schema.output_entries]
        for schema in (one, other)
    ]
    return outputs[0] == outputs[1]


async def describe_any(
    experts: Sequence[RemoteExpert], budget: Budget, *, after_first_s: float = 0.0
) -> list[Described | MoEError]:
    """Ask all experts at once what they take; wait for the first one to tell.

    :param after_first_s: how long to wait for the others then
    """
    any_of_them = Quorum([np.zeros(1, np.int64)] * len(experts), np.ones(1, np.int64), zeros_allowed=False)
    timeout_s = budget.left_s()
    asked = [expert.caller.describe(budget) for expert in experts]
    return await fan_out(asked, any_of_them, timeout_s=timeout_s, after_quorum_s=after_first_s)


def check_mixable(
    schema: ExpertSchema, present: Sequence[str], inputs: Sequence[torch.Tensor], batch_size: int
) -> None:
    """Raise unless the inputs fit the schema, and the schema a mixture.

    :raises SchemaError: what does not fit
    """
    entries = schema.input_entries(present)
    if not entries[0].proto.batched:
        raise SchemaError(f"{entries[0].path} is global to the call, so that there are no rows to route")
    for entry in schema.output_entries:
        if not entry.proto.batched:
            raise SchemaError(f"{entry.path} is global to the call ({entry.proto}): such experts cannot be mixed")
    if not schema.output_entries:
        raise SchemaError("these experts return nothing that could be mixed")
    validate(entries, inputs, rows=batch_size)


def check_finite(entries: Sequence[Entry], tensors: Sequence[torch.Tensor], what: str) -> None:
    """Raise if a floating-point tensor has nan or inf.

    :raises NonFiniteInput: naming the first such tensor
    """
    for entry, tensor in zip(entries, tensors):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteInput(f"One of {what} has nan/inf values: {entry.path}")
