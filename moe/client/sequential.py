"""RemoteSequential: experts one after another as one differentiable module. Owns: which blocks, and which kwargs each gets.

Each block is a RemoteExpert with its own retries over the block's servers; autograd adds up what blocks share. Must not know:
how a call travels, or what a block computes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

from torch import nn

from moe.client.expert import SEARCH_TIMEOUT_S, RemoteExpert, create_remote_experts
from moe.config import ClientConfig
from moe.dht import DHT, find_experts
from moe.errors import ConfigError, MissingBlocks, SchemaError
from moe.expert_uid import UID_DELIMITER, is_valid_uid
from moe.schema import Nested
from moe.transport.base import Budget


class RemoteSequential(nn.Module):
    """Consecutive experts hosted by any peers: ``y = blocks[n-1](... blocks[0](h, **kwargs) ..., **kwargs)``.

    Blocks are looked up in the DHT on first use, and again after ``refresh``.

    :param dht: a running DHT node
    :param uids: the blocks in order; give either these, or ``prefix`` and ``num_blocks``
    :param prefix: such as ``block.``: the blocks are ``block.0``, ``block.1``, ...
    :param num_blocks: how many
    :param config: deadlines and retries; ``total_timeout_s`` is for a whole forward over all blocks
    :raises ConfigError: neither or both ways to say which blocks, or an invalid uid
    """

    def __init__(
        self,
        dht: DHT,
        uids: Sequence[str] | None = None,
        *,
        prefix: str | None = None,
        num_blocks: int | None = None,
        config: ClientConfig | None = None,
    ):
        super().__init__()
        by_prefix = prefix is not None and num_blocks is not None
        if (uids is None) != by_prefix or (uids is not None and (prefix is not None or num_blocks is not None)):
            raise ConfigError("RemoteSequential takes either uids=[...] or both prefix= and num_blocks=")
        if isinstance(uids, str):
            raise ConfigError(f"uids is a list of uids, got the string {uids!r}")
        if uids is None:
            assert prefix is not None
            assert num_blocks is not None
            stem = prefix if prefix.endswith(UID_DELIMITER) else prefix + UID_DELIMITER
            uids = [f"{stem}{i}" for i in range(num_blocks)]
        invalid = [uid for uid in uids if not is_valid_uid(uid)]
        if invalid or not uids:
            raise ConfigError(f"invalid uids of blocks: {invalid}" if invalid else "a sequence has at least one block")
        self.dht, self.uids, self.config = dht, tuple(uids), config or ClientConfig()
        self._experts: dict[str, RemoteExpert] = {}  # not submodules: they have no parameters here

    def extra_repr(self) -> str:
        """For repr."""
        return f"{len(self)} blocks: {self.uids[0]} ... {self.uids[-1]}"

    def __len__(self) -> int:
        return len(self.uids)

    @overload
    def __getitem__(self, index: int) -> RemoteExpert: ...

    @overload
    def __getitem__(self, index: slice) -> RemoteSequential: ...

    def __getitem__(self, index: int | slice) -> RemoteExpert | RemoteSequential:
        """One block, or a sequence of some of them, in any order; found blocks are shared."""
        if isinstance(index, int):
            return self._find([self.uids[index]], Budget(self.config.total_timeout_s))[0]
        part = RemoteSequential(self.dht, self.uids[index], config=self.config)
        part._experts = self._experts
        return part

    def __iter__(self) -> Iterator[RemoteExpert]:
        return iter(self._find(self.uids, Budget(self.config.total_timeout_s)))

    def refresh(self) -> None:
        """Look all blocks up again on next use."""
        self._experts.clear()

    def forward(
        self,
        *args: Nested,
        block_kwargs: Sequence[Mapping[str, Nested]] | None = None,
        batch_kwargs: Mapping[str, Nested] | None = None,
        global_kwargs: Mapping[str, Nested] | None = None,
        **kwargs: Nested,
    ) -> Nested:
        """Run all blocks.

        :param args: inputs of the first block; what a block returns is what the next one gets (a tuple: several inputs)
        :param kwargs: for every block; gradients are summed over the blocks
        :param block_kwargs: one dict per block, for that block only; gradients per block
        :param batch_kwargs: kwargs for every block that you hold to be batched; checked against the schemas
        :param global_kwargs: kwargs for every block that you hold to be global; checked against the schemas
        :returns: what the last block returns
        :raises SchemaError: another number of dicts than blocks, a kwarg given twice, or inputs that do not fit a block
        :raises MissingBlocks: blocks without a live server
        :raises MoEError: a block gave no answer within the time budget
        """
        own = [{} for _ in self.uids] if block_kwargs is None else list(block_kwargs)
        if len(own) != len(self):
            raise SchemaError(f"block_kwargs: expected {len(self)} dicts, one per block, got {len(own)}")
        for uid, extra in zip(self.uids, own):
            twice = kwargs.keys() & extra.keys()
            if twice:
                raise SchemaError(f"kwargs {sorted(twice)} are given for all blocks and for one", uid=uid)
        budget = Budget(self.config.total_timeout_s)
        values: tuple[Nested, ...] = args
        for expert, extra in zip(self._find(self.uids, budget), own):
            result = expert.call_within(
                budget, values, {**kwargs, **extra}, batch_kwargs=batch_kwargs, global_kwargs=global_kwargs
            )
            values = result if isinstance(result, tuple) else (result,)
        return values[0] if len(values) == 1 else values

    def _find(self, uids: Sequence[str], budget: Budget) -> list[RemoteExpert]:
        unknown = [uid for uid in dict.fromkeys(uids) if uid not in self._experts]
        if unknown:
            timeout_s = budget.left_s(SEARCH_TIMEOUT_S)
            found = find_experts(self.dht, unknown, timeout_s=timeout_s or SEARCH_TIMEOUT_S)
            missing = [uid for uid, expert in zip(unknown, found) if expert is None]
            if missing:
                raise MissingBlocks(f"no live server for {len(missing)} of {len(self)} blocks: {', '.join(missing)}")
            experts = create_remote_experts(found, self.dht, config=self.config)
            self._experts.update(zip(unknown, experts))
        return [self._experts[uid] for uid in uids]
