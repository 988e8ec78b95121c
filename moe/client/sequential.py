"""RemoteSequential: blocks on other machines, one after another, as one differentiable module. Owns: which blocks, which
kwargs each gets, autograd, devices and dtypes.

Must not know: which servers there are, how a call travels, or what a block computes: a call's way through the blocks is
``SequenceCaller``'s.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch

from moe.chains import Block, Chain
from moe.client.expert import (
    SEARCH_TIMEOUT_S,
    RemoteExpert,
    create_remote_experts,
    from_wire,
    grad_trigger,
    merge_kwargs,
    transport_of,
)
from moe.client.remote_module import RemoteModule, check_differentiable, differentiable_once, untraced
from moe.client.requests import Described
from moe.client.sequence_calls import Journey, SequenceCaller
from moe.client.sequence_manager import SequenceManager
from moe.client.spans import KnownBlocks, SpanCaller
from moe.config import ClientConfig
from moe.dht import check_dht, find_experts
from moe.errors import ConfigError, MissingBlocks, SchemaError
from moe.expert_uid import UID_DELIMITER, is_valid_uid
from moe.schema import ExpertSchema, Nested, cast_inputs, count_rows
from moe.transport.base import Budget
from moe.transport.event_loop import client_loop


class RemoteSequential(RemoteModule):
    """Consecutive blocks hosted by any peers: ``y = blocks[n-1](... blocks[0](h, **kwargs) ..., **kwargs)``.

    Blocks next to each other on one server are run in one request. A server that fails in forward, between forward and
    backward, or in backward costs a retry over other servers, at most ``config.max_retries`` of them, and changes no result.
    Large batches are split (``config.max_tokens_per_request``), and their parts go their own ways at the same time.

    :param dht: a running DHT node
    :param uids: the blocks in order; give either these, or ``prefix`` and ``num_blocks``
    :param prefix: such as ``block.``: the blocks are ``block.0``, ``block.1``, ...
    :param num_blocks: how many
    :param config: deadlines, retries and routing; ``total_timeout_s`` is for a whole forward (or backward) over all blocks
    :param manager: knows the servers of exactly these blocks; default: one of its own, which ends with this module
    :raises ConfigError: neither or both ways to say which blocks, an invalid uid, or addresses in place of a DHT
    """

    shared = ("dht", "uids", "config", "_shared", "_caller")

    def __init__(
        self,
        dht: Any,
        uids: Sequence[str] | None = None,
        *,
        prefix: str | None = None,
        num_blocks: int | None = None,
        config: ClientConfig | None = None,
        manager: SequenceManager | None = None,
    ):
        super().__init__()
        check_dht(dht)
        self.uids = _uids(uids, prefix, num_blocks)
        self.dht, self.config = dht, config or ClientConfig()
        self._shared = _Shared(self.uids, manager)
        self._offset = 0  # of our first block among those of ``_shared``
        self._caller: SequenceCaller | None = None

    def extra_repr(self) -> str:
        """For repr."""
        return f"{len(self)} blocks: {self.uids[0]} ... {self.uids[-1]}"

    def __len__(self) -> int:
        return len(self.uids)

    @overload
    def __getitem__(self, index: int) -> RemoteExpert: ...

    @overload
    def __getitem__(self, index: slice) -> RemoteSequential: ...

    def __getitem__(self, index: int | slice) -> RemoteExpert | RemoteSequential:
        """One block, or a sequence of some of them; what is known of them is shared."""
        if isinstance(index, int):
            return self._find([self.uids[index]], Budget(self.config.total_timeout_s))[0]
        part = RemoteSequential(self.dht, self.uids[index], config=self.config)
        chosen = range(len(self))[index]
        if chosen.step == 1:
            part._shared, part._offset = self._shared, self._offset + chosen.start
        else:  # another order of blocks: other routes, the same blocks
            part._shared.known, part._shared.experts = self._shared.known, self._shared.experts
        return part

    def __iter__(self) -> Iterator[RemoteExpert]:
        return iter(self._find(self.uids, Budget(self.config.total_timeout_s)))

    def schemas(self) -> list[ExpertSchema]:
        """What each block takes and returns, as servers tell it.

        :raises MissingBlocks: blocks without a live server
        :raises MoEError: no answer within the retries and the time budget
        """
        caller = self._get_caller()
        described = caller.known or client_loop().run(caller.describe(Budget(self.config.total_timeout_s)))
        return [schema for _, schema in described]

    def refresh(self) -> None:
        """Look all blocks up, and ask what they take, again on next use."""
        self._shared.known.clear()
        self._shared.experts.clear()
        if self._shared.manager is not None:
            self._shared.manager.request_refresh()

    @untraced
    def forward(
        self,
        *args: Nested,
        block_kwargs: Sequence[Mapping[str, Nested]] | None = None,
        batch_kwargs: Mapping[str, Nested] | None = None,
        global_kwargs: Mapping[str, Nested] | None = None,
        **kwargs: Nested,
    ) -> Nested:
        """Run all blocks.

        A batched kwarg of exactly one row is used for every row. Each tensor travels once to each server that needs it, however
        many of its blocks take it.

        :param args: inputs of the first block; what a block returns is what the next one gets (a tuple: several inputs)
        :param kwargs: for every block; gradients are summed over the blocks
        :param block_kwargs: one dict per block, for that block only; gradients per block
        :param batch_kwargs: kwargs for every block that you hold to be batched; checked against the schemas
        :param global_kwargs: kwargs for every block that you hold to be global; checked against the schemas
        :returns: what the last block returns, on the device of the first input
        :raises SchemaError: another number of dicts than blocks, a kwarg given twice, or inputs that do not fit a block
        :raises Unsupported: a derivative is wanted that servers do not compute
        :raises MissingBlocks: blocks without a live server
        :raises MoEError: no answer within the retries and the time budget; lists each attempt
        """
        budget = Budget(self.config.total_timeout_s)
        own = self._own_kwargs(kwargs, block_kwargs)
        caller = self._get_caller()
        described = caller.known or client_loop().run(caller.describe(budget))

        def bound(described: Sequence[Described]) -> tuple[Chain, list[torch.Tensor]]:
            per_block = []
            for uid, (_, schema), extra in zip(self.uids, described, own):
                try:
                    per_block.append(merge_kwargs(schema, {**kwargs, **extra}, batch_kwargs, global_kwargs))
                except SchemaError as e:
                    raise SchemaError(e.message, uid=uid) from None
            return bind(self.uids, described, args, per_block)

        try:
            chain, tensors = bound(described)
        except SchemaError as e:  # a server that has told what its blocks take may be the one that is wrong
            others = client_loop().run(caller.describe_otherwise(described, budget))
            if others is None:
                raise
            try:
                chain, tensors = bound(others)
            except SchemaError:
                raise e from None
            described = others
            caller.believe(others)
        call = _Call(caller, chain, tuple(description.trainable for description, _ in described))
        grad = torch.is_grad_enabled() and (any(call.trainable) or any(tensor.requires_grad for tensor in tensors))
        check_differentiable(tensors, grad=grad)
        if grad:
            apply: Callable[..., tuple[torch.Tensor, ...]] = _RemoteSequentialCall.apply
            outputs = apply(grad_trigger(any(call.trainable)), call, budget, *tensors)
        else:
            outputs = call.forward(tensors, budget, keep=False)[0]
        return described[-1][1].pack_outputs(outputs)

    def _own_kwargs(
        self, kwargs: Mapping[str, Nested], block_kwargs: Sequence[Mapping[str, Nested]] | None
    ) -> Sequence[Mapping[str, Nested]]:
        own = [{} for _ in self.uids] if block_kwargs is None else list(block_kwargs)
        if len(own) != len(self):
            raise SchemaError(f"block_kwargs: expected {len(self)} dicts, one per block, got {len(own)}")
        for uid, extra in zip(self.uids, own):
            if not isinstance(extra, Mapping):
                raise SchemaError(f"block_kwargs: expected a dict per block, got {type(extra).__name__}", uid=uid)
            twice = kwargs.keys() & extra.keys()
            if twice:
                raise SchemaError(f"kwargs {sorted(twice)} are given for all blocks and for one", uid=uid)
        return own

    def _get_caller(self) -> SequenceCaller:
        if self._caller is None:
            manager = self._shared.get_manager(self.dht, self.config)
            transport = transport_of(self.dht, self.config.transport)
            spans = SpanCaller(transport, self.config, self._shared.known)
            self._caller = SequenceCaller(self.uids, manager, spans, self.config, offset=self._offset)
        return self._caller

    def _find(self, uids: Sequence[str], budget: Budget) -> list[RemoteExpert]:
        experts = self._shared.experts
        unknown = [uid for uid in dict.fromkeys(uids) if uid not in experts]
        if unknown:
            timeout_s = budget.left_s(SEARCH_TIMEOUT_S)
            found = find_experts(self.dht, unknown, timeout_s=timeout_s or SEARCH_TIMEOUT_S)
            missing = [uid for uid, expert in zip(unknown, found) if expert is None]
            if missing:
                raise MissingBlocks(f"no live server for {len(missing)} of {len(self)} blocks: {', '.join(missing)}")
            experts.update(zip(unknown, create_remote_experts(found, self.dht, config=self.config)))
        return [experts[uid] for uid in uids]


class _Shared:
    """What a sequence and its slices have in common: the manager of all its blocks, and what is known of these."""

    def __init__(self, uids: tuple[str, ...], manager: SequenceManager | None):
        self.uids, self.manager = uids, manager
        self.known = KnownBlocks()
        self.experts: dict[str, RemoteExpert] = {}  # not submodules: they have no parameters here
        self._making = threading.Lock()

    def get_manager(self, dht: Any, config: ClientConfig) -> SequenceManager:
        with self._making:
            if self.manager is None:
                self.manager = SequenceManager(dht, self.uids, config)
                weakref.finalize(self, self.manager.close).atexit = False
            return self.manager


def _uids(uids: Sequence[str] | None, prefix: str | None, num_blocks: int | None) -> tuple[str, ...]:
    by_prefix = prefix is not None and num_blocks is not None
    if (uids is None) != by_prefix or (uids is not None and (prefix is not None or num_blocks is not None)):
        raise ConfigError("RemoteSequential takes either uids=[...] or both prefix= and num_blocks=")
    if isinstance(uids, str):
        raise ConfigError(f"uids is a list of uids, got the string {uids!r}")
    if uids is None:
        assert prefix is not None
        assert num_blocks is not None
        stem = prefix if prefix.endswith(UID_DELIMITER) else prefix + UID_DELIMITER
        uids = [f"{stem}{i}" for i in range(num_blocks)]
    invalid = [uid for uid in uids if not is_valid_uid(uid)]
    if invalid or not uids:
        raise ConfigError(f"invalid uids of blocks: {invalid}" if invalid else "a sequence has at least one block")
    return tuple(uids)


# --- arguments -----------------------------------------------------------------------------------------------------------


def bind(
    uids: Sequence[str],
    described: Sequence[Described],
    args: Sequence[Nested],
    per_block: Sequence[Mapping[str, Nested]],
) -> tuple[Chain, list[torch.Tensor]]:
    """Match a call's arguments to the schemas of all blocks.

    :param args: of the first block
    :param per_block: all kwargs of each block
    :returns: which block takes which tensor, and the tensors as they were given, each once; those of one row are expanded
    :raises SchemaError: naming the first thing that does not fit, and whose it is
    """
    tensors: list[torch.Tensor] = []
    positions: dict[tuple[int, bool, torch.dtype | None], int] = {}
    blocks: list[Block] = []
    for uid, (description, schema), kwargs in zip(uids, described, per_block):
        try:
            if not blocks:
                present, flat = schema.bind(args, kwargs)
                tensors, flat = flat[: len(schema.arg_entries)], flat[len(schema.arg_entries) :]
            else:
                present, flat = schema.bind_kwargs(kwargs)
        except SchemaError as e:
            hint = "" if description.native else " (a stock hivemind server, which takes no global or optional kwargs)"
            raise SchemaError(f"{e.message}{hint}", uid=uid) from None
        taken = []
        for tensor, entry in zip(flat, schema.input_entries(present)[len(schema.arg_entries) :]):
            proto = entry.proto  # one tensor is sent twice only if blocks take it as different things
            key = id(tensor), proto.batched, proto.dtype if proto.is_floating_point else None
            if key not in positions:
                positions[key] = len(tensors)
                tensors.append(tensor)
            taken.append(positions[key])
        blocks.append(Block(uid, schema, present, tuple(taken)))
    chain = Chain(blocks)
    tensors = _expanded(chain, tensors)
    for users, tensor in zip(chain.users, cast_inputs(chain.entries, tensors)):
        for path, proto in users:
            problem = proto.mismatch(tensor.shape, tensor.dtype)
            if problem is not None:
                raise SchemaError(f"{path}: {problem}", uid=uids[0] if len(uids) == 1 else None)
    count_rows(chain.entries, [tensor.shape for tensor in tensors])
    return chain, tensors


def _expanded(chain: Chain, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Batched kwargs of one row, for as many rows as the call has; autograd sums their gradients."""
    batched = [i for i, users in enumerate(chain.users) if users[0].proto.batched and tensors[i].ndim > 0]
    of_args = [len(tensors[i]) for i in batched if i < chain.args]
    rows = of_args[0] if of_args else max((len(tensors[i]) for i in batched), default=1)
    result = list(tensors)
    for i in batched:
        if i >= chain.args and len(tensors[i]) == 1 and rows != 1:
            result[i] = tensors[i].expand(rows, *tensors[i].shape[1:])
    return result


