"""RemoteExpert: behaves like the module it stands for, in autograd and otherwise, for many callers at once."""

from __future__ import annotations

import asyncio
import functools
import threading
from concurrent.futures import Future
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from moe.client.expert import RemoteExpert, create_remote_experts, get_experts, transport_of
from moe.config import ClientConfig
from moe.errors import LifecycleError, MoEError, NoExpertsFound, SchemaError
from moe.expert_uid import ExpertInfo
from moe.schema import BatchTensorProto, ExpertSchema, TensorProto
from moe.server.expert_backend import ExpertBackend
from moe.testing import MemorySwarm, memory_swarm
from moe.transport.event_loop import client_loop
from tests.experts import (
    HIDDEN,
    LoraExpert,
    UnstackableExpert,
    assert_same,
    in_parallel,
    linear_backend,
    local_twin,
    lora_backend,
    parameters_of,
    run_with_gradients,
    seeded,
    unchanged,
)

B = BatchTensorProto
WAIT_S = 20.0


class Func(nn.Module):
    """A module out of a function."""

    def __init__(self, func: Any):
        super().__init__()
        self.func = func

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(*args, **kwargs)


def serve(func: Any, **options: Any) -> Any:
    """A swarm with one expert "e.0" made of a function."""
    module = func if isinstance(func, nn.Module) else Func(func)
    return memory_swarm({"e.0": ExpertBackend("e.0", module, **options)})


def methods(swarm: MemorySwarm) -> list[str]:
    return [method for _, method, _ in swarm.calls]


def lora_kwargs(rows: int, length: int, rank: int) -> dict[str, torch.Tensor]:
    return {
        "mask": torch.rand(rows, length) > 0.3,
        "lora_a": torch.randn(HIDDEN, rank),
        "lora_b": torch.randn(rank, HIDDEN),
    }


# --- like a local module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [(), ("mask",), ("lora_b", "lora_a"), ("lora_b", "mask", "lora_a")])
def test_outputs_and_gradients_equal_the_local_module(names: tuple[str, ...]) -> None:
    module = seeded(LoraExpert)
    kwargs = lora_kwargs(3, 3, 3)  # rank = rows = length: only the schema can tell them apart
    chosen = {name: kwargs[name] for name in names}
    x, grad = torch.randn(3, 3, HIDDEN), torch.randn(3, 3, HIDDEN)
    with memory_swarm({"lora.0": lora_backend(module)}) as swarm:
        expert = swarm.expert("lora.0")
        assert_same(
            run_with_gradients(expert, [x], chosen, grad), run_with_gradients(local_twin(module), [x], chosen, grad)
        )
        assert methods(swarm) == ["info", "forward", "backward"]


@pytest.mark.parametrize("expert_class", [LoraExpert, UnstackableExpert])
def test_twelve_clients_at_once_with_own_adapters_lengths_and_masks(expert_class: type[LoraExpert]) -> None:
    module = seeded(expert_class)
    twin = local_twin(module)
    shapes = [(3, 3, 3), (2, 5, 3), (4, 3, 4), (1, 7, 1)] * 3  # rows, length, rank
    calls = []
    for rows, length, rank in shapes:
        x, grad = torch.randn(rows, length, HIDDEN), torch.randn(rows, length, HIDDEN)
        calls.append(([x], lora_kwargs(rows, length, rank), grad))
    with memory_swarm({"lora.0": lora_backend(module)}) as swarm:
        expert = swarm.expert("lora.0")
        for _ in range(3):
            outcomes = in_parallel([functools.partial(run_with_gradients, expert, *call) for call in calls])
            for call, outcome in zip(calls, outcomes):
                assert not isinstance(outcome, Exception), outcome
                assert_same(outcome, run_with_gradients(twin, *call))
    assert unchanged(module, parameters_of(twin))


