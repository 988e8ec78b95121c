"""Adapters as peft saves them (https://github.com/huggingface/peft). Owns: what the tensors of such a file are called, and what
becomes of them here: what comes out equals peft's, or is refused by name before anything is changed.

peft itself is not needed. Modules that peft trains whole (``modules_to_save``, the heads of classifiers) belong to the local
part of a DistributedModel, so they are read into it and saved from it. Must not know: servers, transformers.

Legend: R = rank, P = learned positions, K = size of keys, D = hidden size.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import nn

from moe.architectures import BIAS, DORA, IA3, IA3_INPUT, LORA, kwarg_of, linear_of
from moe.client.adapters.modules import BlockAdapter, Ia3Adapter, LoraAdapter, PrefixAdapter, SoftPrompt
from moe.client.adapters.peft_files import SETTINGS, WEIGHTS, check_tensors, read_adapter
from moe.client.adapters.peft_settings import (
    HEADS,
    IA3_KIND,
    LORA_KIND,
    MAX_NAME,
    PREFIX_KIND,
    PROMPT_KIND,
    SOFT_KINDS,
    Settings,
)
from moe.errors import ConfigError, RemoteError, RoutingError, TransportError
from moe.schema import ExpertSchema, TensorProto

Adapter = BlockAdapter | SoftPrompt

_ROOT = "base_model.model."  # before the names of modules; adapters of the input wrap the model once only
_ROOT_OF_PROMPTS = "base_model."
_LEARNED = "prompt_embeddings"
_IN_BLOCKS = re.compile(r"(?P<blocks>[^\d.][^.]*(?:\.[^\d.][^.]*)*)\.(?P<index>\d{1,6})\.(?P<rest>.+)")
_PARTS = {
    LORA_KIND: ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "base_layer.bias", "bias"),
    IA3_KIND: ("ia3_l",),
}
_PASS_THE_MODEL = "pass the DistributedModel, or its block_path, not only a number of blocks or a text"


def load_peft(folder: str | os.PathLike[str], model: Any = None, *, num_blocks: int | None = None) -> Any:
    """An adapter as peft saves it: ``adapter_config.json``, and ``adapter_model.safetensors`` or ``adapter_model.bin``.

    :param model: the DistributedModel that it is for: what peft trains whole, such as a classifier, is put into its local part,
        and the adapter is checked against its blocks. Or the number of its blocks
    :param num_blocks: of the model
    :returns: LoraAdapter, Ia3Adapter, PrefixAdapter or SoftPrompt, in eval mode
    :raises ConfigError: no such files, or an adapter that does something that cannot be done here; names the file and the field
    """
    files = read_adapter(folder)
    target = model if num_blocks is None else num_blocks
    return _load(Settings(files.settings, files.settings_file), files.state, files.weights_file, target)


def from_peft(
    settings: Mapping[str, Any], state: Mapping[str, torch.Tensor], model: Any = None, *, num_blocks: int | None = None
) -> Any:
    """An adapter from peft's settings and state dict.

    :param settings: of ``adapter_config.json``
    :param state: of ``adapter_model.safetensors``, or ``peft.get_peft_model_state_dict``
    :param model: see load_peft
    :param num_blocks: of the model
    :raises ConfigError: see load_peft
    """
    target = model if num_blocks is None else num_blocks
    return _load(Settings(settings, SETTINGS), check_tensors(state, WEIGHTS), WEIGHTS, target)


def save_peft(adapter: Adapter, folder: str | os.PathLike[str], model: Any, **settings: Any) -> None:
    """Save an adapter as peft does, for ``peft.PeftModel.from_pretrained``.

    :param folder: made if missing
    :param model: the DistributedModel that it is for, or its ``block_path``, or where another model has its blocks, as text
    :param settings: further ones of peft, such as ``task_type="CAUSAL_LM"``; the heads that peft wants for a task, and modules
        in ``modules_to_save=[...]``, are saved from the local part of the model
    :raises ConfigError: what peft could not load
    """
    known, state = to_peft(adapter, model, **settings)
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / SETTINGS).write_text(json.dumps(known, indent=2), encoding="utf-8")
    save_file({name: tensor.detach().clone().contiguous() for name, tensor in state.items()}, Path(folder) / WEIGHTS)


def to_peft(adapter: Adapter, model: Any, **settings: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Inverse of from_peft: settings and state dict.

    :param model: see save_peft
    :param settings: see save_peft
    :raises ConfigError: what peft could not load
    """
    where = model if isinstance(model, str) else getattr(model, "block_path", None)
    if not isinstance(where, str):
        raise ConfigError(f"expected a DistributedModel, or its block_path, got {model!r:.100}")
    local = getattr(where, "local", None)
    if isinstance(adapter, SoftPrompt):
        known, state = _soft_to_peft(adapter)
    elif isinstance(adapter, PrefixAdapter):
        known, state = _prefix_to_peft(adapter, local)
    elif isinstance(adapter, Ia3Adapter):
        known, state = _ia3_to_peft(adapter, str(where))
    elif isinstance(adapter, LoraAdapter):
        known, state = _lora_to_peft(adapter, str(where))
    else:
        raise ConfigError(f"peft has no files for a {type(adapter).__name__}: save its state_dict() instead")
    understood = Settings({**known, **settings}, SETTINGS)
    names = understood.saved_modules()
    saved = {**known, **settings} | ({"modules_to_save": names} if names else {})
    return saved, {**state, **_saved_modules(understood, local, str(where), names)}


