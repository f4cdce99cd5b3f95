"""WKV-5 on a processor in C++: `kernels/wkv5_cpu.cpp`, compiled when first needed, called through plain pointers.

float32, bfloat16 and float16 in and out, float32 inside; any head size (64, that of RWKV-5, has a build of its own, in
which the compiler knows it); any T. Threads share batch x heads: as many as torch uses, from torch's own pool where it
is there, and every number is the same whatever their count.

What it is not: a check of its input; `rwkv_nb.wkv.wkv5` does that. The mathematics is in the header of the source.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from . import build

DEVICE = "cpu"  # of the tensors that it takes
SOURCE = "wkv5_cpu.cpp"
HEAD_SIZE = 64  # the one with a build of its own
KEEP_EVERY = 256  # steps from one state that forward keeps for backward to the next
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_failure: list[str] = []


class _Call(ctypes.Structure):
    """`struct Call` of the source, field by field."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "H", "N", "format", "every", "threads")),
        *((name, ctypes.c_void_p) for name in ("parallel", "r", "k", "v", "gy", "y", "gr", "gk", "gv")),
        *((name, ctypes.c_void_p) for name in ("w", "u", "state", "glast", "saved", "last", "gw", "gu", "gstate")),
    ]


def why_not(device: object = None) -> str | None:
    """None if the backend can run here, else what is missing and the remedy. Compiles nothing."""
    if _library.cache_info().currsize:  # what one head size needs was compiled: no need to look for the compiler again
        return None
    if _failure:
        return _failure[0]
    return None if build.find_cxx() else f"no C++ compiler was found: {build.CXX_REMEDY}"


def supports(N: int) -> str | None:
    """None: heads of any size can be done."""
    return None


def prepare(N: int, dtype: object = None, device: object = None) -> None:
    """Compile now what heads of size N need, in any number format. Raises build.BuildError."""
    _library(N)


def saved_shape(B: int, T: int, H: int, N: int) -> tuple[int, ...]:
    """States in the middle of the time, from which backward computes the others again."""
    return (B, H, max(0, T - 1) // KEEP_EVERY, N, N)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor | None, saved: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, N) in r's dtype and the last state (B, H, N, N). See `rwkv_nb.wkv.wkv5`."""
    B, T, H, N = r.shape
    y, last = torch.empty_like(r), w.new_empty(B, H, N, N)
    _run("wkv5_forward", r, k=k, v=v, w=w, u=u, state=state, y=y, last=last, saved=saved)
    return y, last


def backward(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None,
    saved: Tensor,
    gy: Tensor,
    glast: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gr, gk, gv in r's dtype; gw (of the raw w), gu (H, N) and gstate (B, H, N, N) float32."""
    B, T, H, N = r.shape
    gr, gk, gv, gw, gu = (torch.empty_like(x) for x in (r, k, v, w, u))
    gstate = w.new_empty(B, H, N, N)
    inputs = {"k": k, "v": v, "w": w, "u": u, "state": state, "saved": saved, "gy": gy, "glast": glast}
    _run("wkv5_backward", r, **inputs, gr=gr, gk=gk, gv=gv, gw=gw, gu=gu, gstate=gstate)
    return gr, gk, gv, gw, gu, gstate


def _run(function: str, r: Tensor, **tensors: Tensor | None) -> None:
    B, T, H, N = r.shape
    threads = torch.get_num_threads()
    call = _Call(B, T, H, N, FORMATS[r.dtype], KEEP_EVERY, threads, openmp()[0], r.data_ptr())
    for name, x in tensors.items():
        setattr(call, name, None if x is None else x.data_ptr())
    if getattr(_library(N), function)(ctypes.byref(call)):
        raise MemoryError(f"{function}: not enough memory for the scratch of {threads} threads; use fewer threads")


@functools.cache
def _library(N: int) -> ctypes.CDLL:
    flags = build.cxx_flags(fast_math=False)
    if N == HEAD_SIZE:
        flags.append(f"-DPADDED={N}")
    try:
        return build.load("wkv5_cpu", [SOURCE], flags)
    except build.BuildError as error:
        _failure[:] = [str(error)]
        raise


@functools.cache
def openmp() -> tuple[int | None, int | None]:
    """Addresses of `GOMP_parallel` and `omp_get_num_threads` in the OpenMP library that torch runs on.

    None, None where that has another interface.
    """
    for file in (Path(torch.__file__).parent / "lib").glob("libtorch_cpu.*"):
        try:
            library = ctypes.CDLL(str(file))
            functions = library.GOMP_parallel, library.omp_get_num_threads
        except (AttributeError, OSError):  # no such function; no library that this system loads
            continue
        parallel, team = (ctypes.cast(function, ctypes.c_void_p).value for function in functions)
        return parallel, team
    return None, None
