"""The experts one can host: hivemind's numbers, adapters, registering, files of custom experts, schedules."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hivemind.moe.server.layers as stock_layers
import pytest
import torch
from hivemind.moe.server.layers.dropout import DeterministicDropout as StockDropout
from hivemind.moe.server.layers.lr_schedule import get_linear_schedule_with_warmup as stock_linear
from hivemind.utils.tensor_descr import BatchTensorDescriptor
from torch.optim.lr_scheduler import LambdaLR

from moe.config import BUILTIN_EXPERTS, SCHEDULERS
from moe.errors import ConfigError, SchemaError
from moe.schema import BatchTensorProto, Compression, ExpertSchema, TensorProto, as_proto
from moe.server import layers
from moe.server.expert_backend import ExpertBackend
from moe.server.layers import (
    add_custom_models_from_file,
    build_expert,
    expert_schema,
    name_to_block,
    name_to_input,
    name_to_schema,
    register_expert_class,
    schedule_name_to_scheduler,
)
from moe.server.layers.dropout import DeterministicDropout

HIDDEN_DIM = 32
STOCK_EXPERTS = ("ffn", "transformer", "nop", "nop_delay", "det_dropout")


@pytest.fixture(autouse=True)
def _same_registry_afterwards() -> Iterator[None]:
    registries: tuple[dict[str, Any], ...] = (name_to_block, name_to_input, name_to_schema)
    before = [dict(registry) for registry in registries]
    yield
    for registry, old in zip(registries, before):
        registry.clear()
        registry.update(old)


def schema_of(expert_cls: str, hidden_dim: int = HIDDEN_DIM, compression: int = 0) -> ExpertSchema:
    described = expert_schema(expert_cls, hidden_dim, compression)
    return ExpertSchema(
        described["args_schema"],
        described["kwargs_schema"],
        described["outputs_schema"],
        described["optional_kwargs"],
    )


def random_inputs(expert_cls: str, rows: int) -> list[torch.Tensor]:
    inputs = []
    for proto in schema_of(expert_cls).args:
        zeros = proto.make_zeros(rows)
        if zeros.is_floating_point():
            inputs.append(torch.randn_like(zeros))
        else:
            inputs.append(torch.randint(0, 2, zeros.shape).to(zeros.dtype))
    return inputs


# --- built-in experts -------------------------------------------------------------------------------------------------


def test_builtin_names() -> None:
    ours = {name for name, cls in name_to_block.items() if cls.__module__.startswith("moe.server.layers.")}
    assert ours == set(BUILTIN_EXPERTS)
    assert set(stock_layers.name_to_block) == set(STOCK_EXPERTS) < ours


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", STOCK_EXPERTS)
def test_equal_to_hivemind(name: str, training: bool) -> None:
    kwargs = {"delay": 0.0} if name == "nop_delay" else {}
    torch.manual_seed(0)
    stock = stock_layers.name_to_block[name](HIDDEN_DIM, **kwargs).train(training)
    torch.manual_seed(0)
    ours = name_to_block[name](HIDDEN_DIM, **kwargs).train(training)
    assert list(ours.state_dict()) == list(stock.state_dict())
    assert all(map(torch.equal, ours.state_dict().values(), stock.state_dict().values())), "same initialization"
    ours.load_state_dict(stock.state_dict())

    for rows in (3, 1, 3, 3):  # stock's gelu is compiled after some runs
        inputs, results = random_inputs(name, rows), []
        for module in (stock, ours):
            torch.manual_seed(rows)  # the transformer's dropout
            args = [t.clone().requires_grad_() if t.is_floating_point() else t for t in inputs]
            output = module(*args)
            gradient = torch.randn(output.shape, generator=torch.Generator().manual_seed(1))
            parameters = [parameter for parameter in module.parameters() if parameter.numel()]
            gradients = torch.autograd.grad(output, [args[0], *parameters], gradient)
            results.append([output.detach(), *gradients])
        for theirs, mine in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", STOCK_EXPERTS)
def test_schema_equals_hivemind(name: str) -> None:
    sample = stock_layers.name_to_input[name](3, HIDDEN_DIM)
    sample = sample if isinstance(sample, tuple) else (sample,)
    for codec in (Compression.NONE, Compression.FLOAT16):
        stock = tuple(as_proto(BatchTensorDescriptor.from_tensor(tensor, int(codec))) for tensor in sample)
        assert expert_schema(name, HIDDEN_DIM, codec) == {
            "args_schema": stock,
            "kwargs_schema": {},
            "optional_kwargs": (),
            "outputs_schema": None,
        }


@pytest.mark.parametrize("name", sorted(set(BUILTIN_EXPERTS) - {"nop_delay"}))
def test_builtins_make_backends(name: str) -> None:
    backend = ExpertBackend(f"{name}.0", build_expert(name, HIDDEN_DIM), **expert_schema(name, HIDDEN_DIM))
    assert backend.schema.outputs == backend.schema.args[0]


def test_number_of_parameters() -> None:
    assert sum(parameter.numel() for parameter in build_expert("ffn", 512).parameters()) == 2_100_736


def test_det_dropout_sample_mask_has_zeros_and_ones() -> None:
    _, mask = name_to_input["det_dropout"](64, HIDDEN_DIM)
    assert mask.dtype == torch.int64 and mask.unique().tolist() == [0, 1]


def test_deterministic_dropout() -> None:
    x = torch.randn(1000, 50)
    mask = (torch.rand_like(x) < 0.8).to(torch.int64)
    ours, stock = DeterministicDropout(0.2), StockDropout(0.2)
    results: list[tuple[torch.Tensor, torch.Tensor]] = []
    for dropout in (ours, stock):
        leaf = x.clone().requires_grad_()
        output = dropout(leaf, mask)
        results.append((output.detach(), torch.autograd.grad(output, leaf, x)[0]))
    assert all(map(torch.equal, *results))
    assert torch.equal(results[0][0] == 0, mask == 0) and torch.equal(results[0][1] == 0, mask == 0)
    assert (results[0][0] ** 2).mean().item() == pytest.approx((x**2).mean().item() / 0.8, rel=0.02)
    assert torch.equal(ours.eval()(x, mask), x)


# --- the adapted expert -----------------------------------------------------------------------------------------------


def test_adapted_ffn_equals_ffn_with_merged_weights() -> None:
    adapted, plain = build_expert("adapted_ffn", HIDDEN_DIM).double(), build_expert("ffn", HIDDEN_DIM).double()
    plain.load_state_dict(adapted.state_dict())
    x = torch.randn(5, HIDDEN_DIM, dtype=torch.float64)
    assert torch.equal(adapted(x), plain(x))
    for rank in (1, 5, HIDDEN_DIM):  # 5: the rank may equal the number of rows
        a = torch.randn(HIDDEN_DIM, rank, dtype=torch.float64, requires_grad=True)
        b = torch.randn(rank, 4 * HIDDEN_DIM, dtype=torch.float64, requires_grad=True)
        merged = {**plain.state_dict(), "ffn.weight": plain.get_parameter("ffn.weight") + (a @ b).T}
        expected = torch.func.functional_call(plain, merged, x)
        torch.testing.assert_close(adapted(x, lora_a=a, lora_b=b), expected)
        gradients = torch.autograd.grad(adapted(x, lora_a=a, lora_b=b).sin().sum(), (a, b))
        torch.testing.assert_close(gradients, torch.autograd.grad(expected.sin().sum(), (a, b)))
        assert torch.equal(adapted(x), plain(x)), "nothing of an adapter stays"


def test_adapted_ffn_runs_many_adapters_in_one_launch() -> None:
    module = build_expert("adapted_ffn", HIDDEN_DIM)
    x, a, b = torch.randn(3, 4, HIDDEN_DIM), torch.randn(3, HIDDEN_DIM, 2), torch.randn(3, 2, 4 * HIDDEN_DIM)
    stacked = torch.vmap(module)(x, a, b)
    for i in range(3):
        torch.testing.assert_close(stacked[i], module(x[i], a[i], b[i]))


def test_adapted_ffn_schema() -> None:
    schema = schema_of("adapted_ffn")
    assert schema.args == (BatchTensorProto(HIDDEN_DIM),)
    assert schema.kwargs == {
        "lora_a": TensorProto(HIDDEN_DIM, None),
        "lora_b": TensorProto(None, 4 * HIDDEN_DIM),
    }
    assert schema.optional == ("lora_a", "lora_b") and schema.required == ()


@pytest.mark.parametrize("half", ["lora_a", "lora_b"])
def test_half_an_adapter(half: str) -> None:
    module = build_expert("adapted_ffn", HIDDEN_DIM)
    with pytest.raises(SchemaError, match="together"):
        module(torch.randn(2, HIDDEN_DIM), **{half: torch.zeros(1, 1)})


# --- registering ------------------------------------------------------------------------------------------------------


def test_register_in_hiveminds_form() -> None:
    class Custom(torch.nn.Linear):
        def __init__(self, hid_dim: int):
            super().__init__(hid_dim, 1)

    def sample(batch_size: int, hid_dim: int) -> torch.Tensor:
        return torch.empty(batch_size, hid_dim)

    assert register_expert_class("custom", sample)(Custom) is Custom
    assert name_to_block["custom"] is Custom and name_to_input["custom"] is sample
    assert isinstance(build_expert("custom", 8), Custom)
    assert schema_of("custom", 8).args == (BatchTensorProto(8),)
    schema = name_to_schema["adapted_ffn"]
    for again in (register_expert_class("custom", sample), register_expert_class("custom", schema=schema)):
        with pytest.raises(RuntimeError, match="The class might already exist or be added twice"):
            again(Custom)


def test_register_in_schema_form() -> None:
    @register_expert_class(
        "custom",
        schema=lambda hidden_dim: {
            "args": (BatchTensorProto(None, hidden_dim),),
            "kwargs": {"mask": BatchTensorProto(None, dtype=torch.bool), "scale": TensorProto(hidden_dim)},
            "optional": ("scale",),
            "outputs": (BatchTensorProto(hidden_dim), [TensorProto()]),
        },
    )
    class Custom(torch.nn.Identity):
        pass

    assert "custom" in name_to_schema and "custom" not in name_to_input
    schema = schema_of("custom", 8, Compression.FLOAT16)
    half = Compression.FLOAT16
    assert schema.args == (BatchTensorProto(None, 8, compression=half),)
    assert schema.kwargs == {
        "mask": BatchTensorProto(None, dtype=torch.bool),
        "scale": TensorProto(8, compression=half),
    }
    assert schema.optional == ("scale",)
    assert schema.outputs == (BatchTensorProto(8, compression=half), [TensorProto(compression=half)])


def test_exactly_one_form() -> None:
    with pytest.raises(ConfigError, match="either sample_input or schema"):
        register_expert_class("custom")
    with pytest.raises(ConfigError, match="either sample_input or schema"):
        register_expert_class("custom", name_to_input["ffn"], schema=name_to_schema["adapted_ffn"])
    assert "custom" not in name_to_block


def test_unknown_class_lists_known_ones() -> None:
    for function in (expert_schema, build_expert):
        with pytest.raises(ConfigError, match="'unknown'.*adapted_ffn, det_dropout, ffn, nop, nop_delay, transformer"):
            function("unknown", 8)


@pytest.mark.parametrize(
    "form",
    [
        {"schema": lambda hidden_dim: {"arguments": (BatchTensorProto(hidden_dim),)}},
        {"schema": lambda hidden_dim: None},
        {"schema": lambda: {"args": ()}},
        {"sample_input": lambda batch_size, hid_dim: [torch.empty(batch_size, hid_dim)]},
        {"sample_input": lambda batch_size: torch.empty(batch_size)},
    ],
)
def test_bad_descriptions(form: dict[str, Any]) -> None:
    register_expert_class("custom", **form)(torch.nn.Identity)
    with pytest.raises(ConfigError, match="'custom' does not describe its inputs"):
        expert_schema("custom", 8)


def test_compression_that_cannot_be_is_refused_early() -> None:
    register_expert_class("custom", schema=lambda hid: {"args": (BatchTensorProto(hid, dtype=torch.bfloat16),)})(
        torch.nn.Identity
    )
    with pytest.raises(SchemaError, match="bfloat16"):
        expert_schema("custom", 8, Compression.FLOAT16)


def test_hidden_dim_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match="'transformer' with hidden_dim=30"):
        build_expert("transformer", 30)


# --- files of custom experts ------------------------------------------------------------------------------------------

CUSTOM_FILE = """
from dataclasses import dataclass
import torch
import torch.nn.functional as F
from torch import nn
from moe.schema import BatchTensorProto, TensorProto
from moe.server.layers import register_expert_class

