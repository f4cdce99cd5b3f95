"""WKV-5 on an NVIDIA GPU: the kernels of `kernels/`, compiled by nvcc when first needed, called through plain pointers.

Two ways: "plain" (`wkv5_cuda.cu`, one step after the other) and "chunked" (`wkv5_chunked.cu`, 16 steps at a time on the
tensor cores, from compute capability 8.0). The fastest that the GPU can do is taken.

What it is not: a check of its input; `rwkv_nb.wkv.wkv5` does that. The mathematics is in the headers of the sources.
"""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from . import build, launching
from .launching import DTYPES, HEAD_SIZES, saved_shape, supports

__all__ = ["DEVICE", "HEAD_SIZES", "backward", "forward", "prepare", "saved_shape", "supports", "why_not"]

DEVICE = "cuda"  # of the tensors that it takes
OLDEST = (7, 5)  # the oldest architecture that today's nvcc compiles for
TENSOR_CORES = (8, 0)  # the oldest with products of tf32 numbers
ALIGNED = 16  # bytes: the chunked kernels read several neighbours at once
# Not --use_fast_math: it would replace expf and expm1f, on which the decays near 1 depend, by rough ones.
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--cudart", "static", "-extra-device-vectorization")
_failure: list[str] = []


def why_not() -> str | None:
    """None if the backend can run here, else what is missing and the remedy. Compiles nothing."""
    if _failure:
        return _failure[0]
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "this torch is a CPU build; with an NVIDIA GPU, install the CUDA build from pytorch.org"
        return "torch sees no NVIDIA GPU; check `nvidia-smi` and the driver"
    if build.find_nvcc() is None:
        return f"nvcc was not found: {build.NVCC_REMEDY}"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST:
        return f"the GPU has compute capability {_dotted(capability)}, nvcc needs {_dotted(OLDEST)}: use chunked"
    return None


def prepare() -> None:
    """Compile now what the usual head size needs. Raises build.BuildError."""
    for dtype in (torch.float32, torch.bfloat16):
        _library(64, dtype, torch.cuda.get_device_capability())


def forward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object, kernel: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """See `launching.forward`; kernel: "plain", "chunked" or "auto"."""
    return launching.forward(functools.partial(_call, kernel), r, k, v, w, u, state)


def backward(
    r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor, state: Tensor, saved: object,
    gy: Tensor, glast: Tensor, kernel: str = "auto",
) -> tuple[Tensor, ...]:  # fmt: skip
    """See `launching.backward`; kernel: "plain", "chunked" or "auto"."""
    return launching.backward(functools.partial(_call, kernel), r, k, v, w, u, state, gy, glast)


def _call(kernel: str, direction: str, r: Tensor, tensors: list[Tensor]) -> None:
    capability = torch.cuda.get_device_capability(r.device)
    if kernel == "auto":
        kernel = "chunked" if capability >= TENSOR_CORES else "plain"
    library = _library(r.shape[-1], r.dtype, capability)
    tensors = [x if x.data_ptr() % ALIGNED == 0 else x.clone() for x in tensors]  # inputs; what is new is aligned
    with torch.cuda.device(r.device):
        stream = torch.cuda.current_stream().cuda_stream
        launching.run(library, f"wkv5_{kernel}_{direction}", r, tensors, stream)


@functools.cache
def _library(N: int, dtype: torch.dtype, capability: tuple[int, int]) -> ctypes.CDLL:
    """The kernels of one head size and number format, for one architecture."""
    nvcc = build.find_nvcc()
    try:
        if nvcc is None:
            raise build.BuildError(f"the CUDA kernels need nvcc, which was not found: {build.NVCC_REMEDY}")
        name = "".join(map(str, capability))
        only = [f"-DWKV5_HEAD_SIZE={N}", f"-DWKV5_DTYPE={DTYPES[dtype]}"]
        chunked = ["-DWKV5_CHUNKED"] if capability >= TENSOR_CORES else []
        flags = [*FLAGS, f"-gencode=arch=compute_{name},code=sm_{name}", *only, *chunked]
        library = build.load("wkv5_cuda", ["launch.cu"], flags, compiler=nvcc)
    except build.BuildError as error:
        _failure[:] = [str(error)]
        raise
    library.wkv5_error.restype = ctypes.c_char_p
    return library


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
