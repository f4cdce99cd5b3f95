"""The WKV-5 operator as its equation: one loop over time, derivatives by autograd.

This is the definition that everything faster is measured against. It is slow in training (autograd keeps every
intermediate state) and quick enough for one step of generation, where T = 1.

One head has a state S, a matrix of N keys by N values. With key channel j and value channel i:

    y_t[i]  =  sum_j  r_t[j] (S_t[j, i] + u[j] k_t[j] v_t[i])
    S_t+1[j, i]  =  d[j] S_t[j, i] + k_t[j] v_t[i]            d = exp(-exp(w)), between 0 and 1

Source: "Eagle and Finch" (arXiv 2404.05892), section 4; the official kernel `wkv5_cuda.cu`.
"""

from __future__ import annotations

import torch
from torch import Tensor


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32: the operator never computes in half precision."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def wkv5_reference(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The loop. Shapes and dtypes as in `rwkv_nb.wkv.wkv5`."""
    B, T, H, N = r.shape
    out_dtype, dtype = r.dtype, working_dtype(r, k, v)
    r, k, v = r.to(dtype), k.to(dtype), v.to(dtype)
    d = torch.exp(-torch.exp(w.to(dtype))).unsqueeze(-1)  # (H, N, 1): one decay a key channel
    u = u.to(dtype).unsqueeze(-1)  # (H, N, 1)
    S = r.new_zeros(B, H, N, N) if state is None else state.to(dtype)  # (B, H, N, N): [key, value]
    ys = []
    for t in range(T):
        kv = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)  # (B, H, N, N)
        ys.append((r[:, t].unsqueeze(-2) @ (S + u * kv)).squeeze(-2))  # (B, H, N)
        S = d * S + kv
    y = torch.stack(ys, dim=1) if T > 0 else r.clone()  # (B, T, H, N)
    return y.to(out_dtype), S
