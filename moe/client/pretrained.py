"""DistributedModel: a pretrained model whose blocks are elsewhere. Owns: embeddings and head of a Hugging Face model in this
process, and how its blocks' inputs become a call of a RemoteSequential.

transformers' own model class does everything before the first block and after the last one: in the place of its list of blocks
there is a single one, which calls the swarm. So what comes in and what comes out is what that class takes and returns. Must not
know: which servers there are, what an adapter of blocks is made of.

Legend: B = rows, S = positions of a row, P = positions of a learned prefix.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moe.architectures import Architecture, import_transformers
from moe.client.adapters import SoftPrompt
from moe.client.sequence_manager import SequenceManager
from moe.client.sequential import RemoteSequential
from moe.config import ClientConfig
from moe.errors import ConfigError, SchemaError
from moe.model_config import architecture_of, attention_of, kind_of, read_config
from moe.schema import Nested
from moe.weight_files import dtype_of, first_not_finite, read_tensors

logger = logging.getLogger(__name__)

BlockKwargs = Sequence[Mapping[str, Nested]]  # one dict for each block
Adapter = Callable[[], BlockKwargs]  # such as LoraAdapter, DeepPrompts
NOT_KEPT = (
    "past_key_values",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
)  # what servers would have to send
# Inputs of transformers' models whose effect is before the first block or after the last one, or known here
TAKEN = frozenset(
    (
        "attention_mask",
        "cls_index",
        "end_positions",
        "input_ids",
        "inputs_embeds",
        "is_impossible",
        "labels",
        "logits_to_keep",
        "mc_labels",
        "mc_token_ids",
        "next_sentence_label",
        "num_items_in_batch",
        "p_mask",
        "position_ids",
        "return_dict",
        "return_loss",
        "start_positions",
        "token_type_ids",
    )
)

# Settings whose effect is all here: before the first block, after the last one, or in how many blocks there are
LOCAL_SETTINGS = frozenset(
    (
        "architectures", "classifier_activation", "classifier_bias", "classifier_dropout", "classifier_pooling",
        "embedding_multiplier", "final_logit_softcapping", "finetuning_task", "id2label", "initializer_range", "label2id",
        "logits_scaling", "num_hidden_layers", "num_labels", "output_attentions", "output_hidden_states", "pad_token_id",
        "problem_type", "qa_dropout", "return_dict", "seq_classif_dropout", "summary_activation", "summary_first_dropout",
        "summary_last_dropout", "summary_proj_to_labels", "summary_type", "summary_use_proj", "tie_word_embeddings",
        "use_cache",
    )
)  # fmt: skip


@dataclass
class _Call:
    """What the blocks get of a call beside the hidden states.

    :ivar prefix: P
    :ivar given: what the model around the blocks was given: ``attention_mask``, ``position_ids``
    :ivar cached: whether transformers would keep a cache, with which it does not tell sequences in one row apart
    """

    block_kwargs: BlockKwargs | None = None
    prefix: int = 0
    given: dict[str, Any] = field(default_factory=dict)
    cached: bool = False


_call: ContextVar[_Call | None] = ContextVar("call", default=None)  # of the DistributedModel that this thread is in


class BlockPath(str):
    """Where a model has its blocks, and the local part of that model, for files that have something of both.

    :ivar local: the transformers model
    """

    local: Any

    def __new__(cls, path: str, local: Any = None) -> BlockPath:
        """
        :param path: such as ``bert.encoder.layer``
        :param local: see above
        """
        made = super().__new__(cls, path)
        made.local = local
        return made


class DistributedModel(nn.Module):
    """A pretrained model with local embeddings and head, and blocks in a swarm.

    Called as transformers' model of the same folder, and returns the same: ``model(input_ids, attention_mask=mask).logits``.
    What it does not have itself, such as ``get_input_embeddings``, is that of the local model. Its class is made for the class
    of the local model: ``forward`` has the signature of that one's, which is what trainers look at.

    :param local: a transformers model with one block, which is replaced, or none
    :param blocks: the blocks of the model, in order
    :param architecture: of the model
    :raises ConfigError: the model has not one list with its blocks where its architecture has them
    """

    def __new__(cls, local: Any = None, *_: Any, **__: Any) -> DistributedModel:
        """An instance of the class for this kind of model."""
        return super().__new__(cls if local is None else _class_for(cls, type(local)))

    def __init__(self, local: Any, blocks: RemoteSequential, architecture: Architecture):
        super().__init__()
        names = [name for name, _ in local.named_modules() if f".{name}".endswith(f".{architecture.blocks}")]
        if len(names) != 1:
            raise ConfigError(
                f"{type(local).__name__} has {len(names)} lists of blocks called {architecture.blocks}, not one"
            )
        self.local, self.blocks, self.architecture = local, blocks, architecture
        self._block_path = names[0]
        parent, _, attribute = names[0].rpartition(".")
        kind = kind_of(local.config, 0)
        setattr(local.get_submodule(parent), attribute, nn.ModuleList([_RemoteBlocks(blocks, architecture, kind)]))
        owner = _owner_of(local, names[0])
        owner.register_forward_pre_hook(_note_inputs, with_kwargs=True)
        owner.register_forward_hook(_forget_prefix)
        # torch has public names for these since 2.5
        self._register_state_dict_hook(_drop_tied)  # type: ignore[no-untyped-call]
        self._register_load_state_dict_pre_hook(_add_tied, with_module=True)  # type: ignore[no-untyped-call]

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        dht: Any,
        *,
        prefix: str = "block.",
        config: ClientConfig | None = None,
        manager: SequenceManager | None = None,
        model_class: Any = None,
        dtype: torch.dtype | str | None = None,
        **settings: Any,
    ) -> DistributedModel:
        """Load what is not in blocks from a folder on this machine; nothing is fetched from anywhere.

        The folder needs the weights of embeddings and head only; files of its index that are not there are passed over.
        Weights that it does not have, such as those of a new classifier, begin at random, which is logged as a warning.

        :param folder: with config.json and weights, as ``save_pretrained`` writes them
        :param dht: a running DHT node of the swarm that hosts the blocks
        :param prefix: ``--block_prefix`` of the servers
        :param config: deadlines, retries and routing
        :param manager: see RemoteSequential
        :param model_class: such as ``transformers.AutoModelForSequenceClassification``, or its name; default: the one in
            config.json
        :param dtype: of embeddings and head, whatever the blocks have; default: that of the file (``torch_dtype`` is the same)
        :param settings: of the model, instead of those in config.json: ``num_labels=3``
        :raises ConfigError: transformers is missing, there is no such model, or a setting is not known or would need what stays
            on the servers
        """
        dtype = settings.pop("torch_dtype", None) if dtype is None else dtype
        model_config = read_config(folder, **settings)
        if settings.keys() - LOCAL_SETTINGS:
            _check_settings(settings, read_config(folder))
        architecture, num_blocks = architecture_of(model_config), model_config.num_hidden_layers
        for name in ("output_hidden_states", "output_attentions"):
            if getattr(model_config, name, False):
                raise ConfigError(f"{name}: not available, because the blocks are on other machines; set it to false")
        blocks = RemoteSequential(dht, prefix=prefix, num_blocks=num_blocks, config=config, manager=manager)
        local = _load_local(Path(folder), model_config, architecture, _model_class(model_class, model_config), dtype)
        local.config.num_hidden_layers = num_blocks
        return cls(local, blocks, architecture).eval()  # as transformers

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Refused: a model is saved by its state_dict, and made again by from_pretrained.

        :raises Unsupported: always
        """
        return self.blocks.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> DistributedModel:
        """A copy with a local model of its own, over the same servers."""
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__ = copy.deepcopy(self.__dict__, memo)
        return copied

    @property
    def config(self) -> Any:
        """Of the model: the transformers object."""
        return self.local.config

    @property
    def block_path(self) -> BlockPath:
        """What the blocks are called in files of other libraries: ``bert.encoder.layer``."""
        return BlockPath(self._block_path, self.local)

    def __getattr__(self, name: str) -> Any:
        """What the local model has."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("local", "blocks"):  # there is none yet
                raise
            return getattr(self.local, name)

    def forward(self, *args: Any, adapters: Any = None, **kwargs: Any) -> Any:
        """What the model of transformers returns for these arguments.

        :param args: of the model's ``forward``: ``input_ids`` (rows, length), ...
        :param kwargs: ``attention_mask`` (rows, length) or (rows, 1 or heads, length, length), ``position_ids`` (rows,
            length), ``labels``, ...
        :param adapters: of this call: an adapter (LoraAdapter, DeepPrompts, SoftPrompt, ...), several of them in a list, a list
            with a dict of kwargs for each block, or a dict for all blocks
        :raises SchemaError: inputs that do not fit, are not known, or ask for what stays on the servers: caches, attentions,
            hidden states of each block
        :raises MoEError: no answer within the retries and the time budget
        """
        given = _by_name(self.local, args, kwargs)
        check_inputs(given)
        parts = list(adapters) if isinstance(adapters, (list, tuple)) else [adapters]
        soft = [part for part in parts if isinstance(part, SoftPrompt)]
        if soft:
            adapters = [part for part in parts if not isinstance(part, SoftPrompt)] or None
            args, kwargs = (), _behind_prompts(given, soft, self.local)
        block_kwargs = block_kwargs_of(adapters, len(self.blocks))
        token = _call.set(_Call(block_kwargs, _prefix_length(block_kwargs)))
        try:
            return self.local(*args, **kwargs)
        finally:
            _call.reset(token)


_classes: dict[tuple[type, type], type[DistributedModel]] = {}


def _class_for(cls: type[DistributedModel], local_class: type) -> type[DistributedModel]:
    """A class whose ``forward`` has the signature of the local model's, and ``adapters``."""
    if cls in _classes.values():
        return cls
    if (cls, local_class) not in _classes:
        inner: Any = cls.forward

        @functools.wraps(inner)
        def forward(self: DistributedModel, *args: Any, **kwargs: Any) -> Any:
            return inner(self, *args, **kwargs)

        signature = inspect.signature(local_class.forward)  # type: ignore[attr-defined]
        adapters = inspect.Parameter("adapters", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Any)
        parameters = [*signature.parameters.values()]
        rest = [parameter for parameter in parameters if parameter.kind is inspect.Parameter.VAR_KEYWORD]
        parameters = [parameter for parameter in parameters if parameter not in rest]
        forward.__signature__ = signature.replace(parameters=[*parameters, adapters, *rest])  # type: ignore[attr-defined]
        members = {"forward": forward, "__doc__": cls.__doc__, "__module__": cls.__module__}
        _classes[cls, local_class] = type(f"Distributed{local_class.__name__}", (cls,), members)
    return _classes[cls, local_class]


