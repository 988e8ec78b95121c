"""Pretrained models over real servers, started by their command line: the real encoder, a decoder, and fine-tuning."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from moe import DHT, DistributedModel, LoraAdapter
from moe.server.expert_backend import ExpertBackend
from moe.server.pretrained import PretrainedModel
from moe.testing import LocalSwarm
from tests.docs.markdown import ROOT
from tests.pretrained import LAYERS, minilm_folder, padding_mask, save_model, token_ids
from tests.swarm.tools import serving

pytestmark = pytest.mark.timeout(240)  # the first test starts three servers, each of which imports transformers

BLOCKS = ("0:2", "2:4", "4:6")  # of each server
STEPS, BATCH_SIZE = 5, 8


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers save their blocks."""
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def swarm(checkpoints: Path) -> Iterator[LocalSwarm]:
    """all-MiniLM-L6-v2, two of its six blocks on each of three servers."""
    servers = [
        ["--model_path", str(minilm_folder()), "--block_indices", blocks, "--block_prefix", "minilm.",
         "--checkpoint_dir", str(checkpoints / str(index)), "--torch_threads", "1"]
        for index, blocks in enumerate(BLOCKS)
    ]  # fmt: skip
    with LocalSwarm(*servers, start_timeout_s=180) as swarm:
        yield swarm


@pytest.fixture(scope="module")
def model(swarm: LocalSwarm) -> DistributedModel:
    """Its embeddings here, with nothing to train."""
    model = DistributedModel.from_pretrained(minilm_folder(), swarm.dht(), prefix="minilm.").requires_grad_(False)
    model(torch.tensor([[101, 102]]))  # links to all servers, so that no test is said to have left those behind
    return model


@pytest.fixture(scope="module")
def example() -> Any:
    """examples/finetune_lora.py: sentences of a real documentation, and how they become vectors."""
    spec = importlib.util.spec_from_file_location("finetune_lora", ROOT / "examples" / "finetune_lora.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_embeddings_of_real_sentences(model: DistributedModel, example: Any) -> None:
    sentences = [sentence for sentence, _ in example.load_sentences()[1][::4]]
    tokens = example.SentenceEncoder(minilm_folder(), model).tokenizer(sentences, padding=True, return_tensors="pt")
    assert 0 < tokens["attention_mask"].float().mean() < 1  # some of them are padded
    whole = transformers.BertModel.from_pretrained(minilm_folder())
    with torch.no_grad():
        got, expected = model(**tokens), whole(**tokens)
        tokens_of_rows = tokens[
            "attention_mask"
        ].bool()  # what the model gives for padding differs by 2e-4 from float64
        hidden, own = got.last_hidden_state[tokens_of_rows], expected.last_hidden_state[tokens_of_rows]
        assert_close(hidden, own, rtol=1e-5, atol=1e-5)
        assert_close(got.pooler_output, expected.pooler_output, rtol=1e-5, atol=1e-5)
        vectors, own = (example.SentenceEncoder(minilm_folder(), m)(sentences) for m in (model, whole))
    assert_close(vectors, own, rtol=1e-5, atol=1e-5)


def test_a_decoder(dht: DHT, tmp_path: Path) -> None:
    """The same logits and gradients with a causal mask, padding and position ids; the servers are in this process."""
    local = save_model("llama", tmp_path)
    on_disk = PretrainedModel(tmp_path)
    blocks = [on_disk.load_block(index) for index in range(LAYERS)]
    backends = [ExpertBackend(f"decoder.{i}", block, **block.backend_options()) for i, block in enumerate(blocks)]
    ids, mask = token_ids(3, 10), padding_mask([10, 6, 8])
    positions = torch.arange(10) + torch.tensor([[0], [3], [7]])
    with serving(dht, *backends[:2]), serving(dht, *backends[2:]):
        model = DistributedModel.from_pretrained(tmp_path, dht, prefix="decoder.")
        for given in ({}, dict(attention_mask=mask), dict(attention_mask=mask, position_ids=positions)):
            labels = ids if not given else ids.masked_fill(mask == 0, -100)
            got, expected = (m(ids, labels=labels, **given) for m in (model, local))
            assert_close(got.logits, expected.logits, rtol=1e-5, atol=1e-5)
            got.loss.backward()
            expected.loss.backward()
            for mine, own in (
                (model.local.lm_head, local.lm_head),
                (model.local.model.embed_tokens, local.model.embed_tokens),
            ):
                assert_close(mine.weight.grad, own.weight.grad, rtol=1e-4, atol=1e-6)


class WholeModel:
    """The same model in this process, called in the same way: what a user gets alone."""

    def __init__(self) -> None:
        self.embeddings = transformers.BertModel.from_pretrained(minilm_folder()).embeddings.requires_grad_(False)
        on_disk = PretrainedModel(minilm_folder())
        self.blocks = [on_disk.load_block(index).requires_grad_(False) for index in range(6)]

    def __call__(self, ids: torch.Tensor, attention_mask: torch.Tensor, adapters: LoraAdapter) -> Any:
        hidden = self.embeddings(ids)
        for block, kwargs in zip(self.blocks, adapters()):
            hidden = block(hidden, attention_mask=attention_mask, **kwargs)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=hidden)


def fine_tune(model: Any, example: Any, topics: torch.Tensor, adapter: LoraAdapter, seed: int) -> list[float]:
    """Train an adapter on sentences of a user's own.

    :returns: the loss of each step
    """
    encode = example.SentenceEncoder(minilm_folder(), model)
    data, _ = example.load_sentences()
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))[:BATCH_SIZE].tolist()
    labels = torch.tensor([data[i][1] for i in chosen])
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.1)
    losses = []
    for _ in range(STEPS):
        loss = cross_entropy(5 * encode([data[i][0] for i in chosen], adapters=adapter) @ topics.T, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_two_users_fine_tune_at_once_and_the_servers_do_not_change(
    swarm: LocalSwarm, model: DistributedModel, example: Any, checkpoints: Path
) -> None:
    """Each gets what it would get alone; the weights that the servers save at their end are those on disk, bit by bit."""
    whole = WholeModel()
    with torch.no_grad():
        topics = example.SentenceEncoder(minilm_folder(), model)(list(example.TOPICS.values()))

    def adapter_of(user: int) -> LoraAdapter:
        with torch.random.fork_rng():
            torch.manual_seed(user)
            return LoraAdapter.for_blocks(model.blocks, rank=2 + user, alpha=8)

    users = range(2)
    alone = [adapter_of(user) for user in users]
    expected = [fine_tune(whole, example, topics, alone[user], seed=user) for user in users]
    together = [adapter_of(user) for user in users]
    with ThreadPoolExecutor(2) as threads:
        running = [threads.submit(fine_tune, model, example, topics, together[user], user) for user in users]
        losses = [future.result() for future in running]
    for user in users:
        assert losses[user][-1] < 0.95 * losses[user][0], losses[user]
        assert losses[user] == pytest.approx(expected[user], rel=1e-4)
        for got, own in zip(together[user].parameters(), alone[user].parameters(), strict=True):
            assert_close(got, own, rtol=1e-3, atol=1e-5)

    for index, blocks in enumerate(BLOCKS):  # the end of these servers: no test may follow
        assert swarm.terminate(index) == 0
        for number in range(*map(int, blocks.split(":"))):
            saved = torch.load(checkpoints / str(index) / f"minilm.{number}" / "checkpoint_last.pt", weights_only=True)[
                "module"
            ]
            on_disk = whole.blocks[number].state_dict()
            assert saved.keys() == on_disk.keys()
            assert all(torch.equal(saved[name], on_disk[name]) for name in saved)
