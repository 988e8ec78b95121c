"""RemoteSequential over servers in this process: what the blocks give here is what they give there, whatever is passed.

g.., s.., t.. in a test's name: the rows of the list of promises made in Petals' pull request #467 that it keeps.
"""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import moe.client.sequential as sequential
from moe import DeepPrompts
from moe.client.expert import RemoteExpert
from moe.client.requests import Request, Terms
from moe.client.sequential import RemoteSequential
from moe.client.spans import KnownBlocks, SpanCaller
from moe.config import ClientConfig
from moe.errors import ConfigError, MissingBlocks, MoEError, NonFiniteError, SchemaError
from moe.expert_uid import ExpertInfo
from moe.schema import BatchTensorProto, TensorProto
from moe.server.connection_handler import ConnectionHandler
from moe.server.expert_backend import ExpertBackend
from moe.transport.base import Budget
from moe.transport.event_loop import client_loop
from moe.transport.memory import MemoryPeer
from moe.wire.messages import RequestHeader
from tests.client.sequence_swarm import PROMPT_LENGTH, SequenceSwarm, sequence_swarm
from tests.experts import HIDDEN, parameters_of, unchanged

B, T = BatchTensorProto, TensorProto
BLOCKS = 3


@pytest.fixture
def swarm() -> Iterator[SequenceSwarm]:
    """Three blocks on two servers: a span of two, and one."""
    with sequence_swarm([0, 1], [2]) as made:
        yield made


def leaf(*sizes: int) -> torch.Tensor:
    return torch.randn(sizes, requires_grad=True)


def adapter(rank: int = 2) -> dict[str, torch.Tensor]:
    return {"lora_a": leaf(HIDDEN, rank), "lora_b": leaf(rank, HIDDEN)}


