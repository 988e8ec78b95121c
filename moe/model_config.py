"""Configurations of pretrained models. Owns: reading config.json, and which of its fields are honoured.

The rule is a list of what is allowed: a field is one whose effect on blocks is known, or has a value that changes nothing, or
the model is refused with the field's name. So what a later version of transformers adds is refused, not ignored. Must not know:
servers, clients, weights.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from moe.architectures import ARCHITECTURES, Architecture, import_transformers
from moe.config import MAX_BLOCKS
from moe.errors import ConfigError
from moe.weight_files import read_json

MAX_CONFIG_BYTES = 2**26  # ours; id2label of a large classifier takes a few MiB
MAX_SIZE = 2**24  # of hidden states, vocabularies and the like; ours
ROPE_WITH_MEMORY = (
    "dynamic",
    "longrope",
)  # what they compute for one caller depends on how long others' sequences were
ATTENTIONS = ("eager", "sdpa")  # implementations that run everywhere
DTYPES = ("float16", "bfloat16", "float32", "float64")  # that models are computed in


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Sizes: fields that are positive integers if they are there
_SIZES = _names(
    """
    attention_head_size dim embedding_size ffn_dim ffn_hidden_size head_dim hidden_dim hidden_size intermediate_size
    max_position_embeddings n_embd n_head n_heads n_inner n_layer n_layers n_positions num_attention_heads num_hidden_layers
    num_key_value_heads num_kv_heads type_vocab_size vocab_size word_embed_proj_dim
    """
)
# What transformers' layers, embeddings and heads of the families in ARCHITECTURES do with these is what happens here
_HONOURED = _SIZES | _names(
    """
    _remove_final_layer_norm activation activation_dropout activation_function alibi
    apply_residual_connection_post_layernorm architectures attention_bias attention_dropout attention_multiplier
    attention_probs_dropout_prob attn_logit_softcapping attn_pdrop bias bos_token_id chunk_size_feed_forward
    classifier_activation classifier_bias classifier_dropout classifier_pooling cls_token_id decoder_bias
    decoder_start_token_id deterministic_flash_attn do_layer_norm_before dropout dtype embd_pdrop embedding_dropout
    embedding_multiplier enable_bias eos_token_id final_logit_softcapping finetuning_task global_attn_every_n_layers
    global_rope_theta hidden_act hidden_activation hidden_dropout hidden_dropout_prob id2label init_std
    initializer_cutoff_factor initializer_range is_causal is_decoder label2id layer_norm_elementwise_affine layer_norm_eps
    layer_norm_epsilon layer_types local_attention local_rope_theta logits_scaling mask_token_id max_window_layers
    mlp_bias mlp_dropout model_type multi_query new_decoder_architecture norm_bias norm_eps norm_epsilon num_labels
    num_ln_in_parallel_attn original_max_position_embeddings pad_token_id parallel_attn partial_rotary_factor problem_type
    qa_dropout qk_layernorm query_pre_attn_scalar reorder_and_upcast_attn repad_logits_with_grad resid_pdrop
    residual_dropout residual_multiplier return_dict rms_norm_eps rope_local_base_freq rope_parameters rope_scaling
    rope_theta rotary_emb_base rotary_pct scale_attn_by_inverse_layer_idx scale_attn_weights sep_token_id
    seq_classif_dropout sinusoidal_pos_embds sliding_window slow_but_exact sparse_pred_ignore_index sparse_prediction
    summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type summary_use_proj
    tie_word_embeddings torch_dtype unk_token_id use_bias use_cache use_parallel_residual use_sliding_window
    """
)
# What transformers does not look at in these families when it computes: tokenizers', generation's and training's, and leftovers
_WITHOUT_EFFECT = _names(
    """
    _attn_implementation_autoset _commit_hash _flash_attn_2_enabled _name_or_path _num_labels adapters
    attention_probs_dropout auto_map bad_words_ids begin_suppress_tokens bias_dropout_fusion directionality
    diversity_penalty do_sample early_stopping embedding_layer_norm_eps encoder_no_repeat_ngram_size
    exponential_decay_length_penalty force_bos_token_to_be_generated forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_size_per_head interpolate_before_extrapolate keys_to_ignore_at_inference language
    length_penalty masked_softmax_fusion max_length max_sequence_length min_length model_max_length n_ctx
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences offset_alibi output_attentions output_hidden_states
    output_past output_scores pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head
    pooler_type predict_special_tokens prefix pretraining_alpha pretraining_tp remove_invalid_values repetition_penalty
    return_dict_in_generate rotary_dim sentence_transformers seq_length skip_bias_add skip_bias_add_qkv suppress_tokens
    task_specific_params temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p torchscript
    transformers.js_config transformers_version typical_p unsloth_fixed unsloth_version use_bfloat16 vocab_file xla_device
    """
)
# These change what comes out, in ways that are not known here, unless they have one of these values
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "_attn_implementation": (None, *ATTENTIONS),
    "attn_implementation": (None, *ATTENTIONS),
    "layerdrop": (None, 0, 0.0),  # in training, transformers would leave out blocks at random
    "position_embedding_type": (None, "absolute"),
}
_EMPTY: tuple[Any, ...] = (None, False, 0, "", [], {})


def read_config(folder: str | os.PathLike[str], **settings: Any) -> Any:
    """The configuration of a model on disk: the transformers object of its ``config.json``. Nothing is fetched from anywhere.

    :param folder: with config.json
    :param settings: that replace those of the file
    :raises ConfigError: transformers is missing, there is no such model on disk, or it cannot be hosted; names the field
    """
    where = f"{os.fspath(folder)}/config.json"
    written = _read_json(Path(folder) / "config.json", where)
    kind = written.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ConfigError(
            f"models of type {kind!r} cannot be hosted ({where}); those of these types can: {', '.join(ARCHITECTURES)}"
        )
    auto_config = import_transformers().AutoConfig
    for problem in _unknown_fields({**written, **settings}, auto_config.for_model(kind)):
        raise ConfigError(
            f"this {kind} model cannot be hosted: {where} has {problem}, of which this version does not know what it does. "
            "If the model does not need it, remove it from the file"
            if problem.partition(":")[0] not in settings
            else f"{problem}: there is no such setting of a {kind} model, or this version does not know what it does"
        )
    _check_sizes({**written, **settings}, where)
    known = {name: value for name, value in settings.items() if name in _HONOURED | _WITHOUT_EFFECT | _NEUTRAL.keys()}
    try:
        config = auto_config.from_pretrained(os.fspath(folder), local_files_only=True, trust_remote_code=False, **known)
    except Exception as e:  # of whatever is wrong with the file
        raise ConfigError(f"model_path: cannot read {where}: {e}") from e
    architecture_of(config)
    return config


def architecture_of(config: Any) -> Architecture:
    """How the blocks of a model are found, made and called.

    :raises ConfigError: of a kind that cannot be hosted; says why
    """
    architecture = ARCHITECTURES.get(config.model_type)
    if architecture is None:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"models of type {config.model_type!r} cannot be hosted; those of these types can: {known}")
    _check_sizes({name: getattr(config, name, None) for name in _SIZES}, f"the {config.model_type} configuration")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    given_types = [rope.get("rope_type", "default") for rope in rope_parameters_of(config)]
    rope_types = {kind for kind in ROPE_WITH_MEMORY if kind in given_types}
    dtype = getattr(config, "dtype", None)
    for problem, found in (
        ("it is quantized", getattr(config, "quantization_config", None) is not None),
        ("it has cross-attention", bool(getattr(config, "add_cross_attention", False) or config.is_encoder_decoder)),
        (f"layer_types has {sorted(kinds)}", bool(kinds)),
        (f"its rotary embeddings are {', '.join(rope_types)}: they depend on earlier calls", bool(rope_types)),
        (
            f"rope_type is {given_types}, expected names",
            not all(isinstance(kind, str) for kind in given_types),
        ),
        (
            f"dtype is {dtype!r}, expected one of {', '.join(DTYPES)}",
            dtype is not None and str(dtype).removeprefix("torch.") not in DTYPES,
        ),
        ("use_bidirectional_attention is set", bool(getattr(config, "use_bidirectional_attention", None))),
        (
            f"is_causal is {getattr(config, 'is_causal', None)!r}",
            architecture.alibi and getattr(config, "is_causal", True) is not True,
        ),
        (f"its attention is {attention_of(config)}", attention_of(config) not in (None, *ATTENTIONS)),
        ("it has no blocks", config.num_hidden_layers < 1),
        (f"it has more than {MAX_BLOCKS} blocks", config.num_hidden_layers > MAX_BLOCKS),
    ):
        if found:
            raise ConfigError(f"this {config.model_type} model cannot be hosted: {problem}")
    return architecture


def attention_of(config: Any) -> str | None:
    """The implementation of attention that a configuration asks for; None: transformers' choice."""
    return getattr(config, "_attn_implementation", None) or getattr(config, "attn_implementation", None)


