"""Matrix products of the layers in training: x W^T and its two gradients, each by the library that is quicker at it.

    Linear                                        nn.Linear without a bias: what the layers use
    multiply, gradient_by_x, gradient_by_weight   its product and derivatives, for those who differentiate by hand
    onednn()                                      whether float32 products of a training step take oneDNN here

PyTorch multiplies float32 matrices on a processor with Intel's MKL, and bfloat16 ones with oneDNN. On AMD's processors
with AVX-512, oneDNN is 5 to 10 % quicker for x W^T and for the gradient by x, slower for the gradient by W; measured by
`benchmarks/training.py`. Everywhere else, without gradients, and under torch.compile this is nn.Linear itself.

Symbols: x (..., K), W (N, K). What it is not: another result; sums are taken in another order, that is all. A choice
by the processor, not by a stopwatch: else two runs on one machine could differ.

Source: `mkldnn::_linear_pointwise`, the operator that torch.compile itself makes of nn.Linear on a processor.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

FEW = 64  # rows that are not worth it


class Linear(nn.Linear):
    """x (..., K) -> x W^T (..., N)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        quick = torch.is_grad_enabled() and suits(x, self.weight)
        return _Product.apply(x, self.weight) if quick else F.linear(x, self.weight)


def suits(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN multiplies these two, in training."""
    return (
        not torch.compiler.is_compiling()
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and type(x) in (Tensor, nn.Parameter)
        and type(weight) in (Tensor, nn.Parameter)  # a subclass has no memory of its own
        and not torch.is_autocast_enabled("cpu")
        and x.numel() >= FEW * x.shape[-1] > 0
        and onednn()
    )


@functools.cache
def onednn() -> bool:
    """Whether this is an AMD processor with AVX-512, and this PyTorch has the operator."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    has = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(has.get("avx512_f", False)) and "amd" in str(has.get("cpu_name", "")).lower()


def multiply(x: Tensor, weight: Tensor, by_onednn: bool) -> Tensor:
    """x W^T (..., N) of x (..., K), without autograd; by_onednn: what `suits` said."""
    return _multiply(x, weight) if by_onednn else F.linear(x, weight)


def gradient_by_x(g: Tensor, weight: Tensor, by_onednn: bool) -> Tensor:
    """(..., K), from the gradient g (..., N) by the product."""
    return _multiply(g, weight.T) if by_onednn else g @ weight


def gradient_by_weight(g: Tensor, x: Tensor) -> Tensor:
    """(N, K), from the gradient g (..., N) by the product."""
    return g.flatten(0, -2).T @ x.flatten(0, -2)


@functools.cache
def _operator() -> torch._ops.OpOverload:
    return torch.ops.mkldnn._linear_pointwise.default


def _multiply(x: Tensor, weight: Tensor) -> Tensor:
    return _operator()(x, weight, None, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight).data  # no view of anything, so that what follows may work in its place

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        x, weight = ctx.saved_tensors
        gx = gradient_by_x(g, weight, True) if ctx.needs_input_grad[0] else None
        return gx, gradient_by_weight(g, x) if ctx.needs_input_grad[1] else None
