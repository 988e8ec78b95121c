"""Adapters of a client: what they begin with, the kwargs they become, training them through servers, and peft's files.

Keys, shapes and settings of peft are as peft 0.21.2 writes them; tests/compat compares with peft itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from moe.client.adapters import (
    BlockAdapter,
    Ia3Adapter,
    LoraAdapter,
    PrefixAdapter,
    SoftPrompt,
    combine,
    from_peft,
    load_peft,
    save_peft,
    to_peft,
)
from moe.client.sequential import RemoteSequential
from moe.errors import ConfigError
from moe.schema import BatchTensorProto, ExpertSchema, TensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.pretrained import PretrainedModel
from moe.testing import memory_swarm
from tests.client.sequence_swarm import QUICK, FixedRouter
from tests.pretrained import LAYERS, save_model

HIDDEN = 32
LORA_SETTINGS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["query", "output.dense"],
    "bias": "none",
}


@pytest.fixture(scope="module")
def backends(tmp_path_factory: pytest.TempPathFactory) -> list[ExpertBackend]:
    """The blocks of an encoder."""
    return blocks_of("bert", tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> list[ExpertBackend]:
    """The blocks of a decoder."""
    return blocks_of("llama", tmp_path_factory.mktemp("llama"))


def blocks_of(kind: str, folder: Path) -> list[ExpertBackend]:
    save_model(kind, folder)
    model = PretrainedModel(folder)
    blocks = [model.load_block(index) for index in range(LAYERS)]
    return [ExpertBackend(f"block.{i}", block, **block.backend_options()) for i, block in enumerate(blocks)]


@pytest.fixture(scope="module")
def remote(decoder: list[ExpertBackend]) -> Iterator[RemoteSequential]:
    """A sequence of the decoder's blocks, on two servers."""
    servers = [{b.name: b for b in decoder[:1]}, {b.name: b for b in decoder[1:]}]
    router = FixedRouter([b.name for b in decoder], {f"server{i}": set(own) for i, own in enumerate(servers)})
    with memory_swarm(*servers) as swarm:
        yield RemoteSequential(swarm.transport, router.uids, config=QUICK, manager=router)  # type: ignore[arg-type]


def local(backends: list[ExpertBackend], hidden: torch.Tensor, adapter: BlockAdapter) -> torch.Tensor:
    for backend, kwargs in zip(backends, adapter()):
        hidden = backend.module(hidden, **kwargs)
    return hidden


def randomize(adapter: BlockAdapter) -> BlockAdapter:
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    return adapter


MAKERS: dict[str, Callable[[list[ExpertBackend]], BlockAdapter]] = {
    "lora": lambda backends: LoraAdapter.for_blocks(backends, rank=3, alpha=6),
    "ia3": lambda backends: Ia3Adapter.for_blocks(backends),
    "prefix": lambda backends: PrefixAdapter.for_blocks(backends, length=4),
}


# --- new ones -------------------------------------------------------------------------------------------------------------


def test_targets_are_the_last_parts_of_names(backends: list[ExpertBackend], decoder: list[ExpertBackend]) -> None:
    def names(adapter: BlockAdapter) -> set[str]:
        assert len({frozenset(kwargs) for kwargs in adapter()}) == 1
        return set(adapter()[0])

    assert names(LoraAdapter.for_blocks(backends)) == {"lora_attention__self__query", "lora_attention__self__value"}
    assert names(LoraAdapter.for_blocks(decoder)) == {"lora_self_attn__q_proj", "lora_self_attn__v_proj"}
    both = {"lora_attention__output__dense", "lora_output__dense"}
    assert names(LoraAdapter.for_blocks(backends, targets=["output.dense"])) == both
    assert names(LoraAdapter.for_blocks(backends, targets=["attention.output.dense"])) == both - {"lora_output__dense"}
    assert names(Ia3Adapter.for_blocks(decoder)) == {
        "ia3_self_attn__k_proj", "ia3_self_attn__v_proj", "ia3_input_mlp__down_proj",
    }  # fmt: skip
    assert names(Ia3Adapter.for_blocks(decoder, input_targets=())) == {"ia3_self_attn__k_proj", "ia3_self_attn__v_proj"}
    with pytest.raises(ConfigError, match=r"none of \['qery'\] is among the linear layers .*'attention.self.query'"):
        LoraAdapter.for_blocks(backends, targets=["qery"])


