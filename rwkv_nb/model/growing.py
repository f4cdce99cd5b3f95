"""Initial weights grown from a smaller model: stage 1 with `load_model`, by the rule of the official trainer.

    the same number of entries     the old tensor, in the new shape
    a vector of n -> n'            entry i is the old one's at i n / n', between two entries by linear interpolation
    rows n -> n' of a matrix       the same rule, row by row; a single number fills its row
    a name that the old one lacks  keeps its fresh initial value: blocks above the old ones, new options

A model that grows in depth computes the same as before until it trains: new blocks start as the identity. A vocabulary
that grows is stretched, so that tokens change their rows. The width cannot grow: columns are not interpolated, and the
official code stops there with an error of torch.

What it is not: loading a part of a model (`load_partial`), which never changes a shape.
Source: `generate_init_weight` in RWKV-LM, RWKV-v5/src/trainer.py.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .initialization import is_mask


def grow(weights: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, the initial weights of the new model, with every parameter that `source` has taken from there.

    Neither is changed. Results have the dtype of `weights`; the interpolation is computed in float32.

    Raises:
        ValueError: `source` has a parameter that the new model lacks, or one of another width.
    """
    foreign = [name for name in source if name not in weights and not is_mask(name)]
    if foreign:
        more = f" and {len(foreign) - 4} more" if len(foreign) > 4 else ""
        raise ValueError(
            f"the old model has parameters that the new one lacks: {', '.join(foreign[:4])}{more}; a model grows, so "
            "n_layer must be at least as large, and its options must be given again"
        )
    grown = dict(weights)
    for name, old in source.items():
        if not is_mask(name):  # follows from ctx_len
            grown[name] = _resized(name, old.detach().float(), weights[name].shape).to(weights[name].dtype)
    return grown


def _resized(name: str, old: Tensor, shape: torch.Size) -> Tensor:
    """The old tensor in the new shape."""
    is_matrix = name.endswith(".weight") and len(shape) == 2
    if old.numel() == shape.numel() and not (is_matrix and old.shape != shape):
        return old.reshape(shape)
    columns = 1 if len(shape) == 1 or "time_mix_" in name else shape[-1]  # a mix (1, 1, D) is a vector
    rows = old.reshape(-1, 1 if columns == 1 or old.dim() == 1 else old.shape[-1])
    if rows.shape[1] not in (1, columns):
        raise ValueError(
            f"{name}: the old model has {tuple(old.shape)}, the new one {tuple(shape)}; only the number of layers and "
            "of tokens can grow: give n_embd, dim_att, dim_ffn and head_size_a as they were"
        )
    return interpolated(rows.expand(-1, columns), shape.numel() // columns).reshape(shape)


def interpolated(rows: Tensor, n: int) -> Tensor:
    """(m, columns) -> (n, columns): row i is the old one at the place i m / n, the last for all places after it."""
    m = len(rows)
    place = torch.arange(n, dtype=torch.float64) * m / n
    low = place.floor().long()
    part = (place - low).to(rows.dtype)[:, None]
    high = (low + 1).clamp(max=m - 1)
    return rows[low] * (1 - part) + rows[high] * part
