"""A chunk of L steps worked off around its middle: the way for ordinary decays (for `chunked.py`).

With P(n) = d^n, m = L / 2 and t, s counted from the chunk's start, the factor of a pair splits in one for r and one
for k:

    P(t-1-s) = P(t-m) P(m-1-s),    r'_t = r_t P(t-m),    k'_s = k_s P(m-1-s)

A state S before the chunk is read with P(t) = P(t-m) P(m), so that r' reads E = P(m) S; and the state after it is
P(L) S + sum_s P(L-1-s) k_s v_s^T, that is E' = P(L) (E + sum_s k'_s v_s^T). So r' and k' are all that is needed:

    y = r' E + (A + D) v,   A = r' k'^T below the diagonal,   D_t = u d . r'_t k'_t on it (the step itself)

What it is not: safe for every decay. Factors grow to P(-m); `fits` says whether they stay below 5e8, with which
nothing is lost in float32 (unless r or k are beyond 1e29). `halving.py` is the way for the others.

*Derivatives.* With X the gradient of E, W that of E + sum k' v^T: X = W + r'^T gy, and W = P(L) X of the next chunk.
P(n) = exp(n l) with l = log d, so that n x g, summed up, goes to l for a factor x = r P(n) with gradient g. D brings
nothing to l: there the exponents of r', k' and u d add up to 0.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from .powers import EXPONENT, Powers, decay_share, product_

# The gradient of log d is a small difference of large n x g, as some n are negative: beyond this -log d it loses too
# many digits in float32. Only for chunks below 64 is it the narrower limit.
STRONG = 0.625


def fits(strongest: float, chunk: int) -> bool:
    """Whether chunks of this length may be worked off around their middles; strongest: the largest -log d there is."""
    return strongest <= min(STRONG, EXPONENT / ((chunk + 1) // 2))


class Middle(Powers):
    """Tensors r, k, v, gy and results are slices (b, T, h, N); u (h, N); states (b, h, N, N); S (C+1, b, h, N, N)."""

    def __init__(self, w: Tensor, chunk: int, dtype: torch.dtype):
        super().__init__(w, chunk, dtype)
        self.m = chunk // 2
        self.to_r, self.r_power = self.powers(self.steps - self.m)
        self.to_k, self.k_power = self.powers(self.m - 1 - self.steps)
        self.to_middle, self.from_middle, self.d = self.power(self.m), self.power(-self.m), self.power(1).squeeze(-1)

    def forward(self, r: Tensor, k: Tensor, v: Tensor, u: Tensor, first: Tensor, S: Tensor, y: Tensor) -> Tensor:
        """Fill S with E of each chunk and of the end, and y; returns the last state."""
        rp, kp, v = self.load(r, self.r_power), self.load(k, self.k_power), self.load(v)
        torch.mul(first, self.to_middle, out=S[0])
        product_(S[1:], kp.transpose(-1, -2), v)
        for before, after in pairwise(S.unbind()):
            after.add_(before).mul_(self.whole)
        out = rp @ S[:-1]
        A = (rp @ kp.transpose(-1, -2)).tril_(-1)
        _diagonal(A).copy_(rp.mul_(kp).mul_((u * self.d)[:, None]).sum(-1))
        product_(out, A, v, add=True)
        self.store(y, out)
        return S[-1] * self.from_middle

    def backward(
        self, r: Tensor, k: Tensor, v: Tensor, u: Tensor, S: Tensor, gy: Tensor, glast: Tensor,
        gr_to: Tensor, gk_to: Tensor, gv_to: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """Fill the last three; returns the gradients of log d and u (h, N), and of the first state."""
        rp, kp, v, gy = self.load(r, self.r_power), self.load(k, self.k_power), self.load(v), self.load(gy)
        X, W = torch.empty_like(S), torch.empty_like(S[1:])
        torch.mul(glast, self.from_middle, out=X[-1])
        product_(X[:-1], rp.transpose(-1, -2), gy)
        for (later, earlier), between in zip(pairwise(reversed(X.unbind())), reversed(W.unbind()), strict=True):
            earlier.add_(torch.mul(later, self.whole, out=between))
        grp, gkp, gv = gy @ S[:-1].transpose(-1, -2), v @ W.transpose(-1, -2), kp @ W
        gfirst = X[0] * self.to_middle
        ends = X.mul_(S).sum((1, 4))  # (C+1, h, N): of P(L) after each chunk, of P(m) and P(-m) at the two ends
        glog = self.L * ends[1:].sum(0) + self.m * (ends[0] - ends[-1])

        A, ud, rk = (rp @ kp.transpose(-1, -2)).tril_(-1), (u * self.d)[:, None], rp * kp
        _diagonal(A).copy_((rk * ud).sum(-1))
        product_(gv, A.transpose(-1, -2), gy, add=True)
        product_(A, gy, v.transpose(-1, -2))  # now the gradient of A + D
        gD = _diagonal(A).unsqueeze(-1).clone()
        A.tril_(-1)
        product_(grp, A, kp, add=True)
        product_(gkp, A.transpose(-1, -2), rp, add=True)
        glog += decay_share(self.to_r, rp, grp) + decay_share(self.to_k, kp, gkp)
        gu = rk.mul_(gD).sum((0, 1, 3)) * self.d
        gD = gD * ud
        grp.addcmul_(gD, kp)
        gkp.addcmul_(gD, rp)
        self.store(gr_to, grp, self.r_power)
        self.store(gk_to, gkp, self.k_power)
        self.store(gv_to, gv)
        return glog, gu, gfirst


def _diagonal(A: Tensor) -> Tensor:
    return A.diagonal(dim1=-2, dim2=-1)