def test_sizes_come_from_the_schemas(decoder: list[ExpertBackend]) -> None:
    pair = LoraAdapter.for_blocks(decoder, rank=5, targets=["k_proj", "down_proj"])()[0]
    assert (pair["lora_self_attn__k_proj"]["a"].shape, pair["lora_self_attn__k_proj"]["b"].shape) == ((32, 5), (5, 16))
    assert (pair["lora_mlp__down_proj"]["a"].shape, pair["lora_mlp__down_proj"]["b"].shape) == ((48, 5), (5, 32))
    assert PrefixAdapter.for_blocks(decoder, length=3)()[0]["prefix"]["value"].shape == (3, 16)


def test_a_sequence_tells_what_its_blocks_take(decoder: list[ExpertBackend], remote: RemoteSequential) -> None:
    assert remote.schemas() == [backend.schema for backend in decoder]


def test_blocks_that_take_no_prefix() -> None:
    plain = ExpertBackend("b.0", nn.Linear(4, 4), args_schema=(BatchTensorProto(4),))
    with pytest.raises(ConfigError, match="these blocks take no prefix"):
        PrefixAdapter.for_blocks([plain], length=2)


def test_at_first_lora_and_ia3_change_nothing(backends: list[ExpertBackend]) -> None:
    hidden = torch.randn(2, 5, HIDDEN)
    plain = local(backends, hidden, BlockAdapter({} for _ in backends))
    for name in ("lora", "ia3"):
        assert_close(local(backends, hidden, MAKERS[name](backends)), plain)


def test_an_adapter_is_saved_as_any_module(backends: list[ExpertBackend], tmp_path: Path) -> None:
    adapter, other = (randomize(MAKERS["lora"](backends)) for _ in range(2))
    torch.save(adapter.state_dict(), tmp_path / "adapter.pt")
    other.load_state_dict(torch.load(tmp_path / "adapter.pt", weights_only=True))
    hidden = torch.randn(2, 5, HIDDEN)
    assert torch.equal(local(backends, hidden, adapter), local(backends, hidden, other))


# --- training -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MAKERS)
def test_g2_training_an_adapter_through_servers(
    kind: str, decoder: list[ExpertBackend], remote: RemoteSequential
) -> None:
    """Gradients are those of the same blocks here, the loss falls, and the servers' weights never change."""
    torch.manual_seed(0)
    weights = {b.name: {k: v.clone() for k, v in b.module.state_dict().items()} for b in decoder}
    adapter, teacher = MAKERS[kind](decoder), randomize(MAKERS[kind](decoder))
    hidden = torch.randn(4, 6, HIDDEN)
    target = local(decoder, hidden, teacher).detach()
    optimizer = torch.optim.Adam(adapter.parameters(), lr=0.02)
    losses = []
    for step in range(25):
        loss = nn.functional.mse_loss(remote(hidden, block_kwargs=adapter()), target)
        optimizer.zero_grad()
        loss.backward()
        if step in (0, 24):
            expected = nn.functional.mse_loss(local(decoder, hidden, adapter), target)
            grads = torch.autograd.grad(expected, list(adapter.parameters()))
            for parameter, grad in zip(adapter.parameters(), grads, strict=True):
                assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-6)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] * 0.6
    for backend in decoder:
        state = backend.module.state_dict()
        assert all(torch.equal(state[name], tensor) for name, tensor in weights[backend.name].items())


# --- peft -----------------------------------------------------------------------------------------------------------------


def peft_lora(blocks: str = "encoder.layer") -> dict[str, torch.Tensor]:
    """A state dict as peft has it: matrices of torch's Linear, that is (out, in)."""
    state = {}
    for index in range(LAYERS):
        for linear, (inputs, outputs) in {"attention.self.query": (32, 32), "output.dense": (48, 32)}.items():
            key = f"base_model.model.{blocks}.{index}.{linear}"
            state[f"{key}.lora_A.weight"] = torch.randn(2, inputs) / 3
            state[f"{key}.lora_B.weight"] = torch.randn(outputs, 2) / 3
    return state


@pytest.mark.parametrize(("rank_stabilized", "scale"), [(False, 8 / 2), (True, 8 / 2**0.5)])
def test_a_lora_of_peft_changes_weights_as_it_does_there(
    rank_stabilized: bool, scale: float, backends: list[ExpertBackend], tmp_path: Path
) -> None:
    state = peft_lora("bert.encoder.layer")
    adapter = from_peft({**LORA_SETTINGS, "use_rslora": rank_stabilized}, state, LAYERS)
    hidden = torch.randn(2, 5, HIDDEN)
    adapted = local(backends, hidden, adapter)
    for index, backend in enumerate(blocks_of("bert", tmp_path)):
        for name, linear in backend.module.linears():  # type: ignore[operator, union-attr]
            key = f"base_model.model.bert.encoder.layer.{index}.{name}"
            if f"{key}.lora_A.weight" in state:
                down, up = state[f"{key}.lora_A.weight"], state[f"{key}.lora_B.weight"]
                linear.weight.data += up @ down * scale
        hidden = backend.module(hidden)
    assert_close(adapted, hidden, rtol=1e-5, atol=1e-5)


