"""Pretrained models that can be hosted block by block. Owns: what server and client have to agree on: where a model has its
blocks, how they are made, and what the kwargs of a block are called.

Everything of transformers (https://github.com/huggingface/transformers, an optional extra) is imported here and only when it is
used. Must not know: servers, clients, weights, which settings of a model are honoured (moe.model_config).
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

from moe.errors import ConfigError

MIN_TRANSFORMERS = 5  # since then a layer returns its hidden states alone

# What the kwargs of a block begin with, before the name of one of its linear layers
LORA, IA3, IA3_INPUT = "lora_", "ia3_", "ia3_input_"
DORA, BIAS = "dora_", "bias_"  # bias_ also before the name of a norm


@dataclass(frozen=True)
class Architecture:
    """A family of models whose blocks take hidden states (batch, length, hidden) and return the same.

    Another family is another line in ARCHITECTURES, if its layers are called like these; a server compares a block with the
    whole model of transformers before it announces one.

    :param package: in ``transformers.models``
    :param layer: class of a block, made by ``layer(config, index)``
    :param blocks: where the model without a head has its blocks; in checkpoints, heads put a prefix before it
    :param causal: positions see themselves and earlier ones only
    :param rotary: class that turns position ids into rotary embeddings; None: positions are embedded before the first block
    :param packed: without a mask, position ids tell several sequences in one row apart
    :param fewest_blocks: that a model of this class can be made with
    :param alibi: blocks take a bias for the distance of positions (Press et al. 2021), made by ``build_alibi_tensor``
    """

    package: str
    layer: str
    blocks: str
    causal: bool = False
    rotary: str | None = None
    packed: bool = False
    fewest_blocks: int = 0
    alibi: bool = False

    def find(self, name: str) -> Any:
        """A class or function of this family.

        :raises ConfigError: transformers is missing or too old
        """
        import_transformers()
        return getattr(importlib.import_module(f"transformers.models.{self.package}.modeling_{self.package}"), name)


def _encoder(package: str, name: str) -> Architecture:
    return Architecture(package, f"{name}Layer", "encoder.layer")


def _decoder(package: str, name: str, layer: str = "DecoderLayer") -> Architecture:
    rotary = f"{name}RotaryEmbedding"
    return Architecture(package, f"{name}{layer}", "layers", causal=True, rotary=rotary, packed=True)


ARCHITECTURES = {
    "bert": _encoder("bert", "Bert"),
    "roberta": _encoder("roberta", "Roberta"),
    "xlm-roberta": _encoder("xlm_roberta", "XLMRoberta"),
    "camembert": _encoder("camembert", "Camembert"),
    "electra": _encoder("electra", "Electra"),
    "distilbert": Architecture("distilbert", "TransformerBlock", "transformer.layer"),
    "modernbert": Architecture(
        "modernbert", "ModernBertEncoderLayer", "layers", rotary="ModernBertRotaryEmbedding", fewest_blocks=1
    ),
    "llama": _decoder("llama", "Llama"),
    "mistral": _decoder("mistral", "Mistral"),
    "qwen2": _decoder("qwen2", "Qwen2"),
    "qwen3": _decoder("qwen3", "Qwen3"),
    "gemma": _decoder("gemma", "Gemma"),
    "gemma2": _decoder("gemma2", "Gemma2"),
    "phi": _decoder("phi", "Phi"),
    "phi3": _decoder("phi3", "Phi3"),
    "olmo2": _decoder("olmo2", "Olmo2"),
    "granite": _decoder("granite", "Granite"),
    "starcoder2": _decoder("starcoder2", "Starcoder2"),
    "gpt_neox": _decoder("gpt_neox", "GPTNeoX", "Layer"),
    "gpt2": Architecture("gpt2", "GPT2Block", "h", causal=True, packed=True),
    "opt": Architecture("opt", "OPTDecoderLayer", "decoder.layers", causal=True),
    "bloom": Architecture("bloom", "BloomBlock", "h", causal=True, alibi=True),
    "falcon": Architecture(
        "falcon", "FalconDecoderLayer", "h", causal=True, rotary="FalconRotaryEmbedding", alibi=True
    ),
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
