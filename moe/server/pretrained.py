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
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from moe.architectures import BIAS, DORA, IA3, IA3_INPUT, LORA, Architecture, architecture_of, kwarg_of, read_config
from moe.errors import ConfigError, SchemaError
from moe.schema import BatchTensorProto, ExpertSchema, Nested, TensorProto

ATTENTION = "sdpa"  # torch's own: without S x S scores in memory where there is a kernel for it

# What torch.func.vmap says about sdpa on a CPU, where it computes callers with different adapters one after another.
warnings.filterwarnings("ignore", "There is a performance drop because we have not yet implemented the batching rule")

_adapters: ContextVar[Mapping[str, Any]] = ContextVar("adapters")  # of the call that this thread computes


class PretrainedBlock(nn.Module):
    """One layer of a pretrained model, in eval mode, with weights yet to be loaded.

    :param config: of the model
    :param architecture: of the model
    :param index: which layer
    """

    def __init__(self, config: Any, architecture: Architecture, index: int):
        super().__init__()
        config._attn_implementation = ATTENTION
        with torch.device("meta"):
            self.layer: nn.Module = architecture.find(architecture.layer)(config, index)
        self.rotary: nn.Module | None = (
            None if architecture.rotary is None else architecture.find(architecture.rotary)(config)
        )
        self.causal = architecture.causal or bool(getattr(config, "is_decoder", False))
        self.hidden_size: int = config.hidden_size
        self.max_length: int = config.max_position_embeddings
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
        inputs: dict[str, Nested] = {"attention_mask": positions}
        if self.rotary is not None:
            rotated = BatchTensorProto(None, 2 * len(self.rotary.get_buffer("inv_freq")), dtype=dtype)
            inputs |= {"position_ids": positions, "position_embeddings": (rotated, rotated)}
        named = inspect.signature(self.layer.forward).parameters
        kwargs = {name: proto for name, proto in inputs.items() if name in named}
        kwargs["prompt"] = BatchTensorProto(None, self.hidden_size)
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
        position_ids: torch.Tensor | None = None,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        prompt: torch.Tensor | None = None,
        prefix: Mapping[str, torch.Tensor] | None = None,
        **adapters: Any,
    ) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)

        :param attention_mask: (B, S), 0 where a position is padding
        :param position_ids: (B, S), for rotary embeddings; default: 0, 1, ... after the prefix
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
            layer_kwargs["past_key_values"] = _Prefix(prefix["key"], prefix["value"])
        if max(length, before) > self.max_length:  # scores take S x S memory: nobody else shall be hurt by that
            raise SchemaError(f"this model takes {self.max_length} positions at most, got {max(length, before)}")
        if attention_mask is not None and attention_mask.shape[1] != length:
            raise SchemaError(
                f"attention_mask: expected {length} positions, as hidden_states, got {attention_mask.shape[1]}"
            )
        if prompt is not None:
            learned = prompt.shape[1]
            if learned > length:
                raise SchemaError(f"prompt: expected {length} positions at most, as hidden_states, got {learned}")
            prompt = nn.functional.pad(prompt, (0, 0, 0, length - learned))
            hidden_states = hidden_states + prompt.to(hidden_states.dtype)
        if self.rotary is not None:
            if position_embeddings is None:
                if position_ids is None:
                    position_ids = torch.arange(before, before + length, device=hidden_states.device)[None]
                position_embeddings = self.rotary(hidden_states, position_ids)
            layer_kwargs["position_embeddings"] = position_embeddings
        seen = self._seen(length, before, attention_mask, hidden_states.device)
        token = _adapters.set(adapters)
        try:
            output: torch.Tensor = self.layer(hidden_states, attention_mask=seen, **layer_kwargs)
        finally:
            _adapters.reset(token)
        return output

    def _seen(
        self, length: int, before: int, attention_mask: torch.Tensor | None, device: torch.device
    ) -> torch.Tensor | None:
        """Which keys (last axis) a query (last but one) sees: (B or 1, 1, S or 1, P + S); None: as the layer does by itself."""
        seen = None
        if self.causal and (before or attention_mask is not None):
            seen = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
        if attention_mask is not None:
            not_padding = (attention_mask != 0)[:, None, None, :]
            seen = not_padding if seen is None else seen & not_padding
        return None if seen is None else nn.functional.pad(seen, (before, 0), value=True)


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

    def load_block(self, index: int) -> PretrainedBlock:
        """A block with its weights, in the model's dtype. Reads nothing of other blocks, if the weights are safetensors.

        :raises ConfigError: the weights are missing, broken, or do not fit the configuration
        """
        block = PretrainedBlock(self.config, self.architecture, index)
        weights = self._read(re.compile(rf"(?:.*\.)?{re.escape(self.architecture.blocks)}\.{index}\.(.+)"))
        dtype = self.config.dtype or next((t.dtype for t in weights.values() if t.is_floating_point()), None)
        for name, tensor in weights.items():
            weights[name] = tensor.to(dtype) if tensor.is_floating_point() else tensor
        try:
            block.layer.load_state_dict(weights, assign=True)
        except RuntimeError as e:
            raise ConfigError(f"block {index} of {self.folder} does not fit its configuration: {e}") from None
        return block

    def _read(self, pattern: re.Pattern[str]) -> dict[str, torch.Tensor]:
        """Tensors whose whole names match; under the pattern's group."""
        found: dict[str, torch.Tensor] = {}
        for file, names in self._files().items():
            wanted = names is None or any(map(pattern.fullmatch, names))
            if not wanted:
                continue
            read = _read_safetensors if file.suffix == ".safetensors" else _read_pickled
            try:
                for name, tensor in read(file, lambda name: pattern.fullmatch(name) is not None):
                    found[_current_name(pattern.fullmatch(name)[1])] = tensor  # type: ignore[index]
            except (OSError, RuntimeError, SafetensorError, ValueError) as e:
                raise ConfigError(f"model_path: cannot read {file}: {e}") from e
        return found

    def _files(self) -> dict[Path, list[str] | None]:
        """The files with weights, and which tensors are in each; None: not known before it is opened."""
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (self.folder / name).is_file():
                return {self.folder / name: None}
            index = self.folder / f"{name}.index.json"
            if index.is_file():
                return self._files_of_index(index)
        raise ConfigError(f"model_path: no weights in {self.folder}: neither model.safetensors nor pytorch_model.bin")

    def _files_of_index(self, index: Path) -> dict[Path, list[str] | None]:
        files: dict[Path, list[str] | None] = {}
        try:
            for tensor, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items():
                if Path(file).name != file:
                    raise ValueError(f"{file!r} is not a file of this folder")
                files.setdefault(self.folder / file, []).append(tensor)  # type: ignore[union-attr]
        except (AttributeError, KeyError, OSError, TypeError, ValueError) as e:
            raise ConfigError(f"model_path: cannot read {index}: {e!r}") from e
        return files


def _read_safetensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, framework="pt") as tensors:
        for name in filter(wanted, tensors.keys()):
            yield name, tensors.get_tensor(name).clone()  # not a view of the file, which may change


def _read_pickled(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as e:  # of whatever else than tensors is in it; torch would advise to execute that
        raise ValueError("it holds something else than tensors, which is not executed") from e
    for name in filter(wanted, state):
        yield name, state[name].clone()


def _current_name(name: str) -> str:
    """Layer norms of old checkpoints, such as bert-base-uncased, have other names."""
    return re.sub(r"LayerNorm\.(gamma|beta)$", lambda m: f"LayerNorm.{dict(gamma='weight', beta='bias')[m[1]]}", name)
