"""The self-check of a pretrained block. Owns: comparing it with transformers' own model around the same layer.

Whatever a configuration, a version of transformers or a family does that is not known here shows in the numbers: masks,
positions, windows, what a layer is called with. Must not know: files, how the block does it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn

from moe.architectures import ARCHITECTURES, import_transformers
from moe.errors import ConfigError
from moe.schema import ExpertSchema

_LENGTH, _WINDOW = 7, 3  # of the input; of attention, in its place, so that few positions show it
_VOCABULARY = 16  # the model is called with embeddings
# The largest difference of two ways to compute the same in a dtype, of the largest value
_TOLERANCES = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}


class Checked(Protocol):
    """What this file needs of a block."""

    layer: nn.Module
    window: int | None
    kind: str

    def schema(self) -> ExpertSchema:
        """What it takes."""
        ...

    def __call__(self, hidden_states: torch.Tensor, **inputs: Any) -> torch.Tensor:
        """(B, S, D) -> (B, S, D)"""
        ...


def compare_with_transformers(block: Checked, config: Any) -> None:
    """Compare a block with transformers' model around the same layer, on random input, forward and backward.

    :param config: of the model
    :raises ConfigError: they differ, or transformers cannot compute this; says in which case and how much
    """
    kind = config.model_type
    try:
        model = _model_around(block, config)
        dtype = next(block.layer.parameters()).dtype
        generator = torch.Generator().manual_seed(0)
        size = model.get_input_embeddings().embedding_dim
        length = _length(config)
        inputs = torch.randn(2, length, size, generator=generator).to(dtype)
        with _small_window(block, model), torch.enable_grad():
            for case, given in _cases(model, length).items():
                expected, hidden = _by_transformers(block, model, inputs, given)
                got = _by_block(block, hidden, given)
                where = given.get("attention_mask", torch.ones(2, length)).bool()
                for what, theirs, ours in zip(("output", "gradient"), expected, got):
                    error = float((theirs.float() - ours.float())[where].abs().max())
                    error /= float(theirs.float()[where].abs().max()) + 1e-6
                    if not error <= _TOLERANCES.get(dtype, 1e-4):
                        raise ConfigError(
                            f"this {kind} model cannot be hosted: with {case}, the {what} of a block differs from "
                            f"transformers' by {error:.2g} of the largest value"
                        )
    except ConfigError:
        raise
    except Exception as e:  # of whatever transformers finds wrong with the configuration
        raise ConfigError(
            f"this {kind} model cannot be hosted: transformers cannot compute a block of it: {e!r}"
        ) from e


def _model_around(block: Checked, config: Any) -> Any:
    """transformers' model without a head, whose only layer is the block's."""
    config = copy.copy(config)
    config.id2label, config.label2id = {}, {}  # nothing of a head, which may have many
    config = copy.deepcopy(config)
    fewest = ARCHITECTURES[config.model_type].fewest_blocks
    config.num_hidden_layers, config.vocab_size, config.use_cache = fewest, _VOCABULARY, False
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"):
        if getattr(config, name, None) is not None:
            setattr(config, name, 0)
    dtype = next(block.layer.parameters()).dtype
    model = import_transformers().AutoModel.from_config(
        config, dtype=dtype, attn_implementation=config._attn_implementation
    )
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == fewest]
    if len(lists) != 1:
        raise ConfigError(f"{type(model).__name__} has {len(lists)} lists of layers, not one")
    del lists[0][:]
    lists[0].append(block.layer)
    model.config.num_hidden_layers = 1
    if getattr(config, "layer_types", None) is not None:
        model.config.layer_types = [block.kind]
    return model.eval()


def _length(config: Any) -> int:
    """Positions of the input: whole chunks, if the layer computes in chunks."""
    chunk = getattr(config, "chunk_size_feed_forward", 0) or 1
    return int(-(-_LENGTH // chunk) * chunk)


def _cases(model: Any, length: int) -> dict[str, dict[str, torch.Tensor]]:
    """Inputs by what is special in them."""
    positions = torch.arange(length)
    right = (positions < torch.tensor([[length], [length - 3]])).long()
    cases: dict[str, dict[str, torch.Tensor]] = {
        "nothing but hidden states": {},
        "padding": {"attention_mask": right},
        "padding on the left": {"attention_mask": right.flip(1)},
    }
    if "position_ids" in inspect.signature(model.forward).parameters:
        shifted = (right.flip(1).cumsum(1) - 1).clamp(min=0)
        cases["padding on the left, positions"] = {"attention_mask": right.flip(1), "position_ids": shifted}
        cases["positions"] = {"position_ids": positions[None].repeat(2, 1) + torch.tensor([[2], [0]])}
        packed = torch.cat([torch.arange(4), torch.arange(length - 4)])
        cases["packed rows"] = {"position_ids": torch.stack([packed, positions])}
    return cases


@contextmanager
def _small_window(block: Checked, model: Any) -> Iterator[None]:
    window = block.window
    if window is not None:
        block.window = _WINDOW
        _set_window(model.config, _WINDOW)
    try:
        yield
    finally:
        block.window = window


def _set_window(config: Any, window: int) -> None:
    if "sliding_window" in vars(config):
        config.sliding_window = window
    else:
        config.local_attention = 2 * window  # ModernBERT: half of it to each side


def _by_transformers(
    block: Checked, model: Any, inputs: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(output of the layer, gradient of its input), and its input."""
    seen: dict[str, torch.Tensor] = {}

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden = args[0] if args else kwargs["hidden_states"]
        seen["input"] = hidden.detach().requires_grad_()
        if args:
            return (seen["input"], *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": seen["input"]}

    def after(_: nn.Module, args: Any, output: Any) -> None:
        seen["output"] = output[0] if isinstance(output, tuple) else output

    hooks = [block.layer.register_forward_pre_hook(before, with_kwargs=True), block.layer.register_forward_hook(after)]
    try:
        model(inputs_embeds=inputs, **given)
    finally:
        for hook in hooks:
            hook.remove()
    return _with_gradient(seen["output"], seen["input"], given), seen["input"].detach()


def _by_block(
    block: Checked, hidden: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = hidden.clone().requires_grad_()
    known = block.schema().kwargs
    taken = {name: tensor for name, tensor in given.items() if name in known}
    return _with_gradient(block(hidden, **taken), hidden, given)


def _with_gradient(
    output: torch.Tensor, hidden: torch.Tensor, given: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The output, and what a loss over all positions that are not padding gives for the input."""
    weights = torch.linspace(-1, 1, output.numel()).reshape(output.shape)
    if "attention_mask" in given:
        weights = weights * given["attention_mask"][..., None]
    (gradient,) = torch.autograd.grad((output.float() * weights).sum(), hidden)
    return output.detach(), gradient
