"""ExpertBackend: what a caller gets equals the module run locally, whoever else is in the batch, and whatever they do.

Batches are run here as Runtime runs them, but in this thread: what is submitted before ``drain`` is batched together.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

import pytest
import torch
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch import nn

from moe.errors import ConfigError, ExpertFailed, MoEError, NonFiniteError, SchemaError
from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend, ModuleBackend
from tests.experts import (
    HIDDEN,
    LoraExpert,
    UnstackableExpert,
    linear_backend,
    local_twin,
    lora_backend,
    parameters_of,
    run_with_gradients,
    seeded,
    unchanged,
)

B = BatchTensorProto


def drain(backend: ExpertBackend) -> list[int]:
    """Run everything that waits, as Runtime does; tasks in each batch."""
    sizes = []
    for pool in backend.get_pools():
        while not pool.empty:
            batch = pool.load_batch(0.0)
            pool.process(batch)
            sizes.append(len(batch))
    return sizes


def forward(backend: ExpertBackend, *tensors: torch.Tensor, present: Sequence[str] = ()) -> Any:
    future = backend.submit_forward(*tensors, present=present)
    drain(backend)
    return future.result(0)


def backward(backend: ExpertBackend, *tensors: torch.Tensor, **options: Any) -> Any:
    future = backend.submit_backward(*tensors, **options)
    drain(backend)
    return future.result(0)


def assert_close(got: Sequence[torch.Tensor | None], expected: Sequence[torch.Tensor | None]) -> None:
    assert len(got) == len(expected)
    for one, other in zip(got, expected):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


class Recorder(nn.Module):
    """Calls a function; keeps what it was called with."""

    def __init__(self, func: Callable[..., Any]):
        super().__init__()
        self.func, self.seen = func, list[tuple[tuple[Any, ...], dict[str, Any]]]()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args, kwargs))
        return self.func(*args, **kwargs)


# --- making one ------------------------------------------------------------------------------------------------------


def test_the_outputs_schema_is_found() -> None:
    def func(x: torch.Tensor, prefix: torch.Tensor) -> Any:
        ids = x.argmax(-1)
        return {"y": x * 2, "ids": ids, "pair": (x.sum(1), x.mean()), "prefix": prefix, "fixed": x.new_zeros(3)}

    backend = ExpertBackend(
        "e.0", Recorder(func), args_schema=(B(None, 4),), kwargs_schema={"prefix": TensorProto(None)}
    )
    assert backend.outputs_schema == {
        "y": B(None, 4),
        "ids": B(None, dtype=torch.int64),
        "pair": (B(4), TensorProto()),
        "prefix": TensorProto(None),
        "fixed": TensorProto(3),  # always 3 rows, for 2 rows too: not a batch axis
    }
    assert not backend.schema.mergeable


def test_a_given_outputs_schema_is_taken_without_running_the_module() -> None:
    module = Recorder(lambda x: x)
    backend = ExpertBackend("e.0", module, args_schema=(B(2),), outputs_schema=B(2))
    assert module.seen == []
    assert backend.outputs_schema == B(2)


class LeavesTraces(nn.Module):
    """BatchNorm in training, dropout, a buffer that grows, one that is replaced, one that is made on first use."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout(0.5)
        self.register_buffer("table", torch.zeros(1))
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.table = torch.arange(float(len(x) + 5))
        self.count = torch.ones(())
        self.register_buffer("cache", torch.ones(len(x)), persistent=False)
        normal: torch.Tensor = self.dropout(self.norm(x))
        return normal


def test_the_dry_run_leaves_no_trace() -> None:
    module = LeavesTraces()
    count, table = module.count, module.table
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_state = torch.random.get_rng_state()
    backend = ExpertBackend("e.0", module, args_schema=(B(4),))
    assert backend.outputs_schema == B(4)
    assert torch.equal(torch.random.get_rng_state(), random_state)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert [name for name, _ in module.named_buffers()] == [
        "table",
        "count",
        "norm.running_mean",
        "norm.running_var",
        "norm.num_batches_tracked",
    ]
    assert module.count is count
    assert module.table is table
    assert module.training
    assert module.norm.training
    assert all(p.grad is None and p.requires_grad for p in module.parameters())


