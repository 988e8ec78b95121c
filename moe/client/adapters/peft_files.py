"""Reading a folder with an adapter of peft. Owns: nothing in it is executed, and it takes no more memory than the files.

Must not know: what the fields and tensors mean.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from moe.errors import ConfigError
from moe.weight_files import load_pickled, read_json, read_safetensors

SETTINGS, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
MAX_SETTINGS = 2**22  # bytes of adapter_config.json; ours


class AdapterFiles(NamedTuple):
    """What is in a folder."""

    settings: Any
    state: dict[str, torch.Tensor]
    settings_file: str
    weights_file: str


def read_adapter(folder: str | os.PathLike[str]) -> AdapterFiles:
    """The settings and tensors in a folder.

    :raises ConfigError: no such files, or something else in them
    """
    settings, weights, pickled = (Path(folder) / name for name in (SETTINGS, WEIGHTS, PICKLED))
    read = _read_settings(settings)
    if weights.exists() or not pickled.exists():  # as peft
        return AdapterFiles(read, check_tensors(_read_safetensors(weights), str(weights)), str(settings), str(weights))
    state = check_tensors(_read_pickled(pickled), str(pickled), pickled.stat().st_size)
    return AdapterFiles(read, state, str(settings), str(pickled))


def check_tensors(state: Any, file: str, size: int | None = None) -> dict[str, torch.Tensor]:
    """The tensors by name, all of them ordinary, of floating point and finite.

    :param size: bytes of the file, if tensors can say that they are larger than it
    :raises ConfigError: names the file and the tensor
    """
    if not isinstance(state, Mapping):
        raise ConfigError(f"{file}: expected tensors by name, got {type(state).__name__}")
    for name, tensor in state.items():
        problem = "names that are text" if not isinstance(name, str) else _problem(tensor, size)
        if problem is not None:
            raise ConfigError(f"{file}: {str(name)[:200]!r}: expected {problem}")
    return dict(state)


def _problem(tensor: Any, size: int | None) -> str | None:
    """What had been expected instead."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter):
        return f"a tensor, got {type(tensor).__name__}"
    if tensor.layout is not torch.strided or tensor.is_meta or not tensor.is_floating_point():
        return f"floating-point numbers, got {tensor.dtype}, {tensor.layout}, on {tensor.device}"
    if size is not None and tensor.numel() * tensor.element_size() > size:
        return f"no more than is in the file, got {tuple(tensor.shape)}"
    return None if bool(tensor.detach().float().isfinite().all()) else "finite numbers, got some that are not"


def _read_settings(file: Path) -> Any:
    with _errors_name(file):
        return read_json(file, MAX_SETTINGS)


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    with _errors_name(file):
        return dict(read_safetensors(file, lambda _: True))


def _read_pickled(file: Path) -> Any:
    with _errors_name(file):
        return load_pickled(file)


@contextlib.contextmanager
def _errors_name(file: Path) -> Iterator[None]:
    """Whatever is wrong with a file is a ConfigError that names it."""
    try:
        yield
    except Exception as e:
        raise ConfigError(f"cannot read an adapter from {file}: {e}") from e
