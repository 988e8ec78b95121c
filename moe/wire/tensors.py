"""Tensor <-> buffer. Owns: the codecs, the size a buffer may have, and refusing buffers that lie about it.

Codec NONE is ours (raw bytes, no copy on the way out, bfloat16 as 2 bytes a value); the lossy ones are hivemind's. Must not
know: which message a tensor rides in. Nothing here trusts a declared shape: sizes are checked before memory is taken.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from moe.errors import ConfigError, ProtocolError
from moe.schema import DTYPE_NAMES, DTYPES, Compression

Buffer = bytes | bytearray | memoryview

MAX_DIMENSIONS = 64  # numpy's own limit
_BLOCKWISE_BLOCK = 4096  # hivemind's _BLOCKWISE_QUANTIZATION_BLOCKSIZE
_MAX_CODEBOOK = 256  # entries that a byte can choose from
_DECODED_AT_ONCE = 16 * _BLOCKWISE_BLOCK  # values; each takes 12 bytes while it is decoded
_MAX_VALUES = 2**59  # of a shape, axes of no length left out: torch counts bytes in 64 bits


class EncodedTensor(NamedTuple):
    """A tensor as bytes, with what is needed to restore it."""

    dtype: str
    shape: tuple[int, ...]
    codec: Compression
    buffer: Buffer


def encode_tensor(tensor: torch.Tensor, codec: int = Compression.NONE) -> EncodedTensor:
    """Tensor -> bytes. With NONE the buffer shares the tensor's memory (a CPU tensor is not copied).

    Tensors of fewer than two values, which hivemind's codecs cannot take, go uncompressed.
    """
    tensor = tensor.detach().cpu().contiguous()
    dtype, shape = DTYPE_NAMES[tensor.dtype], tuple(tensor.shape)
    codec = Compression(codec)
    if codec == Compression.NONE or tensor.numel() < 2 or tensor.ndim == 0:
        return EncodedTensor(dtype, shape, Compression.NONE, _raw_view(tensor))
    from hivemind.compression import serialize_torch_tensor

    message = serialize_torch_tensor(tensor, codec)
    return EncodedTensor(dtype, shape, codec, message.buffer)


def decode_tensor(encoded: EncodedTensor) -> torch.Tensor:
    """Bytes -> tensor. A ``bytearray`` becomes the tensor's memory without a copy.

    :raises ProtocolError: if the bytes are not such a tensor
    """
    dtype = DTYPES.get(encoded.dtype)
    if dtype is None:
        raise ProtocolError(f"tensor of unknown dtype {encoded.dtype[:50]!r}; known: {', '.join(DTYPES)}")
    numel = count_values(encoded.shape)
    size_bytes = len(encoded.buffer)
    if encoded.codec == Compression.NONE:
        return _decode_raw(encoded, dtype, numel, size_bytes)
    if size_bytes > max_encoded_bytes(encoded.shape, dtype) or not dtype.is_floating_point:
        raise ProtocolError(f"{size_bytes} bytes cannot be a {encoded.codec.name} tensor {dtype} {encoded.shape}")
    try:
        tensor = _decode_lossy(encoded, dtype)
    except (ValueError, TypeError, IndexError, RuntimeError, OverflowError) as e:
        raise ProtocolError(f"malformed {encoded.codec.name} tensor {dtype} {encoded.shape}: {e!r:.200}") from None
    if tuple(tensor.shape) != tuple(encoded.shape) or tensor.dtype != dtype:
        raise ProtocolError(f"{encoded.codec.name} tensor decodes to {tensor.dtype} {tuple(tensor.shape)}")
    return tensor.detach()


def count_values(shape: Sequence[int]) -> int:
    """Number of values of a declared shape.

    :raises ProtocolError: if it is no shape a tensor can have
    """
    if len(shape) > MAX_DIMENSIONS or min(shape, default=0) < 0:
        raise ProtocolError(f"impossible tensor shape {tuple(shape[:MAX_DIMENSIONS])}")
    if math.prod(max(1, size) for size in shape) > _MAX_VALUES:  # torch refuses (0, 2**61, 2**61), too
        raise ProtocolError(f"impossible tensor shape {tuple(shape)}")
    return math.prod(shape)


def max_encoded_bytes(shape: Sequence[int], dtype: torch.dtype, codec: int | None = None) -> int:
    """Most bytes any codec (or the given one) makes of such a tensor; checked while its chunks arrive.

    Raw: the values (legacy bfloat16 of hivemind: 4 bytes each). Lossy: at most 2 bytes a value plus two float32 per row of
    the last axis (MEANSTD_16BIT), or a byte a value plus tables.
    """
    numel = count_values(shape)
    raw = numel * (4 if dtype == torch.bfloat16 else dtype.itemsize)
    if codec == Compression.NONE:
        return raw
    lossy = 2 * numel + 8 * (numel // max(1, shape[-1] if len(shape) else 1)) + numel // 1024 + 4096
    return max(raw, lossy)


def check_codec_available(codec: int) -> None:
    """Fail now rather than in the middle of a request.

    :raises ConfigError: if a codec needs a package that is not installed
    """
    if codec == Compression.BLOCKWISE_8BIT:
        try:
            import bitsandbytes.functional  # type: ignore[import-not-found]  # noqa: F401
        except ImportError as e:
            raise ConfigError(
                "compression BLOCKWISE_8BIT needs the package bitsandbytes: pip install bitsandbytes"
            ) from e


def _raw_view(tensor: torch.Tensor) -> memoryview:
    if tensor.numel() == 0:
        return memoryview(b"")
    if tensor.dtype == torch.bfloat16:  # NumPy has none
        tensor = tensor.view(torch.int16)
    return tensor.numpy().data.cast("B")


def _decode_raw(encoded: EncodedTensor, dtype: torch.dtype, numel: int, size_bytes: int) -> torch.Tensor:
    legacy_bfloat16 = dtype == torch.bfloat16 and size_bytes == 4 * numel
    if size_bytes != numel * dtype.itemsize and not legacy_bfloat16:
        raise ProtocolError(
            f"a tensor {encoded.dtype} {encoded.shape} takes {numel * dtype.itemsize} bytes, got {size_bytes}"
        )
    if numel == 0:
        return torch.empty(encoded.shape, dtype=dtype)
    buffer = encoded.buffer
    writable = isinstance(buffer, bytearray) or (isinstance(buffer, memoryview) and not buffer.readonly)
    owned = buffer if writable else bytearray(buffer)
    wire_dtype = torch.float32 if legacy_bfloat16 else torch.uint8 if dtype == torch.bool else dtype
    tensor = torch.frombuffer(owned, dtype=wire_dtype).reshape(encoded.shape)
    return tensor.ne(0) if dtype == torch.bool else tensor.to(dtype)  # a peer may send bytes other than 0 and 1


def _decode_lossy(encoded: EncodedTensor, dtype: torch.dtype) -> torch.Tensor:
    """hivemind's layouts (``hivemind/compression``), read here: its own readers take buffers of wrong length, warn of
    read-only arrays, and fail with NumPy 2.4 and later (int() of a one-element array) or without bitsandbytes."""
    numel = count_values(encoded.shape)
    if encoded.codec in (Compression.FLOAT16, Compression.MEANSTD_16BIT):
        buffer = encoded.buffer
        raw = buffer if isinstance(buffer, bytearray) else bytearray(buffer)
        rows = numel // max(1, encoded.shape[-1]) if encoded.codec == Compression.MEANSTD_16BIT else 0
        if len(raw) != 2 * numel + 8 * rows:
            raise ValueError(f"{len(raw)} bytes instead of {2 * numel + 8 * rows}")
        values = torch.frombuffer(raw, dtype=torch.float16, count=numel).to(dtype).reshape(encoded.shape)
        if not rows:
            return values
        means, stds = (
            torch.frombuffer(raw, dtype=torch.float32, offset=offset, count=rows).reshape(*encoded.shape[:-1], 1)
            for offset in (2 * numel, 2 * numel + 4 * rows)
        )
        return values.mul_(stds).add_(means)
    return _decode_codebook(encoded, dtype, numel)


def _decode_codebook(encoded: EncodedTensor, dtype: torch.dtype, numel: int) -> torch.Tensor:
    """Decode a byte a value that chooses from a codebook, which lies before them, after the scales of blocks if there are any.

    Every length follows from the shape and is compared with it before memory is taken: 64 KiB of scales would make 256 MiB
    of values. Values are looked up block by block, since NumPy takes 8 bytes for each index.
    """
    blockwise = encoded.codec == Compression.BLOCKWISE_8BIT
    blocks = -(-numel // _BLOCKWISE_BLOCK) if blockwise else 0
    head_bytes = 16 if blockwise else 8
    raw = np.frombuffer(encoded.buffer, dtype=np.uint8)
    *of_scales, entries = lengths = raw[:head_bytes].view(np.int64).tolist()
    if of_scales != ([blocks] if blockwise else []) or not 0 < entries <= _MAX_CODEBOOK:
        raise ValueError(f"table lengths {lengths}")
    expected = head_bytes + 4 * (blocks + entries) + numel
    if len(raw) != expected:
        raise ValueError(f"{len(raw)} bytes instead of {expected}")
    tables = raw[head_bytes : expected - numel].view(np.float32)
    scales, codebook, indices = tables[:blocks], tables[blocks:], raw[expected - numel :]
    values = torch.empty(numel, dtype=dtype)
    for start in range(0, numel, _DECODED_AT_ONCE):
        part = codebook[indices[start : start + _DECODED_AT_ONCE]]
        if blockwise:
            of_part = scales[start // _BLOCKWISE_BLOCK : -(-(start + len(part)) // _BLOCKWISE_BLOCK)]
            part *= np.repeat(of_part, _BLOCKWISE_BLOCK)[: len(part)]
        values[start : start + len(part)] = torch.from_numpy(part)
    return values.reshape(encoded.shape)
