"""`kernels/elementwise_cpu.cpp`, called: the parts of a layer that are no matrix product, forward and backward.

    mix_forward, mix_backward                     token shift and its mixes
    normed_gate_forward, normed_gate_backward_    the end of time mixing
    relu2_forward_, relu2_backward_               the middle of channel mixing
    gate_forward, gate_backward                   its end
    softmax_                                      the loss
    kernel_format                                 whether the kernel can do it for given tensors

What each computes stands in `fused.py`, which also gives them to autograd one by one; `by_hand.py` calls them one after
the other. Tensors are contiguous, and `format` is what `kernel_format` said. A name that ends in _ overwrites: forward
its input, backward the gradient it was given.

Symbols: B batch, T steps, D channels, N channels of a head. What it is not: a check of what it is given.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from rwkv_nb.wkv import build, cpu

SOURCE = "elementwise_cpu.cpp"
PIECES = 32  # parts that the rows are cut into: the same for any number of threads, so that sums are too
MOST_MIXES = 4


class _Shape(ctypes.Structure):
    """`struct Shape` of the source."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "D", "N", "M", "format", "threads", "pieces")),
        ("parallel", ctypes.c_void_p),
    ]


def _struct(*fields: str | tuple[str, type]) -> type[ctypes.Structure]:
    """A structure of pointers, in the order of the source's."""
    members = [(f, ctypes.c_void_p) if isinstance(f, str) else f for f in fields]
    return type("Arguments", (ctypes.Structure,), {"_fields_": members})


_POINTERS = ctypes.c_void_p * MOST_MIXES
_MixArguments = _struct("x", "before", ("mix", _POINTERS), ("out", _POINTERS), "gx", "gbefore", "gmix")
_NormedGateArguments = _struct(
    "y", "g", "weight", "bias", ("eps", ctypes.c_double), "gout", "out", "gy", "gg", "gparameters"
)
_PointwiseArguments = _struct("a", "b", "gout", "out", "ga", "gb")
_SoftmaxArguments = _struct("logits", "targets", "weights", "losses", "largest", "at")

_FORMATS = {  # of the residual stream and parameters, of matrix products -> number in the source
    (torch.float32, torch.float32): 0,
    (torch.float64, torch.float64): 1,
    (torch.float32, torch.bfloat16): 2,
}


def narrow_of(x: Tensor) -> torch.dtype:
    """What a matrix product of x will be given: x's own dtype, or that of autocast."""
    if x.dtype == torch.float32 and x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu")
    return x.dtype


def narrow_dtype(format: int, x: Tensor) -> torch.dtype:
    """Of matrix products, where the residual stream is x."""
    return torch.bfloat16 if format == 2 else x.dtype


def kernel_format(wide: torch.dtype, narrow: torch.dtype, x: Tensor, *others: Tensor) -> int | None:
    """The kernel's number for these dtypes; None: it cannot be used for these tensors, or is not worth it."""
    format = _FORMATS.get((wide, narrow))
    if format is None or torch.compiler.is_compiling() or x.dim() == 3 and x.shape[1] == 1:
        return None
    for tensor in (x, *others):
        if type(tensor) not in (Tensor, torch.nn.Parameter) or tensor.device.type != "cpu":  # a subclass has no memory
            return None
    return format if library() else None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernel; None where there is no compiler (`wkv5` says so)."""
    try:
        return build.load("elementwise_cpu", [SOURCE], build.cxx_flags())
    except build.BuildError:
        return None


def _pieces(x: Tensor) -> int:
    """Pieces that each row is cut into."""
    return max(1, min(x.shape[1], PIECES // max(1, x.shape[0])))


def run(name: str, format: int, x: Tensor, arguments: ctypes.Structure, N: int = 0, M: int = 0) -> None:
    B, T, D = x.shape[0], x.shape[1], x[0, 0].numel() if x.numel() else 0
    if D:
        shape = _Shape(B, T, D, N, M, format, torch.get_num_threads(), _pieces(x), cpu.openmp()[0])
        getattr(library(), f"elementwise_{name}")(ctypes.byref(shape), ctypes.byref(arguments))


def _addresses(tensors) -> ctypes.Array:
    return _POINTERS(*(x.data_ptr() for x in tensors))


def mix_forward(format: int, x: Tensor, before: Tensor, mixes: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What `mix` returns; all contiguous, before (B, D) in the dtype of x."""
    outs = tuple(torch.empty_like(x, dtype=narrow_dtype(format, x)) for _ in mixes)
    arguments = _MixArguments(x.data_ptr(), before.data_ptr(), _addresses(mixes), _addresses(outs))
    run("mix_forward", format, x, arguments, M=len(mixes))
    return outs


