"""Matrices stored short: bfloat16, or 8-bit numbers with a scale for each group of columns.

    packed = pack(weight, "int8")        numbers (rows, columns) int8, scales (rows, columns / 64) float32
    packed.unpack()                      the matrix again, rounded

8 bits: 64 neighbours in a row share one scale, the largest of their absolute values / 127, so each number is off by at
most half a scale. Rows are filled up with zeros to whole groups. The vectors of a model (norms, mixes, decay, bonus)
are never packed: they are few, and the state hangs on them.

Layout of 8 bits: the 64 numbers of a group lie as 16 words of 4 bytes; word i holds numbers i, 16 + i, 32 + i, 48 + i.
Then a vector register of words becomes four registers of neighbours by shifts alone.

What it is not: a product with such a matrix; that is `kernels/decode_cpu.cpp`. Files are not written in this form.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

STORAGES = ("float32", "bfloat16", "int8")
GROUP = 64


@dataclass(frozen=True)
class Packed:
    """A matrix (rows, columns). numbers: float32, bfloat16, or int8 in groups. scales: (rows, groups), int8 alone."""

    numbers: Tensor
    columns: int
    scales: Tensor | None = None

    def unpack(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """(rows, columns) in dtype."""
        if self.scales is None:
            return self.numbers.to(dtype)
        words = self.numbers.view(len(self.numbers), -1, 16, 4).transpose(2, 3)  # (rows, groups, 4, 16)
        return (words * self.scales[:, :, None, None]).flatten(1)[:, : self.columns].to(dtype)

    @property
    def nbytes(self) -> int:
        return self.numbers.nbytes + (0 if self.scales is None else self.scales.nbytes)


def pack(weight: Tensor, storage: str) -> Packed:
    """Store a matrix (rows, columns) as "float32", "bfloat16" or "int8".

    Raises:
        ValueError: an unknown storage; infinity or NaN in what is to become 8 bits.
    """
    if storage not in STORAGES:
        raise ValueError(f"storage = {storage!r}: choose from {', '.join(STORAGES)}")
    weight, (rows, columns) = weight.detach(), weight.shape
    if storage != "int8":
        return Packed(weight.to(getattr(torch, storage)).contiguous(), columns)
    if not torch.isfinite(weight).all():
        raise ValueError("pack: the matrix holds infinity or NaN, which have no place in 8 bits; use float32")
    groups = F.pad(weight.float(), (0, -columns % GROUP)).view(rows, -1, GROUP)
    scales = groups.abs().amax(-1) / 127  # (rows, groups)
    numbers = torch.round(groups / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).to(torch.int8)
    words = numbers.view(rows, -1, 4, 16).transpose(2, 3)
    return Packed(words.reshape(rows, -1).contiguous(), columns, scales.contiguous())
