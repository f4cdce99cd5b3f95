"""The powers of the decay inside a chunk of L steps, and which pairs of steps they join (for `chunked.py`).

P(n) = d^n for each head and key channel. A pair s < t needs P(t-1-s) as a factor for r_t times a factor for k_s, both
of a size that float32 holds. The pairs are therefore taken in groups, each around a step m of its own:
P(t-1-s) = P(t-m) P(m-1-s). `chunked.py` says how m is chosen.

What it is not: anything about r, k or v, but for the views of them that a group needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

EXPONENT = 20.0  # exp(20) = 5e8: factors up to this size lose nothing in float32


class Pairs(NamedTuple):
    """Some of the pairs s < t of a chunk, in groups of h steps; the factors of P(t-1-s) for r_t and for k_s."""

    h: int
    halves: bool  # t in the right half of 2 h steps, s in the left; else both in one block of h
    r_exponent: Tensor
    r_power: Tensor
    k_exponent: Tensor
    k_power: Tensor

    def later(self, x: Tensor) -> Tensor:
        """The steps t of x (C, b, H, L, N), as a view (C, b, H, groups, h, N)."""
        return self._view(x)[:, :, :, :, 1] if self.halves else self._view(x)

    def earlier(self, x: Tensor) -> Tensor:
        """The steps s."""
        return self._view(x)[:, :, :, :, 0] if self.halves else self._view(x)

    def only(self, A: Tensor) -> Tensor:
        """Keep s < t alone in A[t, s]; between halves that is everything."""
        return A if self.halves else A.tril_(-1)

    def _view(self, x: Tensor) -> Tensor:
        C, b, H, L, N = x.shape
        split = (L // (2 * self.h), 2, self.h) if self.halves else (L // self.h, self.h)
        return x.view(C, b, H, *split, N)


class Powers:
    """What all slices share: the chunk length, the block where halving stops, the powers of the decay."""

    def __init__(self, w: Tensor, chunk: int, dtype: torch.dtype):
        self.L, self.dtype = chunk, dtype
        self.log_d = -torch.exp(w.double())  # (H, N)
        strongest = float(-self.log_d.min()) if w.numel() else 0.0
        self.block = chunk
        while self.block > 1 and self.block // 2 * strongest > EXPONENT:
            self.block //= 2
        steps = torch.arange(chunk, device=w.device)
        self.to_r, self.r_power = self.powers(steps)  # P(t): what the state becomes until r_t reads it
        self.to_k, self.k_power = self.powers(chunk - 1 - steps)  # P(L-1-s): what k_s becomes until the chunk's end
        self.whole = torch.exp(chunk * self.log_d).to(dtype).unsqueeze(-1)  # (H, N, 1): P(L)
        middle = steps[: self.block] - self.block // 2
        self.block_r, self.block_r_power = self.powers(middle)
        self.block_k, self.block_k_power = self.powers(-1 - middle)

    def powers(self, n: Tensor) -> tuple[Tensor, Tensor]:
        """Exponents n (L,) -> n as (L, 1) and P(n) as (H, L, N), computed in float64."""
        n = n.to(self.log_d.dtype).unsqueeze(-1)
        return n.to(self.dtype), torch.exp(n * self.log_d.unsqueeze(1)).to(self.dtype)

    def inside(self) -> Iterator[Pairs]:
        """All pairs s < t of a chunk, each once."""
        h = self.L // 2
        while h >= self.block:
            tail = slice(self.L - h, None)
            left, right = self.k_power[:, None, tail], self.r_power[:, None, :h]  # (H, 1, h, N)
            yield Pairs(h, True, self.to_r[:h], right, self.to_k[tail], left)
            h //= 2
        if self.block > 1:
            r_power, k_power = self.block_r_power[:, None], self.block_k_power[:, None]
            yield Pairs(self.block, False, self.block_r, r_power, self.block_k, k_power)

    def load(self, x: Tensor) -> Tensor:
        """(b, T, h, N) -> contiguous (C, b, h, L, N) in the working dtype: chunks come one after the other, so that
        all of them, or all but one at an end, are one batch of matrices."""
        b, T, h, N = x.shape
        view = x.reshape(b, T // self.L, self.L, h, N).permute(1, 0, 3, 2, 4)
        return view.to(self.dtype, memory_format=torch.contiguous_format).contiguous()

    def store(self, into: Tensor, x: Tensor) -> None:
        """The way back: (C, b, h, L, N) into a slice (b, T, h, N) of the result."""
        into.unflatten(1, (-1, self.L)).copy_(x.permute(1, 0, 3, 2, 4))

    def states(self, kd: Tensor, v: Tensor, first: Tensor) -> Tensor:
        """The state at the start of each chunk and after the last: (C+1, b, h, N, N)."""
        C, b, h, _, N = v.shape
        S = v.new_empty(C + 1, b, h, N, N)
        S[0] = first
        product_(S[1:], kd.transpose(-1, -2), v)
        for before, after in pairwise(S.unbind()):
            after.addcmul_(before, self.whole)
        return S


def product_(out: Tensor, a: Tensor, b: Tensor, add: bool = False) -> None:
    """out = a b, or out += a b, for batches of matrices (..., n, m), (..., m, p), (..., n, p)."""
    if out.is_contiguous():
        out.flatten(0, -3).baddbmm_(a.flatten(0, -3), b.flatten(0, -3), beta=int(add))  # 0: out is not even read
    elif add:
        out.add_(a @ b)
    else:
        out.copy_(a @ b)