def mix_backward(
    format: int, x: Tensor, before: Tensor, mixes: Sequence[Tensor], grads: Sequence[Tensor]
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """The gradients by x, by before and by each mix, of those by the outputs (contiguous)."""
    gx, gbefore, M = torch.empty_like(x), torch.empty_like(before), len(mixes)
    gmix = x.new_empty(x.shape[0] * _pieces(x), M, x.shape[2])
    arguments = _MixArguments(
        x.data_ptr(), before.data_ptr(), _addresses(mixes), _addresses(grads),
        gx.data_ptr(), gbefore.data_ptr(), gmix.data_ptr(),
    )  # fmt: skip
    run("mix_backward", format, x, arguments, M=M)
    return gx, gbefore, gmix.sum(0).view(M, *mixes[0].shape).unbind(0)


def normed_gate_forward(format: int, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """What `normed_gate` returns; all contiguous."""
    out = torch.empty_like(g)
    pointers = (y.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps)
    run("normed_gate_forward", format, g, _NormedGateArguments(*pointers, None, out.data_ptr()), N=y.shape[-1])
    return out


def normed_gate_backward_(
    format: int, y: Tensor, g: Tensor, weight: Tensor, bias: Tensor, eps: float, gout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients by y, g, weight and bias, of gout by the output; the one by g takes the place of gout."""
    gy = torch.empty_like(y)
    gparameters = weight.new_empty(g.shape[0] * _pieces(g), 2, g.shape[2])
    arguments = _NormedGateArguments(
        y.data_ptr(), g.data_ptr(), weight.data_ptr(), bias.data_ptr(), eps,
        gout.data_ptr(), None, gy.data_ptr(), gout.data_ptr(), gparameters.data_ptr(),
    )  # fmt: skip
    run("normed_gate_backward", format, g, arguments, N=y.shape[-1])
    return gy, gout, *gparameters.sum(0).unbind(0)


def relu2_forward_(format: int, x: Tensor) -> Tensor:
    """max(x, 0)^2 in the place of x (contiguous)."""
    run("relu2_forward", format, x, _PointwiseArguments(None, None, None, x.data_ptr()))
    return x


def relu2_backward_(format: int, out: Tensor, gout: Tensor) -> Tensor:
    """The gradient by x in the place of gout, that of the output."""
    arguments = _PointwiseArguments(out.data_ptr(), None, gout.data_ptr(), None, gout.data_ptr())
    run("relu2_backward", format, out, arguments)
    return gout


def gate_forward(format: int, r: Tensor, v: Tensor) -> Tensor:
    """What `gate` returns; both contiguous."""
    out = torch.empty_like(r, dtype=torch.float32 if format == 2 else r.dtype)
    run("gate_forward", format, r, _PointwiseArguments(r.data_ptr(), v.data_ptr(), None, out.data_ptr()))
    return out


def gate_backward(format: int, r: Tensor, v: Tensor, gout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients by r and by v, of gout by the output."""
    gr, gv = torch.empty_like(r), torch.empty_like(v)
    arguments = _PointwiseArguments(r.data_ptr(), v.data_ptr(), gout.data_ptr(), None, gr.data_ptr(), gv.data_ptr())
    run("gate_backward", format, r, arguments)
    return gr, gv


def softmax_(format: int, logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """What `fused.softmax_` returns, logits (n, V) being overwritten; all contiguous."""
    losses, largest, at = torch.empty_like(weights), torch.empty_like(weights), torch.empty_like(targets)
    pointers = (x.data_ptr() for x in (logits, targets, weights, losses, largest, at))
    run("softmax", format, logits[None], _SoftmaxArguments(*pointers))
    return losses, largest, at
