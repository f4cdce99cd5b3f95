"""Matrices stored for products on a processor: as float32, bfloat16, or 8-bit numbers with a scale for 64 columns.

    packed = pack(weight, "int8")        panels of 16 rows
    packed.unpack()                      the matrix again, rounded

8 bits: 64 neighbours in a row share one scale, the largest of their absolute values / 127, so each number is off by at
most half a scale. The vectors of a model (norms, mixes, decay, bonus) are never packed: they are few, and the state
hangs on them.

Layout: 16 rows are a panel, and in it one column follows the other, so that a vector register holds 16 neighbouring
rows and a product reads memory from beginning to end. Two columns of bfloat16, or four of 8 bits, lie side by side as
16 words of 4 bytes, one a row; shifts take them apart. Zeros fill up the last panel, and columns to whole groups of 64
with 8 bits, to whole words with bfloat16.

What it is not: a product with such a matrix; that is `kernels/packed_cpu.h`. Files are not written in this form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STORAGES = ("float32", "bfloat16", "int8")
PANEL, GROUP = 16, 64
_IN_A_WORD = {"float32": 1, "bfloat16": 2, "int8": 4}


@dataclass(frozen=True)
class Packed:
    """A matrix (rows, columns).

    numbers: (panels, words in a row, 16, numbers in a word), float32, bfloat16 or int8. scales: (panels, groups, 16)
    float32, int8 alone.
    """

    numbers: Tensor
    rows: int
    columns: int
    scales: Tensor | None = None

    @property
    def width(self) -> int:
        """Columns, with the zeros that fill up the last word or group."""
        return self.numbers.shape[1] * self.numbers.shape[3]

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns) in dtype."""
        rows = self.numbers.transpose(1, 2).reshape(-1, self.width)
        if self.scales is not None:
            scales = self.scales.transpose(1, 2).reshape(len(rows), -1, 1)
            rows = (rows.view(len(rows), -1, GROUP) * scales).flatten(1)
        return rows[: self.rows, : self.columns].to(dtype)

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(weight: Tensor, storage: str, empty: Callable[..., Tensor] = torch.empty) -> Packed:
    """Store a matrix (rows, columns) as "float32", "bfloat16" or "int8".

    Args:
        empty: gives the memory, called as `empty(shape, dtype=...)`; that of `buffers.Pages` is quicker to read.

    Raises:
        ValueError: an unknown storage; infinity or NaN in what is to become 8 bits.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage = {storage!r}: choose from {', '.join(STORAGES)}")
    weight, (rows, columns), scales = weight.detach(), weight.shape, None
    whole = GROUP if storage == "int8" else _IN_A_WORD[storage]
    if rows % PANEL or columns % whole:
        weight = F.pad(weight, (0, -columns % whole, 0, -rows % PANEL))
    if storage == "int8":
        if not torch.isfinite(weight).all():
            raise ValueError("pack: the matrix holds infinity or NaN, which have no place in 8 bits; use float32")
        groups = weight.float().view(len(weight), -1, GROUP)
        steps = groups.abs().amax(-1, keepdim=True) / 127
        weight = torch.round(groups / steps.clamp_min(torch.finfo(torch.float32).tiny)).flatten(1)
        scales = _copy(steps.view(-1, PANEL, steps.shape[1]).transpose(1, 2), torch.float32, empty)
    words = weight.view(-1, PANEL, weight.shape[1] // _IN_A_WORD[storage], _IN_A_WORD[storage])
    return Packed(_copy(words.transpose(1, 2), getattr(torch, storage), empty), rows, columns, scales)


def _copy(x: Tensor, dtype: torch.dtype, empty: Callable[..., Tensor]) -> Tensor:
    return empty(x.shape, dtype=dtype).copy_(x)
