"""The WKV-5 operator (notebooks 04 and 05): one function, several ways to compute it, the same numbers.

`wkv5` is the only name the rest of the package uses. `reference` is the equation as a loop, `chunked` the same as
matrix products. Nothing is compiled or chosen at import.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import wkv5_chunked
from .reference import wkv5_reference

__all__ = ["backends", "wkv5", "wkv5_chunked", "wkv5_reference"]

_BACKENDS = {"reference": wkv5_reference, "chunked": wkv5_chunked}


def backends() -> dict[str, str]:
    """Name of each way to compute `wkv5` -> "available", or why it is not."""
    return dict.fromkeys(_BACKENDS, "available")


def wkv5(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    *,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Run the WKV-5 recurrence over T steps.

    Args:
        r, k, v: (B, T, H, N) receptance, key, value; float32, float64, bfloat16 or float16. T may be 0.
        w: (H, N) the raw `time_decay`; the decay of a step is exp(-exp(w)).
        u: (H, N) the bonus of the current step, `time_faaaa`.
        state: (B, H, N, N) as [key, value], the state before the first step; None means zeros. Never changed.
        backend: one of `backends()`, or "auto": the loop for a single step, chunks for more.

    Returns:
        y (B, T, H, N) in the dtype of r, and the state after the last step (B, H, N, N). All arithmetic and the
        state are float32 (float64 if r, k or v is), under autocast too. Differentiable in all six tensors.

    Raises:
        ValueError: a shape does not fit, or the backend is unknown.
    """
    if r.dim() != 4 or k.shape != r.shape or v.shape != r.shape:
        raise ValueError(
            f"wkv5: r, k, v must share one shape (B, T, H, N), got {tuple(r.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    B, T, H, N = r.shape
    if w.shape != (H, N) or u.shape != (H, N):
        raise ValueError(f"wkv5: w and u must be (H, N) = {(H, N)}, got {tuple(w.shape)} and {tuple(u.shape)}")
    if state is not None and state.shape != (B, H, N, N):
        raise ValueError(f"wkv5: state must be (B, H, N, N) = {(B, H, N, N)}, got {tuple(state.shape)}")
    if backend == "auto":
        backend = "reference" if T == 1 else "chunked"
    if backend not in _BACKENDS:
        raise ValueError(f"wkv5: unknown backend {backend!r}; choose from auto, {', '.join(_BACKENDS)}")
    operator, device = _BACKENDS[backend], r.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):  # else its matrix products would be rounded to half precision
            return operator(r, k, v, w, u, state)
    return operator(r, k, v, w, u, state)
