"""Memory that is quick to read and quick to get: large pages for weights, and states that are used again.

A page fresh from the system must be found and cleared, 4 KB at a time. Reading half a gigabyte of weights takes half as
long again when each 4 KB of it must be looked up; a state of a few megabytes, fresh for each token, costs as much as a
part of the products.

What it is not: an allocator for anything else. Nothing here changes how the process gets its other memory.
"""

from __future__ import annotations

import math
import mmap
import weakref

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 26  # bytes that Pages asks the system for, at least
KEPT = 4  # free buffers that Recycled keeps


def _from_system(size: int) -> mmap.mmap | None:
    """`size` bytes, in pages of 2 MB if the system has them; None where it cannot be asked (only Linux can)."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    block.madvise(mmap.MADV_HUGEPAGE)
    return block


class Pages:
    """Memory for many tensors, in a few large blocks. A block is given back when the last tensor in it is gone."""

    def __init__(self) -> None:
        self._block: mmap.mmap | None = None
        self._used = 0

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor like torch.empty's."""
        size = math.prod(shape) * dtype.itemsize
        if size and (self._block is None or self._used + size > len(self._block)):
            self._block, self._used = _from_system(max(size, BLOCK)), 0
        if size == 0 or self._block is None:
            return torch.empty(shape, dtype=dtype)
        x = torch.frombuffer(self._block, dtype=dtype, count=math.prod(shape), offset=self._used)
        self._used += -(-size // 64) * 64  # whole cache lines
        return x.view(shape)


class Recycled:
    """Tensors of one size at a time: when one is gone, and all its views, the next one takes its memory."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []

    def empty(self, n: int) -> Tensor:
        """(n,) float32, not cleared."""
        memory = self._free.pop() if self._free else None
        if memory is None or len(memory) != n:
            self._free.clear()
            block = _from_system(4 * n) if n else None
            memory = np.empty(n, np.float32) if block is None else np.frombuffer(block, np.float32)
        lent = memory.view()  # lives as long as the tensor or one of its views
        weakref.finalize(lent, _give_back, self._free, memory).atexit = False
        return torch.from_numpy(lent)


def _give_back(free: list[np.ndarray], memory: np.ndarray) -> None:
    if len(free) < KEPT:
        free.append(memory)
