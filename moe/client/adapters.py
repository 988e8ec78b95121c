"""Adapters that a client trains: LoRA, IA3, prefixes. Owns: their parameters, the kwargs they become, and the files of peft.

An adapter is called for its kwargs, one dict for each block: ``blocks(h, block_kwargs=adapter())``, or
``model(input_ids, adapters=adapter)``. The schemas of the blocks say what these kwargs are called and how large they are.
Must not know: servers, transformers. peft (https://github.com/huggingface/peft) is not needed: only the format of its files
is known here.

Legend: R = rank, P = learned positions, K = size of keys.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from moe.architectures import IA3, IA3_INPUT, LORA, kwarg_of, linear_of
from moe.errors import ConfigError
from moe.schema import ExpertSchema, Nested, TensorProto

LORA_TARGETS = ("query", "value", "q_proj", "v_proj")  # what peft adapts by default in encoders and decoders
IA3_TARGETS = ("key", "value", "k_proj", "v_proj")
IA3_INPUT_TARGETS = ("output.dense", "down_proj")
MAX_FEATURES = 2**20  # of a layer, as a schema tells; ours
PREFIX_STD = 0.02  # as transformers begin their embeddings

_PEFT_SETTINGS, _PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PEFT_KEY = re.compile(
    r"(?:base_model\.model\.)?(?P<blocks>\D+?)\.(?P<index>\d+)\.(?P<linear>.+?)\."
    r"(?:lora_(?P<half>[AB])(?:\.\w+)?\.weight|ia3_l(?:\.\w+)?)"
)
# What would change the numbers and is not known here; by peft's names.
_PEFT_UNKNOWN = (
    "alpha_pattern", "fan_in_fan_out", "layer_replication", "lora_bias", "modules_to_save", "prefix_projection",
    "target_parameters", "trainable_token_indices", "use_bdlora", "use_dora", "use_qalora",
)  # fmt: skip


class HasSchema(Protocol):
    """A block: RemoteExpert, ExpertBackend."""

    @property
    def schema(self) -> ExpertSchema:
        """What it takes."""


class BlockAdapter(nn.Module):
    """Parameters that become kwargs of blocks.

    :param per_block: one dict for each block: the name of a kwarg, and a tensor or a dict of them, which become parameters
    """

    def __init__(self, per_block: Iterable[Mapping[str, Any]]):
        super().__init__()
        self.per_block = nn.ModuleList(map(_as_parameters, per_block))

    def extra_repr(self) -> str:
        """For repr."""
        return f"{len(self.per_block)} blocks, {sum(p.numel() for p in self.parameters())} parameters"

    def forward(self) -> list[dict[str, Nested]]:
        """The kwargs of each block; gradients flow back to the parameters."""
        return [{name: self._kwarg(value) for name, value in kwargs.items()} for kwargs in self.blocks()]

    def blocks(self) -> list[nn.ParameterDict]:
        """The parameters of each block, by kwarg."""
        return cast("list[nn.ParameterDict]", list(self.per_block))

    def _kwarg(self, value: Any) -> Nested:
        return dict(value.items()) if isinstance(value, nn.ParameterDict) else value


class LoraAdapter(BlockAdapter):
    """Low-rank changes of linear layers: ``x @ a @ b * alpha / R`` is added to what they give (Hu et al. 2021).

    :param per_block: ``lora_*`` kwargs {"a": (in, R), "b": (R, out)} of each block
    :param alpha: see above
    :param rank_stabilized: divide by the root of R instead (Kalajdzievski 2023)
    """

    def __init__(self, per_block: Iterable[Mapping[str, Any]], *, alpha: float, rank_stabilized: bool = False):
        super().__init__(per_block)
        self.alpha, self.rank_stabilized = float(alpha), rank_stabilized

    @classmethod
    def for_blocks(
        cls,
        blocks: Iterable[HasSchema],
        *,
        rank: int = 8,
        alpha: float | None = None,
        targets: Sequence[str] = LORA_TARGETS,
    ) -> LoraAdapter:
        """An adapter that changes nothing at first: ``a`` is random as in peft, ``b`` zero.

        :param blocks: such as a RemoteSequential: their schemas say which linear layers there are
        :param rank: R
        :param alpha: default: the rank, so that nothing is scaled
        :param targets: linear layers by the last parts of their names, as in peft
        :raises ConfigError: no linear layer of that name
        """
        per_block = (
            {
                name: _lora_pair(_size(proto, "a", axes=2, axis=0), _size(proto, "b", axes=2, axis=1), rank)
                for name, proto in chosen.items()
            }
            for chosen in _chosen(blocks, LORA, targets)
        )
        return cls(per_block, alpha=rank if alpha is None else alpha)

    def scale(self, rank: int) -> float:
        """What a change of this rank is multiplied with."""
        return self.alpha / (math.sqrt(max(rank, 1)) if self.rank_stabilized else max(rank, 1))

    def _kwarg(self, value: Any) -> Nested:
        scale = self.scale(len(value["b"]))
        return {"a": value["a"], "b": value["b"] if scale == 1 else value["b"] * scale}


class Ia3Adapter(BlockAdapter):
    """Learned scales of what linear layers give, or of what they take (Liu et al. 2022).

    :param per_block: ``ia3_*`` (out) and ``ia3_input_*`` (in) kwargs of each block
    """

    @classmethod
    def for_blocks(
        cls,
        blocks: Iterable[HasSchema],
        *,
        targets: Sequence[str] = IA3_TARGETS,
        input_targets: Sequence[str] = IA3_INPUT_TARGETS,
    ) -> Ia3Adapter:
        """An adapter that changes nothing at first: all scales are one.

        :param blocks: such as a RemoteSequential: their schemas say which linear layers there are
        :param targets: layers whose outputs are scaled, by the last parts of their names
        :param input_targets: layers whose inputs are scaled (peft: feedforward_modules)
        :raises ConfigError: no linear layer of any of these names
        """
        blocks = list(blocks)
        parts = [_chosen(blocks, kind, names) for kind, names in ((IA3, targets), (IA3_INPUT, input_targets)) if names]
        return cls(
            {name: torch.ones(_size(proto)) for chosen in per_block for name, proto in chosen.items()}
            for per_block in zip(*parts)
        )


class PrefixAdapter(BlockAdapter):
    """Learned keys and values that all positions see before their own (Li and Liang 2021).

    :param per_block: {"prefix": {"key": (P, K), "value": (P, K)}} for each block
    """

    @classmethod
    def for_blocks(cls, blocks: Iterable[HasSchema], *, length: int, std: float = PREFIX_STD) -> PrefixAdapter:
        """A random prefix.

        :param blocks: such as a RemoteSequential: their schemas say how large keys are
        :param length: P
        :param std: of the normal distribution it begins with
        :raises ConfigError: the blocks take no prefix
        """
        per_block = []
        for block in blocks:
            if "prefix" not in block.schema.kwargs:
                raise ConfigError(f"these blocks take no prefix; they take {list(block.schema.kwargs)}")
            size = _size(block.schema.kwargs["prefix"], "key", axes=2, axis=1)
            per_block.append({"prefix": {half: torch.randn(length, size) * std for half in ("key", "value")}})
        return cls(per_block)


def _as_parameters(value: Any) -> Any:
    if isinstance(value, Mapping):
        return nn.ParameterDict({name: _as_parameters(part) for name, part in value.items()})
    return value if isinstance(value, nn.Parameter) else nn.Parameter(value.detach().clone())


def _size(proto: Any, part: str | None = None, *, axes: int = 1, axis: int = 0) -> int:
    """A size that a block's schema tells: whoever hosts the block says it.

    :param part: of a nested kwarg
    :raises ConfigError: it does not tell, or nothing that a layer can have
    """
    told = proto if part is None else proto.get(part) if isinstance(proto, Mapping) else None
    sizes = told.sizes if isinstance(told, TensorProto) else ()
    size = sizes[axis] if len(sizes) == axes else None
    if size is None or not 0 < size <= MAX_FEATURES:
        raise ConfigError(f"a block's schema has {proto} where an adapter needs to know how large the layer is")
    return size


def _lora_pair(inputs: int, outputs: int, rank: int) -> dict[str, torch.Tensor]:
    bound = 1 / math.sqrt(inputs)  # Kaiming's with a gain for a slope of sqrt(5), as peft (and torch's Linear) begin
    return {"a": torch.empty(inputs, rank).uniform_(-bound, bound), "b": torch.zeros(rank, outputs)}


def _chosen(blocks: Iterable[HasSchema], kind: str, targets: Sequence[str]) -> list[dict[str, Any]]:
    """The kwargs of each block that adapt the targets, with their protos."""
    schemas = [block.schema.kwargs for block in blocks]
    found = []
    for kwargs in schemas:
        linears = {name: of[1] for name in kwargs if (of := linear_of(name)) is not None and of[0] == kind}
        chosen = {n: kwargs[n] for n, linear in linears.items() if any(f".{linear}".endswith(f".{t}") for t in targets)}
        if not chosen:
            raise ConfigError(
                f"none of {list(targets)} is among the linear layers of a block: {list(linears.values())}"
            )
        found.append(chosen)
    return found


# --- peft's files -----------------------------------------------------------------------------------------------------


def load_peft(folder: str | os.PathLike[str], num_blocks: int) -> BlockAdapter:
    """An adapter as peft saves it: ``adapter_config.json`` and ``adapter_model.safetensors``.

    :param num_blocks: of the model
    :returns: LoraAdapter, Ia3Adapter or PrefixAdapter
    :raises ConfigError: no such files, or an adapter of another kind
    """
    try:
        settings = json.loads((Path(folder) / _PEFT_SETTINGS).read_text(encoding="utf-8"))
        state = load_file(Path(folder) / _PEFT_WEIGHTS)
    except (OSError, SafetensorError, ValueError) as e:
        raise ConfigError(f"cannot read an adapter from {os.fspath(folder)}: {e}") from e
    return from_peft(settings, state, num_blocks)


def save_peft(adapter: BlockAdapter, folder: str | os.PathLike[str], block_path: str, **settings: Any) -> None:
    """Save an adapter as peft does, for ``peft.PeftModel.from_pretrained``.

    :param folder: made if missing
    :param block_path: of the model that it is loaded into: ``DistributedModel.block_path``
    :param settings: further ones of peft, such as ``task_type="CAUSAL_LM"``, or, of a prefix, ``num_attention_heads`` (of keys)
    """
    known, state = to_peft(adapter, block_path)
    settings = {**known, **settings}
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / _PEFT_SETTINGS).write_text(json.dumps(settings, indent=2), encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, Path(folder) / _PEFT_WEIGHTS)


def from_peft(settings: Mapping[str, Any], state: Mapping[str, torch.Tensor], num_blocks: int) -> BlockAdapter:
    """An adapter from peft's settings and state dict.

    :param settings: of ``adapter_config.json``
    :param state: of ``adapter_model.safetensors``, or ``peft.get_peft_model_state_dict``
    :param num_blocks: of the model
    :raises ConfigError: an adapter of another kind, or one that does more than adapt linear layers of blocks
    """
    kind = settings.get("peft_type")
    unknown = [name for name in _PEFT_UNKNOWN if settings.get(name)]
    unknown += ["bias"] if settings.get("bias", "none") != "none" else []
    if kind not in ("LORA", "IA3", "PREFIX_TUNING") or unknown:
        raise ConfigError(
            f"a peft adapter of type {kind} cannot be used" + (f" with {', '.join(unknown)}" if unknown else "")
        )
    if kind == "PREFIX_TUNING":
        return _prefix_from_peft(state, num_blocks)
    per_block: list[dict[str, Any]] = [{} for _ in range(num_blocks)]
    for key, tensor in state.items():
        matched = _PEFT_KEY.fullmatch(key)
        if matched is None or int(matched["index"]) >= num_blocks:
            raise ConfigError(f"{key!r} of a peft adapter does not belong to any of the {num_blocks} blocks")
        kwargs = per_block[int(matched["index"])]
        if matched["half"] is not None:
            kwargs.setdefault(kwarg_of(LORA, matched["linear"]), {})[matched["half"].lower()] = tensor.T.float()
        else:  # (out, 1) scales outputs, (1, in) inputs
            scales = IA3 if tensor.shape[1] == 1 else IA3_INPUT
            kwargs[kwarg_of(scales, matched["linear"])] = tensor.flatten().float()
    halves = [
        name for kwargs in per_block for name, value in kwargs.items() if isinstance(value, dict) and len(value) != 2
    ]
    if halves:
        raise ConfigError(f"a peft adapter has only one half of {halves[0]}")
    if kind == "IA3":
        return Ia3Adapter(per_block)
    return LoraAdapter(per_block, alpha=settings["lora_alpha"], rank_stabilized=bool(settings.get("use_rslora")))


def to_peft(adapter: BlockAdapter, block_path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Inverse of from_peft: settings and state dict.

    :param block_path: where the model has its blocks: ``encoder.layer``, or with a head ``bert.encoder.layer``
    """
    state: dict[str, torch.Tensor] = {}
    targets: dict[str, set[str]] = {LORA: set(), IA3: set(), IA3_INPUT: set()}
    if isinstance(adapter, PrefixAdapter):
        return _prefix_to_peft(adapter)
    for index, kwargs in enumerate(adapter.blocks()):
        for name, value in kwargs.items():
            kind, linear = linear_of(name) or ("", "")
            targets[kind].add(linear)
            key = f"base_model.model.{block_path}.{index}.{linear}"
            if kind == LORA:
                state |= {f"{key}.lora_{half.upper()}.weight": value[half].detach().T for half in ("a", "b")}
            else:
                state[f"{key}.ia3_l"] = value.detach()[:, None] if kind == IA3 else value.detach()[None]
    if not isinstance(adapter, LoraAdapter):
        both = sorted(targets[IA3] | targets[IA3_INPUT])
        return {"peft_type": "IA3", "target_modules": both, "feedforward_modules": sorted(targets[IA3_INPUT])}, state
    of = re.compile(r"base_model\.model\.(.*)\.lora_A\.weight")
    ranks = {matched[1]: len(tensor) for key, tensor in state.items() if (matched := of.fullmatch(key))}
    rank = max(ranks.values(), default=1)
    settings = {
        "peft_type": "LORA",
        "r": rank,
        "rank_pattern": {linear: other for linear, other in ranks.items() if other != rank},
        "lora_alpha": adapter.alpha,
        "use_rslora": adapter.rank_stabilized,
        "target_modules": sorted(targets[LORA]),
    }
    return settings, state


def _prefix_from_peft(state: Mapping[str, torch.Tensor], num_blocks: int) -> PrefixAdapter:
    learned = state.get("prompt_embeddings")
    if learned is None or learned.ndim != 2 or learned.shape[1] % (2 * num_blocks):
        raise ConfigError(f"a prefix of peft has prompt_embeddings (P, {num_blocks} blocks * 2 * K), got {list(state)}")
    pairs = learned.float().reshape(len(learned), num_blocks, 2, -1).unbind(1)  # (P, 2, K) each
    return PrefixAdapter({"prefix": {"key": pair[:, 0], "value": pair[:, 1]}} for pair in pairs)


def _prefix_to_peft(adapter: PrefixAdapter) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    pairs = [
        torch.stack([block["prefix"][half].detach() for half in ("key", "value")], 1) for block in adapter.blocks()
    ]
    learned = torch.stack(pairs, 1)  # (P, blocks, 2, K)
    settings = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": len(learned), "num_layers": len(pairs)}
    settings |= {"token_dim": learned.shape[-1]}
    return settings, {"prompt_embeddings": learned.flatten(1)}
