"""RemoteExpert: an expert on another machine that behaves like a local module. Owns: autograd, devices and dtypes.

Thin: requests, retries and checks are ``ExpertCaller``'s. Must not know: gating, grids, sequences.
"""

from __future__ import annotations

import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch

from moe.client.background import in_thread
from moe.client.calls import ExpertCaller
from moe.client.references import KeptRows
from moe.client.remote_module import RemoteModule, check_differentiable, differentiable_once, untraced
from moe.client.requests import Described, Gradients
from moe.config import TRANSPORTS, ClientConfig
from moe.dht import DHT, FoundExpert, check_dht, find_experts, resolve_p2p
from moe.errors import LifecycleError, ProtocolError, SchemaError
from moe.expert_uid import ExpertInfo, PeerIDLike
from moe.schema import ExpertSchema, Nested, cast_inputs
from moe.transport.auto import AutoTransport
from moe.transport.base import Budget, Call, ExpertTransport, Reply
from moe.transport.event_loop import client_loop, running_client_loop
from moe.transport.libp2p import LibP2PTransport
from moe.wire.messages import ExpertDescription

SEARCH_TIMEOUT_S = 300.0  # of a search by a client that sets itself no limit: nothing is found later than that

_transports: weakref.WeakKeyDictionary[Any, dict[str, AutoTransport]] = weakref.WeakKeyDictionary()
_making_transports = threading.Lock()


def _after_fork() -> None:
    """The lock may be held, for ever, by a thread that was not forked."""
    global _making_transports
    _making_transports = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def transport_of(source: Any, mode: str = "auto", timeout_s: float = 15.0) -> ExpertTransport:
    """The transport that calls go through: of a DHT, of hivemind's P2P, or one given as it is.

    One of each mode is made per DHT (or P2P) and process, and closed when that is garbage-collected.

    :param source: None: calls fail, with an error that says what to do
    :param mode: see ``ClientConfig.transport``
    :raises LifecycleError: the DHT does not answer
    :raises ConfigError: what is given as a DHT is none
    """
    if source is None:
        return _Nowhere()
    check_dht(source)
    if hasattr(source, "call") and hasattr(source, "info"):
        return cast(ExpertTransport, source)
    with _making_transports:
        known = _transports.get(source)
        if known is None:
            own = getattr(source, "daemon_listen_maddr", None)
            libp2p = LibP2PTransport(str(own or resolve_p2p(source, timeout_s)))  # one connection for all modes
            known = _transports[source] = {name: AutoTransport(libp2p, name) for name in TRANSPORTS}
            for transport in known.values():
                weakref.finalize(source, _close_soon, transport).atexit = False
    return known[mode]


class _Nowhere:
    """The transport of experts that were made without anything to call, or to call through: hivemind's programs make such to
    compute scores of experts that they never call."""

    async def info(self, peer: PeerIDLike, uid: str, *, timeout_s: float | None) -> ExpertDescription:
        """See ExpertTransport."""
        raise self._error(uid)

    async def call(self, peer: PeerIDLike, call: Call, *, timeout_s: float | None) -> Reply:
        """See ExpertTransport."""
        raise self._error(call.uid)

    async def close(self) -> None:
        """Nothing to close."""

    @staticmethod
    def _error(uid: str) -> LifecycleError:
        return LifecycleError(
            "this expert cannot be called: it was made with p2p=None, or without a peer id. Make it with a DHT and the peer id "
            "of its server, RemoteExpert(info, dht), or let it be found: get_experts(dht, [uid])",
            uid=uid,
        )


def _close_soon(transport: ExpertTransport) -> None:
    """A finalizer: it may run in the middle of anything, in any thread."""
    loop = running_client_loop()
    if loop is not None:
        with contextlib.suppress(LifecycleError):  # it has ended meanwhile, and the connections with it
            loop.submit(transport.close())