# --- from files: all kinds ----------------------------------------------------------------------------------------------------


class _Model:
    """What is known of the model that an adapter is for.

    :param target: the DistributedModel, or the number of its blocks
    :ivar path: of the blocks, if known
    :ivar local: the local part, if known
    """

    def __init__(self, target: Any):
        self._blocks: Any = None
        self.num_blocks, self.path, self.local = target, None, None
        if type(target) is int and target > 0:
            return
        if not hasattr(target, "block_path"):
            raise ConfigError(f"expected a DistributedModel, or the number of its blocks, got {target!r:.100}")
        self._blocks, self.local = target.blocks, target.local
        self.num_blocks, self.path = len(target.blocks), str(target.block_path)

    @functools.cached_property
    def schemas(self) -> list[ExpertSchema] | None:
        """What each block takes. None: no server tells it now, so the first call will."""
        try:
            return None if self._blocks is None else list(self._blocks.schemas())
        except (RemoteError, RoutingError, TransportError):
            return None


class _File(NamedTuple):
    """What a file says, for a model."""

    settings: Settings
    name: str  # of the file with the tensors
    model: _Model

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.name}: {key[:200]!r}: {problem}")


def _load(settings: Settings, state: dict[str, torch.Tensor], name: str, target: Any) -> Adapter:
    file = _File(settings, name, _Model(target))
    adapter: Adapter
    if settings.kind in (LORA_KIND, IA3_KIND):
        layers, others = _split(file, state)
        write = _to_be_put(file, others, _ROOT)
        adapter = (_lora_from_peft if settings.kind == LORA_KIND else _ia3_from_peft)(file, layers)
    else:
        others = dict(state)
        learned = others.pop(_LEARNED, None)
        if learned is None:
            raise ConfigError(f"{name}: expected {_LEARNED}, got {[key[:200] for key in state][:5]}")
        write = _to_be_put(file, others, _ROOT_OF_PROMPTS)
        adapter = (_soft_from_peft if settings.kind in SOFT_KINDS else _prefix_from_peft)(file, learned)
    for put in write:  # nothing was changed before all of it was understood
        put()
    return adapter.eval()


# --- what belongs to the local part of a model -----------------------------------------------------------------------------


