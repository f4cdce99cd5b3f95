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
from torch.utils._python_dispatch import _disable_current_modes

from . import build, launching
from .launching import DTYPES, HEAD_SIZES, saved_shape, supports

__all__ = ["DEVICE", "HEAD_SIZES", "backward", "forward", "prepare", "saved_shape", "supports", "why_not"]

DEVICE = "cuda"  # of the tensors that it takes
OLDEST = (7, 5)  # the oldest architecture that today's nvcc compiles for
TENSOR_CORES = (8, 0)  # the oldest with products of tf32 numbers
ALIGNED = 16  # bytes: the chunked kernels read several neighbours at once
DRIVER_REMEDY = "update the driver, or put an nvcc on PATH that is no newer than the CUDA version shown by `nvidia-smi`"
# Not --use_fast_math: it would replace expf and expm1f, on which the decays near 1 depend, by rough ones.
FLAGS = ("-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC", "--cudart", "static", "-extra-device-vectorization")
# Head size, number format and architecture -> their kernels, or why there are none.
_libraries: dict[tuple[int, torch.dtype, tuple[int, int]], ctypes.CDLL | build.BuildError] = {}


def why_not(device: torch.device | None = None) -> str | None:
    """None if the backend can run on a GPU (None: on one of this machine's), else what is missing and the remedy.

    Compiles nothing.
    """
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return "this torch is a CPU build; with an NVIDIA GPU, install the CUDA build from pytorch.org"
        return "torch sees no NVIDIA GPU; check `nvidia-smi` and the driver"
    if build.find_nvcc() is None:
        return f"nvcc was not found: {build.NVCC_REMEDY}"
    devices = range(torch.cuda.device_count()) if device is None else [device]
    capabilities = {torch.cuda.get_device_capability(each) for each in devices}
    if (best := max(capabilities)) < OLDEST:
        return f"the GPU has compute capability {_dotted(best)}, nvcc needs {_dotted(OLDEST)}: use chunked"
    known = [library for (*_, capability), library in _libraries.items() if capability in capabilities]
    if known and all(isinstance(library, build.BuildError) for library in known):
        return str(known[-1])
    return None


def prepare(N: int, dtype: torch.dtype, device: torch.device) -> None:
    """Compile now what calls of one head size and number format need on a GPU, and launch the kernels over one step.

    What nvcc compiles a driver older than it may refuse, and says so only at a launch. Raises build.BuildError.
    """
    capability = torch.cuda.get_device_capability(device)
    _library(N, dtype, capability)
    with _disable_current_modes():  # whoever traces this call has tensors made that have no memory
        one = torch.zeros(1, 1, 1, N, dtype=dtype, device=device)
        w = torch.zeros(1, N, device=device)
        try:
            y, last = forward(one, one, one, w, w, None, None)
            backward(one, one, one, w, w, None, None, y, last)
        except launching.LaunchError as error:
            _libraries[N, dtype, capability] = failure = build.BuildError(
                f"the CUDA kernels were compiled but do not run ({error}): {DRIVER_REMEDY}"
            )
            raise failure from error


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


def _library(N: int, dtype: torch.dtype, capability: tuple[int, int]) -> ctypes.CDLL:
    """The kernels of one head size and number format, for one architecture; compiled once, or tried once."""
    found = _libraries.get((N, dtype, capability))
    if isinstance(found, build.BuildError):
        raise found.with_traceback(None)
    if found is not None:
        return found
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
        _libraries[N, dtype, capability] = error
        raise
    library.wkv5_error.restype = ctypes.c_char_p
    _libraries[N, dtype, capability] = library
    return library


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