def test_training_through_a_remote_expert_equals_training_it_locally() -> None:
    backend = linear_backend("e.0", lr=0.1)
    twin = local_twin(backend.module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    with memory_swarm({"e.0": backend}) as swarm:
        expert = swarm.expert("e.0")
        for _ in range(4):
            x, grad = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
            assert_same(run_with_gradients(expert, [x], {}, grad), run_with_gradients(twin, [x], {}, grad))
            optimizer.step()
            optimizer.zero_grad()
    assert unchanged(backend.module, parameters_of(twin))


def test_an_expert_trains_although_no_input_requires_a_gradient() -> None:
    with memory_swarm({"e.0": linear_backend("e.0", lr=0.1), "e.1": linear_backend("e.1")}) as swarm:
        output = swarm.expert("e.0")(torch.randn(2, HIDDEN))
        assert output.requires_grad
        output.sum().backward()
        assert swarm.server.backends["e.0"].updates == 1
        assert not swarm.expert("e.1")(torch.randn(2, HIDDEN)).requires_grad  # frozen: there is nothing to do
        with torch.no_grad():
            assert not swarm.expert("e.0")(torch.randn(2, HIDDEN)).requires_grad


def test_an_adapter_is_trained_by_its_owner_while_the_expert_stays_as_it_is() -> None:
    module = seeded(LoraExpert)
    before = parameters_of(module)
    a = nn.Parameter(torch.randn(HIDDEN, 2) * 0.1)
    b = nn.Parameter(torch.zeros(2, HIDDEN))
    optimizer = torch.optim.Adam([a, b], lr=0.05)
    x, target = torch.randn(8, 3, HIDDEN), torch.randn(8, 3, HIDDEN)
    losses = []
    with memory_swarm({"lora.0": lora_backend(module)}) as swarm:
        expert = swarm.expert("lora.0")
        for _ in range(20):
            loss = nn.functional.mse_loss(expert(x, lora_a=a, lora_b=b), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert unchanged(module, before)


def test_experts_can_be_chained_and_used_twice() -> None:
    backends = {f"e.{i}": linear_backend(f"e.{i}") for i in range(2)}
    x, grad = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
    with memory_swarm(backends) as swarm:
        first, second = (swarm.expert(uid) for uid in backends)
        one, other = (backend.module for backend in backends.values())
        assert_same(
            run_with_gradients(lambda x: second(torch.tanh(first(x))) + first(x), [x], {}, grad),
            run_with_gradients(lambda x: other(torch.tanh(one(x))) + one(x), [x], {}, grad),
        )


def test_dtypes_are_the_schemas_on_the_wire_and_the_callers_in_gradients() -> None:
    backend = linear_backend("e.0")
    with memory_swarm({"e.0": backend}) as swarm:
        expert = swarm.expert("e.0")
        x = torch.randn(2, HIDDEN, dtype=torch.float64, requires_grad=True)
        output = expert(x)
        assert output.dtype == torch.float32
        output.sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.float64
        low = torch.randn(2, HIDDEN).bfloat16().requires_grad_()
        expert(low).double().sum().backward()
        assert low.grad is not None
        assert low.grad.dtype == torch.bfloat16


def test_non_contiguous_and_expanded_tensors() -> None:
    backend = linear_backend("e.0")
    base = torch.randn(HIDDEN, 3)
    with memory_swarm({"e.0": backend}) as swarm:
        expert = swarm.expert("e.0")
        torch.testing.assert_close(expert(base.T), backend.module(base.T))
        x = base.T.clone().requires_grad_()
        expert(x).sum().backward()  # the gradient of sum is an expanded scalar
        torch.testing.assert_close(x.grad, backend.module.weight.sum(0).expand(3, -1))  # type: ignore[operator]


def test_a_second_backward_works_or_fails_loudly() -> None:
    with memory_swarm({"e.0": linear_backend("e.0")}) as swarm:
        expert = swarm.expert("e.0")
        x = torch.randn(2, HIDDEN, requires_grad=True)
        output = expert(x)
        output.sum().backward(retain_graph=True)
        assert x.grad is not None
        first = x.grad.clone()
        output.sum().backward(retain_graph=True)
        torch.testing.assert_close(x.grad, 2 * first)
        output.sum().backward()
        with pytest.raises(RuntimeError, match="second time|already been freed"):
            output.sum().backward()
        (grad,) = torch.autograd.grad(expert(x).square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            grad.sum().backward()


def test_an_input_changed_in_place_before_backward_is_noticed() -> None:
    with memory_swarm({"e.0": linear_backend("e.0", lr=0.1)}) as swarm:
        x = torch.randn(2, HIDDEN)
        output = swarm.expert("e.0")(x)
        x.zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.sum().backward()
        assert swarm.server.backends["e.0"].updates == 0


# --- kinds of experts --------------------------------------------------------------------------------------------------


def test_an_expert_of_kwargs_only() -> None:
    with serve(lambda *, b, a: a * 2 + b, kwargs_schema={"a": B(3), "b": B(3)}) as swarm:
        expert = swarm.expert("e.0")
        kwargs = {"b": torch.randn(2, 3), "a": torch.randn(2, 3)}
        assert_same(
            run_with_gradients(expert, [], kwargs, torch.ones(2, 3)),
            run_with_gradients(lambda *, a, b: a * 2 + b, [], kwargs, torch.ones(2, 3)),
        )


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def nested(x: Any, *, more: Any) -> Any:
    return {"sum": x[0] + x[1][0] * more["scale"], "ids": [more["ids"] + 1], "flags": (x[0] > 0,)}


def test_nested_integer_and_boolean_tensors_both_ways() -> None:
    schema = {"scale": TensorProto(), "ids": B(dtype=torch.int32)}
    with serve(nested, args_schema=([B(2), (B(2),)],), kwargs_schema={"more": schema}) as swarm:
        a, b = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
        more = {"ids": torch.arange(3, dtype=torch.int32), "scale": torch.tensor(2.0, requires_grad=True)}
        output = swarm.expert("e.0")([a, (b,)], more=more)
        expected = nested([a, (b,)], more=more)
        assert output.keys() == expected.keys()
        assert isinstance(output["ids"], list)
        assert isinstance(output["flags"], tuple)
        torch.testing.assert_close(output["sum"], expected["sum"])
        assert torch.equal(output["ids"][0], expected["ids"][0])
        assert torch.equal(output["flags"][0], expected["flags"][0])
        assert [output["ids"][0].requires_grad, output["flags"][0].requires_grad] == [False, False]
        grads = torch.autograd.grad(output["sum"].sum(), [a, b, more["scale"]])
        for got, wanted in zip(grads, torch.autograd.grad(expected["sum"].sum(), [a, b, more["scale"]])):
            torch.testing.assert_close(got, wanted)


def test_namedtuples_are_taken_as_tuples() -> None:
    with serve(lambda pair: pair[0] - pair[1], args_schema=((B(2), B(2)),)) as swarm:
        one, other = torch.randn(2, 2), torch.randn(2, 2)
        assert torch.equal(swarm.expert("e.0")(Pair(one, other)), one - other)


def test_a_global_output() -> None:
    with serve(lambda x: (x * 2, x.mean()), args_schema=(B(3),)) as swarm:
        x = torch.randn(4, 3, requires_grad=True)
        y, mean = swarm.expert("e.0")(x)
        torch.testing.assert_close(mean, x.mean())
        (y.sum() + 12 * mean).backward()
        torch.testing.assert_close(x.grad, torch.full((4, 3), 3.0))


def test_only_integer_outputs_need_no_backward() -> None:
    with serve(lambda x: x.argmax(-1), args_schema=(B(3),)) as swarm:
        x = torch.randn(4, 3, requires_grad=True)
        output = swarm.expert("e.0")(x)
        assert torch.equal(output, x.argmax(-1))
        assert not output.requires_grad


def test_no_rows() -> None:
    with memory_swarm({"lora.0": lora_backend(seeded(LoraExpert))}) as swarm:
        x = torch.zeros(0, 5, HIDDEN, requires_grad=True)
        a, b = torch.randn(HIDDEN, 2, requires_grad=True), torch.randn(2, HIDDEN, requires_grad=True)
        output = swarm.expert("lora.0")(x, lora_a=a, lora_b=b)
        assert output.shape == (0, 5, HIDDEN)
        output.sum().backward()
        assert x.grad is not None
        assert x.grad.shape == x.shape
        assert a.grad is not None
        assert not a.grad.any()


def test_a_call_without_any_tensor() -> None:
    def func(*, x: torch.Tensor | None = None) -> torch.Tensor:
        return torch.ones(3) if x is None else x

    options = dict(kwargs_schema={"x": TensorProto(3)}, optional_kwargs=["x"], outputs_schema=TensorProto(3))
    with serve(func, **options) as swarm:
        expert = swarm.expert("e.0")
        assert torch.equal(expert(), torch.ones(3))
        assert torch.equal(expert(x=torch.zeros(3)), torch.zeros(3))


def test_gradients_of_inputs_that_need_none_are_not_asked_for() -> None:
    asked = []

    class Recording(ExpertBackend):
        def make_task(self, operation: str, tensors: Any, present: Any = (), wants_grad: Any = None, *more: Any) -> Any:
            asked.append(wants_grad)
            return super().make_task(operation, tensors, present, wants_grad, *more)

    module = seeded(LoraExpert)
    backend = Recording(
        "e.0", module, args_schema=(B(None, HIDDEN),),
        kwargs_schema={"lora_a": TensorProto(HIDDEN, None), "lora_b": TensorProto(None, HIDDEN)},
        optional_kwargs=("lora_a", "lora_b"),
    )  # fmt: skip
    with memory_swarm({"e.0": backend}) as swarm:
        kwargs = lora_kwargs(2, 3, 2)
        del kwargs["mask"]
        kwargs["lora_a"].requires_grad_()
        swarm.expert("e.0")(torch.randn(2, 3, HIDDEN), **kwargs).sum().backward()
        assert asked[-1] == (False, True, False)
        assert kwargs["lora_b"].grad is None


# --- what is said about it ---------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_told_before_anything_is_sent() -> None:
    with memory_swarm({"lora.0": lora_backend(seeded(LoraExpert))}) as swarm:
        expert = swarm.expert("lora.0")
        x = torch.randn(2, 3, HIDDEN)
        for args, kwargs, problem in (
            ((), {}, "expected 1 positional"),
            ((x, x), {}, "expected 1 positional"),
            ((x,), {"maks": x}, r"unknown \['maks'\]"),
            ((None,), {}, r"args\[0\]"),
            ((x[..., 1:],), {}, r"args\[0\]: expected float32\(batch, any, 6\), got float32\(2, 3, 5\)"),
            ((x,), {"mask": torch.ones(2, 3)}, r"kwargs\['mask'\]: expected bool"),
            ((x,), {"mask": torch.ones(3, 3).bool()}, r"kwargs\['mask'\]: expected 2 rows"),
            (([x],), {}, r"args\[0\]: expected"),
        ):
            with pytest.raises(SchemaError, match=problem) as caught:
                expert(*args, **kwargs)
            assert "lora.0" in str(caught.value)
        assert methods(swarm) == ["info"]
        assert expert(x).shape == x.shape


def test_a_caller_may_say_what_is_batched_and_what_is_global() -> None:
    module = seeded(LoraExpert)
    kwargs = lora_kwargs(2, 3, 2)
    x = torch.randn(2, 3, HIDDEN)
    adapter = {name: kwargs[name] for name in ("lora_a", "lora_b")}
    with memory_swarm({"lora.0": lora_backend(module)}) as swarm:
        expert = swarm.expert("lora.0")
        expected = module(x, **kwargs)
        torch.testing.assert_close(expert(x, batch_kwargs={"mask": kwargs["mask"]}, global_kwargs=adapter), expected)
        torch.testing.assert_close(expert(x, mask=kwargs["mask"], global_kwargs=adapter), expected)
        with pytest.raises(SchemaError, match=r"kwargs\['lora_a'\]: given as batched.*says global"):
            expert(x, batch_kwargs=adapter)
        with pytest.raises(SchemaError, match=r"kwargs\['mask'\]: given as global.*says batched"):
            expert(x, global_kwargs={"mask": kwargs["mask"]})
        with pytest.raises(SchemaError, match=r"\['mask'\] are given more than once"):
            expert(x, mask=kwargs["mask"], batch_kwargs={"mask": kwargs["mask"]})
        with pytest.raises(SchemaError, match=r"unknown \['nonsense'\]"):
            expert(x, global_kwargs={"nonsense": x})


def test_info_has_hiveminds_keys_and_can_be_refreshed() -> None:
    backend = linear_backend("e.0")
    with memory_swarm({"e.0": backend}) as swarm:
        expert = swarm.expert("e.0")
        info = expert.info
        assert info["forward_schema"] == backend.forward_schema
        assert info["outputs_schema"] == backend.outputs_schema
        assert info["keyword_names"] == ()
        assert info["trainable"] is False
        assert info["protocol_version"] == 1
        assert isinstance(expert.schema, ExpertSchema)
        assert expert.uid == "e.0"
        assert expert.peer_id == swarm.server.peer
        assert "e.0" in repr(expert)
        expert.refresh_info()
        assert expert.schema == backend.schema
        assert methods(swarm) == ["info", "info"]
        assert list(expert.parameters()) == []
        assert expert.state_dict() == {}


def test_errors_of_the_server_say_whose_they_are() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("broken")

    with serve(fail, args_schema=(B(2),), outputs_schema=B(2)) as swarm:
        with pytest.raises(MoEError, match=r"RuntimeError: broken .*expert e\.0.*peer \.\.\.server0"):
            swarm.expert("e.0")(torch.zeros(1, 2))
        with pytest.raises(NoExpertsFound, match=r"e\.1"):
            swarm.expert("e.1")


def test_a_blocking_call_inside_the_clients_own_loop_is_refused() -> None:
    with memory_swarm({"e.0": linear_backend("e.0")}) as swarm:
        expert = swarm.expert("e.0")

        async def call() -> Any:
            return expert(torch.zeros(1, HIDDEN))

        with pytest.raises(LifecycleError, match="inside the event loop"):
            client_loop().run(call(), WAIT_S)
        assert asyncio.run(call()).shape == (1, HIDDEN)  # in another loop it only blocks


def test_it_can_be_called_from_many_threads_and_a_stopped_loop() -> None:
    backend = linear_backend("e.0")
    with memory_swarm({"e.0": backend}) as swarm:
        expert = swarm.expert("e.0")
        x = torch.randn(2, HIDDEN)
        for output in in_parallel([lambda: expert(x)] * 16):
            torch.testing.assert_close(output, backend.module(x))
        client_loop().stop()
        torch.testing.assert_close(expert(x), backend.module(x))
    assert threading.active_count() < 100


# --- making them -------------------------------------------------------------------------------------------------------


def test_uids_are_a_list() -> None:
    with pytest.raises(SchemaError, match="got the string 'e.0'"):
        get_experts(object(), "e.0")


def test_what_was_not_found_stays_none() -> None:
    with memory_swarm({"e.0": linear_backend("e.0")}) as swarm:
        info = ExpertInfo("e.0", swarm.server.peer)
        transport: Any = swarm.transport
        assert transport_of(transport) is transport
        none, expert = create_remote_experts([None, info], transport)
        assert none is None
        assert isinstance(expert, RemoteExpert)
        found: Future[Any] = Future()
        later = create_remote_experts(found, transport, return_future=True, config=ClientConfig(max_retries=0))
        found.set_result([info])
        (expert,) = later.result(WAIT_S)
        assert expert.config.max_retries == 0
        assert expert(torch.zeros(1, HIDDEN)).shape == (1, HIDDEN)
