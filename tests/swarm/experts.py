"""Experts that the tests host, in this process and in others. What they compute is easy to compute again locally."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from moe.schema import BatchTensorProto, TensorProto
from moe.server.expert_backend import ExpertBackend
from moe.server.layers import expert_schema
from moe.server.layers.adapted import AdaptedFeedforwardBlock
from tests.client.sequence_swarm import BLOCK_KWARGS, Block
from tests.experts import HIDDEN

WIDTH = 8


class Mixer(nn.Module):
    """Takes one of everything: a sequence, integers, a mask, and optionally a tensor that is global to the call.

    Legend: B = rows, S = any length, D = WIDTH.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(
        self, x: torch.Tensor, *, index: torch.Tensor, mask: torch.Tensor, scale: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """x (B, S, D), index (B), mask (B, S), scale (D) -> (B, S, D) and the next index (B)"""
        y = self.linear(x) + index.view(-1, 1, 1)
        if scale is not None:
            y = y * scale
        return y.masked_fill(~mask.unsqueeze(-1), 0.0), index + 1


MIXER_SCHEMA: dict[str, Any] = {
    "args_schema": (BatchTensorProto(None, WIDTH),),
    "kwargs_schema": {
        "index": BatchTensorProto(dtype=torch.int64),
        "mask": BatchTensorProto(None, dtype=torch.bool),
        "scale": TensorProto(WIDTH),
    },
    "optional_kwargs": ("scale",),
}


class AdaptedAttention(nn.Module):
    """A layer whose every kind of input matters: a sequence, its mask, and the caller's own low-rank adapter.

    Legend: B = rows, S = any length, D = width, R = any rank.
    """

    def __init__(self, width: int):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(
        self, x: torch.Tensor, *, mask: torch.Tensor, lora_a: torch.Tensor, lora_b: torch.Tensor
    ) -> torch.Tensor:
        """x (B, S, D), mask (B, S), lora_a (D, R), lora_b (R, D) -> (B, S, D)"""
        scores = self.query(x) @ self.key(x).transpose(1, 2) / x.shape[-1] ** 0.5
        weights = scores.masked_fill(~mask.unsqueeze(1), -1e9).softmax(-1)
        return x + weights @ (self.value(x) + (x @ lora_a) @ lora_b)


def adapted_attention_schema(width: int) -> dict[str, Any]:
    """Schema of AdaptedAttention, as ExpertBackend takes it."""
    return {
        "args_schema": (BatchTensorProto(None, width),),
        "kwargs_schema": {
            "mask": BatchTensorProto(None, dtype=torch.bool),
            "lora_a": TensorProto(width, None),
            "lora_b": TensorProto(None, width),
        },
    }


ATTENTION_WIDTH = 16


def random_inputs(
    seed: int, *, rows: int | None = None, length: int | None = None, rank: int | None = None
) -> dict[str, torch.Tensor]:
    """Somebody's own inputs of an AdaptedAttention of ATTENTION_WIDTH, of sizes that depend on who it is."""
    rows, length, rank = rows or 1 + seed % 4, length or 2 + seed % 3, rank or 1 + seed % 5
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[:, 0] = True  # somebody to look at
    return {
        "x": torch.randn(rows, length, ATTENTION_WIDTH, generator=generator),
        "mask": mask,
        "lora_a": torch.randn(ATTENTION_WIDTH, rank, generator=generator),
        "lora_b": torch.randn(rank, ATTENTION_WIDTH, generator=generator),
    }


def run_attention(expert: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, and gradients of all inputs that have one."""
    own = {name: tensor.clone().requires_grad_(tensor.is_floating_point()) for name, tensor in inputs.items()}
    y = expert(own["x"], mask=own["mask"], lora_a=own["lora_a"], lora_b=own["lora_b"])
    weights = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weights).sum().backward()
    assert own["mask"].grad is None
    grads = [own[name].grad for name in ("x", "lora_a", "lora_b")]
    return [y.detach(), *(grad for grad in grads if grad is not None)]


def compare_with_local(expert: Callable[..., Any], inputs: dict[str, torch.Tensor]) -> float:
    """The largest difference, over outputs and gradients, between an expert and the same module here.

    Relative to 1 + the value. The module has the weights that make_backend gives it.
    """
    local = make_backend("attention", "local.0", width=ATTENTION_WIDTH).module
    pairs = zip(run_attention(expert, inputs), run_attention(local, inputs), strict=True)
    return max(((got - wanted).abs() / (1 + wanted.abs())).max().item() for got, wanted in pairs)


class Unpicklable(Exception):
    """An exception that cannot leave its process."""

    def __init__(self) -> None:
        super().__init__("holds a lock")
        self.lock = threading.Lock()


class Scripted(nn.Module):
    """Doubles its input, except for rows that begin with one of these numbers; remembers the rows of each batch."""

    RAISE, UNPICKLABLE, WRONG_ROWS, NOTHING, EXIT = 1001.0, 1002.0, 1003.0, 1004.0, 1005.0

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.batches: list[int] = []

    def forward(self, x: torch.Tensor) -> Any:
        """(B, D) -> (B, D)"""
        self.batches.append(len(x))
        marks = set(x[:, 0].tolist())
        if self.RAISE in marks:
            raise ValueError("this row is not to my taste")
        if self.UNPICKLABLE in marks:
            raise Unpicklable
        if self.EXIT in marks:
            raise SystemExit(3)
        if self.WRONG_ROWS in marks:
            return (2 * x * self.weight)[1:]
        return None if self.NOTHING in marks else 2 * x * self.weight


class Slow(nn.Module):
    """Returns its input after as many seconds as the largest number in its first column says."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, D)"""
        time.sleep(float(x.detach()[:, 0].max()))
        return x * self.weight


class Wide(nn.Module):
    """A mebibyte of output for each row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, D) -> (B, 2**18)"""
        return x[:, :1].expand(-1, 2**18)


class SlowBlock(Block):
    """A block of a sequence that takes as long as its caller says, to be killed in the middle."""

    def forward(self, x: torch.Tensor, *args: Any, delay: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
        """x (B, T, D), delay (B) in seconds -> (B, T, D); others as Block"""
        if delay is not None:
            time.sleep(float(delay.max()))
        return super().forward(x, *args, **kwargs)


SLOW_BLOCK_SCHEMA: dict[str, Any] = {
    "args_schema": (BatchTensorProto(None, HIDDEN),),
    "kwargs_schema": {**BLOCK_KWARGS, "delay": BatchTensorProto()},
    "optional_kwargs": (*BLOCK_KWARGS, "delay"),
}


def make_backend(kind: str, uid: str, lr: float | None = None, **options: Any) -> ExpertBackend:
    """An expert of this file with the same weights in every process.

    :param lr: learning rate; None: no optimizer
    :param options: ``width``, ``seed`` of the weights, ``optimizer`` ("sgd", "adam"), and those of ExpertBackend
    """
    with _seeding:
        return _make_backend(kind, uid, lr, **options)


_seeding = threading.Lock()


def _make_backend(kind: str, uid: str, lr: float | None, **options: Any) -> ExpertBackend:
    torch.manual_seed(options.pop("seed", 0))
    width, optimizer_name = options.pop("width", WIDTH), options.pop("optimizer", "sgd")
    makers: dict[str, Any] = {
        "mixer": lambda: (Mixer(), MIXER_SCHEMA),
        "attention": lambda: (AdaptedAttention(width), adapted_attention_schema(width)),
        "scripted": lambda: (Scripted(), {"args_schema": (BatchTensorProto(width),)}),
        "wide": lambda: (Wide(), {"args_schema": (BatchTensorProto(width),), "outputs_schema": BatchTensorProto(None)}),
        "slow": lambda: (Slow(), {"args_schema": (BatchTensorProto(width),)}),
        "adapted": lambda: (AdaptedFeedforwardBlock(width), expert_schema("adapted_ffn", width)),
        "block": lambda: (SlowBlock(), SLOW_BLOCK_SCHEMA),
        "linear": lambda: (nn.Linear(width, width), {"args_schema": (BatchTensorProto(width),)}),
    }
    module, schema = makers[kind]()
    if kind in ("scripted", "slow"):
        schema = {**schema, "outputs_schema": BatchTensorProto(width)}
    optimizer_class = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer_name]
    optimizer = None if lr is None else optimizer_class(module.parameters(), lr=lr)
    return ExpertBackend(uid, module, optimizer, **schema, **options)
