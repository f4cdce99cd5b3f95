"""The WKV-5 operator (notebooks 04 and 05): one function, several ways to compute it, the same numbers.

`wkv5` is how the rest of the package computes it; other C++ of the package is compiled by `build.py` too, and notebook
05 looks into `emulated`. Ways to compute it ("backends"):

    reference   the equation as a loop                              any device
    chunked     the same as matrix products, in plain PyTorch       any device
    cpu         C++, compiled once                                  a processor, with a C++ compiler
    cuda        kernels/, compiled once                             an NVIDIA GPU, with nvcc
    emulated    the source of the CUDA kernels on a processor       to study them, with a C++ compiler

Nothing is compiled or chosen at import.
"""

from __future__ import annotations

import functools
import warnings
from contextlib import nullcontext

import torch
from torch import Tensor

from .build import BuildError
from .chunked import wkv5_chunked
from .operator import BACKENDS, PLAIN, apply, check_numbers
from .precision import exact_products
from .reference import LARGEST_W, wkv5_reference, working_dtype

__all__ = ["backends", "wkv5", "wkv5_chunked", "wkv5_reference"]

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
MAX_NUMBERS = 2**31 - 1  # of one tensor, for a kernel that counts in 32 bits


def backends() -> dict[str, str]:
    """Name of each way to compute `wkv5` -> "available", or what is missing and the remedy."""
    return {name: module.why_not() or "available" for name, module in BACKENDS.items()}


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
        r, k, v: (B, T, H, N) receptance, key, value, of one dtype: float32, float64, bfloat16 or float16. T may be 0.
        w: (H, N) the raw `time_decay`; the decay of a step is exp(-exp(w)).
        u: (H, N) the bonus of the current step, `time_faaaa`.
        state: (B, H, N, N) as [key, value], the state before the first step; None means zeros. Never changed.
        backend: one of `backends()`, or "auto": the loop for a single step, else the fastest that this machine has.

    Returns:
        y (B, T, H, N) in the dtype of r, and the state after the last step (B, H, N, N). All arithmetic and the
        state are float32 (float64 if r is), also where autocast or tf32 is on. Differentiable in all six tensors, once.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device, is not contiguous, w holds NaN (not looked for on a
            GPU, which would have to wait), the backend is unknown or cannot do this.
        BuildError: a backend asked for by name cannot be compiled. "auto" then takes "chunked" and says so once; so it
            does where kernels were compiled and do not run.
    """
    _check(r, k, v, w, u, state)
    T = r.shape[1]
    dtype = working_dtype(r)
    state = None if state is None else state.to(dtype)
    w, u = w.to(dtype), u.to(dtype)
    if backend == "auto" and T == 1:  # a step of generation: the operator around it would cost as much as the step
        check_numbers(w)
        if torch.is_grad_enabled() and w.requires_grad:  # as in the operator: for the derivatives
            w = w.clamp(max=LARGEST_W)
        device = r.device.type
        plain = torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
        with plain, nullcontext() if torch.compiler.is_compiling() else exact_products():
            return wkv5_reference(r, k, v, w, u, state)
    if backend == "auto":
        backend = best_backend(r)
    else:
        _can(backend, r)
    return apply(r, k, v, w, u, state, backend)


def _check(r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None) -> None:
    """Raise ValueError unless the arguments fit each other."""
    if r.dim() != 4:
        raise ValueError(f"wkv5: r has shape {tuple(r.shape)}; expected (B, T, H, N)")
    B, _, H, N = r.shape
    given = {"k": (k, r.shape), "v": (v, r.shape), "w": (w, (H, N)), "u": (u, (H, N)), "state": (state, (B, H, N, N))}
    for name, (x, shape) in given.items():
        if x is not None and x.shape != tuple(shape):
            raise ValueError(
                f"wkv5: {name} has shape {tuple(x.shape)}; expected {tuple(shape)}, as r is {tuple(r.shape)}"
            )
    for name, x in (("r", r), *((name, x) for name, (x, _) in given.items() if x is not None)):
        if x.dtype not in DTYPES:
            raise ValueError(f"wkv5: {name}, of shape {tuple(x.shape)}, is {x.dtype}; expected floating point numbers")
        if name in ("k", "v") and x.dtype != r.dtype:
            raise ValueError(f"wkv5: {name}, of shape {tuple(x.shape)}, is {x.dtype}; expected {r.dtype}, as r is")
        if x.device != r.device:
            raise ValueError(f"wkv5: {name}, of shape {tuple(x.shape)}, is on {x.device}; expected {r.device}, as r is")
        if not x.is_contiguous():
            raise ValueError(
                f"wkv5: {name}, of shape {tuple(x.shape)}, has strides {x.stride()}; expected a contiguous tensor: "
                f"call {name}.contiguous()"
            )


def _can(backend: str, r: Tensor) -> None:
    """Raise ValueError unless this backend can do it."""
    if backend not in BACKENDS:
        raise ValueError(f"wkv5: unknown backend {backend!r}; choose from auto, {', '.join(BACKENDS)}")
    if backend in PLAIN:
        return
    device = BACKENDS[backend].DEVICE
    if r.device.type != device:
        raise ValueError(f"wkv5: r is on {r.device}; expected a {device} tensor for backend {backend!r}")
    if r.dtype == torch.float64:
        raise ValueError(f"wkv5: r is float64; backend {backend!r} computes in float32: use reference or chunked")
    if r.numel() > MAX_NUMBERS:
        raise ValueError(
            f"wkv5: r of shape {tuple(r.shape)} has {r.numel():,} numbers; expected at most {MAX_NUMBERS:,} for "
            f"backend {backend!r}: cut T in parts and hand the state on"
        )
    if reason := BACKENDS[backend].supports(r.shape[-1]):
        raise ValueError(f"wkv5: r of shape {tuple(r.shape)}: {reason}; use chunked")
    if reason := BACKENDS[backend].why_not(r.device):
        raise ValueError(f"wkv5: backend {backend!r} is not available: {reason}")


def best_backend(r: Tensor) -> str:
    """The backend that "auto" takes for r (B, T, H, N) with T > 1."""
    return "chunked" if r.numel() > MAX_NUMBERS else _choose(r.device, r.dtype, r.shape[-1])


@torch.compiler.assume_constant_result
def _choose(device: torch.device, dtype: torch.dtype, N: int) -> str:
    """The fastest backend for tensors on `device`: its own kernel, or chunks. torch.compile asks once: nothing here may
    depend on B or T."""
    module = BACKENDS.get(device.type)
    if device.type in PLAIN or module is None or dtype == torch.float64 or module.supports(N):
        return "chunked"
    reason = _ready(device.type, N, dtype, device)
    return "chunked" if reason else device.type


@functools.cache
def _ready(name: str, N: int, dtype: torch.dtype, device: torch.device) -> str | None:
    """Compile what such a call needs and try it now, so that "auto" can still take another; says once what is missing.

    Asked for each head size, number format and device: kernels are compiled for one of each, and cards may differ.
    """
    reason = BACKENDS[name].why_not(device)
    if reason is None:
        try:
            BACKENDS[name].prepare(N, dtype, device)
        except BuildError as error:
            reason = str(error)
    if reason:
        warnings.warn(f"wkv5 computes in plain PyTorch, which is slower: {reason}", stacklevel=2)
    return reason
