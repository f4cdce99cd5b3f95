"""What this machine is good at, and how to make the most of it.

It is: the number format of matrix products, the number of threads, and an allocator that keeps what it has. It is not:
a benchmark; nothing is timed or changed unless a function is called.

Sources: the processor's own list of capabilities as torch reads it; mallopt(3) of the GNU C library.
"""

from __future__ import annotations

import contextlib
import ctypes
import platform
import sys
from collections.abc import Callable, Iterator

import torch

from rwkv_nb.wkv.powers import has_float64

# PRECISION flag -> (Lightning's name, dtype of matrix products under autocast); the weights are float32 in each
PRECISION = {
    "fp32": ("32-true", None),
    "tf32": ("32-true", None),
    "fp16": ("16-mixed", torch.float16),
    "bf16": ("bf16-mixed", torch.bfloat16),
}
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # of <malloc.h>
_BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")


def fast_bf16(device: str | None = None) -> bool:
    """Whether matrix products in bfloat16 are quicker than in float32 on "cpu" or "cuda" (None: cuda if there is one).

    A processor without such instructions (before 2020, most laptops) emulates them, and is slower than with float32. An
    Intel processor that has AVX-512's but not AMX does half as many operations a second with them as in float32
    (measured: benchmarks/RESULTS.md, "Training on a CPU"), where AMD's Zen 4 does twice as many.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device != "cpu":
        return False
    if hasattr(torch.cpu, "get_capabilities"):
        has = torch.cpu.get_capabilities()
        if not any(has.get(name, False) for name in _BF16_INSTRUCTIONS):
            return False
        only_avx512 = has.get("avx512_bf16", False) and not has.get("amx_bf16", False)
        return not (only_avx512 and "intel" in str(has.get("cpu_name", "")).lower())
    checks = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(check() for check in checks if check is not None)


def choose_threads(speed: Callable[[], float]) -> float:
    """Set torch's number of threads to all of them or to one, whichever makes `speed()` larger; returns that speed.

    Many small operations are shared out among threads that wait for each other while spinning. If another program
    keeps one core busy, each operation waits for the thread that shares its core, and two threads can be ten times
    slower than one. On an idle machine all threads win. Holds for the process.
    """
    several = torch.get_num_threads()
    if several == 1:
        return speed()
    together = speed()
    torch.set_num_threads(1)
    alone = speed()
    if together >= alone:
        torch.set_num_threads(several)
    return max(together, alone)


def keep_freed_memory() -> bool:
    """Tell glibc's malloc to keep large blocks instead of giving them back to Linux; returns whether it could be told.

    A training step frees and takes the same tensors again and again. By default each block above a few megabytes is
    returned to the system and comes back as fresh pages, which the system must clear: that can cost as much as the
    arithmetic. The price: the process keeps the most memory that it ever needed. Holds for the process, until it ends.
    """
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    mallopt.argtypes, mallopt.restype = [ctypes.c_int, ctypes.c_int], ctypes.c_int
    wanted = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: 2**31 - 1, _M_TOP_PAD: 64 << 20}
    return all([mallopt(name, value) == 1 for name, value in wanted.items()])


def wide(x: torch.Tensor) -> torch.Tensor:
    """x for a long sum: in float64, or in float32 where the device has nothing wider."""
    return x.double() if has_float64(x.device) else x.float()


def autocast(precision: str, device_type: str) -> contextlib.AbstractContextManager:
    """The context in which a forward pass multiplies matrices as the flag `precision` says."""
    dtype = PRECISION[precision][1]
    if dtype is None:
        return contextlib.nullcontext()
    return torch.autocast(device_type, dtype=dtype, cache_enabled=False)


@contextlib.contextmanager
def tf32_products(allowed: bool) -> Iterator[None]:
    """Within: whether a GPU may round the factors of float32 products to 10 bits. Else: nothing changes."""
    if not torch.cuda.is_available():
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