@dataclass
class Sizes:  # dataclasses look their module up in sys.modules
    inner: "int" = 3

sample_input = lambda batch_size, hidden_dim: torch.empty((batch_size, hidden_dim))

@register_expert_class("perceptron", sample_input)
class MultilayerPerceptron(nn.Module):
    def __init__(self, hidden_dim, num_classes=10):
        super().__init__()
        self.layer1 = nn.Linear(hidden_dim, 2 * hidden_dim)
        self.layer2 = nn.Linear(2 * hidden_dim, num_classes)

    def forward(self, x):
        return self.layer2(F.relu(self.layer1(x)))

multihead_sample_input = lambda batch_size, hidden_dim: (
    torch.empty((batch_size, hidden_dim)),
    torch.empty((batch_size, 2 * hidden_dim)),
    torch.empty((batch_size, 3 * hidden_dim)),
)

@register_expert_class("multihead", multihead_sample_input)
class MultiheadNetwork(nn.Module):
    def __init__(self, hidden_dim, num_classes=10):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(i * hidden_dim, num_classes) for i in (1, 2, 3))

    def forward(self, *xs):
        return sum(layer(x) for layer, x in zip(self.layers, xs))

@register_expert_class("adapted", schema=lambda hidden_dim: dict(
    args=(BatchTensorProto(hidden_dim),), kwargs={"shift": TensorProto(hidden_dim)}, optional=("shift",)))