@pytest.mark.parametrize(
    "returned, problem",
    [
        (lambda x: None, "must return tensors, got NoneType"),
        (lambda x: (x, "text"), "must return tensors, got tuple"),
        (lambda x: x @ torch.ones(7, 7), "dry run .* RuntimeError: .*Check args_schema"),
        (lambda x: x if len(x) == 3 else x[None], "an output has 2 axes for 3 rows and 3 for 2"),
        (lambda x: (x,) * len(x), "3 outputs for 3 rows and 2 for 2"),
    ],
)
def test_modules_that_cannot_be_served_are_refused(returned: Callable[..., Any], problem: str) -> None:
    with pytest.raises(SchemaError, match=problem):
        ExpertBackend("e.0", Recorder(returned), args_schema=(B(4),))


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(SchemaError, match="at least one tensor"):
        ExpertBackend("e.0", nn.Identity())
    with pytest.raises(ConfigError, match="scheduler needs an optimizer"):
        ExpertBackend("e.0", nn.Identity(), args_schema=(B(1),), scheduler=object())
    with pytest.raises(ConfigError, match="accumulate_steps"):
        ExpertBackend("e.0", nn.Identity(), args_schema=(B(1),), accumulate_steps=0)
    with pytest.raises(ConfigError, match="min_batch_size"):
        ExpertBackend("e.0", nn.Identity(), args_schema=(B(1),), min_batch_size=9, max_batch_size=8)
    with pytest.raises(TypeError, match="max_batchsize"):
        ExpertBackend("e.0", nn.Identity(), args_schema=(B(1),), max_batchsize=8)  # type: ignore[call-arg]


def test_hiveminds_way_to_make_one() -> None:
    module = nn.Linear(4, 2)
    backend = ModuleBackend(
        name="e.0",
        module=module,
        optimizer=torch.optim.SGD(module.parameters(), lr=0.1),
        scheduler=None,
        args_schema=(BatchTensorDescriptor(4),),
        kwargs_schema={},
        outputs_schema=BatchTensorDescriptor(2),
        max_batch_size=16,
    )
    assert backend.args_schema == (B(4),)
    assert backend.kwargs_schema == {}
    assert backend.outputs_schema == B(2)
    assert backend.forward_schema == ((B(4),), {})
    assert backend.backward_schema == (((B(4),), {}), B(2))
    assert backend.grad_inputs_schema == backend.forward_schema
    assert backend.max_batch_size == 16
    pools = backend.get_pools()
    assert [pool.name for pool in pools] == ["e.0_forward", "e.0_backward"]
    x = torch.randn(3, 4)
    future = pools[0].submit_task(x)
    drain(backend)
    assert_close(future.result(0), [module(x)])


def test_what_it_tells_about_itself() -> None:
    backend = lora_backend(LoraExpert(), max_batch_size=7)
    info = backend.get_info()
    assert info["forward_schema"] == backend.forward_schema
    assert info["outputs_schema"] == B(None, HIDDEN)
    assert info["keyword_names"] == info["optional_keywords"] == ("lora_a", "lora_b", "mask")
    assert info["max_batch_size"] == 7
    assert info["trainable"] is False
    description = backend.describe(max_request_bytes=99)
    assert description.expert_schema() == backend.schema
    assert (description.max_batch_size, description.max_request_bytes, description.trainable) == (7, 99, False)
    assert "lora.0" in repr(backend)


# --- equal to the module -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("present", [(), ("mask",), ("lora_a", "lora_b"), ("lora_a", "lora_b", "mask")])
def test_forward_and_backward_equal_the_module(rows: int, present: tuple[str, ...]) -> None:
    module = seeded(LoraExpert)
    backend = lora_backend(module)
    kwargs = {
        "lora_a": torch.randn(HIDDEN, 3),
        "lora_b": torch.randn(3, HIDDEN),
        "mask": torch.rand(rows, 4) > 0.3,
    }
    x, grad = torch.randn(rows, 4, HIDDEN), torch.randn(rows, 4, HIDDEN)
    chosen = {name: kwargs[name] for name in present}
    expected, gradients = run_with_gradients(local_twin(module), [x], chosen, grad)
    assert_close(forward(backend, x, *chosen.values(), present=present), [expected])
    got = backward(backend, x, *chosen.values(), grad, present=present)
    assert_close(got, list(gradients.values()))


def test_batches_can_be_run_without_pools() -> None:
    backend = linear_backend(lr=0.5)
    twin = local_twin(backend.module)
    x, grad = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN)
    expected, gradients = run_with_gradients(twin, [x], {}, grad)
    assert_close(backend.forward(x), [expected])
    assert_close(backend.backward(x, grad), [gradients["0"]])
    assert backend.updates == 1
    with pytest.raises(SchemaError):
        backend.backward(x, grad[:2])


def test_g10_g19_an_optional_kwarg_that_is_absent_is_not_passed_at_all() -> None:
    module = Recorder(lambda x, **kwargs: x)
    backend = ExpertBackend(
        "e.0", module, args_schema=(B(2),), kwargs_schema={"a": B(), "b": B()}, optional_kwargs=("b", "a")
    )
    x = torch.ones(1, 2)
    forward(backend, x)
    forward(backend, x, torch.ones(1), present=["b"])
    forward(backend, x, torch.ones(1), torch.zeros(1), present=["b", "a"])
    assert [sorted(kwargs) for _, kwargs in module.seen[-3:]] == [[], ["b"], ["a", "b"]]
    assert float(module.seen[-1][1]["a"]) == 1.0  # sorted by name, however they were listed