def _to_be_put(file: _File, tensors: Mapping[str, torch.Tensor], root: str) -> list[Callable[[], None]]:
    """Checks tensors that are not the adapter's, and tells how each gets into the local part of the model."""
    local, settings = file.model.local, file.settings
    if local is None:
        for key in tensors:
            what = "belongs to none of the layers that are adapted" if root in key else f"does not begin with {root}"
            raise file.error(
                key, f"{what}: if it is of the model's local part, pass the DistributedModel: load_peft(folder, model)"
            )
        return []
    own: dict[str, torch.Tensor] = local.state_dict(keep_vars=True)
    saved = _modules_called(local, settings.saved_modules())
    found: dict[str, torch.Tensor] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(root)
        if settings.get("bias") == "all" and _is_a_copy(name, saved):
            continue
        if not key.startswith(root) or name not in own:
            where = f"the model has nothing of this name outside of its blocks, which are at {file.model.path}"
            raise file.error(
                key, f"{where}; adapters of layers that are not in blocks, and of embeddings, are not supported"
            )
        if own[name].shape != tensor.shape:
            raise file.error(key, f"expected {tuple(own[name].shape)}, as the model has, got {tuple(tensor.shape)}")
        found[name] = tensor
    for module in saved:
        for name in own:
            if name.startswith(f"{module}.") and name not in found:
                raise file.error(
                    root + name, f"it is missing, and peft trains {module} whole (task_type, modules_to_save)"
                )
    return [_putting(local, name, tensor, saved) for name, tensor in found.items()]


def _is_a_copy(name: str, saved: list[str]) -> bool:
    """With ``bias="all"``, peft saves the biases of a module that it trains three times over, and reads one."""
    inside = (name.startswith((f"{module}.original_module.", f"{module}.modules_to_save.")) for module in saved)
    return name.endswith(".bias") and any(inside)


def _modules_called(local: nn.Module, names: list[str]) -> list[str]:
    """Modules of the model that peft means, by the last parts of their names."""
    return [name for name, _ in local.named_modules(remove_duplicate=False) if name and name.endswith(tuple(names))]


def _putting(local: nn.Module, name: str, tensor: torch.Tensor, saved: list[str]) -> Callable[[], None]:
    owner_name, _, attribute = name.rpartition(".")
    owner = local.get_submodule(owner_name)
    held: torch.Tensor = getattr(owner, attribute)
    others = [n for n, p in local.named_parameters(remove_duplicate=False) if p is held and n != name]
    is_untied = bool(others) and any(name.startswith(f"{module}.") for module in saved)

    @torch.no_grad()
    def put() -> None:
        if is_untied:  # as peft, which trains a copy of the module
            setattr(owner, attribute, nn.Parameter(tensor.to(held), requires_grad=held.requires_grad))
        else:
            held.copy_(tensor)

    return put


def _saved_modules(settings: Settings, local: Any, path: str, names: list[str]) -> dict[str, torch.Tensor]:
    """Tensors of the modules that are saved whole."""
    if not names:
        return {}
    if local is None:
        field = "modules_to_save" if settings.get("modules_to_save") else "task_type"
        raise settings.error(field, f"peft loads this only with the weights of {', '.join(names)}: {_PASS_THE_MODEL}")
    modules = _modules_called(local, names)
    heads = HEADS[settings.get("task_type", "CAUSAL_LM")]
    for name in names:
        if name not in heads and not any(module.endswith(name) for module in modules):
            raise settings.error("modules_to_save", f"the local part of the model has no {name}")
    for module in modules:
        if f"{path}.".startswith(f"{module}.") or module.startswith(f"{path}."):
            raise settings.error("modules_to_save", f"{module} has blocks in it, which are not here")
    root = _ROOT if settings.kind in (LORA_KIND, IA3_KIND) else _ROOT_OF_PROMPTS
    own: dict[str, torch.Tensor] = local.state_dict()
    return {root + name: own[name] for module in modules for name in own if name.startswith(f"{module}.")}


# --- layers of blocks -------------------------------------------------------------------------------------------------------


class _Layer(NamedTuple):
    """A layer of a block that a file has tensors for."""

    block: int
    name: str  # within the block
    path: str  # within the model
    parts: dict[str, torch.Tensor]  # by the last parts of their keys

    def key(self, part: str) -> str:
        return f"{_ROOT}{self.path}.{part}"