class Adapted(nn.Linear):
    def __init__(self, hidden_dim):
        super().__init__(hidden_dim, hidden_dim)

    def forward(self, x, shift=None):
        return super().forward(x if shift is None else x + shift)
"""


def test_file_of_custom_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experts.py").write_text(CUSTOM_FILE)
    monkeypatch.chdir(tmp_path)
    module = add_custom_models_from_file("experts.py")
    assert sys.modules[module.__name__] is module and name_to_block["perceptron"] is module.MultilayerPerceptron
    assert add_custom_models_from_file(tmp_path / "experts.py") is module, "not executed a second time"

    assert schema_of("multihead", 8).args == tuple(BatchTensorProto(i * 8) for i in (1, 2, 3))
    backend = ExpertBackend("adapted.0", build_expert("adapted", 8), **expert_schema("adapted", 8))
    assert backend.schema.optional == ("shift",) and backend.schema.outputs == BatchTensorProto(8)

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "experts.py").write_text("answer = 42")
    assert add_custom_models_from_file(tmp_path / "other" / "experts.py").answer == 42, "another file of that name"


def test_missing_file(tmp_path: Path) -> None:
    for path in (tmp_path / "absent.py", tmp_path):
        with pytest.raises(ConfigError) as caught:
            add_custom_models_from_file(str(path))
        assert str(path) in str(caught.value)


def test_file_that_is_not_python(tmp_path: Path) -> None:
    (tmp_path / "experts.txt").write_text(CUSTOM_FILE)
    with pytest.raises(ConfigError, match=r"Python file.*experts\.txt"):
        add_custom_models_from_file(tmp_path / "experts.txt")


@pytest.mark.parametrize("mistake", ["1 / 0", "def broken(:", "import there_is_no_such_module"])
def test_failing_file_leaves_nothing_behind(tmp_path: Path, mistake: str) -> None:
    path = tmp_path / "experts.py"
    path.write_text(f"{CUSTOM_FILE}\n{mistake}\n")
    modules_before = set(sys.modules)
    with pytest.raises(ConfigError) as caught:
        add_custom_models_from_file(path)
    assert str(path) in str(caught.value) and isinstance(
        caught.value.__cause__, (ArithmeticError, SyntaxError, ImportError)
    )
    assert "perceptron" not in name_to_block and "adapted" not in name_to_schema
    assert not [name for name in set(sys.modules) - modules_before if name.startswith("moe_custom_")]
    path.write_text(CUSTOM_FILE + "# corrected")
    add_custom_models_from_file(path)
    assert "perceptron" in name_to_block


# --- schedules --------------------------------------------------------------------------------------------------------


def rates(schedule: Callable[..., LambdaLR] | None, steps: int, **kwargs: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    assert schedule is not None
    scheduler, found = schedule(optimizer, **kwargs), []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_schedule_names() -> None:
    assert sorted(schedule_name_to_scheduler) == sorted(SCHEDULERS)
    assert schedule_name_to_scheduler["none"] is None
    assert set(stock_layers.schedule_name_to_scheduler) <= set(schedule_name_to_scheduler)


@pytest.mark.parametrize(("warmup", "total"), [(5, 13), (0, 7), (0, 0), (4, 4), (6, 3), (1, 1000)])
def test_linear_schedule_is_hiveminds(warmup: int, total: int) -> None:
    numbers = {"num_warmup_steps": warmup, "num_training_steps": total}
    assert rates(schedule_name_to_scheduler["linear"], 20, **numbers) == rates(stock_linear, 20, **numbers)


def test_cosine_and_constant_schedules() -> None:
    numbers = {"num_warmup_steps": 4, "num_training_steps": 14}
    warmup = [0.3 * step / 4 for step in range(4)]
    cosine = [0.15 * (1 + math.cos(math.pi * step / 10)) for step in range(10)]
    assert rates(schedule_name_to_scheduler["cosine"], 20, **numbers) == pytest.approx(warmup + cosine + [0.0] * 6)
    assert rates(schedule_name_to_scheduler["constant"], 20, **numbers) == pytest.approx(warmup + [0.3] * 16)


def test_schedules_refuse_nonsense() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    for name in ("linear", "cosine", "constant"):
        schedule = schedule_name_to_scheduler[name]
        assert schedule is not None
        with pytest.raises(ConfigError, match="needs an optimizer"):
            schedule(None, 1, 2)
        with pytest.raises(ConfigError, match="negative"):
            schedule(optimizer, -1, 2)
        schedule(optimizer, None, 2)
        if name != "constant":
            with pytest.raises(ConfigError, match=f"'{name}' needs num_training_steps"):
                schedule(optimizer, 1, None)
    assert layers.get_constant_schedule_with_warmup(optimizer, 3).get_last_lr() == [0.0]
