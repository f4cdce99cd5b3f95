"""The WKV-5 operator in chunks: matrix products instead of a loop over time, with the derivatives written out.

What it is not: a kernel. It is plain PyTorch and runs on every device; it equals `reference.py` up to rounding.

Time is cut in chunks of L steps. With P(n) = d^n (a number for each head and key channel), S the state at the
chunk's start, and positions t, s counted from there:

    y_t = sum_{s<t} (r_t . P(t-1-s) k_s) v_s  +  (r_t . u k_t) v_t  +  (r_t P(t)) S     inside, itself, before
    S'  = P(L) S + sum_s (P(L-1-s) k_s) v_s^T

Everything but S is a batched product over all chunks at once; only S is carried from chunk to chunk. "Inside" becomes a
product of matrices when P(t-1-s) is split in a factor for r_t and one for k_s. Where, so that no factor overflows, is
the question that `middle.py` (ordinary decays) and `halving.py` (any decay) answer; here a call is cut in pieces for
them: parts of the time with chunks of one length, and slices of batch and heads that fit the cache.

Source: the equation as in `reference.py`; gradients checked against it in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .halving import Halving
from .middle import Middle, fits
from .powers import has_float64, in_float64
from .precision import exact_products
from .reference import LARGEST_W, working_dtype, zeros_if_none

CHUNK = 64  # L: the longer, the fewer states to carry and the more work inside
SLICE = 1 << 18  # numbers of one tensor worked on at a time: stays in the cache, and big temporaries never appear


def parts(T: int, chunk: int = CHUNK) -> list[tuple[int, int, int]]:
    """Cut T steps in (start, end, chunk length): whole chunks, then halves, quarters, ..."""
    found, done = [], 0
    while done < T:
        while chunk > T - done:
            chunk //= 2
        found.append((done, T - (T - done) % chunk, chunk))
        done = found[-1][1]
    return found


def why_not(device: object = None) -> None:
    """Always available."""


def supports(N: int) -> None:
    """Any head size."""


def saved_shape(B: int, T: int, H: int, N: int, chunk: int = CHUNK) -> tuple[int, ...]:
    """What `forward` keeps for `backward`: for each slice what its way wants to have, C + 1 states for C chunks of a
    part. They lie there slice by slice."""
    return (sum((end - start) // length + 1 for start, end, length in parts(T, chunk)), B, H, N, N)


def _strongest(w: Tensor) -> list[float]:
    """The largest -log d of each head; asked of a GPU once."""
    return torch.exp(in_float64(w)).amax(1).tolist()


def _pieces(w: Tensor, shape: tuple[int, ...], dtype: torch.dtype, saved: Tensor | None, chunk: int) -> Iterator[tuple]:
    """The pieces of a call, (way, (batch, time, heads), room for C + 1 states), each part in a list.

    Without `saved` the pieces of a part share one room, which each may use while it is worked off.
    """
    B, T, H, N = shape
    first, strongest = 0, _strongest(w.detach()) if N else [0.0] * H
    for start, end, length in parts(T, chunk):
        n = (end - start) // length + 1
        heads = max(1, min(H, SLICE // max(1, (end - start) * N)))
        rows = max(1, min(B, SLICE // max(1, (end - start) * N * H))) if heads == H else 1
        most = n * heads * rows * N * N
        room = w.new_empty(most, dtype=dtype) if saved is None else saved[first : first + n].view(-1)
        found, used = [], 0
        for h in range(0, H, heads):
            mine, fastest = w[h : h + heads], max(strongest[h : h + heads])
            way = Middle(mine, length, dtype) if fits(fastest, length) else Halving(mine, length, dtype, fastest)
            for b in range(0, B, rows):
                size = (n, min(rows, B - b), len(mine), N, N)
                S = room[used : used + math.prod(size)].view(size)
                used += S.numel() if saved is not None else 0
                found.append((way, (slice(b, b + rows), slice(start, end), slice(h, h + heads)), S))
        first += n
        yield found


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object = None, chunk: int = CHUNK,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the last state; state in the working dtype, None for zeros; fills `saved` if there is one."""
    y, state = torch.empty_like(r, memory_format=torch.contiguous_format), zeros_if_none(state, r)
    for part in _pieces(w, r.shape, state.dtype, saved, chunk):
        last = torch.empty_like(state)
        for way, here, S in part:
            rows, _, heads = here
            us = u[heads].to(state.dtype)
            last[rows, heads] = way.forward(r[here], k[here], v[here], us, state[rows, heads], S, y[here])
        state = last
    return y, state


def backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object,
    gy: Tensor, glast: Tensor, chunk: int = CHUNK,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all six inputs, in the order of the arguments."""
    gr, gk, gv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (r, k, v))
    dtype = saved.dtype
    glast = zeros_if_none(glast, r).to(dtype)
    wide = torch.float64 if has_float64(w.device) else dtype
    gw, gu = torch.zeros_like(w, dtype=wide), torch.zeros_like(u, dtype=dtype)
    for part in reversed(list(_pieces(w, r.shape, dtype, saved, chunk))):
        gfirst = torch.empty_like(glast)
        for way, here, S in part:
            rows, _, heads = here
            given = [x[here] for x in (r, k, v)]
            glog, gus, gfirst[rows, heads] = way.backward(
                *given, u[heads].to(dtype), S, gy[here], glast[rows, heads], gr[here], gk[here], gv[here]
            )
            gw[heads] += glog.to(wide) * way.log_d.to(wide).to(w.device)  # d l / d w = l
            gu[heads] += gus
        glast = gfirst
    return gr, gk, gv, gw.to(w.dtype), gu.to(u.dtype), glast


class _WKV5(torch.autograd.Function):
    @staticmethod
    def forward(ctx, r, k, v, w, u, state, chunk):
        saved = state.new_empty(saved_shape(*r.shape, chunk))
        ctx.chunk = chunk
        with torch.autocast(r.device.type, enabled=False), exact_products():  # else factors would be rounded
            y, last = forward(r, k, v, w, u, state, saved, chunk)
        ctx.save_for_backward(r, k, v, w, u, state, saved)
        return y, last if last is not state else state.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, gy, glast):
        with torch.autocast(gy.device.type, enabled=False), exact_products():  # wherever backward is called
            return *backward(*ctx.saved_tensors, gy, glast, ctx.chunk), None


def wkv5_chunked(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None, *, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """The operator in chunks, for any T. Shapes and dtypes as in `rwkv_nb.wkv.wkv5`; `chunk` is a power of two.

    For the derivatives a state is kept for each chunk: N N / chunk numbers a step and head.
    """
    if chunk < 1 or chunk & (chunk - 1):
        raise ValueError(f"wkv5_chunked: chunk = {chunk} is not a power of two; use 16, 32 or 64")
    B, _, H, N = r.shape
    dtype = working_dtype(r, k, v)
    state = r.new_zeros(B, H, N, N, dtype=dtype) if state is None else state.to(dtype)
    return _WKV5.apply(r, k, v, w.clamp(max=LARGEST_W), u, state, chunk)