def test_an_expert_of_kwargs_only() -> None:
    module = Recorder(lambda *, b, a: a * 2 + b)
    backend = ExpertBackend("e.0", module, kwargs_schema={"b": B(3), "a": B(3)})
    a, b, grad = torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    assert_close(forward(backend, a, b), [a * 2 + b])
    assert_close(backward(backend, a, b, grad), [grad * 2, grad])
    assert_close(backward(backend, a, b, grad, wants_grad=[False, True]), [None, grad])


class Pair(NamedTuple):
    left: torch.Tensor
    right: torch.Tensor


def test_nested_structures_integers_and_booleans() -> None:
    def func(x: list[Any], *, more: dict[str, Any]) -> Any:
        total = x[0] + x[1][0] * more["scale"]
        return {"pair": Pair(total, (total > 0)), "list": [x[0].long()]}

    module = Recorder(func)
    schema = {"scale": TensorProto(), "ids": B(dtype=torch.int32)}
    backend = ExpertBackend("e.0", module, args_schema=([B(2), (B(2),)],), kwargs_schema={"more": schema})
    assert backend.outputs_schema == {"list": [B(2, dtype=torch.int64)], "pair": (B(2), B(2, dtype=torch.bool))}
    a, b = torch.randn(3, 2), torch.randn(3, 2)
    ids, scale = torch.arange(3, dtype=torch.int32), torch.tensor(2.0)
    outputs = forward(backend, a, b, ids, scale)
    assert_close(outputs, [a.long(), a + b * 2, (a + b * 2) > 0])
    grad = torch.randn(3, 2)  # of the one floating-point output
    assert_close(backward(backend, a, b, ids, scale, grad), [grad, grad * 2, None, (grad * b).sum()])
    stock = (torch.zeros(3, 2, dtype=torch.int64), grad, torch.zeros(3, 2, dtype=torch.bool))
    assert_close(backward(backend, a, b, ids, scale, *stock), [grad, grad * 2, None, (grad * b).sum()])
    args, kwargs = module.seen[-1]
    assert isinstance(args[0], list)
    assert isinstance(args[0][1], tuple)
    assert sorted(kwargs["more"]) == ["ids", "scale"]


def test_outputs_that_do_not_depend_on_an_input_give_it_zeros() -> None:
    backend = ExpertBackend("e.0", Recorder(lambda x, y: x * 1), args_schema=(B(2), B(2)))
    x = torch.ones(2, 2)
    assert_close(backward(backend, x, x, x), [x, torch.zeros(2, 2)])
    constant = ExpertBackend("e.0", Recorder(lambda x: torch.ones_like(x)), args_schema=(B(2),))
    assert_close(backward(constant, x, x), [torch.zeros(2, 2)])
    integers = ExpertBackend("e.0", Recorder(lambda x: x.long()), args_schema=(B(2),))
    assert_close(backward(integers, x), [torch.zeros(2, 2)])


def test_a_global_output_belongs_to_one_caller() -> None:
    backend = ExpertBackend("e.0", Recorder(lambda x: (x * 2, x.sum())), args_schema=(B(2),))
    xs = [torch.randn(rows, 2) for rows in (1, 2, 3)]
    forwards = [backend.submit_forward(x) for x in xs]
    backwards = [backend.submit_backward(x, torch.ones_like(x), torch.tensor(3.0)) for x in xs]
    assert drain(backend) == [1] * 6  # callers are never merged
    for x, f, b in zip(xs, forwards, backwards):
        assert_close(f.result(0), [x * 2, x.sum()])
        assert_close(b.result(0), [torch.full_like(x, 5.0)])


def test_an_expert_without_batched_inputs() -> None:
    backend = ExpertBackend("e.0", Recorder(lambda x: x * 2), args_schema=(TensorProto(None),))
    assert backend.outputs_schema == TensorProto(None)
    x = torch.randn(5)
    first, second = backend.submit_forward(x), backend.submit_forward(x)
    assert drain(backend) == [1, 1]
    assert_close(first.result(0), [x * 2])
    assert_close(second.result(0), [x * 2])
    assert_close(backward(backend, x, x), [x * 2])


def test_no_rows_are_answered_without_running_empty_batches_and_train_nothing() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    backend = ExpertBackend("e.0", module, torch.optim.SGD(module.parameters(), lr=1.0), args_schema=(B(4),))
    before, statistics = parameters_of(module), module.state_dict()["1.running_mean"].clone()
    (output,) = forward(backend, torch.zeros(0, 4))
    assert output.shape == (0, 4)
    (gradient,) = backward(backend, torch.zeros(0, 4), torch.zeros(0, 4))
    assert gradient.shape == (0, 4)
    assert unchanged(module, before)
    assert torch.equal(module.state_dict()["1.running_mean"], statistics)
    assert backend.updates == 0


# --- many callers in one batch -----------------------------------------------------------------------------------------