class RemoteExpert(RemoteModule):
    """Calls an expert hosted by other peers; autograd flows to batched and to global inputs.

    A call sends tensors to the server as CPU tensors in the schema's dtype, and brings outputs back to the device of the
    first input. A backward sends gradients of exactly the inputs that require them, and trains the expert, once.

    :param expert_info: uid and peer id
    :param p2p: what to call through: a DHT, hivemind's P2P (``await dht.replicate_p2p()``), or an ExpertTransport; None: calls
        raise LifecycleError
    :param replicas: further servers of the same expert, tried when the first one fails
    :param config: deadlines, retries; a failing call raises within ``config.total_timeout_s``
    """

    shared = ("_info", "caller", "config")

    def __init__(
        self,
        expert_info: ExpertInfo,
        p2p: Any,
        *,
        replicas: Sequence[PeerIDLike] = (),
        config: ClientConfig | None = None,
    ):
        super().__init__()
        self._info = ExpertInfo(*expert_info)
        self.config = config or ClientConfig()
        transport = transport_of(p2p if self._info.peer_id is not None else None, self.config.transport)
        self.caller = ExpertCaller(self._info.uid, [self._info.peer_id, *replicas], transport, self.config)

    @property
    def uid(self) -> str:
        """The expert's name."""
        return self._info.uid

    @property
    def peer_id(self) -> PeerIDLike:
        """The server that is asked first."""
        return self._info.peer_id

    def extra_repr(self) -> str:
        """For repr."""
        return f"uid={self.uid}, server_peer_id={self.peer_id}"

    # --- what the expert takes -----------------------------------------------------------------------------------------

    def describe(self, budget: Budget | None = None) -> tuple[ExpertDescription, ExpertSchema]:
        """The expert's description and schema; asked for on first use."""
        known = self.caller.known
        if known is not None:
            return known
        return client_loop().run(self.caller.describe(budget or Budget(self.config.total_timeout_s)))

    @property
    def schema(self) -> ExpertSchema:
        """What the expert takes and returns."""
        return self.describe()[1]

    @property
    def info(self) -> dict[str, Any]:
        """hivemind's keys (forward_schema, outputs_schema, keyword_names) and ours."""
        description, schema = self.describe()
        return {
            "forward_schema": (schema.args, schema.kwargs),
            "outputs_schema": schema.outputs,
            "keyword_names": tuple(schema.kwargs),
            "optional_keywords": schema.optional,
            "max_batch_size": description.max_batch_size,
            "trainable": description.trainable,
            "protocol_version": description.major if description.native else 0,
            "features": description.features,
        }

    def refresh_info(self) -> None:
        """Ask the server again on next use."""
        self.caller.forget_description()

    # --- calls -----------------------------------------------------------------------------------------------------------

    @untraced
    def forward(
        self,
        *args: Nested,
        batch_kwargs: Mapping[str, Nested] | None = None,
        global_kwargs: Mapping[str, Nested] | None = None,
        **kwargs: Nested,
    ) -> Nested:
        """Call the expert.

        :param args: positional inputs, nested as its schema
        :param batch_kwargs: kwargs that you hold to be batched; checked against the schema
        :param global_kwargs: kwargs that you hold to be global to the call; checked against the schema
        :param kwargs: keyword inputs, in any order; None for an optional one: as if it were left out
        :returns: outputs, nested as its schema
        :raises SchemaError: inputs that do not fit, before anything is sent
        :raises Unsupported: a derivative is wanted that servers do not compute
        :raises MoEError: no answer within the time budget, or an error of the server
        """
        budget = Budget(self.config.total_timeout_s)
        return self.call_within(budget, args, kwargs, batch_kwargs=batch_kwargs, global_kwargs=global_kwargs)

    def call_within(
        self,
        budget: Budget,
        args: Sequence[Nested],
        kwargs: Mapping[str, Nested],
        *,
        batch_kwargs: Mapping[str, Nested] | None = None,
        global_kwargs: Mapping[str, Nested] | None = None,
    ) -> Nested:
        """``forward`` within a time budget that the caller shares between several experts."""
        described = self.describe(budget)

        def call(described: Described) -> Nested:
            return self._call(described, budget, args, merge_kwargs(described[1], kwargs, batch_kwargs, global_kwargs))

        try:
            return call(described)
        except (SchemaError, ProtocolError) as e:
            other = None
            if len(self.caller.peers) > 1:  # the server that has told what it takes may be the one that is wrong
                other = client_loop().run(self.caller.describe_otherwise(described, budget))
            if other is None:
                raise
            with contextlib.suppress(SchemaError, ProtocolError):
                return call(other)
            raise e from None

    def _call(
        self, described: Described, budget: Budget, args: Sequence[Nested], kwargs: Mapping[str, Nested]
    ) -> Nested:
        description, schema = described
        try:
            present, tensors = schema.bind(args, kwargs)
        except SchemaError as e:
            hint = "" if description.native else " (a stock hivemind server, which takes no global or optional kwargs)"
            raise SchemaError(f"{e.message}{hint}", uid=self.uid) from None
        grad = torch.is_grad_enabled() and (description.trainable or any(tensor.requires_grad for tensor in tensors))
        check_differentiable(tensors, grad=grad)
        if grad:
            apply: Callable[..., tuple[torch.Tensor, ...]] = _RemoteExpertCall.apply
            trigger = grad_trigger(description.trainable)
            return schema.pack_outputs(apply(trigger, self.caller, described, present, budget, *tensors))
        return schema.pack_outputs(_forward(self.caller, described, present, budget, None, tensors))


