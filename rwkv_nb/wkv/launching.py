"""What the two ways to run `kernels/*.cu` share: the tensors of a call, in the order of the functions of launch.h.

`cuda.py` hands them to a GPU, `emulated.py` to the processor. What it is not: the choice of a kernel, or of a compiler.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from .reference import zeros_if_none

HEAD_SIZES = (16, 32, 64, 128)
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class LaunchError(RuntimeError):
    """A kernel was compiled and does not run; the message holds the library's own words."""


def supports(N: int) -> str | None:
    """None if there is a kernel for heads of N channels, else why not."""
    return None if N in HEAD_SIZES else f"head size {N} is none of {', '.join(map(str, HEAD_SIZES))}"


def saved_shape(B: int, T: int, H: int, N: int) -> tuple[int, ...]:
    """Nothing is kept for the backward pass: it computes the states again."""
    return (0,)


def forward(
    call: Callable[[str, Tensor, list[Tensor]], None],
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y (B, T, H, N) in r's dtype and the last state (B, H, N, N). `call` gets "forward", r and all tensors."""
    state = zeros_if_none(state, r)
    y, last = torch.empty_like(r), torch.empty_like(state)
    call("forward", r, [r, k, v, w, u, state, y, last])
    return y, last


def backward(
    call: Callable[[str, Tensor, list[Tensor]], None],
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, gy: Tensor, glast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """gr, gk, gv in r's dtype; gw (of the raw w), gu (H, N) and gstate (B, H, N, N) float32."""
    B, _, H, N = r.shape
    state, glast = zeros_if_none(state, r), zeros_if_none(glast, r)
    gr, gk, gv, gw, gu, gstate = (torch.empty_like(x) for x in (r, k, v, w, u, state))
    parts = w.new_empty(2, B, H, N)
    call("backward", r, [r, k, v, w, u, state, gy, glast, gr, gk, gv, gw, gu, gstate, parts])
    return gr, gk, gv, gw, gu, gstate


def run(library: ctypes.CDLL, function: str, r: Tensor, tensors: list[Tensor], stream: int | None) -> None:
    """Call one function of launch.h. Raises LaunchError if it fails."""
    numbers = [ctypes.c_int(DTYPES[r.dtype]), ctypes.c_int(r.shape[-1]), *(ctypes.c_int64(n) for n in r.shape[:-1])]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in tensors]
    if code := getattr(library, function)(*numbers, *pointers, ctypes.c_void_p(stream)):
        raise LaunchError(f"{function} on {r.device} failed with code {code}: {library.wkv5_error(code).decode()}")