def _split(file: _File, state: Mapping[str, torch.Tensor]) -> tuple[list[_Layer], dict[str, torch.Tensor]]:
    """The layers of blocks, and what does not belong to any."""
    layers: dict[str, _Layer] = {}
    others: dict[str, torch.Tensor] = {}
    for key, tensor in state.items():
        matched = _IN_BLOCKS.fullmatch(key.removeprefix(_ROOT)) if key.startswith(_ROOT) else None
        if matched is None or (file.model.path is not None and matched["blocks"] != file.model.path):
            others[key] = tensor
            continue
        part = next((part for part in _PARTS[file.settings.kind] if matched["rest"].endswith(f".{part}")), None)
        name, index = matched["rest"].removesuffix(f".{part}"), int(matched["index"])
        if part is None or {"lora_A", "lora_B", "base_layer"} & set(name.split(".")):
            known = ", ".join(_PARTS[file.settings.kind])
            raise file.error(
                key, f"expected {known} in blocks; modules that are trained whole (modules_to_save) can be local only"
            )
        if len(key) > MAX_NAME:
            raise file.error(key, f"expected a name of {MAX_NAME} characters at most")
        if index >= file.model.num_blocks:
            raise file.error(key, f"does not belong to any of the {file.model.num_blocks} blocks")
        path = f"{matched['blocks']}.{index}.{name}"
        layer = layers.setdefault(path, _Layer(index, name, path, {}))
        if part in layer.parts:
            raise file.error(key, "is there twice")
        layer.parts[part] = tensor
    paths = {layer.path.removesuffix(f".{layer.block}.{layer.name}") for layer in layers.values()}
    if len(paths) > 1:
        raise ConfigError(f"{file.name}: has layers of several lists of blocks: {sorted(paths)}")
    return list(layers.values()), others


def _check_layers(file: _File, layers: list[_Layer], adapted: set[str]) -> None:
    """Are these layers those that peft would adapt?

    :param adapted: paths of layers
    """
    for layer in layers:
        if layer.path in adapted and not file.settings.is_targeted(layer.path):
            fields = "target_modules, exclude_modules, modules_to_save and layers_to_transform"
            key = layer.key(next(iter(layer.parts)))
            raise file.error(key, f"peft would ignore it: {fields} of the settings say that this layer is not adapted")
    if not file.settings.begins_at_random():
        return  # what the file has no tensors for changes nothing
    paths = [
        f"{file.model.path}.{index}.{of[1]}"
        for index, schema in enumerate(file.model.schemas or ())
        for kwarg in schema.kwargs
        if (of := linear_of(kwarg)) is not None and of[0] == LORA
    ]
    missing = [path for path in paths if path not in adapted and file.settings.is_targeted(path)]
    if missing:
        raise ConfigError(
            f"{file.name}: {missing[0]!r}: it has no tensors, and would begin at random (init_*_weights: false)"
        )


def _check_schema(file: _File, per_block: list[dict[str, Any]]) -> None:
    """Do the blocks have these layers, of these sizes?"""
    for index, (schema, kwargs) in enumerate(zip(file.model.schemas or (), per_block)):
        for kwarg, value in kwargs.items():
            if kwarg not in schema.kwargs:
                _, name = linear_of(kwarg) or ("", kwarg)
                where = f"{file.name}: {name!r} of block {index}"
                raise ConfigError(f"{where}: the blocks of this model have none that takes {kwarg}")
            proto = schema.kwargs[kwarg]
            for half, tensor in value.items() if isinstance(value, Mapping) else [("", value)]:
                expected = proto.get(half) if half and isinstance(proto, Mapping) else proto
                if not _fits(expected, tensor):
                    sizes = getattr(expected, "sizes", expected)
                    where = f"{file.name}: {kwarg}" + (f"[{half!r}]" if half else "") + f" of block {index}"
                    raise ConfigError(
                        f"{where}: expected {sizes}, as the blocks of this model have, got {tuple(tensor.shape)}: "
                        "the adapter is of another model"
                    )


def _fits(proto: Any, tensor: torch.Tensor) -> bool:
    sizes = proto.sizes if isinstance(proto, TensorProto) else ()
    return len(sizes) == tensor.ndim and all(size in (None, got) for size, got in zip(sizes, tensor.shape))


