"""Reading a folder with an adapter of peft. Owns: nothing in it is executed, and it takes no more memory than the files.

Must not know: what the fields and tensors mean.
"""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from moe.errors import ConfigError

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
    try:
        if file.stat().st_size > MAX_SETTINGS:
            raise ValueError(f"expected {MAX_SETTINGS} bytes at most, got {file.stat().st_size}")
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, RecursionError, ValueError) as e:
        raise ConfigError(f"cannot read an adapter from {file}: {e}") from e


def _read_safetensors(file: Path) -> dict[str, torch.Tensor]:
    try:
        return {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file may change
    except (AttributeError, KeyError, OSError, RuntimeError, SafetensorError, TypeError, ValueError) as e:
        raise ConfigError(f"cannot read an adapter from {file}: {e}") from e


def _read_pickled(file: Path) -> Any:
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as parts:
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                    raise ValueError("it is compressed, as torch does not save")
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # of whatever else than tensors is in it; torch would advise to execute that
        why = f": {e}" if isinstance(e, (OSError, ValueError)) else ""
        raise ConfigError(
            f"cannot read an adapter from {file}{why}: it is broken, or holds other than tensors, which is not executed"
        ) from e
