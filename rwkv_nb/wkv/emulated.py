"""The CUDA kernels' own source, run on the processor: a backend of `wkv5`, and a bench for kernels under trial.

As a backend it compiles `kernels/wkv5_cuda.cu` once per head size with the C++ compiler (two or three seconds) and
runs it block by block, thread by thread: right, deterministic, and slow. CPU tensors; heads of 16, 32, 64 or 128.

`run` takes the text of a kernel instead, ours with a line changed or the reader's own, runs it with every access
checked (see `emulator.py`), and returns results, races, problems and counts:

    report = run(read_source().replace("__syncthreads();", ""), r, k, v, w, u)
    print(report.races[0])

What it is not: fast; for work use `cpu` or `chunked`.
"""

from __future__ import annotations

import ctypes
import functools
import re

import torch
from torch import Tensor

from . import build, emulator, launching
from .emulator import Launch, Report
from .launching import DTYPES, HEAD_SIZES, saved_shape, supports

__all__ = [
    "DEVICE", "HEAD_SIZES", "backward", "forward", "pieces", "read_source", "run", "saved_shape", "supports", "why_not",
]  # fmt: skip

DEVICE = "cpu"  # of the tensors that it takes
SOURCE = "wkv5_cuda.cu"
FLAGS = ("-std=c++17", "-O2", "-ffp-contract=off", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas")
_failure: list[str] = []


def why_not(device: object = None) -> str | None:
    """None if the backend can run here, else what is missing and the remedy. Compiles nothing."""
    return _failure[0] if _failure else emulator.why_not()


@functools.cache
def _library(N: int, dtype: torch.dtype | None, kernel: str) -> ctypes.CDLL:
    only = [f"-DWKV5_HEAD_SIZE={N}"]
    if kernel == "chunked":
        # Long: one number format at a time, and -O1 takes the compiler two thirds of -O2's time.
        only += ["-DWKV5_CHUNKED", f"-DWKV5_DTYPE={DTYPES[dtype]}", "-O1"]
    try:
        library = build.load("wkv5_emulated", ["launch_emulated.cpp"], [*FLAGS, *only])
    except build.BuildError as error:
        _failure[:] = [str(error)]
        raise
    library.wkv5_error.restype = ctypes.c_char_p
    return library


def _call(kernel: str, direction: str, r: Tensor, tensors: list[Tensor]) -> None:
    library = _library(r.shape[-1], r.dtype if kernel == "chunked" else None, kernel)
    launching.run(library, f"wkv5_{kernel}_{direction}", r, tensors, None)


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object, kernel: str = "plain",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `launching.forward`; kernel: "plain" or "chunked"."""
    return launching.forward(functools.partial(_call, kernel), r, k, v, w, u, state)


def backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object,
    gy: Tensor, glast: Tensor, kernel: str = "plain",
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `launching.backward`; kernel: "plain" or "chunked"."""
    return launching.backward(functools.partial(_call, kernel), r, k, v, w, u, state, gy, glast)


def read_source(file: str = SOURCE) -> str:
    """The text of a kernel file."""
    return (build.kernels_folder() / file).read_text(encoding="utf-8")


def pieces(source: str) -> dict[str, str]:
    """Cut a kernel file at its marker comments `// [name]`: name -> the lines below, up to the next marker."""
    parts = re.split(r"^[ \t]*// \[(.+?)\][ \t]*\n", source, flags=re.MULTILINE)
    return {name: text for name, text in zip(parts[1::2], parts[2::2], strict=True) if name != "end"}


def run(
    source: str | None,
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    state: Tensor | None = None,
    gy: Tensor | None = None,
    glast: Tensor | None = None,
    **options: object,
) -> Report:
    """Run a kernel text on given tensors; backward too if gy is given.

    Args:
        source: text that defines `wkv5_forward`, and for backward the other kernels, with the parameters that they have
            in `kernels/wkv5_cuda.cu`; None: that file.
        r, k, v, w, u, state, gy, glast: as for `forward` and `backward`; state and glast default to zeros.
        options: schedule, seed, checked, switch_often, limit, seconds; see `emulator.launch`.

    Returns: a report whose arrays are y and last, and with gy gr, gk, gv, gw, gu, gstate.
    Raises: as `emulator.launch`.
    """
    B, T, H, N = r.shape
    state = torch.zeros(B, H, N, N) if state is None else state
    y, last = torch.full_like(r, torch.nan), torch.full_like(state, torch.nan)
    inputs = {"r": r, "k": k, "v": v, "w": w, "u": u, "state": state}
    launches = []

    def add(kernel: str, *names: str, **outputs: Tensor) -> None:
        values = {**inputs, **outputs}
        arguments = {"steps": T, "heads": H, **{n: values[n] for n in names}, **outputs}
        launches.append(Launch(f"{kernel}<{N}, {emulator.TYPES[r.dtype]}>", B * H, N, arguments))

    def add_sum(parts: str, total: str) -> None:
        arguments = {"batch": B, "size": H * N, parts: inputs[parts], total: inputs[total]}
        launches.append(Launch("wkv5_sum_over_batch", -(-H * N // 128), 128, arguments))

    add("wkv5_forward", "r", "k", "v", "w", "u", "state", y=y, last=last)
    if gy is not None:
        inputs |= {"gy": gy, "glast": torch.zeros_like(state) if glast is None else glast}
        inputs |= {n: torch.full((B, H, N), torch.nan) for n in ("gw_parts", "gu_parts")}
        inputs |= {n: torch.full((H, N), torch.nan) for n in ("gw", "gu")}
        gr, gk, gv = (torch.full_like(r, torch.nan) for _ in range(3))
        add("wkv5_backward_k", "r", "v", "w", "u", "gy", "glast", gk=gk)
        add("wkv5_backward_v", "r", "k", "w", "u", "gy", "glast", gv=gv, gstate=torch.full_like(state, torch.nan))
        add("wkv5_backward_r", "r", "k", "v", "w", "u", "state", "gy", gr=gr, gu_parts=inputs["gu_parts"])
        add("wkv5_backward_w", "r", "k", "v", "w", "state", "gy", "glast", gw_parts=inputs["gw_parts"])
        add_sum("gu_parts", "gu")
        add_sum("gw_parts", "gw")
    return emulator.launch(read_source() if source is None else source, launches, **options)
