"""Float32 products in float32, whatever a program allows elsewhere: tf32 on a GPU, bfloat16 on a processor.

    with exact_products():
        a @ b

The operator's gradient of w is a small difference of large sums: factors rounded to 10 bits would leave few digits.

What it is not: autocast, which is another switch (`torch.autocast`), or safe where another thread sets the same
switches meanwhile; they are the whole program's. There are two kinds: the older `torch.set_float32_matmul_precision`,
and from torch 2.9 on one for each library as well, which the older one sets too and must not contradict.
"""

from __future__ import annotations

import functools
from types import TracebackType

import torch


class exact_products:
    """Within: products of float32 numbers are not rounded more than float32. After: all switches say what they said.

    A switch of a library that only followed a wider one may say it by itself from then on.
    """

    __slots__ = ("libraries", "older")

    def __enter__(self) -> None:
        try:
            self.older: str | None = torch.get_float32_matmul_precision()
        except RuntimeError:  # a library's own switch allows what the older one forbids
            self.older = None
        if self.older == "highest":
            return
        self.libraries = [(library, library.fp32_precision) for library in _libraries()]
        if self.older is not None:
            torch.set_float32_matmul_precision("highest")  # sets those of the libraries too
        else:
            for library, _ in self.libraries:
                library.fp32_precision = "ieee"

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.older == "highest":
            return
        if self.older is not None:
            torch.set_float32_matmul_precision(self.older)
        for library, before in self.libraries:
            if self.older is None:
                library.fp32_precision = "none"  # what `torch.backends.fp32_precision` says for all libraries
            if library.fp32_precision != before:
                library.fp32_precision = before


@functools.cache
def _libraries() -> list:
    """The products of cuBLAS and oneDNN, where each has a switch of its own."""
    found = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    return [library for library in found if hasattr(library, "fp32_precision")]
