"""A chunk of L steps halved again and again: the way for decays that are too strong for `middle.py` (for `chunked.py`).

With P(n) = d^n, S the state at the chunk's start, and positions t, s counted from there:

    y_t = sum_{s<t} (r_t . P(t-1-s) k_s) v_s  +  (r_t . u k_t) v_t  +  (r_t P(t)) S     inside, itself, before
    S'  = P(L) S + sum_s (P(L-1-s) k_s) v_s^T

"Inside" must split P(t-1-s) in a factor for r_t and one for k_s to become a product of matrices: P(t-m) P(m-1-s) for
some m. If s < m <= t both exponents are >= 0, both factors are <= 1, and nothing can overflow. So each chunk is halved:
pairs with s in the left and t in the right half take the boundary as m, and the two halves are halved again. Halving
stops at blocks so small that even factors greater than 1 stay below 5e8: then m is the block's middle. For the
strongest decays it goes down to single steps, where no pair is left. No exponent is ever clamped.

*Derivatives.* P(n) = exp(n l) with l = log d, so a factor x = r P(n) with gradient g gives g P(n) to r and n x g to l.
No division by d, which may be zero in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from .powers import EXPONENT, Powers, decay_share, product_


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


class Halving(Powers):
    """Tensors r, k, v, gy and results are slices (b, T, h, N); u (h, N); states (b, h, N, N); S (C+1, b, h, N, N)."""

    def __init__(self, w: Tensor, chunk: int, dtype: torch.dtype, strongest: float):
        super().__init__(w, chunk, dtype)
        self.block = chunk
        while self.block > 1 and self.block // 2 * strongest > EXPONENT:
            self.block //= 2
        self.to_r, self.r_power = self.powers(self.steps)  # P(t): what the state becomes until r_t reads it
        self.to_k, self.k_power = self.powers(chunk - 1 - self.steps)  # P(L-1-s): k_s until the chunk's end
        middle = self.steps[: self.block] - self.block // 2
        self.block_r, self.block_r_power = self.powers(middle)
        self.block_k, self.block_k_power = self.powers(-1 - middle)

    def forward(self, r: Tensor, k: Tensor, v: Tensor, u: Tensor, first: Tensor, S: Tensor, y: Tensor) -> Tensor:
        """Fill S with the state at the start of each chunk and at the end, and y; returns the last state."""
        r, k, v = self.load(r), self.load(k), self.load(v)
        S[0] = first
        product_(S[1:], (k * self.k_power).transpose(-1, -2), v)
        for before, after in pairwise(S.unbind()):
            after.addcmul_(before, self.whole)
        out = (r * self.r_power) @ S[:-1]  # what was there before the chunk
        out.addcmul_((r * k * u[:, None]).sum(-1, keepdim=True), v)  # the step itself
        for p in self.inside():
            A = p.only((p.later(r) * p.r_power) @ (p.earlier(k) * p.k_power).transpose(-1, -2))
            product_(p.later(out), A, p.earlier(v), add=True)
        self.store(y, out)
        return S[-1]

    def backward(
        self, r: Tensor, k: Tensor, v: Tensor, u: Tensor, S: Tensor, gy: Tensor, glast: Tensor,
        gr_to: Tensor, gk_to: Tensor, gv_to: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Fill the last three; returns the gradients of log d and u (h, N), and of the first state."""
        r, k, v, gy = (self.load(x) for x in (r, k, v, gy))
        rd, kd = r * self.r_power, k * self.k_power
        # Q[c]: gradient of the state after chunk c; carried from the last chunk to the first.
        Q = torch.empty_like(S)
        Q[-1] = glast
        product_(Q[:-1], rd.transpose(-1, -2), gy)
        for after, before in pairwise(reversed(Q.unbind())):
            before.addcmul_(after, self.whole)
        gfirst, S, Q = Q[0], S[:-1], Q[1:]

        gv = kd @ Q
        gr = (gy @ S.transpose(-1, -2)).mul_(self.r_power)
        gk = (v @ Q.transpose(-1, -2)).mul_(self.k_power)
        glog = self.L * (self.whole.squeeze(-1) * (S * Q).sum((0, 1, 4)))
        glog += decay_share(self.to_r, r, gr) + decay_share(self.to_k, k, gk)

        for p in self.inside():
            rp, kp, gyt = p.later(r) * p.r_power, p.earlier(k) * p.k_power, p.later(gy)
            A = p.only(rp @ kp.transpose(-1, -2))
            gA = p.only(gyt @ p.earlier(v).transpose(-1, -2))
            product_(p.earlier(gv), A.transpose(-1, -2), gyt, add=True)
            grp, gkp = gA @ kp, gA.transpose(-1, -2) @ rp
            glog += decay_share(p.r_exponent, rp, grp) + decay_share(p.k_exponent, kp, gkp)
            p.later(gr).addcmul_(grp, p.r_power)
            p.earlier(gk).addcmul_(gkp, p.k_power)

        gdiag = (gy * v).sum(-1, keepdim=True)  # gradient of r_t . u k_t
        rk = r * k
        gv.addcmul_((rk * u[:, None]).sum(-1, keepdim=True), gy)
        gu = rk.mul_(gdiag).sum((0, 1, 3))
        gdiag = gdiag * u[:, None]
        gr.addcmul_(gdiag, k)
        gk.addcmul_(gdiag, r)
        for into, x in ((gr_to, gr), (gk_to, gk), (gv_to, gv)):
            self.store(into, x)
        return glog, gu, gfirst

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