def rope_parameters_of(config: Any) -> list[Mapping[str, Any]]:
    """The settings of a model's rotary embeddings: one, or one for each kind of layer."""
    given = getattr(config, "rope_parameters", None) or {}
    nested = [part for part in given.values() if isinstance(part, Mapping)]
    return nested or [given]


def kind_of(config: Any, index: int) -> str:
    """What a configuration calls the attention of a block: ``full_attention``, ``sliding_attention``."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return str(kinds[index]) if index < len(kinds) else "full_attention"


def window_of(config: Any, index: int) -> int | None:
    """How many positions a block's attention reaches (see moe.server.masks); None: all."""
    window = getattr(config, "sliding_window", None)
    return None if window is None or kind_of(config, index) != "sliding_attention" else int(window)


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        written = read_json(path, MAX_CONFIG_BYTES)
    except FileNotFoundError:
        raise ConfigError(
            f"model_path: there is no model in {os.fspath(path.parent)!r}: it has no config.json"
        ) from None
    except NotADirectoryError:
        raise ConfigError(f"model_path: {os.fspath(path.parent)!r} is not a folder") from None
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(f"model_path: cannot read {where}: {e}") from e
    if not isinstance(written, dict):
        raise ConfigError(f"model_path: {where} holds a {type(written).__name__}, not an object of settings")
    return written