# --- LoRA ---------------------------------------------------------------------------------------------------------------------


def _lora_from_peft(file: _File, layers: list[_Layer]) -> LoraAdapter:
    settings = file.settings
    per_block: list[dict[str, Any]] = [{} for _ in range(file.model.num_blocks)]
    alphas: list[dict[str, float]] = [{} for _ in per_block]
    alpha = float(settings.get("lora_alpha", 8))
    adapted = {layer.path for layer in layers if "lora_A.weight" in layer.parts or "lora_B.weight" in layer.parts}
    for layer in layers:
        kwargs = per_block[layer.block]
        if layer.path in adapted:
            name = kwarg_of(LORA, layer.name)
            kwargs[name] = _pair_from_peft(file, layer)
            own = settings.alpha_of(layer.path)
            alphas[layer.block] |= {name: own} if own != alpha else {}
        _take_magnitude(file, layer, kwargs)
        _take_bias(file, layer, kwargs, "base_layer.bias" if layer.path in adapted else "bias")
    _check_layers(file, layers, adapted)
    _check_schema(file, per_block)
    if settings.get("init_lora_weights") == "mica":  # peft does not train this half of it
        for kwargs in per_block:
            for pair in (value for value in kwargs.values() if isinstance(value, dict)):
                pair["b"] = nn.Parameter(pair["b"], requires_grad=False)
    return LoraAdapter(
        per_block,
        alpha=alpha,
        rank_stabilized=bool(settings.get("use_rslora")),
        alphas=alphas,
        dropout=float(settings.get("lora_dropout", 0)),
    )


def _pair_from_peft(file: _File, layer: _Layer) -> dict[str, torch.Tensor]:
    rank = file.settings.rank_of(layer.path)
    for half in ("lora_A.weight", "lora_B.weight"):
        tensor = layer.parts.get(half)
        if tensor is None:
            raise file.error(
                layer.key(half), f"it is missing: the file has only one half of {kwarg_of(LORA, layer.name)}"
            )
        if tensor.ndim != 2 or tensor.shape[half == "lora_B.weight"] != rank:
            expected = f"({rank}, inputs)" if half == "lora_A.weight" else f"(outputs, {rank})"
            raise file.error(
                layer.key(half), f"expected {expected}, as r and rank_pattern say, got {tuple(tensor.shape)}"
            )
    return {half.lower(): layer.parts[f"lora_{half}.weight"].T.float().contiguous() for half in ("A", "B")}


def _take_magnitude(file: _File, layer: _Layer, kwargs: dict[str, Any]) -> None:
    key, up = "lora_magnitude_vector", layer.parts.get("lora_B.weight")
    tensor = layer.parts.get(key)
    if up is not None and file.settings.get("use_dora") and tensor is None:
        raise file.error(layer.key(key), "it is missing, and use_dora is true")
    if tensor is None:
        return
    if not file.settings.get("use_dora") or up is None:
        raise file.error(layer.key(key), "expected with use_dora, for a layer with LoRA")
    if tensor.shape != up.shape[:1]:
        raise file.error(layer.key(key), f"expected ({len(up)}), got {tuple(tensor.shape)}")
    kwargs[kwarg_of(DORA, layer.name)] = tensor.float()


def _take_bias(file: _File, layer: _Layer, kwargs: dict[str, Any], part: str) -> None:
    for key in ("base_layer.bias", "bias"):
        tensor = layer.parts.get(key)
        if tensor is None:
            continue
        bias = file.settings.get("bias", "none")
        if bias == "none" or key != part or (bias == "lora_only" and key == "bias"):
            raise file.error(
                layer.key(key), f"peft would ignore it, or not train it: bias is {bias}, and it looks for {part}"
            )
        if tensor.ndim != 1:
            raise file.error(layer.key(key), f"expected (outputs), got {tuple(tensor.shape)}")
        kwargs[kwarg_of(BIAS, layer.name)] = tensor.float()


