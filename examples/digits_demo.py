"""Train a Mixture of Experts on handwritten digits, through experts that live in other processes. ``make demo`` runs this.

Two servers are started on this machine, each with four feed-forward experts, connected to each other and to this process by
nothing but the network. The model trained here is a linear stem, a gate that picks two of the eight experts for every
image, and a linear head. Gradients flow through the network: stem, gate and head are trained here, each expert by the server
that hosts it.

Exit code: 0 if the test accuracy is at least 90 %, 1 if not, 130 after Ctrl+C.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn.functional import cross_entropy

from moe import DHT, MoEError, RemoteMixtureOfExperts
from moe.dht import list_servers
from moe.testing import LocalSwarm

GOOD_ENOUGH = 0.9
GRID = (2, 4)  # experts are called digits.0.0 ... digits.1.3; the first coordinate is the server
HIDDEN_DIM = 64
BATCH_SIZE = 64

console = Console(highlight=False)
say = functools.partial(console.print, soft_wrap=True)  # addresses stay in one piece


def server_arguments(number: int) -> list[str]:
    """The command line of one server, behind ``hivemind-server``."""
    uids = [f"digits.{number}.{i}" for i in range(GRID[1])]
    return [
        "--expert_uids", *uids, "--expert_cls", "ffn", "--hidden_dim", str(HIDDEN_DIM),
        "--optimizer", "adam", "--lr", "0.003", "--torch_threads", "1",
    ]  # fmt: skip


class Classifier(nn.Module):
    """Stem and head are here; ``experts`` holds the gate, and calls what the gate picks over the network."""

    def __init__(self, experts: RemoteMixtureOfExperts):
        super().__init__()
        self.stem, self.experts, self.head = nn.Linear(64, HIDDEN_DIM), experts, nn.Linear(HIDDEN_DIM, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(batch, 64 pixels) -> (batch, 10 digits)"""
        logits: torch.Tensor = self.head(self.experts(self.stem(images)))
        return logits


def load_data() -> tuple[torch.Tensor, ...]:
    """Images to train with, images to test with, their labels."""
    digits = load_digits()
    images = torch.from_numpy(digits.data).float() / 8 - 1
    labels = torch.from_numpy(digits.target)
    return tuple(train_test_split(images, labels, test_size=360, random_state=0, stratify=labels))


def batches(images: torch.Tensor, labels: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """One epoch in random order."""
    for rows in torch.randperm(len(images)).split(BATCH_SIZE):
        yield images[rows], labels[rows]


@torch.no_grad()
def accuracy(model: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Part of the images that are recognized."""
    return float((model(images).argmax(1) == labels).float().mean())


def show_swarm(swarm: LocalSwarm, dht: DHT) -> None:
    """What this process has learned from the DHT about the servers, and where they listen."""
    maddrs = {maddr.rpartition("/p2p/")[2]: maddr.rpartition("/p2p/")[0] for maddr in swarm.initial_peers}
    for number, server in enumerate(sorted(list_servers(dht), key=lambda server: server.uids)):
        say(f"   server {number}: peer [cyan]{server.peer_id}[/] at {maddrs.get(server.peer_id or '')}")
        say(f"             hosts {', '.join(server.uids)}")


def train(model: Classifier, images: torch.Tensor, labels: torch.Tensor, epochs: int) -> tuple[Counter[str], int]:
    """Train stem, gate and head here and the experts over there.

    :returns: training rows that each expert answered, and calls that failed
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    served: Counter[str] = Counter()
    columns = (TextColumn("   {task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
    steps = epochs * -(-len(images) // BATCH_SIZE)
    with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
        bar = progress.add_task("", total=steps)
        for epoch in range(1, epochs + 1):
            for image_batch, label_batch in batches(images, labels):
                loss = cross_entropy(model(image_batch), label_batch)
                optimizer.zero_grad()
                loss.backward()  # each chosen expert is called once, and trained once
                optimizer.step()
                called = model.experts.statistics()
                served.update({u: n for u, n in called.rows_per_expert.items() if u not in called.forward_failures})
                progress.update(bar, advance=1, description=f"epoch {epoch} of {epochs}, loss {loss.item():.3f}")
    totals = model.experts.statistics()
    return served, totals.total_forward_failures + totals.total_backward_failures


def show_load(served: Counter[str]) -> None:
    """How the gate spread the training images over the experts."""
    say("   Training rows served per expert, each forward and backward:")
    table = Table()
    table.add_column("expert")
    table.add_column("server")
    table.add_column("rows", justify="right")
    table.add_column("share")
    total = sum(served.values())
    for uid in (f"digits.{i}.{j}" for i in range(GRID[0]) for j in range(GRID[1])):
        share = served[uid] / total
        table.add_row(uid, uid.split(".")[1], str(served[uid]), f"{share:5.1%} " + "█" * round(40 * share))
    table.add_section()
    table.add_row("all", "", str(total), "two experts for each image")
    console.print(table)


def run(epochs: int) -> int:
    """The demo, from start to end.

    :returns: exit code
    """
    begin = time.monotonic()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # this process and two servers share the machine
    say("[bold]A Mixture of Experts learns handwritten digits, over the network[/]\n")
    say("1. Starting two servers, each a process of its own with four experts")
    with contextlib.ExitStack() as stack:
        with console.status("   each loads torch, joins the swarm and announces its experts ..."):
            swarm = stack.enter_context(LocalSwarm(*map(server_arguments, range(GRID[0])), start_timeout_s=120))
        try:
            dht = swarm.dht()
            show_swarm(swarm, dht)
            say(f"   ready after {time.monotonic() - begin:.1f} s; all of it on loopback\n")

            train_images, test_images, train_labels, test_labels = load_data()
            experts = RemoteMixtureOfExperts(
                in_features=HIDDEN_DIM, grid_size=GRID, dht=dht, uid_prefix="digits.", k_best=2, forward_timeout=30
            )
            model = Classifier(experts)
            say(f"2. Data: {len(train_images)} images of 8 x 8 pixels to train with, {len(test_images)} to test")
            say("   Model: linear stem here -> gate here -> the 2 best of 8 experts there -> linear head here")
            say(f"   Accuracy before training: {accuracy(model, test_images, test_labels):.1%}\n")

            say("3. Training; every step calls the chosen experts once forward and once backward")
            trained_at = time.monotonic()
            served, failures = train(model, train_images, train_labels, epochs)
            elapsed_s = time.monotonic() - trained_at
            images_per_s = epochs * len(train_images) / elapsed_s
            say(f"   {elapsed_s:.1f} s, {images_per_s:.0f} images/s, {failures} failed calls\n")

            reached = accuracy(model, test_images, test_labels)
            color = "green" if reached >= GOOD_ENOUGH else "red"
            say(f"4. Test accuracy: [bold {color}]{reached:.1%}[/] (expected: at least {GOOD_ENOUGH:.0%})")
            show_load(served)
            say("\n   Stopping the servers ...")
        except KeyboardInterrupt:
            say("\nInterrupted; stopping the servers ...")
            return 130
    say(f"   Done after {time.monotonic() - begin:.0f} s.")
    return 0 if reached >= GOOD_ENOUGH else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point.

    :returns: exit code
    """
    parser = argparse.ArgumentParser(description="Train a Mixture of Experts on handwritten digits over the network.")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the training images (default: 10)")
    options = parser.parse_args(argv)
    if options.epochs < 1:
        parser.error("--epochs: at least 1")
    try:
        return run(options.epochs)
    except KeyboardInterrupt:  # while the servers started; they are gone already
        return 130
    except MoEError as e:
        print(f"the demo failed: {e}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
