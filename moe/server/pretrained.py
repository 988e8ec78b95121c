"""Blocks of a Hugging Face checkpoint as experts. Owns: reading one block's weights, building the layer with transformers' own
class, and calling it with named tensors.

Nothing of a caller stays in a block: masks, positions and adapters are tensors of one call, so callers with different
adapters, or none, share it. Must not know: who hosts which block.

Legend: B = rows, S = sequence length, D = hidden size, R = rank of an adapter, P = learned positions, K = size of keys (heads
times head size).
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from moe.architectures import BIAS, DORA, IA3, IA3_INPUT, LORA, Architecture, import_transformers, kwarg_of
from moe.errors import ConfigError, SchemaError
from moe.model_config import architecture_of, attention_of, kind_of, read_config, rope_parameters_of, window_of
from moe.schema import BatchTensorProto, ExpertSchema, Nested, TensorProto
from moe.server.masks import as_bias, seen_positions
from moe.server.self_check import compare_with_transformers
from moe.weight_files import dtype_of, read_tensors

logger = logging.getLogger(__name__)

MAX_LENGTH = 2048  # of models that do not say it; ours
MASK_4D, BIAS_4D = "attention_mask_4d", "attention_bias"
# Tensors of old checkpoints that are computed today: masks of GPT-2 and GPT-NeoX, frequencies of rotary embeddings
_COMPUTED = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|(attn|attention)\.(masked_)?bias)")

# What torch.func.vmap says about sdpa on a CPU, where it computes callers with different adapters one after another.
warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented the batching rule")

_adapters: ContextVar[Mapping[str, Any]] = ContextVar("adapters", default=MappingProxyType({}))  # of this thread's call


class PretrainedBlock(nn.Module):
    """One layer of a pretrained model, in eval mode, with weights yet to be loaded.

    :param config: of the model
    :param architecture: of the model
    :param index: which layer
    """

    def __init__(self, config: Any, architecture: Architecture, index: int):
        super().__init__()
        with torch.device("meta"):
            self.layer: nn.Module = architecture.find(architecture.layer)(
                config, *_index_of(architecture, config, index)
            )
        self.rotary: nn.Module | None = (
            None if architecture.rotary is None else architecture.find(architecture.rotary)(config)
        )
        turns = () if self.rotary is None else inspect.signature(self.rotary.forward).parameters
        self._rotary_by_kind = "layer_type" in turns
        self.architecture, self.kind = architecture, kind_of(config, index)
        self.is_causal: bool | None = getattr(config, "is_causal", None)  # None: not told, as the architecture is
        causal = architecture.causal or bool(getattr(config, "is_decoder", False))
        self.causal: bool = causal and self.is_causal is not False
        self.window = window_of(config, index)
        # Masks are numbers, not booleans, and there is no causal mask without one
        self.added_mask: bool = architecture.alibi or config._attn_implementation == "eager"
        takes = inspect.signature(self.layer.forward).parameters
        pasts = [] if architecture.alibi else [name for name in ("past_key_values", "layer_past") if name in takes]
        self.past_name = pasts[0] if pasts else None  # what the layer calls a cache
        self.hidden_size: int = config.hidden_size
        self.heads: int = config.num_attention_heads
        self.max_length = _max_length(config, architecture)
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.key_size: int = head_size * (getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
        for name, linear in self.linears():
            linear.register_forward_pre_hook(partial(_adapt_input, name))
            linear.register_forward_hook(partial(_adapt_output, name))
        for name, norm in self.layer.named_modules():
            if isinstance(norm, nn.LayerNorm) and norm.bias is not None:
                norm.register_forward_hook(partial(_adapt_output, name))
        self.eval()

    def linears(self) -> Iterator[tuple[str, nn.Module]]:
        """The linear layers and their names within the layer: those that adapters can adapt.

        torch's Linear with a weight (out, in), and transformers' Conv1D with a weight (in, out).
        """
        kinds = (nn.Linear, importlib.import_module("transformers.pytorch_utils").Conv1D)
        return ((name, module) for name, module in self.layer.named_modules() if isinstance(module, kinds))

    def biases(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The biases (out) of linear layers and norms, and the names of these within the layer."""
        modules = [*self.linears(), *((n, m) for n, m in self.layer.named_modules() if isinstance(m, nn.LayerNorm))]
        return ((name, module.bias) for name, module in modules if isinstance(module.bias, torch.Tensor))

    def schema(self) -> ExpertSchema:
        """What the block takes: the layer's own inputs, as its signature names them, and adapters; all but the first optional.

        Hidden states (B, S, D) in the dtype of the weights; adapters in float32, as they are trained.
        """
        dtype = next(self.layer.parameters()).dtype
        hidden = BatchTensorProto(None, self.hidden_size, dtype=dtype)
        positions = BatchTensorProto(None, dtype=torch.int64)
        kwargs: dict[str, Nested] = {
            "attention_mask": positions,
            MASK_4D: BatchTensorProto(None, None, None, dtype=torch.bool),
            BIAS_4D: BatchTensorProto(None, None, None),
        }
        if self.rotary is not None or self.architecture.packed:
            kwargs["position_ids"] = positions
        if self.rotary is not None:
            cosines, _ = self._rotate(torch.zeros(1, 1, 1, dtype=dtype), torch.zeros(1, 1, dtype=torch.int64))
            rotated = BatchTensorProto(None, cosines.shape[-1], dtype=dtype)
            kwargs["position_embeddings"] = (rotated, rotated)
        kwargs["prompt"] = BatchTensorProto(None, self.hidden_size)
        if self.past_name is not None:
            kwargs["prefix"] = {"key": TensorProto(None, self.key_size), "value": TensorProto(None, self.key_size)}
        for name, linear in self.linears():
            features, taken = _weight_of(linear).shape
            kwargs[kwarg_of(LORA, name)] = {"a": TensorProto(taken, None), "b": TensorProto(None, features)}
            kwargs[kwarg_of(DORA, name)] = TensorProto(features)
            kwargs[kwarg_of(IA3, name)] = TensorProto(features)
            kwargs[kwarg_of(IA3_INPUT, name)] = TensorProto(taken)
        for name, bias in self.biases():
            kwargs[kwarg_of(BIAS, name)] = TensorProto(len(bias))
        return ExpertSchema((hidden,), kwargs, hidden, tuple(kwargs))

    def backend_options(self, compression: int = 0) -> dict[str, Any]:
        """The schema as keyword arguments of ExpertBackend.

        :param compression: if not NONE, the codec of all floating-point tensors
        """
        schema = self.schema().with_compression(compression) if compression else self.schema()
        return {
            "args_schema": schema.args,
            "kwargs_schema": schema.kwargs,
            "optional_kwargs": schema.optional,
            "outputs_schema": schema.outputs,
        }

    def forward(
        self,
        hidden_states: torch.Tensor,
        *,
        attention_mask: torch.Tensor | None = None,
        attention_mask_4d: torch.Tensor | None = None,
        attention_bias: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        prompt: torch.Tensor | None = None,
        prefix: Mapping[str, torch.Tensor] | None = None,
        **adapters: Any,
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)

        :param attention_mask: (B, S), 0 where a position is padding
        :param attention_mask_4d: bool (B, 1 or heads, S, P + S), True where a query (last axis but one) sees a key, in place
            of attention_mask and of what the model does by itself (causal, window)
        :param attention_bias: float, of the same shape and likewise, added to the scores: 0 where a key is seen
        :param position_ids: (B, S), for rotary embeddings; default: 0, 1, ... after the prefix. In causal models without a
            mask, a step other than to the next position begins another sequence, which does not see those before it
        :param position_embeddings: cosines and sines (B, S, size of a head) instead of position_ids
        :param prompt: (B, P, D), added to the first P positions, see moe.DeepPrompts
        :param prefix: ``key`` and ``value`` (P, K) that every position sees before the row's own
        :param adapters: for each linear layer ``lora_*`` {"a": (in, R), "b": (R, out)}: adds ``x @ a @ b`` to its output;
            ``dora_*`` (out): how long the rows of its weight are after that; ``bias_*`` (out), for norms, too: in place of its
            own bias; ``ia3_*`` (out): scales its output; ``ia3_input_*`` (in): scales its input
        :raises SchemaError: too long, or lengths that contradict each other
        """
        length, before = hidden_states.shape[1], 0
        layer_kwargs: dict[str, Any] = {}
        if prefix is not None:
            before = _same_length("prefix['key']", prefix["key"], "prefix['value']", prefix["value"])
            if self.past_name is None:
                raise SchemaError("prefix: not available for models of this type")
            layer_kwargs[self.past_name] = _Prefix(prefix["key"], prefix["value"])
        self._check_lengths(length, before, attention_mask=attention_mask, position_ids=position_ids)
        if prompt is not None:
            learned = prompt.shape[1]
            if learned > length:
                raise SchemaError(f"prompt: expected {length} positions at most, as hidden_states, got {learned}")
            prompt = nn.functional.pad(prompt, (0, 0, 0, length - learned))
            hidden_states = hidden_states + prompt.to(hidden_states.dtype)
        if self.rotary is not None:
            if position_embeddings is None:
                positions = position_ids
                if positions is None:
                    positions = torch.arange(before, before + length, device=hidden_states.device)[None]
                position_embeddings = self._rotate(hidden_states, positions)
            layer_kwargs["position_embeddings"] = position_embeddings
        if attention_mask_4d is not None and attention_bias is not None:
            raise SchemaError(f"{MASK_4D}, {BIAS_4D}: expected one of them, got both")
        seen: torch.Tensor | None
        if attention_mask_4d is not None:
            seen = self._check_4d(MASK_4D, attention_mask_4d, length, before)
        elif attention_bias is not None:
            seen = self._check_4d(BIAS_4D, attention_bias.to(hidden_states.dtype), length, before)
        else:
            seen = seen_positions(
                length,
                before,
                hidden_states.device,
                causal=self.causal,
                window=self.window,
                attention_mask=attention_mask,
                position_ids=position_ids if self.architecture.packed else None,
                always=self.added_mask,
            )
        if self.added_mask and seen is not None and seen.dtype == torch.bool:
            seen = as_bias(seen, hidden_states.dtype)
        if self.architecture.alibi:
            assert seen is not None
            layer_kwargs |= self._alibi(hidden_states, attention_mask, seen)
        else:
            layer_kwargs["attention_mask"] = seen
            if self.is_causal is not None:
                layer_kwargs["is_causal"] = self.causal
        token = _adapters.set(adapters)
        try:
            output: Any = self.layer(hidden_states, **layer_kwargs)
        finally:
            _adapters.reset(token)
        result: torch.Tensor = output[0] if isinstance(output, tuple) else output  # some give attentions, too
        return result

    def _rotate(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines (B, S, size) of positions (B, S)."""
        assert self.rotary is not None
        kind = (self.kind,) if self._rotary_by_kind else ()
        cosines, sines = self.rotary(hidden_states, position_ids, *kind)
        return cosines, sines

    def _check_lengths(self, length: int, before: int, **row_wise: torch.Tensor | None) -> None:
        if max(length, before) > self.max_length:  # scores take S x S memory: nobody else shall be hurt by that
            raise SchemaError(f"this model takes {self.max_length} positions at most, got {max(length, before)}")
        if before and self.window is not None and before + length > self.window:
            raise SchemaError(
                f"prefix: with {before} + {length} positions it is longer than the window of this block's attention, "
                f"{self.window}"
            )
        for name, tensor in row_wise.items():
            if tensor is not None and tensor.shape[1] != length:
                raise SchemaError(f"{name}: expected {length} positions, as hidden_states, got {tensor.shape[1]}")

    def _check_4d(self, name: str, given: torch.Tensor, length: int, before: int) -> torch.Tensor:
        if given.shape[1] not in (1, self.heads) or given.shape[2:] != (length, before + length):
            raise SchemaError(
                f"{name}: expected (rows, 1 or {self.heads}, {length}, {before + length}), got {tuple(given.shape)}"
            )
        return given

    def _alibi(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None, mask: torch.Tensor
    ) -> dict[str, Any]:
        """The bias for distances, and the mask with it, as the models of these families make them."""
        rows, length, dtype = *hidden_states.shape[:2], hidden_states.dtype
        mask = mask.expand(rows, -1, -1, -1)
        if self.rotary is not None and not getattr(self.layer.config, "alibi", False):  # Falcon has either
            return {"alibi": None, "attention_mask": mask}
        if attention_mask is None:
            attention_mask = torch.ones(rows, length, dtype=torch.int64, device=hidden_states.device)
        alibi = self.architecture.find("build_alibi_tensor")(attention_mask, self.heads, dtype=dtype)
        if self.rotary is None:  # Bloom adds both in its attention
            return {"alibi": alibi, "attention_mask": mask}
        per_head = alibi.reshape(rows, self.heads, *alibi.shape[1:]) / (self.hidden_size // self.heads) ** 0.5
        mask = per_head.masked_fill(mask < -1, torch.finfo(dtype).min)
        return {"alibi": alibi, "attention_mask": mask}


def _index_of(architecture: Architecture, config: Any, index: int) -> tuple[int, ...]:
    """What the layer's class takes beside the configuration."""
    parameters = inspect.signature(architecture.find(architecture.layer)).parameters
    return (index,) if len(parameters) > 1 else ()


def _max_length(config: Any, architecture: Architecture) -> int:
    """How many positions a call may have: as many as are learned, else as many as the rotary embeddings are stretched to."""
    told: int | None = getattr(config, "max_position_embeddings", None)
    if architecture.rotary is None:
        return told or MAX_LENGTH
    factors = [float(rope.get("factor") or 1.0) for rope in rope_parameters_of(config)]
    return int((told or MAX_LENGTH) * max(1.0, *factors))


class _Prefix:
    """Learned keys and values, in the place of the cache that a layer asks for those of earlier positions."""

    def __init__(self, key: torch.Tensor, value: torch.Tensor):
        self.key, self.value = key, value

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(B, heads, S, head size) each -> the same with P + S positions."""
        return self._before(self.key, key), self._before(self.value, value)

    @staticmethod
    def _before(learned: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
        rows, heads, _, size = own.shape
        learned = learned.to(own.dtype).reshape(1, -1, heads, size).transpose(1, 2).expand(rows, -1, -1, -1)
        return torch.cat([learned, own], dim=2)


def _adapt_input(name: str, linear: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor] | None:
    scale = _adapters.get().get(kwarg_of(IA3_INPUT, name))
    return None if scale is None else (args[0] * scale.to(args[0].dtype),)


def _adapt_output(name: str, layer: Any, args: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    adapters = _adapters.get()
    if not adapters:
        return output
    lora, scale = adapters.get(kwarg_of(LORA, name)), adapters.get(kwarg_of(IA3, name))
    lengths, bias = adapters.get(kwarg_of(DORA, name)), adapters.get(kwarg_of(BIAS, name))
    change = None
    if lora is not None:
        a, b, kwarg = lora["a"], lora["b"], kwarg_of(LORA, name)
        _same_length(f"{kwarg}['a'].T", a.T, f"{kwarg}['b']", b)
        change = args[0].to(a.dtype) @ a @ b
    if lengths is not None:
        factor = lengths / _row_lengths(layer, lora, lengths.dtype).detach()  # as in the paper (Liu et al. 2024, 4.3)
        without_bias = output if layer.bias is None else output - layer.bias
        stretched = (factor - 1) * without_bias
        change = stretched if change is None else stretched + factor * change
    if change is not None:
        output = (output + change).to(output.dtype)
    if bias is not None:
        output = (output + (bias - layer.bias)).to(output.dtype)
    return output if scale is None else output * scale.to(output.dtype)


def _weight_of(linear: nn.Module) -> torch.Tensor:
    """(out, in)"""
    weight: torch.Tensor = linear.weight  # type: ignore[assignment]
    return weight if isinstance(linear, nn.Linear) else weight.T


def _row_lengths(linear: nn.Module, lora: Mapping[str, torch.Tensor] | None, dtype: torch.dtype) -> torch.Tensor:
    """Norms (out) of the rows of weight + (a @ b).T, without a matrix of that size for each caller."""
    weight = _weight_of(linear).detach().to(dtype)
    squares: torch.Tensor = torch.linalg.vector_norm(weight, dim=1).square()
    if lora is not None:
        a, b = lora["a"].detach(), lora["b"].detach()
        squares = squares + ((2 * weight @ a).T * b).sum(0) + ((a.T @ a @ b) * b).sum(0)
    return squares.clamp(min=0).sqrt()


def _same_length(name: str, tensor: torch.Tensor, other_name: str, other: torch.Tensor) -> int:
    if len(tensor) != len(other):
        raise SchemaError(f"{other_name}: expected length {len(tensor)}, as {name} has, got {len(other)}")
    return len(tensor)


# --- reading a checkpoint ---------------------------------------------------------------------------------------------


class PretrainedModel:
    """A model on disk, of which single blocks can be loaded.

    :param folder: with config.json and the weights, as ``save_pretrained`` writes them
    :raises ConfigError: there is none, it cannot be hosted, or transformers is missing
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.config = read_config(folder)
        self.architecture = architecture_of(self.config)
        self.num_blocks: int = self.config.num_hidden_layers
        model_class = import_transformers().AutoModel._model_mapping[type(self.config)]
        self.config._attn_implementation = attention_of(self.config) or _chosen_attention(model_class)
        self.heads_prefix: str = model_class.base_model_prefix  # of names in checkpoints of models with a head
        self._checked: set[str] = set()

    def load_block(self, index: int) -> PretrainedBlock:
        """A block with its weights, in the model's dtype. Reads nothing of other blocks, if the weights are safetensors.

        The first block of each kind is compared with the model of transformers around it.

        :raises ConfigError: the weights are missing, broken, or do not fit the configuration, or what the block computes
            differs from transformers
        """
        try:
            block = PretrainedBlock(self.config, self.architecture, index)
        except Exception as e:  # of whatever transformers' layer finds wrong with the configuration
            raise ConfigError(f"model_path: {self.folder}/config.json does not describe a block: {e}") from e
        weights = self._weights(index)
        dtype = self.config.dtype or dtype_of(self.folder)
        for name, tensor in weights.items():
            weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        self._check_weights(index, weights, block.layer.state_dict())
        try:
            block.layer.load_state_dict(weights, assign=True)
        except RuntimeError as e:
            raise ConfigError(f"block {index} of {self.folder} does not fit its configuration: {e}") from None
        if block.kind not in self._checked:
            compare_with_transformers(block, self.config)
            self._checked.add(block.kind)
        return block

    def _weights(self, index: int) -> dict[str, torch.Tensor]:
        """The tensors of a block under their names in the layer, as transformers looks for them."""
        own = f"{self.architecture.blocks}.{index}."
        prefixes = (own, f"{self.heads_prefix}.{own}")
        read = read_tensors(self.folder, lambda name: name.startswith(own) or f".{own}" in name)
        weights: dict[str, torch.Tensor] = {}
        elsewhere = sorted({name[: name.index(own)] for name in read if not name.startswith(prefixes)})
        for name, tensor in read.items():
            for prefix in prefixes:
                if name.startswith(prefix):
                    current = _current_name(name.removeprefix(prefix))
                    if current in weights:
                        raise ConfigError(f"model_path: {self.folder} has two tensors for {current} of block {index}")
                    weights[current] = tensor
        if not weights and elsewhere:
            raise ConfigError(
                f"model_path: the weights of {self.folder} are called {elsewhere[0]}{own}*, expected {prefixes[1]}* or {own}*: "
                "transformers would not find them either"
            )
        return weights

    def _check_weights(
        self, index: int, weights: dict[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
    ) -> None:
        """Report what is missing or too much, as transformers does, but refuse to go on with random weights."""
        where = f"block {index} of {self.folder}"
        missing = sorted(expected.keys() - weights.keys())
        if missing:
            raise ConfigError(
                f"{where} does not fit its configuration: these weights are missing: {', '.join(missing)}"
            )
        unexpected = sorted(name for name in weights.keys() - expected.keys() if not _COMPUTED.fullmatch(name))
        if unexpected:
            logger.warning("%s: not used, as in transformers: %s", where, ", ".join(unexpected))
        for name in weights.keys() - expected.keys():
            del weights[name]
        for name, tensor in weights.items():
            if not tensor.is_floating_point():
                raise ConfigError(f"{where}: {name} is of dtype {tensor.dtype}, expected floating-point numbers")
            if not tensor.isfinite().all():
                raise ConfigError(f"{where}: {name} has values that are not finite")


def _chosen_attention(model_class: Any) -> str:
    """What transformers takes by default where nothing but torch is installed."""
    return "sdpa" if model_class._supports_sdpa else "eager"


def _current_name(name: str) -> str:
    """Layer norms of old checkpoints, such as bert-base-uncased, have other names."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{dict(gamma='weight', beta='bias')[m[1]]}", name)