def _adapted(
    adapter: LoraAdapter | Ia3Adapter, kinds: Collection[str], what: str
) -> Iterator[tuple[int, str, str, str, Any]]:
    """(block, kwarg, its kind, name of the layer, value) of all that an adapter has.

    :param kinds: that peft has in an adapter of this kind
    :raises ConfigError: it has others
    """
    for index, kwargs in enumerate(adapter.blocks()):
        for name, value in kwargs.items():
            kind, linear = linear_of(name) or ("", "")
            if kind not in kinds:
                raise ConfigError(f"peft has no {what} with {name}: save it as an adapter of its own")
            yield index, name, kind, linear, value


def _lora_to_peft(adapter: LoraAdapter, block_path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    state: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    kinds: dict[str, set[str]] = {LORA: set(), DORA: set(), BIAS: set()}
    with_lora = [kwargs.keys() for kwargs in adapter.blocks()]
    for index, name, kind, linear, value in _adapted(adapter, kinds, "LoRA"):
        path = f"{block_path}.{index}.{linear}"
        kinds[kind].add(path)
        if kind == LORA:
            state |= {f"{_ROOT}{path}.lora_{half.upper()}.weight": value[half].detach().T for half in ("a", "b")}
            ranks[path] = len(value["b"])
            alphas |= {path: adapter.alphas[index][name]} if name in adapter.alphas[index] else {}
        elif kind == DORA:
            state[f"{_ROOT}{path}.lora_magnitude_vector"] = value.detach()
        else:
            base = ".base_layer" if kwarg_of(LORA, linear) in with_lora[index] else ""
            state[f"{_ROOT}{path}{base}.bias"] = value.detach()
    if not ranks or kinds[DORA] - kinds[LORA] or (kinds[DORA] and kinds[LORA] - kinds[DORA]):
        raise ConfigError("peft has a LoRA for one layer at least, and dora_* for all of these or for none")
    rank = max(ranks.values())
    settings = {
        "peft_type": LORA_KIND,
        "r": rank,
        "rank_pattern": {path: other for path, other in ranks.items() if other != rank},
        "lora_alpha": _whole(adapter.alpha),
        "alpha_pattern": {path: _whole(other) for path, other in alphas.items()},
        "lora_dropout": adapter.dropout,
        "use_rslora": adapter.rank_stabilized,
        "use_dora": bool(kinds[DORA]),
        "bias": "none" if not kinds[BIAS] else "lora_only" if kinds[BIAS] <= kinds[LORA] else "all",
        "target_modules": sorted(kinds[LORA]),  # whole names: peft would take others that end alike, too
    }
    return settings, state


def _whole(number: float) -> float:
    return int(number) if number == int(number) else number


# --- IA3 ----------------------------------------------------------------------------------------------------------------------


def _ia3_from_peft(file: _File, layers: list[_Layer]) -> Ia3Adapter:
    per_block: list[dict[str, Any]] = [{} for _ in range(file.model.num_blocks)]
    for layer in layers:
        tensor = layer.parts["ia3_l"]
        of_input = file.settings.is_feedforward(layer.path)
        if of_input is None:
            of_input = tensor.ndim == 2 and tensor.shape[0] == 1
        if tensor.ndim != 2 or tensor.shape[0 if of_input else 1] != 1:
            expected = "(1, inputs)" if of_input else "(outputs, 1)"
            raise file.error(
                layer.key("ia3_l"), f"expected {expected}, as feedforward_modules says, got {tuple(tensor.shape)}"
            )
        per_block[layer.block][kwarg_of(IA3_INPUT if of_input else IA3, layer.name)] = tensor.flatten().float()
    _check_layers(file, layers, {layer.path for layer in layers})
    _check_schema(file, per_block)
    return Ia3Adapter(per_block)


def _ia3_to_peft(adapter: Ia3Adapter, block_path: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    state: dict[str, torch.Tensor] = {}
    targets: dict[str, set[str]] = {IA3: set(), IA3_INPUT: set()}
    for index, _, kind, linear, value in _adapted(adapter, targets, "IA3"):
        path = f"{block_path}.{index}.{linear}"
        targets[kind].add(path)
        state[f"{_ROOT}{path}.ia3_l"] = value.detach()[:, None] if kind == IA3 else value.detach()[None]
    both = targets[IA3] & targets[IA3_INPUT]
    if both or not state:
        raise ConfigError(
            f"peft scales one layer at least, and either what it gives or what it takes; both here: {sorted(both)}"
        )
    settings = {
        "peft_type": IA3_KIND,
        "target_modules": sorted(targets[IA3] | targets[IA3_INPUT]),
        "feedforward_modules": sorted(targets[IA3_INPUT]),
    }
    return settings, state


# --- prefixes and soft prompts ------------------------------------------------------------------------------------------------


def _check_learned(file: _File, learned: torch.Tensor, size: int | None, what: str) -> None:
    """Has it the sizes that the settings say?

    :param size: of a position, if known
    """
    length = file.settings.get("num_virtual_tokens", learned.shape[0] if learned.ndim else 0)
    if learned.ndim != 2 or len(learned) != length or size not in (None, learned.shape[1]):
        fields, expected = "num_virtual_tokens, token_dim and num_layers", what if size is None else size
        raise file.error(_LEARNED, f"expected ({length}, {expected}), as {fields} say, got {tuple(learned.shape)}")


def _prefix_from_peft(file: _File, learned: torch.Tensor) -> PrefixAdapter:
    settings, count = file.settings, file.model.num_blocks
    if settings.get("num_layers", count) != count:
        raise settings.error(
            "num_layers", f"expected {count}, as the model has blocks, got {settings.get('num_layers')}"
        )
    size = settings.get("token_dim")
    _check_learned(file, learned, None if size is None else 2 * count * size, f"{count} blocks * 2 * keys")
    if learned.shape[1] % (2 * count) or not learned.shape[1]:
        raise file.error(_LEARNED, f"expected (P, {count} blocks * 2 * keys), got {tuple(learned.shape)}")
    heads, told = _key_heads(file.model.local), settings.get("num_attention_heads")
    if told not in (None, heads) and heads is not None:
        raise settings.error("num_attention_heads", f"expected {heads}, as the model has for keys, got {told}")
    pairs = learned.float().reshape(len(learned), count, 2, -1).unbind(1)  # (P, 2, K) each
    per_block: list[dict[str, Any]] = [{"prefix": {"key": pair[:, 0], "value": pair[:, 1]}} for pair in pairs]
    _check_schema(file, per_block)
    return PrefixAdapter(per_block)


def _prefix_to_peft(adapter: PrefixAdapter, local: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    pairs = [
        torch.stack([block["prefix"][half].detach() for half in ("key", "value")], 1) for block in adapter.blocks()
    ]
    learned = torch.stack(pairs, 1)  # (P, blocks, 2, K)
    settings = {"peft_type": PREFIX_KIND, "num_virtual_tokens": len(learned), "num_layers": len(pairs)}
    settings |= {"token_dim": learned.shape[-1], "num_transformer_submodules": 1}
    heads = _key_heads(local)
    return settings | ({} if heads is None else {"num_attention_heads": heads}), {_LEARNED: learned.flatten(1)}


def _key_heads(local: Any) -> int | None:
    """How many heads the keys of a model have."""
    config = getattr(local, "config", None)
    return getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", None)


def _soft_from_peft(file: _File, learned: torch.Tensor) -> SoftPrompt:
    size, hidden = (
        file.settings.get("token_dim"),
        getattr(getattr(file.model.local, "config", None), "hidden_size", None),
    )
    if hidden is not None and size not in (None, hidden):
        raise file.settings.error("token_dim", f"expected {hidden}, the hidden size of the model, got {size}")
    _check_learned(file, learned, hidden if size is None else size, "hidden size")
    return SoftPrompt(learned.float())


def _soft_to_peft(adapter: SoftPrompt) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    length, size = adapter.embeddings.shape
    settings = {
        "peft_type": PROMPT_KIND,
        "num_virtual_tokens": length,
        "token_dim": size,
        "num_transformer_submodules": 1,
    }
    return settings, {_LEARNED: adapter.embeddings.detach()}
