"""DistributedModel: a pretrained model whose blocks are elsewhere. Owns: embeddings and head of a Hugging Face model in this
process, and how its blocks' inputs become a call of a RemoteSequential.

transformers' own model class does everything before the first block and after the last one: in the place of its list of blocks
there is a single one, which calls the swarm. So what comes in and what comes out is what that class takes and returns. Must not
know: which servers there are, what an adapter is made of.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import nn

from moe.architectures import Architecture, architecture_of, import_transformers, read_config
from moe.client.sequence_manager import SequenceManager
from moe.client.sequential import RemoteSequential
from moe.config import ClientConfig
from moe.errors import ConfigError, LifecycleError, SchemaError
from moe.schema import Nested

logger = logging.getLogger(__name__)

BlockKwargs = Sequence[Mapping[str, Nested]]  # one dict for each block
Adapter = Callable[[], BlockKwargs]  # such as LoraAdapter, DeepPrompts
NOT_KEPT = (
    "past_key_values",
    "use_cache",
    "output_hidden_states",
    "output_attentions",
)  # what servers would have to send


class _PerCall(NamedTuple):
    """What the blocks get of a call beside the hidden states."""

    kwargs: dict[str, torch.Tensor]
    block_kwargs: BlockKwargs | None


_call: ContextVar[_PerCall] = ContextVar("call")  # of the DistributedModel that this thread is in


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

    :param local: a transformers model with one block, which is replaced
    :param blocks: the blocks of the model, in order
    :param architecture: of the model
    :raises ConfigError: the model has not one list with one block where its architecture has them
    """

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
        setattr(local.get_submodule(parent), attribute, nn.ModuleList([_RemoteBlocks(blocks)]))
        self._signature = inspect.signature(local.forward)

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
        **settings: Any,
    ) -> DistributedModel:
        """Load what is not in blocks from a folder on this machine; nothing is fetched from anywhere.

        The folder needs the weights of embeddings and head only. Weights that it does not have, such as those of a new
        classifier, begin at random.

        :param folder: with config.json and weights, as ``save_pretrained`` writes them
        :param dht: a running DHT node of the swarm that hosts the blocks
        :param prefix: ``--block_prefix`` of the servers
        :param config: deadlines, retries and routing
        :param manager: see RemoteSequential
        :param model_class: such as ``transformers.AutoModelForSequenceClassification``; default: the one in config.json
        :param settings: of the model, instead of those in config.json: ``num_labels=3``
        :raises ConfigError: transformers is missing, or there is no such model
        """
        model_config = read_config(folder, **settings)
        architecture, num_blocks = architecture_of(model_config), model_config.num_hidden_layers
        blocks = RemoteSequential(dht, prefix=prefix, num_blocks=num_blocks, config=config, manager=manager)
        model_config.num_hidden_layers, model_config.use_cache = 0, False
        model_class = model_class or _class_of(model_config)
        with _quiet():
            try:
                local, report = model_class.from_pretrained(
                    os.fspath(folder), config=model_config, local_files_only=True, output_loading_info=True
                )
            except Exception as e:  # of whatever is wrong with the files
                raise ConfigError(f"cannot load {model_class.__name__} from {os.fspath(folder)}: {e}") from e
        if report["missing_keys"]:
            logger.info("begin at random, because %s has no such weights: %s", folder, sorted(report["missing_keys"]))
        local.config.num_hidden_layers = num_blocks
        return cls(local, blocks, architecture).eval()  # as transformers

    @property
    def config(self) -> Any:
        """Of the model: the transformers object."""
        return self.local.config

    @property
    def block_path(self) -> BlockPath:
        """What the blocks are called in files of other libraries: ``bert.encoder.layer``."""
        return BlockPath(self._block_path, self.local)

    def forward(self, *args: Any, adapters: Any = None, **kwargs: Any) -> Any:
        """What the model of transformers returns for these arguments.

        :param args: of the model's ``forward``: ``input_ids`` (rows, length), ...
        :param kwargs: ``attention_mask`` (rows, length), ``position_ids`` (rows, length), ``labels``, ...
        :param adapters: of this call: an adapter (LoraAdapter, DeepPrompts, ...), several of them in a list, a list with a dict
            of kwargs for each block, or a dict for all blocks
        :raises SchemaError: inputs that do not fit, or ask for what stays on the servers: caches, attentions, hidden states of
            each block
        :raises MoEError: no answer within the retries and the time budget
        """
        given = self._signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        unavailable = [name for name in NOT_KEPT if given.get(name) not in (None, False)]
        if unavailable:
            raise SchemaError(f"{', '.join(unavailable)}: not available, because the blocks are on other machines")
        names = ("attention_mask", "position_ids") if self.architecture.rotary else ("attention_mask",)
        shared = {name: _row_wise(name, given[name]) for name in names if given.get(name) is not None}
        token = _call.set(_PerCall(shared, block_kwargs_of(adapters, len(self.blocks))))
        try:
            return self.local(*args, **kwargs)
        finally:
            _call.reset(token)


class _RemoteBlocks(nn.Module):
    """In the place of all blocks: hidden states in, hidden states out. What transformers passes besides is for local blocks."""

    attention_type = "full_attention"  # some models ask each block for its kind

    def __init__(self, blocks: RemoteSequential):
        super().__init__()
        self.blocks = blocks

    def forward(self, hidden_states: torch.Tensor, *_: Any, **__: Any) -> Nested:
        call = _call.get(None)
        if call is None:
            raise LifecycleError("call the DistributedModel, not the local part of it")
        return self.blocks(hidden_states, block_kwargs=call.block_kwargs, **call.kwargs)


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


def _class_of(config: Any) -> Any:
    transformers = import_transformers()
    named = getattr(transformers, next(iter(config.architectures or ()), "AutoModel"), None)
    is_model = isinstance(named, type) and issubclass(named, transformers.PreTrainedModel)
    return named if is_model else transformers.AutoModel


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
