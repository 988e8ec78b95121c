"""Pretrained models whose blocks are hosted in this process. Owns: the model, its servers, what to compare with."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch.testing import assert_close

from moe import DistributedModel
from moe.server.expert_backend import ExpertBackend
from moe.server.pretrained import PretrainedModel
from moe.testing import MemorySwarm, memory_swarm
from tests.client.sequence_swarm import QUICK, FixedRouter
from tests.pretrained import ALL_MODELS, LAYERS, save_model

TOLERANCE = dict(rtol=1e-5, atol=1e-5)


class Hosted(NamedTuple):
    """A model on disk, its blocks on two servers, and the whole model here."""

    folder: Path
    backends: list[ExpertBackend]
    swarm: MemorySwarm
    router: FixedRouter
    local: Any

    def distributed(self, **options: Any) -> DistributedModel:
        return DistributedModel.from_pretrained(
            self.folder, self.swarm.transport, config=QUICK, manager=self.router, **options
        )


@contextlib.contextmanager
def hosted(kind: str, folder: Path, **options: Any) -> Iterator[Hosted]:
    save_model(kind, folder, **options)
    model = PretrainedModel(folder)
    blocks = [model.load_block(index) for index in range(LAYERS)]
    backends = [ExpertBackend(f"block.{i}", block, **block.backend_options()) for i, block in enumerate(blocks)]
    servers = [{b.name: b for b in backends[:2]}, {b.name: b for b in backends[2:]}]
    router = FixedRouter([b.name for b in backends], {f"server{i}": set(own) for i, own in enumerate(servers)})
    model_class: Any = ALL_MODELS[kind][1]
    with memory_swarm(*servers) as swarm:
        yield Hosted(folder, backends, swarm, router, model_class.from_pretrained(folder))


def assert_same_outputs(got: Any, expected: Any) -> None:
    assert type(got) is type(expected)
    assert set(got) == set(expected) - {"past_key_values"}
    for name in got:
        assert_close(got[name], expected[name], **TOLERANCE)
