"""Folders with models as they are in the world: what transformers reads from one is hosted and called, or refused by name."""

from __future__ import annotations

import json
import logging
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from moe import DistributedModel
from moe.errors import ConfigError
from moe.model_config import _HONOURED, _NEUTRAL, _WITHOUT_EFFECT, read_config
from moe.server.pretrained import PretrainedModel
from tests.client.sequence_swarm import QUICK
from tests.hosted import Hosted, hosted
from tests.pretrained import LAYERS, padding_mask, save_model, token_ids

TOLERANCE = dict(rtol=1e-4, atol=1e-4)
Change = Callable[[dict[str, Any]], object]


def edit(folder: Path, change: Change) -> Path:
    """Change config.json."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def copied(source: Path, folder: Path, change: Change = lambda config: None) -> Path:
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return edit(folder, change)


def opened(made: Hosted, folder: Path, **options: Any) -> DistributedModel:
    """A client of these servers that has this folder."""
    transport: Any = made.swarm.transport
    return DistributedModel.from_pretrained(folder, transport, config=QUICK, manager=made.router, **options)


def hidden_through(folder: Path, hidden: torch.Tensor, **given: torch.Tensor) -> torch.Tensor:
    model = PretrainedModel(folder)
    with torch.no_grad():
        for index in range(LAYERS):
            hidden = model.load_block(index)(hidden, **given)
    return hidden


def check_blocks(folder: Path, length: int = 9, padded: bool = True) -> None:
    """The blocks of a folder compute what transformers computes with it."""
    whole: Any = transformers.AutoModel.from_pretrained(folder).eval()
    ids, masks = token_ids(2, length), dict(attention_mask=padding_mask([length, length - 3])) if padded else {}
    with torch.no_grad():
        expected = whole(ids, output_hidden_states=True, **masks).hidden_states
        got = hidden_through(folder, expected[0], **masks)
        norm = getattr(whole, "norm", None) or getattr(whole, "ln_f", None) or torch.nn.Identity()
    mask = masks.get("attention_mask", torch.ones(2, length)).bool()
    assert_close(norm(got)[mask], expected[-1][mask], **TOLERANCE)


# --- configurations -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral, window"])
def test_a_decoder_that_sees_both_ways(kind: str, tmp_path: Path) -> None:
    save_model(kind, tmp_path)
    before = hidden_through(tmp_path, torch.ones(1, 5, 32))
    check_blocks(edit(tmp_path, lambda config: config.update(is_causal=False)))
    assert not torch.allclose(hidden_through(tmp_path, torch.ones(1, 5, 32).cumsum(1)), before, atol=1e-2)


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize("rope", [YARN, LINEAR, {"type": "linear", "factor": 4.0}], ids=["yarn", "linear", "old"])
def test_stretched_rotary_embeddings(rope: dict[str, Any], tmp_path: Path) -> None:
    save_model("llama", tmp_path)
    old = "type" in rope

    def stretch(config: dict[str, Any]) -> None:
        config.pop("rope_parameters", None)
        config.update({"rope_scaling": rope, "rope_theta": 1e4} if old else {"rope_parameters": rope})

    check_blocks(edit(tmp_path, stretch), length=200)


@pytest.mark.parametrize("chunk", [2, 3, 9])
def test_layers_that_compute_in_chunks(chunk: int, tmp_path: Path) -> None:
    save_model("bert", tmp_path)
    check_blocks(edit(tmp_path, lambda config: config.update(chunk_size_feed_forward=chunk)), length=18)


def test_a_broken_generation_config(llama: Hosted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (copied(llama.folder, tmp_path) / "generation_config.json").write_text("nonsense")
    opened(llama, tmp_path)
    assert "generation_config.json cannot be read" in caplog.text


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_implementation_of_attention(attention: str, tmp_path: Path) -> None:
    save_model("gemma2", tmp_path)  # with a soft cap that sdpa leaves out, in transformers, too
    edit(tmp_path, lambda config: config.update(attn_implementation=attention, attn_logit_softcapping=0.5))
    check_blocks(tmp_path)


def test_output_hidden_states_in_the_file(llama: Hosted, tmp_path: Path) -> None:
    copied(llama.folder, tmp_path, lambda config: config.update(output_hidden_states=True))
    PretrainedModel(tmp_path).load_block(0)  # blocks are what they are
    with pytest.raises(ConfigError, match="output_hidden_states: not available"):
        opened(llama, tmp_path)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (dict(hidden_size=-32), "hidden_size is -32, expected an integer from 1"),
        (dict(hidden_size=2**40), "hidden_size is 1099511627776"),
        (dict(hidden_size="32"), "hidden_size is '32'"),
        (dict(intermediate_size=2**60), "intermediate_size is"),
        (dict(num_hidden_layers=10**9), "num_hidden_layers is 1000000000, expected an integer from 1 to 4096"),
        (dict(num_attention_heads=0), "num_attention_heads is 0"),
        (dict(num_attention_heads=5), "llama|does not describe|cannot read"),
        (dict(num_key_value_heads=True), "num_key_value_heads is True"),
        (dict(head_dim=-1), "head_dim is -1"),
        (dict(quantization_config={"quant_method": "gptq", "bits": 4}), "quantiz"),
        (dict(add_cross_attention=True), "add_cross_attention: True"),
        (dict(rope_parameters={"rope_type": "longrope", "rope_theta": 1e4}), "longrope"),
        (dict(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "dynamic"),
        (dict(rope_parameters={"rope_type": "nonsense", "rope_theta": 1e4}), "nonsense|cannot"),
        (dict(attn_implementation="flex_attention"), "attn_implementation: 'flex_attention'"),
        (dict(hidden_act="nonsense"), "does not describe a block"),
        (dict(hidden_act={"a": 1}), "cannot|does not"),
        (dict(model_type="t5"), "models of type 't5' cannot be hosted"),
        (dict(model_type=["llama"]), "cannot be hosted"),
        (dict(attention_chunk_size=8), "has attention_chunk_size: 8, of which this version does not know"),
    ],
    ids=str,
)
def test_configurations_that_are_refused(change: dict[str, Any], complaint: str, llama: Hosted, tmp_path: Path) -> None:
    copied(llama.folder, tmp_path, lambda config: config.update(change))
    began = time.monotonic()
    with pytest.raises(ConfigError, match=complaint):
        PretrainedModel(tmp_path).load_block(0)
    assert time.monotonic() - began < 10  # wanted are two seconds, on a quiet machine


VALUES = st.one_of(
    st.integers(1, 100),
    st.floats(0.1, 2),
    st.text(min_size=1, max_size=5),
    st.just(True),
    st.lists(st.integers(), min_size=1),
)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    name=st.text("abcdefghijklmnopqrstuvwxyz_", min_size=3, max_size=20),
    value=VALUES,
    kind=st.sampled_from(["llama", "bert"]),
)
def test_a_field_that_is_not_known_is_refused_by_name(
    name: str, value: Any, kind: str, llama: Hosted, bert: Hosted, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = llama.folder if kind == "llama" else bert.folder
    written = json.loads((source / "config.json").read_text())
    known = (
        _HONOURED | _WITHOUT_EFFECT | _NEUTRAL.keys()
    )  # those of other kinds, too, which transformers does not look at
    if name in written or name in known or name in transformers.AutoConfig.for_model(kind).to_dict():
        return
    folder = tmp_path_factory.mktemp("field")
    (folder / "config.json").write_text(json.dumps({**written, name: value}))
    with pytest.raises(ConfigError, match=rf"{name}: "):
        read_config(folder)


def test_fields_of_real_files_are_known(tmp_path: Path, llama: Hosted) -> None:
    """What is in configurations of published models beside what makes a difference."""
    more = dict(
        _name_or_path="x", torch_dtype="float32", transformers_version="4.31.0", pretraining_tp=1, use_cache=True,
        unsloth_version="2024", gradient_checkpointing=False, position_embedding_type="absolute", model_max_length=512,
        task_specific_params={"text-generation": {"do_sample": True}}, auto_map={"AutoConfig": "code.Config"},
        _attn_implementation_autoset=True, pooler_type="first_token_transform", directionality="bidi", quantization_config=None,
    )  # fmt: skip
    copied(llama.folder, tmp_path, lambda config: config.update(more))
    check_blocks(tmp_path)


# --- files --------------------------------------------------------------------------------------------------------------


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], **how: Any) -> Path:
    """Change the tensors of a folder."""
    tensors = change(load_file(folder / "model.safetensors"))
    if "pickled" in how:
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=how["pickled"] == "new")
    else:
        save_file(tensors, folder / "model.safetensors", metadata=how.get("metadata", {"format": "pt"}))
    return folder


def test_frequencies_and_masks_in_old_files(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    def old(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        more = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(4) for i in range(LAYERS)}
        return {**tensors, **more}

    save_model("llama", tmp_path)
    check_blocks(rewrite(tmp_path, old))
    assert not [record for record in caplog.records if record.name.startswith("moe")]


def test_the_old_masks_of_gpt2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model("gpt2", tmp_path)
    more = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 4, 4) for i in range(LAYERS)}
    more |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(LAYERS)}
    check_blocks(rewrite(tmp_path, lambda tensors: {**tensors, **more}))
    assert not [record for record in caplog.records if record.name.startswith("moe")]


@pytest.mark.parametrize("how", [dict(pickled="new"), dict(pickled="old"), dict(metadata=None)], ids=str)
@pytest.mark.parametrize("renamed", ["", "no prefix", "layer norms"])
def test_files_of_any_age(how: dict[str, Any], renamed: str, bert: Hosted, tmp_path: Path) -> None:
    def rename(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        if renamed == "layer norms":
            old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            for new, name in old.items():
                tensors = {key.replace(new, name): tensor for key, tensor in tensors.items()}
        return {f"bert.{key}" if renamed == "no prefix" else key: tensor for key, tensor in tensors.items()}

    rewrite(copied(bert.folder, tmp_path), rename, **how)
    hidden = torch.randn(2, 5, 32)
    assert_close(hidden_through(tmp_path, hidden), hidden_through(bert.folder, hidden))
    with torch.no_grad():
        got = opened(bert, tmp_path)(token_ids(2, 5)).last_hidden_state
        assert_close(got, bert.local(token_ids(2, 5)).last_hidden_state, **TOLERANCE)


def test_links_to_files(llama: Hosted, tmp_path: Path) -> None:
    """As the cache of a hub has them."""
    for file in llama.folder.iterdir():
        (tmp_path / file.name).symlink_to(file)
    check_blocks(tmp_path)
    opened(llama, tmp_path)


def test_a_client_needs_the_shards_of_embeddings_and_head_only(tmp_path: Path) -> None:
    with hosted("llama", tmp_path / "whole", max_shard_size="10KB") as made:
        files = json.loads((made.folder / "model.safetensors.index.json").read_text())["weight_map"]
        needed = {file for name, file in files.items() if ".layers." not in name}
        assert needed < set(files.values())
        (tmp_path / "own").mkdir()
        for name in ("config.json", "model.safetensors.index.json", *needed):
            (tmp_path / "own" / name).write_bytes((made.folder / name).read_bytes())
        model = opened(made, tmp_path / "own")
        with torch.no_grad():
            assert_close(model(token_ids(2, 5)).logits, made.local(token_ids(2, 5)).logits, **TOLERANCE)


def test_missing_embeddings_are_reported(llama: Hosted, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rewrite(copied(llama.folder, tmp_path), lambda tensors: {k: t for k, t in tensors.items() if "embed" not in k})
    with caplog.at_level(logging.WARNING):
        opened(llama, tmp_path)
    assert "they begin at random: model.embed_tokens.weight" in caplog.text


def test_an_adapter_beside_the_model_is_not_the_model(llama: Hosted, tmp_path: Path) -> None:
    copied(llama.folder, tmp_path)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "nowhere", "target_modules": ["nonsense"], "r": 2}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    PretrainedModel(tmp_path).load_block(0)
    with torch.no_grad():
        assert_close(opened(llama, tmp_path)(token_ids(2, 5)).logits, llama.local(token_ids(2, 5)).logits, **TOLERANCE)


def test_weights_that_transformers_would_not_use_are_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_model("llama", tmp_path)
    more = {f"model.layers.{i}.self_attn.q_proj.bias": torch.ones(32) for i in range(LAYERS)}
    with caplog.at_level(logging.WARNING):
        check_blocks(rewrite(tmp_path, lambda tensors: {**tensors, **more}))
    assert "not used, as in transformers: self_attn.q_proj.bias" in caplog.text


def lie(folder: Path) -> None:
    """An index of a file that has not what it says."""
    tensors = load_file(folder / "model.safetensors")
    names = list(tensors)
    save_file({k: t for k, t in tensors.items() if "q_proj" not in k}, folder / "model-1.safetensors")
    (folder / "model.safetensors").unlink()
    save_file({"other": torch.ones(1)}, folder / "model-2.safetensors")
    index = {"weight_map": {name: f"model-{2 if 'q_proj' in name else 1}.safetensors" for name in names}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def header_of_a_gigabyte(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 2**30) + b"{" * 100)


def truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def not_finite(folder: Path) -> None:
    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.0.self_attn.q_proj.weight"][3, 4] = float("nan")
        return tensors

    rewrite(folder, spoil)


def other_sizes(folder: Path) -> None:
    rewrite(folder, lambda tensors: {k: t[:8] if k.endswith("q_proj.weight") else t for k, t in tensors.items()})


def other_names(folder: Path) -> None:
    rewrite(folder, lambda tensors: {f"module.{k}": t for k, t in tensors.items()})


def one_value_for_many(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.layers.0.self_attn.q_proj.weight": torch.ones(1).expand(2**40)}, folder / "pytorch_model.bin")


def compressed(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"model.layers.0.x": torch.zeros(2**16)}, folder / "stored.bin")
    deflated = zipfile.ZipFile(folder / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED)
    with zipfile.ZipFile(folder / "stored.bin") as stored, deflated:
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))


def pickled_list(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save([torch.ones(2)], folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda folder: (folder / "config.json").unlink(), "it has no config.json"),
        (lambda folder: (folder / "config.json").write_text("[1]"), "holds a list, not an object"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "llama", '), "cannot read .*config.json"),
        (lambda folder: (folder / "config.json").write_text("[" * 100_000), "cannot read .*config.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights in"),
        (lie, r"these weights are missing: self_attn.q_proj.weight"),
        (header_of_a_gigabyte, r"cannot read .*model.safetensors: its header claims 1073741824 bytes"),
        (truncated, "cannot read .*model.safetensors"),
        (not_finite, "self_attn.q_proj.weight has values that are not finite"),
        (other_sizes, "does not fit its configuration"),
        (other_names, r"are called module.model.layers.0.\*, expected model.layers.0"),
        (pickled_list, "holds a list, not a dict"),
        (one_value_for_many, r"q_proj.weight says it has the shape \(1099511627776,\), in a file of"),
        (compressed, "it is compressed"),
    ],
)
def test_files_that_are_refused(spoil: Callable[[Path], object], complaint: str, llama: Hosted, tmp_path: Path) -> None:
    spoil(copied(llama.folder, tmp_path))
    with pytest.raises(ConfigError, match=complaint):
        PretrainedModel(tmp_path).load_block(0)


# --- dtypes, junk ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("low", ["blocks", "the rest", "one tensor"])
@pytest.mark.parametrize("pickled", [False, True])
def test_a_dtype_that_is_not_in_the_file_is_that_of_the_first_tensor(
    low: str, pickled: bool, llama: Hosted, tmp_path: Path
) -> None:
    """What transformers makes of files with several dtypes, in every block."""
    copied(llama.folder, tmp_path, lambda config: config.pop("dtype"))
    state = load_file(tmp_path / "model.safetensors")
    chosen = {
        "blocks": [name for name in state if ".layers." in name],
        "the rest": [name for name in state if ".layers." not in name],
        "one tensor": ["model.layers.1.mlp.up_proj.weight"],
    }[low]
    state = {name: tensor.bfloat16() if name in chosen else tensor for name, tensor in state.items()}
    (tmp_path / "model.safetensors").unlink()
    if pickled:
        torch.save(state, tmp_path / "pytorch_model.bin")
    else:
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    expected = transformers.LlamaForCausalLM.from_pretrained(tmp_path).dtype
    model = PretrainedModel(tmp_path)
    for index in range(LAYERS):
        assert {p.dtype for p in model.load_block(index).layer.parameters()} == {expected}
    assert opened(llama, tmp_path).local.dtype == expected


@pytest.mark.parametrize("dtype", [7, "int8", "float8_e4m3fn"])
def test_a_dtype_that_nobody_computes_in(dtype: Any, llama: Hosted, tmp_path: Path) -> None:
    copied(llama.folder, tmp_path, lambda config: config.update(dtype=dtype))
    with pytest.raises(ConfigError, match=r"dtype is .*, expected one of float16, bfloat16"):
        PretrainedModel(tmp_path)


def test_a_rope_type_that_is_not_a_name(llama: Hosted, tmp_path: Path) -> None:
    rope = {"rope_type": ["linear"], "rope_theta": 1e4, "factor": 2.0}
    copied(llama.folder, tmp_path, lambda config: config.update(rope_parameters=rope))
    with pytest.raises(ConfigError, match="rope_type is"):
        PretrainedModel(tmp_path)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int8, torch.bool], ids=str)
def test_weights_that_are_not_floating_point(dtype: torch.dtype, llama: Hosted, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    copied(llama.folder, tmp_path)
    rewrite(tmp_path, lambda state: {**state, name: state[name].to(dtype)})
    with pytest.raises(ConfigError, match=r"block 1 of .*: mlp.up_proj.weight is of dtype .*, expected floating-point"):
        PretrainedModel(tmp_path).load_block(1)


@pytest.mark.parametrize("named", [3, [3], {"a": 1}, "LlamaForCausalLM"], ids=str)
def test_architectures_that_name_no_class(named: Any, llama: Hosted, tmp_path: Path) -> None:
    copied(llama.folder, tmp_path, lambda config: config.update(architectures=named))
    assert type(opened(llama, tmp_path).local) is transformers.LlamaModel


@pytest.mark.parametrize("first", ["sliding_attention", "full_attention"])
def test_an_encoder_with_one_kind_of_attention(first: str, tmp_path: Path) -> None:
    with hosted("modernbert", tmp_path, layer_types=[first] * LAYERS) as made:
        ids, given = token_ids(2, 9), dict(attention_mask=padding_mask([9, 5]))
        with torch.no_grad():
            got, expected = (each(ids, **given)[0] for each in (made.distributed(), made.local))
        assert_close(got[given["attention_mask"].bool()], expected[given["attention_mask"].bool()], **TOLERANCE)