class Caller(NamedTuple):
    """One caller's inputs, its local answer, and what it asked for."""

    inputs: list[torch.Tensor]
    present: tuple[str, ...]
    grad: torch.Tensor
    expected: torch.Tensor
    gradients: list[torch.Tensor | None]

    @classmethod
    def make(
        cls, module: nn.Module, rows: int, length: int, rank: int, adapter: dict[str, torch.Tensor] | None = None
    ) -> Caller:
        kwargs = adapter or {"lora_a": torch.randn(HIDDEN, rank), "lora_b": torch.randn(rank, HIDDEN)}
        kwargs = {**kwargs, "mask": torch.rand(rows, length) > 0.3}
        x, grad = torch.randn(rows, length, HIDDEN), torch.randn(rows, length, HIDDEN)
        expected, gradients = run_with_gradients(local_twin(module), [x], kwargs, grad)
        return cls([x, *kwargs.values()], tuple(kwargs), grad, expected, list(gradients.values()))

    def submit(self, backend: ExpertBackend) -> tuple[Future[Any], Future[Any]]:
        return (
            backend.submit_forward(*self.inputs, present=self.present),
            backend.submit_backward(*self.inputs, self.grad, present=self.present),
        )

    def check(self, futures: tuple[Future[Any], Future[Any]]) -> None:
        assert_close(futures[0].result(0), [self.expected])
        assert_close(futures[1].result(0), self.gradients)


@pytest.mark.parametrize("expert, launches", [(LoraExpert, 1), (UnstackableExpert, 12)])
@pytest.mark.parametrize("rows_of", [lambda i: 3, lambda i: 2 + i % 3], ids=["equal rows", "unequal rows"])
def test_twelve_callers_with_own_adapters_equal_the_module_in_one_launch_where_it_allows_it(
    expert: type[LoraExpert], launches: int, rows_of: Callable[[int], int]
) -> None:
    module = seeded(expert)
    backend = lora_backend(module)
    callers = [Caller.make(module, rows_of(i), length=3, rank=3) for i in range(12)]  # rank = length (= rows)
    for _ in range(2):  # the second time it is known what the module allows
        module.launches = 0
        futures = [caller.submit(backend) for caller in callers]
        assert drain(backend) == [12, 12]
        for caller, future in zip(callers, futures):
            caller.check(future)
    assert module.launches == 2 * launches


def test_callers_of_very_unequal_size_are_not_padded_to_the_largest() -> None:
    module = seeded(LoraExpert)
    backend = lora_backend(module)
    callers = [Caller.make(module, rows, 2, 3) for rows in (100, 1, 1, 1, 1, 1)]
    module.launches = 0
    futures = [caller.submit(backend) for caller in callers]
    drain(backend)
    for caller, future in zip(callers, futures):
        caller.check(future)
    assert module.launches > 2


def test_different_lengths_ranks_and_structures_wait_apart() -> None:
    module = seeded(LoraExpert)
    backend = lora_backend(module)
    callers = [Caller.make(module, 2, length, rank) for length in (3, 5) for rank in (3, 4)]
    futures = [caller.submit(backend) for caller in callers]
    plain = backend.submit_forward(torch.randn(2, 3, HIDDEN))
    assert drain(backend) == [1] * 9
    for caller, future in zip(callers, futures):
        caller.check(future)
    assert plain.result(0)


def test_gradients_of_identical_adapters_never_mix() -> None:
    module = seeded(LoraExpert)
    backend = lora_backend(module)
    adapter = {"lora_a": torch.randn(HIDDEN, 2), "lora_b": torch.randn(2, HIDDEN)}
    callers = [Caller.make(module, rows, 2, 2, adapter) for rows in (2, 2, 3)]
    module.launches = 0
    futures = [caller.submit(backend) for caller in callers]
    assert drain(backend) == [3, 3]
    for caller, future in zip(callers, futures):
        caller.check(future)
    assert module.launches == 2
    assert not torch.equal(callers[0].gradients[1], callers[1].gradients[1])  # type: ignore[arg-type]


def test_identical_globals_are_passed_once_when_nobody_wants_their_gradient() -> None:
    shapes = []

    def func(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(w.shape))
        if bool(x.isnan().any()):  # looks at data: never stacked
            raise ValueError
        return x @ w

    backend = ExpertBackend("e.0", Recorder(func), args_schema=(B(2),), kwargs_schema={"w": TensorProto(2, 2)})
    w, other = torch.randn(2, 2), torch.randn(2, 2)
    shapes.clear()
    xs = [torch.randn(2, 2) for _ in range(4)]
    futures = [backend.submit_forward(x, w.clone()) for x in xs[:3]]
    futures.append(backend.submit_forward(xs[3], other))
    gradients = [backend.submit_backward(x, w.clone(), torch.ones(2, 2), wants_grad=[True, False]) for x in xs[:3]]
    drain(backend)
    for x, future in zip(xs, futures):
        assert_close(future.result(0), [x @ (other if x is xs[3] else w)])
    for future in gradients:
        assert_close(future.result(0), [torch.ones(2, 2) @ w.T, None])
    assert shapes.count((2, 2)) <= 2 + 1 + 1  # forward: two lanes (after one try to stack them), backward: one