def test_a_lora_goes_to_peft_and_back_bit_by_bit(tmp_path: Path) -> None:
    state = peft_lora()
    adapter = from_peft(LORA_SETTINGS, state, LAYERS)
    save_peft(adapter, tmp_path / "saved", "encoder.layer", task_type="FEATURE_EXTRACTION")
    saved = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    settings = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert settings == {
        "peft_type": "LORA",
        "r": 2,
        "rank_pattern": {},
        "lora_alpha": 8,
        "alpha_pattern": {},
        "lora_dropout": 0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "target_modules": [
            f"encoder.layer.{i}.{name}" for i in range(LAYERS) for name in ("attention.self.query", "output.dense")
        ],
        "task_type": "FEATURE_EXTRACTION",
    }
    again = load_peft(tmp_path / "saved", LAYERS)
    assert all(torch.equal(a, b) for a, b in zip(adapter.parameters(), again.parameters(), strict=True))


def test_layers_of_other_ranks(backends: list[ExpertBackend]) -> None:
    state = peft_lora()
    key = "base_model.model.encoder.layer.1.output.dense"
    state |= {f"{key}.lora_A.weight": torch.randn(5, 48), f"{key}.lora_B.weight": torch.randn(32, 5)}
    adapter = from_peft({**LORA_SETTINGS, "rank_pattern": {"layer.1.output.dense": 5}}, state, LAYERS)
    assert adapter()[1]["lora_output__dense"]["a"].shape == (48, 5)
    assert_close(adapter()[1]["lora_output__dense"]["b"], state[f"{key}.lora_B.weight"].T * 8 / 5)
    settings, _ = to_peft(adapter, "encoder.layer")
    assert settings["r"] == 5
    assert len(settings["rank_pattern"]) == 5
    assert settings["rank_pattern"]["encoder.layer.0.output.dense"] == 2


def test_blocks_that_are_not_adapted() -> None:
    state = {key: tensor for key, tensor in peft_lora().items() if ".layer.1." in key}
    assert [len(kwargs) for kwargs in from_peft(LORA_SETTINGS, state, LAYERS)()] == [0, 2, 0]


def test_ia3_of_peft() -> None:
    state: dict[str, torch.Tensor] = {}
    for index in range(LAYERS):
        key = f"base_model.model.encoder.layer.{index}"
        state |= {f"{key}.attention.self.key.ia3_l": torch.rand(32, 1), f"{key}.output.dense.ia3_l": torch.rand(1, 48)}
    adapter = from_peft({"peft_type": "IA3"}, state, LAYERS)
    kwargs = adapter()[2]
    assert torch.equal(kwargs["ia3_attention__self__key"], state[f"{key}.attention.self.key.ia3_l"][:, 0])
    assert torch.equal(kwargs["ia3_input_output__dense"], state[f"{key}.output.dense.ia3_l"][0])
    settings, saved = to_peft(adapter, "encoder.layer")
    assert saved.keys() == state.keys()
    assert all(torch.equal(saved[name], state[name]) for name in state)
    inputs = [f"encoder.layer.{index}.output.dense" for index in range(LAYERS)]
    keys = [f"encoder.layer.{index}.attention.self.key" for index in range(LAYERS)]
    assert settings["target_modules"] == sorted(inputs + keys)
    assert settings["feedforward_modules"] == inputs


def test_a_prefix_of_peft() -> None:
    learned = torch.randn(
        5, LAYERS * 2 * 16
    )  # peft: .view(5, layers * 2, heads, size of a head), keys and values by turns
    adapter = from_peft({"peft_type": "PREFIX_TUNING"}, {"prompt_embeddings": learned}, LAYERS)
    pairs = learned.view(5, LAYERS * 2, 2, 8)
    for index, kwargs in enumerate(adapter()):
        assert torch.equal(kwargs["prefix"]["key"].reshape(5, 2, 8), pairs[:, 2 * index])
        assert torch.equal(kwargs["prefix"]["value"].reshape(5, 2, 8), pairs[:, 2 * index + 1])
    settings, saved = to_peft(adapter, "model.layers")
    assert torch.equal(saved["prompt_embeddings"], learned)
    sizes = {"num_virtual_tokens": 5, "num_layers": LAYERS, "token_dim": 16, "num_transformer_submodules": 1}
    assert settings == {"peft_type": "PREFIX_TUNING", **sizes}


