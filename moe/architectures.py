"""Pretrained models that can be hosted block by block. Owns: what server and client have to agree on: where a model has its
blocks, how many there are, and what the kwargs of a block are called.

Everything of transformers (https://github.com/huggingface/transformers, an optional extra) is imported here and only when it is
used. Nothing is ever fetched from the network: a model is a folder on this machine. Must not know: servers, clients, weights.
"""

from __future__ import annotations

import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moe.errors import ConfigError

MIN_TRANSFORMERS = 5  # since then a layer returns its hidden states alone
ROPE_WITH_MEMORY = (
    "dynamic",
    "longrope",
)  # what they compute for one caller depends on how long others' sequences were

# What the kwargs of a block begin with, before the name of one of its linear layers
LORA, IA3, IA3_INPUT = "lora_", "ia3_", "ia3_input_"
DORA, BIAS = "dora_", "bias_"  # bias_ also before the name of a norm


@dataclass(frozen=True)
class Architecture:
    """A family of models whose blocks take hidden states (batch, length, hidden) and return the same.

    Another family is another line in ARCHITECTURES, if its layers are called like these.

    :param package: in ``transformers.models``
    :param layer: class of a block, made by ``layer(config, index)``
    :param blocks: name of the list of blocks, in models and checkpoints; heads put a prefix before it
    :param causal: positions see themselves and earlier ones only
    :param rotary: class that turns position ids into rotary embeddings; None: positions are embedded before the first block
    """

    package: str
    layer: str
    blocks: str
    causal: bool = False
    rotary: str | None = None

    def find(self, name: str) -> Any:
        """A class of this family.

        :raises ConfigError: transformers is missing or too old
        """
        import_transformers()
        return getattr(importlib.import_module(f"transformers.models.{self.package}.modeling_{self.package}"), name)


ARCHITECTURES = {
    "bert": Architecture("bert", "BertLayer", "encoder.layer"),
    "roberta": Architecture("roberta", "RobertaLayer", "encoder.layer"),
    "llama": Architecture("llama", "LlamaDecoderLayer", "layers", causal=True, rotary="LlamaRotaryEmbedding"),
    "mistral": Architecture("mistral", "MistralDecoderLayer", "layers", causal=True, rotary="MistralRotaryEmbedding"),
    "qwen2": Architecture("qwen2", "Qwen2DecoderLayer", "layers", causal=True, rotary="Qwen2RotaryEmbedding"),
}  # by model_type in config.json


def import_transformers() -> Any:
    """The package transformers.

    :raises ConfigError: it is missing or too old
    """
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as e:
        raise ConfigError(f'a pretrained model needs transformers: pip install "transformers>=5,<6" ({e})') from e
    if int(transformers.__version__.split(".")[0]) < MIN_TRANSFORMERS:
        raise ConfigError(f"transformers {transformers.__version__} is too old; version {MIN_TRANSFORMERS} is needed")
    return transformers


def read_config(folder: str | os.PathLike[str], **settings: Any) -> Any:
    """The configuration of a model on disk: the transformers object of its ``config.json``.

    :param folder: with config.json
    :param settings: that replace those of the file
    :raises ConfigError: transformers is missing, or there is no such model on disk
    """
    if not (Path(folder) / "config.json").is_file():
        raise ConfigError(f"model_path: there is no model in {os.fspath(folder)!r}: it has no config.json")
    auto_config = import_transformers().AutoConfig
    try:
        return auto_config.from_pretrained(
            os.fspath(folder), local_files_only=True, trust_remote_code=False, **settings
        )
    except Exception as e:  # of whatever is wrong with the file
        raise ConfigError(f"model_path: cannot read {os.fspath(folder)}/config.json: {e}") from e


def architecture_of(config: Any) -> Architecture:
    """How the blocks of a model are found, made and called.

    :raises ConfigError: of a kind that cannot be hosted; says why
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"models of type {config.model_type!r} cannot be hosted; those of these types can: {known}")
    windows = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    rope_type = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    for problem, found in (
        ("it is quantized", getattr(config, "quantization_config", None) is not None),
        ("it has cross-attention", bool(getattr(config, "add_cross_attention", False) or config.is_encoder_decoder)),
        ("its attention has a window", getattr(config, "sliding_window", None) is not None or bool(windows)),
        (f"its rotary embeddings are {rope_type}: they depend on earlier calls", rope_type in ROPE_WITH_MEMORY),
        ("it has no blocks", config.num_hidden_layers < 1),
    ):
        if found:
            raise ConfigError(f"this {config.model_type} model cannot be hosted: {problem}")
    return architecture


# --- names of kwargs --------------------------------------------------------------------------------------------------


def kwarg_of(kind: str, linear: str) -> str:
    """The kwarg that adapts one linear layer of a block: ``lora_attention__self__query``.

    :param kind: LORA, DORA, BIAS, IA3 or IA3_INPUT
    :param linear: its name within the block, such as ``attention.self.query``
    """
    return kind + linear.replace(".", "__")


def linear_of(kwarg: str) -> tuple[str, str] | None:
    """Inverse of kwarg_of: (kind, name of the linear layer); None for a kwarg of another kind."""
    for kind in (LORA, DORA, BIAS, IA3_INPUT, IA3):  # the longer of two that begin alike first
        if kwarg.startswith(kind):
            return kind, kwarg.removeprefix(kind).replace("__", ".")
    return None
