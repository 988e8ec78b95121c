"""Adapters that a client trains: LoRA, IA3, prefixes, soft prompts. Owns: their parameters, and the kwargs they become.

An adapter is called for its kwargs, one dict for each block: ``blocks(h, block_kwargs=adapter())``, or
``model(input_ids, adapters=adapter)``. The schemas of the blocks say what these kwargs are called and how large they are.
Must not know: servers, transformers, files.

Legend: R = rank, P = learned positions, K = size of keys, D = hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import nn

from moe.architectures import IA3, IA3_INPUT, LORA, linear_of
from moe.errors import ConfigError
from moe.schema import ExpertSchema, Nested, TensorProto

LORA_TARGETS = ("query", "value", "q_proj", "v_proj")  # what peft adapts by default in encoders and decoders
IA3_TARGETS = ("key", "value", "k_proj", "v_proj")
IA3_INPUT_TARGETS = ("output.dense", "down_proj")
MAX_FEATURES = 2**20  # of a layer, as a schema tells; ours
PREFIX_STD = 0.02  # as transformers begin their embeddings


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
        return [
            {name: self._kwarg(index, name, value) for name, value in kwargs.items()}
            for index, kwargs in enumerate(self.blocks())
        ]

    def blocks(self) -> list[nn.ParameterDict]:
        """The parameters of each block, by kwarg."""
        return cast("list[nn.ParameterDict]", list(self.per_block))

    def _kwarg(self, index: int, name: str, value: Any) -> Nested:
        return dict(value.items()) if isinstance(value, nn.ParameterDict) else value


class LoraAdapter(BlockAdapter):
    """Low-rank changes of linear layers: ``x @ a @ b * alpha / R`` is added to what they give (Hu et al. 2021).

    :param per_block: ``lora_*`` kwargs {"a": (in, R), "b": (R, out)} of each block; besides, ``dora_*`` (out), how long the
        rows of a weight become (DoRA, Liu et al. 2024), and ``bias_*`` (out), in place of a layer's own bias
    :param alpha: see above
    :param rank_stabilized: divide by the root of R instead (Kalajdzievski 2023)
    :param alphas: of single layers, instead of ``alpha``: for each block {kwarg: alpha}
    :param dropout: of what the layers take, in training. Blocks compute none, so an adapter with dropout is called in eval mode
    """

    def __init__(
        self,
        per_block: Iterable[Mapping[str, Any]],
        *,
        alpha: float,
        rank_stabilized: bool = False,
        alphas: Sequence[Mapping[str, float]] = (),
        dropout: float = 0.0,
    ):
        super().__init__(per_block)
        self.alpha, self.rank_stabilized, self.dropout = float(alpha), rank_stabilized, dropout
        self.alphas = [dict(own) for own in alphas] or [{} for _ in self.per_block]
        if len(self.alphas) != len(self.per_block):
            raise ConfigError(f"alphas: expected one dict for each of {len(self.per_block)} blocks, got {len(alphas)}")

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

    def forward(self) -> list[dict[str, Nested]]:
        """The kwargs of each block; gradients flow back to the parameters.

        :raises ConfigError: in training mode, with dropout
        """
        if self.training and self.dropout:
            raise ConfigError(
                f"lora_dropout: blocks compute no dropout, and this adapter has {self.dropout}: call eval() to go on without it"
            )
        return super().forward()

    def scale(self, rank: int, alpha: float | None = None) -> float:
        """What a change of this rank is multiplied with.

        :param alpha: of its layer, if not that of the adapter
        """
        alpha = self.alpha if alpha is None else alpha
        return alpha / (math.sqrt(max(rank, 1)) if self.rank_stabilized else max(rank, 1))

    def scale_of(self, index: int, name: str) -> float:
        """What the change of one layer is multiplied with.

        :param index: of its block
        :param name: of its kwarg
        """
        return self.scale(len(self.blocks()[index][name]["b"]), self.alphas[index].get(name))

    def _kwarg(self, index: int, name: str, value: Any) -> Nested:
        if not isinstance(value, nn.ParameterDict):
            return value
        scale = self.scale_of(index, name)
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


class SoftPrompt(nn.Module):
    """Learned positions before the words of a model (P-tuning, prompt tuning: Lester et al. 2021), for its input alone.

    :param embeddings: (P, D), as the model embeds words
    """

    def __init__(self, embeddings: torch.Tensor):
        super().__init__()
        if embeddings.ndim != 2:
            raise ConfigError(f"a soft prompt has embeddings (P, D), got {tuple(embeddings.shape)}")
        self.embeddings = nn.Parameter(embeddings.detach().clone())

    @classmethod
    def random(cls, length: int, hidden_size: int, *, std: float = PREFIX_STD) -> SoftPrompt:
        """A prompt that begins at random.

        :param length: P
        :param hidden_size: D
        :param std: of the normal distribution it begins with
        """
        return cls(torch.randn(length, hidden_size) * std)

    def extra_repr(self) -> str:
        """For repr."""
        return str(tuple(self.embeddings.shape))

    def forward(self) -> torch.Tensor:
        """The embeddings (P, D); gradients flow back to them."""
        return self.embeddings


def combine(adapters: Sequence[BlockAdapter], weights: Sequence[float], how: str = "cat") -> BlockAdapter:
    """A new adapter that does what several do, each as much as its weight says: as ``add_weighted_adapter`` of peft.

    Scales of IA3 are summed with their weights.

    :param adapters: of one kind, for the same blocks
    :param weights: one for each
    :param how: of LoRA: ``cat`` is the exact sum of changes, of the sum of ranks; ``linear`` sums the halves, with the root of
        a weight each, and keeps the rank, which has to be the same
    :raises ConfigError: what has no such sum: prefixes, DoRA, biases, rank-stabilized adapters, which peft scales otherwise
    """
    counts = {len(adapter.per_block) for adapter in adapters}
    if len(counts) != 1 or len(weights) != len(adapters):
        raise ConfigError(f"combine: {len(adapters)} adapters for {sorted(counts)} blocks, {len(weights)} weights")
    if not all(math.isfinite(weight) for weight in weights):
        raise ConfigError(f"combine: expected finite weights, got {list(weights)}")
    if all(isinstance(adapter, Ia3Adapter) for adapter in adapters):
        return Ia3Adapter(_summed([a.blocks()[i] for a in adapters], weights) for i in range(counts.pop()))
    loras = [adapter for adapter in adapters if isinstance(adapter, LoraAdapter) and not adapter.rank_stabilized]
    others = {name for adapter in loras for own in adapter.blocks() for name in own if not name.startswith(LORA)}
    if len(loras) != len(adapters) or others or how not in ("cat", "linear"):
        kinds = [type(adapter).__name__ for adapter in adapters]
        raise ConfigError(
            f"combine: expected LoRA adapters, none of them rank-stabilized, or IA3 adapters, and cat or linear; "
            f"got {kinds}, {how}" + (f", with {sorted(others)}" if others else "")
        )
    merge = _concatenated if how == "cat" and len(loras) > 1 else _added
    per_block = [_merged(loras, weights, index, merge) for index in range(counts.pop())]
    ranks = [{name: float(len(pair["b"])) for name, pair in pairs.items()} for pairs in per_block]
    largest = max((rank for own in ranks for rank in own.values()), default=1.0)
    # scales are in the halves already, so alpha is the rank
    alphas = [{name: rank for name, rank in own.items() if rank != largest} for own in ranks]
    return LoraAdapter(per_block, alpha=largest, alphas=alphas)


def _summed(parts: Sequence[nn.ParameterDict], weights: Sequence[float]) -> dict[str, torch.Tensor]:
    names = dict.fromkeys(name for part in parts for name in part)
    return {name: sum(p[name].detach() * w for p, w in zip(parts, weights) if name in p) for name in names}


def _merged(loras: Sequence[LoraAdapter], weights: Sequence[float], index: int, merge: Any) -> dict[str, Any]:
    """The layers of one block.

    :param merge: of [(a, b, weight times scale)]
    """
    own = [lora.blocks()[index] for lora in loras]
    found: dict[str, Any] = {}
    for name in dict.fromkeys(name for part in own for name in part):
        terms = [
            (part[name]["a"].detach(), part[name]["b"].detach(), weight * lora.scale_of(index, name))
            for lora, part, weight in zip(loras, own, weights)
            if name in part
        ]
        a, b = merge(name, terms)
        found[name] = {"a": a, "b": b}
    return found


_Terms = Sequence[tuple[torch.Tensor, torch.Tensor, float]]


def _concatenated(name: str, terms: _Terms) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([a * scale for a, _, scale in terms], dim=1), torch.cat([b for _, b, _ in terms])


def _added(name: str, terms: _Terms) -> tuple[torch.Tensor, torch.Tensor]:
    ranks = {len(b) for _, b, _ in terms}
    if len(ranks) > 1:
        raise ConfigError(f"combine: {name} has ranks {sorted(ranks)}, and linear needs the same: use cat")
    roots = [math.sqrt(abs(scale)) for _, _, scale in terms]  # peft: the sign goes to one half
    a = sum(term[0] * math.copysign(root, term[2]) for term, root in zip(terms, roots))
    b = sum(term[1] * root for term, root in zip(terms, roots))
    return cast("torch.Tensor", a), cast("torch.Tensor", b)


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