# --- autograd ------------------------------------------------------------------------------------------------------------


class _Call:
    """One call: where it goes, and which tensor goes where. Never changed."""

    def __init__(self, caller: SequenceCaller, chain: Chain, trainable: tuple[bool, ...]):
        self.caller, self.chain, self.trainable = caller, chain, trainable

    def to_wire(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """As they are sent: contiguous, on CPU, floating-point ones in the schema's dtype, without autograd history."""
        return [tensor.detach().cpu().contiguous() for tensor in cast_inputs(self.chain.entries, tensors)]

    def forward(
        self, tensors: Sequence[torch.Tensor], budget: Budget, *, keep: bool
    ) -> tuple[tuple[torch.Tensor, ...], Journey]:
        """Outputs on the device of the first input, and how the call went."""
        run = self.caller.forward(self.chain, self.to_wire(tensors), budget, keep=keep)
        outputs, journey = client_loop().run(run)
        device = tensors[0].device if tensors else "cpu"  # every kwarg may be optional
        return tuple(output.to(device) for output in outputs), journey


class _RemoteSequentialCall(torch.autograd.Function):
    """The autograd-aware call of all blocks. Flat tensors in, flat tensors out."""

    @staticmethod
    def forward(
        ctx: Any, trigger: torch.Tensor, call: _Call, budget: Budget, *inputs: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        outputs, journey = call.forward(inputs, budget, keep=True)
        ctx.call, ctx.count = call, len(inputs)
        # Tensors only where autograd can watch them: what the first span was given are rows of the inputs.
        ctx.journey = Journey(
            journey.ranges, tuple(tuple(leg._replace(args=()) for leg in trail) for trail in journey.trails)
        )
        later = [tensor for trail in journey.trails for leg in trail[1:] for tensor in leg.args]
        ctx.save_for_backward(*inputs, *later)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return outputs

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, saved: tuple[torch.Tensor, ...], *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        call: _Call = ctx.call
        inputs, later = saved[: ctx.count], iter(saved[ctx.count :])
        sent = call.to_wire(inputs)
        entries = call.chain.entries
        trails = []
        for (start, stop), trail in zip(ctx.journey.ranges, ctx.journey.trails):
            legs = []
            for leg in trail:
                if leg.span.start == 0:
                    args = [
                        tensor[start:stop] if entry.proto.batched else tensor
                        for entry, tensor in zip(entries, sent[: call.chain.args])
                    ]
                else:
                    args = [next(later) for _ in call.chain.blocks[leg.span.start].schema.arg_entries]
                legs.append(leg._replace(args=tuple(args)))
            trails.append(tuple(legs))
        wants = [needed and entry.proto.is_floating_point for needed, entry in zip(ctx.needs_input_grad[3:], entries)]
        grads = [
            grad.detach().to("cpu", entry.proto.dtype).contiguous()
            for grad, entry in zip(grad_outputs, call.chain.output_entries)
            if entry.proto.is_floating_point
        ]
        budget = Budget(call.caller.config.total_timeout_s)
        journey = Journey(ctx.journey.ranges, tuple(trails))
        run = call.caller.backward(call.chain, sent, journey, grads, wants, call.trainable, budget)
        return (None, None, None, *from_wire(client_loop().run(run), inputs))