@pytest.mark.parametrize(
    ("settings", "state", "complaint"),
    [
        ({"peft_type": "ADALORA"}, {}, "adapter_config.json: peft_type: expected one of LORA, .* got 'ADALORA'"),
        ({**LORA_SETTINGS, "lora_bias": True}, {}, "adapter_config.json: lora_bias: True is not supported"),
        (
            LORA_SETTINGS,
            {"base_model.model.classifier.weight": torch.ones(2, 2)},
            r"classifier.weight': .*pass the DistributedModel: load_peft\(folder, model\)",
        ),
        (LORA_SETTINGS, {"encoder.layer.0.x.lora_A.weight": torch.ones(2, 2)}, "does not begin with base_model.model."),
        (LORA_SETTINGS, {"base_model.model.encoder.layer.0.x.lora_E": torch.ones(2)}, "expected lora_A.weight, lora_B"),
        (LORA_SETTINGS, {"base_model.model.encoder.layer.3.x.lora_A.weight": torch.ones(2, 2)}, "any of the 3 blocks"),
        (
            LORA_SETTINGS,
            {"base_model.model.encoder.layer.2.x.lora_A.weight": torch.ones(2, 2)},
            "only one half of lora_x",
        ),
        (
            {"peft_type": "PREFIX_TUNING"},
            {"prompt_embeddings": torch.ones(2, 7)},
            r"expected \(P, 3 blocks \* 2 \* keys\), got \(2, 7\)",
        ),
        ({"peft_type": "PREFIX_TUNING"}, {}, "expected prompt_embeddings, got"),
    ],
)
def test_what_cannot_be_taken_from_peft(
    settings: dict[str, Any], state: dict[str, torch.Tensor], complaint: str
) -> None:
    with pytest.raises(ConfigError, match=complaint):
        from_peft(settings, state, LAYERS)


def test_dropout_is_for_eval_mode_only() -> None:
    adapter = from_peft({**LORA_SETTINGS, "lora_dropout": 0.1}, peft_lora(), LAYERS)
    assert adapter()
    with pytest.raises(ConfigError, match=r"lora_dropout: .* 0.1: call eval\(\)"):
        adapter.train()()
    assert to_peft(adapter, "encoder.layer")[0]["lora_dropout"] == 0.1


def test_alphas_of_single_layers() -> None:
    adapter = from_peft({**LORA_SETTINGS, "alpha_pattern": {r"layer\.1\..*dense": 2}}, peft_lora(), LAYERS)
    scales = [adapter.scale_of(index, name) for index in range(LAYERS) for name in adapter()[index]]
    assert scales == [4, 4, 4, 1, 4, 4]
    settings, state = to_peft(adapter, "encoder.layer")
    assert settings["alpha_pattern"] == {"encoder.layer.1.output.dense": 2}
    again = from_peft(settings, state, LAYERS)
    assert all(torch.equal(a["b"], b["b"]) for a, b in zip(adapter()[1].values(), again()[1].values()))
    with pytest.raises(ConfigError, match="alphas: expected one dict for each of 1 blocks, got 2"):
        LoraAdapter([{}], alpha=1, alphas=[{}, {}])


def test_a_soft_prompt_goes_to_peft_and_back(tmp_path: Path) -> None:
    prompt = SoftPrompt.random(3, HIDDEN)
    save_peft(prompt, tmp_path, "encoder.layer", task_type="FEATURE_EXTRACTION")
    again = load_peft(tmp_path, LAYERS)
    assert isinstance(again, SoftPrompt)
    assert torch.equal(again(), prompt())
    assert again().requires_grad
    with pytest.raises(ConfigError, match=r"a soft prompt has embeddings \(P, D\), got \(3,\)"):
        SoftPrompt(torch.ones(3))