def twin_of(values: Any) -> Any:
    """Copies of leaves, to differentiate locally; what is one tensor stays one."""
    copies: dict[int, torch.Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {name: copy(item) for name, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [copy(item) for item in value]
        if id(value) not in copies:
            copies[id(value)] = value.detach().clone().requires_grad_(value.requires_grad)
        return copies[id(value)]

    return copy(values)


def leaves_of(values: Any) -> list[torch.Tensor]:
    if isinstance(values, torch.Tensor):
        return [values]
    parts = values.values() if isinstance(values, Mapping) else values
    return [tensor for part in parts for tensor in leaves_of(part)]


def check(
    swarm: SequenceSwarm,
    args: Sequence[torch.Tensor],
    shared: Mapping[str, Any] | None = None,
    own: Sequence[Mapping[str, Any]] | None = None,
    *,
    seq: RemoteSequential | None = None,
    tolerance: float = 1e-5,
) -> None:
    """Outputs and all gradients are those of the local blocks."""
    seq, shared = seq or swarm.sequence(), shared or {}
    count = len(swarm.router.uids)
    local_args, local_shared, local_own = twin_of([list(args), shared, list(own) if own else [{}] * count])
    remote = leaves_of(seq(*args, block_kwargs=own, **shared))
    local = leaves_of(swarm.run_locally(*local_args, per_block=[{**local_shared, **extra} for extra in local_own]))
    weights = [torch.randn_like(output) if output.is_floating_point() else None for output in local]
    for mine, theirs in zip(remote, local, strict=True):
        torch.testing.assert_close(mine, theirs, atol=tolerance, rtol=tolerance)
    for outputs in (remote, local):
        total = sum((o * w).sum() for o, w in zip(outputs, weights) if w is not None)
        assert isinstance(total, torch.Tensor)
        total.backward()
    given, copies = leaves_of([list(args), shared, own or []]), leaves_of([local_args, local_shared, local_own])
    for i, (mine, reference) in enumerate(zip(given, copies, strict=True)):
        assert (mine.grad is None) == (reference.grad is None), f"tensor {i}: {mine.grad is None=}"
        if mine.grad is not None:
            torch.testing.assert_close(mine.grad, reference.grad, atol=tolerance, rtol=tolerance)


# --- kwargs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [2, 4, 5, HIDDEN])  # 4 rows, length 5: a rank like any other size changes nothing
def test_g3_g11_t6_shared_kwargs_have_their_gradients_summed_over_blocks(swarm: SequenceSwarm, rank: int) -> None:
    check(swarm, [leaf(4, 5, HIDDEN)], {"mask": torch.rand(4, 5) > 0.3, **adapter(rank), "scale": leaf(HIDDEN)})
    assert [call[2] for call in swarm.calls] == ["b.0 b.1", "b.2", "b.2", "b.0 b.1"]


@pytest.mark.parametrize("rank", [4, 5, HIDDEN])
def test_g3_g11_block_kwargs_have_gradients_of_their_own(swarm: SequenceSwarm, rank: int) -> None:
    own = [adapter(rank), {"scale": leaf(HIDDEN)}, adapter(3)]
    check(swarm, [leaf(4, 5, HIDDEN)], {"mask": torch.rand(4, 5) > 0.3}, own)


def test_g3_one_tensor_for_some_blocks_and_another_for_others(swarm: SequenceSwarm) -> None:
    first, second = adapter(), adapter()
    check(swarm, [leaf(4, 5, HIDDEN)], {}, [first, second, first])


def test_g3_a_wrong_number_of_dicts_is_refused_with_both_numbers(swarm: SequenceSwarm) -> None:
    seq, h, a = swarm.sequence(), torch.randn(2, 3, HIDDEN), torch.randn(HIDDEN, 2)
    with pytest.raises(SchemaError, match="expected 3 dicts, one per block, got 1"):
        seq(h, block_kwargs=[{}])
    with pytest.raises(SchemaError, match="expected a dict per block, got Tensor"):
        seq(h, block_kwargs=[a, {}, {}])
    with pytest.raises(SchemaError, match=r"\['lora_a'\] are given for all blocks and for one"):
        seq(h, lora_a=a, block_kwargs=[{"lora_a": a}, {}, {}])
    assert not swarm.calls


def test_a_shared_tensor_travels_once_per_span(swarm: SequenceSwarm) -> None:
    """A large adapter for three blocks on two servers is sent twice, not three times."""
    sent: list[int] = []
    inner = swarm.swarm.transport.call

    async def counting(peer: Any, call: Any, *, timeout_s: float | None) -> Any:
        sent.append(call.request_bytes)
        return await inner(peer, call, timeout_s=timeout_s)

    swarm.swarm.transport.call = counting  # type: ignore[method-assign]
    h, lora = torch.randn(1, 1, HIDDEN), {"lora_a": torch.randn(HIDDEN, 100), "lora_b": torch.randn(100, HIDDEN)}
    swarm.sequence()(h, **lora)
    assert sent == [h.nbytes + 2 * lora["lora_a"].nbytes] * 2


def test_g4_t5_only_what_can_have_a_gradient_has_one(swarm: SequenceSwarm) -> None:
    frozen = {name: value.detach() for name, value in adapter().items()}
    check(swarm, [leaf(4, 5, HIDDEN)], {"mask": torch.rand(4, 5) > 0.3, **frozen})
    check(swarm, [torch.randn(4, 5, HIDDEN)], {"mask": torch.rand(4, 5) > 0.3, **adapter()})
    check(swarm, [torch.randn(4, 5, HIDDEN)], {}, [{}, {}, adapter()])
    assert [call[2] for call in swarm.calls if call[1] == "backward"][-1] == "b.2"  # nobody before it needs any


@pytest.mark.parametrize("declared", ["batch_kwargs", "global_kwargs"])
def test_g12_what_is_declared_is_checked_against_the_schemas(swarm: SequenceSwarm, declared: str) -> None:
    seq, h, mask, lora = swarm.sequence(), torch.randn(2, 3, HIDDEN), torch.rand(2, 3) > 0.3, adapter()
    right: dict[str, Any] = {"batch_kwargs": {"mask": mask}, "global_kwargs": lora}
    assert torch.equal(seq(h, **right), seq(h, mask=mask, **lora))
    wrong: dict[str, Any] = {"batch_kwargs": lora, "global_kwargs": {"mask": mask}}
    with pytest.raises(SchemaError, match="expert's schema says"):
        seq(h, **{declared: wrong[declared]})
    with pytest.raises(SchemaError, match="given more than once"):
        seq(h, mask=mask, batch_kwargs={"mask": mask})


@pytest.mark.parametrize(
    ("kwargs", "problem"),
    [
        ({"nonsense": torch.ones(1)}, "unknown .*nonsense"),
        ({"mask": torch.ones(2, 3)}, r"kwargs\['mask'\]: expected bool\(batch, any\), got float32"),
        ({"mask": torch.ones(3, 3).bool()}, r"kwargs\['mask'\]: expected 2 rows"),
        ({"scale": torch.ones(5)}, r"kwargs\['scale'\]: expected float32\(6\), got float32\(5\)"),
        ({"scale": 3.0}, r"kwargs\['scale'\].*float"),
        ({"scale": "__T0"}, r"kwargs\['scale'\].*str"),
    ],
)
def test_g19_g20_what_does_not_fit_is_named_before_anything_is_sent(
    swarm: SequenceSwarm, kwargs: dict[str, Any], problem: str
) -> None:
    with pytest.raises(SchemaError, match=problem):
        swarm.sequence()(torch.randn(2, 3, HIDDEN), **kwargs)
    with pytest.raises(SchemaError, match=problem):
        swarm.sequence()(torch.randn(2, 3, HIDDEN), block_kwargs=[{}, {}, kwargs])
    assert not swarm.calls
    assert not swarm.router.failures


def test_g19_each_block_may_be_given_another_choice_of_optional_kwargs(swarm: SequenceSwarm) -> None:
    mask = torch.rand(2, 3) > 0.3
    check(swarm, [leaf(2, 3, HIDDEN)], {}, [{}, {"mask": mask}, {"mask": mask, "scale": leaf(HIDDEN)}])


# --- modules of other kinds --------------------------------------------------------------------------------------------


class Attention(nn.Module):
    """x (B, T, D), attention_mask (B, T) bool, position_ids (B, T) int, layer_past: keys and values (P, D) each."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(HIDDEN, HIDDEN) for _ in range(3))
        self.positions = nn.Embedding(16, HIDDEN)

    def forward(
        self,
        x: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        layer_past: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        seen = x if position_ids is None else x + self.positions(position_ids)
        keys, values = self.key(seen), self.value(seen)
        past = 0
        if layer_past is not None:
            past = len(layer_past["keys"])
            keys = torch.cat([layer_past["keys"].expand(len(x), -1, -1), keys], dim=1)
            values = torch.cat([layer_past["values"].expand(len(x), -1, -1), values], dim=1)
        scores = self.query(seen) @ keys.transpose(1, 2) / HIDDEN**0.5
        if attention_mask is not None:
            attended = torch.nn.functional.pad(attention_mask, (past, 0), value=True)
            scores = scores.masked_fill(~attended[:, None, :], -1e9)
        return x + scores.softmax(-1) @ values


def attention_backend(uid: str, module: nn.Module, *, lr: float | None = None) -> ExpertBackend:
    return ExpertBackend(
        uid,
        module,
        None if lr is None else torch.optim.SGD(module.parameters(), lr=lr),
        args_schema=(B(None, HIDDEN),),
        kwargs_schema={
            "attention_mask": B(None, dtype=torch.bool),
            "position_ids": B(None, dtype=torch.int64),
            "layer_past": {"keys": T(None, HIDDEN), "values": T(None, HIDDEN)},
        },
        optional_kwargs=("attention_mask", "position_ids", "layer_past"),
    )


def attention_swarm() -> Any:
    return sequence_swarm([0, 1], [2], make=Attention, backend=attention_backend)


def test_g1_t2_masks_positions_and_a_learned_past_as_a_user_writes_it() -> None:
    with attention_swarm() as swarm:
        model = swarm.sequence()
        h = torch.randn(4, 5, HIDDEN)
        attention_mask = torch.rand(4, 5) > 0.3
        learned = {"keys": leaf(2, HIDDEN), "values": leaf(2, HIDDEN)}
        position_ids = torch.arange(5).expand(4, -1)
        y = model.forward(h, attention_mask=attention_mask, layer_past=learned, position_ids=position_ids)
        y.square().mean().backward()
        assert learned["keys"].grad is not None
        assert learned["values"].grad is not None
        for tensor in learned.values():
            tensor.grad = None
        shared = {"attention_mask": attention_mask, "layer_past": learned, "position_ids": position_ids}
        check(swarm, [h.requires_grad_()], shared, tolerance=1e-6)


def test_t4_a_whole_model_with_its_ends_at_the_client() -> None:
    with attention_swarm() as swarm:
        torch.manual_seed(0)
        embeddings, head = nn.Embedding(20, HIDDEN), nn.Linear(HIDDEN, 20)
        ids, mask = torch.randint(0, 20, (4, 5)), torch.rand(4, 5) > 0.3
        grads = []
        for blocks in (
            swarm.sequence(),
            lambda h, **kwargs: swarm.run_locally(h, per_block=[kwargs] * BLOCKS),
        ):
            logits = head(blocks(embeddings(ids), attention_mask=mask))
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten())
            grads.append([logits, *torch.autograd.grad(loss, [embeddings.weight, head.weight])])
        for remote, local in zip(*grads):
            torch.testing.assert_close(remote, local, atol=1e-5, rtol=1e-5)


def lora_of(past: dict[str, torch.Tensor]) -> dict[str, Any]:
    return dict(past)


@pytest.mark.parametrize("kind", ["lora", "ia3", "prefix"])
def test_g2_adapters_learn_at_the_client_while_the_servers_stay_as_they_are(kind: str) -> None:
    context = attention_swarm() if kind == "prefix" else sequence_swarm([0, 1], [2])
    with context as swarm:
        seq = swarm.sequence()
        torch.manual_seed(1)
        h, target = torch.randn(8, 5, HIDDEN), torch.randn(8, 5, HIDDEN)
        start: dict[str, Any] = {
            "lora": [{"lora_a": leaf(HIDDEN, 2), "lora_b": torch.zeros(2, HIDDEN, requires_grad=True)}] * BLOCKS,
            "ia3": [{"scale": torch.ones(HIDDEN, requires_grad=True)} for _ in range(BLOCKS)],
            "prefix": [{"layer_past": {"keys": leaf(2, HIDDEN), "values": leaf(2, HIDDEN)}} for _ in range(BLOCKS)],
        }
        own = start[kind]
        twin = twin_of(own)
        backends = {uid: b for server in swarm.swarm.servers for uid, b in server.backends.items()}
        before = {uid: parameters_of(backend.module) for uid, backend in backends.items()}
        history = []
        runs: list[tuple[Any, Callable[[], torch.Tensor]]] = [
            (own, lambda: seq(h, block_kwargs=own)),
            (twin, lambda: swarm.run_locally(h, per_block=twin)),
        ]
        for params, run in runs:
            optimizer = torch.optim.SGD(list({id(t): t for t in leaves_of(params)}.values()), lr=0.3)
            losses = []
            for _ in range(5):
                optimizer.zero_grad()
                loss = nn.functional.mse_loss(run(), target)
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            history.append(losses)
        assert history[0] == pytest.approx(history[1], abs=1e-5)
        assert history[0][-1] < history[0][0]
        assert all(unchanged(backends[uid].module, parameters) for uid, parameters in before.items())


class Two(nn.Module):
    """x (B, D), aux (B) -> x (B, D), aux (B), and a count (B), an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(
        self, x: torch.Tensor, aux: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        y = torch.tanh(self.linear(x))
        return y, aux + y.sum(-1), steps + 1


def test_blocks_with_several_outputs_some_of_them_integers() -> None:
    def backend(uid: str, module: nn.Module, *, lr: float | None) -> ExpertBackend:
        return ExpertBackend(uid, module, args_schema=(B(HIDDEN), B(), B(dtype=torch.int64)))

    with sequence_swarm([0, 1], [2], make=Two, backend=backend) as swarm:
        x, aux, steps = leaf(4, HIDDEN), leaf(4), torch.zeros(4, dtype=torch.int64)
        check(swarm, [x, aux, steps])
        outputs = swarm.sequence(max_tokens_per_request=2)(x, aux, steps)
        assert isinstance(outputs, tuple)
        assert not outputs[2].requires_grad
        assert torch.equal(outputs[2], torch.full((4,), 3))


class Resize(nn.Module):
    """(B, n) -> (B, m)."""

    widths: Iterator[int]

    def __init__(self) -> None:
        super().__init__()
        wide = 2 + torch.initial_seed() % 10
        self.linear = nn.Linear(int(wide), int(wide) + 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x)


def test_blocks_may_change_shapes_and_dtypes() -> None:
    def backend(uid: str, module: Any, *, lr: float | None) -> ExpertBackend:
        dtype = torch.bfloat16 if uid == "b.1" else torch.float32
        module.to(dtype)
        return ExpertBackend(uid, module, args_schema=(B(module.linear.in_features, dtype=dtype),))

    with sequence_swarm([0, 1], [2], make=Resize, backend=backend) as swarm:
        for uid, module in swarm.local.items():
            cast = torch.bfloat16 if uid == "b.1" else torch.float32
            module.to(cast)
            module.register_forward_pre_hook(lambda _, args, cast=cast: (args[0].to(cast),))
        x = leaf(4, 2)
        check(swarm, [x], tolerance=1e-2)
        assert swarm.sequence()(x).shape == (4, 5)


def test_blocks_that_do_not_fit_together_are_named_before_anything_is_sent(swarm: SequenceSwarm) -> None:
    def backend(uid: str, module: nn.Module, *, lr: float | None) -> ExpertBackend:
        return ExpertBackend(uid, nn.Linear(4, 5), args_schema=(B(4),))

    with sequence_swarm([0], [1], backend=backend) as wrong:
        with pytest.raises(SchemaError, match=r"b.1 takes .*4.* but b.0 before it returns .*5"):
            wrong.sequence()(torch.randn(2, 4))
        assert not wrong.calls


class Sum(nn.Module):
    """Kwargs only: data (B, 2) and weight (2): their product."""

    def forward(self, *, data: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return data * weight


def test_g9_blocks_without_args_have_the_rows_of_their_kwargs() -> None:
    def backend(uid: str, module: nn.Module, *, lr: float | None) -> ExpertBackend:
        return ExpertBackend(uid, module, kwargs_schema={"data": B(2), "weight": T(2)})

    with sequence_swarm([0], make=Sum, backend=backend) as swarm:
        check(swarm, [], {"data": leaf(5, 2), "weight": leaf(2)})
        check(swarm, [], {"data": leaf(5, 2), "weight": leaf(2)}, seq=swarm.sequence(max_tokens_per_request=2))
        assert len(swarm.calls) == 2 + 2 * 3


class Loss(nn.Module):
    """x (B, D), total () -> x, total + a number for the whole call."""

    def forward(self, x: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x * 2, total + x.sum()


def test_a_global_output_goes_on_to_the_next_block_and_is_never_split() -> None:
    def backend(uid: str, module: nn.Module, *, lr: float | None) -> ExpertBackend:
        return ExpertBackend(uid, module, args_schema=(B(HIDDEN), T()), outputs_schema=(B(HIDDEN), T()))

    with sequence_swarm([0, 1], [2], make=Loss, backend=backend) as swarm:
        check(swarm, [leaf(4, HIDDEN), leaf()], seq=swarm.sequence(max_tokens_per_request=1))
        assert len(swarm.calls) == 4


# --- autograd ----------------------------------------------------------------------------------------------------------


def test_a_second_backward_gives_the_same_gradients(swarm: SequenceSwarm) -> None:
    h, lora, own = leaf(2, 3, HIDDEN), adapter(), [{"scale": leaf(HIDDEN)} for _ in range(BLOCKS)]
    y = swarm.sequence(max_tokens_per_request=3)(h, block_kwargs=own, **lora).sum()
    wanted = [h, *lora.values(), *leaves_of(own)]
    first = torch.autograd.grad(y, wanted, retain_graph=True)
    second = torch.autograd.grad(y, wanted, retain_graph=True)
    third = torch.autograd.grad(y, wanted)
    for a, b, c in zip(first, second, third):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)  # parts may share a batch or not
        torch.testing.assert_close(a, c, atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(y, wanted)


def test_a_second_backward_gives_the_same_gradients_after_a_server_died_in_the_first() -> None:
    with sequence_swarm([0, 1, 2], [0, 1], [2]) as swarm:
        h, lora = leaf(2, 3, HIDDEN), adapter()
        y = swarm.sequence()(h, **lora).sum()
        wanted = [h, *lora.values()]
        first = torch.autograd.grad(y, wanted, retain_graph=True)
        swarm.kill(0)
        second = torch.autograd.grad(y, wanted, retain_graph=True)
        third = torch.autograd.grad(y, wanted, retain_graph=True)
        for a, b, c in zip(first, second, third):
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-6)
            torch.testing.assert_close(a, c, atol=1e-6, rtol=1e-6)


def test_gradients_of_gradients_are_refused_and_not_wrong(swarm: SequenceSwarm) -> None:
    h = leaf(2, 3, HIDDEN)
    (grad,) = torch.autograd.grad(swarm.sequence()(h).square().sum(), h, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        grad.sum().backward()


def test_an_input_changed_in_place_is_noticed(swarm: SequenceSwarm) -> None:
    h, lora = leaf(2, 3, HIDDEN), adapter()
    y = swarm.sequence()(h, **lora).sum()
    with torch.no_grad():
        lora["lora_a"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_without_gradients_nothing_is_kept(swarm: SequenceSwarm) -> None:
    h = leaf(2, 3, HIDDEN)
    with torch.no_grad():
        y = swarm.sequence()(h, **adapter())
    assert y.grad_fn is None
    assert not y.requires_grad
    assert swarm.sequence()(h.detach()).grad_fn is None
    kept = swarm.sequence()(h)
    saved = [weakref.ref(t) for t in kept.grad_fn.saved_tensors]
    assert len(saved) == 2  # the input, and what the second span was given
    del kept, saved[:1]
    gc.collect()
    assert all(reference() is None for reference in saved)


def test_blocks_with_an_optimizer_are_trained_by_every_backward() -> None:
    with sequence_swarm([0, 1], [2], lr=0.1) as swarm:
        swarm.sequence()(torch.randn(2, 3, HIDDEN)).sum().backward()
        updates = [b.updates for server in swarm.swarm.servers for b in server.backends.values()]
        assert updates == [1, 1, 1]
        seq = swarm.sequence(max_tokens_per_request=3)
        with torch.no_grad():
            seq(torch.randn(2, 3, HIDDEN))
        seq(torch.randn(2, 3, HIDDEN)).sum().backward()
        updates = [b.updates for server in swarm.swarm.servers for b in server.backends.values()]
        assert set(updates) <= {2, 3}  # two parts, in one batch of the server or in two


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_client_may_compute_in_another_dtype(swarm: SequenceSwarm, dtype: torch.dtype) -> None:
    h = torch.randn(2, 3, HIDDEN, dtype=dtype, requires_grad=True)
    scale, mask = torch.ones(HIDDEN, dtype=dtype, requires_grad=True), torch.ones(2, 3).bool()
    y = swarm.sequence()(h, scale=scale, mask=mask)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert h.grad is not None
    assert scale.grad is not None
    assert (h.grad.dtype, scale.grad.dtype) == (dtype, dtype)
    tolerance = 1e-5 if dtype == torch.float64 else 2e-2
    local = swarm.run_locally(h.detach().float(), per_block=[{"scale": scale.detach().float(), "mask": mask}] * BLOCKS)
    torch.testing.assert_close(y, local, atol=tolerance, rtol=tolerance)


# --- sub-batches -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "tokens", "parts"), [(4, 100, 1), (4, 10, 2), (7, 10, 4), (5, 5, 5), (3, 1, 3)])
def test_t7_s3_parts_of_a_batch_go_their_own_ways(swarm: SequenceSwarm, rows: int, tokens: int, parts: int) -> None:
    own = [adapter(), {"scale": leaf(HIDDEN)}, {"prompt": leaf(rows, PROMPT_LENGTH, HIDDEN)}]
    seq = swarm.sequence(max_tokens_per_request=tokens)  # rows of 5 tokens
    check(swarm, [leaf(rows, 5, HIDDEN)], {"mask": torch.rand(rows, 5) > 0.3}, own, seq=seq)
    assert len(swarm.calls) == 4 * parts


def test_s4_more_tokens_than_a_request_takes_with_kwargs_of_each_block(swarm: SequenceSwarm) -> None:
    own = [adapter(rank) for rank in (2, 3, 4)]
    check(swarm, [leaf(3, 130, HIDDEN)], {}, own, seq=swarm.sequence(max_tokens_per_request=128), tolerance=1e-4)


@pytest.mark.parametrize("sizes", [(0, 5), (3, 0), (0, 0)])
def test_no_rows_and_no_tokens(swarm: SequenceSwarm, sizes: tuple[int, int]) -> None:
    mask = torch.ones(*sizes).bool()
    check(swarm, [leaf(*sizes, HIDDEN)], {"mask": mask, **adapter()})
    check(swarm, [leaf(*sizes, HIDDEN)], {"mask": mask}, seq=swarm.sequence(max_tokens_per_request=1))


@pytest.mark.parametrize("rows", [1, 2, 5, 0])
def test_a_batched_kwarg_of_one_row_is_for_all_rows(swarm: SequenceSwarm, rows: int) -> None:
    h = leaf(rows, 5, HIDDEN)
    mask, prompt = torch.rand(1, 5) > 0.3, leaf(1, PROMPT_LENGTH, HIDDEN)
    check(swarm, [h], {"mask": mask, "prompt": prompt}, seq=swarm.sequence(max_tokens_per_request=10))
    with pytest.raises(SchemaError, match="rows"):
        swarm.sequence()(leaf(3, 5, HIDDEN), mask=torch.ones(2, 5).bool())


@pytest.mark.parametrize("rows", [1, 4])
def test_deep_prompts(swarm: SequenceSwarm, rows: int) -> None:
    prompts = DeepPrompts(BLOCKS, PROMPT_LENGTH, HIDDEN, rows=rows)
    h = torch.randn(4, 5, HIDDEN)
    grads = []
    for outputs in (
        swarm.sequence(max_tokens_per_request=10)(h, block_kwargs=prompts()),
        swarm.run_locally(h, per_block=prompts()),
    ):
        grads.append([outputs, *torch.autograd.grad(outputs.square().sum(), prompts.prompts)])
    assert "prompt: (3, " in repr(prompts)
    for remote, local in zip(*grads):
        torch.testing.assert_close(remote, local, atol=1e-5, rtol=1e-5)


def test_what_a_server_takes_at_most_splits_a_span_by_rows_and_by_blocks() -> None:
    with sequence_swarm([0, 1], [2], max_batch_size=3) as swarm:
        check(swarm, [leaf(7, 5, HIDDEN)], adapter())
        assert len(swarm.calls) == 4 * 3
    with sequence_swarm([0, 1], [2]) as swarm:
        for server in swarm.swarm.servers:
            server.handler.config = type(server.handler.config)(max_request_bytes=6000)
        check(swarm, [leaf(3, 5, HIDDEN)], {}, [adapter(40) for _ in range(BLOCKS)])
        assert {call[2] for call in swarm.calls} == {"b.0", "b.1", "b.2"}  # kwargs of two do not fit into one request


def test_one_failure_ends_the_other_parts(swarm: SequenceSwarm) -> None:
    seq = swarm.sequence(max_tokens_per_request=1, max_retries=0)
    seq(torch.randn(1, 1, HIDDEN))
    swarm.kill(1)
    with pytest.raises(MoEError):
        seq(torch.randn(200, 1, HIDDEN))
    assert not [task for task in _tasks_of_the_loop() if "SequenceCaller" in repr(task.get_coro())]


def _tasks_of_the_loop() -> set[Any]:
    import asyncio

    async def tasks() -> set[Any]:
        return asyncio.all_tasks() - {asyncio.current_task()}

    return client_loop().run(tasks())


# --- random schemas ----------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """x (B, 3), and kwargs of any kind: each adds its sum, per row where it is batched."""

    def forward(self, x: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        for name, value in sorted(kwargs.items()):
            x = x * 0.5 + torch.tanh(value.float().flatten(1).mean(1, keepdim=True) if name[0] == "b" else value.mean())
        return x


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.lists(st.tuples(st.booleans(), st.integers(1, 4)), min_size=1, max_size=4),
    st.integers(1, 4),
    st.lists(st.lists(st.integers(0, 3), max_size=4), min_size=BLOCKS, max_size=BLOCKS),
    st.integers(1, 5),
)
def test_g13_the_schema_alone_decides(
    kinds: list[tuple[bool, int]], rows: int, given_to: list[list[int]], tokens: int
) -> None:
    """Global and batched kwargs of equal sizes, in any choice, in batches of any size, split anywhere."""
    names = [f"{'b' if batched else 'g'}{i}" for i, (batched, _) in enumerate(kinds)]
    schema = {name: (B if batched else T)(None) for name, (batched, _) in zip(names, kinds)}

    def backend(uid: str, module: nn.Module, *, lr: float | None) -> ExpertBackend:
        return ExpertBackend(uid, module, args_schema=(B(3),), kwargs_schema=schema, optional_kwargs=tuple(names))

    values = [leaf(rows, size) if batched else leaf(size) for batched, size in kinds]
    own = [{names[i]: values[i] for i in set(chosen) if i < len(names)} for chosen in given_to]
    with sequence_swarm([0, 1], [2], make=Mixed, backend=backend) as swarm:
        check(swarm, [leaf(rows, 3)], {}, own, seq=swarm.sequence(max_tokens_per_request=tokens))


# --- the module --------------------------------------------------------------------------------------------------------


def test_g5_a_span_can_be_called_by_hand(swarm: SequenceSwarm) -> None:
    spans = SpanCaller(swarm.swarm.transport, ClientConfig(), KnownBlocks())
    peer, uids = MemoryPeer("server0"), ["b.0", "b.1"]

    async def forward() -> torch.Tensor:
        described = await spans.describe(peer, uids, Budget(5.0))
        chain, tensors = sequential.bind(uids, described, [h], [{"scale": scale}, {}])
        terms = Terms.of([description for description, _ in described])
        request = Request(swarm.swarm.transport, chain, ClientConfig())
        return (await request.forward(peer, terms, tensors, len(h), 5.0))[0]

    h, scale = torch.randn(2, 3, HIDDEN), torch.randn(HIDDEN)
    local = swarm.local["b.1"](swarm.local["b.0"](h, scale=scale))
    torch.testing.assert_close(client_loop().run(forward(), 10.0), local)


def test_g6_slices_compose_and_share_what_is_known(swarm: SequenceSwarm, monkeypatch: pytest.MonkeyPatch) -> None:
    searches: list[list[str]] = []

    def find(dht: Any, uids: list[str], timeout_s: float) -> list[ExpertInfo | None]:
        searches.append(list(uids))
        return [ExpertInfo(uid, MemoryPeer("server1" if uid == "b.2" else "server0")) for uid in uids]

    monkeypatch.setattr(sequential, "find_experts", find)
    monkeypatch.setattr(
        sequential,
        "create_remote_experts",
        lambda infos, dht, config: [RemoteExpert(info, dht, config=config) for info in infos],
    )
    seq = swarm.sequence()
    h, lora = leaf(2, 3, HIDDEN), adapter()
    whole = seq(h, **lora)
    asked = len(swarm.swarm.calls)
    torch.testing.assert_close(seq[1:](seq[:1](h, **lora), **lora), whole)
    torch.testing.assert_close(seq[1:][1:](seq[0:2](h, **lora), **lora), whole)
    assert not [call for call in swarm.swarm.calls[asked:] if call[1] == "info"]
    torch.testing.assert_close(seq[1:](seq[0](h, **lora), **lora), whole)
    assert [expert.uid for expert in seq] == list(seq.uids)
    assert (len(seq), len(seq[:2]), seq[-1].uid, len(seq[::2])) == (3, 2, "b.2", 2)
    assert sum(map(len, searches)) == BLOCKS
    seq.refresh()
    assert swarm.router.refreshed == 1
    assert [expert.uid for expert in seq] == list(seq.uids)
    assert sum(map(len, searches)) == 2 * BLOCKS


def test_a_block_may_come_twice() -> None:
    with sequence_swarm([0, 1]) as swarm:
        swarm.router.uids = ("b.0", "b.1", "b.0")
        check(swarm, [leaf(2, 3, HIDDEN)], {}, [{"scale": leaf(HIDDEN)}, adapter(), {"scale": leaf(HIDDEN)}])


def test_missing_blocks_are_named(swarm: SequenceSwarm) -> None:
    swarm.router.uids = (*swarm.router.uids, "b.3", "b.4")
    with pytest.raises(MissingBlocks, match=r"b\.3, b\.4"):
        swarm.sequence()(torch.randn(2, 3, HIDDEN))


def test_its_manager_ends_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with sequence_swarm([0, 1]) as swarm:
        made: list[Any] = []

        def make(dht: Any, uids: Sequence[str], config: ClientConfig) -> Any:
            made.append(swarm.router)
            return swarm.router

        monkeypatch.setattr(sequential, "SequenceManager", make)
        seq = RemoteSequential(swarm.swarm.transport, prefix="b", num_blocks=2)
        part = seq[1:]
        seq(torch.randn(1, 1, HIDDEN))
        part(torch.randn(1, 1, HIDDEN))
        assert len(made) == 1
        del seq
        gc.collect()
        assert not swarm.router.closed
        part(torch.randn(1, 1, HIDDEN))
        del part
        gc.collect()
        assert swarm.router.closed


def test_anomalies_are_refused_on_request(swarm: SequenceSwarm) -> None:
    seq = swarm.sequence(detect_anomalies=True)
    h = torch.randn(2, 3, HIDDEN)
    with pytest.raises(NonFiniteError, match=r"args\[0\]"):
        seq(torch.full_like(h, float("nan")))
    with pytest.raises(NonFiniteError, match="scale"):
        seq(h, scale=torch.full((HIDDEN,), float("inf")))
    y = seq(h.requires_grad_())
    with pytest.raises(NonFiniteError, match="grad_outputs"):
        y.backward(torch.full_like(y, float("nan")))
    assert not swarm.router.failures


@pytest.mark.parametrize(
    "wrong", [{}, {"uids": ["a.0"], "prefix": "a"}, {"prefix": "a"}, {"uids": []}, {"uids": ["a"]}, {"uids": "a.0"}]
)
def test_which_blocks_must_be_clear(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        RemoteSequential(None, **wrong)


def test_it_is_a_module_without_parameters() -> None:
    assert isinstance(seq := RemoteSequential(None, ["block.0"]), nn.Module)
    assert not list(seq.parameters())
    assert "block.0" in repr(seq)


def test_many_threads_call_it_at_once(swarm: SequenceSwarm) -> None:
    from tests.experts import in_parallel

    seq, inputs = swarm.sequence(max_tokens_per_request=4), [torch.randn(3, 2, HIDDEN) for _ in range(8)]
    for outcome, h in zip(in_parallel([functools.partial(seq, h) for h in inputs]), inputs):
        torch.testing.assert_close(outcome, swarm.run_locally(h), atol=1e-5, rtol=1e-5)


def test_g7_servers_are_told_what_a_policy_says_of_each_request(
    swarm: SequenceSwarm, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[str, str, Mapping[str, Any]]] = []
    open_request = ConnectionHandler.open

    def record(self: ConnectionHandler, peer: str, method: str, uid: str, header: RequestHeader | None) -> Any:
        assert header is not None
        told.append((method, uid, header.metadata))
        return open_request(self, peer, method, uid, header)

    monkeypatch.setattr(ConnectionHandler, "open", record)

    def policy(peer: str, method: str, uids: tuple[str, ...]) -> dict[str, Any]:
        return {"points": 1.5, "blocks": len(uids), "what": method}

    x = leaf(2, 3, HIDDEN)
    swarm.sequence(request_metadata=policy)(x).sum().backward()
    sizes = [len(uid.split()) for _, uid, _ in told]
    assert [told[0][0], told[-1][0]] == ["forward", "backward"]
    assert sizes == [2, 1, 1, 2]
    assert [metadata for *_, metadata in told] == [
        {"points": 1.5, "blocks": size, "what": method} for size, (method, *_) in zip(sizes, told)
    ]


@pytest.mark.parametrize("metadata", [{"a": [1]}, {1: "a"}, {"a": "x" * 5000}, 7], ids=repr)
def test_g7_what_cannot_be_told_is_refused_before_sending(swarm: SequenceSwarm, metadata: Any) -> None:
    with pytest.raises(ConfigError, match="request_metadata"):
        swarm.sequence(request_metadata=lambda *_: metadata)(leaf(2, 3, HIDDEN))
    assert not swarm.calls
