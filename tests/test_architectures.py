"""Which pretrained models are taken, how refusals read, and what the kwargs of a block are called."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import transformers

from moe.architectures import (
    ARCHITECTURES,
    IA3,
    IA3_INPUT,
    LORA,
    import_transformers,
    kwarg_of,
    linear_of,
)
from moe.errors import ConfigError
from moe.model_config import architecture_of, read_config

DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}


def config_of(kind: str, **options: Any) -> Any:
    return transformers.AutoConfig.for_model(kind, **options)


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_what_the_table_names_exists(kind: str) -> None:
    architecture = ARCHITECTURES[kind]
    assert issubclass(architecture.find(architecture.layer), object)
    assert architecture.rotary is None or architecture.find(architecture.rotary)
    assert architecture_of(config_of(kind)) is architecture


@pytest.mark.parametrize(
    ("kind", "options", "complaint"),
    [
        ("t5", {}, "models of type 't5' cannot be hosted; those of these types can: bert, roberta, xlm-roberta"),
        ("qwen2", dict(layer_types=["chunked_attention"] * 32), "layer_types has"),
        ("gemma", dict(use_bidirectional_attention=True), "use_bidirectional_attention is set"),
        ("bloom", dict(is_causal=False), "is_causal is False"),
        ("bert", dict(attn_implementation="flash_attention_2"), "its attention is flash_attention_2"),
        ("bert", dict(is_decoder=True, add_cross_attention=True), "it has cross-attention"),
        ("bert", dict(quantization_config={"quant_method": "bitsandbytes"}), "it is quantized"),
        ("bert", dict(num_hidden_layers=0), "it has no blocks"),
        ("llama", dict(rope_parameters=DYNAMIC), "its rotary embeddings are dynamic: they depend on earlier calls"),
    ],
)
def test_models_that_cannot_be_hosted(kind: str, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        architecture_of(config_of(kind, **options))


def test_configurations_are_read_from_disk_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no model in 'bert-base-uncased'"):
        read_config("bert-base-uncased")
    (tmp_path / "config.json").write_text("nonsense")
    with pytest.raises(ConfigError, match="cannot read"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": {"AutoConfig": "code.Config"}}))
    (tmp_path / "code.py").write_text("raise SystemExit('executed')")
    with pytest.raises(ConfigError, match="models of type 'x' cannot be hosted"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 36}))
    assert (read_config(tmp_path).hidden_size, read_config(tmp_path, num_labels=7).num_labels) == (36, 7)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}")

    with monkeypatch.context() as patched:
        patched.setattr(importlib, "import_module", missing)
        with pytest.raises(ConfigError, match=r'pip install "transformers>=5,<6"'):
            import_transformers()
    monkeypatch.setattr(import_transformers(), "__version__", "4.57.6")
    with pytest.raises(ConfigError, match=r"transformers 4\.57\.6 is too old; version 5 is needed"):
        import_transformers()


@pytest.mark.parametrize("linear", ["attention.self.query", "self_attn.q_proj", "output.dense"])
@pytest.mark.parametrize("kind", [LORA, IA3, IA3_INPUT])
def test_names_of_kwargs_and_back(kind: str, linear: str) -> None:
    kwarg = kwarg_of(kind, linear)
    assert kwarg.isidentifier()
    assert linear_of(kwarg) == (kind, linear)


def test_other_kwargs_belong_to_no_linear_layer() -> None:
    assert [linear_of(name) for name in ("attention_mask", "prefix", "prompt")] == [None] * 3