def check_inputs(given: Mapping[str, Any]) -> None:
    """Raise SchemaError for an input of a model whose effect on blocks is not known.

    :param given: arguments by name
    """
    _check_available(given)
    unknown = [name for name, value in given.items() if name not in (*TAKEN, *NOT_KEPT) and value is not None]
    if unknown:
        raise SchemaError(f"{', '.join(unknown)}: expected one of {', '.join(sorted(TAKEN))}, or None")


def _check_available(given: Mapping[str, Any]) -> None:
    unavailable = [name for name in NOT_KEPT if given.get(name) not in (None, False)]
    if unavailable:
        raise SchemaError(f"{', '.join(unavailable)}: not available, because the blocks are on other machines")


# --- before and in the blocks -----------------------------------------------------------------------------------------


def _owner_of(local: Any, block_path: str) -> Any:
    """The innermost model of transformers around the blocks: it makes their masks, whatever heads do before."""
    path = block_path.split(".")
    around = (local.get_submodule(".".join(path[:depth])) for depth in range(len(path) - 1, -1, -1))
    return next(module for module in around if isinstance(module, import_transformers().PreTrainedModel))


def _note_inputs(owner: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Note which mask and positions the model around the blocks is given: a head may have changed them.

    A learned prefix is in front of its positions, as if it were in a cache; else there is none.
    """
    call = _call.get()
    if call is None:  # the local model was called by itself: without adapters
        call = _Call()
        _call.set(call)
    given = _by_name(owner, args, kwargs)
    _check_available(given)
    call.given = {name: given.get(name) for name in ("attention_mask", "position_ids")}
    takes = _signature_of(type(owner).forward).parameters
    cached = given.get("use_cache")  # None: as the configuration says
    cached = bool(getattr(owner.config, "use_cache", False) if cached is None else cached)
    call.cached = cached and not (owner.training and getattr(owner, "gradient_checkpointing", False))
    if "use_cache" in takes:
        given["use_cache"] = False
    if call.prefix and "past_key_values" in takes:
        given["past_key_values"] = _LearnedPrefix(call.prefix)
        mask = given.get("attention_mask")
        if mask is not None and mask.ndim == 2:
            given["attention_mask"] = nn.functional.pad(mask, (call.prefix, 0), value=1)
    return (), given


def _forget_prefix(owner: Any, args: Any, output: Any) -> Any:
    if isinstance(output, tuple):
        return tuple(part for part in output if not isinstance(part, _LearnedPrefix))
    if isinstance(getattr(output, "past_key_values", None), _LearnedPrefix):
        output.past_key_values = None
    return output


def _behind_prompts(given: Mapping[str, Any], prompts: Sequence[SoftPrompt], local: Any) -> dict[str, Any]:
    """Inputs of a model with learned positions before the words, as peft makes them.

    :raises SchemaError: inputs that cannot be moved
    """
    if given.get("position_ids") is not None:
        raise SchemaError("position_ids: expected none with a soft prompt, whose positions come first")
    words = given.get("inputs_embeds")
    if words is None:
        words = local.get_input_embeddings()(given["input_ids"])
    if words.ndim != 3:
        raise SchemaError(f"inputs: expected (rows, length) with a soft prompt, got {tuple(words.shape[:-1])}")
    rows = len(words)
    learned = torch.cat([prompt().to(words) for prompt in prompts])
    if learned.shape[1] != words.shape[2]:
        raise SchemaError(
            f"soft prompt: expected embeddings of size {words.shape[2]}, as words, got {learned.shape[1]}"
        )
    made = {**given, "inputs_embeds": torch.cat([learned.expand(rows, -1, -1), words], dim=1)}
    made.pop("input_ids", None)
    before = (len(learned), 0)
    for name, value in (("attention_mask", 1), ("token_type_ids", 0)):
        if made.get(name) is not None:
            if made[name].ndim != 2:
                raise SchemaError(f"{name}: expected (rows, length) with a soft prompt, got {tuple(made[name].shape)}")
            made[name] = nn.functional.pad(made[name], before, value=value)
    labels = made.get("labels")
    if (
        labels is not None
        and labels.shape == words.shape[:2]
        and type(local).__name__.endswith(("CausalLM", "LMHeadModel"))
    ):
        made["labels"] = nn.functional.pad(labels, before, value=-100)  # nothing to predict there
    return made


def _tied(model: nn.Module) -> dict[str, str]:
    """Names of parameters that have another name, too: name -> first name."""
    first: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    return {name: of for name, parameter in named if (of := first.setdefault(id(parameter), name)) != name}


def _drop_tied(model: Any, state: dict[str, Any], prefix: str, _: Any) -> None:
    """A state dict has each tensor once, as formats want it that do not know of shared memory."""
    for name in _tied(model):
        state.pop(prefix + name, None)


def _add_tied(model: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, first in _tied(model).items():
        if prefix + name not in state and prefix + first in state:
            state[prefix + name] = state[prefix + first]


@functools.cache
def _signature_of(forward: Callable[..., Any]) -> inspect.Signature:
    """What a method of a class is called with, after the object itself."""
    signature = inspect.signature(forward)
    return signature.replace(parameters=list(signature.parameters.values())[1:])


def _by_name(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model by name."""
    signature = _signature_of(type(model).forward)
    rest = [name for name, parameter in signature.parameters.items() if parameter.kind is inspect.Parameter.VAR_KEYWORD]
    given = signature.bind_partial(*args, **kwargs).arguments
    return {**{name: value for of in rest for name, value in given.pop(of, {}).items()}, **given}


class _LearnedPrefix:
    """In the place of a cache: its positions are counted; their keys and values are in the blocks."""

    is_compileable = False

    def __init__(self, length: int):
        self.length = length

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """P"""
        return self.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        """P"""
        return self.length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """How many keys there are, and where they begin."""
        return self.length + query_length, 0


class _RemoteBlocks(nn.Module):
    """In the place of all blocks: hidden states in, hidden states out. What transformers passes besides is for local blocks."""

    def __init__(self, blocks: RemoteSequential, architecture: Architecture, kind: str):
        super().__init__()
        self.blocks, self.architecture = blocks, architecture
        self.attention_type = kind  # of the first block: some models ask each for its own

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        call = _call.get() or _Call()
        made = kwargs.get("attention_mask", next((arg for arg in args if isinstance(arg, torch.Tensor)), None))
        shared = self._masks(hidden_states, call, made)
        output = self.blocks(hidden_states, block_kwargs=call.block_kwargs, **shared)
        assert isinstance(output, torch.Tensor)
        output = output.to(hidden_states.dtype)  # whatever the blocks compute in
        return (output, None) if self.architecture.alibi else output

    def _masks(self, hidden_states: torch.Tensor, call: _Call, made: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The kwargs of blocks that say what sees what.

        :param made: the mask that transformers made for the first block
        """
        rows, length = hidden_states.shape[:2]
        mask, positions = call.given.get("attention_mask"), call.given.get("position_ids")
        shared: dict[str, torch.Tensor] = {}
        if isinstance(mask, Mapping):
            raise SchemaError("attention_mask: expected one tensor for all blocks, got a dict")
        if mask is not None and mask.ndim == 2:
            if mask.shape[1] not in (length, call.prefix + length):
                raise SchemaError(f"attention_mask: expected (rows, {length}), as the inputs, got {tuple(mask.shape)}")
            shared["attention_mask"] = (mask[:, -length:] != 0).long()
        elif mask is not None and made is not None:
            if made.ndim != 4 or not (made.dtype == torch.bool or made.is_floating_point()):
                raise SchemaError(
                    f"attention_mask: expected (rows, {length}), or booleans or floats (rows, 1 or heads, {length}, {length}), "
                    f"got {made.dtype} {tuple(made.shape)}"
                )
            made = made.expand(rows, -1, length if made.shape[2] == 1 else -1, -1)
            if call.prefix and made.shape[-1] == length:
                made = nn.functional.pad(made, (call.prefix, 0), value=made.dtype == torch.bool)
            shared["attention_mask_4d" if made.dtype == torch.bool else "attention_bias"] = made
        reshapes = self.architecture.causal and self.architecture.rotary is None
        if reshapes and mask is not None and mask.ndim < 4 and mask.shape != (rows, mask.shape[-1]):
            raise SchemaError(  # GPT-2 would take its numbers for others'
                f"attention_mask: expected ({rows}, {length}), as the inputs, got {tuple(mask.shape)}"
            )
        if positions is not None and (self.architecture.rotary or (self.architecture.packed and mask is None)):
            shared["position_ids"] = _row_wise("position_ids", positions)
            several = self.architecture.packed and mask is None and bool((shared["position_ids"].diff() != 1).any())
            if several and call.cached and not call.prefix:
                raise SchemaError(
                    "position_ids: expected steps of one, got others. Without an attention_mask, transformers takes them for "
                    "several sequences in one row if there is no cache, else not: pass use_cache=False if they are, or an "
                    "attention_mask of ones if they are not"
                )
        return shared


def _prefix_length(block_kwargs: BlockKwargs | None) -> int:
    prefix = block_kwargs[0].get("prefix") if block_kwargs else None
    key = prefix.get("key") if isinstance(prefix, Mapping) else None
    return len(key) if isinstance(key, torch.Tensor) else 0


def block_kwargs_of(adapters: Any, num_blocks: int) -> BlockKwargs | None:
    """One dict of kwargs for each block.

    :param adapters: see DistributedModel.forward
    :raises SchemaError: an adapter for another number of blocks, or two for the same kwarg
    """
    if adapters is None:
        return None
    if isinstance(adapters, Mapping):
        return [adapters] * num_blocks
    parts = [adapters] if callable(adapters) else list(adapters)
    if not any(map(callable, parts)):
        parts = [lambda whole=parts: whole]
    merged: list[dict[str, Nested]] = [{} for _ in range(num_blocks)]
    for part in parts:
        per_block = part()
        if len(per_block) != num_blocks:
            raise SchemaError(f"adapters: expected kwargs for {num_blocks} blocks, got {len(per_block)}")
        for kwargs, more in zip(merged, per_block):
            twice = kwargs.keys() & more.keys()
            if twice:
                raise SchemaError(f"adapters: kwargs {sorted(twice)} are given by two of them")
            kwargs.update(more)
    return merged


def _row_wise(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """As blocks take it: integers (rows, length)."""
    if tensor.ndim == 1:
        tensor = tensor[None]
    if tensor.ndim != 2:
        raise SchemaError(f"{name}: expected (rows, length), got {tuple(tensor.shape)}")
    return tensor.long()


# --- loading ----------------------------------------------------------------------------------------------------------


def _check_settings(settings: Mapping[str, Any], of_file: Any) -> None:
    """Raise ConfigError for a setting that blocks would have to know."""
    for name, value in settings.items():
        told = attention_of(of_file) if name == "attn_implementation" else getattr(of_file, name, None)
        if name not in LOCAL_SETTINGS and value != told:
            raise ConfigError(
                f"{name}: the blocks are computed as config.json of the servers says, which should be {told!r} as here, "
                f"not {value!r}; change it in the files of both"
            )


def _model_class(wanted: Any, config: Any) -> Any:
    """The class of transformers to load: a concrete one for this configuration.

    :raises ConfigError: there is no such class, or none for this model
    """
    transformers = import_transformers()
    if wanted is None:
        named = config.architectures if isinstance(config.architectures, list) else []
        wanted = getattr(transformers, str(next(iter(named), "AutoModel")), None)
        if not (isinstance(wanted, type) and issubclass(wanted, transformers.PreTrainedModel)):
            wanted = transformers.AutoModel
    elif isinstance(wanted, str):
        found = getattr(transformers, wanted, None)
        if found is None:
            raise ConfigError(f"model_class: transformers has no class {wanted!r}")
        wanted = found
    mapping = getattr(wanted, "_model_mapping", None)
    if mapping is not None:
        if type(config) not in mapping:
            raise ConfigError(f"model_class: there is no {wanted.__name__} for a model of type {config.model_type!r}")
        wanted = mapping[type(config)]
        wanted = wanted[0] if isinstance(wanted, tuple) else wanted
    if not (isinstance(wanted, type) and issubclass(wanted, transformers.PreTrainedModel)):
        raise ConfigError(f"model_class: expected a model class of transformers or its name, got {wanted!r}")
    return wanted


def _load_local(folder: Path, config: Any, architecture: Architecture, model_class: Any, dtype: Any) -> Any:
    """A model of transformers without its blocks.

    :raises ConfigError: whatever is wrong with the files
    """
    in_blocks = re.compile(rf"(?:.*\.)?{re.escape(architecture.blocks)}\.\d+\..*")
    state = read_tensors(folder, lambda name: in_blocks.fullmatch(name) is None, partial=True)
    bad = first_not_finite(state)
    if bad is not None:
        raise ConfigError(f"model_path: {bad} of {folder} has values that are not finite")
    config.num_hidden_layers = architecture.fewest_blocks
    if dtype is None:
        dtype = config.dtype or dtype_of(folder) or "auto"
    transformers = import_transformers()
    with _quiet():
        try:
            local, report = model_class.from_pretrained(
                None, config=config, state_dict=state, dtype=dtype, local_files_only=True, output_loading_info=True
            )
        except Exception as e:  # of whatever is wrong with the files
            raise ConfigError(f"cannot load {model_class.__name__} from {folder}: {e}") from e
        if local.can_generate() and (folder / "generation_config.json").is_file():
            try:
                local.generation_config = transformers.GenerationConfig.from_pretrained(folder, local_files_only=True)
            except Exception as e:  # of whatever is wrong with it; transformers goes on without, too
                logger.warning("%s/generation_config.json cannot be read: %s", folder, e)
    local.config.name_or_path = os.fspath(folder)
    missing = sorted(name for name in report["missing_keys"] if in_blocks.fullmatch(name) is None)
    if missing:
        logger.warning("%s has no such weights, they begin at random: %s", folder, ", ".join(missing))
    unexpected = sorted(report["unexpected_keys"])
    if unexpected:
        logger.warning("%s has weights that %s does not: %s", folder, model_class.__name__, ", ".join(unexpected))
    return local


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report that the weights of all blocks are left over, and its progress bar."""
    settings = import_transformers().utils.logging
    level, bar = settings.get_verbosity(), settings.is_progress_bar_enabled()
    settings.set_verbosity_error()
    settings.disable_progress_bar()
    try:
        yield
    finally:
        settings.set_verbosity(level)
        if bar:
            settings.enable_progress_bar()