def test_who_else_is_in_the_batch_does_not_matter() -> None:
    module = seeded(LoraExpert)
    backend = lora_backend(module)
    caller = Caller.make(module, 3, 4, 2)
    alone = caller.submit(backend)
    drain(backend)
    together = caller.submit(backend)
    others = [Caller.make(module, rows, 4, 2).submit(backend) for rows in (1, 2, 3)]
    drain(backend)
    assert_close(together[0].result(0), alone[0].result(0))
    assert_close(together[1].result(0), alone[1].result(0))
    assert all(future.done() for pair in others for future in pair)


# --- bad company -------------------------------------------------------------------------------------------------------


class Unpicklable(Exception):
    def __init__(self) -> None:
        super().__init__(lambda: None)


def _raise(error: BaseException) -> Any:
    raise error


BAD_MODULES: dict[str, Callable[[torch.Tensor], Any]] = {
    "raises": lambda y: _raise(ValueError("poison")),
    "raises something unpicklable": lambda y: _raise(Unpicklable()),
    "exits": lambda y: _raise(SystemExit(1)),
    "wrong rows": lambda y: y[:-1],
    "wrong size": lambda y: y[:, :-1],
    "wrong dtype": lambda y: y.double(),
    "nothing": lambda y: None,
    "no tensor": lambda y: "text",
    "another structure": lambda y: (y, y),
}


@pytest.mark.parametrize("bad", BAD_MODULES)
@pytest.mark.parametrize("adapted", [False, True], ids=["plain", "own adapters"])
def test_eight_good_tasks_in_the_batch_of_a_bad_one_succeed(bad: str, adapted: bool) -> None:
    def func(x: torch.Tensor, w: torch.Tensor | None = None) -> Any:
        y = linear(x if w is None else x @ w)
        return BAD_MODULES[bad](y) if bool((x == 666).any()) else y

    linear = seeded(lambda: nn.Linear(HIDDEN, HIDDEN))
    module = Recorder(func)
    module.linear = linear
    backend = ExpertBackend(
        "e.0",
        module,
        torch.optim.SGD(module.parameters(), lr=0.1),
        args_schema=(B(HIDDEN),),
        kwargs_schema={"w": TensorProto(HIDDEN, HIDDEN)},
        optional_kwargs=["w"],
        outputs_schema=B(HIDDEN),
    )
    twin = nn.Linear(HIDDEN, HIDDEN)
    twin.load_state_dict(linear.state_dict())
    present = ("w",) if adapted else ()
    calls = []
    for i in range(9):
        x, grad = torch.randn(2, HIDDEN), torch.randn(2, HIDDEN)
        own = [torch.randn(HIDDEN, HIDDEN)] if adapted else []
        if i == 4:
            x[1, 2] = 666.0
        calls.append(
            (x, own, grad, backend.submit_forward(x, *own, present=present),
             backend.submit_backward(x, *own, grad, present=present))
        )  # fmt: skip
    assert drain(backend) == [9, 9]
    total = torch.zeros(HIDDEN, HIDDEN)
    for i, (x, own, grad, f, b) in enumerate(calls):
        if i == 4:
            for future in (f, b):
                with pytest.raises(ExpertFailed):
                    future.result(0)
            continue
        z = (x @ own[0] if adapted else x).requires_grad_(False)
        assert_close(f.result(0), [twin(z).detach()])
        by_x = grad @ twin.weight.detach()
        assert_close(b.result(0), [by_x @ own[0].T, x.T @ by_x] if adapted else [by_x])
        total += grad.T @ z
    assert_close([linear.weight.detach()], [twin.weight.detach() - 0.1 * total])  # one step, without the bad one
    assert backend.updates == 1


def test_one_bad_caller_does_not_cost_the_others_their_common_launch_for_ever() -> None:
    class Picky(LoraExpert):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if x.shape[-2] == 7:
                raise ValueError("seven is not welcome")
            return super().forward(x, *args, **kwargs)

    module = seeded(Picky)
    backend = lora_backend(module)
    bad = [Caller.make(LoraExpert(), 2, 7, 2).submit(backend) for _ in range(3)]
    drain(backend)
    for refused in (future for pair in bad for future in pair):
        with pytest.raises(ExpertFailed, match="seven"):
            refused.result(0)
    callers = [Caller.make(module, 2, 3, 2) for _ in range(4)]
    module.launches = 0
    futures = [caller.submit(backend) for caller in callers]
    drain(backend)
    for caller, future in zip(callers, futures):
        caller.check(future)
    assert module.launches == 2


