"""Files of models and adapters. Owns: which files of a folder hold weights, in which order transformers looks, and reading
settings and single tensors, taking no more memory than the files.

Read are tensors only: nothing that is in a file is executed. Must not know: models, servers, clients.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from moe.errors import ConfigError

MAX_INDEX_BYTES = 2**27  # of an index of files; ours. A million tensors take 100 MiB
MAX_HEADER_BYTES = 100 * 2**20  # of a safetensors file; that of the format
NAMES = ("model.safetensors", "pytorch_model.bin")


def read_tensors(folder: Path, wanted: Callable[[str], bool], *, partial: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of a model on disk, copied to memory.

    :param wanted: which, by name
    :param partial: files that the index names and that are not there are passed over; else they are an error if wanted
    :raises ConfigError: there are no files with weights, or one cannot be read; names it
    """
    found: dict[str, torch.Tensor] = {}
    for file, names in weight_files(folder).items():
        if names is not None and not any(map(wanted, names)):
            continue
        if partial and not file.exists():
            continue
        found.update(_read(file, wanted))
    return found


def dtype_of(folder: Path) -> torch.dtype | None:
    """The dtype of a model whose configuration has none: transformers takes that of the first floating-point tensor.

    :returns: None: there is no such tensor in the first file that is there
    :raises ConfigError: there are no files with weights, or the first one cannot be read; names it
    """
    for file in sorted(weight_files(folder)):
        if not file.exists():  # shards of others
            continue
        return next((t.dtype for _, t in _read(file, lambda _: True) if t.is_floating_point()), None)
    return None


def weight_files(folder: Path) -> dict[Path, list[str] | None]:
    """The files with weights, and which tensors are in each; None: not known before it is opened.

    :raises ConfigError: there are none, or their index cannot be read
    """
    for name in NAMES:
        if (folder / name).is_file():
            return {folder / name: None}
        index = folder / f"{name}.index.json"
        if index.is_file():
            return _files_of_index(folder, index)
    raise ConfigError(
        f"model_path: no weights in {folder}: neither {' nor '.join(NAMES)}, nor an index of several files"
    )


def _files_of_index(folder: Path, index: Path) -> dict[Path, list[str] | None]:
    files: dict[Path, list[str] | None] = {}
    try:
        for tensor, file in read_json(index, MAX_INDEX_BYTES)["weight_map"].items():
            if Path(file).name != file:
                raise ValueError(f"weight_map: {file!r} is not a file of this folder")
            if Path(file).suffix not in (".safetensors", ".bin"):
                raise ValueError(f"weight_map: {file!r} is neither a .safetensors nor a .bin file")
            files.setdefault(folder / file, []).append(tensor)  # type: ignore[union-attr]
    except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError) as e:
        raise ConfigError(f"model_path: cannot read {index}: {e!r}") from e
    return files


def first_not_finite(tensors: Mapping[str, torch.Tensor]) -> str | None:
    """The name of a tensor with values that are not finite."""
    return next((name for name, t in tensors.items() if t.is_floating_point() and not t.isfinite().all()), None)


def read_json(file: Path, max_bytes: int) -> Any:
    """What a file with JSON holds.

    :raises OSError, ValueError, RecursionError: it is not there, too large, or not JSON
    """
    size_bytes = file.stat().st_size
    if size_bytes > max_bytes:
        raise ValueError(f"expected {max_bytes} bytes at most, got {size_bytes}")
    return json.loads(file.read_text(encoding="utf-8"))


def read_safetensors(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Copies of tensors by name: the file may change.

    :raises OSError, RuntimeError, SafetensorError, ValueError: it cannot be read
    """
    with file.open("rb") as opened:
        header_bytes, size_bytes = int.from_bytes(opened.read(8), "little"), file.stat().st_size
    if header_bytes > min(MAX_HEADER_BYTES, size_bytes):
        raise ValueError(f"its header claims {header_bytes} bytes, in a file of {size_bytes}")
    with safe_open(file, framework="pt") as tensors:
        for name in filter(wanted, tensors.keys()):
            yield name, tensors.get_tensor(name).clone()


def load_pickled(file: Path) -> Any:
    """What ``torch.save`` has saved, of tensors and plain containers; nothing is executed.

    :raises OSError, ValueError: it cannot be read, is compressed, or holds something else
    """
    zipped = zipfile.is_zipfile(file)  # since torch 1.6; only such files can be mapped into memory
    if zipped:
        with zipfile.ZipFile(file) as parts:
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts.infolist()):
                raise ValueError("it is compressed, as torch does not save")
    try:
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:  # of whatever else than tensors is in it; torch would advise to execute that
        raise ValueError("it is broken, or holds other than tensors, which is not executed") from e


def _read(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    read = read_safetensors if file.suffix == ".safetensors" else _read_pickled
    try:
        yield from read(file, wanted)
    except (OSError, RuntimeError, SafetensorError, ValueError, zipfile.BadZipFile) as e:
        raise ConfigError(f"model_path: cannot read {file}: {e}") from e


def _read_pickled(file: Path, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    state, size_bytes = load_pickled(file), file.stat().st_size
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__}, not a dict of tensors")
    for name in filter(lambda name: isinstance(name, str) and wanted(name), state):
        tensor = state[name]
        if not isinstance(tensor, torch.Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}, not a tensor")
        if tensor.numel() * tensor.element_size() > size_bytes:  # one value may stand for many
            raise ValueError(f"{name} says it has the shape {tuple(tensor.shape)}, in a file of {size_bytes} bytes")
        yield name, tensor.detach().clone()
