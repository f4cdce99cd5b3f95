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
are halved again. Halving stops at blocks so small that even the factors greater than 1 stay below 5e8 (`powers.py`):
then m is the block's middle. Ordinary decays need no halving at all; for the strongest it goes down to
single steps, where no pair is left. No exponent is ever clamped.

*Derivatives.* P(n) = exp(n l) with l = -exp(w), so a factor x = r P(n) with gradient g gives g P(n) to r and n x g to
l; and dl/dw = l. No division by d, which may be zero in float32.

Source: the equation as in `reference.py`; gradients checked against it in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .powers import Powers, product_
from .reference import working_dtype, zeros_if_none

CHUNK = 64  # L: the longer, the fewer states to carry and the more work inside
SLICE = 1 << 18  # numbers of one tensor worked on at a time: stays in the cache, and big temporaries never appear


def _slices(w: Tensor, B: int, T: int, chunk: int, dtype: torch.dtype) -> Iterator[tuple[Powers, slice, slice]]:
    """Cut batch and heads in slices of about SLICE numbers."""
    H, N = w.shape
    heads = max(1, min(H, SLICE // max(1, T * N)))
    rows = max(1, min(B, SLICE // max(1, T * N * H))) if heads == H else 1
    for h in range(0, H, heads):
        chunks = Powers(w[h : h + heads], chunk, dtype)
        for b in range(0, B, rows):
            yield chunks, slice(b, b + rows), slice(h, h + heads)


def _forward(c: Powers, r: Tensor, k: Tensor, v: Tensor, u: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
    """One slice, inputs from `load`; u (h, N); first (b, h, N, N) -> y and the last state."""
    S = c.states(k * c.k_power, v, first)
    y = (r * c.r_power) @ S[:-1]  # what was there before the chunk
    y.addcmul_((r * k * u[:, None]).sum(-1, keepdim=True), v)  # the step itself
    for p in c.inside():
        A = p.only((p.later(r) * p.r_power) @ (p.earlier(k) * p.k_power).transpose(-1, -2))
        product_(p.later(y), A, p.earlier(v), add=True)
    return y, S[-1]


def _backward(c: Powers, r, k, v, u, first, gy, glast):
    """Gradients of one slice: gr, gk, gv as from `load`; of log d and u (h, N); of the first state."""
    rd, kd = r * c.r_power, k * c.k_power
    S = c.states(kd, v, first)
    # Q[c]: gradient of the state after chunk c; carried from the last chunk to the first.
    Q = torch.empty_like(S)
    Q[-1] = glast
    product_(Q[:-1], rd.transpose(-1, -2), gy)
    for after, before in pairwise(reversed(Q.unbind())):
        before.addcmul_(after, c.whole)
    gfirst, S, Q = Q[0], S[:-1], Q[1:]

    gv = kd @ Q
    gr = (gy @ S.transpose(-1, -2)).mul_(c.r_power)
    gk = (v @ Q.transpose(-1, -2)).mul_(c.k_power)
    glog = c.L * (c.whole.squeeze(-1) * (S * Q).sum((0, 1, 4)))
    glog += _decay_share(c.to_r, r, gr) + _decay_share(c.to_k, k, gk)

    for p in c.inside():
        rp, kp, gyt = p.later(r) * p.r_power, p.earlier(k) * p.k_power, p.later(gy)
        A = p.only(rp @ kp.transpose(-1, -2))
        gA = p.only(gyt @ p.earlier(v).transpose(-1, -2))
        product_(p.earlier(gv), A.transpose(-1, -2), gyt, add=True)
        grp, gkp = gA @ kp, gA.transpose(-1, -2) @ rp
        glog += _decay_share(p.r_exponent, rp, grp) + _decay_share(p.k_exponent, kp, gkp)
        p.later(gr).addcmul_(grp, p.r_power)
        p.earlier(gk).addcmul_(gkp, p.k_power)

    gdiag = (gy * v).sum(-1, keepdim=True)  # gradient of r_t . u k_t
    rk = r * k
    gv.addcmul_((rk * u[:, None]).sum(-1, keepdim=True), gy)
    gu = rk.mul_(gdiag).sum((0, 1, 3))
    gdiag = gdiag * u[:, None]
    gr.addcmul_(gdiag, k)
    gk.addcmul_(gdiag, r)
    return gr, gk, gv, glog, gu, gfirst


def _decay_share(exponents: Tensor, x: Tensor, g: Tensor) -> Tensor:
    """sum of n x g over all but (h, N): of (C, b, h, L, N), or of groups of pairs (C, b, h, groups, L, N)."""
    return ((x * g).sum((0, 1, 3) if x.dim() == 6 else (0, 1)) * exponents).sum(1)


def parts(T: int, chunk: int = CHUNK) -> list[tuple[int, int, int]]:
    """Cut T steps in (start, end, chunk length): whole chunks, then halves, quarters, ..."""
    found, done = [], 0
    while done < T:
        while chunk > T - done:
            chunk //= 2
        found.append((done, T - (T - done) % chunk, chunk))
        done = found[-1][1]
    return found


def why_not() -> None:
    """Always available."""


def supports(N: int) -> None:
    """Any head size."""


def saved_shape(B: int, T: int, H: int, N: int) -> tuple[int, ...]:
    """What `forward` keeps for `backward`: the state at the start of each part."""
    return (len(parts(T)), B, H, N, N)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object = None, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the last state; state in the working dtype, None for zeros; fills `saved` if there is one."""
    y, state = torch.empty_like(r, memory_format=torch.contiguous_format), zeros_if_none(state, r)
    for i, (start, end, length) in enumerate(parts(r.shape[1], chunk)):
        if saved is not None:
            saved[i] = state
        last = torch.empty_like(state)
        for c, bs, hs in _slices(w, r.shape[0], end - start, length, state.dtype):
            loaded = [c.load(x[bs, start:end, hs]) for x in (r, k, v)]
            ys, last[bs, hs] = _forward(c, *loaded, u[hs].to(state.dtype), state[bs, hs])
            c.store(y[bs, start:end, hs], ys)
        state = last
    return y, state


def backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object,
    gy: Tensor, glast: Tensor, chunk: int = CHUNK,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all six inputs, in the order of the arguments."""
    gr, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v))
    glast, dtype = zeros_if_none(glast, r), working_dtype(r)
    gw, gu = torch.zeros_like(w, dtype=torch.float64), torch.zeros_like(u, dtype=dtype)
    for first, (start, end, length) in reversed(list(zip(saved, parts(r.shape[1], chunk), strict=True))):
        gfirst = torch.empty_like(glast)
        for c, bs, hs in _slices(w, r.shape[0], end - start, length, dtype):
            mine = (bs, slice(start, end), hs)
            loaded = [c.load(x[mine]) for x in (r, k, v)]
            *gs, glog, gus, gfirst[bs, hs] = _backward(
                c, *loaded, u[hs].to(dtype), first[bs, hs], c.load(gy[mine]), glast[bs, hs]
            )
            for into, x in zip((gr, gk, gv), gs, strict=True):
                c.store(into[mine], x)
            gw[hs] += glog.double() * c.log_d
            gu[hs] += gus
        glast = gfirst
    return gr, gk, gv, gw.to(w.dtype), gu.to(u.dtype), glast


class _WKV5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, w, u, state, chunk):
        saved = state.new_empty(len(parts(r.shape[1], chunk)), *state.shape)
        ctx.chunk = chunk
        y, last = forward(r, k, v, w, u, state, saved, chunk)
        ctx.save_for_backward(r, k, v, w, u, state, saved)
        return y, last if last is not state else state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, glast):
        with torch.autocast(gy.device.type, enabled=False):  # as in the forward pass, wherever backward is called
            return *backward(*ctx.saved_tensors, gy, glast, ctx.chunk), None


def wkv5_chunked(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The operator in chunks, for any T. Shapes and dtypes as in `rwkv_nb.wkv.wkv5`; `chunk` is a power of two."""
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"wkv5_chunked: chunk = {chunk} is not a power of two; use 16, 32 or 64")
    B, _, H, N = r.shape
    dtype = working_dtype(r, k, v)
    state = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    return _WKV5.apply(r, k, v, w, u, state, chunk)
