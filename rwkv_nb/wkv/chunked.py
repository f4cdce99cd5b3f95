"""The WKV-5 operator in chunks: matrix products instead of a loop over time, with the derivatives written out.

What it is not: a kernel. It is plain PyTorch and runs on every device; it equals `reference.py` up to rounding.

Time is cut in chunks of L steps. With P(n) = d^n (a number for each head and key channel), S the state at the
chunk's start, and positions t, s counted from there:

    y_t = sum_{s<t} (r_t . P(t-1-s) k_s) v_s  +  (r_t . u k_t) v_t  +  (r_t P(t)) S     inside, itself, before
    S'  = P(L) S + sum_s (P(L-1-s) k_s) v_s^T

Everything but S is a batched product over all chunks at once; only S is carried from chunk to chunk.

*Exponents.* "Inside" must split P(t-1-s) in a factor for r_t and one for k_s to become a product of matrices:
P(t-m) P(m-1-s) for some m. If s < m <= t both exponents are >= 0, both factors are <= 1, and nothing can overflow.
So each chunk is halved: pairs with s in the left and t in the right half take the boundary as m, and the two halves
are halved again. Halving stops at blocks so small that even the factors greater than 1 stay below exp(EXPONENT):
then m is the block's middle. Ordinary decays need no halving at all; for the strongest it goes down to
single steps, where no pair is left. No exponent is ever clamped.

*Derivatives.* P(n) = exp(n l) with l = -exp(w), so a factor x = r P(n) with gradient g gives g P(n) to r and n x g to
l; and dl/dw = l. No division by d, which may be zero in float32.

Source: the equation as in `reference.py`; gradients checked against it in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .reference import working_dtype

CHUNK = 32  # L: the longer, the fewer states to carry and the more work inside
EXPONENT = 20.0  # exp(20) = 5e8: factors up to this size lose nothing in float32
SLICE = 1 << 19  # numbers of one tensor worked on at a time: stays in the cache, and big temporaries never appear


class _Pairs(NamedTuple):
    """Some of the pairs s < t of a chunk, in groups of h steps; the factors of P(t-1-s) for r_t and for k_s."""

    h: int
    halves: bool  # t in the right half of 2 h steps, s in the left; else both in one block of h
    r_exponent: Tensor
    r_power: Tensor
    k_exponent: Tensor
    k_power: Tensor

    def later(self, x: Tensor) -> Tensor:
        """The steps t of x (b, H, C, L, N), as a view (b, H, groups, h, N)."""
        return self._view(x)[:, :, :, 1] if self.halves else self._view(x)

    def earlier(self, x: Tensor) -> Tensor:
        """The steps s."""
        return self._view(x)[:, :, :, 0] if self.halves else self._view(x)

    def only(self, A: Tensor) -> Tensor:
        """Keep s < t alone in A[t, s]; between halves that is everything."""
        return A if self.halves else A.tril_(-1)

    def _view(self, x: Tensor) -> Tensor:
        b, H, C, L, N = x.shape
        split = (C * L // (2 * self.h), 2, self.h) if self.halves else (C * L // self.h, self.h)
        return x.view(b, H, *split, N)


class _Chunks:
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
        """Exponents n (L,) -> n as (L, 1) and P(n) as (H, 1, L, N), computed in float64."""
        n = n.to(self.log_d.dtype).unsqueeze(-1)
        return n.to(self.dtype), torch.exp(n * self.log_d.unsqueeze(1)).to(self.dtype).unsqueeze(1)

    def inside(self) -> Iterator[_Pairs]:
        """All pairs s < t of a chunk, each once."""
        h = self.L // 2
        while h >= self.block:
            tail = slice(self.L - h, None)
            yield _Pairs(h, True, self.to_r[:h], self.r_power[:, :, :h], self.to_k[tail], self.k_power[:, :, tail])
            h //= 2
        if self.block > 1:
            yield _Pairs(self.block, False, self.block_r, self.block_r_power, self.block_k, self.block_k_power)

    def load(self, x: Tensor) -> Tensor:
        """(b, T, h, N) -> contiguous (b, h, C, L, N) in the working dtype."""
        b, T, h, N = x.shape
        view = x.reshape(b, T // self.L, self.L, h, N).permute(0, 3, 1, 2, 4)
        return view.to(self.dtype, memory_format=torch.contiguous_format).contiguous()

    def store(self, into: Tensor, x: Tensor) -> None:
        """The way back: (b, h, C, L, N) into a slice (b, T, h, N) of the result."""
        into.unflatten(1, (-1, self.L)).copy_(x.permute(0, 2, 3, 1, 4))

    def states(self, kd: Tensor, v: Tensor, first: Tensor) -> Tensor:
        """The state at the start of each chunk and after the last: (b, h, C+1, N, N)."""
        b, h, C, L, N = v.shape
        S = v.new_empty(b, h, C + 1, N, N)
        S[:, :, 0] = first
        S[:, :, 1:] = kd.transpose(-1, -2) @ v
        for c in range(C):
            S[:, :, c + 1].addcmul_(S[:, :, c], self.whole)
        return S


def _slices(w: Tensor, B: int, T: int, chunk: int, dtype: torch.dtype) -> Iterator[tuple[_Chunks, slice, slice]]:
    """Cut batch and heads in slices of about SLICE numbers."""
    H, N = w.shape
    heads = max(1, min(H, SLICE // max(1, T * N)))
    rows = max(1, min(B, SLICE // max(1, T * N * H))) if heads == H else 1
    for h in range(0, H, heads):
        chunks = _Chunks(w[h : h + heads], chunk, dtype)
        for b in range(0, B, rows):
            yield chunks, slice(b, b + rows), slice(h, h + heads)


def _forward(c: _Chunks, r: Tensor, k: Tensor, v: Tensor, u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """One slice, inputs from `load`; u (h, N); first (b, h, N, N) -> y and the last state."""
    S = c.states(k * c.k_power, v, first)
    y = (r * c.r_power) @ S[:, :, :-1]  # what was there before the chunk
    y.addcmul_((r * k * u[:, None, None]).sum(-1, keepdim=True), v)  # the step itself
    for p in c.inside():
        A = p.only((p.later(r) * p.r_power) @ (p.earlier(k) * p.k_power).transpose(-1, -2))
        p.later(y).add_(A @ p.earlier(v))
    return y, S[:, :, -1]


def _backward(c: _Chunks, r, k, v, u, first, gy, glast):
    """Gradients of one slice: gr, gk, gv as from `load`; of log d and u (h, N); of the first state."""
    rd, kd = r * c.r_power, k * c.k_power
    S = c.states(kd, v, first)
    # Q[c]: gradient of the state after chunk c; carried from the last chunk to the first.
    Q = torch.empty_like(S)
    Q[:, :, -1] = glast
    Q[:, :, :-1] = rd.transpose(-1, -2) @ gy
    for i in range(S.shape[2] - 2, -1, -1):
        Q[:, :, i].addcmul_(Q[:, :, i + 1], c.whole)
    gfirst, Q = Q[:, :, 0], Q[:, :, 1:]
    S = S[:, :, :-1]

    gv = kd @ Q
    gr = (gy @ S.transpose(-1, -2)).mul_(c.r_power)
    gk = (v @ Q.transpose(-1, -2)).mul_(c.k_power)
    glog = c.L * (c.whole.squeeze(-1) * torch.einsum("bhcji,bhcji->hj", S, Q))
    glog += _decay_share(c.to_r, r, gr) + _decay_share(c.to_k, k, gk)

    for p in c.inside():
        rt, ks, gyt = p.later(r), p.earlier(k), p.later(gy)
        rp, kp = rt * p.r_power, ks * p.k_power
        A = p.only(rp @ kp.transpose(-1, -2))
        gA = p.only(gyt @ p.earlier(v).transpose(-1, -2))
        p.earlier(gv).add_(A.transpose(-1, -2) @ gyt)
        grt = (gA @ kp).mul_(p.r_power)
        gks = (gA.transpose(-1, -2) @ rp).mul_(p.k_power)
        glog += _decay_share(p.r_exponent, rt, grt) + _decay_share(p.k_exponent, ks, gks)
        p.later(gr).add_(grt)
        p.earlier(gk).add_(gks)

    gdiag = (gy * v).sum(-1, keepdim=True)  # gradient of r_t . u k_t
    gv.addcmul_((r * k * u[:, None, None]).sum(-1, keepdim=True), gy)
    gu = (r * k * gdiag).sum((0, 2, 3))
    gdiag = gdiag * u[:, None, None]
    gr.addcmul_(gdiag, k)
    gk.addcmul_(gdiag, r)
    return gr, gk, gv, glog, gu, gfirst


def _decay_share(exponents: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """sum of n x g over batch, blocks and steps: (b, h, X, L, N) -> (h, N)."""
    return ((x * g).sum((0, 2)) * exponents).sum(1)


class _WKV5(torch.autograd.Function):
    """T is a multiple of `chunk`, a power of two; state is a float32 or float64 tensor."""

    @staticmethod
    def forward(ctx, r, k, v, w, u, state, chunk):
        dtype = state.dtype
        y, last = torch.empty_like(r, memory_format=torch.contiguous_format), torch.empty_like(state)
        for c, bs, hs in _slices(w, r.shape[0], r.shape[1], chunk, dtype):
            loaded = [c.load(x[bs, :, hs]) for x in (r, k, v)]
            ys, last[bs, hs] = _forward(c, *loaded, u[hs].to(dtype), state[bs, hs])
            c.store(y[bs, :, hs], ys)
        ctx.save_for_backward(r, k, v, w, u, state)  # states of the chunks are computed again: less memory
        ctx.chunk = chunk
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, glast):
        with torch.autocast(gy.device.type, enabled=False):  # as in the forward pass, wherever backward is called
            return *_gradients(*ctx.saved_tensors, gy, glast, ctx.chunk), None


def _gradients(r, k, v, w, u, state, gy, glast, chunk):
    dtype = state.dtype
    gr, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v))
    gw, gu = torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(u, dtype=dtype)
    gstate = torch.empty_like(state)
    for c, bs, hs in _slices(w, r.shape[0], r.shape[1], chunk, dtype):
        loaded = [c.load(x[bs, :, hs]) for x in (r, k, v)]
        grs, gks, gvs, glogs, gus, gstate[bs, hs] = _backward(
            c, *loaded, u[hs].to(dtype), state[bs, hs], c.load(gy[bs, :, hs]), glast[bs, hs]
        )
        for into, x in ((gr, grs), (gk, gks), (gv, gvs)):
            c.store(into[bs, :, hs], x)
        gw[hs] += glogs.double() * c.log_d
        gu[hs] += gus
    return gr, gk, gv, gw.to(w.dtype), gu.to(u.dtype), gstate


def wkv5_chunked(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The operator in chunks. Shapes and dtypes as in `rwkv_nb.wkv.wkv5`; `chunk` is a power of two.

    A length that is no multiple of the chunk is finished with chunks of half the length, a quarter, and so on.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"wkv5_chunked: chunk = {chunk} is not a power of two; use 16, 32 or 64")
    B, T, H, N = r.shape
    dtype = working_dtype(r, k, v)
    state = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    ys, done = [], 0
    while done < T:
        while chunk > T - done:
            chunk //= 2
        end = T - (T - done) % chunk
        part = (x if end - done == T else x[:, done:end] for x in (r, k, v))
        y, state = _WKV5.apply(*part, w, u, state, chunk)
        ys.append(y)
        done = end
    if len(ys) == 1:
        return ys[0], state
    return (torch.cat(ys, dim=1) if ys else r.clone()), state