def _check_sizes(fields: Mapping[str, Any], where: str) -> None:
    for name in sorted(_SIZES & fields.keys()):
        value, limit = fields[name], MAX_BLOCKS if name in ("num_hidden_layers", "n_layer", "n_layers") else MAX_SIZE
        if value is None or (name == "type_vocab_size" and value == 0):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= limit:
            raise ConfigError(f"model_path: {where}: {name} is {value!r}, expected an integer from 1 to {limit}")
        if value == 0 and limit == MAX_SIZE:
            raise ConfigError(f"model_path: {where}: {name} is 0, expected an integer from 1 to {limit}")


def _unknown_fields(fields: Mapping[str, Any], default: Any) -> Iterator[str]:
    """Those that would change the numbers, or may: ``name: value``.

    :param default: configuration of the family
    """
    defaults = default.to_dict()
    for name, value in fields.items():
        if name in _NEUTRAL:
            allowed = value in _NEUTRAL[name]
        else:
            allowed = (
                name in _HONOURED
                or name in _WITHOUT_EFFECT
                or any(value is empty or (type(value) is type(empty) and value == empty) for empty in _EMPTY)
                or (name in defaults and type(value) is type(defaults[name]) and value == defaults[name])
            )
        if not allowed:
            yield f"{name}: {value!r}"[:200]
