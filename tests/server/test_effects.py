"""What a module does to its inputs, to itself and with its memory reaches no other caller, and no later call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from moe.errors import ExpertFailed, MoEError
from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.task_pool import DeviceLost, Task

B = BatchTensorProto
D = 4
LARGE = 20_000  # rows; more than is lent for nothing if torch has not allocated it


class Module(nn.Module):
    """Calls a function with itself."""

    table: torch.Tensor
    linear: Any
    found: Any
    nested: Any
    ones: Any
    text: Any

    def __init__(self, func: Callable[..., Any]):
        super().__init__()
        torch.manual_seed(0)
        self.func = func
        self.linear = nn.Linear(D, D)
        self.register_buffer("table", torch.randn(LARGE, D))
        self.memory: dict[Any, torch.Tensor] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.func(self, *args, **kwargs)


def backend_of(func: Callable[..., Any], lr: float | None = None, **options: Any) -> ExpertBackend:
    module = Module(func)
    optimizer = None if lr is None else torch.optim.SGD(module.parameters(), lr=lr)
    options = {"args_schema": (B(D),), "outputs_schema": B(D), "max_batch_size": 2**16, **options}
    return ExpertBackend("e.0", module, optimizer, **options)


def module_of(backend: ExpertBackend) -> Any:
    return backend.module


def forward(backend: ExpertBackend, *calls: list[torch.Tensor], keep: bool = False, present: Any = ()) -> list[Any]:
    tasks = [backend.make_task("forward", tensors, present) for tensors in calls]
    for task in tasks:
        task.keep = keep
    return results(backend._run_forward(tasks))


def backward(backend: ExpertBackend, *calls: list[torch.Tensor], present: Any = (), **options: Any) -> list[Any]:
    tasks = [backend.make_task("backward", tensors, present, **options) for tensors in calls]
    return results(backend._run_backward(tasks))


def results(outcomes: list[Any]) -> list[Any]:
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes


def of_others(tensor: torch.Tensor) -> torch.Tensor:
    """The same in memory that torch has not allocated, as it comes over a link."""
    raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return torch.frombuffer(bytearray(raw), dtype=tensor.dtype).reshape(tensor.shape)


# --- writes to inputs ------------------------------------------------------------------------------------------------------


def _add(module: Module, x: torch.Tensor) -> torch.Tensor:
    return module.linear(x.add_(1)) + x


def _relu(module: Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.relu_(x) * 2


def _index(module: Module, x: torch.Tensor) -> torch.Tensor:
    x[:, 0] = 3.0
    return module.linear(x)


def _to_view(module: Module, x: torch.Tensor) -> torch.Tensor:
    x.view(-1, 2)[:, 1].mul_(2)
    return x * x


WRITERS = {"add": _add, "relu": _relu, "index": _index, "view": _to_view}


@pytest.mark.parametrize("rows", [3, LARGE])
@pytest.mark.parametrize("what", WRITERS)
def test_modules_that_write_to_their_inputs_forward_and_backward(what: str, rows: int) -> None:
    backend = backend_of(WRITERS[what], lr=0.1)
    for source in (of_others, torch.clone):
        for wants in ([True], [False]):
            twin = Module(WRITERS[what])
            twin.load_state_dict(backend.module.state_dict())
            x, grad = torch.randn(rows, D), torch.randn(rows, D) / rows
            leaf = x.clone().requires_grad_(wants[0])
            expected = twin(leaf.clone())
            expected.backward(grad) if expected.requires_grad else None
            ((output,),) = forward(backend, [source(x)])
            assert torch.equal(output, expected)
            ((got,),) = backward(backend, [source(x), grad], wants_grad=wants)
            assert torch.equal(got, leaf.grad) if wants[0] else got is None
            for mine, theirs in zip(module_of(backend).parameters(), twin.parameters(), strict=True):
                change = 0 if theirs.grad is None else 0.1 * theirs.grad
                torch.testing.assert_close(mine, theirs - change)


def test_integers_and_globals_may_be_written_to() -> None:
    def func(module: Module, x: torch.Tensor, ids: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        y = x * scale + ids[:, None]
        ids.fill_(7)
        scale.data.zero_()
        return y

    protos = (B(D), B(dtype=torch.int64), TensorProto(D))
    backend = backend_of(func, args_schema=protos)
    x, ids, scale = torch.randn(3, D), torch.arange(3), torch.randn(D)
    for _ in range(2):
        for shared in (scale, scale.clone()):
            together = forward(backend, [x, ids, scale], [x, ids, shared])
            assert all(torch.equal(output, x * scale + ids[:, None]) for (output,) in together)
    assert ids.tolist() == [0, 1, 2]


@pytest.mark.parametrize("source", [of_others, torch.clone])
def test_halves_are_computed_from_what_was_sent(source: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def func(module: Module, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        ids.add_(1)
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return x + ids[:, None]

    backend = backend_of(func, args_schema=(B(D), B(dtype=torch.int64)))
    x, ids = torch.randn(5, D), torch.arange(5)
    ((output,),) = forward(backend, [source(x), source(ids)])
    assert torch.equal(output, x + ids[:, None] + 2)
    ((gradient, none),) = backward(backend, [source(x), source(ids), torch.ones(5, D)])
    assert torch.equal(gradient, torch.ones(5, D))
    assert none is None


def test_large_inputs_that_were_written_to_before_it_failed_are_asked_for_again() -> None:
    def func(module: Module, x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        if len(x) > LARGE // 2 and not torch.is_grad_enabled():
            raise torch.OutOfMemoryError("no room")
        return x

    backend = backend_of(func)
    x = torch.randn(LARGE, D)
    with pytest.raises(ExpertFailed, match="written to its inputs; send them again"):
        forward(backend, [of_others(x)])
    ((output,),) = forward(backend, [of_others(x)])  # it is known by now, and lent
    assert torch.equal(output, x + 1)


# --- what is kept out of a stacked run -------------------------------------------------------------------------------------


_kept: dict[Any, Any] = {}


@functools.cache
def _ones(like: str, length: int) -> torch.Tensor:
    return _kept["x"].new_ones(length)


def _in_attribute(module: Module, x: torch.Tensor) -> torch.Tensor:
    if not hasattr(module, "found"):
        module.found = torch.ones_like(x[0])
    return module.found


def _in_dict(module: Module, x: torch.Tensor) -> torch.Tensor:
    return module.memory.setdefault(x.shape[-1], torch.ones_like(x[0]))


def _in_nested(module: Module, x: torch.Tensor) -> torch.Tensor:
    module.__dict__.setdefault("nested", {"list": [[], None]})
    kept: Any = module.nested
    if not kept["list"][0]:
        kept["list"][0].append((torch.ones_like(x[0]),))
    return kept["list"][0][0][0]


def _in_buffer(module: Module, x: torch.Tensor) -> torch.Tensor:
    if "ones" not in module._buffers:
        module.register_buffer("ones", torch.ones_like(x[0]))
    return module.ones


def _in_global(module: Module, x: torch.Tensor) -> torch.Tensor:
    return _kept.setdefault("ones", torch.ones_like(x[0]))


def _in_function(module: Module, x: torch.Tensor) -> torch.Tensor:
    _kept["x"] = x
    return _ones("x", x.shape[-1])


def _in_what_fails(module: Module, x: torch.Tensor) -> torch.Tensor:
    found = _in_global(module, _in_dict(module, x)[None])
    if bool((x > 1e9).any()):  # not under vmap
        raise ValueError
    return found


CACHES = (_in_attribute, _in_dict, _in_nested, _in_buffer, _in_global, _in_function, _in_what_fails)


@pytest.mark.parametrize("order", ["forward", "backward"])
@pytest.mark.parametrize("cache", CACHES)
def test_tensors_that_a_module_caches_in_a_stacked_run_poison_no_later_call(cache: Any, order: str) -> None:
    _kept.clear()
    _ones.cache_clear()

    def func(module: Module, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return (x + cache(module, x)) * scale

    backend = backend_of(func, args_schema=(B(D), TensorProto(D)))
    for _ in range(3):
        xs, scales = [torch.randn(2, D) for _ in range(3)], [torch.randn(D) for _ in range(3)]
        if order == "forward":
            for x, scale, (output,) in zip(xs, scales, forward(backend, *map(list, zip(xs, scales)))):
                torch.testing.assert_close(output, (x + 1) * scale)
        grads = [torch.randn(2, D) for _ in range(3)]
        for x, scale, grad, got in zip(xs, scales, grads, backward(backend, *map(list, zip(xs, scales, grads)))):
            torch.testing.assert_close(got[0], grad * scale)
            torch.testing.assert_close(got[1], (grad * (x + 1)).sum(0))
        ((alone,),) = forward(backend, [xs[0], scales[0]])
        torch.testing.assert_close(alone, (xs[0] + 1) * scales[0])


def test_a_stacked_run_that_leaves_something_has_no_other_effect() -> None:
    def func(module: Module, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        module.linear.count += 1
        module.text = module.text + "x"
        _in_dict(module, x)
        return x * scale

    backend = backend_of(func, args_schema=(B(D), TensorProto(D)))
    module_of(backend).linear.register_buffer("count", torch.zeros(()))
    module_of(backend).text = ""
    calls = [[torch.randn(2, D), torch.randn(D)] for _ in range(3)]
    forward(backend, *calls)
    assert float(module_of(backend).linear.count) == 3
    assert module_of(backend).text == "xxx"


@pytest.mark.parametrize("keep", [False, True])
def test_tensors_of_a_graph_that_a_module_caches_are_no_ones_later(keep: bool) -> None:
    def func(module: Module, x: torch.Tensor) -> torch.Tensor:
        if "weight" not in module.memory:
            module.memory["weight"] = module.linear.weight.exp()
        return x @ module.memory["weight"]

    backend = backend_of(func, lr=0.1)
    for _ in range(3):
        x, grad = torch.randn(2, D), torch.randn(2, D)
        weight = module_of(backend).linear.weight.detach().clone().requires_grad_()
        leaf = x.clone().requires_grad_()
        (leaf @ weight.exp()).backward(grad)
        ((got,),) = backward(backend, [x, grad])
        torch.testing.assert_close(got, leaf.grad)
        torch.testing.assert_close(module_of(backend).linear.weight, weight - 0.1 * weight.grad)
        assert module_of(backend).memory == {}


# --- what is returned ------------------------------------------------------------------------------------------------------


def _reused(module: Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return torch.mul(x, 2, out=module.memory.setdefault("out", torch.empty(64, D))[: len(x)])


RETURNED: dict[str, Callable[[Module, torch.Tensor], torch.Tensor]] = {
    "used again": _reused,
    "a buffer": lambda m, x: m.table[:1].expand(len(x), D),
    "a parameter": lambda m, x: m.linear.bias.expand(len(x), D),
    "the input": lambda m, x: x,
    "a view of the input": lambda m, x: x.view(-1).view(-1, D),
    "kept": lambda m, x: m.memory.setdefault(len(m.memory), x * 2),
    "expanded": lambda m, x: torch.zeros(1, 1).expand(len(x), D),
}


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("what", RETURNED)
def test_answers_never_change_afterwards(what: str, keep: bool) -> None:
    backend = backend_of(RETURNED[what], lr=0.1)
    twin = Module(RETURNED[what])
    x = torch.randn(3, D)
    answers = [output for (output,) in forward(backend, [x.clone()], [x.clone() + 1])]
    answers += [output for (output,) in forward(backend, [x.clone()], keep=keep)]
    expected = [twin(y.clone()).detach().clone() for y in (x, x + 1, x)]
    forward(backend, [torch.randn(9, D)])
    backward(backend, [torch.randn(9, D), torch.randn(9, D)])
    with torch.no_grad():
        for tensor in (
            *module_of(backend).parameters(),
            *module_of(backend).buffers(),
            *module_of(backend).memory.values(),
        ):
            tensor.fill_(9)
    for answer, correct in zip(answers, expected, strict=True):
        assert torch.equal(answer, correct)
        answer.fill_(5)  # and nobody else has it


class ReusesGradient(torch.autograd.Function):
    """The identity; its gradients lie in one piece of memory."""

    memory = torch.zeros(64, D)

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        gradient = ReusesGradient.memory[: len(grads[0])].copy_(grads[0]).detach()
        return gradient, gradient.view_as(gradient)


def test_gradients_never_change_afterwards_nor_share_memory() -> None:
    backend = backend_of(lambda m, x, y: ReusesGradient.apply(x, y), args_schema=(B(D), B(D)))
    grads = [torch.randn(3, D) for _ in range(4)]
    x = torch.zeros(3, D)
    answers = [*backward(backend, [x, x, grads[0]], [x, x, grads[1]])]
    answers += [backward(backend, [x, x, grad])[0] for grad in grads[2:]]
    for answer, grad in zip(answers, grads, strict=True):
        for got in answer:
            assert torch.equal(got, grad)
            got.zero_()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_gradients_of_parameters_may_lie_in_memory_that_is_used_again(accumulate: int) -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            return x + bias

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return grads[0], ReusesGradient.memory[0].copy_(grads[0].sum(0)).detach()

    backend = backend_of(lambda m, x: Function.apply(x, m.linear.bias), lr=1.0, accumulate_steps=accumulate)
    bias: torch.Tensor = module_of(backend).linear.bias
    before, grads = bias.detach().clone(), [torch.randn(2, D) for _ in range(4)]
    for grad in grads:
        backward(backend, [torch.zeros(2, D), grad])
    torch.testing.assert_close(bias, before - sum(grad.sum(0) for grad in grads))


def test_sparse_gradients_arrive_whole() -> None:
    def func(module: Module, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        return nn.functional.embedding(ids, table, sparse=True)

    backend = backend_of(func, args_schema=(B(dtype=torch.int64), TensorProto(6, D)))
    ids, table, grad = torch.tensor([1, 1, 5]), torch.randn(6, D), torch.randn(3, D)
    ((none, got),) = backward(backend, [ids, table, grad])
    assert none is None
    assert torch.equal(got, torch.zeros(6, D).index_add(0, ids, grad))


def test_sparse_gradients_of_parameters_are_trained_with() -> None:
    embedding = nn.Embedding(6, D, sparse=True)
    optimizer = torch.optim.SGD(embedding.parameters(), lr=1.0)
    backend = ExpertBackend(
        "e.0", embedding, optimizer, args_schema=(B(dtype=torch.int64),), outputs_schema=B(D), accumulate_steps=2
    )
    before, ids, grad = embedding.weight.detach().clone(), torch.tensor([1, 1, 5]), torch.randn(3, D)
    for _ in range(2):
        backward(backend, [ids, grad])
    torch.testing.assert_close(embedding.weight, before - 2 * torch.zeros(6, D).index_add(0, ids, grad))


# --- what is raised --------------------------------------------------------------------------------------------------------


class Unshowable(Exception):
    def __str__(self) -> str:
        raise SystemExit


ERRORS = (
    ValueError("x"),
    SystemExit(1),
    KeyboardInterrupt(),
    GeneratorExit(),
    StopIteration(1),
    StopAsyncIteration(),
    RecursionError(),
    AssertionError(),
    Unshowable(),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "\ud800"),
    RuntimeError("\ud800 is no text"),
)


@pytest.mark.parametrize("where", ["forward", "only with gradients", "backward", "hook"])
@pytest.mark.parametrize("error", ERRORS, ids=lambda e: type(e).__name__)
def test_whatever_is_raised_is_an_error_of_that_caller_alone(error: BaseException, where: str) -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.bad = bool((x == 666).any())
            return x * 1

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            if ctx.bad:
                raise error
            return grads[0]

    def func(module: Module, x: torch.Tensor) -> torch.Tensor:
        bad = bool((x == 666).any())
        if bad and (where == "forward" or (where == "only with gradients" and torch.is_grad_enabled())):
            raise error
        y: torch.Tensor = module.linear(x)
        if where == "backward":
            y = y + Raises.apply(x)
        if where == "hook" and y.requires_grad and bad:
            y.register_hook(lambda grad: (_ for _ in ()).throw(error))
        return y

    backend = backend_of(func, lr=0.0)
    good, bad = torch.randn(2, D), torch.full((2, D), 666.0)
    for operation, run, keep in (
        ("forward", backend._run_forward, False),
        ("forward", backend._run_forward, True),
        ("backward", backend._run_backward, False),
    ):
        for inputs in ([good, bad, good], [bad]):
            tasks = [backend.make_task(operation, [x, x] if operation == "backward" else [x]) for x in inputs]
            tasks[0].keep = keep
            outcomes = run(tasks)
            for x, outcome in zip(inputs, outcomes, strict=True):
                fails = x is bad and (operation == "backward" or where == "forward")
                assert isinstance(outcome, ExpertFailed) if fails else isinstance(outcome, list)
                if isinstance(outcome, MoEError):
                    str(outcome).encode()
                    assert (outcome.__context__, outcome.__cause__, outcome.__traceback__) == (None, None, None)
    assert all(p.grad is None for p in module_of(backend).parameters())


def test_a_lost_device_in_a_step_ends_the_runtime() -> None:
    backend = backend_of(lambda m, x: m.linear(x), lr=0.1)

    def fail(batch_size: int) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    backend.on_backward = fail  # type: ignore[method-assign]
    with pytest.raises(DeviceLost):
        backward(backend, [torch.ones(1, D), torch.ones(1, D)])


# --- gradients that are not finite -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_gradients_that_are_not_finite_train_nobody_and_others_in_the_batch_train(
    optimizer: Any, bad: float, adapted: bool
) -> None:
    def func(module: Module, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return module.linear(x) * scale

    backend, other = (backend_of(func, args_schema=(B(D), TensorProto(D))) for _ in range(2))
    for one in (backend, other):
        one.optimizer = optimizer(one.module.parameters(), lr=0.1)
    scale = torch.ones(D)
    good = [[torch.randn(2, D), scale, torch.randn(2, D)] for _ in range(3)]
    spoilt = [torch.full((2, D), 1.0), scale, torch.full((2, D), bad)]
    options: dict[str, Any] = {} if adapted else {"wants_grad": [True, False]}
    outcomes = backward(backend, good[0], spoilt, *good[1:], **options)
    assert not outcomes[1][0].isfinite().all() or bad == 1e30
    expected = backward(other, *good, **options)
    for (mine, *_), (theirs, *_) in zip([outcomes[0], *outcomes[2:]], expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    backward(backend, spoilt, **options)
    for mine, theirs in zip(module_of(backend).parameters(), other.module.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        assert mine.grad is None
    assert backend.updates == 1


def test_training_with_them_can_be_asked_for() -> None:
    backend = backend_of(lambda m, x: m.linear(x), lr=0.1, train_on_non_finite=True)
    backward(backend, [torch.ones(1, D), torch.full((1, D), float("nan"))])
    assert module_of(backend).linear.weight.isnan().all()
    assert backend.updates == 1


def test_one_part_of_a_task_that_is_not_finite_spoils_all_of_it() -> None:
    def func(module: Module, x: torch.Tensor) -> torch.Tensor:
        if len(x) > 2:
            raise torch.OutOfMemoryError("no room")
        return module.linear(x)

    backend = backend_of(func, lr=0.1)
    before = module_of(backend).linear.weight.detach().clone()
    grad = torch.ones(7, D)
    grad[6] = float("nan")
    ((got,),) = backward(backend, [torch.randn(7, D), grad])
    assert got[:6].isfinite().all()
    assert torch.equal(before, module_of(backend).linear.weight)
    backward(backend, [torch.randn(7, D), torch.ones(7, D)])
    assert backend.updates == 1


def test_statistics_do_not_become_nan() -> None:
    norm = nn.BatchNorm1d(D)
    backend = ExpertBackend("e.0", norm, args_schema=(B(D),))
    forward(backend, [torch.randn(4, D)])
    before = [buffer.clone() for buffer in norm.buffers()]
    ((output,),) = forward(backend, [torch.full((4, D), float("nan"))])
    assert output.isnan().all()
    assert all(buffer.isfinite().all() for buffer in norm.buffers())
    assert torch.equal(norm.running_mean, before[0])


# --- accumulated gradients -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["SGD", "Adam"])
@pytest.mark.parametrize("stop_after", [1, 2, 3, 4])
def test_a_restart_between_two_steps_changes_nothing(stop_after: int, name: str, tmp_path: Any) -> None:
    def make() -> ExpertBackend:
        backend = backend_of(lambda m, x: m.linear(x), accumulate_steps=3)
        backend.optimizer = getattr(torch.optim, name)(module_of(backend).parameters(), lr=0.1)
        return backend

    calls = [[torch.randn(2, D), torch.randn(2, D)] for _ in range(7)]
    straight, stopped, fresh = make(), make(), make()
    for call in calls:
        backward(straight, call)
    for call in calls[:stop_after]:
        backward(stopped, call)
    torch.save(stopped.state_dict(), tmp_path / "state")
    backward(fresh, calls[0])  # what it has by then is forgotten
    fresh.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for call in calls[stop_after:]:
        backward(fresh, call)
    for mine, theirs in zip(fresh.module.parameters(), straight.module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    assert fresh.updates == straight.updates == 2
    later = fresh.state_dict()["moe"]
    assert later["accumulated"] == 1
    old = {**stopped.state_dict(), "moe": {}}
    fresh.load_state_dict(old)
    assert all(parameter.grad is None for parameter in fresh.module.parameters())


def test_tasks_of_no_input_gradients_and_no_rows_are_what_they_were() -> None:
    backend = backend_of(lambda m, x: m.linear(x), lr=0.1)
    task: Task = backend.make_task("backward", [torch.zeros(0, D), torch.zeros(0, D)])
    (outcome,) = backend._run_backward([task])
    assert isinstance(outcome, list)
    assert [tuple(t.shape) for t in outcome if t is not None] == [(0, D)]
    assert backend.updates == 0