def test_what_peft_could_not_load_is_not_saved(backends: list[ExpertBackend], tmp_path: Path) -> None:
    lora = LoraAdapter.for_blocks(backends)
    for adapter, settings, complaint in (
        (BlockAdapter([{}]), {}, "peft has no files for a BlockAdapter"),
        (LoraAdapter([{}], alpha=1), {}, "a LoRA for one layer at least"),
        (LoraAdapter([{"ia3_x": torch.ones(2)}], alpha=1), {}, "peft has no LoRA with ia3_x"),
        (Ia3Adapter([{"ia3_x": torch.ones(2), "ia3_input_x": torch.ones(2)}]), {}, r"both here: \['b.0.x'\]"),
        (lora, {"task_type": "SEQ_2_SEQ_LM"}, "task_type: expected null or one of"),
        (lora, {"task_type": "SEQ_CLS"}, "task_type: peft loads this only with the weights of classifier, score"),
        (lora, {"modules_to_save": ["x"]}, "modules_to_save: peft loads this only with the weights of x"),
        (lora, {"use_magic": True}, "use_magic: True is not supported"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            save_peft(adapter, tmp_path / "x", "b", **settings)
    assert not (tmp_path / "x").exists()


# --- several ------------------------------------------------------------------------------------------------------------------


def test_a_sum_of_loras_with_weights(backends: list[ExpertBackend]) -> None:
    one = randomize(LoraAdapter.for_blocks(backends, rank=2, alpha=3))
    other = randomize(LoraAdapter.for_blocks(backends, rank=3, targets=["value", "output.dense"]))
    combined = combine([one, other], [0.5, -2])
    for kwargs, mine, others in zip(combined(), one(), other()):
        assert kwargs.keys() == mine.keys() | others.keys()
        for name, pair in kwargs.items():
            parts = [(k[name], w) for k, w in ((mine, 0.5), (others, -2)) if name in k]
            assert_close(pair["a"] @ pair["b"], sum(w * part["a"] @ part["b"] for part, w in parts))
    settings, _ = to_peft(combined, "encoder.layer")
    assert (settings["r"], settings["lora_alpha"]) == (5, 5)


def test_what_cannot_be_combined(backends: list[ExpertBackend]) -> None:
    lora, ia3 = LoraAdapter.for_blocks(backends, rank=2), Ia3Adapter.for_blocks(backends)
    stabilized = LoraAdapter([{}, {}, {}], alpha=1, rank_stabilized=True)
    dora = LoraAdapter([{"dora_x": torch.ones(2)}, {}, {}], alpha=1)
    for adapters, weights, how, complaint in (
        ([], [], "cat", "0 adapters"),
        ([lora, LoraAdapter([{}], alpha=1)], [1, 1], "cat", r"for \[1, 3\] blocks"),
        ([lora], [1, 2], "cat", "1 adapters for .* 2 weights"),
        ([lora], [float("nan")], "cat", "finite weights"),
        ([lora, ia3], [1, 1], "cat", "expected LoRA adapters, none of them rank-stabilized, or IA3"),
        ([lora, stabilized], [1, 1], "cat", "none of them rank-stabilized"),
        ([lora, dora], [1, 1], "cat", r"with \['dora_x'\]"),
        ([lora, lora], [1, 1], "svd", "svd"),
        ([lora, LoraAdapter.for_blocks(backends, rank=3)], [1, 1], "linear", r"has ranks \[2, 3\].*use cat"),
    ):
        with pytest.raises(ConfigError, match=complaint):
            combine(adapters, weights, how)


class Described(NamedTuple):
    """A block of which only its schema is known, as somebody tells it."""

    schema: ExpertSchema


@pytest.mark.parametrize(
    "proto",
    [
        TensorProto(), TensorProto(None), TensorProto(None, None), TensorProto(2**40, None), TensorProto(0, 1), (),
        {"a": TensorProto(8, None)}, {"a": TensorProto(2**50, None), "b": TensorProto(None, 2**50)},
        {"a": {"a": TensorProto(8)}, "b": TensorProto(None, 8)}, {"key": TensorProto(1), "value": TensorProto(1)},
        {"key": TensorProto(None, None), "value": TensorProto(None, None)},
    ],
    ids=repr,
)  # fmt: skip
@pytest.mark.parametrize("name", ["lora_self_attn__q_proj", "ia3_self_attn__k_proj", "prefix"])
def test_schemas_that_no_layer_can_have_are_named(name: str, proto: Any) -> None:
    block = Described(ExpertSchema((BatchTensorProto(8),), {name: proto}, BatchTensorProto(8)))
    make: Callable[[], Any] = {
        "lora_self_attn__q_proj": lambda: LoraAdapter.for_blocks([block]),
        "ia3_self_attn__k_proj": lambda: Ia3Adapter.for_blocks([block], input_targets=()),
        "prefix": lambda: PrefixAdapter.for_blocks([block], length=2),
    }[name]
    with pytest.raises(ConfigError, match="a block's schema has"):
        make()