def merge_kwargs(
    schema: ExpertSchema,
    kwargs: Mapping[str, Nested],
    batch_kwargs: Mapping[str, Nested] | None,
    global_kwargs: Mapping[str, Nested] | None,
) -> dict[str, Nested]:
    """All keyword inputs of a call, however they were given. None for an optional one is the same as leaving it out.

    :raises SchemaError: a kwarg given twice, or called what it is not
    """
    batched, shared = dict(batch_kwargs or {}), dict(global_kwargs or {})
    schema.check_declared_kinds(batched, shared)
    twice = (kwargs.keys() & batched.keys()) | (kwargs.keys() & shared.keys()) | (batched.keys() & shared.keys())
    if twice:
        raise SchemaError(f"kwargs {sorted(twice)} are given more than once")
    merged = {**kwargs, **batched, **shared}
    return {name: value for name, value in merged.items() if value is not None or name not in schema.optional}


def grad_trigger(trainable: bool) -> torch.Tensor:
    """Makes autograd call backward although no input requires a gradient: an expert with an optimizer wants to train."""
    return torch.empty(0, requires_grad=trainable)


class _RemoteExpertCall(torch.autograd.Function):
    """The autograd-aware call of a remote expert. Flat tensors in, flat tensors out."""

    @staticmethod
    def forward(
        ctx: Any,
        trigger: torch.Tensor,
        caller: ExpertCaller,
        described: Described,
        present: tuple[str, ...],
        budget: Budget,
        *inputs: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        kept: KeptRows = {}
        ctx.caller, ctx.described, ctx.present, ctx.kept = caller, described, present, kept
        ctx.save_for_backward(*inputs)
        outputs = _forward(caller, described, present, budget, kept, inputs)
        ctx.mark_non_differentiable(*(output for output in outputs if not output.is_floating_point()))
        return tuple(outputs)

    @staticmethod
    @differentiable_once
    def backward(
        ctx: Any, inputs: tuple[torch.Tensor, ...], *grad_outputs: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        caller: ExpertCaller = ctx.caller
        schema: ExpertSchema = ctx.described[1]
        wants = [needed and tensor.is_floating_point() for needed, tensor in zip(ctx.needs_input_grad[5:], inputs)]
        grads = [
            grad.detach().to("cpu", entry.proto.dtype).contiguous()
            for grad, entry in zip(grad_outputs, schema.output_entries)
            if entry.proto.is_floating_point
        ]
        sent = to_wire(schema, ctx.present, inputs)
        budget = Budget(caller.config.total_timeout_s)
        received = caller.backward_blocking(sent, grads, ctx.present, wants, budget, ctx.kept, ctx.described)
        return (None, None, None, None, None, *from_wire(received, inputs))


def _forward(
    caller: ExpertCaller,
    described: Described,
    present: tuple[str, ...],
    budget: Budget,
    kept: KeptRows | None,
    inputs: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Flat outputs, on the device of the first input."""
    sent = to_wire(described[1], present, inputs)
    outputs = caller.forward_blocking(sent, present, budget, kept, described)
    device = inputs[0].device if inputs else "cpu"  # every kwarg may be optional
    return [output.to(device) for output in outputs]


def to_wire(schema: ExpertSchema, present: tuple[str, ...], inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Inputs as they are sent: contiguous, on CPU, floating-point ones in the schema's dtype, without autograd history."""
    return [t.detach().cpu().contiguous() for t in cast_inputs(schema.input_entries(present), inputs)]


def from_wire(grads: Gradients, inputs: Sequence[torch.Tensor]) -> Gradients:
    """Gradients as autograd wants them: on the device and in the dtype of their inputs."""
    return [None if grad is None else grad.to(t.device, t.dtype) for grad, t in zip(grads, inputs)]


# --- making RemoteExperts ------------------------------------------------------------------------------------------------


def create_remote_experts(
    infos: Sequence[ExpertInfo | FoundExpert | None] | Any,
    dht: DHT,
    return_future: bool = False,
    *,
    config: ClientConfig | None = None,
) -> Any:
    """RemoteExperts for found experts; None stays None.

    :param infos: what was found, or a future of it
    :param return_future: give a concurrent Future of the list instead of waiting
    """
    if return_future:
        return in_thread(lambda: create_remote_experts(_resolved(infos), dht, config=config))
    return [_create(info, dht, config) for info in _resolved(infos)]


def batch_create_remote_experts(
    infos: Sequence[Sequence[ExpertInfo | None]] | Any,
    dht: DHT,
    return_future: bool = False,
    *,
    config: ClientConfig | None = None,
) -> Any:
    """The same for a list of lists."""
    if return_future:
        return in_thread(lambda: batch_create_remote_experts(_resolved(infos), dht, config=config))
    return [create_remote_experts(row, dht, config=config) for row in _resolved(infos)]


def get_experts(
    dht: DHT,
    uids: Sequence[str],
    expiration_time: float | None = None,
    return_future: bool = False,
    *,
    config: ClientConfig | None = None,
) -> Any:
    """Find experts by uid.

    :param dht: a running DHT node
    :param uids: which
    :param expiration_time: only those announced to live at least this long (DHT time)
    :param return_future: give a concurrent Future of the list instead of waiting
    :param config: deadlines and retries of the experts' calls, and of this search
    :returns: list of RemoteExpert, or None where no live server is known, in the order of ``uids``
    """
    if isinstance(uids, str):
        raise SchemaError(f"uids is a list of expert uids, got the string {uids!r}")
    timeout_s = (config or ClientConfig()).total_timeout_s or SEARCH_TIMEOUT_S

    def search() -> list[RemoteExpert | None]:
        found = find_experts(dht, list(uids), expiration_time, timeout_s=timeout_s)
        return cast("list[RemoteExpert | None]", create_remote_experts(found, dht, config=config))

    return in_thread(search) if return_future else search()


def _create(info: Any, dht: DHT, config: ClientConfig | None) -> RemoteExpert | None:
    if info is None:
        return None
    if isinstance(info, FoundExpert):
        first, *replicas = info.peer_ids
        return RemoteExpert(ExpertInfo(info.uid, first), dht, replicas=replicas, config=config)
    return RemoteExpert(info, dht, config=config)


def _resolved(maybe_future: Any) -> Any:
    return maybe_future.result(ClientConfig().total_timeout_s) if hasattr(maybe_future, "result") else maybe_future