@pytest.mark.parametrize("where", ["input", "gradient", "adapter", "module"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_anomaly_detection_refuses_and_trains_nothing(where: str, value: float) -> None:
    class Fragile(LoraExpert):
        def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            return super().forward(x, *args, **kwargs) * torch.where(x.sum() == 0, value, 1.0)

    module = seeded(Fragile)
    optimizer = torch.optim.Adam(module.parameters())
    backend = lora_backend(module, optimizer, detect_anomalies=True)
    before = parameters_of(module)
    x, grad = torch.randn(2, 3, HIDDEN), torch.randn(2, 3, HIDDEN)
    a, b = torch.randn(HIDDEN, 2), torch.randn(2, HIDDEN)
    if where == "module":
        x.zero_()
    else:
        {"input": x, "gradient": grad, "adapter": a}[where][0, 0] = value
    future = backend.submit_backward(x, a, b, grad, present=("lora_a", "lora_b"))
    drain(backend)
    with pytest.raises(NonFiniteError, match="nothing was trained"):
        future.result(0)
    assert unchanged(module, before)
    assert backend.updates == 0
    assert not optimizer.state
    if where != "gradient":
        with pytest.raises(NonFiniteError):
            forward(backend, x, a, b, present=("lora_a", "lora_b"))
    backward(backend, torch.randn(2, 3, HIDDEN), grad.nan_to_num(0, 0, 0))
    assert backend.updates == 1


def test_anomalies_are_refused_before_they_get_into_the_module() -> None:
    module = nn.BatchNorm1d(4)
    backend = ExpertBackend("e.0", module, args_schema=(B(4),), detect_anomalies=True)
    with pytest.raises(NonFiniteError, match=r"args\[0\]"):
        forward(backend, torch.full((2, 4), math.nan))
    with pytest.raises(NonFiniteError, match=r"args\[0\]"):
        backward(backend, torch.full((2, 4), math.nan), torch.ones(2, 4))
    assert torch.equal(module.running_mean, torch.zeros(4))  # type: ignore[arg-type]


def test_only_the_anomalous_task_of_a_batch_is_refused() -> None:
    backend = linear_backend(lr=0.1, detect_anomalies=True)
    twin = local_twin(backend.module)
    grads = [torch.randn(2, HIDDEN) for _ in range(4)]
    grads[2][0, 0] = math.nan
    x = torch.randn(2, HIDDEN)
    futures = [backend.submit_backward(x, grad) for grad in grads]
    drain(backend)
    assert [isinstance(future.exception(0), NonFiniteError) for future in futures] == [False, False, True, False]
    total = sum(grad.T @ x for i, grad in enumerate(grads) if i != 2)
    assert_close([backend.module.weight], [twin.weight - 0.1 * total])  # type: ignore[operator, list-item]


# --- training ----------------------------------------------------------------------------------------------------------


def test_an_sgd_step_equals_the_local_step_exactly() -> None:
    backend = linear_backend(lr=0.1)
    twin = local_twin(backend.module)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(3):
        x, grad = torch.randn(5, HIDDEN), torch.randn(5, HIDDEN)
        run_with_gradients(twin, [x], {}, grad)
        optimizer.step()
        optimizer.zero_grad()
        backward(backend, x, grad)
    assert unchanged(backend.module, parameters_of(twin))
    assert backend.updates == 3
    assert all(parameter.grad is None for parameter in backend.module.parameters())


def test_a_batch_of_many_callers_is_one_step() -> None:
    backend = linear_backend(lr=0.1)
    twin = local_twin(backend.module)
    x, grad = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    for i in range(3):
        backend.submit_backward(x[2 * i : 2 * i + 2], grad[2 * i : 2 * i + 2])
    assert drain(backend) == [3]
    assert backend.updates == 1
    run_with_gradients(twin, [x], {}, grad)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_close(list(backend.module.parameters()), list(twin.parameters()))


def test_accumulated_batches_equal_one_large_batch() -> None:
    backend = linear_backend(lr=0.1, accumulate_steps=3)
    twin = local_twin(backend.module)
    x, grad = torch.randn(6, HIDDEN), torch.randn(6, HIDDEN)
    before = parameters_of(backend.module)
    for start, stop in ((0, 1), (1, 3)):
        backward(backend, x[start:stop], grad[start:stop])
    assert unchanged(backend.module, before)
    assert forward(backend, x)
    backward(backend, x[3:], grad[3:])
    run_with_gradients(twin, [x], {}, grad)
    torch.optim.SGD(twin.parameters(), lr=0.1).step()
    assert_close(list(backend.module.parameters()), list(twin.parameters()))
    assert backend.updates == 1


def test_a_failed_backward_leaves_accumulated_gradients_as_they_were() -> None:
    class Explosive(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * torch.where(x[:, :1] == 666, math.inf, 1.0)

    module = seeded(lambda: Explosive(2, 2))
    backend = ExpertBackend(
        "e.0", module, torch.optim.SGD(module.parameters(), lr=1.0), args_schema=(B(2),), accumulate_steps=2,
        detect_anomalies=True,
    )  # fmt: skip
    backward(backend, torch.ones(1, 2), torch.ones(1, 2))
    kept = module.weight.grad.clone()
    with pytest.raises(NonFiniteError):
        backward(backend, torch.full((1, 2), 666.0), torch.ones(1, 2))
    assert torch.equal(module.weight.grad, kept)
    assert backend.updates == 0


@pytest.mark.parametrize("expert", [LoraExpert, UnstackableExpert])
def test_a_frozen_expert_never_changes(expert: type[LoraExpert]) -> None:
    module = seeded(expert)
    module.linear.bias.requires_grad_(False)
    backend = lora_backend(module)
    before = parameters_of(module)
    for _ in range(2):
        callers = [Caller.make(module, 2, 3, 2) for _ in range(3)]
        futures = [caller.submit(backend) for caller in callers]
        drain(backend)
        for caller, future in zip(callers, futures):
            caller.check(future)
    assert unchanged(module, before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert [name for name, p in module.named_parameters() if not p.requires_grad] == ["linear.bias"]


def test_the_scheduler_steps_with_the_optimizer() -> None:
    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    backend = ExpertBackend("e.0", module, optimizer, scheduler=scheduler, args_schema=(B(2),))
    for _ in range(2):
        backward(backend, torch.ones(1, 2), torch.ones(1, 2))
    assert optimizer.param_groups[0]["lr"] == 0.25


class HalfDone(torch.optim.SGD):
    """Writes to parameters, then raises."""

    error: BaseException = RuntimeError("broken optimizer")

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        super().step()
        raise self.error


class RaisesUnshowable(RuntimeError):
    def __str__(self) -> str:
        raise RuntimeError


@pytest.mark.parametrize("error", [RuntimeError("broken"), SystemExit(1), KeyboardInterrupt(), RaisesUnshowable()])
def test_gradients_are_right_also_if_the_step_fails_and_nothing_is_left_for_the_next_caller(
    error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    module = seeded(lambda: nn.Linear(2, 2))
    twin = local_twin(module)
    optimizer = HalfDone(module.parameters(), lr=1.0)
    optimizer.error = error
    backend = ExpertBackend("e.0", module, optimizer, args_schema=(B(2),))
    x, grad = torch.randn(1, 2), torch.randn(1, 2)
    _, gradients = run_with_gradients(twin, [x], {}, grad)
    assert_close(backward(backend, x, grad), [gradients["0"]])
    assert module.weight.grad is None
    assert (backend.updates, backend.failed_steps) == (0, 1)
    assert "a step of its optimizer has failed" in caplog.text
    assert forward(backend, x)


@pytest.mark.parametrize("broken", ["scheduler", "zero_grad", "on_backward"])
def test_whatever_else_fails_in_a_step_is_no_matter_of_the_callers(broken: str) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise ValueError(broken)

    module = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    backend = ExpertBackend("e.0", module, optimizer, scheduler=scheduler, args_schema=(B(2),))
    owner: Any = {"scheduler": scheduler, "zero_grad": optimizer, "on_backward": backend}[broken]
    setattr(owner, "step" if broken == "scheduler" else broken, fail)
    for _ in range(2):
        got = backward(backend, torch.ones(1, 2), torch.ones(1, 2))
        assert_close(got, [torch.ones(1, 2) @ module.weight])
        assert module.weight.grad is None
    assert backend.failed_steps == 2


def test_the_step_can_be_overridden() -> None:
    rows = []

    class Own(ExpertBackend):
        def on_backward(self, batch_size: int) -> None:
            rows.append(batch_size)
            self.module.zero_grad()

    backend = Own("e.0", nn.Linear(2, 2), args_schema=(B(2),))
    backend.submit_backward(torch.ones(1, 2), torch.ones(1, 2))
    backend.submit_backward(torch.ones(4, 2), torch.ones(4, 2))
    drain(backend)
    assert rows == [5]


# --- little memory -----------------------------------------------------------------------------------------------------


class SmallMemory(LoraExpert):
    """Runs out of memory above some rows; with ``poison`` in a row it raises."""

    limit = 10**9

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("no room")
        if not torch._C._functorch.is_batchedtensor(x) and bool((x == 666).any()):
            raise ValueError("poison")
        return super().forward(x, *args, **kwargs)


@pytest.mark.parametrize("limit", [1, 2, 3, 5])
def test_little_memory_changes_no_result(limit: int) -> None:
    module = seeded(SmallMemory)
    twin = seeded(LoraExpert)
    backend = lora_backend(module, torch.optim.SGD(module.parameters(), lr=0.01))
    callers = [Caller.make(twin, rows, 2, 2) for rows in (7, 2, 5)]
    module.limit = limit
    futures = [caller.submit(backend) for caller in callers]
    drain(backend)
    for caller, future in zip(callers, futures):
        caller.check(future)
    assert backend.updates == 1
    for caller in callers:
        run_with_gradients(twin, caller.inputs[:1], dict(zip(caller.present, caller.inputs[1:])), caller.grad)
    torch.optim.SGD(twin.parameters(), lr=0.01).step()
    assert_close(list(module.parameters()), list(twin.parameters()))


def test_a_backward_in_parts_trains_wholly_or_not_at_all() -> None:
    module = seeded(SmallMemory)
    backend = lora_backend(module, torch.optim.SGD(module.parameters(), lr=0.01))
    module.limit = 2
    x, grad = torch.randn(8, 2, HIDDEN), torch.randn(8, 2, HIDDEN)
    x[7] = 666.0
    before = parameters_of(module)
    with pytest.raises(ExpertFailed, match="poison"):
        backward(backend, x, grad)
    assert unchanged(module, before)
    assert all(parameter.grad is None for parameter in module.parameters())


def test_not_even_one_row_fits() -> None:
    module = seeded(SmallMemory)
    backend = lora_backend(module)
    module.limit = 0
    with pytest.raises(ExpertFailed, match="OutOfMemoryError: no room"):
        forward(backend, torch.randn(3, 2, HIDDEN))
    module.limit = 8
    assert forward(backend, torch.randn(3, 2, HIDDEN))


# --- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tensors, present, wants, problem",
    [
        (
            [torch.zeros(2, 3, HIDDEN + 1)],
            (),
            None,
            r"args\[0\]: expected float32\(batch, any, 6\), got float32\(2, 3, 7",
        ),
        ([torch.zeros(2, 3, HIDDEN).double()], (), None, r"args\[0\].*float64"),
        ([torch.zeros(2, HIDDEN)], (), None, r"args\[0\]"),
        ([], (), None, "expected 1 tensors"),
        ([torch.zeros(2, 3, HIDDEN)] * 2, (), None, "expected 1 tensors"),
        ([torch.zeros(2, 3, HIDDEN)], ("nonsense",), None, "nonsense"),
        ([torch.zeros(2, 3, HIDDEN)], ("mask", "mask"), None, "mask"),
        ([torch.zeros(2, 3, HIDDEN), torch.ones(3, 3).bool()], ("mask",), None, r"kwargs\['mask'\].*2 rows.*got 3"),
        ([torch.zeros(5000, 1, HIDDEN)], (), None, "5000 rows"),
        ([torch.zeros(2, 3, HIDDEN)] * 2, (), [True, True], "wants_grad: expected 1"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_waits(
    tensors: list[torch.Tensor], present: tuple[str, ...], wants: list[bool] | None, problem: str
) -> None:
    backend = lora_backend(LoraExpert())
    with pytest.raises(SchemaError, match=problem):
        if wants is None:
            backend.submit_forward(*tensors, present=present)
        else:
            backend.submit_backward(*tensors, present=present, wants_grad=wants)
    assert drain(backend) == []


# --- state -------------------------------------------------------------------------------------------------------------


def test_a_restored_backend_goes_on_as_if_nothing_had_happened() -> None:
    def make() -> ExpertBackend:
        module = seeded(lambda: nn.Linear(3, 3))
        optimizer = torch.optim.Adam(module.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)
        return ExpertBackend("e.0", module, optimizer, scheduler=scheduler, args_schema=(B(3),))

    steps = [(torch.randn(2, 3), torch.randn(2, 3)) for _ in range(6)]
    straight, first, second = make(), make(), make()
    for x, grad in steps:
        backward(straight, x, grad)
    for x, grad in steps[:3]:
        backward(first, x, grad)
    saved = first.state_dict()
    frozen = saved["module"]["weight"].clone()
    for x, grad in steps[3:]:
        backward(first, x, grad)
    assert torch.equal(saved["module"]["weight"], frozen)  # a snapshot, not a view
    second.load_state_dict(saved)
    for x, grad in steps[3:]:
        backward(second, x, grad)
    assert unchanged(second.module, parameters_of(straight.module))
    assert second.updates == 6


def test_hiveminds_state_is_taken_and_missing_parts_are_only_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    backend = linear_backend(lr=0.1)
    weights = {"weight": torch.eye(HIDDEN), "bias": torch.zeros(HIDDEN)}
    backend.load_state_dict({"module": weights})
    assert torch.equal(backend.module.weight, torch.eye(HIDDEN))  # type: ignore[arg-type]
    assert "no optimizer state" in caplog.text


def test_hiveminds_constructor_parameters_are_all_there() -> None:
    from hivemind.moe.server.module_backend import ModuleBackend as StockBackend

    ours = inspect.signature(ExpertBackend.__init__).parameters
    stock = inspect.signature(StockBackend.__init__).parameters
    missing = [name for name, p in stock.items() if p.kind != p.VAR_KEYWORD and name not in ours]
    assert missing == []


def test_errors_are_ours() -> None:
    assert issubclass(ExpertFailed, MoEError)
