"""Blocks of pretrained models: the same numbers as the whole model in transformers, adapters as per-call inputs, files of
every form, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.testing import assert_close

from moe.dht import stop_dht
from moe.errors import ConfigError, RemoteSchemaError, SchemaError
from moe.schema import BatchTensorProto, Compression, TensorProto
from moe.server.assembly import assemble
from moe.server.expert_backend import ExpertBackend
from moe.server.pretrained import PretrainedBlock, PretrainedModel
from moe.testing import memory_swarm
from tests.pretrained import LAYERS, MODELS, minilm_folder, padding_mask, save_model, token_ids

HIDDEN = 32
TOLERANCE = dict(rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each kind of model."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in MODELS}
    for kind, folder in folders.items():
        save_model(kind, folder)
    return folders


def blocks_of(folder: Path, count: int = LAYERS) -> list[PretrainedBlock]:
    model = PretrainedModel(folder)
    return [model.load_block(index).requires_grad_(False) for index in range(count)]


def backend_of(block: PretrainedBlock, uid: str = "block.0") -> ExpertBackend:
    return ExpertBackend(uid, block, **block.backend_options())


def loaded(kind: str, folder: Path) -> Any:
    model_class: Any = MODELS[kind][1]
    return model_class.from_pretrained(folder).requires_grad_(False)


def lora(block: PretrainedBlock, linear: str, rank: int, seed: int) -> dict[str, torch.Tensor]:
    layer = dict(block.linears())[linear]
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(layer.in_features, rank, generator=generator) / 3
    return {"a": a, "b": torch.randn(rank, layer.out_features, generator=generator) / 3}


# --- the same as the whole model ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["nothing", "padding", "left padding", "positions", "one token"])
@pytest.mark.parametrize("kind", MODELS)
def test_blocks_equal_the_model(kind: str, inputs: str, folders: dict[str, Path]) -> None:
    lengths = [1, 1, 1] if inputs == "one token" else [9, 5, 7]
    given: dict[str, torch.Tensor] = {}
    if inputs in ("padding", "left padding", "positions"):
        given["attention_mask"] = padding_mask(lengths, left=inputs == "left padding")
    if inputs == "positions":
        given["position_ids"] = torch.arange(max(lengths)) + torch.tensor([[2], [0], [11]])
    model, blocks = loaded(kind, folders[kind]), blocks_of(folders[kind])
    outputs = model(token_ids(3, max(lengths)), output_hidden_states=True, **given)
    hidden = outputs.hidden_states[0]
    taken = {name: tensor for name, tensor in given.items() if name in blocks[0].schema().kwargs}
    assert ("position_ids" in blocks[0].schema().kwargs) == (kind not in ("bert", "roberta"))
    for block in blocks:
        hidden = block(hidden, **taken)
    norm = getattr(model.base_model, "norm", nn.Identity())  # transformers shows the last hidden states after it
    assert_close(norm(hidden), outputs.hidden_states[-1], **TOLERANCE)


def test_rotary_embeddings_may_be_given_instead_of_positions(folders: dict[str, Path]) -> None:
    (block,) = blocks_of(folders["llama"], 1)
    hidden, positions = torch.randn(2, 5, HIDDEN), torch.arange(5).repeat(2, 1) * 3
    assert block.rotary is not None
    mask = torch.ones(2, 5, dtype=torch.long)  # without one, such positions are those of several sequences
    given = block(hidden, attention_mask=mask, position_embeddings=block.rotary(hidden, positions))
    assert torch.equal(given, block(hidden, attention_mask=mask, position_ids=positions))
    assert not torch.allclose(given, block(hidden))


def test_a_row_does_not_see_what_is_padding(folders: dict[str, Path]) -> None:
    for kind in ("bert", "llama"):
        (block,) = blocks_of(folders[kind], 1)
        hidden, mask = torch.randn(2, 6, HIDDEN), padding_mask([6, 4])
        other = hidden.clone()
        other[1, 4:] = 7.0
        assert torch.equal(block(hidden, attention_mask=mask)[1, :4], block(other, attention_mask=mask)[1, :4])


def test_the_real_encoder() -> None:
    model = transformers.BertModel.from_pretrained(minilm_folder()).requires_grad_(False)
    ids, mask = torch.randint(1000, 20000, (2, 12)), padding_mask([12, 8])
    outputs = model(ids, attention_mask=mask, output_hidden_states=True)
    hidden = outputs.hidden_states[0]
    for block in blocks_of(minilm_folder(), 6):
        hidden = block(hidden, attention_mask=mask)
    assert_close(hidden, outputs.last_hidden_state, **TOLERANCE)


# --- adapters -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_lora_is_a_change_of_weights(kind: str, folders: dict[str, Path]) -> None:
    (block,), (merged,) = blocks_of(folders[kind], 1), blocks_of(folders[kind], 1)
    hidden, mask = torch.randn(2, 6, HIDDEN), padding_mask([6, 4])
    adapters = {}
    for seed, (name, linear) in enumerate(merged.linears()):
        pair = lora(block, name, rank=1 + seed, seed=seed)
        adapters[f"lora_{name.replace('.', '__')}"] = pair
        linear.weight += (pair["a"] @ pair["b"]).T
    adapted = block(hidden, attention_mask=mask, **adapters)
    assert_close(adapted, merged(hidden, attention_mask=mask), **TOLERANCE)
    assert not torch.allclose(adapted, block(hidden, attention_mask=mask), atol=1e-2)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_ia3_scales_outputs_and_inputs(kind: str, folders: dict[str, Path]) -> None:
    (block,), (scaled,) = blocks_of(folders[kind], 1), blocks_of(folders[kind], 1)
    hidden = torch.randn(2, 6, HIDDEN)
    adapters: dict[str, torch.Tensor] = {}
    for name, linear in scaled.linears():
        kwarg = name.replace(".", "__")
        output, inputs = torch.rand(linear.out_features) + 0.5, torch.rand(linear.in_features) + 0.5
        adapters |= {f"ia3_{kwarg}": output, f"ia3_input_{kwarg}": inputs}
        linear.weight.mul_(output[:, None] * inputs)
        if linear.bias is not None:
            linear.bias.mul_(output)
    assert_close(block(hidden, **adapters), scaled(hidden), **TOLERANCE)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_a_prefix_is_what_transformers_sees_as_earlier_positions(
    kind: str, masked: bool, folders: dict[str, Path]
) -> None:
    model, blocks = loaded(kind, folders[kind]), blocks_of(folders[kind])
    earlier, key_size = 4, blocks[0].key_size
    prefixes = [{"key": torch.randn(earlier, key_size), "value": torch.randn(earlier, key_size)} for _ in blocks]
    cache = transformers.DynamicCache()
    for index, prefix in enumerate(prefixes):
        heads = (t.reshape(1, earlier, -1, 8).transpose(1, 2).expand(3, -1, -1, -1) for t in prefix.values())
        cache.update(*heads, index)
    mask = padding_mask([7, 4, 6]) if masked else torch.ones(3, 7, dtype=torch.long)
    with_prefix = nn.functional.pad(mask, (earlier, 0), value=1)
    embedded = model.get_input_embeddings()(token_ids(3, 7))
    if kind == "bert":
        embedded = model.embeddings(inputs_embeds=embedded)
        extended = with_prefix[:, None, None, :].bool().expand(-1, 1, 7, -1)
        expected = model.encoder(embedded, attention_mask=extended, past_key_values=cache).last_hidden_state
    else:
        expected = model.model(
            inputs_embeds=embedded, attention_mask=with_prefix, past_key_values=cache
        ).last_hidden_state
    hidden, given = embedded, {"attention_mask": mask} if masked else {}
    for block, prefix in zip(blocks, prefixes):
        hidden = block(hidden, prefix=prefix, **given)
    assert_close(getattr(model.base_model, "norm", nn.Identity())(hidden), expected, **TOLERANCE)


def test_a_prompt_is_added_to_the_first_positions(folders: dict[str, Path]) -> None:
    (block,) = blocks_of(folders["bert"], 1)
    hidden, prompt = torch.randn(2, 6, HIDDEN), torch.randn(2, 3, HIDDEN)
    expected = hidden.clone()
    expected[:, :3] += prompt
    assert torch.equal(block(hidden, prompt=prompt), block(expected))


def test_an_adapter_of_rank_zero_changes_nothing(folders: dict[str, Path]) -> None:
    (block,) = blocks_of(folders["bert"], 1)
    hidden = torch.randn(2, 6, HIDDEN)
    name = "attention.self.query"
    assert torch.equal(block(hidden, lora_attention__self__query=lora(block, name, 0, 0)), block(hidden))


def test_nothing_of_a_call_stays_in_the_block(folders: dict[str, Path]) -> None:
    (block,) = blocks_of(folders["bert"], 1)
    hidden = torch.randn(2, 6, HIDDEN)
    before, state = block(hidden), {name: tensor.clone() for name, tensor in block.state_dict().items()}
    block(
        hidden, lora_attention__self__query=lora(block, "attention.self.query", 4, 0), ia3_output__dense=torch.zeros(32)
    )
    with pytest.raises(SchemaError):
        block(
            hidden,
            ia3_output__dense=torch.zeros(32),
            lora_output__dense={"a": torch.ones(48, 2), "b": torch.ones(3, 32)},
        )
    assert torch.equal(block(hidden), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in block.state_dict().items())


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_callers_with_different_adapters_in_one_batch(kind: str, folders: dict[str, Path]) -> None:
    """Each gets what it would get alone, and the gradients of its own adapter (K2, K4: never mixed)."""
    (block,) = blocks_of(folders[kind], 1)
    linear = "attention.self.query" if kind == "bert" else "self_attn.q_proj"
    kwarg = f"lora_{linear.replace('.', '__')}"

    def call(expert: Any, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(2, 5, HIDDEN, generator=generator, requires_grad=True)
        pair = {name: t.requires_grad_() for name, t in lora(block, linear, 2, seed).items()}
        key, value = (torch.randn(3, block.key_size, generator=generator).requires_grad_() for _ in range(2))
        adapters = {kwarg: pair, "prefix": {"key": key, "value": value}}
        output = expert(hidden, attention_mask=padding_mask([5, 3]), **adapters)
        leaves = [hidden, *pair.values(), key, value]
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    expected = [call(block, seed) for seed in range(3)]
    with memory_swarm({"block.0": backend_of(block)}) as swarm:
        expert = swarm.expert("block.0")
        expert.describe()
        with ThreadPoolExecutor(3) as threads:
            with swarm.server.paused():
                futures = [threads.submit(call, expert, seed) for seed in range(3)]
                swarm.server.wait_pending(3)
            got = [future.result(60) for future in futures]
    for mine, alone in zip(got, expected):
        for tensor, other in zip(mine, alone):
            assert_close(tensor, other, **TOLERANCE)
    assert block.training is False


# --- schema ---------------------------------------------------------------------------------------------------------------


def test_the_schema_comes_from_the_layers_signature(folders: dict[str, Path]) -> None:
    (bert,), (llama,) = blocks_of(folders["bert"], 1), blocks_of(folders["llama"], 1)
    schema = bert.schema()
    assert schema.args == (BatchTensorProto(None, HIDDEN),)
    assert schema.outputs == BatchTensorProto(None, HIDDEN)
    assert schema.required == ()
    assert schema.kwargs["attention_mask"] == BatchTensorProto(None, dtype=torch.int64)
    assert schema.kwargs["lora_intermediate__dense"] == {"a": TensorProto(32, None), "b": TensorProto(None, 48)}
    assert schema.kwargs["ia3_output__dense"] == TensorProto(32)
    assert schema.kwargs["ia3_input_output__dense"] == TensorProto(48)
    assert "position_ids" not in schema.kwargs
    schema = llama.schema()
    assert schema.kwargs["position_ids"] == BatchTensorProto(None, dtype=torch.int64)
    assert schema.kwargs["position_embeddings"] == (BatchTensorProto(None, 8), BatchTensorProto(None, 8))
    assert schema.kwargs["prefix"]["key"] == TensorProto(None, 16)  # two heads of keys and values for four of queries
    assert {name for name in schema.kwargs if name.startswith("lora_")} == {
        f"lora_{name.replace('.', '__')}" for name, _ in llama.linears()
    }


def test_compression_is_for_all_tensors(folders: dict[str, Path]) -> None:
    (block,) = blocks_of(folders["bert"], 1)
    options = block.backend_options(Compression.FLOAT16)
    assert options["args_schema"][0].compression == Compression.FLOAT16
    assert options["kwargs_schema"]["prefix"]["key"].compression == Compression.FLOAT16
    assert options["kwargs_schema"]["attention_mask"].compression == Compression.NONE


@pytest.mark.parametrize(
    ("kwargs", "complaint"),
    [
        (dict(attention_mask=torch.ones(2, 5, dtype=torch.long)), "attention_mask: expected 6 positions"),
        (dict(prompt=torch.ones(2, 7, HIDDEN)), "prompt: expected 6 positions at most"),
        (dict(prefix={"key": torch.ones(2, 32), "value": torch.ones(3, 32)}), r"prefix\['value'\]: expected length 2"),
        (dict(prefix={"key": torch.ones(65, 32), "value": torch.ones(65, 32)}), "64 positions at most, got 65"),
        (dict(lora_output__dense={"a": torch.ones(48, 2), "b": torch.ones(3, 32)}), r"lora_output__dense\['b'\]"),
    ],
)
def test_lengths_that_do_not_fit(kwargs: Mapping[str, Any], complaint: str, folders: dict[str, Path]) -> None:
    (block,) = blocks_of(folders["bert"], 1)
    with pytest.raises(SchemaError, match=complaint):
        block(torch.randn(2, 6, HIDDEN), **kwargs)


def test_too_long_hurts_nobody_else(folders: dict[str, Path]) -> None:
    (block,) = blocks_of(folders["llama"], 1)
    with memory_swarm({"block.0": backend_of(block)}) as swarm:
        with pytest.raises(RemoteSchemaError, match="64 positions at most, got 65"):
            swarm.expert("block.0")(torch.randn(1, 65, HIDDEN))
        assert swarm.expert("block.0")(torch.randn(1, 64, HIDDEN)).shape == (1, 64, HIDDEN)


# --- files ----------------------------------------------------------------------------------------------------------------


def same_state(block: nn.Module, other: nn.Module) -> bool:
    state, expected = block.state_dict(), other.state_dict()
    return state.keys() == expected.keys() and all(torch.equal(state[name], expected[name]) for name in state)


def test_shards_of_other_blocks_are_not_needed(tmp_path: Path, folders: dict[str, Path]) -> None:
    save_model("bert", tmp_path, max_shard_size="30KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in index.items() if name.startswith("encoder.layer.1.")}
    assert needed < set(index.values())
    for file in set(index.values()) - needed:
        (tmp_path / file).unlink()
    model = PretrainedModel(tmp_path)
    assert same_state(model.load_block(1), blocks_of(folders["bert"])[1])
    with pytest.raises(ConfigError, match="cannot read"):
        model.load_block(0)


@pytest.mark.parametrize("sharded", [False, True])
def test_pickled_weights(sharded: bool, tmp_path: Path, folders: dict[str, Path]) -> None:
    state = loaded("llama", folders["llama"]).state_dict()
    if sharded:
        names = sorted(state)
        files = {name: f"pytorch_model-{i % 2}.bin" for i, name in enumerate(names)}
        for file in set(files.values()):
            torch.save({name: state[name] for name in names if files[name] == file}, tmp_path / file)
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": files}))
    else:
        torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folders["llama"] / "config.json").read_text())
    assert same_state(PretrainedModel(tmp_path).load_block(2), blocks_of(folders["llama"])[2])


class Payload:
    def __reduce__(self) -> Any:
        return (Path.touch, (Path("executed"),))


def test_pickled_code_is_not_executed(
    tmp_path: Path, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"layers.0.x": Payload()}, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folders["llama"] / "config.json").read_text())
    with pytest.raises(ConfigError, match="cannot read"):
        PretrainedModel(tmp_path).load_block(0)
    assert not (tmp_path / "executed").exists()


def test_names_of_old_checkpoints(tmp_path: Path, folders: dict[str, Path]) -> None:
    state = {
        f"bert.{name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')}": tensor
        for name, tensor in loaded("bert", folders["bert"]).state_dict().items()
    }
    torch.save(state, tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    assert same_state(PretrainedModel(tmp_path).load_block(0), blocks_of(folders["bert"])[0])


def test_bfloat16_stays(tmp_path: Path) -> None:
    save_model("llama", tmp_path, dtype=torch.bfloat16)
    model = loaded("llama", tmp_path)  # unlike Module.to, it keeps rotary frequencies in float32
    assert model.dtype == torch.bfloat16
    blocks = blocks_of(tmp_path)
    assert blocks[0].schema().args == (BatchTensorProto(None, HIDDEN, dtype=torch.bfloat16),)
    hidden = model.model.embed_tokens(token_ids(2, 5))
    adapters = {"lora_self_attn__q_proj": lora(blocks[0], "self_attn.q_proj", 2, 0)}  # adapters stay float32
    assert blocks[0](hidden, **adapters).dtype == torch.bfloat16
    outputs = model(inputs_embeds=hidden, output_hidden_states=True)
    for block in blocks:
        hidden = block(hidden)
    assert torch.equal(model.model.norm(hidden), outputs.hidden_states[-1])


def test_weights_that_do_not_fit_the_configuration(tmp_path: Path, folders: dict[str, Path]) -> None:
    save_model("bert", tmp_path, hidden_size=64)
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    with pytest.raises(ConfigError, match=r"block 0 of .* does not fit its configuration"):
        PretrainedModel(tmp_path).load_block(0)
    with pytest.raises(ConfigError, match="does not fit its configuration"):  # there is no such block
        PretrainedModel(folders["bert"]).load_block(LAYERS)


def test_a_folder_without_weights(tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    model = PretrainedModel(tmp_path)
    with pytest.raises(ConfigError, match="no weights in"):
        model.load_block(0)
    (tmp_path / "model.safetensors").write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00nonsense")
    with pytest.raises(ConfigError, match="cannot read"):
        model.load_block(0)


@pytest.mark.parametrize(
    "index", ["[]", "{}", "nonsense", '{"weight_map": {"encoder.layer.0.x": "../other/model.safetensors"}}']
)
def test_an_index_that_is_none(index: str, tmp_path: Path, folders: dict[str, Path]) -> None:
    (tmp_path / "config.json").write_text((folders["bert"] / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(ConfigError, match="cannot read"):
        PretrainedModel(tmp_path).load_block(0)


# --- as experts of a server -----------------------------------------------------------------------------------------------


def test_a_server_of_some_blocks(folders: dict[str, Path]) -> None:
    parts = assemble(
        model_path=folders["bert"], block_indices="1:3", block_prefix="bert.", host_maddrs=["/ip4/127.0.0.1/tcp/0"]
    )
    stop_dht(parts.dht)
    assert list(parts.backends) == ["bert.1", "bert.2"]
    for index, backend in enumerate(parts.backends.values(), start=1):
        assert backend.optimizer is None
        assert same_state(backend.module, blocks_of(folders["bert"])[index])


def test_all_blocks_with_an_optimizer(folders: dict[str, Path]) -> None:
    parts = assemble(model_path=folders["llama"], optim_cls=torch.optim.SGD, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    stop_dht(parts.dht)
    assert list(parts.backends) == [f"block.{index}" for index in range(LAYERS)]
    assert all(isinstance(backend.optimizer, torch.optim.SGD) for backend in parts.backends.values())


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        (dict(block_indices="2:4"), "there is no block 3 in a model of 3 blocks"),
        (dict(num_experts=1), "leave out num_experts"),
        (dict(total_blocks=3), "leave out blocks and total_blocks"),
        (dict(scheduler="constant"), "need an optimizer"),
    ],
)
def test_settings_that_contradict_the_model(settings: dict[str, Any], complaint: str, folders: dict[str, Path]) -> None:
    with pytest.raises(ConfigError, match=complaint):
        assemble(model_path=folders["bert"], **settings)


def test_nothing_is_fetched_from_the_network(folders: dict[str, Path]) -> None:
    """In a process where every connection and look-up is an error."""
    code = f"""
import socket
def no_network(*args, **kwargs):
    raise AssertionError("network access")
socket.socket.connect = socket.getaddrinfo = socket.create_connection = no_network
from moe.server.pretrained import PretrainedModel
PretrainedModel({str(folders["bert"])!r}).load_block(0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
