"""The WKV-5 operator as its equation: one loop over time, derivatives by autograd.

`wkv5_reference` is the definition that everything faster is measured against. It is slow in training (autograd keeps
every intermediate state) and quick enough for one step of generation, where T = 1. Below it, the same loop as a backend
of `operator.py`.

One head has a state S, a matrix of N keys by N values. With key channel j and value channel i:

    y_t[i]  =  sum_j  r_t[j] (S_t[j, i] + u[j] k_t[j] v_t[i])
    S_t+1[j, i]  =  d[j] S_t[j, i] + k_t[j] v_t[i]            d = exp(-exp(w)), between 0 and 1

Source: "Eagle and Finch" (arXiv 2404.05892), section 4; the official kernel `wkv5_cuda.cu`.
"""

from __future__ import annotations

import torch
from torch import Tensor

LARGEST_W = 20.0  # exp(-exp(20)) is 0, even in float64: a larger w changes nothing, but its exp may be infinite


def working_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any input is float64, else float32: the operator never computes in half precision."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def zeros_if_none(state: Tensor | None, r: Tensor) -> Tensor:
    """`state`, or the zeros (B, H, N, N) that None stands for."""
    B, _, H, N = r.shape
    return r.new_zeros(B, H, N, N, dtype=working_dtype(r)) if state is None else state


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


def why_not(device: object = None) -> None:
    """Always available."""


def supports(N: int) -> None:
    """Any head size."""


def saved_shape(B: int, T: int, H: int, N: int) -> tuple[int, ...]:
    """Nothing is kept: the loop runs again for the derivatives."""
    return (0,)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y and the last state."""
    with torch.no_grad():
        return wkv5_reference(r, k, v, w, u, state)


def backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object,
    gy: Tensor, glast: Tensor,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all six inputs, by the chain rule from the last step to the first.

    With Q_t the gradient of the state after step t: Q_t-1[j, i] = d[j] Q_t[j, i] + r_t[j] gy_t[i].
    """
    state, glast, dtype = zeros_if_none(state, r), zeros_if_none(glast, r), working_dtype(r)
    log_d = -torch.exp(w)
    d, up = torch.exp(log_d).unsqueeze(-1), u.unsqueeze(-1)  # (H, N, 1)
    rows = [[x[:, t].to(dtype) for x in (r, k, v, gy)] for t in range(r.shape[1])]  # each (B, H, N)
    states = [state]
    for _, k_t, v_t, _ in rows[:-1]:
        states.append(d * states[-1] + k_t.unsqueeze(-1) * v_t.unsqueeze(-2))
    gr, gk, gv = (torch.empty_like(x) for x in (r, k, v))
    gd, gu, Q = torch.zeros_like(w), torch.zeros_like(u), glast
    for t in reversed(range(len(rows))):
        (r_t, k_t, v_t, gy_t), S = rows[t], states[t]
        same = (v_t * gy_t).sum(-1, keepdim=True)  # (B, H, 1): of the step's own term r_t . u k_t
        gr[:, t] = (S @ gy_t.unsqueeze(-1)).squeeze(-1) + u * k_t * same
        gk[:, t] = (Q @ v_t.unsqueeze(-1)).squeeze(-1) + u * r_t * same
        gv[:, t] = (Q + up * r_t.unsqueeze(-1) * gy_t.unsqueeze(-2)).mul(k_t.unsqueeze(-1)).sum(-2)
        gu += (r_t * k_t * same).sum(0)
        gd += (S * Q).sum((0, -1))
        Q = d * Q + r_t.unsqueeze(-1) * gy_t.unsqueeze(-2)
    return gr, gk, gv, gd * d.squeeze(-1) * log_d, gu, Q
