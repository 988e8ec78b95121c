"""Which positions see which. Owns: the mask of a block's attention, from what a caller sends.

As transformers builds it (``transformers.masking_utils``), but without asking what is in a tensor: callers with different
adapters are computed in lanes of one batch, where that is not possible. Must not know: layers, adapters.

Legend: B = rows, S = positions of a row, P = positions of a learned prefix, which everybody sees.
"""

from __future__ import annotations

import torch
from torch import nn


def seen_positions(
    length: int,
    before: int,
    device: torch.device,
    *,
    causal: bool,
    window: int | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    always: bool = False,
) -> torch.Tensor | None:
    """True where a query (last axis but one) sees a key (last axis): bool (B or 1, 1, S or 1, P + S).

    :param length: S
    :param before: P
    :param causal: a position sees itself and earlier ones only
    :param window: a position sees this many of the latest, itself included; if not causal, this many to each side
    :param attention_mask: (B, S), 0 where a position is padding
    :param position_ids: (B, S) of a causal model that tells sequences in one row apart: without a mask, a step other than to
        the next position begins another sequence, which does not see those before it
    :param always: of a causal model: give a mask where the layer could do without, too
    :returns: None: everything is as the layer does it by itself
    """
    packed = causal and attention_mask is None and before == 0 and position_ids is not None
    narrow = window is not None and length > (window if causal else window + 1)
    seen: torch.Tensor | None = None
    if narrow or packed or (causal and (always or before or attention_mask is not None)):
        query, key = torch.arange(length, device=device)[:, None], torch.arange(length, device=device)
        near = torch.ones(length, length, dtype=torch.bool, device=device)
        if causal:
            near = key <= query
        if narrow and window is not None:
            near = near & (key > query - window if causal else (query - key).abs() <= window)
        seen = near[None, None]
    if packed and position_ids is not None:
        sequence = _sequence_of(position_ids)
        same = sequence[:, None, :, None] == sequence[:, None, None, :]
        seen = same if seen is None else seen & same
    if attention_mask is not None:
        not_padding = (attention_mask != 0)[:, None, None, :]
        seen = not_padding if seen is None else seen & not_padding
    return None if seen is None else nn.functional.pad(seen, (before, 0), value=True)


def as_bias(seen: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A mask as what is added to the scores: 0 where a key is seen, else the lowest number there is."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)


def _sequence_of(position_ids: torch.Tensor) -> torch.Tensor:
    """(B, S) -> (B, S): how many sequences have ended in a row before a position."""
    steps = torch.diff(position_ids, prepend=position_ids[:, :1] - 1, dim=-1)
    return (steps != 1).cumsum(-1)
